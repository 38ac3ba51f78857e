"""CIFAR-10, a ResNet with the stem for small images, with and without memory.

python -m aim_flax.cli.prepare cifar10                        # once, with the extra `prepare`
python train.py --config configs/cifar10_resnet.py             # the arm `aim`
python train.py --config configs/cifar10_resnet.py:control

From a folder instead, <dir>/{train,test}/<class>/*.png:

python train.py --config configs/cifar10_resnet.py --config.data.name=folder --config.data.dir=DIR
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

ARMS = ("aim", "control", "aim_no_update")


def get_config(arm: str = "aim") -> ConfigDict:
    config = ConfigDict()
    config.name = "cifar10_resnet"
    config.arm = arm
    config.seed = 0
    config.dtype = "float32"  # of the computation: float32 or bfloat16
    config.parallel = "pmap"  # or shard_map

    config.data = ConfigDict()
    config.data.name = "tfds:cifar10"  # or tfds:NAME, folder, digits
    config.data.dir = ""  # the folder; of TFDS, where it prepared the dataset ("": its own place)
    config.data.image_shape = (32, 32, 3)  # height, width, 3 channels or 1 (grey)
    config.data.scale = 255.0  # pixels are divided by it
    config.data.fit = "stretch"  # or crop: how other proportions are brought to the shape
    config.data.val_fraction = 0.1  # of train, held out where there is no validation split
    config.data.test_fraction = 0.2  # of a folder without any splits
    config.data.train_images = placeholder(int)  # None: all; else a fixed choice of so many
    config.data.in_memory_mb = 1024.0  # decode all images at once up to so many MiB, else stream
    config.data.threads = 4  # that decode
    config.data.on_error = "stop"  # or skip: leave damaged images out, and count them

    config.augment = ConfigDict()
    config.augment.shift = 4  # whole pixels either way
    config.augment.flip_horizontal = True

    config.model = ConfigDict()
    config.model.name = "resnet"
    config.model.num_classes = 10
    config.model.stage_sizes = (2, 2, 2, 2)
    config.model.width = 64
    config.model.stem = "cifar"
    config.model.stem_stride = 1
    config.model.conv_bias = False
    config.model.pointwise = "einsum"  # or conv: how 1x1 convolutions are computed

    config.memory = None if arm == "control" else _memory(arm)

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # or adam, sgd
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05

    config.schedule = ConfigDict()
    config.schedule.name = "cosine"  # or constant
    config.schedule.warmup_epochs = 1.0
    config.schedule.plateau_patience = placeholder(int)  # epochs; None: no cuts
    config.schedule.plateau_factor = 0.1
    config.schedule.plateau_min_delta = 1e-4

    config.train = ConfigDict()
    config.train.batch_size = 128  # over all devices
    config.train.epochs = 30
    config.train.stop_patience = placeholder(int)  # epochs; None: no early stopping
    config.train.stop_min_delta = 1e-3
    # Most steps in one compiled call, within an epoch. On a GPU 50 are quicker, where data is in
    # memory; XLA on CPU computes convolutions in loops several times slower.
    config.train.steps_per_call = 1
    config.train.checkpoint_minutes = 10.0  # between checkpoints within an epoch

    config.eval = ConfigDict()
    config.eval.batch_size = 500
    config.eval.select_on = "val"  # the split that picks the best checkpoint
    return config


def _memory(arm: str) -> ConfigDict:
    memory = ConfigDict()
    # Wired as published, which gained more than what starts from zero: docs/does_memory_help.md.
    memory.kind = "conv"  # or direct
    memory.kernel_size = 1
    memory.shape = (4, 4, 256)
    memory.read = r"stage\d_block\d/conv1"
    # All but a stage's first block read a second memory, which is never updated.
    memory.read_initial = r"stage\d_block[2-9]/conv1"
    memory.read_mode = "concat"  # or add, scale
    memory.zero_init = False  # True: the network starts out equal to `control`
    memory.update_after = "" if arm == "aim_no_update" else r"stage[123]_block1"
    memory.update_block = ConfigDict({"mode": "replace"})  # or residual, gated
    memory.carry = "weights"  # or state
    memory.carry_rate = 0.1
    memory.learning_rate_scale = 1.0  # of the memory's own parameters; 0: never learned
    return memory
