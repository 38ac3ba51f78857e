"""What a training step costs on chips that aren't here: python benchmarks/topologies.py.

    JAX_PLATFORMS=cpu python benchmarks/topologies.py --csv results/tpu_topologies.csv

Each arm is compiled for each topology, a row of the file for each; a compile takes minutes. Rows
that the file has are not made again, so it goes on where it was stopped. At the end it prints all
rows as a table, with what bounds each step.
"""

import argparse
import csv
import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aim_flax import config as configs
from aim_flax.console import reporting_errors
from aim_flax.files import write_csv
from aim_flax.train.chips import GIB, topology
from aim_flax.train.cost_report import bounds
from aim_flax.train.costs import Costs, TooLargeError, measure
from aim_flax.train.topologies import absent_devices, planned

TOPOLOGIES = "v5e:2x2,v4:2x2x1,v5p:2x2x1,v6e:2x2,v5e:4x8"
_VERSIONS = ("jax", "jaxlib", "libtpu")
_MEASURED = tuple(field.name for field in dataclasses.fields(Costs))
COLUMNS = ("arm", "topology", "chips", "images_per_chip", "settings", *_MEASURED, "fits")
COLUMNS += _VERSIONS


@reporting_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", default="configs/stanford_dogs_resnet50.py")
    parser.add_argument("--arms", default="published,aim,control_stride1")
    parser.add_argument("--topologies", default=TOPOLOGIES)
    parser.add_argument("--images-per-chip", type=int, default=32)
    parser.add_argument("--set", action="append", default=["dtype=bfloat16"], metavar="KEY=VALUE")
    parser.add_argument("--csv", type=Path, required=True)
    args = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in _VERSIONS}
    rows = []
    if args.csv.exists():
        with args.csv.open() as file:
            rows = list(csv.DictReader(file))
    for name in args.topologies.split(","):
        place = topology(name)
        for arm in args.arms.split(","):
            key = {
                "arm": arm,
                "topology": name,
                "chips": place.count,
                "images_per_chip": args.images_per_chip,
                "settings": " ".join(args.set),
                **versions,
            }
            if any(all(row[k] == str(v) for k, v in key.items()) for row in rows):
                continue
            batch = f"train.batch_size={args.images_per_chip * place.count}"
            config = configs.load(f"{args.config}:{arm}")
            config = configs.override(config, [*args.set, batch])
            print(f"{arm} for {name}", flush=True)
            row = dict.fromkeys(COLUMNS, "") | key
            try:
                costs = measure(planned(config, absent_devices(place)))
                row |= dataclasses.asdict(costs) | {"fits": "yes", "seconds": round(costs.seconds)}
            except TooLargeError as error:
                row["fits"] = str(error)
            rows.append(row)
            write_csv(args.csv, COLUMNS, rows)
    print(table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows of the file as Markdown, with the bounds at the figures of their chips."""
    lines = ["| arm | topology | peak GiB | TFLOP | GB moved | bound | ms | images/s, all chips |"]
    lines.append("| --- | --- | ---: | ---: | ---: | --- | ---: | ---: |")
    for row in rows:
        start = f"| {row['arm']} | {row['topology']} |"
        if row["fits"] != "yes":
            lines.append(f"{start} {row['fits']} | | | | | |")
            continue
        costs = Costs(**{name: float(row[name]) for name in _MEASURED})
        found = bounds(costs, topology(row["topology"]))
        rate = int(row["chips"]) * int(row["images_per_chip"]) / found.seconds
        lines.append(
            f"{start} {costs.peak / GIB:.2f} | {costs.flops / 1e12:.2f} | {costs.moved / 1e9:.1f}"
            f" | {found.what} | {1e3 * found.seconds:.1f} | {rate:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
