"""Preparing TFDS datasets: downloads from a local server, real files, no TensorFlow."""

import errno
import hashlib
import http.server
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
from tests.test_tfds_records import PHOTO, photographs

EXAMPLES = photographs(4)
CONTENT = b"an archive"


class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A dataset of files; tests overwrite what they are about."""

    name = "photos"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(PHOTO))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(4), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        yield from enumerate(EXAMPLES[:count])


def downloading(url: str, content: bytes = CONTENT):
    """Returns Photos with a file to download, which TFDS expects to have this content."""

    class Downloading(Photos, skip_registration=True):
        name = "photos"
        url_infos = {
            url: tfds.download.checksums.UrlInfo(
                size=tfds.core.utils.Size(len(content)),
                checksum=hashlib.sha256(content).hexdigest(),
                filename="archive.bin",
            )
        }

        def _split_generators(self, dl_manager):
            assert dl_manager.download(url).read_bytes() == content
            return super()._split_generators(dl_manager)

    return Downloading


@pytest.fixture
def server(monkeypatch):
    """Serves CONTENT at any address but /gone; lists what was asked for."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(404 if self.path == "/gone" else 200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}", asked
        served.shutdown()
        thread.join()


def refusal(builder, manual_dir=None) -> str:
    """Returns the line with which a preparation fails, and checks that it left no dataset."""
    with pytest.raises(UsageError) as error:
        prepare(builder, manual_dir)
    assert not builder.is_prepared()
    assert "\n" not in str(error.value)
    return str(error.value)


def run(capsys, *argv) -> tuple[int, str, str]:
    """Returns exit status, output and error output of the command."""
    status = 0
    try:
        main(list(argv))
    except SystemExit as exit_:
        status = exit_.code
    return status, *capsys.readouterr()


def test_what_is_prepared_can_be_read_and_is_not_prepared_twice(tmp_path, capsys):
    builder = Photos(data_dir=tmp_path)
    prepare(builder, None)
    line = f"photos/1.0.0: train 4, test 2; in {tmp_path}/photos/1.0.0"
    assert summary(builder) == line
    dataset = read_tfds("photos", str(tmp_path), 0)
    assert {dataset.splits["train"].read(i)[0] for i in range(4)} == {e["image"] for e in EXAMPLES}
    capsys.readouterr()
    found = run(capsys, "photos", "--data_dir", str(tmp_path))
    assert found == (0, f"already prepared: {line}\n", "")


