"""What README and the project's files say is true."""

import importlib
import re

import jax
import numpy as np
import pytest
from scipy.stats import ttest_rel

from aim_flax.cli import table as table_command
from aim_flax.cli import train as train_command
from aim_flax.files import write_csv, write_json
from aim_flax.study import results
from aim_flax.study import table as study_table
from aim_flax.train import workdir
from tests.asserts import fails, refused
from tests.photos import write_folder
from tests.runs import ROOT, read_csv, read_json

pytestmark = pytest.mark.usefixtures("quick_compile")

UNWRITTEN = "published_no_update"
README = (ROOT / "README.md").read_text()
STUDIES = {
    "digits_mlp": range(10),
    "digits_search": range(200, 205),
    "digits_confirm": range(300, 320),
    "digits_head": range(320, 350),
    "small_resnet_cifar10": range(10),
    "small_resnet_grocery": range(10),
    "pretrained_grocery": range(5),
    "pretrained_cifar10": range(700, 703),
    "predictions": range(400, 410),
    "predictions_long": range(400, 405),
    "patterns": range(500, 510),
    "fast": range(510, 520),
    "curves": range(600, 603),
    "search_strong": range(800, 802),
    "confirm_grocery": range(810, 820),
    "confirm_cifar10": range(810, 820),
    "checks_strong": range(810, 820),
    "adapters": range(710, 715),
    "adapters_grocery": range(720, 723),
    "kernels": range(830, 836),
    "strong_resnet": range(900, 903),
    "apart": range(850, 860),
    "apart_grocery": range(860, 863),
    "fast_forms": range(840, 846),
    "fast_forms_again": range(864, 880),
}


def test_tables_are_those_of_the_committed_results():
    """Each says from which file it is made, and how."""
    source = re.compile(r"<!-- (results/\w+\.csv) against (\w+)(?: on (\w+))? -->\n((?:\|.*\n)+)")
    files = set()
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        tables = source.findall(text)
        assert len(tables) == text.count("accuracy, mean ± standard deviation"), page
        for name, reference, split, lines in tables:
            rows = read_csv(ROOT / name)
            assert lines.strip() == study_table.arm_table(rows, reference, split or "test"), (
                page,
                name,
            )
            files.add(name)
    # Those of `curves` are made by docs/curves.py: tests/test_curves.py.
    assert files == {f"results/{study}.csv" for study in STUDIES.keys() - {"curves"}}


def accuracies(study):
    """Returns the test accuracies of a committed study, of each arm in the order of seeds."""
    rows = sorted(read_csv(ROOT / "results" / f"{study}.csv"), key=lambda row: int(row["seed"]))
    arms = {row["arm"] for row in rows}
    return {
        arm: np.array([float(row["test_accuracy"]) for row in rows if row["arm"] == arm])
        for arm in arms
    }


