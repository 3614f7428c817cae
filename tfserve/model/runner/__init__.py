"""The runner: applies a step plan to a model on one device."""
