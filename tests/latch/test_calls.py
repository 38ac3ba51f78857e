"""How foreign networks are called: modes, names, wrappers, transformations, several inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

from aim_flax import AiM, Memory, MemoryUpdate, intervene
from aim_flax.evaluate import effects
from aim_flax.evaluate.evaluation import Evaluation
from aim_flax.evaluate.interventions import layers, matching, reads_per_example
from aim_flax.evaluate.memory_use import memory_use
from tests.arrays import KEY, draw, random_variables
from tests.asserts import assert_close, assert_equal, refused

X = draw(6, 5)


def latched(net, read="head", update_after="body", **options):
    given = dict(read_mode="add", update=MemoryUpdate(features=(3,)))
    return AiM(net, Memory((4,), "direct"), read, update_after, **{**given, **options})


# --- Training or evaluation, in the network's own words ------------------------------------------


def body(module, x, training):
    x = nn.Dense(4, name="body")(x)
    x = nn.BatchNorm(not training, name="norm")(x)
    return nn.Dense(2, name="head")(x)


class Train(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return body(self, x, train)


class TrainByDefault(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        return body(self, x, train)


class IsTraining(nn.Module):
    @nn.compact
    def __call__(self, x, is_training):
        return body(self, x, is_training)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, *, deterministic):
        return body(self, x, not deterministic)


class Merged(nn.Module):
    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x, deterministic=None):
        deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        return body(self, x, not deterministic)


class ByField(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x):
        return body(self, x, self.train)


class Keywords(nn.Module):
    @nn.compact
    def __call__(self, x, **options):
        return body(self, x, options.get("train", False))


class Both(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, deterministic=True):
        return body(self, x, train)


CALLS = {
    "train": (Train(), {}, (), dict(train=True), True),
    "train, default": (Train(), {}, (), {}, False),
    "train, positional": (Train(), {}, (True,), {}, True),
    "train, positional and alike": (Train(), {}, (True,), dict(train=True), True),
    "train by default": (TrainByDefault(), {}, (), {}, True),
    "train by default, evaluated": (TrainByDefault(), {}, (), dict(train=False), False),
    "is_training by train": (IsTraining(), {}, (), dict(train=True), True),
    "is_training": (IsTraining(), {}, (), dict(is_training=True), True),
    "is_training, nothing said": (IsTraining(), {}, (), {}, False),
    "deterministic=False": (Deterministic(), {}, (), dict(deterministic=False), True),
    "deterministic=True": (Deterministic(), {}, (), dict(deterministic=True), False),
    "deterministic by train": (Deterministic(), {}, (), dict(train=True), True),
    "merged": (Merged(), {}, (), dict(deterministic=False), True),
    "merged by train": (Merged(), {}, (), dict(train=True), True),
    "merged field": (Merged(deterministic=False), {}, (), {}, True),
    "field": (ByField(train=True), {}, (), {}, True),
    "declared": (Keywords(), dict(mode="train"), (), dict(train=True), True),
    "declared, default": (Keywords(), dict(mode="train"), (), {}, False),
    "declared among two": (Both(), dict(mode="train"), (), dict(train=True), True),
    "declared as none": (Keywords(), dict(mode="none"), (), dict(train=False), False),
}


@pytest.mark.parametrize("name", CALLS)
def test_latch_and_network_are_in_one_mode(name):
    net, options, args, kwargs, training = CALLS[name]
    aim = latched(net, **options)
    variables = random_variables(aim, X, *args, **kwargs)
    _, state = aim.apply(variables, X, *args, **kwargs, mutable=["batch_stats"])
    before, after = (flatten_dict(tree["batch_stats"], sep="/") for tree in (variables, state))
    moved = {path for path in before if not np.allclose(before[path], after[path], atol=1e-6)}
    places = {path.rsplit("/", 1)[0] for path in moved}
    assert places == ({"norm", "body/memory_update/norm1"} if training else set())


REFUSED_MODES = {
    "kwargs": (Keywords(), {}, {}, r"Keywords.__call__ takes \*\*kwargs, .* mode='train'\), or"),
    "two": (Both(), {}, {}, "Both.__call__ takes train and deterministic: say which .*mode='trai"),
    "contradiction": (
        Deterministic(), {}, dict(train=True, deterministic=True),
        "train=True contradicts deterministic=True of Deterministic: give one of them",
    ),
    "field": (ByField(train=True), {}, dict(train=False), "train=False contradicts train=True of"),
    "unknown": (Train(), dict(mode="phase"), {}, "mode is 'phase', expected one of train, "),
    "missing": (Train(), dict(mode="training"), {}, "mode is 'training', which Train.__call__ d"),
    "arguments": (Train(), {}, dict(masks=1), "Train.__call__ cannot be called so: got an unexpec"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_MODES)
def test_modes_that_are_not_clear_are_refused(name):
    net, options, kwargs, message = REFUSED_MODES[name]
    with refused(message):
        latched(net, **options).init(KEY, X, **kwargs)


class Forward(nn.Module):
    """Without a `__call__`."""

    def setup(self):
        self.dense = nn.Dense(3)

    def forward(self, x):
        return self.dense(x)


def test_a_network_without_a_call_says_what_can_be_called():
    aim = latched(Forward(), read="dense", update_after=())
    for call in (aim.init, lambda key, x: aim.places(x)):
        with refused(
            "Forward has no __call__: say what is called, with method=NAME; it has forward"
        ):
            call(KEY, X)
    variables = aim.init(KEY, X, method="forward")
    assert aim.apply(variables, X, method="forward").shape == (len(X), 3)


def test_a_traced_mode_is_refused():
    aim = latched(Train())
    variables = random_variables(aim, X)
    with refused("train is traced by JAX, .*: make it static"):
        jax.jit(lambda train: aim.apply(variables, X, train=train))(True)


# --- Names ---------------------------------------------------------------------------------------


class Named(nn.Module):
    """Modules called as the latch calls its own, at some depth."""

    @nn.compact
    def __call__(self, x):
        for name in ("memory", "memory_read", "memory_update", "memory_initial"):
            x = x + nn.Dense(5, name=name)(x)
        return x


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(Named(name="block")(x))


def test_modules_with_the_names_of_the_latch_are_read_into_and_written_after():
    aim = latched(Deep(), "block/.*|head", "block/memory")
    reads, updates = layers(aim, X)
    names = ("memory", "memory_read", "memory_update", "memory_initial")
    assert reads == [*(f"block/{name}" for name in names), "head"]
    assert updates == ["block/memory"]
    variables = random_variables(aim, X)
    changed = jax.tree.map(np.copy, variables)
    changed["params"]["block"]["memory"]["memory_read"]["kernel"] += 1
    assert not np.allclose(aim.apply(changed, X), aim.apply(variables, X), atol=1e-3)


class Taken(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
        return nn.Dense(self.features, name="memory_read")(super().__call__(inputs))


class HasTaken(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Taken(4, name="body")(x)
        return nn.Dense(2, name="head")(x)


def test_a_name_that_is_taken_is_refused():
    with refused("'body' has a submodule or parameter called 'memory_read', .*: give it another"):
        latched(HasTaken(), "body", "").init(KEY, X)


# --- Flax transformations ------------------------------------------------------------------------


class Inside(nn.Module):
    """A layer inside of a functional transformation."""

    what: str

    @nn.compact
    def __call__(self, x):
        inner = nn.Dense(5, name="inner")
        x = nn.Dense(5, name="body")(x)
        if self.what == "cond":
            x = nn.cond(x.sum() > 0, lambda m, x: m(x), lambda m, x: 2 * m(x), inner, x)
        elif self.what == "switch":
            x = nn.switch(1, [lambda m, x: m(x), lambda m, x: 2 * m(x)], inner, x)
        elif self.what == "closure":
            inner(x)
            x = nn.cond(x.sum() > 0, lambda m, x: inner(x), lambda m, x: x, self, x)
        elif self.what == "while_loop":
            inner(x)
            x = nn.while_loop(
                lambda m, carry: carry[0] < 2,
                lambda m, carry: (carry[0] + 1, m(carry[1])),
                inner, (0, x), broadcast_variables="params",
            )[1]  # fmt: skip
        elif self.what == "custom_vjp":
            x = nn.custom_vjp(
                lambda m, x: m(x), lambda m, x: nn.vjp(lambda m, x: m(x), m, x), lambda f, g: f(g)
            )(inner, x)
        elif self.what == "lax.map":
            inner(x)
            x = jax.lax.map(inner, x[None])[0]
        return nn.Dense(2, name="head")(x)


@pytest.mark.parametrize(
    "what", ["cond", "switch", "closure", "while_loop", "custom_vjp", "lax.map"]
)
def test_updates_inside_any_transformation_are_refused(what):
    aim = latched(Inside(what), "head", "inner")
    with refused("update_after matches 'inner', which runs inside a Flax transformation"):
        jax.eval_shape(aim.init, KEY, X)
    variables = random_variables(latched(Inside(what)), X)
    latched(Inside(what)).apply(variables, X)


@pytest.mark.parametrize("what", ["cond", "switch", "while_loop"])
def test_reads_inside_a_branch_or_loop_are_those_of_the_layer(what):
    aim = latched(Inside(what), "inner|head")
    variables = random_variables(aim, X)
    h = X @ variables["params"]["body"]["kernel"] + variables["params"]["body"]["bias"]
    block = {name: variables[name]["body"]["memory_update"] for name in ("params", "batch_stats")}
    m = aim.update.apply(block, h, variables["params"]["memory"]["content"][None])

    def read_by_hand(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        if context.module.name == "inner" and context.method_name == "__call__":
            kernel = variables["params"]["inner"]["memory_read"]["kernel"]
            y = y + m @ kernel
        return y

    with nn.intercept_methods(read_by_hand):
        expected = Inside(what).apply(variables, X)
    head = variables["params"]["head"]["memory_read"]["kernel"]
    assert_close(aim.apply(variables, X), expected + m @ head)


def test_a_read_inside_a_gradient_by_hand_is_refused():
    with refused("read matches 'inner', which runs inside nn.custom_vjp, whose gradient .*: read"):
        jax.eval_shape(latched(Inside("custom_vjp"), "inner").init, KEY, X)


# --- Networks inside of networks -----------------------------------------------------------------


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5, name="head")(nn.Dense(4, name="body")(x))


class Distilled(nn.Module):
    """Asks a fixed network, which is not part of it."""

    @nn.compact
    def __call__(self, x):
        fixed = random_variables(Small(), X, seed=3)
        return nn.Dense(2, name="head")(Small().apply(fixed, nn.Dense(5, name="body")(x)))


def test_a_network_that_is_applied_inside_is_left_alone():
    aim = latched(Distilled())
    variables = random_variables(aim, X)
    assert set(variables["params"]) == {"memory", "body", "head"}
    params = variables["params"]
    h = X @ params["body"]["kernel"] + params["body"]["bias"]
    block = {name: variables[name]["body"]["memory_update"] for name in ("params", "batch_stats")}
    m = aim.update.apply(block, h, params["memory"]["content"][None])
    h = Small().apply(random_variables(Small(), X, seed=3), h)
    expected = h @ params["head"]["kernel"] + params["head"]["bias"]
    assert_close(aim.apply(variables, X), expected + m @ params["head"]["memory_read"]["kernel"])


class UsedTwice(nn.Module):
    """Its encoder is latched on to, and called beside that."""

    first: bool
    whole: bool = True

    def setup(self):
        self.small = Small()
        net = self.small if self.whole else nn.Sequential([self.small])
        read = "head" if self.whole else "layers_0/head"
        self.aim = AiM(net, Memory((4,), "direct"), read, read_mode="add")

    def __call__(self, x):
        if self.first:
            return self.small(x) + self.aim(x)
        return self.aim(x) + self.small(x)


@pytest.mark.parametrize("whole", [True, False])
def test_a_backbone_that_is_also_used_outside_is_refused(whole):
    message = "'small', the backbone or a part of it, is called outside of its AiM too, .*: call"
    with refused(message):
        UsedTwice(True, whole).init(KEY, X)
    net = UsedTwice(False, whole)
    shapes = jax.eval_shape(net.init, KEY, X)
    with refused(message):
        net.apply(jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes), X)


class LoRA(nn.Module):
    """As in the documentation of nn.share_scope."""

    base: nn.Module
    rank: int = 2

    def setup(self):
        nn.share_scope(self, self.base)

    @nn.compact
    def __call__(self, x):
        down = self.param("A", nn.initializers.normal(), (x.shape[-1], self.rank))
        up = self.param("B", nn.initializers.normal(), (self.rank, self.base.features))
        return self.base(x) + x @ down @ up


class WithLoRA(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = LoRA(nn.Dense(4))(x)
        return nn.Dense(2, name="head")(x)


class Wrapper(nn.Module):
    net: nn.Module

    def setup(self):
        nn.share_scope(self, self.net)

    def __call__(self, x):
        return self.net(x)


def test_modules_that_share_a_scope_are_one_place():
    aim = latched(WithLoRA(), "Dense_0|head", "Dense_0")
    variables = random_variables(aim, X)
    params = variables["params"]
    body, m = params["Dense_0"], params["memory"]["content"][None]
    assert set(body) == {"kernel", "bias", "A", "B", "memory_read", "memory_update"}
    assert layers(aim, X) == (["Dense_0", "head"], ["Dense_0"])
    h = X @ (body["kernel"] + body["A"] @ body["B"]) + body["bias"]
    h = h + m @ body["memory_read"]["kernel"]
    block = {n: variables[n]["Dense_0"]["memory_update"] for n in ("params", "batch_stats")}
    m = aim.update.apply(block, h, m)
    y = h @ params["head"]["kernel"] + params["head"]["bias"]
    assert_close(aim.apply(variables, X), y + m @ params["head"]["memory_read"]["kernel"])


def test_a_backbone_that_shares_its_scope_keeps_its_paths():
    plain, wrapped = latched(Small()), latched(Wrapper(Small()))
    variables = random_variables(plain, X)
    assert_equal(wrapped.apply(variables, X), plain.apply(variables, X))
    with refused("matches no module of LoRA; .* Dense shares the scope of LoRA, .*: put LoRA"):
        latched(LoRA(nn.Dense(4)), "base", "").init(KEY, X)


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


def test_an_nnx_backbone_is_refused_with_the_way_out():
    message = "the backbone, NNXNet, is no Linen module, but an NNX module: .* nnx.bridge.ToNNX"
    with refused(message):
        latched(NNXNet(nnx.Rngs(0)), "layer", "").init(KEY, X)
    with refused("the backbone, function, is no Linen module, expected one"):
        latched(lambda x: x, "layer", "").init(KEY, X)


def test_an_aim_becomes_nnx_by_the_bridge():
    model = nnx.bridge.ToNNX(latched(Small()), rngs=nnx.Rngs(0)).lazy_init(X)
    y = model(X)
    assert y.shape == (6, 5)
    params = nnx.state(model, nnx.Param)
    assert {"memory", "body", "head"} <= set(params)

    def loss(model):
        return jnp.square(model(X)).mean()

    gradients = nnx.grad(loss)(model)
    assert np.abs(gradients["memory"]["content"][...]).max() > 0


# --- Several inputs ------------------------------------------------------------------------------


class Question(nn.Module):
    """Two inputs, a mask by keyword, an option that is no array."""

    @nn.compact
    def __call__(self, image, text, *, mask=None, pool="sum", deterministic=True):
        x = nn.Dense(4, name="body")(image) + nn.Dense(4, name="words")(text)
        x = x if mask is None else x * mask[:, None]
        x = nn.Dropout(0.1)(x, deterministic=deterministic)
        x = nn.Dense(3, name="head")(x)
        return 2 * x if pool == "sum" else x


def test_inspection_takes_all_that_a_network_is_called_with():
    image, text, mask = draw(6, 5), draw(6, 3), np.ones(6, np.float32)
    aim = latched(Question(), "words|head", "body")
    kwargs = dict(mask=mask, pool="mean", deterministic=True)
    variables = random_variables(aim, image, text, **kwargs)
    assert layers(aim, image, text, **kwargs) == (["words", "head"], ["body"])
    shape = jax.ShapeDtypeStruct(text.shape, text.dtype)
    assert layers(aim, image, shape, pool="mean") == (["words", "head"], ["body"])
    assert matching(aim, "w.*", image, text, **kwargs) == (["words"], [])
    assert reads_per_example(aim, image, text, **kwargs) == {"words", "head"}
    uses = memory_use(aim, variables, image, text, **kwargs)
    assert set(uses) == {"read words", "update body", "read head"}
    altered = intervene(aim, "zero", "head").apply(variables, image, text, **kwargs)
    assert altered.shape == (6, 3)

    def build(network):
        def evaluate(extra):
            logits = network.apply({**variables, **extra}, image, text, **kwargs)
            right = np.argmax(logits, axis=-1) == np.arange(6) % 3
            return Evaluation(0.0, np.diag([right.sum(), (~right).sum()]), right)

        return evaluate

    measured = effects.measure(effects.plan(aim, (image, text), kwargs=kwargs), build)
    assert [row.kind for row in measured.rows][:2] == ["keep", "zero"]
