"""Accelerators that can be rented: what is published of them, and what their groups are called.

A topology is a kind of chip and the shape in which they are joined: v5e:4x8. The shape says how
many links of the torus each chip has, and so how fast gradients are averaged.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping

from aim_flax.errors import UsageError, nearest

GIB = 2**30
# GPUs of one machine, which NVLink joins; more machines have networks of many kinds.
_GPUS = ((1,), (2,), (4,), (8,))


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip, as its maker describes it.

    Attributes:
      platform: "tpu" or "cuda", as JAX calls it.
      kinds: what JAX calls such a device.
      flops: floating-point operations in a second, in bfloat16.
      memory, bandwidth: bytes of its memory, and bytes a second from and to it.
      link: bytes a second, each way, of a link to another chip.
      shapes: in which it can be rented, the smallest first.
      wraps: an axis of a multiple of so many chips is a ring, others are lines; 0: there are none.
      source: of these figures.
    """

    platform: str
    kinds: tuple[str, ...]
    flops: float
    memory: int
    bandwidth: float
    link: float
    shapes: tuple[tuple[int, ...], ...]
    wraps: int
    source: str


def _flat() -> tuple[tuple[int, ...], ...]:
    """The slices of v5e and v6e."""
    return ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


def _cubes(most: int) -> tuple[tuple[int, ...], ...]:
    """The slices of v4 and v5p: parts of a cube of 4x4x4 chips, and whole cubes, up to `most`."""
    sides = range(4, 25, 4)
    whole = itertools.combinations_with_replacement(sides, 3)
    cubes = sorted((s for s in whole if math.prod(s) <= most), key=lambda s: (math.prod(s), s))
    return ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), *cubes)


# A TPU's links are those of its torus, each way half of what "bidirectional" figures say.
CHIPS: Mapping[str, Chip] = {
    "v4": Chip(
        "tpu", ("TPU v4",), 275e12, 32 * GIB, 1200e9, 50e9, _cubes(4096), 4,
        "cloud.google.com/tpu/docs/v4; links: arxiv.org/abs/2304.01433, table 4",
    ),
    "v5e": Chip(
        "tpu", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9, 50e9, _flat(), 16,
        "cloud.google.com/tpu/docs/v5e",
    ),
    "v5p": Chip(
        "tpu", ("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2765e9, 100e9, _cubes(6144), 4,
        "cloud.google.com/tpu/docs/v5p",
    ),
    "v6e": Chip(
        "tpu", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1638e9, 100e9, _flat(), 16,
        "cloud.google.com/tpu/docs/v6e",
    ),
    # Dense operations, without sparsity. A switch joins all with all: one link stands for NVLink.
    "a100": Chip(
        "cuda", ("NVIDIA A100-SXM4-80GB",), 312e12, 80 * GIB, 2039e9, 300e9, _GPUS, 0,
        "nvidia.com/en-us/data-center/a100 (SXM, 80 GB)",
    ),
    "h100": Chip(
        "cuda", ("NVIDIA H100 80GB HBM3",), 989e12, 80 * GIB, 3350e9, 450e9, _GPUS, 0,
        "nvidia.com/en-us/data-center/h100 (SXM)",
    ),
    "h200": Chip(
        "cuda", ("NVIDIA H200",), 989e12, 141 * 10**9, 4800e9, 450e9, _GPUS, 0,
        "nvidia.com/en-us/data-center/h200 (SXM)",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that are joined.

    Attributes:
      name: as a user gives it.
      chip: of which it is made.
      shape: how many there are along each axis.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bandwidth(self) -> float:
        """Bytes a second that every chip of it can send to its neighbours.

        Of the links of the chip that has the fewest: at the end of a line it has one along that
        axis, within a ring two.
        """
        ends = [_links(side, self.chip.wraps) for side in self.shape]
        return self.chip.link * sum(ends)


def _links(side: int, wraps: int) -> int:
    if side == 1:
        return 0
    return 2 if wraps and side % wraps == 0 else 1


def all_reduce_bytes(size: float, count: int) -> float:
    """Returns how many bytes each of `count` chips sends to sum `size` bytes over all, by rings.

    2 (n - 1) / n of them: Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms for clusters
    of workstations" (J. Parallel Distrib. Comput. 69, 2009).
    """
    return 2 * (count - 1) / count * size


def names() -> Iterator[str]:
    """Yields the names of all topologies."""
    for generation, chip in CHIPS.items():
        for shape in chip.shapes:
            yield f"{generation}:{'x'.join(map(str, shape))}"


def topology(name: str) -> Topology:
    """Returns the topology of a name.

    Raises:
      UsageError: there is none of this name; with the nearest one, or the shapes of the chip.
    """
    if name not in (known := list(names())):
        generation, _, shape = name.partition(":")
        chip = CHIPS.get(generation)
        if chip is None:
            raise UsageError(
                f"there is no topology {name!r}{nearest(name, known)}, expected here, for this"
                f" machine's devices, or CHIP:SHAPE, such as v5e:4x8, of {', '.join(CHIPS)}"
            )
        own = ["x".join(map(str, sides)) for sides in chip.shapes]
        # 8x4 is 4x8.
        turned = [text for text in own if sorted(text.split("x")) == sorted(shape.split("x"))]
        close = f" (did you mean {turned[0]!r}?)" if turned else nearest(shape, own)
        listed = own if len(own) <= 12 else [*own[:11], "...", own[-1]]
        raise UsageError(
            f"{generation} has no shape {shape!r}{close}, expected one of {', '.join(listed)}"
        )
    generation, _, shape = name.partition(":")
    return Topology(name, CHIPS[generation], tuple(map(int, shape.split("x"))))
