"""How long commands take from their start, against another checkout: python benchmarks/startup.py.

Whole processes of this checkout and of another one, such as a worktree of an earlier commit, take
turns within each round, with the same Python. Each keeps its compiled programs in a folder of its
own, and starts once before it is timed, so what is timed is the second start on a machine; with
--cold there is no folder, and everything is compiled.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from aim_flax.console import CommandParser, as_command
from aim_flax.errors import UsageError
from aim_flax.files import write_csv

_HERE = Path(__file__).parents[1]
_DIGITS = ("--config", "configs/digits_mlp.py")
_RESNET = ("--config", "configs/stanford_dogs_resnet50.py", "--config.model.num_classes=120")
# Flags of train.py.
WORKS = {
    "help": ("--help",),
    "describe digits": (*_DIGITS, "--describe"),
    "describe ResNet50": (*_RESNET, "--describe"),
    "train digits": _DIGITS,
}
# Until the first line of progress: a call of steps, and the first evaluation.
FIRST = "train digits, first steps"
COLUMNS = ("work", "side", "seconds", "lowest", "highest", "processor_seconds", "ratio", "rounds")


@dataclasses.dataclass(frozen=True)
class Taken:
    """What a command took, in seconds.

    Attributes:
      wall, processor: of the whole process.
      first: until it printed a line of progress; None if it printed none.
    """

    wall: float
    processor: float
    first: float | None


def run(checkout: Path, argv: Sequence[str], cache: Path | None) -> Taken:
    """Runs train.py of a checkout, and returns what it took.

    Args:
      cache: the user's cache folder; None: nothing is kept.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    if cache is None:
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    else:
        environment["XDG_CACHE_HOME"] = str(cache)
    with tempfile.TemporaryDirectory() as folder:
        workdir = [] if {"--help", "--describe"} & set(argv) else ["--workdir", f"{folder}/run"]
        before, first = time.perf_counter(), None
        process = subprocess.Popen(
            [sys.executable, "train.py", *argv, *workdir],
            cwd=checkout,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for line in process.stdout:
            if first is None and line.startswith("step "):
                first = time.perf_counter() - before
        # Of this process alone, unlike getrusage's sum over all children.
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - before
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UsageError(f"{checkout}: train.py {' '.join(argv)} failed")
    return Taken(wall, usage.ru_utime + usage.ru_stime, first)


def rows(work: str, taken: dict[str, list[tuple[float, float | None]]]) -> list[dict]:
    """Returns a row per side.

    Args:
      taken: (wall, processor seconds or None) of each side and round.
    """
    walls = {side: [wall for wall, _ in rounds] for side, rounds in taken.items()}
    # Of neighbours in time: the load of a machine changes within minutes.
    ratio = statistics.median(a / b for a, b in zip(*walls.values(), strict=True))
    found = []
    for side, rounds in taken.items():
        processor = [seconds for _, seconds in rounds if seconds is not None]
        found.append(
            {
                "work": work,
                "side": side,
                "seconds": round(statistics.median(walls[side]), 3),
                "lowest": round(min(walls[side]), 3),
                "highest": round(max(walls[side]), 3),
                "processor_seconds": round(statistics.median(processor), 3) if processor else None,
                "ratio": round(ratio, 3) if side == "here" else None,
                "rounds": len(rounds),
            }
        )
    return found


@as_command()
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(prog="startup.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--against", type=Path, required=True, help="the other checkout")
    parser.add_argument("--rounds", type=_count, default=5, help="default: 5")
    parser.add_argument("--cold", action="store_true", help="keep no compiled programs")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    other = args.against.resolve()
    if not (other / "train.py").is_file():
        raise UsageError(f"--against is {args.against}, expected a checkout with a train.py")
    sides = {"here": _HERE, "before": other}
    taken: dict[str, dict[str, list]] = {
        work: {side: [] for side in sides} for work in (*WORKS, FIRST)
    }
    with tempfile.TemporaryDirectory() as folder:
        caches = {side: None if args.cold else Path(folder, side) for side in sides}
        for number in range(args.rounds + 1):
            # Who comes first changes.
            order = list(sides.items())[:: -1 if number % 2 else 1]
            for work, flags in WORKS.items():
                for side, checkout in order:
                    found = run(checkout, flags, caches[side])
                    if not number:
                        continue  # It fills caches: of programs, of bytecode, of the disk.
                    taken[work][side].append((found.wall, found.processor))
                    if found.first is not None:
                        taken[FIRST][side].append((found.first, None))
    table = [row for work, of_sides in taken.items() for row in rows(work, of_sides)]
    for row in table:
        processor = row["processor_seconds"]
        spent = "" if processor is None else f", processor {processor:.2f} s"
        ratio = "" if row["ratio"] is None else f", here / before {row['ratio']:.2f}"
        print(
            f"{row['work']:26} {row['side']:7} {row['seconds']:6.2f} s"
            f" ({row['lowest']:.2f} to {row['highest']:.2f}){spent}{ratio}"
        )
    if args.csv:
        write_csv(args.csv, COLUMNS, table)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number of at least 1")
    return int(text)


if __name__ == "__main__":
    main()
