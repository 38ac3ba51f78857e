"""How a step's time and memory grow, with and without memory: python benchmarks/growth.py.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python benchmarks/growth.py \\
        --config configs/small_resnet.py --grow train.batch_size=16,32,64 --grow devices=1,2

Each arm takes a step in turn, with each value of each key by itself. The number of devices that
share a batch counts as a key. Ratios are to the first arm with the same value, in the same round,
and of the least times of both, which on a busy machine tell more.
"""

import argparse
import statistics
from pathlib import Path

import jax
from step_time import Variant, add_variants, split, variants

from aim_flax import allocator
from aim_flax import config as configs
from aim_flax.console import reporting_errors
from aim_flax.files import write_csv
from aim_flax.markdown import table

COLUMNS = (
    "key",
    "value",
    "variant",
    "seconds",
    "least_seconds",
    "ratio",
    "ratio_low",
    "ratio_high",
)
COLUMNS += ("mebibytes", "mebibytes_ratio", "rounds", "device")


def grown(config: configs.ConfigDict, key: str, value: str) -> tuple[configs.ConfigDict, int]:
    """Returns a config with another value of one key, and the number of devices."""
    if key == "devices":
        return config, int(value)
    if key.startswith("memory.") and config.memory is None:
        return config, 1
    return configs.override(config, [f"{key}={value}"]), 1


def rows_of(key: str, value: str, measured: list[Variant]) -> list[dict]:
    """Returns a row for each arm with one value of a key."""
    first, rows = measured[0], []
    for variant in measured:
        ratios = sorted(a / b for a, b in zip(variant.seconds, first.seconds, strict=True))
        quarter = len(ratios) // 4
        rows.append({
            "key": key,
            "value": value,
            "variant": variant.name,
            "seconds": f"{statistics.median(variant.seconds):.4f}",
            "least_seconds": f"{min(variant.seconds):.4f}",
            "ratio": f"{statistics.median(ratios):.3f}",
            "ratio_low": f"{ratios[quarter]:.3f}",
            "ratio_high": f"{ratios[-1 - quarter]:.3f}",
            "mebibytes": f"{variant.bytes / 2**20:.1f}",
            "mebibytes_ratio": f"{variant.bytes / first.bytes:.3f}",
            "rounds": len(ratios),
            "device": f"{jax.devices()[0].device_kind}, jax {jax.__version__}",
        })  # fmt: skip
    return rows


def as_markdown(rows: list[dict]) -> str:
    """Returns the table: a row for each value, of each arm the least time, memory, and ratios."""
    arms = list(dict.fromkeys(row["variant"] for row in rows))
    header = ["key", "value"]
    for arm in arms:
        header += [f"{arm}, ms", "MiB"]
        if arm != arms[0]:
            header += ["ratio of the least", "median (quartiles)", "of MiB"]
    lines = [header]
    for start in range(0, len(rows), len(arms)):
        first, *others = of_value = rows[start : start + len(arms)]
        line = [first["key"], first["value"]]
        for row in of_value:
            line += [f"{1e3 * float(row['least_seconds']):.0f}", row["mebibytes"]]
            if row in others:
                low, middle, high = (float(row[c]) for c in ("ratio_low", "ratio", "ratio_high"))
                least = float(row["least_seconds"]) / float(first["least_seconds"])
                line += [f"{least:.2f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]
                line.append(f"{float(row['mebibytes_ratio']):.2f}")
        lines.append(line)
    return table(lines, left=2)


@reporting_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_variants(parser, arms="control_stride1,published")
    parser.add_argument("--grow", action="append", default=[], metavar="KEY=VALUE,VALUE")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    allocator.keep_memory()  # as commands do
    chosen = variants(args)
    # What several keys have in common is compiled once.
    compiled: dict[tuple, Variant] = {}
    points: list[tuple[str, str, list[Variant]]] = []
    for assignment in args.grow:
        key, _, values = assignment.partition("=")
        for value in split(values):
            measured = []
            for name, config in chosen.items():
                changed, count = grown(config, key, value)
                same = (name, changed.to_json(), count)
                if same not in compiled:
                    print(f"{name}, {key}={value}", flush=True)
                    compiled[same] = Variant(name, changed, count)
                measured.append(compiled[same])
            points.append((key, value, measured))
    for _ in range(args.rounds):
        for variant in compiled.values():
            variant.measure()
    rows = [row for point in points for row in rows_of(*point)]
    if args.csv:
        write_csv(args.csv, COLUMNS, rows)
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
