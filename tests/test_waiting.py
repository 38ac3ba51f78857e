"""Time spent waiting for data is counted, in the summary and in TensorBoard."""

import json
import time

import pytest

from aim_flax.data import in_memory
from aim_flax.train import loop
from tests.runs import digits, scalars

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")

SECONDS = 0.25


def test_a_run_whose_data_is_slow_shows_it(tmp_path, monkeypatch):
    """The first of three epochs compiles and is not counted."""
    at = in_memory.Feed.at

    def slow(feed, step):
        time.sleep(SECONDS)
        return at(feed, step)

    monkeypatch.setattr(in_memory.Feed, "at", slow)
    config = digits("control", "train.epochs=3")
    loop.run(config, tmp_path / "run", 1, quiet=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    share = summary["data_wait_share"]
    timed = 2 * 19 * config.train.batch_size / summary["examples_per_second"]
    assert 2 * SECONDS * 0.999 <= share * timed < timed
    events = scalars(tmp_path / "run", "data_wait_share")
    assert list(events) == [38, 57]
    assert events[57] == pytest.approx(share, abs=1e-4)
    assert SECONDS / timed <= events[38] < 1
