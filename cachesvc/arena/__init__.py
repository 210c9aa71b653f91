"""Extents: the memory that chunks lie in and the tables that say what is where."""
