"""What a training step costs on chips that need not be there: names, figures, and the report."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from aim_flax.cli import train as train_command
from aim_flax.data.scaling import Scaling
from aim_flax.data.unseen import unseen
from aim_flax.devices import KINDS
from aim_flax.train import chips, topologies
from aim_flax.train.compile_for import compile_for
from aim_flax.train.cost_report import Bounds, bounds, report, scaling
from aim_flax.train.costs import Costs, TooLargeError, measure, reduced_bytes
from aim_flax.train.experiment import Experiment
from aim_flax.train.topologies import planned, present_topology
from tests.asserts import refused
from tests.runs import DIGITS, SMALL, digits, flags, load

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")

MIB = 2**20
COSTS = Costs(
    parameters=100 * MIB,
    statistics=MIB // 2,
    optimizer=200 * MIB,
    batch=4 * MIB,
    peak=6 * chips.GIB,
    multiply_adds=1_576_000_000_000,
    flops=3.152e12,
    moved=81.9e9,
    reduced=100_000_000,
    reductions=3,
    seconds=240.0,
)


def test_names_are_those_of_shapes_that_can_be_rented():
    known = list(chips.names())
    assert len(known) == len(set(known))
    for name in known:
        found = chips.topology(name)
        assert found.name == name
        assert found.count == math.prod(found.shape)
    assert {"v5e:1x1", "v5e:4x8", "v6e:16x16", "v4:2x2x1", "v5p:4x4x8", "h100:8"} <= set(known)
    largest = {"v4": 4096, "v5p": 6144, "v5e": 256, "v6e": 256}
    for generation, most in largest.items():
        counts = [chips.topology(n).count for n in known if n.startswith(f"{generation}:")]
        assert counts == sorted(counts)
        assert counts[-1] == most


@pytest.mark.parametrize(
    ("name", "links"),
    [
        # Lines along each axis longer than 1: whoever is at both ends has a link of each.
        ("v5e:1x1", 0), ("v5e:2x2", 2), ("v5e:4x8", 2), ("v4:2x2x1", 2), ("v5p:2x2x2", 3),
        # Rings: of 16 chips in a pod of v5e, of 4 and its multiples in cubes.
        ("v5e:8x16", 3), ("v6e:16x16", 4), ("v5p:2x4x4", 5), ("v4:4x4x4", 6), ("v4:4x4x12", 6),
        ("h100:1", 0), ("h200:8", 1),
    ],
)  # fmt: skip
def test_bandwidth_is_that_of_the_links_which_every_chip_has(name, links):
    found = chips.topology(name)
    assert found.bandwidth == links * found.chip.link
    assert found.chip.link == {
        "v4": 50e9, "v5e": 50e9, "v5p": 100e9, "v6e": 100e9, "h100": 450e9, "h200": 450e9,
    }[name.partition(":")[0]]  # fmt: skip


def test_all_reduce_sends_twice_what_others_lack():
    assert [chips.all_reduce_bytes(600, n) for n in (1, 2, 3, 4)] == [0, 600, 800, 900]


def test_bounds_are_each_things_work_at_its_rate():
    found = bounds(COSTS, chips.topology("v5e:2x2"))
    assert found.compute == pytest.approx(3.152 / 197)
    assert found.memory == pytest.approx(0.1)
    assert found.network == pytest.approx(1.5e8 / 100e9)
    assert (found.what, found.seconds) == ("memory", found.memory)
    assert bounds(COSTS, chips.topology("v5e:1x1")).network == 0
    untold = bounds(dataclasses.replace(COSTS, flops=None, moved=None), chips.topology("h100:2"))
    assert untold == Bounds(pytest.approx(3.152 / 989), None, pytest.approx(1e8 / 450e9))


@pytest.mark.parametrize(
    ("times", "what"),
    [
        ((3, 2, 1), "compute"),
        ((2, 3, 1), "memory"),
        ((1, 2, 3), "network"),
        ((2, None, 1), "compute"),
    ],
)
def test_what_takes_longest_bounds_a_step(times, what):
    found = Bounds(*times)
    assert found.what == what
    assert found.seconds == max(time for time in times if time)


def test_report():
    text = report(COSTS, 128, 4, chips.topology("v5e:2x2"), 16 * chips.GIB)
    assert text.splitlines() == [
        "  parameters                                100 MiB",
        "  running statistics and carried memory     512 KiB",
        "  optimiser                                 200 MiB",
        "  images and labels                           4 MiB",
        "  activations, gradients, room to work in  5.70 GiB",
        "  peak                                     6.00 GiB  38% of 16.00 GiB",
        "  multiply-adds                              1.58 T",
        "  floating-point operations                  3.15 T  16 ms at 197 TFLOP/s",
        "  moved from and to memory                  81.9 GB  100 ms at 819 GB/s",
        "  averaged over devices, in 3 operations     100 MB  1.5 ms at 100 GB/s each way",
        "  memory bounds it: a step takes 100 ms at least, 1,280 images/s at most",
        "  figures of the chip, which hold for bfloat16: cloud.google.com/tpu/docs/v5e",
    ]


def test_report_says_what_is_not_known():
    untold = dataclasses.replace(COSTS, flops=None, moved=None, peak=81 * chips.GIB)
    text = report(untold, 16, 2, chips.topology("h100:2"), 80 * chips.GIB)
    assert " 81.00 GiB  101% of 80.00 GiB: does not fit\n" in text
    assert text.count("not told") == 2
    assert (
        "compute bounds it, if memory does not: a step takes 3.19 ms at least, 5,020 images" in text
    )
    nowhere = report(untold, 16, 2, None, None)
    assert "%" not in nowhere
    assert "at least" not in nowhere
    assert nowhere.endswith("nothing is published of these devices here, so no bound is told")


def test_scaling_is_of_all_chips():
    found = {
        "v5e:2x2": (4, 128, Bounds(0.02, 0.1, 0.001)),
        "v5e:4x8": (32, 1024, Bounds(0.02, 0.1, 0.2)),
    }
    assert scaling(found).splitlines() == [
        "            chips  images/step    images/s  bound by",
        "  v5e:2x2       4          128       1,280  memory",
        "  v5e:4x8      32        1,024       5,120  network",
    ]


PROGRAM = """
  %all-reduce.3 = (f32[64]{0:T(128)}, f32[3,3,64,64]{3,2,1,0:T(8,128)}) all-reduce(%a, %b), channel_id=1
  %psum.7 = bf16[10,100]{1,0:T(8,128)S(1)} all-reduce(%fusion), to_apply=%region_0.0
  %start = f32[]{:T(128)} all-reduce-start(%c), channel_id=2
  %done = f32[]{:T(128)} all-reduce-done(%start)
  %which = pred[8]{0} all-reduce(%d)
  %fusion.1 = f32[64]{0} fusion(%all-reduce.3), calls=%x, metadata={op_name="all-reduce("}
