"""docs/confirmation.py: the rule of docs/search.md by which a form of memory wins."""

import runpy

import pytest

from aim_flax.files import write_csv
from aim_flax.study.results import COLUMNS
from tests.runs import ROOT

PAGE = (ROOT / "docs" / "search.md").read_text()
SCRIPT = runpy.run_path(str(ROOT / "docs" / "confirmation.py"))
SEEDS, FORMS, BESIDE = SCRIPT["SEEDS"], SCRIPT["FORMS"], SCRIPT["BESIDE"]
# Of ten seeds, in points; each arm has them in an order of its own.
NOISE = (0.3, -0.1, 0.2, 0.0, -0.4, 0.5, -0.2, -0.3, 0.1, -0.1)


def study(path, gains):
    """Writes runs whose arms have these gains in points, 0 if none is given; returns the file."""
    rows = []
    for number, arm in enumerate((*FORMS, *BESIDE)):
        for place, seed in enumerate(SEEDS):
            accuracy = (60 + gains.get(arm, 0.0) + NOISE[place - number]) / 100
            row = dict(name="x", arm=arm, seed=seed, status="finished", test_accuracy=accuracy)
            rows.append(dict.fromkeys(COLUMNS, "") | row)
    write_csv(path, COLUMNS, rows)
    return path


@pytest.fixture
def sets(tmp_path):
    def written(*gains):
        files = [study(tmp_path / f"{n}.csv", each) for n, each in enumerate(gains)]
        return [SCRIPT["comparisons"](file) for file in files]

    return written


def test_the_page_has_the_table_of_the_sets_that_have_run(capsys):
    SCRIPT["main"]()
    table, _, verdict = capsys.readouterr().out.partition("\n\n")
    assert table.strip() in PAGE
    assert verdict.strip() in PAGE


def test_nothing_is_said_of_a_set_before_all_its_seeds_have_run(tmp_path):
    file = study(tmp_path / "results.csv", {})
    assert SCRIPT["has_run"](file)
    *rows, last = file.read_text().splitlines(keepends=True)
    assert last.startswith(f"x,{BESIDE[-1]},{SEEDS[-1]},")
    file.write_text("".join(rows))
    assert not SCRIPT["has_run"](file)
    assert not SCRIPT["has_run"](tmp_path / "other.csv")


def test_a_form_that_beats_all_on_both_sets_wins(sets):
    both = dict.fromkeys(FORMS, 3.0)
    assert SCRIPT["winners"](sets(both, both)) == list(FORMS)
    one = {FORMS[1]: 3.0}
    assert SCRIPT["winners"](sets(both, one)) == [FORMS[1]]
    assert SCRIPT["winners"](sets({}, {})) == []


@pytest.mark.parametrize("other", BESIDE)
def test_one_that_does_as_much_or_more_is_enough_not_to_win(sets, other):
    wins = dict.fromkeys(FORMS, 3.0)
    for gain in (3.0, 5.0):
        assert SCRIPT["winners"](sets(wins, wins | {other: gain})) == []
        assert SCRIPT["winners"](sets(wins | {other: gain}, wins)) == []


def test_a_gain_that_does_not_show_is_none(sets):
    """0.2 points, with differences between -0.9 and 0.9 around them."""
    small = dict.fromkeys(FORMS, 0.2)
    assert SCRIPT["winners"](sets(small, dict.fromkeys(FORMS, 3.0))) == []


def test_a_clear_loss_is_no_win(sets):
    assert SCRIPT["winners"](sets(*2 * [dict.fromkeys(FORMS, -3.0)])) == []
