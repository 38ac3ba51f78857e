"""The notebook in docs/ runs, shows what it says, and was saved with its outputs."""

import json
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

FILE = Path(__file__).parents[1] / "docs" / "ablation.ipynb"
CELLS = json.loads(FILE.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_cells_run_in_order_and_what_the_notebook_says_is_true(capsys):
    """Without Jupyter: nothing in the notebook needs its kernel, and the outputs are text."""
    backend = matplotlib.get_backend()
    plt.switch_backend("Agg")
    names = {}
    try:
        for number, cell in enumerate(CODE, start=1):
            exec(compile("".join(cell["source"]), f"{FILE.name}, cell {number}", "exec"), names)
        left, right = plt.gcf().axes
        assert len(left.lines) == 3
        assert len(right.lines) == 2 * 2 + 1
    finally:
        plt.close("all")
        plt.switch_backend(backend)

    assert names["train_images"].shape == (200, 8, 8, 1)
    assert names["test_images"].shape == (800, 8, 8, 1)
    assert (names["reads"], names["updates"]) == (["hidden2", "head"], ["hidden1"])
    assert len(names["trained"]["memory"][1][0]) == 500
    # It depends on its memory: "by tens of points".
    altered = names["altered"]
    for kind in ("zero", "shuffle", "no_write"):
        assert (altered["keep"] - altered[kind]).mean() > 0.2
    # "no variant beats the control, which has the fewest parameters"
    results, compared = names["results"], names["compared"]
    assert list(compared) == ["memory", "no update"]
    for comparison in compared.values():
        assert len(comparison.differences) == 5
        assert comparison.summary.low <= 0
    assert min(results["control"].values()) > 0.85
    np.testing.assert_array_equal(list(results["memory"].values()), altered["keep"])
    sizes = [int(row.split("|")[2].replace(",", "")) for row in names["rows"][2:]]
    assert min(sizes) == sizes[0]
    printed = capsys.readouterr().out
    for row in names["rows"]:
        assert row in printed


def test_outputs_are_saved_and_name_no_errors():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    kinds = {"stream", "execute_result", "display_data"}
    assert {output["output_type"] for output in outputs} == kinds
    assert all(output.get("name", "stdout") == "stdout" for output in outputs)
    assert "image/png" in CODE[-1]["outputs"][-1]["data"]
    for cell in CODE:
        assert bool(cell["outputs"]) == ("print(" in "".join(cell["source"]) or cell in SHOWN)


# Cells whose last line is shown: the shapes of the data, and the plot.
SHOWN = [CODE[1], CODE[-1]]


def test_file_is_small_and_of_no_machine():
    text = FILE.read_text()
    assert len(text) < 300_000
    for trace in ("/home/", "/tmp/", "/root", "site-packages", "Traceback", "Warning"):
        assert trace not in text
