"""What a trained network uses its memory for: the effect of each intervention on a split.

Each is compared with the network as it is on the same images, so the test is the paired one of Q.
McNemar, "Note on the sampling error of the difference between correlated proportions or
percentages", Psychometrika 12, 1947, in its exact form: an image that only one of the two predicts
correctly is as likely to be the one's as the other's if the intervention makes no difference.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import binomtest

from aim_flax.console import Reporter
from aim_flax.evaluate.evaluation import Evaluation
from aim_flax.evaluate.interventions import (
    Choosable,
    intervene,
    layers,
    matching,
    reads_per_example,
)
from aim_flax.files import save_figure, write_csv, write_json
from aim_flax.latch import AiM
from aim_flax.statistics import CONFIDENCE, holm, p_value

ALPHA = 1 - CONFIDENCE


@dataclasses.dataclass(frozen=True)
class Effect:
    """What an intervention does to a network on a split.

    Attributes:
      kind: of the intervention, see `interventions.intervene`.
      layer: the one read, or place with an update, that is altered; None: all that `at` matches.
      accuracy, loss: of the altered network.
      difference: its accuracy less that of `keep`.
      worse, better: how many images only `keep`, or only the altered network, predicts correctly.
      p: of McNemar's exact test, two-sided; None for `keep`.
      p_holm: p corrected for the number of effects, see `comparison.holm`.
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


COLUMNS = tuple(field.name for field in dataclasses.fields(Effect))


def mcnemar(worse: int, better: int) -> float:
    """Returns the two-sided p-value of McNemar's exact test, given the two discordant counts."""
    return float(binomtest(worse, worse + better).pvalue) if worse + better else 1.0


def measure(
    model: AiM,
    inputs: Any,
    build: Callable[[Any], Callable[[dict[str, np.ndarray]], Evaluation]],
    at: str = ".*",
    per_layer: bool = False,
    kwargs: Mapping[str, Any] | None = None,
) -> Effects:
    """Evaluates a network as it is, and with every intervention that can make a difference.

    Interventions on reads share one compiled program; keeping some updates from writing takes one
    each.

    Args:
      model: a latched network.
      inputs: what it is called with, at least two examples: an array, or a tuple of several
        arguments; shapes and dtypes will do.
      build: takes an altered network, or a `Choosable`, and returns what evaluates it on the split,
        given variables beside its own.
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
    plan = [(kind, None, paths) for kind, paths in of_kind.items() if paths]
    notes = []
    if varied_reads != reads:
        same = ", ".join(f"`{path}`" for path in reads if path not in varied)
        kinds = "`mean` and `shuffle`" if carried else "`mean`, `shuffle` and `reset`"
        notes.append(f"At {same} the memory is the same for all images: {kinds} change nothing.")
    if not carried and updates == all_updates and set(varied_reads) == varied != set():
        plan.remove(("reset", None, varied_reads))
        notes.append(
            "`reset` of all reads is not shown: it equals `no_write`, for nothing is carried and"
            " so only updates make this memory differ from that of its weights."
        )
    if per_layer:
        plan += [(kind, path, [path]) for kind, paths in of_kind.items() for path in paths]

    choosable = Choosable(model, tuple(all_reads))
    evaluate_reads = build(choosable)
    done: dict[tuple[str, frozenset[str]], Evaluation] = {}

    def evaluate(kind: str, paths: frozenset[str]) -> Evaluation:
        if kind == "no_write" and paths == set(all_updates) and not carried:
            # The same, and of the program that is compiled in any case.
            kind, paths = "reset", frozenset(varied)
        if (kind, paths) not in done:
            if kind == "no_write":
                network = intervene(model, kind, "|".join(map(re.escape, sorted(paths))))
                done[kind, paths] = build(network)({})
            else:
                done[kind, paths] = evaluate_reads(choosable.choose(kind, paths))
        return done[kind, paths]

    keep = evaluate("keep", frozenset())
    rows = []
    with Reporter(len(plan), 0) as reporter:
        for number, (kind, layer, paths) in enumerate(plan, start=1):
            altered = evaluate(kind, frozenset(paths))
            rows.append(_effect(kind, layer, keep, altered))
            reporter.advance(number, {f"{kind} at {layer or 'all'}, accuracy": altered.accuracy})
    corrected = holm([row.p for row in rows])
    rows = [dataclasses.replace(row, p_holm=p) for row, p in zip(rows, corrected, strict=True)]
    unaltered = dataclasses.replace(_effect("keep", None, keep, keep), p=None)
    return Effects(keep, [unaltered, *rows], notes)


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


def table(effects: Effects) -> str:
    """Returns a Markdown table, a row per effect, and the notes below it."""
    header = ["memory", "altered at", "accuracy", "loss", "difference from `keep`, points"]
    header += ["worse", "better", "p", "p, Holm"]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for effect in effects.rows:
        altered = "" if effect.kind == "keep" else f"`{effect.layer}`" if effect.layer else "all"
        cells = [f"`{effect.kind}`", altered, f"{effect.accuracy:.2%}", f"{effect.loss:.4f}"]
        if effect.p is None:
            cells += [""] * 5
        else:
            cells += [f"{100 * effect.difference:+z.2f}", str(effect.worse), str(effect.better)]
            cells += [p_value(effect.p), p_value(effect.p_holm)]
        lines.append(cells)
    rows = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return "\n\n".join([rows, *effects.notes])


def write(workdir: Path, split: str, effects: Effects, context: dict[str, Any], title: str) -> None:
    """Writes interventions_<split>.json and .csv, and .png if layers were altered one by one.

    Args:
      workdir: of the run.
      split: that was evaluated.
      effects: of that split.
      context: of the evaluation, for the JSON file, where it stands first.
      title: of the plot.
    """
    file = workdir / f"interventions_{split}"
    rows = [dataclasses.asdict(row) for row in effects.rows]
    write_json(file.with_suffix(".json"), {**context, "notes": effects.notes, "effects": rows})
    write_csv(file.with_suffix(".csv"), COLUMNS, rows)
    single = [row for row in effects.rows if row.layer]
    if single:
        plot(file.with_suffix(".png"), single, title)


def plot(path: Path, single: Sequence[Effect], title: str) -> None:
    """Plots the difference in accuracy that each intervention at a single layer makes.

    A panel per intervention; bars are pale where the corrected p-value is not below 0.05.
    """
    kinds = list(dict.fromkeys(effect.kind for effect in single))
    reads = list(dict.fromkeys(e.layer for e in single if e.kind != "no_write"))
    updates = [e.layer for e in single if e.kind == "no_write"]
    names = [*reads, *(f"{update} (update)" for update in updates)]
    figure = Figure(figsize=(2.2 * len(kinds) + 2.5, 0.22 * len(names) + 2), layout="constrained")
    axes = figure.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        for effect in single:
            if effect.kind == kind:
                layer = effect.layer if kind != "no_write" else f"{effect.layer} (update)"
                color = "tab:red" if effect.difference < 0 else "tab:green"
                alpha = 1.0 if effect.p_holm < ALPHA else 0.35
                axis.barh(names.index(layer), 100 * effect.difference, color=color, alpha=alpha)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set(title=kind, ylim=(len(names) - 0.5, -0.5))
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    figure.supxlabel(f"difference in accuracy from keep, points (pale: p, Holm >= {ALPHA:.2f})")
    figure.suptitle(title)
    save_figure(figure, path)
