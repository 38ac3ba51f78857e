"""The published experiment, ResNet50 on Stanford Dogs with and without memory, and its controls.

`published` and `control` are the author's two runs: their stems differ in stride, so the network
with memory works at twice the resolution of the one without, and both are selected on the test
split. `control_stride1` is `published` without memory: it decides what the memory does. The other
arms have its resolution too, but for `aim_stride2`, which has `control`'s.

    python train.py --config configs/stanford_dogs_resnet50.py:control_stride1 --describe

The article's figures, one run each: 20.06 % with memory, 328 s an epoch; 15.14 % without, 164 s
(test accuracy, hardware not stated).
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

ARMS = (
    "published",
    "control",
    "control_stride1",
    "aim",
    "aim_no_update",
    "aim_every_conv",
    "aim_state",
    "aim_kernel7",
    "aim_stride2",
)


def get_config(arm: str = "published") -> ConfigDict:
    config = ConfigDict()
    config.name = "stanford_dogs_resnet50"
    config.arm = arm
    config.seed = 0
    config.dtype = "float32"  # of the computation: float32 or bfloat16
    config.parallel = "pmap"  # or shard_map

    config.data = ConfigDict()
    config.data.name = "tfds:stanford_dogs"  # or tfds:NAME, folder, digits
    config.data.dir = ""  # the folder; of TFDS, where it prepared the dataset ("": its own place)
    config.data.image_shape = (224, 224, 3)  # height, width, 3 channels or 1 (grey)
    config.data.scale = 1.0  # pixels are divided by it; published: 0 to 255 as they are
    config.data.fit = "stretch"  # or crop: how other proportions are brought to the shape
    # Of train, held out where there is no validation split; the author held out nothing.
    config.data.val_fraction = 0.0 if arm in ("published", "control") else 0.1
    config.data.test_fraction = 0.2  # of a folder without any splits
    config.data.train_images = placeholder(int)  # None: all; else a fixed choice of so many
    config.data.in_memory_mb = 1024.0  # decode all images at once up to so many MiB, else stream
    config.data.threads = 4  # that decode
    config.data.on_error = "stop"  # or skip: leave damaged images out, and count them

    config.augment = ConfigDict()
    config.augment.rotation = 0.15  # turns either way
    config.augment.translation = 0.1  # of height and width
    config.augment.flip_horizontal = True
    config.augment.flip_vertical = True
    config.augment.contrast = 0.1

    config.model = ConfigDict()
    config.model.name = "resnet"
    config.model.num_classes = 120
    config.model.stage_sizes = (3, 4, 6, 3)
    config.model.width = 64
    config.model.stem = "imagenet"
    config.model.stem_stride = 2 if arm in ("control", "aim_stride2") else 1
    config.model.conv_bias = True
    config.model.pointwise = "einsum"  # or conv: how 1x1 convolutions are computed

    config.memory = None if arm.startswith("control") else _memory(arm)

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.eps = 1e-7

    config.schedule = ConfigDict()
    config.schedule.name = "constant"  # or cosine
    config.schedule.warmup_epochs = 0.0
    config.schedule.plateau_patience = 3  # epochs
    config.schedule.plateau_factor = 0.1
    config.schedule.plateau_min_delta = 1e-4

    config.train = ConfigDict()
    config.train.batch_size = 16  # over all devices
    config.train.epochs = 50
    config.train.stop_patience = 7  # epochs
    config.train.stop_min_delta = 1e-3
    config.train.steps_per_call = 1  # most steps in one compiled call, within an epoch
    config.train.checkpoint_minutes = 10.0  # between checkpoints within an epoch

    config.eval = ConfigDict()
    config.eval.batch_size = 64
    # The split that picks the best checkpoint: as the author did, or properly.
    config.eval.select_on = "test" if arm in ("published", "control") else "val"
    return config


def _memory(arm: str) -> ConfigDict:
    memory = ConfigDict()
    memory.shape = (7, 7, 1024)
    memory.read = r"stage\d_block\d/conv1"
    memory.update_after = r"stage[123]_block1"
    memory.carry = "weights"
    memory.carry_rate = 0.1
    if arm == "published":
        memory.kind = "conv"
        memory.kernel_size = 1
        memory.read_mode = "concat"
        memory.zero_init = False
        # All but a stage's first block read a second memory, which is never updated.
        memory.read_initial = r"stage\d_block[2-9]/conv1"
        return memory
    memory.kind = "direct"
    memory.read_mode = "add"
    memory.zero_init = True
    memory.read_initial = ""
    if arm == "aim_no_update":
        memory.update_after = ""
    elif arm == "aim_every_conv":
        memory.read = r"stem/conv|stage\d_block\d/(conv\d|shortcut)"
    elif arm == "aim_state":
        memory.carry = "state"
    elif arm == "aim_kernel7":
        memory.kind = "conv"
        memory.kernel_size = 7
    return memory
