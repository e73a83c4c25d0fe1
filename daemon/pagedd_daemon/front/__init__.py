"""The front process: sockets, authentication, validation, text, sessions, supervision."""
