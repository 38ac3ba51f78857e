"""Looks on at a run from its compiled calls, to stop it or to spoil its losses at a given step."""

import os
import signal
from collections.abc import Callable

import numpy as np
import pytest

from aim_flax.train.experiment import Experiment

# (the run's experiment, steps taken before the call, {metric: (seeds, steps of the call)})
Hook = Callable[[Experiment, int, dict[str, np.ndarray]], None]


def after_calls(patch: pytest.MonkeyPatch, hook: Hook) -> None:
    """Calls the hook after each call of training steps; it may change the metrics in place."""
    original = Experiment.train_call

    def train_call(self, length, together=False):
        call = original(self, length, together)

        def hooked(state, data, seed):
            step = int(np.ravel(self.devices.fetch(state.step))[0])
            state, metrics = call(state, data, seed)
            seen = {k: np.atleast_2d(v) for k, v in self.devices.fetch(metrics).items()}
            hook(self, step, seen)
            seen = seen if together else {name: values[0] for name, values in seen.items()}
            return state, self.devices.replicate(seen)

        return hooked

    patch.setattr(Experiment, "train_call", train_call)


def signal_once(patch: pytest.MonkeyPatch, step: int, signum: int = signal.SIGTERM, arm=None):
    """Sends this process a signal during the call that starts at a step, of an arm if one is
    given; only once."""
    sent = []

    def hook(experiment: Experiment, start: int, metrics: dict[str, np.ndarray]) -> None:
        if start == step and arm in (None, experiment.config.arm) and not sent:
            sent.append(True)
            os.kill(os.getpid(), signum)

    after_calls(patch, hook)
