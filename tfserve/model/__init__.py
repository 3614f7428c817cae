"""The model: loading, decoder, attention, sampler, tokenizer, grammars, and the runner that executes steps."""
