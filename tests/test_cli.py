"""The command lines: flags, one clear line for a mistake, and exit statuses."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from aim_flax import console
from aim_flax.cli import evaluate as evaluate_command
from aim_flax.cli import train as train_command
from tests.asserts import fails
from tests.runs import DIGITS, ROOT, SMALL, flags

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")

FLAGS = flags(*SMALL)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--config", f"{DIGITS}:control", "--config.train.epoch=5"],
            "did you mean 'train.epochs'",
        ),
        (["--config", f"{DIGITS}:contol"], "has no arm 'contol' (did you mean 'control'?)"),
        (["--config", "configs/nothing.py"], "config file 'configs/nothing.py' not found"),
        (["--config", DIGITS, "stray"], "unknown argument 'stray'"),
        (["--config", DIGITS, "--confg.seed=1"], "unknown argument '--confg.seed=1'"),
        (["--config", DIGITS, "--config.seed=x"], "seed=x: expected a whole number"),
        (["--config", DIGITS, "--config.memory.shape=(0,)"], "each at least 1, not (0,)"),
        (["--config", DIGITS, "--config.memory.read=layer2/dens"], "did you mean 'layer2/dense'?"),
        ([], "the following arguments are required: --config"),
    ],
)
def test_wrong_use_of_train_is_one_line_and_touches_nothing(
    capsys, tmp_path, monkeypatch, argv, message
):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, train_command.main, *argv)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workdir", "w", "--split", "tset"], "invalid choice: 'tset'"),
        (["--workdir", "w", "--device", "1"], "unknown argument '--device'"),
        (["--workdir", "nowhere"], "nowhere/config.json not found: nowhere is no run's workdir"),
    ],
)
def test_wrong_use_of_eval_is_one_line(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, evaluate_command.main, *argv)


def test_damaged_config_of_a_run_is_told(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    line = fails(capsys, train_command.main, "--config", DIGITS, *FLAGS, "--workdir", str(tmp_path))
    assert "config.json is damaged: " in line


@pytest.mark.slow
def test_train_and_eval_on_the_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [*FLAGS, "--config.train.epochs", "2", "--config.seed=3", "--devices", "1"]
    train_command.main(["--config", DIGITS, *small])
    output = capsys.readouterr().out
    assert "step 38/38: train_loss" in output
    assert "digits_mlp:aim seed 3: test accuracy" in output
    workdir = Path("runs/digits_mlp-aim-3")
    assert (workdir / "summary.json").is_file()
    train_command.main(["--config", DIGITS, *small])
    assert capsys.readouterr().out == f"{workdir} holds this run, finished\n"
    evaluate_command.main(["--workdir", str(workdir), "--split", "val", "--checkpoint", "38"])
    assert "val split, 180 images" in capsys.readouterr().out
    assert (workdir / "eval_val.json").is_file()
    line = fails(capsys, evaluate_command.main, "--workdir", str(workdir), "--checkpoint", "39")
    assert "no checkpoint of step 39" in line


def test_workdir_that_cannot_be_written_is_told(capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    line = fails(
        capsys, train_command.main, "--config", DIGITS, *FLAGS, "--workdir", str(file / "run")
    )
    assert "is not writable: Not a directory" in line


@pytest.mark.slow
def test_scripts_run_from_anywhere(tmp_path):
    for script, flag in (("train.py", "--config"), ("eval.py", "--workdir")):
        run = subprocess.run(
            [sys.executable, ROOT / script, flag, "nowhere"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 2
        assert len(run.stderr.splitlines()) == 1
        assert run.stderr.startswith(f"{script}: ")


def test_lack_of_device_memory_is_told_in_one_line(capsys):
    """As XLA reports it, on CPU too."""
    with pytest.raises(SystemExit) as end, console.reporting_errors():
        jax.jit(lambda: jax.numpy.zeros(2**45, np.float32))()
    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "RESOURCE_EXHAUSTED: Out of memory" in line
    assert "--seeds-per-program 1" in line
