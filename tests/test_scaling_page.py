"""docs/scaling.md: its commands are ones that train.py takes, and its numbers those of the code."""

import csv
import importlib
import re
import shlex

import pytest
import yaml

from aim_flax.cli import train as train_command
from aim_flax.console import ENDS
from aim_flax.train import processes
from aim_flax.watch import LOST
from tests.runs import ROOT

PAGE = (ROOT / "docs" / "scaling.md").read_text()
BLOCKS = dict(bash=[], yaml=[])
for language, block in re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL):
    BLOCKS[language].append(block)
# What comes before the flags, and ends them; a quoted command is one within another.
COMMAND = re.compile(r'(?:python train\.py|aim-flax train) ([^&;"\n]*)')
COMMANDS = [flags for block in BLOCKS["bash"] for flags in COMMAND.findall(block)]


def kubernetes() -> tuple[dict, dict]:
    (block,) = BLOCKS["yaml"]
    return tuple(yaml.safe_load_all(block))


(CONTAINER,) = kubernetes()[1]["spec"]["template"]["spec"]["containers"]
COMMANDS += COMMAND.findall(CONTAINER["args"][0])


def test_there_is_one_for_each_place():
    assert len(COMMANDS) == 13
    assert sum("--distributed" in flags for flags in COMMANDS) == 4


@pytest.mark.parametrize("flags", COMMANDS)
def test_commands_are_taken(flags, monkeypatch):
    described = []
    describe = lambda config, devices: described.append(1)  # noqa: E731
    monkeypatch.setattr("aim_flax.train.describe.describe_training", describe)
    costed = lambda config, names, images: described.append(1)  # noqa: E731
    monkeypatch.setattr("aim_flax.train.compile_for.compile_for", costed)
    # What a shell puts in their place.
    argv = shlex.split(re.sub(r"\$\w+", "1", flags).replace("configs/", f"{ROOT}/configs/"))
    train_command.main(argv if "--compile-for" in argv else [*argv, "--describe"])
    assert len(described) == 1


def test_kubernetes_pods_find_process_0_and_start_again():
    service, job = kubernetes()
    spec = job["spec"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    coordinator = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--coordinator {coordinator}:" in CONTAINER["args"][0]
    assert f"--processes {spec['completions']} " in CONTAINER["args"][0]
    assert spec["completions"] == spec["parallelism"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [1, 2]


def test_numbers_are_those_of_the_code():
    assert f"no sign of life for {processes.SILENCE} s" in PAGE
    assert f"status {LOST}" in PAGE
    statuses = {
        int(n) for row in re.findall(r"^\| ([\d, ]+) \|", PAGE, re.M) for n in row.split(",")
    }
    assert statuses == {0, 1, 2, LOST, 137, *(128 + signum for signum in ENDS)}
    (script,) = [block for block in BLOCKS["bash"] if "#SBATCH" in block]
    assert f"{LOST} | 137 | 143)" in script


def test_the_table_of_topologies_is_that_of_its_file(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    of_topologies = importlib.import_module("topologies")
    with (ROOT / "results" / "tpu_topologies.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    places = of_topologies.TOPOLOGIES.split(",")
    wanted = [(arm, place) for place in places for arm in ("published", "aim", "control_stride1")]
    assert [(row["arm"], row["topology"]) for row in rows] == wanted
    table = of_topologies.table(rows)
    assert f"<!-- results/tpu_topologies.csv -->\n{table}\n" in PAGE


def test_links_and_tests_exist():
    for name in re.findall(r"tests/\w+\.py", PAGE):
        assert (ROOT / name).is_file(), name
