"""The published experiment, ResNet50 on Stanford Dogs with and without memory, and its controls.

`published` and `control` are the author's two runs: their stems differ in stride, so the network
with memory works at twice the resolution of the one without, and both are selected on the test
split. `control_stride1` is `published` without memory: it decides what the memory does, where both
select on the same images (--config.data.val_fraction=0.1 --config.eval.select_on=val). The other
arms have its resolution too, but for `aim_stride2`, which has `control`'s.

    python train.py --config configs/stanford_dogs_resnet50.py:control_stride1 --describe

The article's figures, one run each: 20.06 % with memory, 328 s an epoch; 15.14 % without, 164 s
(test accuracy, hardware not stated).
"""

from . import base

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


def get_config(arm: str = "published") -> base.ConfigDict:
    config = base.start("stanford_dogs_resnet50", arm, "resnet")
    config.data.update(name="tfds:stanford_dogs", scale=1.0)  # pixels from 0 to 255, as published
    config.augment.update(rotation=0.15, translation=0.1, contrast=0.1)
    config.augment.update(flip_horizontal=True, flip_vertical=True)
    config.model.num_classes = 120
    config.model.stem_stride = 2 if arm in ("control", "aim_stride2") else 1
    config.optimizer.eps = 1e-7
    config.schedule.plateau_patience = 3
    config.train.update(batch_size=16, epochs=50, stop_patience=7)
    config.eval.batch_size = 64
    if arm in ("published", "control"):
        # As the author did, who held out nothing.
        config.data.val_fraction = 0.0
        config.eval.select_on = "test"
    if arm.startswith("control"):
        config.memory = None
        return config
    config.memory.shape = (7, 7, 1024)
    if arm != "published":
        config.memory.update(kind="direct", read_initial="", read_mode="add", zero_init=True)
    if arm == "aim_no_update":
        config.memory.update_after = ""
    if arm == "aim_state":
        config.memory.carry = "state"
    if arm == "aim_every_conv":
        config.memory.read = base.Derived(
            config.model, lambda model: rf"stem/conv|{base.block(model)}/(conv\d|shortcut)"
        )
    if arm == "aim_kernel7":
        config.memory.update(kind="conv", kernel_size=7)
    return config
