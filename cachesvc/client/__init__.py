"""The engine's side of the socket and of the shared memory."""
