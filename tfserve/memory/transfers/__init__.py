"""Transfers: copies of KV between the tiers."""
