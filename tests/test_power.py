"""The power of paired tests: published values, another computation, and what is told of a study."""

from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, stats

from aim_flax.cli import ablate as ablate_command
from aim_flax.cli import table as table_command
from aim_flax.files import write_json
from aim_flax.statistics import MOST_SEEDS, compare, seeds_for, smallest_effect
from aim_flax.study.power import power_table, smallest_differences
from aim_flax.study.results import accuracies_by_arm
from aim_flax.study.table import arm_table
from tests.asserts import fails, refused
from tests.runs import snapshot
from tests.test_comparison import recorded
from tests.test_study_report import failed, write


def test_published_values():
    """Those of G*Power 3.1 for two dependent means, two-sided, 0.05 and 0.8: 34 pairs for d_z 0.5
    are in its manual; 199, 34 and 15 are those for Cohen's small, medium and large effects."""
    assert smallest_effect(10) == pytest.approx(0.9960, abs=5e-5)
    assert [seeds_for(effect) for effect in (0.2, 0.5, 0.8, 1)] == [199, 34, 15, 10]


@pytest.mark.parametrize("n", [2, 3, 5, 10, 33, 200, 5000])
def test_that_effect_is_found_with_a_chance_of_80_percent(n):
    """By integration over the deviation of the sample, without a noncentral t distribution."""
    effect, df = smallest_effect(n), n - 1
    critical = stats.t.ppf(0.975, df)

    def found(share, side):
        chance = stats.norm.sf(critical * share / df**0.5 - side * effect * n**0.5)
        return chance * stats.chi.pdf(share, df)

    low, high = stats.chi.ppf([1e-12, 1 - 1e-12], df)
    right, wrong = (integrate.quad(found, low, high, args=(s,), limit=200)[0] for s in (1, -1))
    assert right == pytest.approx(0.8, abs=1e-6)
    assert wrong < 1e-6


def test_so_many_seeds_are_the_fewest():
    for effect in (0.03, 0.4, 3.0):
        n = seeds_for(effect)
        assert smallest_effect(n) <= effect < smallest_effect(n - 1)
    assert seeds_for(100) == 2
    assert seeds_for(smallest_effect(MOST_SEEDS) * 0.999) is None


def test_table_of_recorded_runs():
    rows = recorded("planted")
    lines = power_table(rows, "control", (2, 0.5)).splitlines()
    assert lines[0] == (
        "| arm | common seeds | standard deviation of the differences | smallest"
        " difference shown with a chance of 80 % | seeds for 2 | seeds for 0.5 |"
    )
    arms = accuracies_by_arm(rows)
    for arm, line in zip(("half", "eighth"), lines[2:4], strict=True):
        deviation = np.std([arms[arm][i] - arms["control"][i] for i in range(20)], ddof=1)
        # 20 pairs show a d_z of 0.6604.
        cells = f"{100 * deviation:.2f} | {100 * 0.660442 * deviation:.2f}"
        needed = [seeds_for(points / 100 / deviation) for points in (2, 0.5)]
        assert line == f"| `{arm}` | 20 | {cells} | {needed[0]:,} | {needed[1]:,} |"
        assert 2 < needed[0] < needed[1]


def test_what_the_deviation_may_be_is_what_is_said():
    text = power_table(recorded("null"), "control", (1,))
    for n, times in ((5, "2.9"), (10, "1.8"), (20, "1.5")):
        assert f"{np.sqrt((n - 1) / stats.chi2.ppf(0.025, n - 1)):.1f}" == times
        assert times in text


def test_few_seeds_equal_ones_and_lost_runs_are_told():
    rows = [
        {"arm": arm, "seed": seed, "test_accuracy": accuracy, "status": "finished"}
        for arm, accuracies in {
            "control": (0.5, 0.6, 0.7),
            "one": (0.5,),
            "shifted": (0.51, 0.61, 0.71),
            "usual": (0.52, 0.61, 0.73),
        }.items()
        for seed, accuracy in enumerate(accuracies)
    ]
    rows.append(failed({"name": "s", "arm": "none", "seed": 0}, "diverged at step 30"))
    text = power_table(rows, "control", (1,))
    lines = text.splitlines()
    assert lines[2:4] == [
        "| `one` | 1 | unknown | unknown | unknown |",
        "| `shifted` | 3 | unknown | unknown | unknown |",
    ]
    # Differences of 2, 1 and 3 points: 3 pairs show a d_z of 3.264.
    assert lines[4] == "| `usual` | 3 | 1.00 | 3.26 | 10 |"
    assert lines[5] == "| `none` | 0 | unknown | unknown | unknown |"
    assert "`one` and `control` have one finished seed in common: without two" in text
    assert "`none` and `control` have no finished seed in common: without two" in text
    assert "`shifted` differs from `control` by the same in each of 3 common seeds" in text
    assert "Without a result: `none` seed 0 (diverged at step 30)" in text
    compared = compare(accuracies_by_arm(rows), "control")
    assert ": `usual` 3.26. " in smallest_differences(compared)
    del compared["usual"]
    assert smallest_differences(compared) == ""


def test_without_a_comparison_there_is_no_power():
    rows = recorded("null")
    with refused("a study compares arms, but all runs are of again"):
        power_table([row for row in rows if row["arm"] == "again"], None, (1,))
    with refused("no arm is named control: --reference ARM says what to compare with"):
        power_table(rows, None, (1,))


def test_report_states_the_smallest_difference(tmp_path):
    text = write(tmp_path, recorded("planted"))
    compared = compare(accuracies_by_arm(recorded("planted")), "control")
    sentence = smallest_differences(compared)
    assert sentence in text.split("\n\n")
    half = 66.0442 * compared["half"].summary.deviation
    assert f": `half` {half:.2f}, `eighth` " in sentence


def test_commands_print_it_and_write_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [row for row in recorded("planted") if int(row["seed"]) < 4]
    for row in rows:
        folder = Path("s", row["arm"], row["seed"])
        folder.mkdir(parents=True)
        numbers = {key: float(x) for key, x in row.items() if key.startswith("test_") and x}
        whole = {key: int(x) for key, x in row.items() if key in ("seed", "params")}
        write_json(folder / "summary.json", row | numbers | whole)
        write_json(folder / "config.json", {"name": "s", "arm": row["arm"], "seed": whole["seed"]})
    arms = {
        arm: {"source": [None, []], "overrides": [], "config": {}, "seeds": [0, 1, 2, 3]}
        for arm in dict.fromkeys(row["arm"] for row in rows)
    }
    write_json(
        Path("s/study.json"),
        {"name": "s", "config": "s.py", "reference": "control", "arms": arms, "commands": []},
    )
    before = snapshot(tmp_path)
    ablate_command.main(["--power", "1,0.1", "--workdir", "s"])
    assert capsys.readouterr().out == power_table(rows, "control", (1, 0.1)) + "\n"
    ablate_command.main(["--power", "--workdir", "s", "--reference", "half"])
    assert capsys.readouterr().out == power_table(rows, "half", (2, 1, 0.5, 0.25)) + "\n"
    assert snapshot(tmp_path) == before
    table_command.main(["s", "--reference", "control", "--power=0.5"])
    by_name = sorted(rows, key=lambda row: row["arm"])
    printed = capsys.readouterr().out
    assert printed.startswith(arm_table(by_name, "control"))
    assert printed.endswith("\n\n" + power_table(by_name, "control", (0.5,)) + "\n")
    assert "give --reference ARM" in fails(capsys, table_command.main, "s", "--power")
