"""Studies: many runs, and what they tell."""
