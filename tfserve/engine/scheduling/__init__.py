"""Scheduling: which requests run in the coming step, and what happens to the others. Torch-free."""
