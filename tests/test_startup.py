"""What commands import before they do something: imports are most of their start."""

import json
import subprocess
import sys

import pytest

from tests.runs import DIGITS, ROOT

# Prints what has been imported once a command has ended.
_SCRIPT = """
import contextlib, importlib, io, json, sys
name, *argv = sys.argv[1:]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    importlib.import_module(f"aim_flax.cli.{name}").main(argv)
print(json.dumps(sorted(sys.modules)))
"""
# Each takes a tenth of a second or more; these are what draws, writes checkpoints and tests.
_OF_TRAINING = {"matplotlib", "orbax", "scipy.stats", "sklearn", "tensorboardX", "pandas"}
_OF_IMAGES = {"cv2", "grain", "imagehash", "tensorflow_datasets"}


def imported(*argv: str) -> set[str]:
    child = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *argv], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(child.stdout))


@pytest.mark.parametrize("name", ["train", "evaluate", "ablate", "predict", "main"])
def test_help_imports_no_jax(name):
    there = imported(name, "--help")
    assert "aim_flax.console" in there
    assert not there & {"jax", "numpy", "flax", "ml_collections", "rich", *_OF_TRAINING}


def test_describing_imports_nothing_that_trains():
    there = imported("train", "--config", DIGITS, "--describe")
    assert {"jax", "flax", "optax"} <= there
    assert not there & (_OF_TRAINING | _OF_IMAGES)


def test_training_on_digits_imports_nothing_for_statistics_or_photographs():
    there = imported(
        *("train", "--config", DIGITS, "--workdir", "/dev/null/none", "--config.train.epochs=1")
    )
    assert {"orbax", "aim_flax.train.loop"} <= there
    assert not there & {"scipy.stats", "sklearn", "pandas", "matplotlib", *_OF_IMAGES}
