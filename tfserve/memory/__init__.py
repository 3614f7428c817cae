"""Paged KV memory: block pools, residency, layout."""
