"""A folder with all that `test_wrong_use.py` uses wrongly: configs, images, runs and studies."""

import dataclasses
import json
import os
from pathlib import Path

from ml_collections import ConfigDict

from aim_flax import config as configs
from aim_flax.study.results import COLUMNS
from aim_flax.train import dataset_record
from aim_flax.train.checkpoint import Checkpoints
from aim_flax.train.experiment import Experiment
from aim_flax.train.progress import Progress
from tests.photos import FOLDER_CONFIG, small, write_folder
from tests.runs import DIGITS, ROOT, SMALL

START = """
from . import base
ARMS = ("aim", "control")
def get_config(arm):
    config = base.start("mine", arm, "mlp")
    config.data.update(name="digits", image_shape=(8, 8, 1), scale=16.0)
    config.memory = None
"""
_OWN = START.replace('"mlp"', '"{0}", width=8')
CONFIGS = {
    "syntax": "ARMS = ('aim',\ndef get_config(arm):\n    return 3\n",
    "indent": "ARMS = ('aim',)\ndef get_config(arm):\nreturn 3\n",
    "missing_import": "import nothing_of_that_name\n" + START,
    "missing_base": START.replace("base\n", "bass\n", 1),
    "no_get_config": "ARMS = ('aim',)\n",
    "no_arms": START.replace("ARMS", "ARM") + "    return config\n",
    "empty_arms": START.replace('("aim", "control")', "()") + "    return config\n",
    "arms_text": START.replace('("aim", "control")', '"aim"') + "    return config\n",
    "arms_numbers": START.replace('("aim", "control")', "(1, 2)") + "    return config\n",
    "get_config_number": "ARMS = ('aim',)\nget_config = 3\n",
    "returns_none": START,
    "returns_dict": START + "    return config.to_dict()\n",
    "returns_empty": START + "    return base.ConfigDict()\n",
    "returns_no_train": START + "    config.unlock()\n    del config.train\n    return config\n",
    "raises": START + "    raise ValueError('not\\ntoday')\n",
    "exits": "import sys\nsys.exit(5)\n",
    "no_argument": START.replace("(arm)", "()") + "    return config\n",
    "unknown_key": START + "    config.train.epoch = 3\n    return config\n",
    "wrong_type": START + "    config.train.epochs = 'five'\n    return config\n",
    "value_out": START + "    config.train.stop_patience = -1\n    return config\n",
    "divides": START + "    config.train.epochs = 1 // 0\n    return config\n",
    "own_module": _OWN.format("nowhere:Net") + "    return config\n",
    "own_syntax": _OWN.format("broken_net:Net") + "    return config\n",
    "own_class": _OWN.format("own_net:Nets") + "    return config\n",
    "own_function": _OWN.format("own_net:net") + "    return config\n",
    "own_field": _OWN.format("own_net:Net").replace("width", "widht") + "    return config\n",
    "own_lacks": _OWN.format("own_net:Net").replace(", width=8", "") + "    return config\n",
    "tiny": START + "    config.model.features = (8,)\n    return config\n",
}
_NET = """
from flax import linen as nn
class Net(nn.Module):
    num_classes: int
    width: int
    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(self.num_classes)(images.reshape(len(images), -1))
def net(images):
    return images
"""


def config_of(file: str, assignments: tuple[str, ...]) -> str:
    """Returns a config file that changes another one."""
    values = configs.flatten(configs.override(configs.load(file), assignments))
    changes = {key: values[key] for key in (text.partition("=")[0] for text in assignments)}
    return f"""
from aim_flax import config as configs
ARMS = configs.arms({file!r})
def get_config(arm):
    config = configs.load({file!r} + ":" + arm)
    known = configs.flatten(config)
    changes = {changes!r}
    config.update_from_flattened_dict({{k: v for k, v in changes.items() if k in known}})
    return config
"""


def make_place() -> None:
    """Makes it, in the current directory."""
    _configs()
    _folders()
    _runs()


def _configs() -> None:
    for name, text in CONFIGS.items():
        Path(f"{name}.py").write_text(text)
    Path("digits.py").write_text(config_of(DIGITS, SMALL))
    shown = small(Path("unset"))[1:]
    shown += ("memory.shape=(2,2,4)", "memory.update_block.features=(4,)")
    Path("folder.py").write_text(config_of(FOLDER_CONFIG, shown))
    vgg = str(ROOT / "configs" / "cifar10_vgg16.py")
    Path("vgg.py").write_text(config_of(vgg, ("data.name=folder", "model.num_classes=None")))
    Path("not_utf8.py").write_bytes(b"name = '\xff'\n")
    Path("zero_byte.py").write_bytes(b"ARMS = ('aim',)\0\n")
    Path("base_syntax").mkdir()
    Path("base_syntax/base.py").write_text("def start(:\n")
    Path("base_syntax/experiment.py").write_text(START + "    return config\n")
    Path("own_net.py").write_text(_NET)
    Path("broken_net.py").write_text("def (:\n")
    Path("notes.txt").write_text("no image, config, run or weights\n")
    os.mkfifo("pipe.py")


