"""study.json: the command lines of a study, what is added to one, and files from before."""

import json

import pytest

from aim_flax.cli import ablate as ablate_command
from aim_flax.study.plan import NOT_RECORDED, plan
from aim_flax.study.record import add, read_study
from aim_flax.train import loop
from tests.asserts import refused
from tests.runs import DIGITS, SMALL, read_json

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")


def asked(*arms, seeds="2", overrides=(), **options):
    return plan(DIGITS, arms, seeds, overrides=[*SMALL, *overrides], **options)


def block(workdir) -> list[str]:
    """Returns the lines of the report's first block of code."""
    return (workdir / "report.md").read_text().split("```bash\n")[1].split("\n```")[0].split("\n")


def test_report_shows_each_command_line_once_as_given(tmp_path, monkeypatch):
    """Whatever they train: here nothing."""
    monkeypatch.setattr(loop, "train", lambda *args: {})
    monkeypatch.chdir(tmp_path)
    first = ["--config", DIGITS, "--arms", "aim,control", "--seeds", "2"]
    second = ["--config", DIGITS, "--arm", "x:memory.shape=(4, )", "--derive-from", "aim"]
    rest = ["--workdir", "s", "--seeds-per-program", "1", "--devices", "1"]
    for flags in (first, second, first):
        ablate_command.main([*flags, *rest])
    ending = " ".join(rest)
    expected = [
        f"python ablate.py --config {DIGITS} --arms aim,control --seeds 2 {ending}",
        f"python ablate.py --config {DIGITS} --arm 'x:memory.shape=(4, )' --derive-from aim"
        f" {ending}",
    ]
    assert read_json(tmp_path / "s" / "study.json")["commands"] == expected
    assert block(tmp_path / "s") == expected
    ablate_command.main(["--report-only", "--workdir", "s"])
    assert block(tmp_path / "s") == expected
    ablate_command.main(["--report-only", "--workdir", "s", "--reference", "aim"])
    again = "python ablate.py --report-only --workdir s --reference aim"
    assert block(tmp_path / "s") == [*expected, again]


def test_the_command_has_the_workdir_also_where_it_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train", lambda *args: {})
    monkeypatch.chdir(tmp_path)
    given = ["--config", DIGITS, "--arms", "aim,control", "--seeds", "2"]
    ablate_command.main([*given, "--seeds-per-program", "1", "--devices", "1"])
    (command,) = block(tmp_path / "runs/ablation-digits_mlp")
    assert command.startswith(f"python ablate.py --config {DIGITS} --arms aim,control ")
    assert command.endswith(" --devices 1 --workdir runs/ablation-digits_mlp")


def test_what_is_written_is_what_is_read(tmp_path):
    study = add(tmp_path, asked("aim", "memory_zero", custom=["x:memory.shape=(4,)"]))
    text = (tmp_path / "study.json").read_text()
    found = read_study(tmp_path)
    assert found.arms.keys() == study.arms.keys() == {"aim", "memory_zero", "x"}
    assert (found.reference, found.commands) == (None, [NOT_RECORDED])
    add(tmp_path, asked("aim"))
    assert (tmp_path / "study.json").read_text() == text


def test_a_study_from_before_commands_were_recorded_goes_on(tmp_path):
    """Its arms keep what the file says of them."""
    add(tmp_path, asked("control", custom=["x:memory.shape=(4,)"]))
    saved = read_json(tmp_path / "study.json")
    del saved["commands"]
    for arm in saved["arms"].values():
        del arm["source"]
        arm |= {"custom": {}, "derive_from": None}
    saved["arms"]["x"]["custom"] = {"x": "x:memory.shape=(4,)"}
    (tmp_path / "study.json").write_text(json.dumps(saved))
    ablate_command.main(["--report-only", "--workdir", str(tmp_path)])
    assert block(tmp_path) == [NOT_RECORDED]
    study = add(tmp_path, asked("control", "aim", seeds="3", command="python ablate.py"))
    assert study.commands == [NOT_RECORDED, "python ablate.py"]
    now = read_json(tmp_path / "study.json")["arms"]
    assert now["x"] == saved["arms"]["x"]
    assert now["control"] == saved["arms"]["control"] | {"seeds": [0, 1, 2]}
    assert now["aim"]["seeds"] == [0, 1, 2]


def test_reference_is_kept_until_another_is_named(tmp_path):
    assert add(tmp_path, asked("aim")).reference is None
    assert add(tmp_path, asked("control")).reference == "control"
    assert add(tmp_path, asked("aim", reference="aim")).reference == "aim"
    assert add(tmp_path, asked("control")).reference == "aim"
    with refused("the reference arm is 'aim_state', expected one of aim,"):
        add(tmp_path, asked("aim", reference="aim_state"))
    assert read_study(tmp_path).reference == "aim"
