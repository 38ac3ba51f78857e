"""Prints the last two columns of docs/predictions.md: what was measured, and what comes of it.

    python docs/predictions.py [results/predictions.csv results/predictions_long.csv]

The rules are those of the page, which stood before the runs. A file that isn't there leaves the
columns of its predictions empty.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from aim_flax.statistics import Summary, compare
from aim_flax.study.results import accuracies_by_arm, read_recorded
from aim_flax.study.table import interval

RESULTS = Path(__file__).parents[1] / "results"
FILES = (RESULTS / "predictions.csv", RESULTS / "predictions_long.csv")
HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
# What an arm is compared with, if it isn't `control_stride1`.
_TRAINED_SO = {"roll_": "roll_control", "noflip_": "noflip_control"}

# An arm's gain: its differences in test accuracy from the control of the same seeds.
Gain = Callable[[str], Summary]


def gains(file: Path) -> Gain:
    """Returns the gain of each arm of a study's results."""
    arms = accuracies_by_arm(read_recorded(file))

    def gain(arm: str) -> Summary:
        start = next((start for start in _TRAINED_SO if arm.startswith(start)), None)
        return compare(arms, _TRAINED_SO.get(start, "control_stride1"))[arm].summary

    return gain


def outcome(holds: bool, fails: bool) -> str:
    assert not (holds and fails)
    return HOLDS if holds else FAILS if fails else UNDECIDED


def of_study(gain: Gain) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the arms that predictions 1 to 6 are about, and what comes of each."""
    written, plain, coords = gain("published"), gain("published_no_update"), gain("coords")
    for arm, whole, share in (("no_update", plain, 0.25), ("published", written, 0.5)):
        rolled, most = gain(f"roll_{arm}"), share * whole.mean
        arms = ("published_no_update" if arm == "no_update" else arm, f"roll_{arm}")
        yield arms, outcome(rolled.high < most, rolled.low > most)
    bias = gain("position_bias")
    holds = bias.mean >= 0.75 * plain.mean and bias.low > 0
    yield ("published_no_update", "position_bias"), outcome(holds, bias.mean < 0.5 * plain.mean)
    holds, is_some = coords.low > 0 and coords.mean < plain.mean, coords.low > 0 or coords.high < 0
    yield ("published_no_update", "coords"), outcome(holds, is_some and not holds)
    gates, rolled = gain("squeeze_excite"), gain("roll_squeeze_excite")
    holds = gates.low > 0 and rolled.mean >= 0.5 * gates.mean
    fails = gates.low > 0 and rolled.mean < 0.25 * gates.mean
    yield ("squeeze_excite", "roll_squeeze_excite"), outcome(holds, fails)
    without = gain("noflip_no_update")
    arms = ("published_no_update", "noflip_no_update")
    yield arms, outcome(without.low > plain.mean, without.high < plain.mean)


def rows(short: Path, long: Path) -> list[tuple[str, str]]:
    """Returns what was measured and what comes of it, for each prediction in turn."""
    if not short.is_file():
        return [("", "")] * 7
    gain = gains(short)
    found = [
        ("; ".join(f"`{arm}` {_told(gain(arm))}" for arm in arms), result)
        for arms, result in of_study(gain)
    ]
    if not long.is_file():
        return [*found, ("", "")]
    before, after = gain("published_no_update"), gains(long)("published_no_update")
    result = outcome(after.high < before.mean, after.low > before.mean)
    told = f"10 epochs of 5,000: {_told(before)}; 30 of 20,000: {_told(after)}"
    return [*found, (told, result)]


def _told(gain: Summary) -> str:
    return f"{interval(gain)}, {gain.n} seeds"


def main(short: Path = FILES[0], long: Path = FILES[1]) -> None:
    for number, (measured, result) in enumerate(rows(short, long), start=1):
        print(f"{number} | {measured} | {result}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
