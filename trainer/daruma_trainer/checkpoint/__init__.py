"""Saves that survive their writer: segments, manifests, cuts, and which blocks to save next."""
