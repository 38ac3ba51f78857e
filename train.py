"""Trains the network of a config: python train.py --config configs/digits_mlp.py:aim."""

from aim_flax.cli.train import main

if __name__ == "__main__":
    main()
