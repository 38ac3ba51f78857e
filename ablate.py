"""Trains arms with several seeds and compares them: python ablate.py --config FILE --arms A,B."""

from aim_flax.cli import ablate

if __name__ == "__main__":
    ablate()
