"""The gangs of a server: how many there are, and the threads that own them. Without torch."""
