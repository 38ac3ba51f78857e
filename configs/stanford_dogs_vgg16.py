"""VGG16 on Stanford Dogs, with the author's head, with and without memory.

The author's control diverged at a learning rate of 1e-2: it printed a validation loss of 2.8e13.
Here it is 1e-4. In `aim` each convolution and each dense layer reads the memory, and it is updated
after the first four pooling stages.

    python train.py --config configs/stanford_dogs_vgg16.py:control --describe
"""

from . import base

ARMS = ("control", "aim")


def get_config(arm: str = "control") -> base.ConfigDict:
    config = base.start("stanford_dogs_vgg16", arm, "vgg")
    config.data.update(name="tfds:stanford_dogs", scale=1.0)  # pixels from 0 to 255, as published
    config.augment.update(rotation=0.15, translation=0.1, contrast=0.1)
    config.augment.update(flip_horizontal=True, flip_vertical=True)
    config.model.num_classes = 120
    config.optimizer.update(learning_rate=1e-4, eps=1e-7)
    config.schedule.plateau_patience = 3
    config.train.update(batch_size=16, epochs=50, stop_patience=7)
    config.eval.batch_size = 64
    if arm == "control":
        config.memory = None
        return config
    config.memory.update(kind="direct", shape=(7, 7, 1024), read_mode="add", zero_init=True)
    return config
