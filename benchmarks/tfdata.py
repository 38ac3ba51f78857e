"""The tf.data side of benchmarks/streamed.py, which starts it with a Python that has TensorFlow.

For each line on stdin with two numbers of batches, starts the pipeline, draws the first number of
batches untimed, times the second, and answers with a line: seconds, seconds of processor time, and
the peak of resident memory in MiB.
"""

import argparse
import glob
import os
import resource
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
import tensorflow as tf

parser = argparse.ArgumentParser()
parser.add_argument("directory")
parser.add_argument("--size", type=int, required=True)
parser.add_argument("--batch_size", type=int, required=True)
parser.add_argument("--augment", action="store_true", help="a random crop, and a flip")
args = parser.parse_args()


def load(path: tf.Tensor, label: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    encoded = tf.io.read_file(path)
    if args.augment:
        image = tf.image.random_flip_left_right(decode_crop(encoded))
    else:
        image = tf.io.decode_jpeg(encoded, channels=3)
    return tf.image.resize(image, (args.size, args.size)), label


def decode_crop(encoded: tf.Tensor) -> tf.Tensor:
    """As in TensorFlow's own ImageNet pipelines: decodes the rows and columns of the crop alone."""
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        tf.io.extract_jpeg_shape(encoded),
        tf.zeros((1, 0, 4)),
        min_object_covered=0.0,
        aspect_ratio_range=(3 / 4, 4 / 3),
        area_range=(0.25, 1.0),
        use_image_if_no_bounding_boxes=True,
    )
    window = tf.stack([begin[0], begin[1], size[0], size[1]])
    return tf.io.decode_and_crop_jpeg(encoded, window, channels=3)


paths = sorted(glob.glob(os.path.join(args.directory, "*", "*.jpg")))
classes = sorted({os.path.dirname(path) for path in paths})
labels = [classes.index(os.path.dirname(path)) for path in paths]
data = tf.data.Dataset.from_tensor_slices((paths, labels)).shuffle(len(paths)).repeat()
data = data.map(load, tf.data.AUTOTUNE).batch(args.batch_size).prefetch(tf.data.AUTOTUNE)
for line in sys.stdin:
    untimed, timed = map(int, line.split())
    iterator = iter(data)
    for _ in range(untimed):
        next(iterator)
    wall, used = time.perf_counter(), time.process_time()
    for _ in range(timed):
        next(iterator)
    wall, used = time.perf_counter() - wall, time.process_time() - used
    # Ends its threads.
    del iterator
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(wall, used, peak, flush=True)
