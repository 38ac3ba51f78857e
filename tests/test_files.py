"""Files are written whole or not at all, and nowhere else."""

import csv
import math
import os
import re
import stat
import tempfile
import time

import pytest

from aim_flax import files
from aim_flax.errors import UsageError
from tests.asserts import refused
from tests.runs import read_json


@pytest.fixture
def names(monkeypatch):
    """Temporary files try these names first."""
    monkeypatch.setattr(tempfile, "_get_candidate_names", lambda: iter(["taken", "free"]))


def test_a_link_in_the_way_leads_nothing_elsewhere(tmp_path, names):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    folder.mkdir()
    (folder / ".taken.tmp").symlink_to(victim)
    files.write_json(folder / "summary.json", {"a": 1})
    assert victim.read_text() == "precious"
    assert read_json(folder / "summary.json") == {"a": 1}
    assert sorted(os.listdir(folder)) == [".taken.tmp", "summary.json"]


def test_a_link_is_replaced_not_followed(tmp_path):
    victim, file = tmp_path / "victim", tmp_path / "summary.json"
    victim.write_text("precious")
    file.symlink_to(victim)
    files.write_text(file, "new")
    assert (victim.read_text(), file.read_text()) == ("precious", "new")


def test_others_may_read_what_the_umask_lets_them(tmp_path):
    expected = tmp_path / "opened"
    expected.write_text("")
    files.write_text(tmp_path / "written", "")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("opened", "written")]
    assert modes[0] == modes[1]


class HalfWritten:
    """An image for which there is not enough space."""

    def save(self, file, kind):
        file.write_bytes(b"half")
        raise OSError("full")


def test_what_fails_leaves_the_file_of_before_and_nothing_else(tmp_path):
    file = tmp_path / "summary.json"
    files.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(file, {"a": object()})
    with pytest.raises(OSError, match="full"):
        files.save_image(HalfWritten(), file)
    assert read_json(file) == {"a": 1}
    assert os.listdir(tmp_path) == ["summary.json"]


@pytest.mark.parametrize("name", ["a\rb", "a\nb", 'a"b,c', "=1+1", " "])
def test_names_in_a_table_are_read_as_they_were(tmp_path, name):
    rows = [{"name": name, "n": 1}, {"name": "plain", "n": 2}]
    files.write_csv(tmp_path / "t.csv", ("name", "n"), rows)
    with (tmp_path / "t.csv").open(newline="") as lines:
        assert list(csv.DictReader(lines)) == [row | {"n": str(row["n"])} for row in rows]


def test_long_names_can_be_written(tmp_path):
    files.write_text(tmp_path / ("x" * 255), "content")
    assert (tmp_path / ("x" * 255)).read_text() == "content"


def test_a_bit_that_changes_in_a_sealed_file_is_noticed(tmp_path):
    """Every single one: the content is the same, or it is refused."""
    file = tmp_path / "summary.json"
    content = {"test_accuracy": 0.97625, "best_step": 1180, "versions": {"jax": "0.10.1"}, "x": [1]}
    files.write_json(file, content, sealed=True)
    assert files.read_json(file) == content
    written = file.read_bytes()
    refusals = []
    for bit in range(8 * len(written)):
        changed = bytearray(written)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        try:
            found = files.read_json(file)
        except UsageError as error:
            refusals.append(str(error))
            continue
        # In the name of the digest, which is then a key of its own, or in white space.
        extra = [key for key in found if key not in content]
        assert {key: found[key] for key in content} == content
        assert len(extra) <= 1
    assert len(refusals) > 6 * len(written)
    assert all(message.startswith(f"{file} is ") for message in refusals)


def test_a_change_by_hand_can_be_confirmed(tmp_path):
    file = tmp_path / "config.json"
    files.write_json(file, {"seed": 0, "layers": (8, 8), "rates": {1: math.nan}}, sealed=True)
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    message = "is not what was written: it is damaged, or was changed by hand;"
    with pytest.raises(UsageError, match=message) as refusal:
        files.read_json(file)
    ours = re.search("write '(sha256:[0-9a-f]{64})' for its digest", str(refusal.value))[1]
    file.write_text(re.sub("sha256:[0-9a-f]{64}", ours, file.read_text()))
    assert files.read_json(file)["seed"] == 1


@pytest.mark.parametrize("content", ["[1, 2]", "{}", '"text"', "3", "null", "[" * 10**5, ""])
def test_what_is_no_mapping_with_these_keys_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with refused("config.json is (no run's config|damaged)"):
        files.read_mapping(tmp_path / "config.json", ("name",), "run's config")


def test_a_folder_in_place_of_a_file_is_told(tmp_path):
    (tmp_path / "config.json").mkdir()
    with refused("config.json can't be read: Is a directory$"):
        files.read_json(tmp_path / "config.json")


def test_what_a_killed_process_left_is_cleared_up_and_nothing_else(tmp_path):
    before = time.time() - 60
    for name in (".abcd_123.tmp", ".mine.tmp", "abcd_123.tmp", ".abcd_124.tmp.json"):
        (tmp_path / name).write_text("half")
        os.utime(tmp_path / name, (before, before))
    (tmp_path / ".abcd_125.tmp").write_text("written just now")
    os.mkfifo(tmp_path / ".abcd_126.tmp")
    with files._replacing(tmp_path / "summary.json") as temporary:
        temporary.write_text("whole")
        os.utime(temporary, (before, before))
        # As another process would: a lock is of who has opened the file.
        files.clear_up(tmp_path)
        assert temporary.exists()
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {".mine.tmp", "abcd_123.tmp", ".abcd_124.tmp.json", ".abcd_125.tmp"}
    assert ".abcd_123.tmp" not in names
    assert (tmp_path / "summary.json").read_text() == "whole"
