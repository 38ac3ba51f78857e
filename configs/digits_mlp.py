"""scikit-learn's handwritten digits (1,797 scans of 8x8 pixels), an MLP with and without memory.

python train.py --config configs/digits_mlp.py           # the arm `aim`
python train.py --config configs/digits_mlp.py:control
"""

from . import base

ARMS = ("aim", "control", "aim_no_update", "aim_state", "aim_direct")


def get_config(arm: str = "aim") -> base.ConfigDict:
    config = base.start("digits_mlp", arm, "mlp")
    config.data.update(name="digits", image_shape=(8, 8, 1), scale=16.0)
    config.model.num_classes = 10
    config.train.update(epochs=40, steps_per_call=100)
    config.eval.batch_size = 360
    if arm == "control":
        config.memory = None
        return config
    config.memory.update(kind="direct" if arm == "aim_direct" else "dense", shape=(64,))
    if arm == "aim_no_update":
        config.memory.update_after = ""
    if arm == "aim_state":
        config.memory.carry = "state"
    return config