def test_first_screen_says_what_the_committed_results_are():
    """The pictures, the result and the two commands come first, a table behind them."""
    summary, rest = README.split("\n## Two commands\n")
    summary = " ".join(summary.split())
    assert "docs/method.svg" in summary
    commands, *tables = rest.split("<!-- results/")
    assert "python train.py" in commands
    assert "python -m pytest" in commands
    assert tables[0].startswith("pretrained_grocery.csv")
    assert "docs/answer.png" in summary

    def points(study, arm, reference):
        found = accuracies(study)
        return f"{100 * (found[arm] - found[reference]).mean():.1f}"

    cifar10, groceries = "small_resnet_cifar10", "small_resnet_grocery"
    resolution, both = (
        [points(study, arm, "control") for study in (cifar10, groceries)]
        for arm in ("control_stride1", "published")
    )
    assert f"{resolution[0]} of {both[0]} points" in summary
    assert f"{resolution[1]} of {both[1]} on photographs" in summary
    assert f"the other {points(cifar10, 'published', 'control_stride1')} points" in summary
    assert f"{points(cifar10, 'published', 'control_params')} more than" in summary
    few, many, most = (
        points("curves", f"published_{n}x10", f"control_stride1_{n}x10")
        for n in (1000, 20000, 49000)
    )
    assert f"with 10 epochs {few} points on 1,000 of CIFAR-10's images, {many} on" in summary
    wider = points("curves", "control_params_49000x10", "control_stride1_49000x10")
    assert f"and {most} on 49,000, where as many parameters elsewhere gain {wider} (3" in summary
    better = [points("strong_resnet", arm, "control_stride1") for arm in ("no_update", "memory")]
    assert f"gains anything that shows (+{better[0]} and +{better[1]}, 3 seeds)" in summary
    right = 100 * accuracies("strong_resnet")["control_stride1"].mean()
    assert f"right {right:.0f} % of the time" in summary
    found = accuracies(cifar10)
    p = ttest_rel(found["published"], found["published_no_update"]).pvalue
    writing = points(cifar10, "published", "published_no_update")
    assert f"adds {writing} points (p = {p:.2f})" in summary
    p = ttest_rel(found["aim"], found["aim_no_update"]).pvalue
    writing = points(cifar10, "aim", "aim_no_update")
    assert f"adds {writing} points (p = {p:.3f}), and one memory" in summary
    found = accuracies("apart")
    p = ttest_rel(found["aim"], found["apart"]).pvalue
    sharing = points("apart", "aim", "apart")
    assert f"for the whole network gains {sharing} points more than" in summary
    assert f"one for each stage (p = {p:.2f})" in summary
    fast = [points("fast", arm, "control_stride1") for arm in ("bias_fast", UNWRITTEN)]
    assert f"gains {fast[0]} points where the memory gains {fast[1]}" in summary
    sizes = {row["arm"]: int(row["params"]) for row in read_csv(ROOT / "results" / "fast.csv")}
    more = sizes["bias_fast"] / sizes["control_stride1"] - 1
    assert f"with {more:.0%}".replace("%", " %") + " more parameters" in summary
    found = accuracies("pretrained_grocery")
    p = ttest_rel(found["aim"], found["control"]).pvalue
    gain = 100 * (found["aim"] - found["control"]).mean()
    seeds = len(found["aim"])
    assert f"({gain:+.1f} points on photographs, p = {p:.2f}, {seeds} seeds; on" in summary
    found = {arm: 100 * values for arm, values in accuracies("pretrained_cifar10").items()}
    gain = (found["aim"] - found["control"]).mean()
    assert f"on CIFAR-10 {gain:+.1f}, {len(found['aim'])} seeds)" in summary
    forms = []
    for study in ("confirm_grocery", "confirm_cifar10"):
        found = accuracies(study)
        for form in ("attend_erase_add", "large"):
            assert ttest_rel(found[form], found["control"]).pvalue > 0.05
            forms.append(100 * (found[form] - found["control"]).mean())
    first, second, *others = (f"{gain:+.1f}" for gain in forms)
    assert f"are {first} and {second} points from it on photographs," in summary
    assert f"photographs, {others[0]} and {others[1]} on CIFAR-10." in summary
    fast = points("kernels", "fast", "control")
    assert f"Three times the learning rate gains {fast} points on photographs" in summary
    found = accuracies("fast_forms_again")
    p = ttest_rel(found["attend_erase_add"], found["control"]).pvalue
    lost, seeds = points("fast_forms_again", "control", "attend_erase_add"), len(found["control"])
    assert f"the better form loses {lost} (p = {p:.2f}, {seeds} seeds)" in summary
    frozen = points("adapters", "aim", "control")
    assert f"a memory gains {frozen} points** on CIFAR-10" in summary
    assert 0.7 < float(points("adapters", "no_update", "control")) / float(frozen) < 0.75
    memory, bias, changed = (
        points("adapters_grocery", arm, "control") for arm in ("aim", "flat", "low_rank")
    )
    assert f"where a memory gains {memory} (3 seeds), one number" in summary
    assert f"for each channel gains {bias};" in summary
    assert f"of as many parameters, gain {changed}." in summary


