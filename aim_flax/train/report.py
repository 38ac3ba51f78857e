"""Tables and TensorBoard events of a run."""

import contextlib
import os
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from aim_flax.files import write_csv

HISTORY_COLUMNS = (
    "epoch",
    "step",
    "learning_rate",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
)
History = Sequence[dict[str, Any]]


def write_metrics(workdir: Path, history: History) -> None:
    """Writes metrics.csv, a row per epoch, and memory_use.csv, a row per epoch and layer."""
    write_csv(workdir / "metrics.csv", HISTORY_COLUMNS, history)
    uses = [
        {"epoch": row["epoch"], "layer": layer, **norms}
        for row in history
        for layer, norms in row["memory_use"].items()
    ]
    if uses:
        write_csv(workdir / "memory_use.csv", ("epoch", "layer", "share", "own"), uses)


class Events:
    """TensorBoard events of a run from `step` on; later events of an earlier process are purged.

    Of several processes, the first one writes. What can't be written is written with the next
    epoch's events: a run does not need them. TensorboardX's own writer has a thread that ends on an
    error of the disk, after which it waits for ever.
    """

    def __init__(self, workdir: Path, step: int):
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._file = workdir / "tensorboard" / name
        # What is to be written.
        self._records = b""
        self._add(file_version="brain.Event:2")
        # TensorBoard forgets what earlier files have from this step on.
        self._add(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        self._write()

    def write(self, row: dict[str, Any], data_wait_share: float | None) -> None:
        """Writes an epoch's row of the history, and the share of time spent waiting for data."""
        scalars = {} if data_wait_share is None else {"data_wait_share": data_wait_share}
        for column in HISTORY_COLUMNS[2:]:
            split, _, metric = column.partition("_")
            tag = f"{split}/{metric}" if split in ("train", "val") else column
            scalars[tag] = row[column]
        for layer, norms in row["memory_use"].items():
            # If its own output is 0 there is no ratio, and tensorboardX would warn of each NaN.
            if norms["own"]:
                scalars[f"memory_use/{layer}"] = norms["share"] / norms["own"]
        for tag, value in scalars.items():
            self._add(step=row["step"], summary=scalar(tag, value))
        self._write()

    def _add(self, **content: Any) -> None:
        """Adds an event, as a record of TensorFlow's: its length, and checksums of both."""
        event = Event(wall_time=time.time(), **content).SerializeToString()
        for part in (struct.pack("<Q", len(event)), event):
            self._records += part + struct.pack("<I", masked_crc32c(part))

    def _write(self) -> None:
        if jax.process_index() == 0:
            before = self._file.stat().st_size if self._file.exists() else 0
            try:
                self._file.parent.mkdir(exist_ok=True)
                with self._file.open("ab") as file:
                    file.write(self._records)
            except OSError:
                # TensorBoard would not read beyond half of an event.
                with contextlib.suppress(OSError):
                    os.truncate(self._file, before)
                return
        self._records = b""
