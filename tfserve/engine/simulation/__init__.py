"""A simulated engine: the real scheduler on a virtual clock, with a device that only lets time pass."""
