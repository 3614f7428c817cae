"""Benchmark clients, workloads and reports."""
