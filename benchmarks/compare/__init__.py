"""Other servers and libraries on the same machine."""
