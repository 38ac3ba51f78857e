"""Files are written whole or not at all, and nowhere else."""

import os
import stat
import tempfile

import pytest

from aim_flax import files
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


def test_long_names_can_be_written(tmp_path):
    files.write_text(tmp_path / ("x" * 255), "content")
    assert (tmp_path / ("x" * 255)).read_text() == "content"
