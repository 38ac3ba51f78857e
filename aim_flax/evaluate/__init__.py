"""Evaluation: a whole split, and what the memory is worth to a trained network."""
