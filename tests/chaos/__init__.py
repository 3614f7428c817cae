"""A server under everything that clients do to one: `python -m tests.chaos --minutes 10`."""