def _folders() -> None:
    write_folder(Path("photos"), train=12, val=6, test=6)
    image = Path("photos/train/class0/0000.png").read_bytes()

    def put(*paths: str, content: bytes = image) -> None:
        for path in paths:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(content)

    Path("empty").mkdir()
    put("flat/1.png", "flat/2.png")
    write_folder(Path("nested/dataset"), train=6, val=3, test=3)
    write_folder(Path("validation"), train=6, val=3, test=3)
    Path("validation/val").rename("validation/validation")
    put("no_test/train/a/1.png", "no_test/train/b/1.png", "no_test/val/a/1.png")
    put(*(f"one_class/{split}/a/{i}.png" for split in ("train", "test") for i in range(20)))
    put("gifs/train/a/1.gif", "gifs/test/a/1.gif")
    put("loop/train/a/1.png", "loop/test/a/1.png")
    os.symlink("self", "loop/train/self")
    put("extra_class/train/a/1.png", "extra_class/train/b/1.png", "extra_class/test/c/1.png")
    put("newline/train/a\nb/1.txt", "newline/test/a\nb/1.png")
    for label in ("a", "b"):
        put(*(f"flat_classes/{label}/{i}.png" for i in range(10)))
    write_folder(Path("damaged"), train=30, val=6, test=6)
    put("damaged/train/class0/0000.png", "damaged/train/class1/0001.png", content=b"")


def _runs() -> None:
    for name, arm in (("run", "aim"), ("run2", "aim"), ("control_run", "control")):
        config = configs.load(f"digits.py:{arm}")
        _write_run(Path(name), config)
        row = dict.fromkeys(COLUMNS) | {"name": "digits_mlp", "arm": arm, "seed": 0}
        row |= {"test_accuracy": 0.5, "val_accuracy": 0.5, "params": 9, "selected_on": "val"}
        Path(name, "summary.json").write_text(json.dumps(row))
    moved = configs.override(configs.load("folder.py:control"), ["data.dir=was_here"])
    with moved.unlocked():
        moved.model.num_classes = 3
    as_json = configs.to_json(configs.load("digits.py"))
    for name, text in (
        ("damaged_run", '{"seed": '),
        ("no_checkpoints", as_json),
        ("moved_run", configs.to_json(moved)),
    ):
        Path(name).mkdir()
        Path(name, "config.json").write_text(text)
    _save(Path("moved_run"), moved, write_folder(Path("was_here"), train=12, val=6, test=6))
    Path("was_here").rename("is_here")
    Path("empty_run").mkdir()
    Path("damaged_summary").mkdir()
    Path("damaged_summary/summary.json").write_text('{"name": "x"}')
    for name, arms in (("study", ("aim", "control")), ("empty_study", ())):
        folder = Path(name)
        folder.mkdir()
        study = {"name": "digits_mlp", "config": "digits.py", "reference": None, "commands": []}
        study["arms"] = {
            arm: {
                "config": json.loads(configs.to_json(configs.load(f"digits.py:{arm}"))),
                "seeds": [0],
                "overrides": [],
                "source": None,
            }
            for arm in arms
        }
        (folder / "study.json").write_text(json.dumps(study))
        for arm in arms:
            source = Path("run" if arm == "aim" else "control_run")
            (folder / arm / "0").mkdir(parents=True)
            for file in ("config.json", "summary.json"):
                (folder / arm / "0" / file).write_bytes((source / file).read_bytes())
    Path("damaged_study").mkdir()
    Path("damaged_study/study.json").write_text("{")


def _write_run(workdir: Path, config: ConfigDict) -> None:
    workdir.mkdir()
    (workdir / "config.json").write_text(configs.to_json(config))
    _save(workdir, config, None)


def _save(workdir: Path, config: ConfigDict, directory: Path | None) -> None:
    """Writes the checkpoint of a run that has not taken a step."""
    experiment = Experiment(config, 1)
    dataset_record.write(workdir, experiment.dataset.fingerprint, experiment.epoch_steps)
    progress = dataclasses.asdict(Progress(best_step=0))
    checkpoints = Checkpoints(workdir / "checkpoints")
    checkpoints.save(0, progress, experiment.initial_state())
    checkpoints.wait()
    checkpoints.close()
