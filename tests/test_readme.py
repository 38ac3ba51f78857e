"""What README and the project's files say is true."""

import csv
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.stats import ttest_rel

from aim_flax import cli, table
from aim_flax.errors import UsageError
from aim_flax.report import write_json

pytestmark = pytest.mark.usefixtures("quick_compile")

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_table_is_that_of_the_committed_results():
    with (ROOT / "results" / "digits_mlp.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert table.arm_table(rows, "control") in README
    seeds = {arm: [r["seed"] for r in rows if r["arm"] == arm] for arm in {r["arm"] for r in rows}}
    assert len(seeds) == 5
    assert all(s == [str(seed) for seed in range(10)] for s in seeds.values())


def test_python_in_readme_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["features"].shape == (4, 28, 28, 8)
    paths = jax.tree_util.tree_leaves_with_path(names["variables"]["params"])
    assert {path[0].key for path, _ in paths} == {"layers_0", "layers_2", "memory"}


def test_commands_in_readme_name_files_and_flags_that_exist(capsys):
    for command in re.findall(r"python train\.py (--config \S+)(.*)", README):
        config = command[0].replace("$arm", "aim")
        flags = command[1].replace("$seed", "0").replace("--describe", "").split()
        if "runs" not in command[1]:
            cli.train([*config.split(), *flags, "--describe"])
    assert "digits_mlp:aim_direct" in capsys.readouterr().out


def test_links_lead_to_files():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def runs(tmp_path, accuracies):
    for arm, seed, accuracy in accuracies:
        summary = dict.fromkeys(table.COLUMNS, 0)
        summary |= {"name": "x", "arm": arm, "seed": seed, "test_accuracy": accuracy, "params": 9}
        (tmp_path / f"{arm}{seed}").mkdir()
        write_json(tmp_path / f"{arm}{seed}" / "summary.json", summary)
    return sorted(tmp_path.iterdir())


def test_table_of_runs(tmp_path, capsys):
    workdirs = runs(tmp_path, [("a", 0, 0.5), ("a", 1, 0.6), ("b", 0, 0.25)])
    file = tmp_path / "out.csv"
    table.main([*map(str, workdirs), "--csv", str(file)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == ["| `a` | 2 | 9 | 55.00 ± 7.07 % |", "| `b` | 1 | 9 | 25.00 % |"]
    assert len(file.read_text().splitlines()) == 4


def test_comparison_is_paired_by_seed_and_corrected(tmp_path):
    rng = np.random.default_rng(0)
    accuracies = {arm: rng.uniform(0.4, 0.6, 6) for arm in ("plain", "a", "b")}
    accuracies["b"] = accuracies["plain"] + 0.1 + 0.001 * np.arange(6)
    rows = [
        {"arm": arm, "seed": seed, "test_accuracy": value, "params": 9}
        for arm, values in accuracies.items()
        for seed, value in reversed(list(enumerate(values)))
    ]
    cells = {
        line.split("|")[1].strip(): line for line in table.arm_table(rows, "plain").split("\n")
    }
    for arm, times in (("a", 1), ("b", 2)):
        test = ttest_rel(100 * accuracies[arm], 100 * accuracies["plain"])
        low, high = test.confidence_interval(0.95)
        difference = 100 * (accuracies[arm] - accuracies["plain"]).mean()
        assert f"{difference:+.2f} ({low:+.2f} to {high:+.2f})" in cells[f"`{arm}`"]
        assert cells[f"`{arm}`"].endswith(f" {min(1, times * test.pvalue):.2f} |")
    with pytest.raises(UsageError, match="--reference is 'plane', .*did you mean 'plain'"):
        table.arm_table(rows, "plane")
    with pytest.raises(UsageError, match="c and plain have fewer than two seeds in common"):
        table.arm_table([*rows, rows[0] | {"arm": "c"}], "plain")


def test_unfinished_run_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="the run is not finished"):
        table.read_runs([tmp_path])


def test_constraints_pin_versions_only():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert "jax==0.10.1" in pins
