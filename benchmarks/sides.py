"""This project side by side with what one could use instead: python benchmarks/sides.py.

    python benchmarks/sides.py --rounds 7 --csv results/sides_cpu.csv
    python benchmarks/sides.py --only torch_control_stride1,keras_published

Each side is a process in its own Python environment, which this command makes from the project's
extras when it is first needed. First it checks that sides compute the same as what they are
compared with: the numbers of parameters, with the same weights the logits of the same images, the
loss of a training step, and how far it falls by that. Then they take turns, one working while all
others sleep. Ratios are those of each round: a side's seconds over those of what it is compared
with.

Beside the seconds stand the arithmetic of a step (three times the multiply-adds of its forward
pass, counted as two operations) as a share of what the machine reaches in matrix products in the
same rounds; the bytes that XLA's operations read and write, as a share of what it reaches in
copies; the most memory that the process had while it took steps, less what it had before the
network was built; and the memory that XLA's program asks for.
"""

import argparse
import contextlib
import dataclasses
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from against import environments, turns

from aim_flax.console import reporting_errors
from aim_flax.errors import UsageError, nearest
from aim_flax.files import write_csv
from aim_flax.markdown import table

COLUMNS = (
    *("work", "side", "mode", "seconds", "seconds_low", "seconds_high"),
    *("ratio", "ratio_low", "ratio_high", "against", "parameters", "gflop", "gflop_per_second"),
    *("share_of_products", "gb_moved", "share_of_copies", "peak_mib", "program_mib"),
    *("versions", "machine"),
)
PRODUCTS, COPIES = "matrix_products", "copies"
# Of the largest number. A gradient differs by more than its loss: an input of a relu that is nearly
# 0 passes all of it or nothing, and Keras's Adam adds its epsilon elsewhere.
MOST_APART = {"logits": 1e-4, "loss": 1e-4, "fall": 1e-2}


@dataclasses.dataclass(frozen=True)
class Side:
    """What is measured.

    Attributes:
      work: what it does, in words.
      name: by which it is asked for.
      mode: of a library that has several.
      extra: the extra of the project whose environment it needs.
      module, kind, options: see against/worker.py.
      against: the side that its ratio is to.
      same: whether that must compute the same.
      counts: options of a network whose parameters and running statistics were published, and
        their number.
      steps: timed ones in a turn.
      untimed: those before them.
    """

    work: str
    name: str
    module: str
    kind: str
    options: Mapping[str, Any]
    mode: str = ""
    extra: str = "bench"
    against: str = ""
    same: bool = False
    counts: tuple[Mapping[str, Any], int] | None = None
    steps: int = 2
    untimed: int = 1

    @property
    def key(self) -> str:
        return f"{self.name} {self.mode}".strip()


def resnets() -> list[Side]:
    """Returns the sides of a training step of ResNet50."""
    work = "ResNet50, 112 px, batch 4"
    given = dict(pixels=112, batch_size=4, classes=120)
    # Counts of the published networks, at the size that they were published for.
    published = dict(pixels=224, batch_size=1, classes=100), 26_673_380
    control = dict(pixels=224, batch_size=1, classes=100), 23_792_612

    def ours(arm: str, name: str = "", against: str = "", overrides: Sequence[str] = (), **more):
        options = dict(config=f"stanford_dogs_resnet50.py:{arm}", overrides=overrides, **given)
        return Side(work, name or arm, "against.ours", "Ours", options, against=against, **more)

    of_flax = ("model.stride_on=conv2", "model.conv_bias=False")
    of_flax += ("model.momentum=0.9", "model.epsilon=1e-5")
    memory = dict(memory_shape=(7, 7, 1024))
    same = dict(same=True)
    return [
        ours("control_stride1", counts=control),
        ours("published", against="control_stride1", counts=published),
        ours("aim", against="control_stride1"),
        ours("control", counts=control),
        Side(
            *(work, "keras_published", "against.of_keras", "OfKeras", given | memory),
            **dict(against="published", counts=published, **same),
        ),
        Side(
            *(work, "keras_control_stride1", "against.of_keras", "OfKeras", given),
            **dict(against="control_stride1", counts=control, **same),
        ),
        *(
            Side(
                *(work, "torch_control_stride1", "against.of_torch", "OfTorch"),
                **dict(options=given | {"mode": mode}, mode=mode, extra="torch"),
                # The modes have one network.
                **dict(against="control_stride1", counts=control if mode == "eager" else None),
                **same,
            )
            for mode in ("eager", "channels_last", "compiled")
        ),
        ours("control_stride1", "as_flax_imagenet", overrides=of_flax),
        Side(
            *(work, "flax_imagenet", "against.of_flax", "OfFlax", given),
            **dict(against="as_flax_imagenet", **same),
        ),
    ]


