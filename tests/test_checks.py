"""docs/checks.py: the recorded check of a strong network, from runs as they were trained."""

import runpy

from aim_flax.files import write_csv
from aim_flax.study.results import COLUMNS
from tests.asserts import refused
from tests.runs import ROOT, read_csv

SCRIPT = runpy.run_path(str(ROOT / "docs" / "checks.py"))
FILE = ROOT / "results" / "checks_strong.csv"


def test_the_recorded_table_is_made_of_runs_as_they_were_trained(tmp_path):
    trained = read_csv(FILE)
    for row in trained:
        again = row["arm"] == "again"
        assert int(row["trained_with_seed"]) - int(row["seed"]) == (10 if again else 0)
        row["arm"] = "control" if again else row["arm"]
        row["seed"] = row["trained_with_seed"]
    write_csv(tmp_path / "runs.csv", COLUMNS, trained[::-1])
    SCRIPT["main"]([str(tmp_path / "runs.csv"), "--csv", str(tmp_path / "made.csv")])
    assert (tmp_path / "made.csv").read_bytes() == FILE.read_bytes()


def test_another_study_is_refused(tmp_path):
    other = ROOT / "results" / "apart.csv"
    with refused("apart.csv has arms of another study: aim, apart, control_stride1$"):
        SCRIPT["main"].__wrapped__([str(other), "--csv", str(tmp_path / "made.csv")])
    assert not list(tmp_path.iterdir())
