"""A command that runs as a child of itself: what is passed on, and how both end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aim_flax import watch
from tests.processes import children, lines_until
from tests.runs import ROOT

FATAL = "F1122 00:57:11.079043   10488 client.h:80] Terminating process because the JAX distributed"
FATAL += " service detected fatal errors. absl::Status: "
UNHEALTHY = FATAL + (
    "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n{}\n"
    "The tasks have crashed. Check the task logs for an earlier error\n"
)
TIMEOUT = FATAL + "UNAVAILABLE: Task {} heartbeat timeout. This indicates that the remote task has"
REGISTER = "DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination/RegisterTask\n"
SENT = "UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was\n"
JOINED = "tell(index=1, count=3, hosts=['a', 'b', 'c'], workdir='run', silence=15)\n"
AGAIN = "; the same command, started again as all processes, "


def start(code: str, folder: Path) -> subprocess.Popen:
    """Starts a watched program, of which only the child goes on to the code."""
    code = f"""
import os, signal, sys, time
from aim_flax import console, watch
console.end_on_signals()
watch.watched(None)
tell = watch.channel().tell
say = lambda text: print(text, end="", file=sys.stderr, flush=True)
{code}"""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(code: str, folder: Path) -> tuple[int, str]:
    """Returns the exit status of a watched program, and what it says on standard error."""
    process = start(code, folder)
    error = process.communicate(timeout=60)[1]
    return process.returncode, error


@pytest.mark.parametrize(
    ("code", "status", "error"),
    [
        ("say('words\\n'); sys.exit(3)", 3, "words\n"),
        # Its own error came first, and JAX's abort while it waited for the others.
        (f"{JOINED}tell(status=2); say({FATAL!r}); os.abort()", 2, FATAL),
        # No other process has to do with these.
        ("os.abort()", 134, "-c: a process that waited for the others was ended by SIGABRT\n"),
        (
            f"{JOINED}say({FATAL!r} + '\\n'); os.kill(os.getpid(), signal.SIGSEGV)",
            139,
            f"{FATAL}\n-c: process 1 of 3 (on b) was ended by SIGSEGV"
            f"{AGAIN}begins again, as nothing is saved\n",
        ),
        (
            f"{JOINED}os.kill(os.getpid(), signal.SIGKILL)",
            137,
            "-c: process 1 of 3 (on b) was ended by SIGKILL, as the system does when memory is"
            f" short{AGAIN}begins again, as nothing is saved\n",
        ),
    ],
)
def test_the_end_of_a_child_is_passed_on(tmp_path, code, status, error):
    assert ended(code, tmp_path) == (status, error)


def test_a_lost_process_is_one_line_and_a_status(tmp_path):
    """What JAX said stays in a file."""
    (tmp_path / "run" / "checkpoints" / "30").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "40.orbax-checkpoint-tmp").mkdir()
    text = UNHEALTHY.format(2)
    code = f"{JOINED}tell(error='Gloo failed\\n'); say('before\\n' + {text!r}); os.abort()"
    line = "-c: process 2 of 3 (on c) died, or gave no sign of life for 15 s"
    line += f"{AGAIN}goes on at step 30 (lost_1.log has JAX's words)\n"
    assert ended(code, tmp_path) == (watch.LOST, "before\n" + line)
    assert watch.LOST == os.EX_TEMPFAIL
    (log,) = (tmp_path / "run").glob("*.log")
    assert log.read_text().endswith(f"\nGloo failed\n{text}\n")


@pytest.mark.parametrize(
    ("text", "index", "line"),
    [
        (UNHEALTHY.format("1\n2"), 0, "process 1 of 3 (on b), process 2 of 3 (on c) died"),
        (TIMEOUT.format(2), 1, "process 2 of 3 (on c) died, or gave no sign of life for 15 s; "),
        (TIMEOUT.format(1), 1, "process 1 of 3 (on b), this one, gave no sign of life for 15 s, "),
        (FATAL + SENT, 1, "process 0 of 3 (on a) died, or gave no sign of life for 15 s, or ended"),
        (FATAL + REGISTER, None, "not all processes came up within 20 s; start all of them"),
    ],
)
def test_the_line_names_who_is_lost(text, index, line):
    told = watch.Told("run", wait=20, silence=15, index=index, count=3, hosts=["a", "b", "c"])
    assert watch.lost(text, told).startswith(line)


def test_a_first_signal_is_for_the_child_and_a_second_ends_both(tmp_path):
    code = f"""{JOINED}
received = []
for signum in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(signum, lambda signum, frame: print(signal.Signals(signum).name, flush=True))
print("ready", flush=True)
while True:
    time.sleep(60)
"""
    process = start(code, tmp_path)
    lines_until(process, "ready")
    (child,) = children(process)
    for signum in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(signum)
        assert lines_until(process, "SIG") == [f"{signum.name}\n"]
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60) == ("", "-c: stopped by SIGTERM\n")
    assert process.returncode == 128 + signal.SIGTERM
    assert_gone(child)


def test_what_a_child_has_told_holds_for_a_signal_that_comes_at_once(tmp_path):
    """Three times, as it was a race."""
    code = """
signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(3))
tell(index=0, count=1)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""
    assert [ended(code, tmp_path) for _ in range(3)] == 3 * [(3, "")]


def test_before_there_is_anything_to_save_the_first_signal_ends_both(tmp_path):
    """Also where the child is in C++ and hears nothing, as while it waits for the others."""
    code = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('ready', flush=True)\n"
    process = start(code + "time.sleep(60)", tmp_path)
    lines_until(process, "ready")
    (child,) = children(process)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "-c: stopped by SIGINT\n")
    assert process.returncode == 128 + signal.SIGINT
    assert_gone(child)


def test_a_child_ends_with_its_parent(tmp_path):
    process = start("print('ready', flush=True)\ntime.sleep(60)", tmp_path)
    lines_until(process, "ready")
    (child,) = children(process)
    process.kill()
    process.communicate(timeout=60)
    assert_gone(child)


def test_a_main_that_is_called_from_elsewhere_is_not_started_again():
    watch.watched(["--config", "digits.py", "--distributed"])
    assert watch.channel() is None


def assert_gone(pid: int) -> None:
    """A process ends within seconds; one whose parent is gone may stay as a zombie."""
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} goes on")
