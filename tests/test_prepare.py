"""Preparing TFDS datasets: downloads from a local server, real files, no TensorFlow."""

import errno
import hashlib
import http.server
import importlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from aim_flax.cli.prepare import main, prepare, summary
from aim_flax.data.tfds_records import read_tfds
from aim_flax.errors import UsageError
from tests.asserts import fails
from tests.test_tfds_records import PHOTO, photographs

EXAMPLES = photographs(4)
CONTENT = b"an archive"


class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A dataset of four examples to train with and two to test; needs what `get` gets."""

    name = "photos"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(PHOTO))

    def _split_generators(self, dl_manager):
        self.get(dl_manager)
        return {"train": self._generate_examples(4), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        yield from self.examples(count)

    def get(self, dl_manager):
        pass

    def examples(self, count):
        return enumerate(EXAMPLES[:count])


def photos(folder, **changes):
    """Returns the builder of Photos, in a folder, with other methods or attributes."""
    made = type("Changed", (Photos,), changes | {"name": "photos"}, skip_registration=True)
    return made(data_dir=folder)


def stopped_by(error):
    """Returns examples that end with an error after the first one."""

    def examples(self, count):
        yield 0, EXAMPLES[0]
        raise error

    return examples


def downloading(url: str, content: bytes = CONTENT) -> dict:
    """Returns what makes Photos download a file, which TFDS expects to have this content."""
    info = tfds.download.checksums.UrlInfo(
        size=tfds.core.utils.Size(len(content)),
        checksum=hashlib.sha256(content).hexdigest(),
        filename="archive.bin",
    )

    def get(self, dl_manager):
        assert dl_manager.download(url).read_bytes() == content

    return {"url_infos": {url: info}, "get": get}


@pytest.fixture
def server(monkeypatch):
    """Serves CONTENT at any address but /gone, slowly at /slow; lists what was asked for."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    asked, over = [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404 if self.path == "/gone" else 200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            if self.path == "/slow":
                over.wait(60)
            self.wfile.write(CONTENT)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}", asked
        over.set()
        served.shutdown()
        thread.join()


def refusal(builder, manual_dir=None) -> str:
    """Returns the line with which a preparation fails, and checks that it left no dataset."""
    with pytest.raises(UsageError) as error:
        prepare(builder, manual_dir)
    assert not builder.is_prepared()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_prepared_can_be_read_and_is_not_prepared_twice(tmp_path, capsys):
    builder = photos(tmp_path)
    prepare(builder, None)
    line = f"photos/1.0.0: train 4, test 2; in {tmp_path}/photos/1.0.0"
    assert summary(builder) == line
    dataset = read_tfds("photos", str(tmp_path), 0)
    assert {dataset.splits["train"].read(i)[0] for i in range(4)} == {e["image"] for e in EXAMPLES}
    capsys.readouterr()
    main(["photos", "--data_dir", str(tmp_path)])
    assert capsys.readouterr() == (f"already prepared: {line}\n", "")


def test_a_later_try_keeps_complete_downloads(tmp_path, server):
    address, asked = server

    needed = downloading(f"{address}/file")
    with pytest.raises(KeyboardInterrupt):
        prepare(photos(tmp_path, **needed, examples=stopped_by(KeyboardInterrupt())), None)
    assert asked == ["/file"]
    builder = photos(tmp_path, **needed)
    assert not builder.is_prepared()
    prepare(builder, None)
    assert asked == ["/file"]
    assert builder.info.splits["train"].num_examples == 4


def test_without_a_network_the_address_is_told_and_the_file_may_come_by_hand(tmp_path, server):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file"
    builder = photos(tmp_path, **downloading(url))
    line = refusal(builder)
    assert line.startswith(f"{url} can't be downloaded: ")
    assert "Connection refused" in line
    assert "the same command goes on" in line
    (tmp_path / "by_hand").mkdir()
    (tmp_path / "by_hand" / "archive.bin").write_bytes(CONTENT)
    prepare(builder, str(tmp_path / "by_hand"))
    assert builder.is_prepared()


def test_a_missing_or_changed_file_is_one_line(tmp_path, server):
    address, _ = server
    line = refusal(photos(tmp_path, **downloading(f"{address}/gone")))
    assert line.startswith(f"Failed to get url {address}/gone. HTTP code: 404.;")
    line = refusal(photos(tmp_path, **downloading(f"{address}/file", b"another")))
    assert line.startswith(f"Artifact {address}/file, downloaded to {tmp_path}/downloads/")
    assert "has wrong checksum; try again" in line


