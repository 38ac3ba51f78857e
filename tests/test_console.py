"""What a run says while it goes: lines at times, the time left, and a bar on a terminal."""

import errno
import os
import re
import subprocess
import sys
import time

import pytest

from aim_flax.cli import evaluate as evaluate_command
from aim_flax.console import Part, Reporter, reporting_errors
from aim_flax.evaluate.interventions import KINDS
from tests.runs import ROOT


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, which stands still until a test sets `clock[0]`."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def lines(reporter, clock, capsys, steps):
    """Returns what is printed at each of {step: seconds since the first}."""
    printed, begun = {}, clock[0]
    with reporter:
        for step, seconds in steps.items():
            clock[0] = begun + seconds
            reporter.advance(step, {"loss": 0.5, "accuracy": 1 / 3})
            printed[step] = capsys.readouterr().out
    return printed


def line(step, left=""):
    return f"step {step}/100: loss 0.5000 accuracy 0.3333{left}\n"


def test_lines_say_steps_and_time_left(clock, capsys):
    """The first call, which compiles, tells nothing of the time that the others take."""
    steps = {10: 0.0, 20: 2.0, 60: 40.0, 100: 50.0}
    assert lines(Reporter(100, 0), clock, capsys, steps) == {
        10: line(10),
        20: line(20, ", 16 s left"),  # 10 steps in 2 s, 80 to go
        60: line(60, ", 32 s left"),  # 50 in 40 s, 40 to go
        100: line(100, ", 0 s left"),
    }


def test_a_run_that_goes_on_counts_its_own_steps(clock, capsys):
    printed = lines(Reporter(100, 50), clock, capsys, {60: 0.0, 70: 5.0})
    assert printed == {60: line(60), 70: line(70, ", 15 s left")}


def test_lines_are_apart_but_the_last_step_is_always_shown(clock, capsys):
    steps = {1: 0.0, 2: 2.9, 3: 3.0, 4: 5.9, 5: 6.5, 99: 6.6, 100: 6.7}
    printed = lines(Reporter(100, 0, seconds=3.0), clock, capsys, steps)
    assert [step for step, text in printed.items() if text] == [1, 3, 5, 100]


def test_quiet_prints_only_what_is_said(clock, capsys):
    reporter = Reporter(100, 0, quiet=True)
    assert set(lines(reporter, clock, capsys, {1: 0.0, 50: 60.0, 100: 90.0}).values()) == {""}
    reporter.say("done")
    assert capsys.readouterr().out == "done\n"


def test_labels_come_first(clock, capsys):
    Reporter(100, 0).advance(7, {"loss": 2.0}, "control seed 3")
    assert capsys.readouterr().out == "step 7/100: control seed 3 loss 2.0000\n"


def test_time_left_follows_from_what_this_process_did(clock, capsys):
    """Neither steps of an earlier process nor work that is left out make it look quicker."""
    with Reporter(100, 0, seconds=0) as reporter:
        starts = [("a", 0, 2), ("b", 40, 1), ("c", 70, 1), ("d", 90, 1)]
        parts = {label: Part(reporter, label, start, runs, []) for label, start, runs in starts}
        for now, label, step, trained in (
            (50, "a", 10, True),
            (60, "a", 20, True),
            (60, "b", 20, False),
            (65, "b", 30, True),
            (65, "c", 20, False),
            (65, "d", 10, False),
        ):
            clock[0] = now
            if not trained:
                parts[label].begin(step)
            parts[label].advance(step, {})
    assert capsys.readouterr().out.splitlines() == [
        "step 20/100: a",
        "step 40/100: a, 30 s left",
        "step 60/100: b, 20 s left",
        "step 70/100: b, 15 s left",
        "step 90/100: c, 5 s left",
        "step 100/100: d, 0 s left",
    ]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_has_a_bar_and_what_is_said_above_it(monkeypatch, capsys, quiet):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with Reporter(100, 0, quiet) as reporter:
        reporter.advance(40, {"loss": 0.25})
        reporter.say("saved [at] step 40")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
    _, said, bar = text.rpartition("saved [at] step 40\n")
    assert said
    assert ("step 40/100" in bar) == ("loss 0.2500" in bar) == (not quiet)
    assert "step 40/100: " not in text  # no plain line beside it


def ends(capsys, error: Exception) -> tuple[int, str]:
    """Returns the exit status of a command that raises an error, and the line after its name."""
    with pytest.raises(SystemExit) as end, reporting_errors():
        raise error
    (line,) = capsys.readouterr().err.splitlines()
    return end.value.code, line.partition(": ")[2]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_what_the_machine_refuses_is_one_line(capsys, number):
    reason = os.strerror(number)
    assert ends(capsys, OSError(number, reason, "a\nb")) == (1, rf"a\nb: {reason}")


def test_other_errors_of_the_system_keep_their_traceback():
    with pytest.raises(FileNotFoundError), reporting_errors():
        raise FileNotFoundError(errno.ENOENT, "of a bug", "file")


def test_a_platform_that_is_not_there_is_one_line(capsys):
    error = RuntimeError("Unable to initialize backend 'tup': it is no backend\nmore")
    assert ends(capsys, error) == (2, "Unable to initialize backend 'tup': it is no backend")


def test_who_reads_the_output_may_leave():
    """As head does; Python itself would complain at the end."""
    code = (
        "from aim_flax.console import reporting_errors\n"
        "with reporting_errors():\n    while True: print('line')"
    )
    command = [sys.executable, "-c", code]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "line\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_eval_names_the_interventions_without_importing_them():
    assert evaluate_command._KINDS == KINDS
