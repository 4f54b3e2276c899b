"""Observe, decide, write status, act."""
