"""Text: tokenizer, detokenizer, chat template. Torch-free."""
