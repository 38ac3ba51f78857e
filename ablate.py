"""Trains arms with several seeds and compares them: python ablate.py --config FILE --arms A,B."""

from aim_flax.cli.ablate import main

if __name__ == "__main__":
    main()
