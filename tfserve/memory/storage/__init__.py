"""Storage: the memory of both tiers, and how KV lies in it."""
