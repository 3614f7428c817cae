"""Attention over paged KV, one backend per kernel family."""