def test_files_to_be_fetched_by_hand_are_named(tmp_path):
    builder = photos(
        tmp_path / "data",
        MANUAL_DOWNLOAD_INSTRUCTIONS="Get a.tar\nfrom the authors.",
        get=lambda self, dl_manager: (dl_manager.manual_dir / "a.tar").read_bytes(),
    )
    needs = "photos needs files that are fetched by hand: Get a.tar from the authors."
    folder = tmp_path / "by_hand"
    for manual_dir, meant in ((None, tmp_path / "data/downloads/manual"), (str(folder), folder)):
        line = refusal(builder, manual_dir)
        assert line == f"{meant} is missing or empty (--manual_dir); {needs}"
    assert not (tmp_path / "data").exists()
    folder.mkdir()
    (folder / "b.tar").touch()
    line = refusal(builder, str(folder))
    assert f"No such file or directory: '{folder}/a.tar'; {needs}" in line
    (folder / "a.tar").touch()
    prepare(builder, str(folder))
    assert builder.is_prepared()


def test_a_full_disk_is_one_line(tmp_path):
    builder = photos(tmp_path)
    builder.info.download_size = tfds.core.utils.Size(2**60)
    line = refusal(builder)
    assert line.startswith(f"the disk of {tmp_path} is full: Not enough disk space. Needed: 1")

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    line = refusal(photos(tmp_path, examples=stopped_by(full)))
    assert line.startswith(f"the disk of {tmp_path} is full: ")
    assert "No space left on device" in line


def test_a_folder_in_the_way_is_not_taken_for_the_dataset(tmp_path):
    builder = photos(tmp_path)
    builder.data_path.mkdir(parents=True)
    assert refusal(builder) == f"{tmp_path}/photos/1.0.0 holds no whole dataset; move it away"


def test_another_package_that_is_needed_is_named(tmp_path):
    def get(self, dl_manager):
        importlib.import_module("a_package_that_nobody_wrote")

    assert refusal(photos(tmp_path, get=get)) == (
        "photos needs another package: No module named 'a_package_that_nobody_wrote'"
    )


def test_other_errors_of_a_builder_keep_their_traceback(tmp_path):
    builder = photos(tmp_path, examples=stopped_by(AssertionError("a mistake in the builder")))
    with pytest.raises(AssertionError, match="a mistake in the builder"):
        prepare(builder, None)


def test_wrong_use_is_one_line_and_touches_nothing(tmp_path, capsys):
    line = fails(capsys, main, "cifer10", "--data_dir", str(tmp_path))
    assert line.endswith(": TFDS has no dataset 'cifer10' (did you mean 'cifar10'?)")
    line = fails(capsys, main)
    assert line.startswith("aim_flax.cli.prepare: the following arguments are required: NAME")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="it is installed")
def test_without_tensorflow_the_command_that_installs_it_is_told(tmp_path, capsys):
    line = fails(capsys, main, "cifar10", "--data_dir", str(tmp_path))
    assert line.endswith(
        ": preparing a dataset needs TensorFlow: pip install -e '.[prepare]' -c constraints.txt"
    )
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_at_once_and_says_how_to_go_on(tmp_path, server):
    """In a download that would take a minute."""
    address, asked = server
    program = f"""
        import signal
        # As from a terminal: what a script starts in the background ignores Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import tensorflow_datasets as tfds

        class Slow(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(builder=self)

            def _split_generators(self, dl_manager):
                dl_manager.download("{address}/slow")

            def _generate_examples(self):
                yield from ()

        from aim_flax.cli.prepare import main
        main(["slow", "--data_dir", "data"])
    """
    if importlib.util.find_spec("tensorflow") is None:
        # A dataset of files needs none of it.
        (tmp_path / "tensorflow.py").touch()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not asked:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, error = process.communicate(timeout=50)
    assert time.monotonic() - start < 20
    assert process.returncode == 128 + signal.SIGINT
    last = error.splitlines()[-1]
    assert last.endswith(
        "stopped by SIGINT; complete downloads are kept, and the same command goes on"
    )
    assert "Traceback" not in error
