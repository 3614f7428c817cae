"""The core: the loop that runs steps, its process, and what it is built of."""