def test_committed_studies_are_of_whole_arms():
    """Every arm has the same seeds, and all of them have a result."""
    for study, seeds in STUDIES.items():
        rows = read_csv(ROOT / "results" / f"{study}.csv")
        assert {row["status"] for row in rows} == {"finished"}
        for arm in {row["arm"] for row in rows}:
            found = [int(row["seed"]) for row in rows if row["arm"] == arm]
            only_the_first = study == "search_strong" and found == [seeds[0]]
            assert found == list(seeds) or only_the_first, arm


def test_the_ten_best_forms_of_the_first_seed_had_the_second():
    rows = read_csv(ROOT / "results" / "search_strong.csv")
    found = {
        seed: {row["arm"]: float(row["val_accuracy"]) for row in rows if row["seed"] == seed}
        for seed in ("800", "801")
    }
    forms = sorted(found["800"].keys() - {"control", "aim"}, key=found["800"].get, reverse=True)
    assert len(forms) == 28
    assert found["801"].keys() == {"control", *forms[:10]}
    first, second = (
        100 * np.mean([found[seed][form] - found[seed]["control"] for form in forms[:10]])
        for seed in ("800", "801")
    )
    page = " ".join((ROOT / "docs" / "search.md").read_text().split())
    assert f"The ten gain {first:.1f} points on average with the first seed" in page
    assert f"and {second:.1f} with the second" in page


@pytest.mark.slow
def test_python_in_readme_runs():
    # The files of a network from elsewhere are what `test_own_network.py` runs, and a Predictor is
    # what `test_use.py` runs.
    not_here = r"(?!# my_|from aim_flax import Predictor)"
    (code,) = re.findall(rf"```python\n{not_here}(.*?)```", README, re.DOTALL)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["features"].shape == (4, 28, 28, 8)
    paths = jax.tree_util.tree_leaves_with_path(names["variables"]["params"])
    assert {path[0].key for path, _ in paths} == {"layers_0", "layers_2", "memory"}


@pytest.mark.slow
def test_describe_knows_the_classes_of_a_folder(capsys, tmp_path):
    photographs = write_folder(tmp_path, train=6, val=3, test=3)
    config = str(ROOT / "configs" / "image_folder_resnet50.py")
    train_command.main(["--config", config, f"--config.data.dir={photographs}", "--describe"])
    output = capsys.readouterr().out
    assert "image_folder_resnet50:aim" in output
    # What test_describe.py has for 81 classes.
    counted = 23_674_001 + 4 * 388_352 + 2 * 1_049_600 + 429_120 - 2_049 * (81 - 3)
    assert f"{counted:,}" in output


def test_modules_that_readme_runs_explain_themselves(capsys):
    modules = set(re.findall(r"python -m (aim_flax\.[\w.]+)", README))
    assert len(modules) >= 2
    for module in modules:
        with pytest.raises(SystemExit) as end:
            importlib.import_module(module).main(["--help"])
        assert end.value.code == 0
        assert module in capsys.readouterr().out


def test_tests_named_in_the_data_page_exist():
    page = (ROOT / "docs" / "data.md").read_text()
    sources = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    names = re.findall(r"::(test_\w+)|`(test_\w+)`", page)
    assert len(names) >= 6
    for name in map("".join, names):
        assert f"def {name}(" in sources


def test_links_lead_to_files():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def run(tmp_path, arm, seed, accuracy=None):
    """The workdir of a run: finished where there is an accuracy, else only begun."""
    workdir = tmp_path / f"{arm}{seed}"
    workdir.mkdir()
    write_json(workdir / "config.json", {"name": "x", "arm": arm, "seed": seed})
    if accuracy is not None:
        summary = dict.fromkeys(results.COLUMNS, 0)
        summary |= {"name": "x", "arm": arm, "seed": seed, "test_accuracy": accuracy, "params": 9}
        summary["selected_on"] = "val"
        summary.pop("status")
        write_json(workdir / "summary.json", summary)
    return workdir


