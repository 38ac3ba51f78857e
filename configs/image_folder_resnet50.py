"""Your own photographs, ResNet50, with and without memory.

python -m aim_flax.cli.inspect DIR                            # what is in there, and what is wrong
python train.py --config configs/image_folder_resnet50.py --config.data.dir=DIR
python train.py --config configs/image_folder_resnet50.py:control --config.data.dir=DIR

DIR holds {train,val,test}/<class>/*.jpg (or png, webp); without val, a part of train is held out;
without any of the three, DIR/<class>/* is split. The number of classes is the folder's. Smaller
and quicker, for a look on a laptop:

--config.data.image_shape="(64,64,3)" --config.model.width=16 --config.model.stage_sizes="(2,1,1,1)"
"""

from . import base

ARMS = ("aim", "control", "aim_no_update")


def get_config(arm: str = "aim") -> base.ConfigDict:
    config = base.start("image_folder_resnet50", arm, "resnet")
    config.data.fit = "crop"
    config.augment.update(crop=0.25, flip_horizontal=True)
    config.model.conv_bias = False
    config.optimizer.update(name="adamw", weight_decay=0.05)
    config.schedule.update(name="cosine", warmup_epochs=1.0)
    config.train.epochs = 50
    config.eval.batch_size = 256
    if arm == "control":
        config.memory = None
        return config
    # Wired as published, which gained more than what starts from zero: docs/does_memory_help.md.
    config.memory.shape = (7, 7, 1024)
    if arm == "aim_no_update":
        config.memory.update_after = ""
    return config
