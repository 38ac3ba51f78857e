"""Evaluates a checkpoint of a run: python eval.py --workdir runs/digits_mlp-aim-0."""

from aim_flax.cli.evaluate import main

if __name__ == "__main__":
    main()
