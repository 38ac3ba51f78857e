"""Sides that are measured against each other, in benchmarks/against: with fakes in plain Python."""

import sys
from pathlib import Path

import numpy as np
import pytest

from aim_flax.errors import UsageError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FAKE = """
import os
import time

print("libraries may say what they like")


class Fake:
    def __init__(self, name, log, numbers=(1.0, 2.0), fails=False):
        self.name, self.log, self.numbers, self.fails = name, log, numbers, fails

    def counts(self):
        return [3, 4]

    def outputs(self):
        return {"logits": list(self.numbers)}

    def step(self):
        if self.fails:
            raise ValueError("no luck")
        # Alone while it works: the file can be made once.
        busy = os.open(self.log + ".busy", os.O_CREAT | os.O_EXCL)
        with open(self.log, "a") as log:
            log.write(self.name)
        time.sleep(0.01)
        os.close(busy)
        os.unlink(self.log + ".busy")

    def facts(self):
        return {"versions": "fake"}
"""


@pytest.fixture
def turns(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from against import turns

    return turns


@pytest.fixture
def fake(tmp_path, turns):
    """Returns a function that starts a fake side."""
    (tmp_path / "fake_side.py").write_text(FAKE)

    def start(name, **options):
        options = {"name": name, "log": str(tmp_path / "log"), **options}
        path = {"PYTHONPATH": str(tmp_path)}
        return turns.Worker(name, sys.executable, "fake_side", "Fake", options, path)

    return start


def test_sides_take_turns_and_never_work_at_once(fake, turns, tmp_path):
    with fake("a") as a, fake("b") as b, fake("c") as c:
        assert a.ask("counts") == [3, 4]
        assert b.ask("outputs") == {"logits": [1.0, 2.0]}
        sides = {w.name: lambda w=w: w.take_turn(steps=2, untimed=1) for w in (a, b, c)}
        measured = turns.take_turns(sides, rounds=3)
        facts = a.ask("facts")
    assert (tmp_path / "log").read_text() == "aaabbbccc" + "cccbbbaaa" + "aaabbbccc"
    assert {name: len(seconds) for name, seconds in measured.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(0.01 <= s < 1 for seconds in measured.values() for s in seconds)
    assert facts["versions"] == "fake"
    assert 0 <= facts["peak_mib"] < 100


def test_a_turn_is_the_mean_of_its_timed_steps_alone(fake, monkeypatch):
    with fake("a") as worker:
        monkeypatch.setattr(worker, "ask", lambda order: {"step 3": [50.0, 1.0, 2.0]}[order])
        assert worker.take_turn(steps=2, untimed=1) == 1.5


def test_ratios_are_those_of_each_round(turns):
    # A machine that is half as fast in the second round: both sides meet it.
    assert turns.ratios([3.0, 6.0, 4.0], [1.0, 2.0, 1.0]) == (3.0, 3.0, 4.0)
    assert turns.spread([5.0, 1.0, 2.0, 3.0]) == (2.5, 1.0, 5.0)
    with pytest.raises(ValueError, match="longer"):
        turns.ratios([1.0], [1.0, 2.0])


def test_a_side_that_computes_something_else_is_refused(fake, turns):
    most = {"logits": 1e-4}
    with fake("a") as a, fake("b", numbers=(1.0, 2.0001)) as near, fake("c") as other:
        expected = a.ask("outputs")
        turns.check_equal("b", near.ask("outputs"), "a", expected, most)
        assert other.ask("outputs") == expected
    for numbers in ((1.0, 2.0003), (1.0, -2.0), (1.0, float("nan"))):
        with pytest.raises(turns.SideError, match="b computes something else than a: logits"):
            turns.check_equal("b", {"logits": numbers}, "a", expected, most)
    with pytest.raises(turns.SideError, match="b has 1 logits, and a 2"):
        turns.check_equal("b", {"logits": [1.0]}, "a", expected, most)


def test_a_side_that_fails_is_told_with_its_own_words(fake, turns):
    with fake("a", fails=True) as worker:
        worker.ask("counts")
        with pytest.raises(turns.SideError, match=r"(?s)a ended with status 1 .* no luck"):
            worker.take_turn(steps=1, untimed=0)


def test_weights_and_images_are_the_same_everywhere(turns):
    from against import inputs

    images, labels = inputs.batch(pixels=4, batch_size=3, classes=5)
    assert images.shape == (3, 4, 4, 3)
    assert images.dtype == np.float32
    assert -1 <= images.min() < -0.9
    assert 0.9 < images.max() <= 1
    assert labels.shape == (3,)
    kernel = inputs.drawn("params/a/kernel", (3, 3, 8, 16))
    np.testing.assert_array_equal(kernel, inputs.drawn("params/a/kernel", (3, 3, 8, 16)))
    assert not np.array_equal(kernel, inputs.drawn("params/b/kernel", (3, 3, 8, 16)))
    np.testing.assert_allclose(kernel.std(), (2 / 72) ** 0.5, rtol=0.1)
    assert inputs.drawn("batch_stats/a/var", (64,)).min() >= 1


def test_digits_of_keras_are_ours(turns):
    from against.digits_keras import load

    from aim_flax.data.digits import load_digits

    ours, theirs = load_digits(), load()
    for name in ("train", "val", "test"):
        images, labels = theirs[name]
        np.testing.assert_array_equal(labels, ours.labels(name))
        np.testing.assert_array_equal(images * 16, ours.splits[name].images)


@pytest.fixture
def sides(turns):
    import sides

    return sides


def test_what_a_side_is_compared_with_is_measured_too(sides):
    every = [*sides.resnets(), *sides.efficientnets(), *sides.digits()]
    keys = [side.key for side in every]
    assert len(set(keys)) == len(keys)
    assert {side.against for side in every} - {""} <= set(keys)
    assert sides.chosen("", every) == every

    def found(names):
        return [side.key for side in sides.chosen(names, every)]

    assert found("keras_published") == ["control_stride1", "published", "keras_published"]
    modes = ["eager", "channels_last", "compiled"]
    torch = [f"torch_control_stride1 {mode}" for mode in modes]
    assert found("torch_control_stride1") == ["control_stride1", *torch]
    assert found("digits first") == ["digits again", "digits first"]
    with pytest.raises(UsageError, match=r"'publishd', expected .* \(did you mean 'published'\?\)"):
        sides.chosen("control,publishd", every)


def test_a_row_has_the_arithmetic_of_a_step_against_what_the_machine_can_do(sides):
    side = sides.Side("work", "a", "module", "Kind", {}, mode="fast", against="b")
    facts = {"forward_operations": 10**10, "bytes_moved": 6 * 10**9, "versions": "x 1"}
    measured = {"a fast": [3.0, 2.0, 4.0], "b": [1.0, 1.0, 2.0]}
    rates = {sides.PRODUCTS: 4e10, sides.COPIES: 8e9}
    row = sides.row(side, measured, facts | {"peak_mib": 7.4}, 12, rates)
    del row["machine"]
    assert row == {
        "work": "work",
        "side": "a",
        "mode": "fast",
        "seconds": "3.0000",
        "seconds_low": "2.0000",
        "seconds_high": "4.0000",
        "ratio": "2.000",
        "ratio_low": "2.000",
        "ratio_high": "3.000",
        "against": "b",
        "parameters": 12,
        # Backward it is twice as much, and a multiply-add is two operations.
        "gflop": "60.0",
        "gflop_per_second": "20.0",
        "share_of_products": "0.500",
        "gb_moved": "6.00",
        "share_of_copies": "0.250",
        "peak_mib": "7",
        "versions": "x 1",
    }
    assert "| a fast | b | 3.0000 (2.0000 to 4.0000) | 2.000 (2.000 to 3.000) |" in sides.report(
        [row]
    )
