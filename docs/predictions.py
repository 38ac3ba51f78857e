"""Prints the last two columns of docs/predictions.md: what was measured, and what comes of it.

    python docs/predictions.py

From the studies in results/. The rules are those of the page, which stood before the runs. A study
that hasn't run leaves the columns of its predictions empty.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

from aim_flax.statistics import Summary, compare
from aim_flax.study.results import accuracies_by_arm, read_recorded
from aim_flax.study.table import interval

RESULTS = Path(__file__).parents[1] / "results"
HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"
# What an arm is compared with, if it isn't the study's own control.
_CONTROLS = ("control_stride1", "control")
_TRAINED_SO = {
    "roll_": "roll_control",
    "noflip_": "noflip_control",
    "whole_": "whole_control",
}

# An arm's gain: its differences in test accuracy from the control, or another arm, of the same
# seeds.
Gain = Callable[..., Summary]


def gains(file: Path) -> Gain:
    """Returns the gain of each arm of a study's results."""
    arms = accuracies_by_arm(read_recorded(file))
    control = next(name for name in _CONTROLS if name in arms)

    compared = functools.cache(functools.partial(compare, arms))

    def gain(arm: str, reference: str | None = None) -> Summary:
        start = next((start for start in _TRAINED_SO if arm.startswith(start)), None)
        return compared(reference or _TRAINED_SO.get(start, control))[arm].summary

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
    yield ("published_no_update", "position_bias"), _as_much(gain("position_bias"), plain)
    holds, is_some = coords.low > 0 and coords.mean < plain.mean, coords.low > 0 or coords.high < 0
    yield ("published_no_update", "coords"), outcome(holds, is_some and not holds)
    gates, rolled = gain("squeeze_excite"), gain("roll_squeeze_excite")
    holds = gates.low > 0 and rolled.mean >= 0.5 * gates.mean
    fails = gates.low > 0 and rolled.mean < 0.25 * gates.mean
    yield ("squeeze_excite", "roll_squeeze_excite"), outcome(holds, fails)
    without = gain("noflip_no_update")
    arms = ("published_no_update", "noflip_no_update")
    yield arms, outcome(without.low > plain.mean, without.high < plain.mean)


def of_patterns(gain: Gain) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the arms that predictions 8 to 12 are about, and what comes of each."""
    published, large = "published_no_update", gain("bias_random")
    yield (published, "add_random"), _the_same(gain, "add_random", published)
    yield ("add_random", "add_zero"), _below_half(gain("add_zero"), gain("add_random"))
    yield (published, "bias_random"), _as_much(large, gain(published))
    yield ("bias_random", "bias_frozen"), _half_as_much(gain("bias_frozen"), large)
    yield ("bias_random", "bias_small"), _below_half(gain("bias_small"), large)


def of_rates(gain: Gain) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the arms that predictions 13 to 16 are about, and what comes of each."""
    published = "published_no_update"
    whole = gain(published)

    def of_less(arm: str) -> str:
        mean, apart = gain(arm).mean, gain(arm, published)
        return outcome(mean < 0.75 * whole.mean and apart.high < 0, mean > 0.9 * whole.mean)

    yield (published, "direct"), of_less("direct")
    yield (published, "direct_fast"), _the_same(gain, "direct_fast", published)
    yield (published, "conv_slow"), of_less("conv_slow")
    yield (published, "bias_fast"), _as_much(gain("bias_fast"), whole)


def of_adapters(gain: Gain) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the arms that predictions 17 to 20 are about, and what comes of each."""
    whole = gain("aim")
    yield ("aim", "no_update"), _below_half(gain("no_update"), whole)
    yield ("aim", "gates"), _as_much(gain("gates"), whole)
    yield ("aim", "norms"), _half_as_much(gain("norms"), whole)
    bias = gain("position_bias").mean
    yield ("aim", "position_bias"), outcome(bias < 0.25 * whole.mean, bias > 0.5 * whole.mean)


def of_groceries(gain: Gain) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the arms that predictions 21 to 26 are about, and what comes of each."""
    memory, bias, whole = gain("aim"), gain("no_update"), gain("whole_aim")
    changed = gain("low_rank")
    yield ("aim",), outcome(memory.mean >= 0.05 and memory.low > 0, memory.mean < 0.025)
    yield ("aim", "gates"), _as_much(gain("gates"), memory)
    yield ("no_update", "bias_fast"), _as_much(gain("bias_fast"), bias)
    yield ("no_update", "flat"), _as_much(gain("flat"), bias)
    nothing = whole.low <= 0 <= whole.high
    yield ("whole_aim",), outcome(nothing, not nothing)
    holds = changed.mean >= memory.mean and changed.low > 0
    yield ("aim", "low_rank"), outcome(holds, gain("low_rank", "aim").high < 0)


