"""Measurements, by what they are about. `python -m benchmarks.FAMILY.NAME --help` in a checkout says what one does."""
