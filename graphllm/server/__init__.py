"""The HTTP side of the process: the server itself, and the APIs it offers."""
