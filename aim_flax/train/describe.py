"""What training a config's network takes, and what the network is: nothing is computed."""

from ml_collections import ConfigDict

from aim_flax.data.load import open_dataset, with_classes
from aim_flax.devices import Devices
from aim_flax.models.describe import describe
from aim_flax.train.cost_report import state_report
from aim_flax.train.costs import state_sizes
from aim_flax.train.experiment import abstract_state_from


def describe_training(config: ConfigDict, device_count: int | None) -> str:
    """Returns what `models.describe.describe` does, and a line of the bytes that training holds.

    Args:
      device_count: how many devices; None for all.
    """
    if config.model.num_classes is None:
        config = with_classes(config, open_dataset(config).classes)
    text, variables = describe(config)
    sizes = state_sizes(abstract_state_from(config, variables))
    return f"{text}\n{state_report(sizes, Devices(config.parallel, device_count))}"
