"""What a training step costs, in words: memory, and what bounds it at a chip's published figures.

The bounds are those of a roofline (Williams, Waterman and Patterson, "Roofline: an insightful
visual performance model", CACM 52, 2009): a step takes at least as long as its arithmetic, its
memory traffic or its network traffic alone would. Real steps take longer.
"""

import dataclasses
from collections.abc import Mapping

from aim_flax.devices import Devices
from aim_flax.train.chips import Topology, all_reduce_bytes
from aim_flax.train.costs import Costs


@dataclasses.dataclass(frozen=True)
class Bounds:
    """The least seconds that one step takes for each of the things that a chip does.

    Attributes:
      compute: floating-point operations, at the rate for bfloat16.
      memory: bytes from and to the chip's memory; None: not known.
      network: what is summed over all chips, by rings.
    """

    compute: float
    memory: float | None
    network: float

    @property
    def seconds(self) -> float:
        """The least seconds that a step takes, of those that are known."""
        return max(self.compute, self.memory or 0.0, self.network)

    @property
    def what(self) -> str:
        """What takes longest."""
        known = {"compute": self.compute, "memory": self.memory or 0.0, "network": self.network}
        return max(known, key=known.get)


def bounds(costs: Costs, topology: Topology) -> Bounds:
    """Returns the bounds of a step on the chips of a topology."""
    chip, count = topology.chip, topology.count
    flops = 2 * costs.multiply_adds if costs.flops is None else costs.flops
    sent = all_reduce_bytes(costs.reduced, count)
    return Bounds(
        compute=flops / chip.flops,
        memory=None if costs.moved is None else costs.moved / chip.bandwidth,
        network=sent / topology.bandwidth if count > 1 else 0.0,
    )


def state_report(sizes: Mapping[str, int], devices: Devices) -> str:
    """Returns what training holds on each device from step to step; nothing is compiled for it.

    Args:
      sizes: what `state_sizes` returns.
      devices: of this machine.
    """
    held = {
        "parameters": sizes["parameters"],
        "running statistics and carried memory": sizes["statistics"],
        "optimiser": sizes["optimizer"],
    }
    memory = f" of {binary(memory)} each" if (memory := devices.memory()) else ""
    parts = ", ".join(f"{name} {binary(size)}" for name, size in held.items())
    return (
        f"in training, on each of {devices.count} x {devices.model}{memory}: {parts};"
        " --compile-for=here tells the rest"
    )


def report(
    costs: Costs, batch_size: int, count: int, topology: Topology | None, memory: int | None
) -> str:
    """Returns what a step costs each device, a line for each thing.

    Args:
      batch_size: over all devices.
      count: of devices.
      topology: what they are; None: of no chip that is known, and there are no bounds.
      memory: bytes that each has; None: not known.
    """
    state = costs.parameters + costs.statistics + costs.optimizer + costs.batch
    share = f"  {costs.peak / memory:.0%} of {binary(memory)}" if memory else ""
    if memory and costs.peak > memory:
        share += ": does not fit"
    found = bounds(costs, topology) if topology else None
    chip = topology.chip if topology else None
    rows = [
        ("parameters", binary(costs.parameters), ""),
        ("running statistics and carried memory", binary(costs.statistics), ""),
        ("optimiser", binary(costs.optimizer), ""),
        ("images and labels", binary(costs.batch), ""),
        ("activations, gradients, room to work in", binary(max(0, costs.peak - state)), ""),
        ("peak", binary(costs.peak), share),
        ("multiply-adds", _count(costs.multiply_adds), ""),
    ]
    operations = "not told" if costs.flops is None else _count(costs.flops)
    moved = "not told" if costs.moved is None else f"{_count(costs.moved)}B"
    reduced = f"{_count(costs.reduced)}B"
    at = [""] * 3
    if found:
        at[0] = f"  {duration(found.compute)} at {chip.flops / 1e12:g} TFLOP/s"
        if found.memory is not None:
            at[1] = f"  {duration(found.memory)} at {chip.bandwidth / 1e9:g} GB/s"
        if count > 1:
            at[2] = f"  {duration(found.network)} at {topology.bandwidth / 1e9:g} GB/s each way"
    rows += [
        ("floating-point operations", operations, at[0]),
        ("moved from and to memory", moved, at[1]),
        (f"averaged over devices, in {costs.reductions} operations", reduced, at[2]),
    ]
    width, numbers = (max(len(row[i]) for row in rows) for i in (0, 1))
    lines = [f"  {name:{width}}  {value:>{numbers}}{rest}".rstrip() for name, value, rest in rows]
    if found:
        lines.append(f"  {_conclusion(found, batch_size)}")
        lines.append(f"  figures of the chip, which hold for bfloat16: {chip.source}")
    else:
        lines.append("  nothing is published of these devices here, so no bound is told")
    return "\n".join(lines)


def _conclusion(found: Bounds, batch_size: int) -> str:
    most = f"{batch_size / found.seconds:,.0f} images/s at most"
    if found.memory is None:
        return (
            f"{found.what} bounds it, if memory does not: a step takes {duration(found.seconds)} at"
            f" least, {most}"
        )
    return f"{found.what} bounds it: a step takes {duration(found.seconds)} at least, {most}"


def scaling(found: Mapping[str, tuple[int, int, Bounds]]) -> str:
    """Returns how the rate grows with the chips, a line for each topology.

    Args:
      found: of each topology its chips, the images of a step over all of them, and its bounds.
    """
    width = max(map(len, found))
    lines = [f"  {'':{width}}  {'chips':>6}  {'images/step':>11}  {'images/s':>10}  bound by"]
    for name, (count, batch_size, of_step) in found.items():
        rate = batch_size / of_step.seconds
        lines.append(
            f"  {name:{width}}  {count:6,}  {batch_size:11,}  {rate:10,.0f}  {of_step.what}"
        )
    return "\n".join(lines)


def binary(size: float) -> str:
    """Returns a number of bytes as people read it, in powers of 1,024."""
    for unit in ("KiB", "MiB"):
        size /= 1024
        if size < 1000:
            return f"{size:.3g} {unit}"
    return f"{size / 1024:,.2f} GiB"


def _count(number: float) -> str:
    """Returns a number in powers of 1,000."""
    for unit in ("k", "M", "G"):
        number /= 1000
        if number < 999.5:
            return f"{number:.3g} {unit}"
    return f"{number / 1000:,.3g} T"


def duration(seconds: float) -> str:
    """Returns a time as people read it, in ms or µs."""
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"