"""  # noqa: E501


def test_all_reduced_bytes_are_read_from_the_program():
    assert reduced_bytes(PROGRAM) == [4 * (64 + 9 * 64 * 64), 2000, 4, 8]


def test_measured_on_devices_that_are_there():
    """An MLP of 85,002 parameters, 33,408 of reads, 4,160 of its memory and 16,384 of updates."""
    config = load("digits_mlp:aim")
    costs = measure(planned(config, jax.devices()[:2]))
    parameters = 138_954
    assert costs.parameters == 4 * parameters
    assert costs.statistics == 4 * 256
    assert costs.optimizer == 2 * 4 * parameters + 2 * 4  # Adam's moments, and two counts
    images = 1257
    assert costs.batch == images * (64 + 4 + 4)
    # Besides gradients, loss and accuracy: means and squares of two blocks of 64 channels, and
    # their gradients.
    assert costs.reduced == 4 * (parameters + 2 + 2 * 2 * 2 * 64)
    assert costs.peak > costs.parameters + costs.statistics + costs.optimizer + costs.batch
    forward = 64 * 256 + 256 * 256 + 256 * 10
    assert 2 * forward < costs.multiply_adds / 32 < 6 * forward
    assert costs.flops > 2 * costs.multiply_adds * 0.9
    assert costs.moved > costs.parameters


def test_step_that_does_not_fit(monkeypatch, capsys):
    said = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space"
        " hbm. Used 22.94G of 15.48G hbm. Exceeded hbm capacity by 7.46G.\n\nTotal hbm usage"
    )

    class Call:
        def trace(self, *shapes):
            return self

        lower = trace

        def compile(self):
            raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(Experiment, "train_call", lambda self, length: Call())
    with refused(exactly="needs 22.94GiB of 15.48GiB", kind=TooLargeError):
        measure(planned(digits(), jax.devices()))
    compile_for(digits(), "here")
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == "  does not fit: needs 22.94GiB of 15.48GiB; fewer images on each chip need less"
    said = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        measure(planned(digits(), jax.devices()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 8])
def test_shapes_are_those_of_what_training_has(kind, count):
    experiment = Experiment(digits("aim", f"parallel={kind}"), count)
    devices, batches = experiment.devices, experiment.train_batches
    state = devices.replicate(experiment.initial_state())
    seed = devices.replicate(np.uint32(0))
    real = (state, batches.feed(0, 0, 1).at(0), seed)
    assert_same_places(experiment.step_shapes(), real)
    rows = np.zeros((16, 3), np.uint8)
    assert_same_places(devices.abstract(rows, sharded=True), devices.shard(rows))
    streamed = unseen((4, 5, 3), classes=3, images=20).train_batches(devices, 8, Scaling(1.0), None)
    assert {n: (s.shape, s.dtype) for n, s in streamed.shapes().items()} == {
        "images": ((8, 4, 5, 3), np.uint8),
        "labels": ((8,), np.int32),
    }


def assert_same_places(shapes, arrays):
    def compare(shape, array):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)

    jax.tree.map(compare, shapes, arrays)


def test_images_need_not_be_there():
    config = load("image_folder_resnet50:control", ["model.num_classes=7", "train.batch_size=16"])
    experiment = planned(config, jax.devices())
    assert experiment.train_batches.sharded
    assert experiment.abstract_state.params["head"]["kernel"].shape == (2048, 7)
    assert set(experiment.dataset.labels("train")) == set(range(7))
    assert config.parallel == "pmap"  # the caller's own stays as it is


def test_command_tells_of_the_devices_here(capsys):
    arguments = [*flags(*SMALL), "--images-per-chip", "3", "--compile-for", "here"]
    train_command.main(["--config", DIGITS, *arguments])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "digits_mlp:aim, images 8x8x1, float32, a training step by XLA"
    assert lines[2] == "here: 8 x cpu, 3 of 24 images on each"
    assert [line.split()[0] for line in lines[3:5]] == ["parameters", "running"]


@dataclasses.dataclass
class Device:
    device_kind: str
    coords: tuple[int, int, int] | None = None


def test_known_chips_that_are_there():
    corners = [(x, y, 0) for y in range(2) for x in range(4)]
    found = present_topology([Device("TPU v5 lite", place) for place in corners])
    assert (found.chip, found.shape) == (chips.CHIPS["v5e"], (4, 2, 1))
    found = present_topology([Device("NVIDIA H100 80GB HBM3")] * 4)
    assert (found.chip, found.shape) == (chips.CHIPS["h100"], (4,))
    assert present_topology([Device("cpu")]) is None


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("v6e:2x2", "needs libtpu: pip install -e '.[tpu]' -c constraints.txt"),
        ("h200:4", "needs jax_plugins.xla_cuda13: pip install -e '.[cuda]' -c constraints.txt"),
    ],
)
def test_compiler_that_is_not_installed_is_named(monkeypatch, name, line):
    def nothing(module):
        raise ModuleNotFoundError(module)

    monkeypatch.setattr(topologies.importlib.util, "find_spec", nothing)
    with refused(exactly=f"compiling for {name} {line}"):
        topologies.absent_devices(chips.topology(name))


@pytest.mark.slow
def test_tpus_that_are_not_there(capsys):
    pytest.importorskip("libtpu")
    config = load("digits_mlp:aim", ["dtype=bfloat16"])
    for name in ("v4:2x2x1", "v5e:1x1", "v5e:2x4", "v5p:2x2x2", "v6e:4x4"):
        devices = topologies.absent_devices(chips.topology(name))
        assert len(devices) == chips.topology(name).count
        assert devices[0].device_kind in chips.topology(name).chip.kinds
        assert len(set(present_topology(devices).shape) - {1}) >= (name != "v5e:1x1")
    compile_for(config, "v5e:2x2,v5p:2x2x1", images_per_chip=64)
    text = capsys.readouterr().out
    assert "v5e:2x2: 4 x TPU v5 lite, 64 of 256 images on each" in text
    assert text.count("parameters                                543 KiB") == 2
    assert text.count("bounds it: a step takes") == 2
    assert "weak scaling, as many images on each chip, at those bounds:" in text
