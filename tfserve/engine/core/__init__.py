"""The core: the loop that runs steps, its process, and its construction."""
