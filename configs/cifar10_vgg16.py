"""CIFAR-10, VGG16 with batch norm, with and without memory.

python -m aim_flax.cli.prepare cifar10                        # once, with the extra `prepare`
python train.py --config configs/cifar10_vgg16.py              # the arm `aim`
python train.py --config configs/cifar10_vgg16.py:control

From a folder instead, <dir>/{train,test}/<class>/*.png:

python train.py --config configs/cifar10_vgg16.py --config.data.name=folder --config.data.dir=DIR
"""

from . import base

ARMS = ("aim", "control", "aim_no_update")


def get_config(arm: str = "aim") -> base.ConfigDict:
    config = base.start("cifar10_vgg16", arm, "vgg")
    config.data.update(name="tfds:cifar10", image_shape=(32, 32, 3))
    config.augment.update(shift=4, flip_horizontal=True)
    config.model.update(num_classes=10, dense_sizes=(512, 512), batch_norm=True)
    config.optimizer.update(name="adamw", learning_rate=5e-4, weight_decay=0.05)
    config.schedule.update(name="cosine", warmup_epochs=1.0)
    config.train.batch_size = 128
    if arm == "control":
        config.memory = None
        return config
    config.memory.update(kind="direct", shape=(4, 4, 256), read_mode="add", zero_init=True)
    if arm == "aim_no_update":
        config.memory.update_after = ""
    return config
