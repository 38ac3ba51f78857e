"""The cache of compiled programs: the same bits from it, nothing damaged from it, and off."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from aim_flax import compile_cache
from tests.processes import finish, start
from tests.runs import SMALL, assert_same_end, flags

# Compiles a program again and again; a line of each says how often it was found, and its result.
_SCRIPT = """
import os
import jax, jax.numpy as jnp, numpy as np
from aim_flax import compile_cache

folder = compile_cache.enable()
hits = []
listen = jax.monitoring.register_event_listener
listen(lambda event, **_: hits.append(1) if event.endswith("/cache_hits") else None)

x = np.linspace(0, 1, 30, dtype=np.float32).reshape(5, 6)

def program(x):
    return jnp.sin(x @ x.T).sum(0)

def run(what):
    jax.clear_caches()
    hits.clear()
    result = jax.jit(program)(x).tobytes().hex()
    print(what, len(hits), result)

def entry(suffix="cache"):
    (found,) = folder.glob(f"jit_program-*-{suffix}")
    return found

run("cold")
run("warm")
for place in range(20):
    damaged = bytearray(entry().read_bytes())
    damaged[place * len(damaged) // 20] ^= 1 << place % 8
    entry().write_bytes(damaged)
    run("flipped")
    run("healed")
for size in (0, len(damaged) // 2, len(damaged) - 1):
    entry().write_bytes(entry().read_bytes()[:size])
    run("truncated")
    run("healed")
# As a process leaves them that is killed while it writes: just now, and long ago.
for age in (0, 1000):
    entry("atime").unlink()
    then = entry().stat().st_mtime - age
    os.utime(entry(), (then, then))
    compile_cache._tidy(folder)
    run("left")
print(sorted(path.name.rpartition("-")[2] for path in folder.glob("jit_program-*")))
"""


def with_cache(folder: Path, **environment: str) -> dict[str, str]:
    """Returns an environment in which that is the user's cache folder, and no other was chosen."""
    return {"JAX_COMPILATION_CACHE_DIR": "", "XDG_CACHE_HOME": str(folder), **environment}


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*-cache") if path.is_file()]


def test_programs_are_found_and_damaged_ones_are_not_taken(tmp_path):
    given = os.environ | with_cache(tmp_path, JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    child = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=given, capture_output=True, text=True, check=True
    )
    *lines, left = child.stdout.splitlines()
    found = [line.split() for line in lines]
    assert len({result for _, _, result in found}) == 1
    of = lambda what: [int(hits) for name, hits, _ in found if name == what]  # noqa: E731
    assert (of("cold"), of("warm")) == ([0], [1])
    assert (of("flipped"), of("truncated")) == ([0] * 20, [0] * 3)
    assert of("healed") == [1] * 23
    assert of("left") == [1, 0]
    assert left == "['atime', 'cache']"
    # One line, however many.
    (told,) = child.stderr.splitlines()
    assert told.startswith(f"note: a compiled program in {tmp_path}/aim_flax/compiled/cpu-")
    assert told.endswith(" is damaged: it is compiled anew")


@pytest.fixture
def no_folder(tmp_path, monkeypatch):
    """As for a user who chose nothing; returns what would be their cache folder."""
    kept = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    assert jax.config.jax_compilation_cache_dir is None
    jax.config.update("jax_compilation_cache_dir", kept)


def test_it_is_off_where_it_would_do_harm(no_folder, monkeypatch):
    assert compile_cache.default_folder() == no_folder / "aim_flax" / "compiled"
    with monkeypatch.context() as patch:
        patch.setattr(compile_cache, "find_spec", lambda name: name == "zstandard")
        assert compile_cache.enable() is None
    features = compile_cache._cpu_features()
    assert features.count(b",") > 5
    with monkeypatch.context() as patch:
        patch.setattr(compile_cache, "_cpu_features", lambda: features + b",+prefer-no-gather")
        patch.delattr(compile_cache.compilation_cache, "compress_executable")
        assert compile_cache.enable() is None
    assert not no_folder.exists()
    no_folder.write_text("no folder")
    assert compile_cache.enable() is None
    monkeypatch.setattr(Path, "home", lambda: Path("/nowhere"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert compile_cache.default_folder() == Path("/nowhere/.cache/aim_flax/compiled")


def test_programs_are_saved_without_what_xla_would_complain_of():
    """On a CPU with AVX-512 all programs are; that no line of an error comes is seen above."""
    before = b"\x00\x2a+avx2,+avx512f,+avx512vl,-avx512fp16,+prefer-no-gather,+sse2\x12+avx512f,"
    after = b"\x00\x2a+avx2,-avx512f,-avx512vl,-avx512fp16,-prefer-no-gather,+sse2\x12+avx512f,"
    assert compile_cache._without_hints(before) == after
    without = before.replace(b"+prefer-no-gather", b"+prefetchi")
    assert compile_cache._without_hints(without) == without


def test_nothing_is_run_that_others_can_write(no_folder, monkeypatch):
    monkeypatch.setattr(compile_cache, "_cpu_features", lambda: b"")
    (folder := no_folder / "aim_flax/compiled/cpu-e3b0c44298fc").mkdir(parents=True)
    folder.chmod(0o770)
    assert compile_cache.enable() is None
    folder.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    assert compile_cache.enable() is None
    assert list(folder.iterdir()) == []


def test_a_folder_of_jaxs_own_and_its_switch_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # The tests' own.
    assert jax.config.jax_compilation_cache_dir
    assert compile_cache.enable() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_runs_are_bit_equal_without_it_and_with_it(tmp_path):
    """Off, written by two processes at once, and found."""
    train = ("train.py", "--config", "configs/digits_mlp.py", *flags(*SMALL, "train.epochs=1"))

    def run(name, cache, **environment):
        # All programs: by its time one that is saved at one start is not at another.
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        where = with_cache(tmp_path / cache, **environment)
        return start(*train, "--workdir", tmp_path / name, **where)

    finish(run("off", "unused", JAX_ENABLE_COMPILATION_CACHE="0"))
    assert not (tmp_path / "unused/aim_flax").exists()
    outputs = finish(run("cold", "cache"), run("beside", "cache"))
    written = {path: path.read_bytes() for path in files(tmp_path / "cache")}
    assert len(written) >= 4
    outputs += finish(run("warm", "cache"))
    assert {path: path.read_bytes() for path in files(tmp_path / "cache")} == written
    for path in written:
        path.write_bytes(written[path][:-9])
    outputs += finish(run("damaged", "cache"))
    told = [line for output in outputs for line in output.splitlines() if "compiled" in line]
    assert len(told) == 1
    for name in ("cold", "beside", "warm", "damaged"):
        assert_same_end(tmp_path / "off", tmp_path / name)
    evaluate = ("eval.py", "--workdir", tmp_path / "off")
    finish(start(*evaluate, **with_cache(tmp_path / "cache")))
