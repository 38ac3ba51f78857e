"""A network trained on one small batch of photographs, for the backbones' tests."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_sample_images


def photographs(count, height, width):
    """Images (count, height, width, 3) in [0, 1], cut from scikit-learn's two photographs."""
    photos = np.stack(load_sample_images().images)
    rng = np.random.default_rng(0)
    crops = []
    for i in range(count):
        top = rng.integers(photos.shape[1] - height + 1)
        left = rng.integers(photos.shape[2] - width + 1)
        crops.append(photos[i % 2, top : top + height, left : left + width])
    return jnp.asarray(np.stack(crops) / 255, jnp.float32)


def loss_and_grads(net, variables, images, labels):
    """Mean cross-entropy in training mode, (logits, batch statistics after it), gradients."""

    def loss_fn(params):
        logits, updated = net.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, (logits, updated["batch_stats"])

    (loss, outputs), grads = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
    return loss, outputs, grads


def train(net, images, labels, steps, learning_rate=0.05):
    """Takes steps of gradient descent with momentum on one batch.

    Returns the losses, and the variables before and after.
    """
    optimizer = optax.sgd(learning_rate, momentum=0.9)

    @jax.jit
    def step(variables, opt_state, images, labels):
        loss, (_, batch_stats), grads = loss_and_grads(net, variables, images, labels)
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": batch_stats}, opt_state, loss

    before = after = jax.jit(net.init)(jax.random.key(0), images)
    opt_state = optimizer.init(before["params"])
    losses = []
    # Not a scan: XLA's convolutions are slow in loops on CPU.
    for _ in range(steps):
        after, opt_state, loss = step(after, opt_state, images, labels)
        losses.append(float(loss))
    return losses, before, after
