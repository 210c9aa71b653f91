"""Decides everything and does nothing: events in, effects out (start at `events`, then `node`)."""
