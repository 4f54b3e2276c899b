"""Measurements: `daruma bench …`. Tests say what happens; these say how fast."""
