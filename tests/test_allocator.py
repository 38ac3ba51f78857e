"""Memory that was freed is used again as it is: no page of it is asked for anew."""

import subprocess
import sys

import pytest

_ASK = """
import resource, threading
import numpy as np
from aim_flax import allocator

def use():
    for _ in range(4):
        np.ones(8 << 20)

def faults(run):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def in_a_thread():
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()

if {keep}:
    assert allocator.keep_memory()
use()
print(faults(use), faults(in_a_thread))
"""


def page_faults(keep, **environment):
    code = [sys.executable, "-c", _ASK.format(keep=keep)]
    done = subprocess.run(
        code, capture_output=True, text=True, check=True, env={"PYTHONPATH": ".", **environment}
    )
    return [int(number) for number in done.stdout.split()]


def test_freed_memory_is_kept_in_all_threads():
    if not sys.platform.startswith("linux"):
        pytest.skip("glibc's malloc")
    pages = 4 * (64 << 20) // 4096
    # With huge pages of the system's own accord there are fewer faults without it too.
    assert all(number < pages / 100 for number in page_faults(keep=True))


def test_what_the_user_set_is_left_alone(monkeypatch):
    from aim_flax import allocator

    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    monkeypatch.setattr(allocator.ctypes, "CDLL", None)
    assert not allocator.keep_memory()
