"""Ctrl-C and SIGTERM end every command with one line, wherever nothing is to be saved."""

import os
import signal
import subprocess
import sys
import time

import pytest

from aim_flax import cli, console
from tests.photos import FOLDER_CONFIG, small, write_folder
from tests.runs import DIGITS, ROOT, SMALL, flags

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ended(code: str) -> tuple[int, str]:
    """Returns the exit status of a program, and what it says on standard error."""
    # Tests that nohup started would pass on that SIGHUP is ignored.
    start = "import os, signal, time\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)"
    code = f"{start}\nfrom aim_flax import console\n{code}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return run.returncode, run.stderr


@pytest.mark.parametrize(("stopped", "told"), [("", ""), ("all is kept", "; all is kept")])
@pytest.mark.parametrize("signum", SIGNALS)
def test_a_signal_ends_a_command_with_one_line(signum, stopped, told):
    """Also where a library would make another error of an exception, or swallow it."""
    code = f"""
@console.as_command({stopped!r})
def main(argv):
    try:
        os.kill(os.getpid(), {int(signum)})
        time.sleep(60)
    except BaseException:
        time.sleep(60)
main()
"""
    assert ended(code) == (128 + signum, f"-c: stopped by {signum.name}{told}\n")


def test_a_signal_ends_a_command_without_standard_output():
    """As it is where a shell has closed it."""
    code = """
import sys
sys.stdout = None
console.end_on_signals()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""
    assert ended(code) == (143, "-c: stopped by SIGTERM\n")


def test_threads_that_wait_do_not_hold_up_a_failed_command():
    """Orbax's do, for what the disk refused."""
    code = """
import threading
from aim_flax.errors import StorageError
@console.as_command()
def main(argv):
    threading.Thread(target=time.sleep, args=(60,)).start()
    print("so far")
    raise StorageError("disk full")
main()
"""
    began = time.monotonic()
    assert ended(code) == (1, "-c: disk full\n")
    assert time.monotonic() - began < 30


def test_a_run_that_saves_its_state_handles_the_first_signal_and_a_second_ends_it():
    code = """
from aim_flax.train.signals import signals
console.end_on_signals()
with signals() as received:
    os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGTERM]
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
"""
    assert ended(code) == (130, "-c: stopped by SIGINT\n")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "ablate"])
def test_the_second_signal_ends_a_run_at_once_also_within_a_study(command, tmp_path):
    """Study and run handled one each, so that it took three."""
    argv = ["--config", DIGITS, *flags(*SMALL), "--workdir", str(tmp_path / "x")]
    argv += ["--arms", "aim,control", "--seeds", "1"] if command == "ablate" else []
    code = f"""
from aim_flax.cli import {command} as command
def begin(part, step):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
console.Part.begin = begin
console.end_on_signals()
command.main({argv})
"""
    assert ended(code) == (130, "-c: stopped by SIGINT\n")


def test_a_terminal_that_is_closed_leaves_what_nohup_started():
    code = """
from aim_flax.train.signals import signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
console.end_on_signals()
with signals() as received:
    os.kill(os.getpid(), signal.SIGHUP)
assert received == []
os.kill(os.getpid(), signal.SIGHUP)
"""
    assert ended(code) == (0, "")


def test_a_signal_to_save_before_there_is_anything_to_save_ends_nothing():
    code = """
console.end_on_signals()
os.kill(os.getpid(), signal.SIGUSR1)
"""
    assert ended(code) == (0, "-c: SIGUSR1: no state to save yet\n")


@pytest.mark.parametrize("signum", [*SIGNALS, signal.SIGUSR1])
@pytest.mark.parametrize(("end", "status"), [("", 0), ("sys.exit(2)", 2)])
def test_a_command_that_has_told_how_it_ended_ends_so(signum, end, status):
    """Python has the system's handlers in place again while it clears its modules."""
    code = f"""
import sys
class Last:
    def __del__(self, kill=os.kill, me=os.getpid()):
        kill(me, {int(signum)})
last = Last()
console.end_on_signals()
{end}
"""
    assert ended(code) == (status, "")