def test_table_of_runs(tmp_path, capsys):
    for seed, accuracy in enumerate((0.5, 0.6)):
        run(tmp_path, "a", seed, accuracy)
    run(tmp_path, "b", 0, 0.25)
    file = tmp_path / "out.csv"
    table_command.main([*map(str, sorted(tmp_path.iterdir())), "--csv", str(file)])
    lines = capsys.readouterr().out.splitlines()
    # Of two values the interval is t(0.975, 1) = 12.7062 standard errors, each of 5 points.
    assert lines[2:] == [
        "| `a` | 2 | 9 | 55.00 ± 7.07 % (-8.53 to 118.53) |",
        "| `b` | 1 | 9 | 25.00 % |",
    ]
    rows = read_csv(file)
    assert [(row["arm"], row["status"], row["test_accuracy"]) for row in rows] == [
        ("a", "finished", "0.5"),
        ("a", "finished", "0.6"),
        ("b", "finished", "0.25"),
    ]


def test_table_on_the_validation_split(tmp_path, capsys):
    for seed, accuracy in enumerate((0.5, 0.6)):
        folder = run(tmp_path, "a", seed, 0.25)
        summary = read_json(folder / "summary.json")
        summary |= {"val_accuracy": accuracy, "selected_on": "val"}
        write_json(folder / "summary.json", summary)
    command = [*map(str, sorted(tmp_path.iterdir())), "--on", "val"]
    table_command.main(command)
    header, _, line = capsys.readouterr().out.splitlines()
    assert "| validation accuracy, mean" in header
    assert line == "| `a` | 2 | 9 | 55.00 ± 7.07 % (-8.53 to 118.53) |"
    write_json(folder / "summary.json", summary | {"selected_on": "test"})
    with pytest.raises(SystemExit):
        table_command.main(command)
    assert "arm a seed 1 picked its best epoch on test: it has no" in capsys.readouterr().err


def test_table_of_another_measure(tmp_path, capsys):
    folder = run(tmp_path, "a", 0, 0.5)
    command = [str(folder), "--measure", "macro_f1"]
    summary = read_json(folder / "summary.json") | {"test_macro_f1": 0.125}
    write_json(folder / "summary.json", summary)
    table_command.main(command)
    header, _, line = capsys.readouterr().out.splitlines()
    assert "| test macro F1, mean" in header
    assert line == "| `a` | 1 | 9 | 12.50 % |"
    told = fails(capsys, table_command.main, *command, "--on", "val")
    assert "--on val has accuracies only: leave out --measure macro_f1" in told
    # A summary from before.
    del summary["test_macro_f1"], summary["test_balanced_accuracy"]
    write_json(folder / "summary.json", summary)
    table_command.main([str(folder)])
    assert "| `a` | 1 | 9 | 50.00 % |" in capsys.readouterr().out
    told = fails(capsys, table_command.main, *command)
    assert "arm a seed 0 has no test macro F1: it was trained before that was noted" in told


def test_comparison_is_paired_by_seed_and_corrected():
    rng = np.random.default_rng(0)
    accuracies = {arm: rng.uniform(0.4, 0.6, 6) for arm in ("plain", "a", "b")}
    accuracies["b"] = accuracies["plain"] + 0.1 + 0.01 * rng.normal(size=6)
    rows = [
        {"arm": arm, "seed": seed, "test_accuracy": value, "params": 9}
        for arm, values in accuracies.items()
        for seed, value in reversed(list(enumerate(values)))
    ]
    # The one run of an arm has a partner, but no test.
    rows.append(rows[0] | {"arm": "c", "test_accuracy": float(rows[0]["test_accuracy"]) - 0.25})
    cells = {
        line.split("|")[1].strip(): line
        for line in study_table.arm_table(rows, "plain").split("\n")
    }
    for arm, times in (("a", 1), ("b", 2)):
        test = ttest_rel(accuracies[arm], accuracies["plain"])
        low, high = test.confidence_interval(0.95)
        differences = accuracies[arm] - accuracies["plain"]
        effect = differences.mean() / differences.std(ddof=1)
        ps = [
            "< 0.001" if p < 0.001 else f"{p:.3f}"
            for p in (test.pvalue, min(1, times * test.pvalue))
        ]
        assert cells[f"`{arm}`"].endswith(
            f" | 6 | {100 * differences.mean():+.2f} ({100 * low:+.2f} to {100 * high:+.2f}) |"
            f" {ps[0]} | {ps[1]} | {effect:+.2f} |"
        )
    assert cells["`c`"].endswith(" | 1 | -25.00 (no interval) | no test | no test | none |")
    assert cells["`plain`"].endswith(") |  |  |  |  |  |")
    with refused("--reference is 'plane', .*did you mean 'plain'"):
        study_table.arm_table(rows, "plane")
    with refused("two runs are of arm a and seed 3"):
        study_table.arm_table([*rows, {"arm": "a", "seed": 3, "test_accuracy": 0.5, "params": 9}])
    placed = [row | {"workdir": f"runs/{i}"} for i, row in enumerate([rows[0], rows[0]])]
    with refused("two runs are of arm plain and seed 5: runs/0 and runs/1$"):
        study_table.arm_table(placed)


