"""What a finished run leaves: its summary and its plots."""

from pathlib import Path
from typing import Any

import jax

from aim_flax import files
from aim_flax.data.preprocessing import Preprocessing
from aim_flax.devices import union_size
from aim_flax.evaluate.evaluation import Evaluation
from aim_flax.evaluate.report import write_evaluation
from aim_flax.models.describe import memory_floats
from aim_flax.train import report
from aim_flax.train.experiment import Experiment
from aim_flax.train.optimizer import plateau_cuts
from aim_flax.train.page import write_page
from aim_flax.train.progress import Progress
from aim_flax.train.workdir import versions


def run_summary(
    experiment: Experiment, progress: Progress, best: dict[str, Any], test: Evaluation
) -> dict[str, Any]:
    """Returns the summary of a run that has come to its end.

    Args:
      best: the variables of its best epoch.
      test: what that made of the test split.
    """
    config = experiment.config
    low, high = test.accuracy_interval()
    row = next(row for row in progress.history if row["step"] == progress.best_step)
    timed, waited = progress.timed_seconds, progress.wait_share
    return {
        "name": config.name,
        "arm": config.arm,
        "seed": config.seed,
        "test_accuracy": test.accuracy,
        "test_accuracy_low": low,
        "test_accuracy_high": high,
        "test_balanced_accuracy": test.balanced_accuracy,
        "test_macro_f1": test.macro_f1,
        "test_loss": test.loss,
        "test_examples": test.count,
        "skipped_images": sum(
            union_size(indices, experiment.dataset.records[split])
            for split, indices in experiment.dataset.skipped.items()
        ),
        "val_accuracy": row["val_accuracy"],
        "val_loss": row["val_loss"],
        "selected_on": config.eval.select_on,
        "best_step": progress.best_step,
        "steps": progress.history[-1]["step"],
        "epochs": len(progress.history),
        "params": _size(best["params"]),
        "batch_stats": _size(best.get("batch_stats", {})),
        "memory_floats": memory_floats(config),
        "train_seconds": round(progress.seconds, 3),
        "examples_per_second": round(progress.timed_examples / timed, 1) if timed else None,
        "data_wait_share": None if waited is None else round(waited, 4),
        "device": f"{experiment.devices.count} x {jax.devices()[0].device_kind}",
        "versions": versions(),
    }


def write_results(
    workdir: Path,
    experiment: Experiment,
    history: report.History,
    summary: dict[str, Any],
    test: Evaluation,
) -> None:
    """Writes what a finished run leaves beside its checkpoints and events."""
    from aim_flax.train import plots

    config = experiment.config
    title = f"{config.name}:{config.arm}, seed {config.seed}"
    report.write_metrics(workdir, history)
    cuts: list[int] = []
    if config.schedule.plateau_patience is not None:
        schedule, accuracies = config.schedule, [row["val_accuracy"] for row in history]
        cuts = plateau_cuts(accuracies, schedule.plateau_patience, schedule.plateau_min_delta)
    best_step = summary["best_step"]
    plots.plot_history(workdir / "history.png", history, title, cuts, best_step)
    # Where nn.scan keeps no intermediates, no use was measured: see `memory_use`.
    if any(row["memory_use"] for row in history):
        plots.plot_memory_use(workdir / "memory_use.png", history, title)
    context = {"split": "test", "checkpoint": "best", "step": best_step}
    context |= {"memory": "keep", "at": ".*", "other_images": None}
    white = Preprocessing.of(config.data).white
    write_evaluation(workdir, "test", test, experiment.dataset, white, context)
    # Last but for the page that shows it, because it marks the run as finished.
    files.write_json(workdir / "summary.json", summary, sealed=True)
    write_page(workdir)


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def one_line(summary: dict[str, Any]) -> str:
    return (
        f"{summary['name']}:{summary['arm']} seed {summary['seed']}: test accuracy"
        f" {summary['test_accuracy']:.2%} ({summary['test_accuracy_low']:.2%} to"
        f" {summary['test_accuracy_high']:.2%}) on {summary['test_examples']} images, best"
        f" {summary['selected_on']} accuracy {summary['val_accuracy']:.2%} at step"
        f" {summary['best_step']}, {summary['train_seconds']:.1f} s"
    )
