"""Exact sizes of the networks in configs/, and how they are counted."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from aim_flax import config as configs
from aim_flax.cli import train as train_command
from aim_flax.memory import distinct_values
from aim_flax.models.describe import describe, multiply_adds
from tests.runs import DIGITS, arms, load

# (parameters, running statistics) of every arm of every config.
COUNTS = {
    # Two hidden layers of 256: 64·256+256 + 256·256+256 + 256·10+10 = 85,002. Memory of 64:
    # reads 64·(256+256+10), Dense on ones 64·64+64, each update block on [256, 64]:
    # 320·16+16 + 16·16+16 + 16·32+32 + 2·(16+16+32) + 32·64+64 = 8,192.
    "digits_mlp:control": (85_002, 0),
    "digits_mlp:aim": (85_002 + 33_408 + 4_160 + 2 * 8_192, 256),
    "digits_mlp:aim_no_update": (85_002 + 33_408 + 4_160, 0),
    "digits_mlp:aim_state": (85_002 + 33_408 + 4_160 + 2 * 8_192, 256),
    "digits_mlp:aim_direct": (85_002 + 33_408 + 64 + 2 * 8_192, 256),
    # ResNet50 with convolution biases and 120 classes; statistics 53,120. At stem stride 1 the
    # memory of 7·7·1024 = 50,176 floats has 4, 16, 64 and 256 channels on the stages' maps, so the
    # 16 reads of conv1 have 388,352 weights and the three update blocks 392,832, with 384
    # statistics. A memory of a 1x1 convolution: 1024·1024 + 1024.
    "stanford_dogs_resnet50:published": (
        23_780_472 + 388_352 + 392_832 + 2 * 1_049_600,
        53_120 + 384,
    ),
    "stanford_dogs_resnet50:control": (23_780_472, 53_120),
    "stanford_dogs_resnet50:control_stride1": (23_780_472, 53_120),
    "stanford_dogs_resnet50:aim": (23_780_472 + 388_352 + 392_832 + 50_176, 53_504),
    "stanford_dogs_resnet50:aim_no_update": (23_780_472 + 388_352 + 50_176, 53_120),
    # Reads of the stem 49·64, and of every convolution of the stages.
    "stanford_dogs_resnet50:aim_every_conv": (
        23_780_472 + (3_136 + 11_776 + 115_200 + 1_380_352 + 5_537_792) + 392_832 + 50_176,
        53_504,
    ),
    "stanford_dogs_resnet50:aim_state": (23_780_472 + 388_352 + 392_832 + 50_176, 53_504),
    "stanford_dogs_resnet50:aim_kernel7": (
        23_780_472 + 388_352 + 392_832 + 49 * 1024 * 1024 + 1024,
        53_504,
    ),
    # At stem stride 2 it has four times the channels: 16, 64, 256 and 1024.
    "stanford_dogs_resnet50:aim_stride2": (
        23_780_472 + 4 * 388_352 + (392_832 + 9 * 16 * (12 + 48 + 192)) + 50_176,
        53_504,
    ),
    "stanford_dogs_vgg16:control": (134_802_360, 50_176),
    # Channels of the memory on the stages' maps: 1, 4, 16, 64, 256; dense layers read its 1024.
    "stanford_dogs_vgg16:aim": (
        134_802_360
        + 9 * (2 * 64 + 2 * 4 * 128 + 3 * 16 * 256 + 3 * 64 * 512 + 3 * 256 * 512)
        + 1024 * (4096 + 4096 + 120)
        + (9 * 16 * (68 + 144 + 320 + 768) + 4 * 40_896)
        + 50_176,
        50_176 + 4 * 128,
    ),
    # Bottleneck blocks without biases, stages of width 64 to 512; a memory of 4·4·256 has 4, 16,
    # 64 and 256 channels on their maps of 32, 16, 8 and 4 pixels. Reads of conv1: 4·64 + 4·64 +
    # 4·128 + 16·128 + 16·256 + 64·256 + 64·512 + 256·512 = 187,392, for a first block has the map
    # of the stage before; updates on 256, 512 and 1,024 channels and the memory's: 316,800.
    "cifar10_resnet:control": (13_958_986, 30_848),
    # Two memories of a 1x1 convolution, 256·256 + 256 each.
    "cifar10_resnet:aim_no_update": (13_958_986 + 187_392 + 2 * 65_792, 30_848),
    "cifar10_resnet:aim": (13_958_986 + 187_392 + 2 * 65_792 + 316_800, 30_848 + 3 * 128),
    # Bottleneck blocks with biases, stages of width 16 to 128. A memory of 2·2·256 has 4, 16, 64
    # and 256 channels on maps of 16, 8, 4 and 2 pixels; reads of conv1: 4·16 + 4·16 + 4·32 + 16·32
    # + 16·64 + 64·64 + 64·128 + 256·128 = 46,848; updates 25,344 + 36,288 + 61,632 = 123,264. A
    # memory of a 1x1 convolution: 256·256 + 256.
    "small_resnet:control": (888_170, 7_712),
    "small_resnet:control_stride1": (888_170, 7_712),
    "small_resnet:published": (888_170 + 46_848 + 123_264 + 2 * 65_792, 7_712 + 384),
    "small_resnet:aim": (888_170 + 46_848 + 123_264 + 1_024, 7_712 + 384),
    "small_resnet:aim_no_update": (888_170 + 46_848 + 1_024, 7_712),
    "small_resnet:aim_state": (888_170 + 46_848 + 123_264 + 1_024, 7_712 + 384),
    # At stride 2 it has four times the channels.
    "small_resnet:aim_stride2": (
        888_170 + 4 * 46_848 + 123_264 + 9 * 16 * (12 + 48 + 192) + 1_024,
        7_712 + 384,
    ),
    # torchvision's vgg16_bn without its classifier: 14,723,136. Batch norm after flattening 1,024,
    # dense layers 2·(512·512 + 512), head 5,130.
    "cifar10_vgg16:control": (14_723_136 + 1_024 + 525_312 + 5_130, 9_472),
    "cifar10_vgg16:aim_no_update": (15_254_602 + 18_443_264 + 4_096, 9_472),
    "cifar10_vgg16:aim": (15_254_602 + 18_443_264 + 4_096 + 396_288, 9_472 + 4 * 128),
    # torchvision's resnet50, 25,557,032 with 1,000 classes, for 81 classes; reads and updates as in
    # stanford_dogs_resnet50:aim_stride2. Two memories of 1,024² + 1,024.
    "image_folder_resnet50:control": (25_557_032 - 2_049 * (1_000 - 81), 53_120),
    "image_folder_resnet50:aim_no_update": (23_674_001 + 4 * 388_352 + 2 * 1_049_600, 53_120),
    # EfficientNet-Lite0 has 4,652,008 with 1,000 classes. A memory of 4·4·64 has 3 channels on maps
    # of 20 px, 11 on those of 10 and 41 on those of 5; reads of expand in stages 4 to 7:
    # 3·240 + 11·480·3 + 11·672·3 + 41·1152·4 = 227,664; updates 22,320 + 26,928 + 42,768 = 92,016.
    "image_folder_efficientnet:control": (4_652_008 - 1_281 * (1_000 - 81), 42_016),
    "image_folder_efficientnet:aim_no_update": (3_474_769 + 227_664 + 1_024, 42_016),
    "image_folder_efficientnet:aim": (3_474_769 + 227_664 + 1_024 + 92_016, 42_016 + 3 * 128),
    "image_folder_resnet50:aim": (23_674_001 + 4 * 388_352 + 2 * 1_049_600 + 429_120, 53_504),
}


def test_every_arm_has_a_count():
    assert sorted(arms()) == sorted(COUNTS)


def quick(arm):
    """Whether an arm is traced within a second, or is the published network."""
    large = "stanford_dogs_", "cifar10_", "image_folder_"
    return arm == "stanford_dogs_resnet50:published" or not arm.startswith(large)


@pytest.mark.parametrize(
    "arm", [arm if quick(arm) else pytest.param(arm, marks=pytest.mark.slow) for arm in arms()]
)
def test_counts(arm):
    config = load(arm)
    if config.model.num_classes is None:
        classes = 10 if config.name == "small_resnet" else 81
        config = load(arm, [f"model.num_classes={classes}"])
    text, _ = describe(config)
    (total,) = [line.split() for line in text.splitlines() if line.startswith("total")]
    assert tuple(int(n.replace(",", "")) for n in total[1:]) == COUNTS[arm]
    assert f"parameters + running statistics: {sum(COUNTS[arm]):,}" in text


def test_table_names_backbone_memory_reads_and_updates(capsys):
    train_command.main(["--config", DIGITS, "--describe"])
    printed, _, training = capsys.readouterr().out.rstrip().rpartition("\n")
    table, places = printed.split("places, in the order of the calls:\n")
    rows = [line.rsplit(maxsplit=2) for line in table.splitlines()[2:-3]]
    assert [(name, int(n.replace(",", ""))) for name, n, _ in rows] == [
        ("backbone", 85_002),
        ("memory", 4_160),
        ("read head", 640),
        ("read layer1/dense", 16_384),
        ("read layer2/dense", 16_384),
        ("update layer1", 8_192),
        ("update layer2", 8_192),
        ("total", 138_954),
    ]
    assert places.splitlines() == [
        "  layer1/dense  reads memory into 64",
        "  layer1        writes memory from 256",
        "  layer2/dense  reads memory into 256",
        "  layer2        writes memory from 256",
        "  head          reads memory into 256",
    ]

    # 138,954 parameters of 4 bytes, two more of each for Adam, and 256 statistics.
    assert training == (
        "in training, on each of 8 x cpu: parameters 543 KiB, running statistics and carried memory"
        " 1 KiB, optimiser 1.06 MiB; --compile-for=here tells the rest"
    )


def test_each_part_has_a_memory_of_its_own():
    """`memory.per`: 64 floats and 65 weights for each of them for each part."""
    config = load("digits_mlp:aim", ["memory.per=('layer1','layer2','head')"])
    text, _ = describe(config)
    assert re.search(r"^memory +12,480 +0$", text, re.MULTILINE)
    assert "memory floats: 192, of which 192 can differ" in text
    assert re.search(r"^  layer2/dense +reads memory/layer2 into 256$", text, re.MULTILINE)
    zeros, _ = describe(configs.override(config, ["memory.kind=zero"]))
    assert "memory floats: 192, of which 1 can differ" in zeros
    # Of a 1x1 convolution the channels alone, in each.
    assert distinct_values((2, 2, 256), "conv", 1, count=4) == 1024


@pytest.mark.parametrize(("arm", "total"), [("published", 26_673_380), ("control", 23_792_612)])
def test_counts_for_100_classes_are_those_of_the_published_code(arm, total):
    """As Keras counts: parameters and running statistics together."""
    config = load(f"stanford_dogs_resnet50:{arm}", ["model.num_classes=100"])
    assert f"parameters + running statistics: {total:,}\n" in describe(config)[0]


def test_counts_above_are_those_of_the_published_code():
    published = {"resnet50:published": 26_714_360, "resnet50:control": 23_833_592}
    published["vgg16:control"] = 134_852_536
    for arm, total in published.items():
        assert sum(COUNTS[f"stanford_dogs_{arm}"]) == total


@pytest.mark.slow
def test_control_has_a_quarter_of_the_multiplications():
    """The published comparison's confound: the stems' strides differ."""
    adds = {}
    for arm in ("published", "control_stride1", "control"):
        text, _ = describe(load(f"stanford_dogs_resnet50:{arm}"))
        (found,) = re.findall(r"multiply-adds of one image's forward pass: ([\d,]+)", text)
        adds[arm] = int(found.replace(",", ""))
    assert adds["control_stride1"] == pytest.approx(4 * adds["control"], rel=1e-3)
    assert adds["published"] == pytest.approx(1.08 * adds["control_stride1"], rel=0.01)


def products(fn, *shapes) -> int:
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return multiply_adds(jax.make_jaxpr(fn)(*args).jaxpr)


def test_multiply_adds_of_products():
    assert products(lambda a, b: a @ b, (2, 3), (3, 5)) == 2 * 3 * 5
    assert products(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 2, 3), (4, 3, 5)) == 4 * 30
    assert products(lambda a: a + 1, (7,)) == 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 8 * 8 * 6 * 9 * 4),
        ({"strides": 2}, 4 * 4 * 6 * 9 * 4),
        ({"padding": "VALID"}, 6 * 6 * 6 * 9 * 4),
        ({"feature_group_count": 2}, 8 * 8 * 6 * 9 * 2),
    ],
)
def test_multiply_adds_of_convolutions(options, expected):
    layer = nn.Conv(6, (3, 3), **options)
    x = jnp.ones((1, 8, 8, 4))
    variables = layer.init(jax.random.key(0), x)
    assert products(lambda x: layer.apply(variables, x), x.shape) == expected


def test_multiply_adds_within_loops_and_calls():
    def repeated(a, b):
        return jax.lax.scan(lambda c, _: (jax.jit(jnp.matmul)(c, b), None), a, length=7)[0]

    assert products(repeated, (2, 3), (3, 3)) == 7 * 2 * 3 * 3
