"""How far fine-tuning moved the kernels that low-rank changes are of, from their ImageNet weights.

    python docs/moved.py PLAIN CHANGED

PLAIN and CHANGED are workdirs of runs that start from the same weights, CHANGED with low-rank
changes. Prints, for each layer that has one, the norm of its kernel's difference from these
weights in both, the change included, and their ratio: that of docs/predictions.md.
"""

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from aim_flax import markdown
from aim_flax.console import reporting_errors
from aim_flax.models.pretrained import read_pretrained
from aim_flax.train.restore import restore_run

Params = Mapping[str, np.ndarray]


def distances(start: Params, plain: Params, changed: Params) -> dict[str, tuple[float, float]]:
    """Returns the norms of both differences from the weights at the start, by layer.

    Args:
      start, plain, changed: parameters by path, such as "stage4_block1/expand/kernel".
    """
    found = {}
    for path, up in changed.items():
        layer, _, rest = path.partition("/low_rank/")
        if rest != "up/kernel":
            continue
        kernel, down = f"{layer}/kernel", changed[f"{layer}/low_rank/down/kernel"]
        moved = plain[kernel], changed[kernel] + down @ up
        found[layer] = tuple(float(np.linalg.norm(m - start[kernel])) for m in moved)
    return found


def _by_path(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(params, sep="/").items()}


@reporting_errors()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plain")
    parser.add_argument("changed")
    given = parser.parse_args()
    plain, changed = restore_run(given.plain), restore_run(given.changed)
    weights = read_pretrained(plain.config, plain.variables, plain.variables).arrays
    start = {"/".join(rest): array for (kind, *rest), array in weights.items() if kind == "params"}
    found = distances(start, *(_by_path(run.variables["params"]) for run in (plain, changed)))
    rows = [["layer", "plain", "changed", "ratio"]]
    rows += [[layer, f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f}"] for layer, (a, b) in found.items()]
    print(markdown.table(rows, left=1))


if __name__ == "__main__":
    main()
