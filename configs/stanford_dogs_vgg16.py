"""VGG16 on Stanford Dogs, with the author's head, with and without memory.

The author's control diverged at a learning rate of 1e-2: it printed a validation loss of 2.8e13.
Here it is 1e-4. In `aim` each convolution and each dense layer reads the memory, and it is updated
after the first four pooling stages.

    python train.py --config configs/stanford_dogs_vgg16.py:control --describe
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

ARMS = ("control", "aim")


def get_config(arm: str = "control") -> ConfigDict:
    config = ConfigDict()
    config.name = "stanford_dogs_vgg16"
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
    config.data.val_fraction = 0.1  # of train, held out where there is no validation split
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
    config.model.name = "vgg"
    config.model.num_classes = 120
    config.model.stage_sizes = (2, 2, 3, 3, 3)
    config.model.widths = (64, 128, 256, 512, 512)
    config.model.dense_sizes = (4096, 4096)
    config.model.pooling = "flatten"  # or global
    config.model.batch_norm = False

    config.memory = None
    if arm == "aim":
        config.memory = ConfigDict()
        config.memory.kind = "direct"
        config.memory.shape = (7, 7, 1024)
        config.memory.read = r"stage\d_conv\d|dense\d|head"
        config.memory.read_initial = ""
        config.memory.read_mode = "add"
        config.memory.zero_init = True
        config.memory.update_after = r"stage[1-4]_pool"
        config.memory.carry = "weights"
        config.memory.carry_rate = 0.1

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"
    config.optimizer.learning_rate = 1e-4
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
    config.eval.select_on = "val"  # the split that picks the best checkpoint
    return config
