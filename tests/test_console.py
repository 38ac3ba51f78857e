"""Progress: the steps of a longer work's parts, and the time left."""

from types import SimpleNamespace

from aim_flax import console
from aim_flax.console import Part, Reporter


def test_time_left_follows_from_what_this_process_did(monkeypatch, capsys):
    """Neither steps of an earlier try nor work that is left out make it look quicker."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with Reporter(100, 0, seconds=0) as reporter:
        parts = [Part(reporter, name, start, runs, []) for name, start, runs in PARTS]
        for now, part, step, trained in CALLS:
            clock.now = now
            if not trained:
                parts[part].begin(step)
            parts[part].advance(step, {})
    assert capsys.readouterr().out.splitlines() == [
        "step 20/100: a",
        "step 40/100: a, 30 s left",
        "step 60/100: b, 20 s left",
        "step 70/100: b, 15 s left",
        "step 90/100: c, 5 s left",
        "step 100/100: d, 0 s left",
    ]


PARTS = [("a", 0, 2), ("b", 40, 1), ("c", 70, 1), ("d", 90, 1)]
# Seconds, part, its step, and whether it was trained to get there.
CALLS = [
    (50, 0, 10, True),
    (60, 0, 20, True),
    (60, 1, 20, False),
    (65, 1, 30, True),
    (65, 2, 20, False),
    (65, 3, 10, False),
]
