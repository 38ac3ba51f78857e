"""Datasets of TensorFlow Datasets (TFDS), read from prepared files without TensorFlow.

`python -m aim_flax.cli.prepare NAME` downloads and prepares one.
"""

import contextlib
import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from aim_flax.data.records import EncodedDataset, Records, Subset, hold_out
from aim_flax.errors import UsageError, nearest

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

# The format with random access; TFDS's default, tfrecord, has none.
FILE_FORMAT = "array_record"
_VALIDATION = ("validation", "val")
# The features by which a person finds an example, the best first.
_NAMES = ("image/filename", "file_name", "filename", "image/id", "image_id", "id")


@dataclasses.dataclass(frozen=True)
class TfdsSplit:
    """The records of a split, as `records.Records`; may be used from several threads.

    Attributes:
      title: of the split, for messages.
      source: serialised tf.train.Example messages with random access.
      name_feature: the feature that names an example, if there is one.
      files: names and sizes of the split's files.
    """

    title: str
    source: Sequence[bytes]
    name_feature: str | None
    files: str

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> tuple[bytes, int]:
        """As in `records.Records`; raises OSError if the file is missing or damaged there."""
        features = self._features(index)
        return features["image"].bytes_list.value[0], features["label"].int64_list.value[0]

    def label(self, index: int) -> int:
        return self._features(index)["label"].int64_list.value[0]

    def name(self, index: int) -> str:
        """Returns split and number and, if it has one, the example's file name or id."""
        title = f"{self.title}, record {index}"
        # A record that can't be read needs a name too.
        with contextlib.suppress(OSError):
            if self.name_feature is not None:
                feature = self._features(index)[self.name_feature]
                name = (feature.bytes_list.value or feature.int64_list.value)[0]
                name = name.decode(errors="replace") if isinstance(name, bytes) else name
                return f"{title} ({name})"
        return title

    def mark(self, index: int) -> bytes:
        """Returns the split's files, with their sizes, and the record's number."""
        return f"{self.files}\0{index}".encode()

    def _features(self, index: int) -> Mapping[str, Any]:
        """Returns the features of an example as they are stored.

        TFDS's own `deserialize_example_np` returns the same, but takes about ten times as long,
        holds Python's lock, and decodes masks and boxes too.
        """
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            record = self.source[index]
        except RuntimeError as error:
            raise OSError(str(error)) from None
        if not record:
            # The reader returns this if the file's end is missing.
            raise OSError("the record is empty: its file is damaged or cut short")
        return tf_example_pb2.Example.FromString(record).features.feature


def read_tfds(name: str, data_dir: str | None, val_fraction: float) -> EncodedDataset:
    """Opens a prepared dataset of single-label images.

    Splits: TFDS's "train", "validation" (or "val") and "test"; others are ignored. A dataset
    without "test" (ImageNet's has no labels) is tested on "validation". If that leaves no "val", it
    is held out from "train": at random from all examples instead of within each class, because the
    labels of a large dataset aren't read in advance.

    Args:
      name: NAME[/CONFIG][:VERSION] as in TFDS, for example "imagenette/320px".
      data_dir: where it was prepared; None: $TFDS_DATA_DIR or ~/tensorflow_datasets.
      val_fraction: of "train", held out if the dataset has no "val" of its own; 0: none.

    Raises:
      UsageError: the dataset is unknown, not prepared, prepared in another format or in part, or
        has no images ("image") with one label each ("label").
    """
    import tensorflow_datasets as tfds

    builder = find_builder(name, data_dir)
    command = prepare_command(name, data_dir)
    if not builder.is_prepared():
        raise UsageError(f"{name} is not prepared in {builder.data_dir}; to prepare it: {command}")
    check_format(builder, name, data_dir)
    features = builder.info.features
    _check_features(name, features)
    name_feature = next((n for n in _NAMES if n in features and features[n].shape == ()), None)

    def split(tfds_name: str) -> TfdsSplit:
        paths = builder.info.splits[tfds_name].filepaths
        for path in paths:
            if not path.exists():
                raise UsageError(
                    f"{path} is missing; move {builder.data_dir} away and run: {command}"
                )
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        source = builder.as_data_source(tfds_name, file_format=FILE_FORMAT, deserialize_method=raw)
        files = " ".join(f"{path.name}:{path.stat().length}" for path in paths)
        return TfdsSplit(f"{name} {tfds_name}", source, name_feature, files)

    available = list(builder.info.splits)
    validation = next((s for s in _VALIDATION if s in available), None)
    test = "test" if "test" in available else validation
    if "train" not in available or test is None:
        raise UsageError(
            f"{name} has the splits {', '.join(available)}, expected train and one of"
            f" {', '.join(('test', *_VALIDATION))}"
        )
    splits: dict[str, Records] = {"train": split("train"), "test": split(test)}
    if validation is not None and test != validation:
        splits["val"] = split(validation)
    elif val_fraction:
        train = splits["train"]
        kept, held = hold_out(np.zeros(len(train), np.int8), val_fraction)
        if not len(held):
            raise UsageError(
                f"a fraction of {val_fraction} of {name}'s {len(train)} training examples is none"
            )
        splits |= {"train": Subset(train, kept), "val": Subset(train, held)}
    return EncodedDataset(tuple(features["label"].names), splits)


