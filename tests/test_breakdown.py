"""benchmarks/breakdown.py and growth.py: XLA's text, and profiles, against numbers by hand."""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

from aim_flax import AiM, Memory
from aim_flax import config as configs
from aim_flax.layers.pooling import max_pool
from aim_flax.train.step import create_state, train_step

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# As a TPU's compiler writes it: tiles, memory on the chip (S(1)), copies to it ahead of their use.
TEXT = r"""
HloModule jit_step, is_scheduled=true

%fused_computation (p.1: bf16[2,8,16]) -> (f32[16], bf16[2,8,16]) {
  %p.1 = bf16[2,8,16]{2,1,0:T(8,128)(2,1)} parameter(0)
  %max.2 = bf16[2,8,16]{2,1,0:T(8,128)(2,1)} maximum(%p.1, %p.1), metadata={op_name="jit(step)/jvp(AiM)/AiM.call/ResNet/stem/jit(relu)/max"}
}

%body (b.1: (f32[4,300])) -> (f32[4,300]) {
  %b.1 = (f32[4,300]{1,0:T(8,128)}) parameter(0)
  %element = f32[4,300]{1,0:T(8,128)} get-tuple-element(%b.1), index=0
  %double = f32[4,300]{1,0:T(8,128)} add(%element, %element), metadata={op_name="jit(step)/jvp(AiM)/AiM.call/ResNet/stem/MemoryUpdate/conv1/Conv/add" stack_frame_id=3}
}

%condition (c.1: (f32[4,300])) -> pred[] {
  %c.1 = (f32[4,300]{1,0:T(8,128)}) parameter(0)
  ROOT %yes = pred[]{:T(256)} constant(true)
}

ENTRY %main.9 (kernel.1: f32[3,3,16,200], images.1: bf16[2,8,16]) -> f32[16] {
  %kernel.1 = f32[3,3,16,200]{3,2,1,0:T(8,128)} parameter(0), metadata={op_name="state.params[\'stem\'][\'conv\'][\'kernel\']"}
  %scale.1 = f32[16]{0:T(128)} parameter(1), metadata={op_name="state.params[\'stem\'][\'norm\'][\'scale\']"}
  %moment.1 = f32[16]{0:T(128)} parameter(2), metadata={op_name="state.opt_state[0].mu[\'other\'][\'scale\']"}
  %update.1 = f32[16]{0:T(128)} parameter(3), metadata={op_name="state.params[\'stem\'][\'memory_update\'][\'conv1\'][\'bias\']"}
  %images.1 = bf16[2,8,16]{2,1,0:T(8,128)(2,1)} parameter(4), metadata={op_name="images"}
  %copy-start.1 = (f32[3,3,16,200]{3,2,1,0:T(8,128)S(1)}, f32[3,3,16,200]{3,2,1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%kernel.1)
  %copy-done.1 = f32[3,3,16,200]{3,2,1,0:T(8,128)S(1)} copy-done(%copy-start.1)
  %slice-start.1 = ((bf16[2,8,16]{2,1,0:T(8,128)(2,1)}), bf16[1,8,16]{2,1,0:T(8,128)(2,1)S(1)}, s32[]{:S(2)}) slice-start(%images.1), slice={[0:1], [0:8], [0:16]}
  %slice-done.1 = bf16[1,8,16]{2,1,0:T(8,128)(2,1)S(1)} slice-done(%slice-start.1)
  %fusion.1 = (f32[16]{0:T(128)S(1)}, /*index=1*/bf16[2,8,16]{2,1,0:T(8,128)(2,1)}) fusion(%copy-done.1, %slice-done.1, %images.1), kind=kOutput, calls=%fused_computation, metadata={op_name="jit(step)/transpose(jvp(AiM))/AiM.call/ResNet/stem/conv/conv_general_dilated" stack_frame_id=7}
  %element.1 = f32[16]{0:T(128)S(1)} get-tuple-element(%fusion.1), index=0
  %start.1 = (f32[4,300]{1,0:T(8,128)}) tuple(%element.1)
  %while.1 = (f32[4,300]{1,0:T(8,128)}) while(%start.1), condition=%condition, body=%body
  ROOT %add.1 = f32[16]{0:T(128)} add(%scale.1, %element.1), metadata={op_name="jit(step)/add"}
}
"""  # noqa: E501


class Pooled(nn.Module):
    """A block of convolutions with max pooling between them, and a mean."""

    @nn.compact
    def __call__(self, x, train):
        return Block(name="block")(x).mean(axis=(1, 2))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="write")(x)
        x = max_pool(nn.relu(x), (2, 2), (2, 2))
        return nn.Conv(4, (1, 1), name="look")(x)


