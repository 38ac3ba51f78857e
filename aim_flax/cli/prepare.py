"""Downloads and prepares a TFDS dataset: python -m aim_flax.cli.prepare NAME.

Needs the extra `prepare` (TensorFlow); reading the prepared dataset doesn't. The complete downloads
of a try that was stopped are used by the next one.
"""

import errno
import importlib.util
import logging
import os
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aim_flax.console import CommandParser, as_command, end_process
from aim_flax.data.tfds_records import FILE_FORMAT, check_format, find_builder
from aim_flax.errors import UsageError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

_KEPT = "complete downloads are kept, and the same command goes on"


def prepare(builder: "tfds.core.DatasetBuilder", manual_dir: str | None) -> None:
    """Downloads a dataset and writes it in a format with random access.

    Args:
      manual_dir: folder of files that were fetched by hand; None: `downloads/manual` in the data
        folder. Files that TFDS would download are looked for there too.

    Raises:
      UsageError: a file can't be downloaded, is not the one that TFDS knows, or must be fetched by
        hand and isn't there; no space is left; another package is needed; something else is in
        the dataset's place.
    """
    import requests
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download import downloader
    from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

    # The default of 10 makes a machine without a network wait for more than three minutes.
    downloader.MAX_RETRIES = 4
    # It reports each retry; the error reports the last one.
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    if builder.data_path.exists():
        # TFDS would take it for the dataset.
        raise UsageError(f"{builder.data_path} holds no whole dataset; move it away")
    root = builder.data_dir_root
    by_hand = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if by_hand:
        manual = Path(manual_dir or root / "downloads" / "manual")
        by_hand = f"{builder.name} needs files that are fetched by hand: {_one_line(by_hand)}"
        if not manual.is_dir() or not any(manual.iterdir()):
            raise UsageError(f"{manual} is missing or empty (--manual_dir); {by_hand}")
    # TFDS's bucket has no files with random access.
    config = tfds.download.DownloadConfig(manual_dir=manual_dir, try_download_gcs=False)
    try:
        builder.download_and_prepare(file_format=FILE_FORMAT, download_config=config)
    except NonMatchingChecksumError as error:
        # "Artifact URL, downloaded to PATH, has wrong checksum:"
        what = str(error).partition("\n")[0].rstrip(":")
        raise UsageError(
            f"{what}; try again, and if that doesn't help, the file has changed at its source: see"
            " whether a newer tensorflow-datasets knows it"
        ) from None
    except (requests.RequestException, tfds.download.DownloadError) as error:
        request = getattr(error, "request", None)
        url = f"{request.url} can't be downloaded: " if request else ""
        # If all retries failed, the reason of the last one.
        reason = getattr(error.args[0], "reason", error) if error.args else error
        raise UsageError(
            f"{url}{_one_line(reason)}; the same command goes on once it can be reached, or with"
            " the file, fetched elsewhere, in --manual_dir"
        ) from None
    except ImportError as error:
        raise UsageError(f"{builder.name} needs another package: {_one_line(error)}") from None
    except Exception as error:
        # TensorFlow, array_record and Python, which read and write files, raise errors of different
        # types for the same thing.
        message = _one_line(error)
        if os.strerror(errno.ENOSPC) in message or message.startswith("Not enough disk space"):
            raise UsageError(f"the disk of {root} is full: {message}") from None
        missing = os.strerror(errno.ENOENT) in message or isinstance(error, AssertionError)
        if by_hand and missing:
            raise UsageError(f"{message}; {by_hand}") from None
        raise


def summary(builder: "tfds.core.DatasetBuilder") -> str:
    """Returns a line with a prepared dataset's splits, their sizes and its folder."""
    sizes = [f"{name} {split.num_examples:,}" for name, split in builder.info.splits.items()]
    return f"{builder.info.full_name}: {', '.join(sizes)}; in {builder.data_dir}"


@as_command(_KEPT)
def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandParser(
        prog="aim_flax.cli.prepare", description=__doc__.partition(":")[0], allow_abbrev=False
    )
    parser.add_argument("name", metavar="NAME[/CONFIG][:VERSION]", help="as in TFDS")
    parser.add_argument("--data_dir", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    parser.add_argument("--manual_dir", help="folder of files that were fetched by hand")
    args = parser.parse_args(argv)
    # Keeps TensorFlow's messages about the processor off the terminal.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    builder = find_builder(args.name, args.data_dir)
    if builder.is_prepared():
        check_format(builder, args.name, args.data_dir)
        print(f"already prepared: {summary(builder)}")
        return
    if importlib.util.find_spec("tensorflow") is None:
        install = "pip install -e '.[prepare]' -c constraints.txt"
        raise UsageError(f"preparing a dataset needs TensorFlow: {install}")
    try:
        prepare(builder, args.manual_dir)
    except KeyboardInterrupt:
        # A normal exit would wait for the downloads in progress.
        end_process(signal.SIGINT, _KEPT)
    print(f"prepared: {summary(builder)}")


def _one_line(message: Any) -> str:
    return re.sub(r"\s+", " ", str(message)).strip()


if __name__ == "__main__":
    main()
