"""What every experiment starts from: all options, each with the value that it has unless the
experiment or a flag sets another.

`from . import base` finds this file from any folder that has no base.py of its own.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder


class Derived(FieldReference):
    """A pattern that follows from a network's sizes, also from those that flags set later.

    Args:
      model: the config of the network.
      rule: from that to the pattern.
    """

    def __init__(self, model: ConfigDict, rule: Callable[[ConfigDict], str]):
        super().__init__("", str)
        self._model, self._rule = model, rule

    def get(self) -> str:
        return super().get() if self._rule is None else self._rule(self._model)

    def set(self, value: Any, type_safe: bool = True) -> None:
        super().set(value, type_safe)
        self._rule = None  # A value of its own stays, whatever the sizes become.

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # FieldReference would leave out what it doesn't know.


def number(*sizes: int) -> str:
    """Returns the pattern of a number up to the largest size."""
    return r"\d" if max(sizes, default=0) < 10 else r"\d+"


def block(model: ConfigDict) -> str:
    """Returns the pattern of a ResNet's blocks."""
    stages = model.stage_sizes
    return f"stage{number(len(stages))}_block{number(*stages)}"


def later_block(model: ConfigDict) -> str:
    """Returns the pattern of what reads in a ResNet's blocks but for the first of each stage; "" if
    there are none."""
    stages = model.stage_sizes
    if max(stages, default=0) < 2:
        return ""
    later = "[2-9]" if max(stages) < 10 else r"(?!1\b)\d+"
    return f"stage{number(len(stages))}_block{later}/conv1"


