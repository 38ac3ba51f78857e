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

from . import base

ARMS = (
    "published",
    "control",
    "control_stride1",
    "aim",
    "aim_no_update",
    "aim_state",
    "aim_stride2",
)


def get_config(arm: str = "published") -> base.ConfigDict:
    config = base.start("small_resnet", arm, "resnet")
    config.data.image_shape = (32, 32, 3)
    config.augment.update(shift=4, flip_horizontal=True)
    config.model.update(stage_sizes=(2, 2, 2, 2), width=16)
    config.model.stem_stride = 2 if arm in ("control", "aim_stride2") else 1
    config.optimizer.update(name="adamw", weight_decay=0.05)
    config.schedule.update(name="cosine", warmup_epochs=1.0)
    if arm.startswith("control"):
        config.memory = None
        return config
    # As in the published network: four channels on the largest map, all on the smallest.
    config.memory.shape = (2, 2, 256)
    if arm != "published":
        config.memory.update(kind="direct", read_initial="", read_mode="add", zero_init=True)
    if arm == "aim_no_update":
        config.memory.update_after = ""
    if arm == "aim_state":
        config.memory.carry = "state"
    return config
