"""Scheduling, the engine loop and the embedding API."""