def efficientnets() -> list[Side]:
    """Returns the sides of a training step of EfficientNet-Lite0, of all its parameters."""
    work = "EfficientNet-Lite0, 128 px, batch 32"
    given = dict(pixels=128, batch_size=32, classes=100)
    # Dropout is random, and so can't be compared; frozen layers would be less work.
    overrides = ("model.pretrained=None", "model.dropout=0.0", "train.freeze=")
    options = dict(config="image_folder_efficientnet.py:control", overrides=overrides, **given)
    theirs = dict(network="efficientnet_lite0", weight_decay=1e-4, eps=1e-8, **given)
    return [
        Side(work, "efficientnet_lite0", "against.ours", "Ours", options),
        *(
            Side(
                *(work, "torch_efficientnet_lite0", "against.of_torch", "OfTorch"),
                **dict(options=theirs | {"mode": mode}, mode=mode, extra="torch"),
                **dict(against="efficientnet_lite0", same=True),
            )
            for mode in ("eager", "channels_last", "compiled")
        ),
    ]


def digits() -> list[Side]:
    """Returns the sides of the digits MLP, whole commands."""
    work = "digits MLP, 40 epochs, whole command"
    once = dict(steps=1, untimed=0)
    first = Side(
        *(work, "digits", "against.commands", "Ours", {"first": True}),
        **dict(mode="first", against="digits again", **once),
    )
    again = Side(
        *(work, "digits", "against.commands", "Ours", {"first": False}), mode="again", **once
    )
    keras = Side(
        *(work, "keras_digits", "against.commands", "Keras", {}),
        **dict(against="digits again", same=True, **once),
    )
    return [again, first, keras]


def machine(work: str) -> list[Side]:
    """Returns what bounds the sides of a work."""
    return [
        Side(work, PRODUCTS, "against.machine", "Products", {}, steps=5),
        Side(work, COPIES, "against.machine", "Copies", {}, steps=3),
    ]


def chosen(names: str, sides: Sequence[Side]) -> list[Side]:
    """Returns the sides of these names, and those that they are compared with; "": all.

    Raises:
      UsageError: no such side.
    """
    by_key = {side.key: side for side in sides}
    wanted = set()
    for name in filter(None, names.split(",")):
        found = {side.key for side in sides if name in (side.name, side.key)}
        if not found:
            known = dict.fromkeys(side.name for side in sides)
            raise UsageError(
                f"--only has {name!r}, expected some of {', '.join(known)}{nearest(name, known)}"
            )
        while found:
            wanted |= found
            found = {by_key[key].against for key in found} - {""}
    return [side for side in sides if not names or side.key in wanted]


def start(side: Side, folder: Path, options: Mapping[str, Any] | None = None) -> turns.Worker:
    python = environments.python_of(side.extra, folder)
    own = {
        "KERAS_BACKEND": "jax",
        "KERAS_HOME": str(folder),  # no settings of the user's
        "JAX_PLATFORMS": "cpu",
    }
    return turns.Worker(
        side.key, python, side.module, side.kind, {**side.options, **(options or {})}, own
    )


def check_published_counts(sides: Sequence[Side], folder: Path) -> None:
    """Raises SideError where a network doesn't have as many parameters as the published one."""
    for side in sides:
        if side.counts:
            options, expected = side.counts
            with start(side, folder, options) as worker:
                found = sum(worker.ask("counts"))
            if found != expected:
                raise turns.SideError(f"{side.key} has {found:,} parameters, not {expected:,}")
            tell(f"{side.key}: {found:,} parameters and running statistics, as published")


def check_same(side: Side, computed: Mapping[str, Mapping], by_key: Mapping[str, Side]) -> None:
    """Raises SideError where a side computes something else than what it is compared with."""
    if not side.same:
        return
    found, expected = computed[side.key], computed[side.against]
    most = {"counts": 0.0} | {key: MOST_APART.get(key, 0.0) for key in found if key != "counts"}
    turns.check_equal(side.key, found, by_key[side.against].key, expected, most)


def row(
    side: Side,
    measured: Mapping[str, Sequence[float]],
    facts: Mapping[str, Any],
    parameters: int,
    rates: Mapping[str, float],
) -> dict[str, Any]:
    """Returns what is known of a side by COLUMNS.

    Args:
      measured: seconds of each round by the side's key.
      facts: what the side says of itself.
      rates: operations per second of PRODUCTS, and bytes per second of COPIES.
    """
    seconds = turns.spread(measured[side.key])
    values: dict[str, Any] = {
        "work": side.work,
        "side": side.name,
        "mode": side.mode,
        "seconds": f"{seconds.median:.4f}",
        "seconds_low": f"{seconds.low:.4f}",
        "seconds_high": f"{seconds.high:.4f}",
        "against": side.against,
        "versions": facts["versions"],
        "machine": machine_name(),
    }
    if parameters:
        values["parameters"] = parameters
    if side.against:
        ratio = turns.ratios(measured[side.key], measured[side.against])
        for name, value in zip(("ratio", "ratio_low", "ratio_high"), ratio, strict=True):
            values[name] = f"{value:.3f}"
    if operations := operations_of(facts):
        values["gflop"] = f"{operations / 1e9:.1f}"
        values["gflop_per_second"] = f"{operations / 1e9 / seconds.median:.1f}"
        values["share_of_products"] = f"{operations / seconds.median / rates[PRODUCTS]:.3f}"
    if moved := facts.get("bytes_moved"):
        values["gb_moved"] = f"{moved / 1e9:.2f}"
        values["share_of_copies"] = f"{moved / seconds.median / rates[COPIES]:.3f}"
    for name in ("peak_mib", "program_mib"):
        if name in facts:
            values[name] = f"{facts[name]:.0f}"
    return values