def find_builder(name: str, data_dir: str | None) -> "tfds.core.DatasetBuilder":
    """Returns TFDS's builder of a dataset, prepared or not.

    Raises:
      UsageError: there is no such dataset, config or version.
    """
    import tensorflow_datasets as tfds

    # Without the namespaces and keyword arguments that TFDS accepts: they load code from elsewhere.
    match = re.fullmatch(r"(\w+)(?:/([^:,=]+))?(?::[\d.*]+)?", name)
    if not match:
        raise UsageError(f"dataset name {name!r}, expected NAME[/CONFIG][:VERSION]")
    dataset, config = match.groups()
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        raise UsageError(f"TFDS has no dataset {dataset!r}{nearest(dataset, known)}") from None
    except (AssertionError, ValueError) as error:
        configs = tfds.builder_cls(dataset).builder_configs
        if config is not None and config not in configs:
            message = f"{dataset} has no config {config!r}{nearest(config, configs)}"
        else:
            # For example "Dataset cifar10 cannot be loaded at version 9.9.9, only: 3.0.2."
            message = re.sub(r"^Failed to construct .*?}\": ", "", str(error)).partition("\n")[0]
        raise UsageError(message) from None


def prepare_command(name: str, data_dir: str | None) -> str:
    """Returns the command line that prepares a dataset."""
    command = ["python", "-m", "aim_flax.cli.prepare", name]
    return shlex.join([*command, "--data_dir", data_dir] if data_dir else command)


def check_format(builder: "tfds.core.DatasetBuilder", name: str, data_dir: str | None) -> None:
    """Raises UsageError unless a prepared dataset has files with random access."""
    formats = sorted(f.value for f in builder.info.available_file_formats())
    if FILE_FORMAT not in formats:
        raise UsageError(
            f"{name} is prepared in {builder.data_dir} as {', '.join(formats)}, expected"
            f" {FILE_FORMAT}; move that folder away and run: {prepare_command(name, data_dir)}"
        )


def _check_features(name: str, features: Any) -> None:
    """Raises UsageError unless examples are encoded images with one label each."""
    import tensorflow_datasets as tfds

    found = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = found.get("image"), found.get("label")
    is_image = isinstance(image, tfds.features.Image)
    if not (is_image and isinstance(label, tfds.features.ClassLabel)):
        kinds = [f"{key} ({type(found[key]).__name__})" for key in sorted(found)]
        raise UsageError(
            f"{name} has the features {', '.join(kinds) or features}, expected image (Image) and"
            " label (ClassLabel)"
        )
    if image.np_dtype not in (np.uint8, np.uint16) or len(image.shape) != 3:
        raise UsageError(
            f"{name}'s images are {image}, expected (height, width, channels) of 8 or 16 bits"
        )
    if not label.names:
        raise UsageError(f"{name} doesn't say how many classes it has")
