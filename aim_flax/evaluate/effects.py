"""What a trained network uses its memory for: the effect of each intervention on a split.

Each altered network is compared with the unaltered one on the same images by the paired test of Q.
McNemar, "Note on the sampling error of the difference between correlated proportions or
percentages", Psychometrika 12, 1947, in its exact form: if the intervention makes no difference,
an image that only one of the two predicts correctly is as likely to be the one's as the other's.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from aim_flax.console import Reporter
from aim_flax.evaluate.evaluation import Evaluation
from aim_flax.evaluate.interventions import (
    Choosable,
    intervene,
    layers,
    matching,
    reads_per_example,
)
from aim_flax.latch import AiM
from aim_flax.statistics import holm


@dataclasses.dataclass(frozen=True)
class Effect:
    """What an intervention does to a network on a split.

    Attributes:
      kind: of the intervention, see `interventions.intervene`.
      layer: the one read, or place with an update, that is altered; None: all that `at` matches.
      accuracy, loss: of the altered network.
      difference: its accuracy minus that of `keep`.
      worse, better: how many images only `keep`, or only the altered network, predicts correctly.
      p: of McNemar's exact test, two-sided; None for `keep`.
      p_holm: p corrected for the number of effects, see `statistics.holm`.
    """

    kind: str
    layer: str | None
    accuracy: float
    loss: float
    difference: float
    worse: int
    better: int
    p: float | None
    p_holm: float | None = None


@dataclasses.dataclass(frozen=True)
class Effects:
    """What all interventions do to a network on a split.

    Attributes:
      keep: the evaluation of the network as it is.
      rows: `keep` first, then the others.
      notes: sentences that say what was left out, and why.
    """

    keep: Evaluation
    rows: list[Effect]
    notes: list[str]


class Step(NamedTuple):
    """An intervention: `kind` and `layer` as in `Effect`, and the paths that it alters by `how`."""

    kind: str
    layer: str | None
    how: str
    paths: frozenset[str]


class Plan(NamedTuple):
    """The interventions on a network that can make a difference, and notes as in `Effects`."""

    choosable: Choosable
    steps: list[Step]
    notes: list[str]


def mcnemar(worse: int, better: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test, given the two discordant counts."""
    # Imported here because it takes half a second.
    from scipy.stats import binomtest

    return float(binomtest(worse, worse + better).pvalue) if worse + better else 1.0


def plan(
    model: AiM,
    inputs: Any,
    at: str = ".*",
    per_layer: bool = False,
    kwargs: Mapping[str, Any] | None = None,
) -> Plan:
    """Returns the interventions that can make a difference; nothing is computed.

    Args:
      model: a latched network.
      inputs: what it is called with, at least two examples: an array, or a tuple of several
        arguments; shapes and dtypes will do.
      at: the reads and update places to alter, as for `intervene`.
      per_layer: also alter each of them alone.
      kwargs: what it is called with by keyword.

    Raises:
      UsageError: a network without memory, or an `at` that is no regular expression or matches
        nothing.
    """
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    kwargs = {} if kwargs is None else dict(kwargs)
    reads, updates = matching(model, at, *args, **kwargs)
    all_reads, all_updates = layers(model, *args, **kwargs)
    varied = reads_per_example(model, *args, **kwargs)
    carried = model.carry == "state"
    varied_reads = [path for path in reads if path in varied]
    of_kind = {
        "zero": reads,
        "mean": varied_reads,
        "shuffle": varied_reads,
        "noise": reads,
        "no_write": updates,
        "reset": reads if carried else varied_reads,
    }
    everywhere = [kind for kind, paths in of_kind.items() if paths]
    notes = []
    if varied_reads != reads:
        same = ", ".join(f"`{path}`" for path in reads if path not in varied)
        kinds = "`mean` and `shuffle`" if carried else "`mean`, `shuffle` and `reset`"
        notes.append(f"At {same} the memory is the same for all images: {kinds} change nothing.")
    if not carried and updates == all_updates and set(varied_reads) == varied != set():
        everywhere.remove("reset")
        notes.append(
            "`reset` of all reads is not shown: it equals `no_write`, because nothing is carried"
            " and so only updates make this memory differ from that of its weights."
        )

    def step(kind: str, layer: str | None, paths: list[str]) -> Step:
        if kind == "no_write" and paths == all_updates and not carried:
            # The same result, without a program of its own.
            return Step(kind, layer, "reset", frozenset(varied))
        return Step(kind, layer, kind, frozenset(paths))

    steps = [step(kind, None, of_kind[kind]) for kind in everywhere]
    if per_layer:
        steps += [step(kind, path, [path]) for kind, paths in of_kind.items() for path in paths]
    return Plan(Choosable(model, tuple(all_reads)), steps, notes)


def measure(
    plan: Plan, build: Callable[[Any], Callable[[dict[str, np.ndarray]], Evaluation]]
) -> Effects:
    """Evaluates a network as it is, and with every intervention of its plan.

    Interventions on reads share one compiled program; stopping some of the updates takes one each.

    Args:
      build: takes an altered network, or a `Choosable`, and returns a function that evaluates it
        on the split, with its own variables and those given.

    Raises:
      NotFiniteError: the loss of the network as it is is NaN or infinite.
    """
    evaluate_reads = build(plan.choosable)

    @functools.cache
    def evaluate(kind: str, paths: frozenset[str]) -> Evaluation:
        if kind != "no_write":
            return evaluate_reads(plan.choosable.choose(kind, paths))
        network = intervene(plan.choosable.model, kind, "|".join(map(re.escape, sorted(paths))))
        return build(network)({})

    keep = evaluate("keep", frozenset())
    keep.check_finite("the unaltered network")
    rows = []
    with Reporter(len(plan.steps), 0) as reporter:
        for number, (kind, layer, how, paths) in enumerate(plan.steps, start=1):
            altered = evaluate(how, paths)
            rows.append(_effect(kind, layer, keep, altered))
            reporter.advance(number, {f"{kind} at {layer or 'all'}, accuracy": altered.accuracy})
    corrected = holm([row.p for row in rows])
    rows = [dataclasses.replace(row, p_holm=p) for row, p in zip(rows, corrected, strict=True)]
    unaltered = dataclasses.replace(_effect("keep", None, keep, keep), p=None)
    return Effects(keep, [unaltered, *rows], plan.notes)


def _effect(kind: str, layer: str | None, keep: Evaluation, altered: Evaluation) -> Effect:
    worse = int((keep.is_correct & ~altered.is_correct).sum())
    better = int((altered.is_correct & ~keep.is_correct).sum())
    return Effect(
        kind=kind,
        layer=layer,
        accuracy=altered.accuracy,
        loss=altered.loss,
        difference=(better - worse) / keep.count,
        worse=worse,
        better=better,
        p=mcnemar(worse, better),
    )
