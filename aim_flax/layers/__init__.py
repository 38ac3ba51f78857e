"""Layers and convolutions that XLA computes quickly on CPU, in place of Flax's and JAX's own."""
