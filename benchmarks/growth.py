"""How a step's time and memory grow, with and without memory: python benchmarks/growth.py.

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python benchmarks/growth.py \\
        --config configs/small_resnet.py --grow train.batch_size=16,32,64 --grow devices=1,2

Each arm takes a step in turn, as it is and with each value of each key by itself. The devices that
share a batch count as a key. Ratios are to the first arm with the same value, in the same round.
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

COLUMNS = ("key", "value", "variant", "seconds", "ratio", "ratio_low", "ratio_high")
COLUMNS += ("mebibytes", "mebibytes_ratio", "rounds", "device")


def grown(config: configs.ConfigDict, key: str, value: str) -> tuple[configs.ConfigDict, int]:
    """Returns a config with another value of one key, and the number of devices."""
    if key == "devices":
        return config, int(value)
    if key.startswith("memory.") and config.memory is None:
        return config, 1
    return configs.override(config, [f"{key}={value}"]), 1


def rows_of(key: str, value: str, measured: list[Variant], rounds: int) -> list[dict]:
    """Takes the steps, and returns a row for each variant."""
    for variant in measured:
        variant.seconds.clear()
    for _ in range(rounds):
        for variant in measured:
            variant.measure()
    first, rows = measured[0], []
    for variant in measured:
        ratios = sorted(a / b for a, b in zip(variant.seconds, first.seconds, strict=True))
        quarter = len(ratios) // 4
        rows.append({
            "key": key,
            "value": value,
            "variant": variant.name,
            "seconds": f"{statistics.median(variant.seconds):.4f}",
            "ratio": f"{statistics.median(ratios):.3f}",
            "ratio_low": f"{ratios[quarter]:.3f}",
            "ratio_high": f"{ratios[-1 - quarter]:.3f}",
            "mebibytes": f"{variant.bytes / 2**20:.1f}",
            "mebibytes_ratio": f"{variant.bytes / first.bytes:.3f}",
            "rounds": rounds,
            "device": f"{jax.devices()[0].device_kind}, jax {jax.__version__}",
        })  # fmt: skip
    return rows


def as_markdown(rows: list[dict]) -> str:
    """Returns the table; a row for each value, with the first arm's seconds and the ratios."""
    arms = list(dict.fromkeys(row["variant"] for row in rows))
    header = ["key", "value", f"{arms[0]}, ms", "MiB"]
    for arm in arms[1:]:
        header += [f"{arm}: time (quartiles)", "memory"]
    lines = [header]
    for start in range(0, len(rows), len(arms)):
        first, *others = rows[start : start + len(arms)]
        line = [first["key"], first["value"], f"{1e3 * float(first['seconds']):.0f}"]
        line.append(first["mebibytes"])
        for row in others:
            low, middle, high = (float(row[c]) for c in ("ratio_low", "ratio", "ratio_high"))
            line.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
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
    compiled: dict[tuple, Variant] = {}
    rows: list[dict] = []
    for assignment in args.grow:
        key, _, values = assignment.partition("=")
        for value in split(values):
            measured = []
            for name, config in chosen.items():
                config, count = grown(config, key, value)
                # What several keys have in common is compiled once.
                same = (name, config.to_json(), count)
                if same not in compiled:
                    compiled[same] = Variant(name, config, count)
                measured.append(compiled[same])
            rows += rows_of(key, value, measured, args.rounds)
            for row in rows[-len(measured) :]:
                print("  ".join(f"{column} {row[column]}" for column in COLUMNS), flush=True)
            if args.csv:
                write_csv(args.csv, COLUMNS, rows)
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
