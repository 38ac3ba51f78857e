"""Makes the table of docs/search.md's check, of nothing and of something, from its runs.

    python docs/checks.py WORKDIR --csv FILE

`control` trained once more, with seeds ten above those of the study, becomes the arm `again`, each
run with the seed that it is compared with; the column `trained_with_seed` has its own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aim_flax.console import CommandParser, as_command
from aim_flax.errors import UsageError
from aim_flax.files import write_csv
from aim_flax.study.results import COLUMNS, read_runs

ROOT = Path(__file__).parents[1]
SEEDS = range(810, 820)
ARMS = ("control", "again", "fewer")


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a run's row as it stands in the table."""
    row = row | {"trained_with_seed": row["seed"]}
    if row["arm"] == "control" and row["seed"] not in SEEDS:
        row |= {"arm": "again", "seed": row["seed"] - len(SEEDS)}
    return row


@as_command()
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="docs/checks.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", metavar="WORKDIR", help="of the study")
    parser.add_argument("--csv", type=Path, default=ROOT / "results" / "checks_strong.csv")
    given = parser.parse_args(argv)
    rows = [renamed(row) for row in read_runs([given.runs])]
    if others := {row["arm"] for row in rows} - {*ARMS}:
        raise UsageError(f"{given.runs} has arms of another study: {', '.join(sorted(others))}")
    ordered = sorted(rows, key=lambda row: (ARMS.index(row["arm"]), row["seed"]))
    write_csv(given.csv, (*COLUMNS, "trained_with_seed"), ordered)


if __name__ == "__main__":
    main()
