"""Where a training step goes: time on this machine, or bytes on a TPU that isn't here.

    python benchmarks/breakdown.py --arms control_stride1,published \\
        --set data.image_shape=(112,112,3) --set train.batch_size=4 --csv results/step_cpu.csv
    JAX_PLATFORMS=cpu python benchmarks/breakdown.py --topology v5e:1x1 --set dtype=bfloat16 \\
        --set train.batch_size=32 --csv results/step_v5e.csv

Time is that of all threads, from JAX's profiler. Bytes are those that the compiled program's
operations read from the chip's memory and write to it; nothing runs. Both are summed by the module
that JAX names as the source of an operation, and by kind. Several operations that XLA fuses into
one count where XLA says that it comes from.
"""

import argparse
import collections
import re
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from programs import Place, Program
from step_time import Variant, add_variants, variants

from aim_flax import allocator
from aim_flax import config as configs
from aim_flax.console import reporting_errors
from aim_flax.errors import UsageError
from aim_flax.files import write_csv
from aim_flax.markdown import table
from aim_flax.train.chips import topology
from aim_flax.train.topologies import absent_devices, planned

COLUMNS = ("variant", "module", "direction", "kind", "unit", "amount")
DIRECTIONS = ("forward", "backward", "")
_KINDS = (
    "products and convolutions",
    "batch norm",
    "pooling",
    "memory read",
    "memory update",
    "other layers",
    "loss",
    "optimizer and input",
)
_POOLING = re.compile(r"pool|/(reduce_window|select_and_(scatter|gather))")


class Part(NamedTuple):
    """What belongs together in a step; `kind` is one of _KINDS."""

    place: Place
    kind: str


Parts = Mapping[Part, float]


def part(program: Program, op_name: str) -> Part:
    """Returns the part of a step that an operation belongs to.

    A layer is one of products by having a kernel, and a norm by having a scale. The initial
    memory, and what the latch does to read a memory, are reads.
    """
    place = program.place(op_name)
    path, leaves = place.path.split("/"), program.layers.get(place.path, ())
    if "memory_update" in path:
        kind = "memory update"
    elif "memory_read" in [*path, *op_name.split("/")] or path[0] in ("memory", "memory_initial"):
        kind = "memory read"
    elif "kernel" in leaves:
        kind = "products and convolutions"
    elif "scale" in leaves:
        kind = "batch norm"
    elif not place.direction:
        kind = "optimizer and input"
    elif _POOLING.search(op_name):
        kind = "pooling"
    else:
        # The network's own call, within the differentiated function, has its class's name.
        kind = "other layers" if re.search(r"vp\(\w+\)", op_name) else "loss"
    return Part(place, kind)


