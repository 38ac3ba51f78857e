"""CIFAR-10, a ResNet with the stem for small images, with and without memory.

python -m aim_flax.cli.prepare cifar10                        # once, with the extra `prepare`
python train.py --config configs/cifar10_resnet.py             # the arm `aim`
python train.py --config configs/cifar10_resnet.py:control

From a folder instead, <dir>/{train,test}/<class>/*.png:

python train.py --config configs/cifar10_resnet.py --config.data.name=folder --config.data.dir=DIR
"""

from . import base

ARMS = ("aim", "control", "aim_no_update")


def get_config(arm: str = "aim") -> base.ConfigDict:
    config = base.start("cifar10_resnet", arm, "resnet")
    config.data.update(name="tfds:cifar10", image_shape=(32, 32, 3))
    config.augment.update(shift=4, flip_horizontal=True)
    config.model.update(num_classes=10, stage_sizes=(2, 2, 2, 2))
    config.model.update(stem="cifar", stem_stride=1, conv_bias=False)
    config.optimizer.update(name="adamw", weight_decay=0.05)
    config.schedule.update(name="cosine", warmup_epochs=1.0)
    config.train.batch_size = 128
    if arm == "control":
        config.memory = None
        return config
    # Wired as published, which gained more than what starts from zero: docs/does_memory_help.md.
    config.memory.shape = (4, 4, 256)
    if arm == "aim_no_update":
        config.memory.update_after = ""
    return config
