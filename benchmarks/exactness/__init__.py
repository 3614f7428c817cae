"""Same tokens, same weights: preemption, quantization, other implementations."""