def of_kernels(gain: Gain) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the arms that predictions 27 and 28 are about, and what comes of each."""
    changed = gain("lora")
    for arm in ("fast_kernels", "fast"):
        yield ("lora", arm), _as_much(gain(arm), changed)


def of_parts(gain: Gain) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the arms that predictions 31 and 32, each of a study of its own, are about."""
    yield ("aim", "apart"), _as_much(gain("apart"), gain("aim"))


def of_best_form(gain: Gain) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yields the arm that predictions 33 and 34, each of a study of its own, are about."""
    form = gain("attend_erase_add")
    yield ("attend_erase_add",), outcome(form.mean < 0.005 and form.low <= 0, form.low > 0)


def _as_much(gained: Summary, whole: Summary) -> str:
    holds = gained.mean >= 0.75 * whole.mean and gained.low > 0
    return outcome(holds, gained.mean < 0.5 * whole.mean)


def _half_as_much(gained: Summary, whole: Summary) -> str:
    holds = gained.mean >= 0.5 * whole.mean and gained.low > 0
    return outcome(holds, gained.mean < 0.25 * whole.mean)


def _the_same(gain: Gain, arm: str, as_arm: str) -> str:
    gained, whole, apart = gain(arm), gain(as_arm), gain(arm, as_arm)
    holds = apart.low <= 0 <= apart.high and gained.mean >= 0.75 * whole.mean
    return outcome(holds, gained.mean < 0.5 * whole.mean)


def _below_half(small: Summary, whole: Summary) -> str:
    return outcome(small.mean < 0.5 * whole.mean, small.mean > 0.75 * whole.mean)


def rows(results: Path) -> list[tuple[str, str]]:
    """Returns what was measured and what comes of it, for each prediction in turn.

    Args:
      results: the folder of the studies' results.
    """
    short, long = results / "predictions.csv", results / "predictions_long.csv"
    return [
        *_of_file(short, of_study, count=6),
        _of_longer(short, long),
        *_of_file(results / "patterns.csv", of_patterns, count=5),
        *_of_file(results / "fast.csv", of_rates, count=4),
        *_of_file(results / "adapters.csv", of_adapters, count=4),
        *_of_file(results / "adapters_grocery.csv", of_groceries, count=6),
        *_of_file(results / "kernels.csv", of_kernels, count=2),
        *(_of_strong(long, results / "strong_resnet.csv", arm) for arm in ("no_update", "memory")),
        *_of_file(results / "apart.csv", of_parts, count=1),
        *_of_file(results / "apart_grocery.csv", of_parts, count=1),
        *_of_file(results / "fast_forms.csv", of_best_form, count=1),
        *_of_file(results / "fast_forms_again.csv", of_best_form, count=1),
    ]


def _of_file(file: Path, rules: Callable[[Gain], Iterator], count: int) -> list[tuple[str, str]]:
    if not file.is_file():
        return [("", "")] * count
    gain = gains(file)
    return [
        ("; ".join(f"`{arm}` {_told(gain(arm))}" for arm in arms), result)
        for arms, result in rules(gain)
    ]


def _of_longer(short: Path, long: Path) -> tuple[str, str]:
    if not (short.is_file() and long.is_file()):
        return "", ""
    before, after = (gains(file)("published_no_update") for file in (short, long))
    result = outcome(after.high < before.mean, after.low > before.mean)
    return f"10 epochs of 5,000: {_told(before)}; 30 of 20,000: {_told(after)}", result


def _of_strong(long: Path, strong: Path, arm: str) -> tuple[str, str]:
    if not (long.is_file() and strong.is_file()):
        return "", ""
    gained, left = gains(strong)(arm), gains(long)("published_no_update")
    return f"`{arm}` {_told(gained)}; left: {_told(left)}", _below_half(gained, left)


def _told(gain: Summary) -> str:
    return f"{interval(gain)}, {gain.n} seeds"


def main(results: Path = RESULTS) -> None:
    for number, (measured, result) in enumerate(rows(results), start=1):
        print(f"{number} | {measured} | {result}")


if __name__ == "__main__":
    main()