def test_a_later_try_keeps_complete_downloads(tmp_path, server):
    address, asked = server

    class Stopped(downloading(f"{address}/file"), skip_registration=True):
        name = "photos"

        def _generate_examples(self, count):
            yield 0, EXAMPLES[0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(Stopped(data_dir=tmp_path), None)
    assert asked == ["/file"]
    builder = downloading(f"{address}/file")(data_dir=tmp_path)
    assert not builder.is_prepared()
    prepare(builder, None)
    assert asked == ["/file"]
    assert builder.info.splits["train"].num_examples == 4


def test_without_a_network_the_address_is_told_and_the_file_may_come_by_hand(tmp_path, server):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/file"
    builder = downloading(url)(data_dir=tmp_path)
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
    line = refusal(downloading(f"{address}/gone")(data_dir=tmp_path))
    assert line.startswith(f"Failed to get url {address}/gone. HTTP code: 404.;")
    line = refusal(downloading(f"{address}/file", b"another")(data_dir=tmp_path))
    assert line.startswith(f"Artifact {address}/file, downloaded to {tmp_path}/downloads/")
    assert "has wrong checksum; try again" in line


def test_files_to_be_fetched_by_hand_are_named(tmp_path):
    class ByHand(Photos, skip_registration=True):
        name = "photos"
        MANUAL_DOWNLOAD_INSTRUCTIONS = "Get a.tar\nfrom the authors."

        def _split_generators(self, dl_manager):
            (dl_manager.manual_dir / "a.tar").read_bytes()
            return super()._split_generators(dl_manager)

    builder = ByHand(data_dir=tmp_path / "data")
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
    builder = Photos(data_dir=tmp_path)
    builder.info.download_size = tfds.core.utils.Size(2**60)
    line = refusal(builder)
    assert line.startswith(f"the disk of {tmp_path} is full: Not enough disk space. Needed: 1")

    class Full(Photos, skip_registration=True):
        name = "photos"

        def _generate_examples(self, count):
            yield 0, EXAMPLES[0]
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    line = refusal(Full(data_dir=tmp_path))
    assert line.startswith(f"the disk of {tmp_path} is full: ")
    assert "No space left on device" in line


def test_a_folder_in_the_way_is_not_taken_for_the_dataset(tmp_path):
    builder = Photos(data_dir=tmp_path)
    builder.data_path.mkdir(parents=True)
    assert refusal(builder) == f"{tmp_path}/photos/1.0.0 holds no whole dataset; move it away"


def test_another_package_that_is_needed_is_named(tmp_path):
    class Needy(Photos, skip_registration=True):
        name = "photos"

        def _split_generators(self, dl_manager):
            import a_package_that_nobody_wrote

            return a_package_that_nobody_wrote

    assert refusal(Needy(data_dir=tmp_path)) == (
        "photos needs another package: No module named 'a_package_that_nobody_wrote'"
    )


def test_other_errors_of_a_builder_keep_their_traceback(tmp_path):
    class Broken(Photos, skip_registration=True):
        name = "photos"

        def _split_generators(self, dl_manager):
            raise AssertionError("a mistake in the builder")

    with pytest.raises(AssertionError, match="a mistake in the builder"):
        prepare(Broken(data_dir=tmp_path), None)


def test_wrong_use_is_one_line_and_touches_nothing(tmp_path, capsys):
    status, output, error = run(capsys, "cifer10", "--data_dir", str(tmp_path))
    assert (status, output) == (2, "")
    assert error.endswith(": TFDS has no dataset 'cifer10' (did you mean 'cifar10'?)\n")
    status, output, error = run(capsys)
    assert (status, output) == (2, "")
    assert error.startswith("aim_flax.cli.prepare: the following arguments are required: NAME")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("tensorflow") is not None, reason="it is installed")
def test_without_tensorflow_the_command_that_installs_it_is_told(tmp_path, capsys):
    status, output, error = run(capsys, "cifar10", "--data_dir", str(tmp_path))
    assert (status, output) == (2, "")
    assert error.endswith(
        ": preparing a dataset needs TensorFlow: pip install -e '.[prepare]' -c constraints.txt\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_at_once_and_says_how_to_go_on(tmp_path):
    # A download that would take a minute, and TensorFlow's place taken where it isn't installed:
    # a dataset of files needs none of it.
    program = """
        import http.server, signal, threading, time
        # As from a terminal: what a script starts in the background ignores Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        import tensorflow_datasets as tfds

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                print("downloading", flush=True)
                time.sleep(60)

            def log_message(self, *_):
                pass

        served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=served.serve_forever, daemon=True).start()

        class Slow(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                return tfds.core.DatasetInfo(builder=self)

            def _split_generators(self, dl_manager):
                dl_manager.download(f"http://127.0.0.1:{served.server_port}/file")

            def _generate_examples(self):
                yield from ()

        from aim_flax.cli.prepare import main
        main(["slow", "--data_dir", "data"])
    """
    if importlib.util.find_spec("tensorflow") is None:
        (tmp_path / "tensorflow.py").touch()
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env=os.environ | {"NO_PROXY": "127.0.0.1", "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while (line := process.stdout.readline()) != "downloading\n":
        assert line, process.communicate()[1]
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, error = process.communicate(timeout=50)
    assert time.monotonic() - start < 20
    assert process.returncode == 128 + signal.SIGINT
    last = error.splitlines()[-1]
    assert last.endswith("stopped; complete downloads are kept, and the same command goes on")
    assert "Traceback" not in error
