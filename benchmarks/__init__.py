"""Benchmarks by subject. `python -m benchmarks.FAMILY.NAME --help` in a checkout describes one."""
