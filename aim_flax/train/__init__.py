"""Training: one run, or several seeds of it."""
