"""Layers: linear layers by weight format, norms, the MLP, rotary embedding, SmoothQuant."""
