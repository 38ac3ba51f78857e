"""scikit-learn's handwritten digits (1,797 scans of 8x8 pixels), an MLP with and without memory.

python train.py --config configs/digits_mlp.py           # the arm `aim`
python train.py --config configs/digits_mlp.py:control
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

ARMS = ("aim", "control", "aim_no_update", "aim_state", "aim_direct")


def get_config(arm: str = "aim") -> ConfigDict:
    config = ConfigDict()
    config.name = "digits_mlp"
    config.arm = arm
    config.seed = 0
    config.dtype = "float32"  # of the computation: float32 or bfloat16
    config.parallel = "pmap"  # or shard_map

    config.data = ConfigDict()
    config.data.name = "digits"
    config.data.image_shape = (8, 8, 1)
    config.data.scale = 16.0  # pixels are divided by it

    config.augment = None

    config.model = ConfigDict()
    config.model.name = "mlp"
    config.model.num_classes = 10
    config.model.features = (256, 256)
    config.model.activation = "relu"
    config.model.batch_norm = False
    config.model.dropout = 0.0

    config.memory = None if arm == "control" else _memory(arm)

    config.optimizer = ConfigDict()
    config.optimizer.name = "adam"  # or adamw, sgd
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = placeholder(float)  # adamw only
    config.optimizer.momentum = placeholder(float)  # sgd only

    config.schedule = ConfigDict()
    config.schedule.name = "constant"  # or cosine
    config.schedule.warmup_epochs = 0.0
    config.schedule.plateau_patience = placeholder(int)  # epochs; None: no cuts
    config.schedule.plateau_factor = 0.1
    config.schedule.plateau_min_delta = 1e-4

    config.train = ConfigDict()
    config.train.batch_size = 64  # over all devices
    config.train.epochs = 40
    config.train.stop_patience = placeholder(int)  # epochs; None: no early stopping
    config.train.stop_min_delta = 1e-3
    config.train.steps_per_call = 100  # most steps in one compiled call, within an epoch
    config.train.checkpoint_minutes = 10.0  # between checkpoints within an epoch

    config.eval = ConfigDict()
    config.eval.batch_size = 360
    config.eval.select_on = "val"  # the split that picks the best checkpoint
    return config


def _memory(arm: str) -> ConfigDict:
    memory = ConfigDict()
    memory.kind = "direct" if arm == "aim_direct" else "dense"
    memory.shape = (64,)
    memory.read = r"layer\d+/dense|head"
    memory.read_initial = ""
    memory.read_mode = "concat"  # or add, scale
    memory.zero_init = False  # with add, scale: start the read kernels at zero
    memory.update_after = "" if arm == "aim_no_update" else r"layer\d+"
    memory.update_block = ConfigDict({"features": (16, 16, 32), "mode": "replace"})
    memory.carry = "state" if arm == "aim_state" else "weights"
    memory.carry_rate = 0.1
    memory.learning_rate_scale = 1.0  # of the memory's own parameters; 0: never learned
    return memory
