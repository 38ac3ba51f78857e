"""JPEG files from disk to batches on the device, by aim_flax and by tf.data.

    python benchmarks/streamed.py --tf-python tf/bin/python --csv results/data_streamed.csv

Writes 600 JPEG files of 500x375 (quality 85, 4:2:0, about 38 kB each), cut from scikit-learn's two
photographs, to a temporary folder, and loads them at 224x224; no training. Rounds alternate between
the ways. tf.data runs in a process of its own, of another Python, where tensorflow-cpu is
installed; without --tf-python it is left out.
"""

import argparse
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import cv2
import jax
import numpy as np
import simplejpeg
from sklearn.datasets import load_sample_images

from aim_flax.data.folder import read_folder
from aim_flax.data.scaling import Scaling
from aim_flax.data.streamed import Streamed
from aim_flax.devices import Devices
from aim_flax.files import write_csv

FILES, HEIGHT, WIDTH, SIZE = 600, 375, 500, 224
AUGMENTATIONS = {"none": None, "crop and flip": {"crop": 0.25, "flip_horizontal": True}}
# Batches until a pipeline runs evenly. Each turn starts its own and ends it, so that none works in
# another's turn.
UNTIMED = 16
# (untimed, timed) numbers of batches -> seconds, processor seconds, peak resident MiB.
Measure = Callable[[int, int], tuple[float, float, float]]


def write_photographs(directory: Path) -> None:
    """Writes the files, in a folder for each photograph."""
    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    for i in range(FILES):
        label = i % len(photographs)
        scale = rng.uniform(1.0, 1.1)
        height, width = round(scale * HEIGHT), round(scale * WIDTH)
        limits = np.subtract(photographs[label].shape[:2], (height, width)) + 1
        top, left = rng.integers(0, limits)
        part = photographs[label][top : top + height, left : left + width]
        part = cv2.resize(part, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA)
        encoded = simplejpeg.encode_jpeg(part, quality=85, colorsubsampling="420")
        (directory / str(label)).mkdir(exist_ok=True)
        (directory / str(label) / f"{i:03}.jpg").write_bytes(encoded)


def ours(directory: Path, batch_size: int, augment: str, threads: int) -> Measure:
    # Half a percent is as good as nothing held out: a folder of classes alone must be split.
    dataset = read_folder(directory, val_fraction=0.0, test_fraction=0.005)
    streamed = Streamed(dataset, (SIZE, SIZE, 3), threads)
    devices = Devices("pmap", 1)
    batches = streamed.train_batches(devices, batch_size, Scaling(255.0), AUGMENTATIONS[augment])

    def measure(untimed: int, timed: int) -> tuple[float, float, float]:
        with closing(batches.feed(0, 0, 1_000_000)) as feed:
            for step in range(untimed + timed):
                if step == untimed:
                    wall, used = time.perf_counter(), time.process_time()
                jax.block_until_ready(feed.at(step))
            wall, used = time.perf_counter() - wall, time.process_time() - used
        return wall, used, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    return measure


@contextmanager
def tf_data(python: str, directory: Path, batch_size: int, augment: str) -> Iterator[Measure]:
    command = [python, str(Path(__file__).with_name("tfdata.py")), str(directory)]
    command += [f"--size={SIZE}", f"--batch_size={batch_size}"]
    if AUGMENTATIONS[augment]:
        command.append("--augment")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **pipes) as process:

        def measure(untimed: int, timed: int) -> tuple[float, float, float]:
            print(untimed, timed, file=process.stdin, flush=True)
            wall, used, peak = map(float, process.stdout.readline().split())
            return wall, used, peak

        # Leaving closes its stdin, which ends it.
        yield measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tf-python", metavar="PYTHON", help="one that has tensorflow-cpu")
    parser.add_argument("--threads", default="2,4", help="of ours, in turn")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40, help="batches in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_photographs(directory)
        size = statistics.mean(path.stat().st_size for path in directory.glob("*/*.jpg"))
        print(f"{FILES} files of {WIDTH}x{HEIGHT}, {size / 1000:.1f} kB on average")
        for augment in AUGMENTATIONS:
            with ExitStack() as stack:
                ways = {}
                for threads in map(int, args.threads.split(",")):
                    way = ours(directory, args.batch_size, augment, threads)
                    ways[f"aim_flax, {threads} threads"] = way
                if args.tf_python:
                    way = tf_data(args.tf_python, directory, args.batch_size, augment)
                    ways["tf.data"] = stack.enter_context(way)
                rows += compare(ways, augment, args.steps, args.rounds, args.batch_size)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    if args.csv:
        write_csv(args.csv, list(rows[0]), rows)


def compare(
    ways: dict[str, Measure], augment: str, steps: int, rounds: int, batch_size: int
) -> list[dict]:
    """Returns a row for each way, of the medians of rounds that take a turn of each."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, measure in ways.items():
            measured = measure(UNTIMED, steps)
            if turn:  # In the first one programs are compiled and files read for the first time.
                found[name].append(measured)
    images = steps * batch_size
    rows = []
    for name, rounds_of in found.items():
        rates = [images / wall for wall, _, _ in rounds_of]
        used = statistics.median(used for _, used, _ in rounds_of) / images
        rows.append(
            {
                "augmentation": augment,
                "way": name,
                "images_per_second": round(statistics.median(rates)),
                "lowest": round(min(rates)),
                "highest": round(max(rates)),
                "cpu_milliseconds_per_image": f"{used * 1e3:.3f}",
                "peak_mebibytes": round(max(peak for _, _, peak in rounds_of)),
            }
        )
    last = rows[-1]["images_per_second"]
    return [row | {"ratio_to_last": f"{row['images_per_second'] / last:.2f}"} for row in rows]


if __name__ == "__main__":
    main()
