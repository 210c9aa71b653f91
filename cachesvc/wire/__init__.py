"""What client and daemon say to each other, and how it is cut into frames; no I/O."""
