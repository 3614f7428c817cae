"""What a GPU does: tests, kernels, copies, steps and a burst, within a time limit."""
