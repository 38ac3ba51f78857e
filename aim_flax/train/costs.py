"""What a training step costs each device that it is compiled for: memory, arithmetic and network.

The program is that of training, compiled whole for all devices by XLA, for devices of this machine
or for some that aren't there (`jax.experimental.topologies`). Nothing runs, so no time is measured.
"""

import dataclasses
import math
import re
import time
from typing import Any

import jax

from aim_flax.models.describe import multiply_adds
from aim_flax.train.experiment import Experiment
from aim_flax.train.step import TrainState, size_in_bytes

# XLA's text: %name = f32[3,64]{1,0} all-reduce(...), or (f32[64]{0}, f32[]) all-reduce-start(...)
_ALL_REDUCE = re.compile(r"= (.*?) all-reduce(?:-start)?\(")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_USED = re.compile(r"[Uu]sed ([\d.]+[KMGT]?) of ([\d.]+[KMGT]?)")


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one step costs one device; memory in bytes.

    Attributes:
      parameters, statistics, optimizer, batch: what goes into the step: the network's parameters,
        its other variables, the optimiser's state, and its images with their labels.
      peak: the most that is held at once: these, activations, gradients, and room to work in.
      multiply_adds: of the matrix products and convolutions that are written in the step.
      flops: floating-point operations of the compiled program; None where XLA doesn't tell.
      moved: bytes from and to its memory, as XLA estimates it; None where XLA doesn't tell.
      reduced: bytes that are summed over all devices: gradients, and the batch's statistics.
      reductions: in how many operations.
      seconds: that compiling took.
    """

    parameters: int
    statistics: int
    optimizer: int
    batch: int
    peak: int
    multiply_adds: int
    flops: float | None
    moved: float | None
    reduced: int
    reductions: int
    seconds: float


class TooLargeError(RuntimeError):
    """A step needs more memory than its device has; the message says how much."""


def measure(experiment: Experiment) -> Costs:
    """Compiles one training step for the devices of an experiment, and returns what it costs.

    Raises:
      TooLargeError: it doesn't fit a device's memory.
    """
    start = time.monotonic()
    call, shapes = experiment.train_call(1), experiment.step_shapes()
    traced = call.trace(*shapes)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used = _USED.search(str(error))
        needs = f"needs {used[1]}iB of {used[2]}iB" if used else str(error).partition("\n")[0]
        raise TooLargeError(needs) from None
    _, data, _ = shapes
    memory, analysis = compiled.memory_analysis(), compiled.cost_analysis() or {}
    reductions = reduced_bytes(compiled.as_text())
    sharded = experiment.train_batches.sharded
    return Costs(
        **state_sizes(experiment.abstract_state),
        batch=size_in_bytes(data) // (experiment.devices.count if sharded else 1),
        # Of the two: TPU's compiler tells the first alone, and CPU's leaves activations out of it.
        peak=max(memory.peak_memory_in_bytes, _held(memory)),
        multiply_adds=multiply_adds(traced.jaxpr.jaxpr),
        flops=analysis.get("flops"),
        moved=analysis.get("bytes accessed"),
        reduced=sum(reductions),
        reductions=len(reductions),
        seconds=time.monotonic() - start,
    )


def state_sizes(state: TrainState) -> dict[str, int]:
    """Returns the bytes of a training state's parameters, statistics and optimizer, see `Costs`."""
    parts = {
        "parameters": state.params,
        "statistics": state.model_state,
        "optimizer": state.opt_state,
    }
    return {name: size_in_bytes(part) for name, part in parts.items()}


def _held(memory: Any) -> int:
    """Returns the bytes of what goes in, what comes out, and all between, were it held at once."""
    own = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + own + memory.temp_size_in_bytes


def reduced_bytes(program: str) -> list[int]:
    """Returns the bytes of each all-reduce of a compiled program, in the text that XLA makes."""
    found = [_ALL_REDUCE.search(line) for line in program.splitlines()]
    return [sum(map(_array_bytes, _ARRAY.findall(m[1]))) for m in found if m]


def _array_bytes(array: tuple[str, str, str]) -> int:
    _, bits, shape = array
    # A pred, which has no number, takes a byte.
    return math.prod(int(n) for n in shape.split(",") if n) * int(bits or 8) // 8
