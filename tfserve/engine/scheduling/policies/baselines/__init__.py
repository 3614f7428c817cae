"""Baselines: policies from other papers, and simple ones that tell what each part of TokenFlow is worth."""