def operations_of(facts: Mapping[str, Any]) -> int:
    """Returns the operations of a step: those of the backward pass are twice the forward one's."""
    return facts.get("operations") or 3 * 2 * facts.get("forward_operations", 0)


def machine_name() -> str:
    """Returns the number of cores and the processor's name."""
    name, file = platform.machine(), Path("/proc/cpuinfo")
    if file.is_file():
        lines = (line.partition(":") for line in file.read_text().splitlines())
        name = next((value.strip() for key, _, value in lines if "model name" in key), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, {name}"


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table of what people read of the rows."""
    lines = [
        ("side", "against", "seconds (lowest to highest)", "ratio (lowest to highest)")
        + ("GFLOP", "of products", "of copies", "peak MiB", "program MiB")
    ]
    for r in rows:
        seconds = f"{r['seconds']} ({r['seconds_low']} to {r['seconds_high']})"
        ratio = f"{r['ratio']} ({r['ratio_low']} to {r['ratio_high']})" if "ratio" in r else ""
        shares = (r.get(name, "") for name in ("gflop", "share_of_products", "share_of_copies"))
        memory = (r.get(name, "") for name in ("peak_mib", "program_mib"))
        name = f"{r['side']} {r['mode']}".strip()
        lines.append((name, r["against"], seconds, ratio, *shares, *memory))
    return table(lines, left=2)


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(sides: Sequence[Side], rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Returns a row for each side.

    Raises:
      SideError: one of them fails, or computes something else than what it is compared with.
    """
    check_published_counts(sides, folder)
    by_key, computed = {side.key: side for side in sides}, {}
    with contextlib.ExitStack() as stack:
        workers = {}
        for side in sides:
            tell(f"{side.key}: building, and two steps")
            workers[side.key] = worker = stack.enter_context(start(side, folder))
            counts = worker.ask("counts")
            computed[side.key] = {"counts": counts, **worker.ask("outputs")}
        for side in sides:
            check_same(side, computed, by_key)
        tell(f"all sides compute what they should; {rounds} rounds")
        measured = turns.take_turns(
            {
                key: lambda worker=worker, side=by_key[key]: worker.take_turn(
                    side.steps, side.untimed
                )
                for key, worker in workers.items()
            },
            rounds,
        )
        facts = {key: worker.ask("facts") for key, worker in workers.items()}
    rates = {
        PRODUCTS: operations_of(facts[PRODUCTS]) / turns.spread(measured[PRODUCTS]).median,
        COPIES: facts[COPIES]["bytes_moved"] / turns.spread(measured[COPIES]).median,
    }
    tell(
        f"products at {rates[PRODUCTS] / 1e9:.0f} GFLOP/s, copies at {rates[COPIES] / 1e9:.1f} GB/s"
    )
    return [
        row(side, measured, facts[side.key], sum(computed[side.key]["counts"]), rates)
        for side in sides
    ]


@reporting_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="SIDE,...", help="default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path)
    default = environments.ROOT / "build" / "bench"
    parser.add_argument(
        "--venv", type=Path, default=default, help="of the environments; default: build/bench"
    )
    args = parser.parse_args()
    if args.rounds < 1:
        raise UsageError(f"--rounds is {args.rounds}, expected at least 1")
    sides = chosen(args.only, [*resnets(), *efficientnets(), *digits()])
    rows: list[dict[str, Any]] = []
    # One work after the other, so that the sides of one alone have to fit into memory.
    for work in dict.fromkeys(side.work for side in sides):
        of_work = [*machine(work), *(side for side in sides if side.work == work)]
        try:
            found = measure(of_work, args.rounds, args.venv.absolute())
        except turns.SideError as error:
            sys.exit(f"error: {error}")
        print(f"\n{work}; {machine_name()}\n\n{report(found)}", flush=True)
        rows += [{name: r.get(name, "") for name in COLUMNS} for r in found]
        if args.csv:
            write_csv(args.csv, COLUMNS, rows)


if __name__ == "__main__":
    main()
