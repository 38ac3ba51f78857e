"""From a config to the dataset it names."""

from ml_collections import ConfigDict

from aim_flax.data.digits import load_digits
from aim_flax.data.in_memory import Dataset
from aim_flax.errors import UsageError, check_choice

DATASETS = {"digits": load_digits}


def load_dataset(config: ConfigDict) -> Dataset:
    """Returns the dataset of `config.data`, checked against what the config says of it."""
    check_choice("data.name", config.data.name, DATASETS)
    dataset = DATASETS[config.data.name]()
    shape = dataset.splits["train"].images.shape[1:]
    if tuple(config.data.image_shape) != shape:
        raise UsageError(
            f"data.image_shape is {tuple(config.data.image_shape)}, but {config.data.name} has"
            f" images of {shape}"
        )
    if config.model.num_classes != len(dataset.classes):
        raise UsageError(
            f"model.num_classes is {config.model.num_classes}, but {config.data.name} has"
            f" {len(dataset.classes)} classes"
        )
    return dataset