def times(variant: Variant, steps: int) -> Parts:
    """Returns the milliseconds of a step, of all threads together, by part.

    Of the steps the least time of each operation counts, for other work holds some of them up.
    """
    program = Program(variant.step.as_text())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                variant.measure()
        (path,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    taken: dict[str, list[tuple[float, float]]] = {}
    for plane in data.planes:
        for line in plane.lines:
            events = []
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name in program.instructions:
                    events.append((event.start_ns, event.duration_ns, name))
            for name, start, nanoseconds in own(events):
                taken.setdefault(name, []).append((start, nanoseconds))
    if not taken:
        raise UsageError(f"the profile has no operations of {jax.default_backend()}")
    parts: dict[Part, float] = collections.Counter()
    for name, found in taken.items():
        parts[part(program, program.op_name(name))] += least(found, steps) / 1e6
    return parts


def own(events: Sequence[tuple[float, float, str]]) -> Iterator[tuple[str, float, float]]:
    """Yields the name, start and time of each event of a thread, less that of events within it.

    Args:
      events: (start, duration, name), such as a loop and, within it, its operations.
    """
    open_: list[list[Any]] = []  # end, name, start, own time
    for start, duration, name in sorted(events, key=lambda e: (e[0], -e[1])):
        while open_ and open_[-1][0] <= start:
            yield tuple(open_.pop()[1:])
        if open_:
            open_[-1][3] -= duration
        open_.append([start + duration, name, start, duration])
    for _, *event in open_:
        yield tuple(event)


def least(found: Sequence[tuple[float, float]], steps: int) -> float:
    """Returns the least time that an operation takes in a step.

    Args:
      found: (start, time) of all steps; where several threads share an operation, or a loop repeats
        it, there are several of each step.
    """
    of_step, rest = divmod(len(found), steps)
    times = [time for _, time in sorted(found)]
    if rest:  # not the same in each step
        return sum(times) / steps
    return min(sum(times[i : i + of_step]) for i in range(0, len(times), of_step))


def gigabytes(program: Program) -> Parts:
    """Returns what a step moves from and to the device's memory, by part."""
    parts: dict[Part, float] = collections.Counter()
    for instruction in program.in_order():
        if moved := program.moved(instruction):
            parts[part(program, program.op_name(instruction.name))] += moved / 1e9
    return parts


def compiled_for(name: str, config: configs.ConfigDict) -> str:
    """Returns the text of a training step, compiled for a topology that isn't here."""
    experiment = planned(config, absent_devices(topology(name)))
    return experiment.train_call(1).trace(*experiment.step_shapes()).lower().compile().as_text()


def by_module(of_variants: Mapping[str, Parts], cut: str, digits: int) -> str:
    """Returns a Markdown table of the modules, forward and backward.

    Args:
      cut: a pattern; of a module's path that at its start counts. Memory updates are apart.
    """
    found: dict[tuple[bool, str], Parts] = {}
    for variant, parts in of_variants.items():
        for (place, kind), amount in parts.items():
            label = re.match(cut, place.path)[0] if place.path else kind
            if kind == "memory update":
                label += ", memory update"
            row = found.setdefault((not place.path, label), collections.Counter())
            row[variant, place.direction if place.path else ""] += amount
    columns = [(v, d) for v in of_variants for d in DIRECTIONS]
    columns = [c for c in columns if any(row[c] for row in found.values())]
    header = ["module", *(f"{v}, {d or 'neither'}" for v, d in columns)]
    rows = [(key[1], [row[c] for c in columns]) for key, row in sorted(found.items())]
    return _table(header, rows, digits)


def by_kind(of_variants: Mapping[str, Parts], digits: int) -> str:
    """Returns a Markdown table of the kinds of operations."""
    rows = []
    for kind in _KINDS:
        of_kind = [
            sum(amount for p, amount in parts.items() if p.kind == kind)
            for parts in of_variants.values()
        ]
        if any(of_kind):
            rows.append((kind, of_kind))
    return _table(["kind", *of_variants], rows, digits)


def _table(header: Sequence[str], rows: list[tuple[str, list[float]]], digits: int) -> str:
    """Returns a table with totals, without rows of which nothing would be seen."""
    totals = [sum(column) for column in zip(*(row for _, row in rows), strict=True)]
    rows = [(label, row) for label, row in rows if round(max(row), digits)]
    cells = [
        [label, *(f"{amount:,.{digits}f}" if amount else "0" for amount in row)]
        for label, row in [*rows, ("all", totals)]
    ]
    return table([header, *cells])


@reporting_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_variants(parser, arms="control_stride1,published")
    parser.add_argument("--steps", type=int, default=8, help="steps that are profiled")
    parser.add_argument("--topology", metavar="CHIP:SHAPE", help="bytes on such chips instead")
    parser.add_argument(
        "--programs", type=Path, metavar="DIR",
        help="keep the text of programs for a topology, and take what is there",
    )  # fmt: skip
    parser.add_argument("--cut", default=r"stage\d+|[^/]+", help="the part of paths that counts")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if args.programs and not args.topology:
        raise UsageError("--programs is for --topology")
    of_variants: dict[str, Parts] = {}
    unit, digits = ("GB", 2) if args.topology else ("ms", 0)
    chosen = variants(args)
    if args.topology:
        for name, config in chosen.items():
            kept = args.programs and args.programs / f"{name}.hlo"
            if kept and kept.exists():
                text = kept.read_text()
            else:
                text = compiled_for(args.topology, config)
                if kept:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    kept.write_text(text)
            of_variants[name] = gigabytes(Program(text))
    else:
        allocator.keep_memory()  # as commands do
        for name, config in chosen.items():
            variant = Variant(name, config)
            for _ in range(2):
                variant.measure()
            of_variants[name] = times(variant, args.steps)
            seconds = statistics.median(variant.seconds[2:])
            threads = sum(of_variants[name].values())
            print(
                f"{name}: a step takes {1e3 * seconds:.0f} ms, its threads {threads:.0f} ms",
                flush=True,
            )
    print(f"{unit} by module:\n\n{by_module(of_variants, args.cut, digits)}\n")
    print(f"{unit} by kind:\n\n{by_kind(of_variants, digits)}")
    if args.csv:
        rows = [
            dict(zip(COLUMNS, (name, *place, kind, unit, f"{amount:.6f}"), strict=True))
            for name, parts in of_variants.items()
            for (place, kind), amount in sorted(parts.items())
        ]
        write_csv(args.csv, COLUMNS, rows)


if __name__ == "__main__":
    main()
