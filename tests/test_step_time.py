"""benchmarks/step_time.py: what it measures is the step that the config says."""

import argparse

import pytest

from tests.asserts import fails
from tests.runs import DIGITS, ROOT, digits

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")


@pytest.fixture
def step_time(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import step_time

    return step_time


@pytest.mark.slow
def test_the_options_of_training_are_those_of_the_step(step_time):
    of_both = ("train.batch_size=4", "train.ema_decay=0.9")
    plain, recomputed = (
        step_time.Variant("aim", digits("aim", *changes, *of_both))
        for changes in ((), ("train.remat=layer1",))
    )
    # Those of the layer once more.
    operations = [variant.step.cost_analysis()["flops"] for variant in (plain, recomputed)]
    assert operations[1] > operations[0]
    assert hasattr(plain.state, "average")


def test_variants_have_names(step_time):
    vary = ["train.remat=,layer1", "train.ema_decay=0.9,0.99"]
    args = argparse.Namespace(config=DIGITS, arms="aim", set=[], vary=vary)
    of_average = [f"ema_decay={decay}" for decay in (0.9, 0.99)]
    assert list(step_time.variants(args)) == [
        f"aim remat={pattern} {decay}" for pattern in ("", "layer1") for decay in of_average
    ]


@pytest.mark.parametrize(
    ("config", "assignment", "expected"),
    [
        ("small_resnet", "train.batch_size=4", "--set model.num_classes=N says how many"),
        ("digits_mlp", "train.remat=layer9", "train.remat 'layer9' matches no module"),
    ],
)
def test_what_it_cannot_measure_is_told(step_time, capsys, config, assignment, expected):
    flags = ["--config", str(ROOT / "configs" / f"{config}.py"), "--arms", "aim"]
    assert expected in fails(capsys, step_time.main, *flags, "--set", assignment)
