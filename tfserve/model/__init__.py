"""Checkpoints in, tokens out: the decoder, its sampler, its tokenizer and the runner that drives them."""
