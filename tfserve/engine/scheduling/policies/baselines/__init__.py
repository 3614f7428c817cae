"""Baselines: policies from other papers, and controls that tell what each part of TokenFlow is worth."""