def test_runs_without_a_result_are_counted_and_named(tmp_path):
    for seed, accuracy in enumerate((0.5, 0.625, None, None)):
        run(tmp_path, "a", seed, accuracy)
    workdir.mark_diverged(tmp_path / "a2", step=17)
    run(tmp_path, "b", 0)
    rows = results.read_runs(sorted(tmp_path.iterdir()))
    found = [row["status"] for row in rows]
    assert found == ["finished"] * 2 + ["diverged at step 17"] + ["unfinished"] * 2
    assert all(tuple(row) == (*results.COLUMNS, "workdir") for row in rows)
    lines = study_table.arm_table(rows, "a").splitlines()
    assert lines[2].startswith("| `a` | 2 of 4; 1 diverged, 1 unfinished | 9 | 56.25 ± 8.84 % (")
    assert lines[3] == "| `b` | 0 of 1; 1 unfinished |  |  | 0 | none | no test | no test | none |"
    assert lines[5].endswith(
        "Without a result: `a` seed 2 (diverged at step 17), `a` seed 3 (unfinished),"
        " `b` seed 0 (unfinished)."
    )
    # As CSV keeps them, where what is None is "".
    write_csv(file := tmp_path / "rows.csv", results.COLUMNS, rows)
    assert study_table.arm_table(read_csv(file), "a").splitlines() == lines
    assert results.read_runs([file]) == [row | {"workdir": str(file)} for row in rows]


def test_committed_results_are_read_as_runs_are(capsys):
    """So that anyone can compare them with another arm, or pieces of a study be put together."""
    file = ROOT / "results" / "small_resnet_cifar10.csv"
    table_command.main([str(file), "--reference", "control_params"])
    expected = study_table.arm_table(results.read_runs([file]), "control_params")
    assert capsys.readouterr().out == f"{expected}\n"
    rows = sorted(read_csv(file), key=lambda row: (row["arm"], int(row["seed"])))
    assert expected == study_table.arm_table(rows, "control_params")


def test_what_is_no_run_is_told(tmp_path):
    with refused("not found: .* is no run's workdir"):
        results.read_runs([tmp_path])
    (tmp_path / "config.json").write_text("{}")
    with refused("is no run's config: it has no name"):
        results.read_runs([tmp_path])
    (tmp_path / "summary.json").write_text('{"name": "x"}')
    with refused("summary.json is no run's summary: it has no arm, seed, test_accuracy"):
        results.read_runs([tmp_path])
    file, header = tmp_path / "rows.csv", ",".join(results.COLUMNS)
    for content, message in (
        (b"\xff\xfe", "rows.csv is no table of runs: 'utf-8' codec can't decode"),
        (b"a,b\n1,2\n", "rows.csv is no table of runs: it has no column name, arm, seed, test_acc"),
        (f"{header}\nx,aim,first\n".encode(), "rows.csv is damaged: invalid literal for int"),
    ):
        file.write_bytes(content)
        with refused(message):
            results.read_runs([file])


def test_constraints_pin_versions_only():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert "jax==0.10.1" in pins
