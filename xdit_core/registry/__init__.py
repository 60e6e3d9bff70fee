"""The installed plugins: found by entry point, loaded one by one, and checked before they are used. Without torch."""
