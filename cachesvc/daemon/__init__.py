"""Turns sockets, finished I/O and the clock into events for the core, and its effects into I/O."""