@pytest.fixture
def handlers():
    """Puts back those that were there."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("argv", [None, []])
def test_handlers_are_those_of_a_program_only(handlers, argv):
    """A main that is given flags, as from a notebook, leaves them alone; and so do others' own."""

    def mine(signum, frame):
        pass

    given = []
    main = console.as_command()(given.append)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, mine)
    main() if argv is None else main(argv)
    assert given == [argv]
    assert signal.getsignal(signal.SIGTERM) is mine
    assert isinstance(signal.getsignal(signal.SIGINT), console._End) == (argv is None)


def test_a_command_says_its_own_words(handlers):
    """Also where the search for its module has set a handler already."""
    for signum, handler in console.ENDS.items():
        signal.signal(signum, handler)
    console.end_on_signals()
    console.as_command("all is kept")(lambda argv: None)()
    assert [signal.getsignal(number)._stopped for number in SIGNALS] == ["all is kept"] * 3


def test_ctrl_c_that_nobody_handled_is_one_line(monkeypatch):
    ends, written = [], []
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(os, "write", lambda to, text: written.append((to, text)))
    monkeypatch.setattr(sys, "argv", ["/somewhere/eval.py"])
    monkeypatch.setattr(cli, "_previous", lambda *error: None)
    cli._tell(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert ends == [130]
    assert written == [(2, b"eval.py: stopped by SIGINT\n")]


def test_any_other_error_keeps_its_traceback(monkeypatch):
    told = []
    monkeypatch.setattr(cli, "_previous", lambda *error: told.append(error))
    error = ValueError()
    cli._tell(ValueError, error, None)
    assert told == [(ValueError, error, None)]


def test_commands_import_no_jax_before_their_flags_are_read():
    """So that they say what is wrong with them, and end on Ctrl-C, at once."""
    code = (
        "import sys, aim_flax.cli.train, aim_flax.cli.evaluate, aim_flax.cli.ablate\n"
        "print(*{'jax', 'flax', 'numpy', 'matplotlib'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.stdout == "\n"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Commands that take longer than a few seconds, each with its folder."""
    root = tmp_path_factory.mktemp("work")
    photos = write_folder(root / "photos", train=400, val=12, test=2000, size=(200, 200))
    digits = ["--config", DIGITS, *flags(*SMALL, "train.epochs=10000")]
    streamed = small(photos, "data.in_memory_mb=0.0", "eval.batch_size=1", "train.epochs=1")
    folder = ["--config", f"{FOLDER_CONFIG}:control", *flags(*streamed)]
    short = flags("data.train_images=16", "eval.select_on=val")
    subprocess.run(
        [sys.executable, ROOT / "train.py", *folder, *short, "--workdir", root / "run"],
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
        check=True,
        capture_output=True,
    )
    return root, {
        "train": ["train.py", *digits, "--workdir", root / "train"],
        "streamed": ["train.py", *folder, "--workdir", root / "streamed"],
        "eval": ["eval.py", "--workdir", root / "run"],
        "ablate": ["ablate.py", *digits, "--arms", "aim,control", "--workdir", root / "study"],
        "inspect": ["-m", "aim_flax.cli.inspect", photos, "--threads", "1"],
        "bench": ["-m", "aim_flax.cli.bench", *folder, "--steps", "100000"],
        "table": ["-m", "aim_flax.cli.table", root / "run"],
        "prepare": ["-m", "aim_flax.cli.prepare", "cifar10", "--data_dir", root / "tfds"],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "times", "seconds"),
    [(signal.SIGINT, 1, 0.7), (signal.SIGTERM, 1, 4.0), (signal.SIGINT, 2, 8.0)],
)
@pytest.mark.parametrize(
    "command", ["train", "streamed", "eval", "ablate", "inspect", "bench", "table", "prepare"]
)
def test_a_command_ends_with_one_line(work, command, signum, times, seconds):
    """Whatever it does after so many seconds; or it has come to its end."""
    root, commands = work
    first, *rest = map(str, commands[command])
    program = [first, *rest] if first == "-m" else [str(ROOT / first), *rest]
    process = subprocess.Popen(
        [sys.executable, *program],
        cwd=root,
        env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(seconds)
    for _ in range(times):
        process.send_signal(signum)
        time.sleep(0.2)
    error = process.communicate(timeout=300)[1]
    if process.returncode in (0, 1, 2):
        return  # It was quicker than the signal, or there was nothing to download.
    assert process.returncode == 128 + signum, error
    # A run may have saved its state before the second one.
    assert 1 <= len(error.splitlines()) <= times, error
