"""Sampling: from logits to tokens, with penalties, grammars' masks and log probabilities."""
