"""GPU benchmarks: tests, kernels, copies, steps and a burst, within a time limit."""
