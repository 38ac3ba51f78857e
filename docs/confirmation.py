"""Prints the table of docs/search.md that says whether a memory wins: its rule, as code.

    python docs/confirmation.py

Of the image sets of which all ten seeds have run. The rule is that of the page, which stood before
the runs.
"""

from collections.abc import Sequence
from pathlib import Path

from aim_flax import markdown
from aim_flax.statistics import Comparison, compare, p_value
from aim_flax.study.results import accuracies_by_arm, read_recorded
from aim_flax.study.table import interval

RESULTS = Path(__file__).parents[1] / "results"
FILES = {
    "groceries": RESULTS / "confirm_grocery.csv",
    "CIFAR-10": RESULTS / "confirm_cifar10.csv",
}
FORMS = ("attend_erase_add", "large")
BESIDE = ("control", "coords", "gates", "low_rank", "longer")
SEEDS = range(810, 820)
LEVEL = 0.01


def has_run(file: Path) -> bool:
    """Returns whether all seeds of all arms have run on an image set: nothing is said before."""
    arms = accuracies_by_arm(read_recorded(file)) if file.is_file() else {}
    return all(sorted(arms.get(arm, ())) == list(SEEDS) for arm in (*FORMS, *BESIDE))


def comparisons(file: Path) -> dict[tuple[str, str], Comparison]:
    """Returns {(form, what is beside it): the difference} on an image set."""
    arms = accuracies_by_arm(read_recorded(file))
    beside = {other: compare(arms, other) for other in BESIDE}
    return {(form, other): found[form] for other, found in beside.items() for form in FORMS}


def is_better(found: Comparison) -> bool:
    return found.p is not None and found.p < LEVEL and found.summary.mean > 0


def winners(sets: Sequence[dict[tuple[str, str], Comparison]]) -> list[str]:
    """Returns the forms that are better than all beside them on all image sets."""
    return [
        form
        for form in FORMS
        if all(is_better(found[form, other]) for found in sets for other in BESIDE)
    ]


def table(names: Sequence[str], sets: Sequence[dict[tuple[str, str], Comparison]]) -> str:
    """Returns the table: a row for each form and what is beside it, two columns for each set."""
    header = ["form", "against"]
    for name in names:
        header += [f"{name}: points (95 % interval)", "p"]
    rows = [header]
    for form in FORMS:
        for other in BESIDE:
            cells = [f"`{form}`", f"`{other}`"]
            for found in sets:
                cells += [interval(found[form, other].summary), p_value(found[form, other].p)]
            rows.append(cells)
    return markdown.table(rows, left=2)


def main() -> None:
    there = {name: file for name, file in FILES.items() if has_run(file)}
    sets = [comparisons(file) for file in there.values()]
    print(table(list(there), sets))
    if len(sets) == len(FILES):
        print(f"\nwins: {', '.join(winners(sets)) or 'none'}")


if __name__ == "__main__":
    main()