def start(name: str, arm: str, model: str, **fields: Any) -> ConfigDict:
    """Returns a config with all options, locked: values can be set, but no option can be added.

    Args:
      name: of the experiment, that of its file.
      arm: one of the experiment's arms.
      model: "mlp", "resnet", "vgg" or "efficientnet_lite", or "package.module:Class" for a network
        from elsewhere. The config has the options of this network only.
      **fields: options of a network from elsewhere.
    """
    config = ConfigDict()
    config.name = name
    config.arm = arm
    config.seed = 0
    config.dtype = "float32"  # of the computation: float32 or bfloat16
    config.parallel = "pmap"  # or shard_map

    config.data = ConfigDict()
    config.data.name = "folder"  # or tfds:NAME, digits
    config.data.image_shape = (224, 224, 3)  # height, width, 3 channels or 1 (grey)
    config.data.scale = 255.0  # pixels are divided by it;
    config.data.mean = ()  # then this is subtracted from each channel, (): nothing,
    config.data.deviation = ()  # and each is divided by this
    # The rest is not for digits, which are not read from files and have splits of their own.
    config.data.dir = ""  # the folder; of TFDS, where it prepared the dataset ("": its own place)
    config.data.formats = "usual"  # jpg, png, webp; or all: what Pillow reads
    config.data.fit = "stretch"  # or crop: how other proportions are brought to the shape
    config.data.centre = 1.0  # share of its height and width, in the middle, that is used
    config.data.val_fraction = 0.1  # of train, held out where there is no validation split
    config.data.test_fraction = 0.2  # of a folder without any splits
    config.data.train_images = placeholder(int)  # training images to use, a fixed choice; None: all
    config.data.in_memory_mb = 1024.0  # decode all images at once up to this many MiB, else stream
    config.data.threads = 4  # that decode
    config.data.on_error = "stop"  # or skip: leave damaged images out, and count them

    # Random changes to training images, of which roll is for evaluation, too; zero and False: not
    # done.
    config.augment = ConfigDict()
    config.augment.crop = 0.0  # smallest share of the image's area
    config.augment.rotation = 0.0  # at most, in turns, either way
    config.augment.translation = 0.0  # at most, as a share of height and width, either way
    config.augment.shift = 0  # at most, in whole pixels, either way
    config.augment.flip_horizontal = False
    config.augment.flip_vertical = False
    config.augment.contrast = 0.0  # 0.1: distances from the mean are multiplied by 0.9 to 1.1
    # Shifts images around by any offset: what leaves at one edge comes in at the other. In
    # evaluation the offset follows from the seed and the image's index.
    config.augment.roll = False

    config.model = ConfigDict()
    config.model.name = model
    config.model.num_classes = placeholder(int)  # None: as many as the dataset has
    # What training starts from, SOURCE:FILE or SOURCE:NAME: see docs/pretrained.md. As a flag it
    # sets what those weights expect of the network and its input, too. None: random values.
    config.model.pretrained = placeholder(str)
    config.model.update(fields)

    # As published, except for the shape, which each experiment sets. A network without memory has
    # None in place of this group.
    config.memory = ConfigDict()
    config.memory.kind = "conv"  # or dense, direct; noise and zero are controls
    config.memory.shape = ()  # rows, columns, channels; of a dense memory, channels only
    config.memory.kernel_size = 1  # of the kind conv
    config.memory.read = ""  # the layers that read it, a regular expression of their paths
    config.memory.read_initial = ""  # those of them that read a second memory, never updated
    # Beginnings of paths, such as ("stage1", "stage2"): the layers that have one in common share a
    # memory of that shape. (): all share one.
    config.memory.per = ()
    config.memory.read_mode = "concat"  # or add, scale, attend
    config.memory.fit = "reshape"  # or resize: how it takes the size of a map
    config.memory.zero_init = False  # True, not with concat: starts equal to the plain network
    config.memory.update_after = ""  # the modules after which it is rewritten; "": never
    config.memory.update_block = ConfigDict()
    config.memory.update_block.features = (16, 16, 32)
    config.memory.update_block.kernel_size = 3  # of a memory with rows and columns
    config.memory.update_block.form = "published"  # or erase_add, attend: by slots
    config.memory.update_block.mode = "replace"  # or residual, gated
    config.memory.update_block.pool = placeholder(str)  # mean, causal: of several positions
    config.memory.update_block.momentum = 0.99  # of the batch norms
    config.memory.update_block.epsilon = 1e-3
    config.memory.carry = "weights"  # or state: what was written goes on to the next batch
    config.memory.carry_rate = 0.1  # of state
    config.memory.learning_rate_scale = 1.0  # of the memory's own parameters; 0: never learned

    # Of a network without memory: something else at the layers that could read one.
    config.instead = ConfigDict()
    # coords, position_bias, squeeze_excite, low_rank; None: nothing.
    config.instead.kind = placeholder(str)
    config.instead.at = ""  # the layers, a regular expression of their paths
    # Of squeeze_excite the gates' hidden sizes, of low_rank the ranks: one for all layers, or one
    # for each, in the order of the calls; (): a 16th of a layer's channels.
    config.instead.hidden = ()
    config.instead.stddev = 0.0  # of position_bias: that of its normal initial values
    # Of squeeze_excite: gates start at 1, and the network as it is without them.
    config.instead.zero_init = False

    if model == "mlp":
        config.model.features = (256, 256)  # of each hidden layer
        config.model.activation = "relu"  # or gelu, sigmoid, tanh
        config.model.batch_norm = False
        config.model.dropout = 0.0
        config.memory.read = r"layer\d+/dense|head"
        config.memory.update_after = Derived(
            config.model, lambda model: r"layer\d+" if model.features else ""
        )
    elif model == "resnet":
        config.model.stage_sizes = (3, 4, 6, 3)  # blocks in each stage
        config.model.width = 64  # channels of the stem and stage 1; each further stage doubles it
        config.model.stem = "imagenet"  # or cifar: 3x3, no pool
        config.model.stem_stride = 2  # of imagenet
        config.model.conv_bias = True
        config.model.momentum = 0.99  # of the batch norms
        config.model.epsilon = 1e-3
        config.model.stride_on = "conv1"  # or conv2: which of a block's convolutions has its stride
        config.model.pointwise = "einsum"  # or conv: how convolutions are computed on CPU
        config.memory.read = Derived(config.model, lambda model: f"{block(model)}/conv1")
        config.memory.read_initial = Derived(config.model, later_block)
        config.memory.update_after = r"stage[123]_block1"
    elif model == "vgg":
        config.model.stage_sizes = (2, 2, 3, 3, 3)  # convolutions in each stage
        config.model.widths = (64, 128, 256, 512, 512)  # of the stages
        config.model.dense_sizes = (4096, 4096)
        config.model.pooling = "flatten"  # or global, grid
        config.model.dense_norm = True  # a batch norm before the dense layers
        config.model.batch_norm = False  # after each convolution
        config.model.momentum = 0.99  # of the batch norms
        config.model.epsilon = 1e-3
        config.memory.read = Derived(
            config.model,
            lambda model: (
                f"stage{number(len(model.stage_sizes))}_conv{number(*model.stage_sizes)}"
                f"|dense{number(len(model.dense_sizes))}|head"
            ),
        )
        config.memory.update_after = r"stage[1-4]_pool"

    elif model == "efficientnet_lite":
        config.model.stage_sizes = (1, 2, 2, 3, 3, 4, 1)  # blocks in each stage
        config.model.widths = (16, 24, 40, 80, 112, 192, 320)  # of the stages
        config.model.stem_width = 32
        config.model.top_width = 1280  # of the last convolution
        config.model.dropout = 0.2
        config.model.momentum = 0.99  # of the batch norms
        config.model.epsilon = 1e-3
        config.memory.read = r"stage\d_block\d/expand"
        config.memory.update_after = r"stage[3-6]_block1"

    # None is left to optax. An optimiser refuses an option that it does not take.
    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"  # or adamw, sgd
    config.optimizer.learning_rate = 1e-3
    config.optimizer.b1 = placeholder(float)  # adam, adamw
    config.optimizer.b2 = placeholder(float)  # adam, adamw
    config.optimizer.eps = placeholder(float)  # adam, adamw
    config.optimizer.weight_decay = placeholder(float)  # adamw
    config.optimizer.momentum = placeholder(float)  # sgd
    config.optimizer.nesterov = placeholder(bool)

    config.schedule = ConfigDict()
    config.schedule.name = "constant"  # or cosine, down to 0
    config.schedule.warmup_epochs = 0.0  # up from 0
    # The batch size that the learning rate is meant for: it is multiplied by train.batch_size over
    # this. Where that is more than 1 it rises there over the first 5 epochs, or, if they are set,
    # over schedule.warmup_epochs from 0. None: the learning rate is taken as it is.
    config.schedule.reference_batch = placeholder(int)
    config.schedule.plateau_patience = placeholder(int)  # epochs before a cut; None: no cuts
    config.schedule.plateau_factor = 0.1  # of a cut
    config.schedule.plateau_min_delta = 1e-4  # of accuracy: a smaller gain is none

    config.train = ConfigDict()
    config.train.batch_size = 64  # over all devices
    config.train.epochs = 30
    # Equal parts that each device computes its share of a batch in, one after the other, so that a
    # batch needs as little memory as a part. Gradients are those of the whole batch; batch norms
    # see a part at a time, and so do updates of a memory that is carried by state.
    config.train.accumulate = 1
    # Modules whose activations are computed again in the backward pass instead of being kept, a
    # regular expression of their paths; "": none. It takes less memory and more time.
    config.train.remat = ""
    # Of an exponential moving average of the network's variables after each step, such as 0.999:
    # what is then evaluated, kept and exported instead of the network itself. None: none.
    config.train.ema_decay = placeholder(float)
    # Parameters that keep their values, a regular expression of their whole paths; "": none. Batch
    # norms that are frozen use, and keep, their running statistics.
    config.train.freeze = ""
    config.train.rates = ()  # "PATTERN=FACTOR": of the learning rate; the first that matches
    config.train.stop_patience = placeholder(int)  # epochs; None: no early stopping
    config.train.stop_min_delta = 1e-3  # of accuracy: a smaller gain is none
    # Most steps in one compiled call, within an epoch. Where data is in memory, more of them take
    # less time to start, as of an MLP on CPU. XLA on CPU computes convolutions in loops several
    # times slower.
    config.train.steps_per_call = 1
    # Of uneven classes: weights (rare ones count more in the loss) or sampling (all come equally
    # often).
    config.train.balance = "none"
    # Looks at the numbers of every layer, and stops at the first that is not finite with its name;
    # slower. A run can be continued with it.
    config.train.detect_anomaly = False
    config.train.checkpoint_minutes = 10.0  # between checkpoints; also at the end, and on a signal

    config.eval = ConfigDict()
    config.eval.batch_size = 500  # over all devices
    config.eval.select_on = "val"  # or test: the split that picks the best checkpoint
    return config.lock()
