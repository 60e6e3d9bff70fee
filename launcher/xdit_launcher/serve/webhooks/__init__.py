"""Messages to addresses of clients when their jobs end."""
