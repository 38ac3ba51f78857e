"""Is it the memory, or the resolution? A small ResNet, wired and controlled as the published one.

`published` and `control` differ as the author's two networks do: the stem of the one with memory
has stride 1, that of the other stride 2. `control_stride1` is `published` without its memory.
`aim` has its memory's floats as parameters and `add` reads that start at zero; `aim_stride2` is
that at `control`'s resolution, `aim_no_update` is never rewritten, `aim_state` carries what was
written on to the next batch.

On images of 32x32 pixels, for a study of many seeds on two cores; any folder or TFDS dataset will
do:

python train.py --config configs/small_resnet.py:control_stride1 --config.data.dir=DIR
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

ARMS = (
    "published",
    "control",
    "control_stride1",
    "aim",
    "aim_no_update",
    "aim_state",
    "aim_stride2",
)


def get_config(arm: str = "published") -> ConfigDict:
    config = ConfigDict()
    config.name = "small_resnet"
    config.arm = arm
    config.seed = 0
    config.dtype = "float32"  # of the computation: float32 or bfloat16
    config.parallel = "pmap"  # or shard_map

    config.data = ConfigDict()
    config.data.name = "folder"  # or tfds:NAME
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
    config.model.num_classes = placeholder(int)  # None: as many as the dataset has
    config.model.stage_sizes = (2, 2, 2, 2)
    config.model.width = 16
    config.model.stem = "imagenet"
    config.model.stem_stride = 2 if arm in ("control", "aim_stride2") else 1
    config.model.conv_bias = True
    config.model.pointwise = "einsum"  # or conv: how 1x1 convolutions are computed

    config.memory = None if arm.startswith("control") else _memory(arm)

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
    config.train.batch_size = 64  # over all devices
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
    # As in the published network: four channels on the largest map, all on the smallest.
    memory.shape = (2, 2, 256)
    memory.read = r"stage\d_block\d/conv1"
    memory.update_after = r"stage[123]_block1"
    memory.update_block = ConfigDict({"mode": "replace"})  # or residual, gated
    memory.carry = "weights"
    memory.carry_rate = 0.1
    memory.learning_rate_scale = 1.0  # of the memory's own parameters; 0: never learned
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
    elif arm == "aim_state":
        memory.carry = "state"
    return memory
