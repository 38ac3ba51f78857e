"""Using a trained network: predictions, and files of it for other programs."""