@pytest.fixture
def breakdown(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import breakdown

    return breakdown


@pytest.fixture
def program(breakdown):
    return breakdown.Program(TEXT)


def test_bytes_are_those_of_padded_arrays_in_the_chips_memory(program):
    moved = {i.name: program.moved(i) for i in program.in_order() if program.moved(i)}
    image = 2 * 8 * 128 * 2
    loop = 3 * 8 * 384 * 4  # two operands and an output of 4x300, as 8x384
    assert moved == {
        "copy-start.1": 9 * 16 * 256 * 4,
        "slice-start.1": image // 2,
        "fusion.1": 2 * image,
        "double": loop,
        "add.1": 2 * 128 * 4,
    }


def test_an_operation_is_where_its_name_says_and_a_copy_where_it_is_used(breakdown, program):
    assert program.layers == {
        "stem/conv": {"kernel"},
        "stem/norm": {"scale"},
        "stem/memory_update/conv1": {"bias"},
    }

    def at(name):
        (path, direction), kind = breakdown.part(program, program.op_name(name))
        return path, direction, kind

    product = ("stem/conv", "backward", "products and convolutions")
    assert at("copy-start.1") == at("slice-start.1") == at("fusion.1") == product
    assert at("max.2") == ("stem", "forward", "other layers")
    assert at("double") == ("stem/memory_update/conv1", "forward", "memory update")
    assert at("add.1") == ("", "", "optimizer and input")


@pytest.mark.parametrize(
    ("op_name", "expected"),
    [
        ("jit(step)/jvp(ResNet)/stem/norm/mul", ("stem/norm", "forward", "batch norm")),
        ("jit(step)/transpose(jvp(AiM))/AiM.call/ResNet/stem/max_pool/cond/branch_1_fun/add",
         ("stem", "backward", "pooling")),
        ("jit(step)/jvp(ResNet)/stem/reduce_window_max", ("stem", "forward", "pooling")),
        ("jit(step)/jvp(AiM)/AiM.call/ResNet/stem/conv/memory_read/Conv/dot_general",
         ("stem/conv", "forward", "memory read")),
        # The latch's class, not a module "memory" of this program.
        ("jit(step)/jvp(AiM)/AiM.call/ResNet/stem/MemoryUpdate/MemoryUpdate._hidden/conv1/Conv/add",
         ("stem/memory_update/conv1", "forward", "memory update")),
        ("jit(step)/transpose(jvp(jit(take_along_axis)))/scatter-add", ("", "backward", "loss")),
        ("jit(step)/jvp()/exp", ("", "forward", "loss")),
        ("jit(step)/sqrt", ("", "", "optimizer and input")),
    ],
)  # fmt: skip
def test_names_say_what_an_operation_is(breakdown, program, op_name, expected):
    place, kind = breakdown.part(program, op_name)
    assert (*place, kind) == expected


def test_time_within_an_event_counts_once(breakdown):
    events = [(0, 100, "loop"), (10, 30, "a"), (15, 5, "b"), (40, 60, "a"), (100, 7, "c")]
    assert sorted(breakdown.own(events[::-1])) == [
        ("a", 10, 25), ("a", 40, 60), ("b", 15, 5), ("c", 100, 7), ("loop", 0, 10),
    ]  # fmt: skip


def test_the_step_counts_in_which_an_operation_took_the_least_time(breakdown):
    """Two threads share it; the second step was held up, and the third began before the first."""
    found = [(10, 4), (11, 5), (20, 400), (21, 3), (1, 4), (2, 4)]
    assert breakdown.least(found, 3) == 8
    assert breakdown.least(found, 6) == 3
    assert breakdown.least(found, 4) == 105


def test_tables_sum_what_the_cut_makes_one(breakdown):
    place = breakdown.Place
    parts = {
        breakdown.Part(place("stage1_block1/conv1", "forward"), "products and convolutions"): 1.0,
        breakdown.Part(place("stage1_block2/norm1", "forward"), "batch norm"): 2.0,
        breakdown.Part(place("stage1_block2/norm1", "backward"), "batch norm"): 4.0,
        breakdown.Part(place("stage1_block1/memory_update/conv1", "forward"), "memory update"): 8.0,
        breakdown.Part(place("", "forward"), "loss"): 0.01,
        breakdown.Part(place("", ""), "optimizer and input"): 16.0,
    }
    assert breakdown.by_module({"x": parts}, r"stage\d+|[^/]+", 1).splitlines()[2:] == [
        "| stage1 | 3.0 | 4.0 | 0 |",
        "| stage1, memory update | 8.0 | 0 | 0 |",
        "| optimizer and input | 0 | 0 | 16.0 |",
        "| all | 11.0 | 4.0 | 16.0 |",
    ]
    assert breakdown.by_kind({"x": parts}, 1).splitlines()[2:] == [
        "| products and convolutions | 1.0 |",
        "| batch norm | 6.0 |",
        "| memory update | 8.0 |",
        "| optimizer and input | 16.0 |",
        "| all | 31.0 |",
    ]


def test_a_profile_of_a_program_is_found_in_it(breakdown):
    """A product of 512x512 in a module, and a sum of 8 numbers in none."""

    class Step:
        seconds: list = []

        def __init__(self):
            def step(state, x):
                with jax.named_scope("jvp(Net)"), jax.named_scope("layer"):
                    y = state.params["layer"]["kernel"] @ x
                return y, jnp.cumsum(x[0, :8])

            class State(dict):
                params = property(lambda self: self["params"])

            jax.tree_util.register_pytree_with_keys(
                State,
                lambda s: (((jax.tree_util.GetAttrKey("params"), s["params"]),), None),
                lambda _, children: State(params=children[0]),
            )
            x = jnp.ones((512, 512))
            self.given = State(params={"layer": {"kernel": x}}), x
            self.step = jax.jit(step).lower(*self.given).compile()

        def measure(self):
            jax.block_until_ready(self.step(*self.given))

    parts = breakdown.times(Step(), steps=2)
    product = breakdown.Part(breakdown.Place("layer", "forward"), "products and convolutions")
    assert parts[product] > 0.5 * sum(parts.values())


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("read_mode", ["concat", "attend"])
def test_networks_tell_where_a_memory_is_read_and_updated(breakdown, read_mode):
    memory = Memory((2, 2, 8), "direct")
    aim = AiM(Pooled(), memory, "block/look", "block/write", read_mode=read_mode)
    optimizer = optax.adam(1e-3)
    x, labels = jnp.ones((2, 8, 8, 3)), jnp.zeros(2, int)

    def step(state, images, labels):
        return train_step(aim, optimizer, state, images, labels, seed=0)

    state = jax.eval_shape(lambda: create_state(aim, optimizer, 0, x.shape[1:]))
    # Before XLA makes several operations one.
    text = jax.jit(step).lower(state, x, labels).as_text(dialect="hlo", debug_info=True)
    program = breakdown.Program(text)
    parts = {breakdown.part(program, i.op_name) for i in program.instructions.values()}
    found = {(place.path.partition("/memory_")[0], kind) for place, kind in parts}
    assert found >= {
        ("block/look", "memory read"),
        ("block/write", "memory update"),
        ("block/write", "products and convolutions"),
        ("block", "pooling"),
        ("", "loss"),
        ("", "optimizer and input"),
    }
    places = {path for path, kind in found if kind in ("memory read", "memory update")}
    assert places == {"block/look", "block/write", "memory"}


def test_values_in_brackets_stay_whole(breakdown):
    import step_time

    assert step_time.split("(2,2,64),(2,2,256)") == ["(2,2,64)", "(2,2,256)"]
    assert step_time.split("einsum,conv") == ["einsum", "conv"]


def test_growth_leaves_a_network_without_memory_as_it_is(breakdown):
    import growth

    control, published = (
        configs.load(f"configs/small_resnet.py:{arm}") for arm in ("control_stride1", "published")
    )
    assert growth.grown(control, "memory.shape", "(2,2,64)") == (control, 1)
    changed, count = growth.grown(published, "memory.shape", "(2,2,64)")
    assert (changed.memory.shape, count) == ((2, 2, 64), 1)
    assert published.memory.shape == (2, 2, 256)
    assert growth.grown(control, "train.batch_size", "7")[0].train.batch_size == 7
    assert growth.grown(control, "devices", "2") == (control, 2)


def test_ratios_of_growth_are_of_the_same_round(breakdown):
    import growth

    class Fake:
        def __init__(self, name, size, seconds):
            self.name, self.bytes, self.seconds = name, size * 2**20, seconds

    # While the second round runs, the machine is ten times as slow.
    sides = [Fake("a", 2, [1.0, 10.0, 1.0]), Fake("b", 3, [1.5, 20.0, 3.0])]
    first, second = growth.rows_of("devices", "2", sides)
    assert [first[c] for c in ("seconds", "ratio", "mebibytes_ratio")] == [
        "1.0000",
        "1.000",
        "1.000",
    ]
    assert (second["seconds"], second["mebibytes"]) == ("3.0000", "3.0")
    assert [second[c] for c in ("ratio_low", "ratio", "ratio_high")] == ["1.500", "2.000", "3.000"]
    assert growth.as_markdown([first, second]).splitlines()[2:] == [
        "| devices | 2 | 1000 | 2.0 | 1500 | 3.0 | 1.50 | 2.00 (1.50 to 3.00) | 1.50 |"
    ]
