"""What is drawn of a memory is what it holds."""

import numpy as np
import pytest

from aim_flax.cli import evaluate as evaluate_command
from aim_flax.evaluate.memory_pictures import (
    Notebooks,
    as_map,
    class_distances,
    first_of_classes,
    plot_learned,
    plot_written,
)
from aim_flax.train import loop
from aim_flax.train.restore import restore_run
from tests.arrays import draw
from tests.asserts import assert_close, assert_equal, fails
from tests.networks import weights_of
from tests.runs import digits, read_json
from tests.test_plots import figures  # noqa: F401

pytestmark = pytest.mark.usefixtures("standard_promotion", "quick_compile")


def test_distances_between_classes_are_in_units_of_the_spread_within():
    # Two classes whose images lie 1 from their means, which are 6 apart; a third has none.
    written = np.array([[[-1.0, 0]], [[1, 0]], [[-1, 6]], [[1, 6]]])
    distances = class_distances(written, np.array([0, 0, 1, 1]), 3)
    assert_close(distances[:2, :2], np.array([[0, 6], [6, 0]]))
    assert np.isnan(distances[2]).all()
    assert class_distances(np.zeros((2, 3)), np.array([0, 1]), 2).tolist() == [[0, 0], [0, 0]]


def test_memories_of_every_shape_are_maps():
    assert as_map(draw(2, 3, 4)).shape == (2, 3, 4)
    assert as_map(draw(12)).shape == (3, 4, 1)
    assert as_map(draw(7)).shape == (1, 7, 1)
    assert as_map(draw(5, 4)).shape == (5, 4, 1)
    assert as_map(draw(2, 3, 4, 5)).shape == (24, 5, 1)


def test_images_are_shown_of_all_classes_in_turn():
    assert first_of_classes(np.array([2, 0, 0, 2, 1, 0]), 5) == [1, 4, 0, 2, 3]


def test_learned_content_is_drawn_channel_by_channel(tmp_path, figures):  # noqa: F811
    content = draw(2, 3, 4)
    content[..., 1] *= 9
    same = np.broadcast_to(draw(6), (2, 3, 6))
    plot_learned(tmp_path / "learned.png", {"memory": content, "memory_initial": same}, "a run")
    (figure,) = figures
    drawn = [
        axis for axis in figure.axes if axis.images and axis.get_images()[0].get_array() is not None
    ]
    maps = [np.asarray(axis.images[0].get_array()) for axis in drawn]
    assert drawn[0].get_title() == "channel 1"
    np.testing.assert_array_equal(maps[0], content[..., 1])
    assert any(m.size == 6 and np.allclose(m.ravel(), same[0, 0]) for m in maps)
    labels = [part.get_suptitle() for part in figure.subfigs]
    assert "memory_initial: what was learned, the same at every position" in labels


def test_what_images_write_is_drawn_beside_them(tmp_path, figures):  # noqa: F811
    written, images = draw(3, 2, 2, 4), draw(3, 5, 5, 1)
    # Of two memories, one of which no image writes.
    learned = {"memory_initial": np.zeros((2, 2, 4)), "memory": np.ones((2, 2, 4))}
    books = Notebooks(learned, images, np.array([1, 0, 1]), {"memory": written})
    plot_written(tmp_path / "written.png", books, ("cat", "dog"), "a run")
    (figure,) = figures
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == ["cat", "dog", "dog"]
    maps = [np.asarray(axis.images[0].get_array()) for axis in figure.axes if axis.images]
    for of_first in (written[1] - 1, written[1] - written.mean(axis=0)):
        expected = np.sqrt((of_first**2).mean(axis=-1))
        assert any(m.shape == (2, 2) and np.allclose(m, expected) for m in maps)


def test_what_images_write_in_several_memories_is_drawn_together():
    learned = {"memory/a": np.zeros((2, 2, 1), "f"), "memory/b": np.ones((2, 2, 3), "f")}
    written = {name: draw(3, *start.shape) for name, start in learned.items()}
    books = Notebooks(learned, draw(3, 5, 5, 1), np.zeros(3, int), written)
    contents, start = books.contents()
    assert_equal((contents - start)[..., 1:], written["memory/b"] - 1)
    assert_equal(contents[..., 0], written["memory/a"][..., 0])


@pytest.fixture(scope="module")
def run(tmp_path_factory, standard_promotion, quick_compile):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    loop.run(digits("aim", "train.epochs=1"), workdir, 1, quiet=True)
    return workdir


@pytest.fixture
def seen(monkeypatch):
    """The learned contents that would be drawn."""
    drawn = {}
    monkeypatch.setattr(
        "aim_flax.evaluate.memory_pictures.plot_learned",
        lambda path, learned, title: drawn.update(learned),
    )
    return drawn


@pytest.mark.slow
def test_eval_draws_the_memory_of_each_part(tmp_path, capsys, seen):
    config = digits("aim", "train.epochs=1", "memory.per=('layer1','layer2','head')")
    loop.run(config, tmp_path / "run", 1, quiet=True)
    assert read_json(tmp_path / "run" / "summary.json")["memory_floats"] == 3 * 8
    evaluate_command.main(["--workdir", str(tmp_path / "run"), "--memory-pictures"])
    assert "memory_written_test.png" in capsys.readouterr().out
    learned = restore_run(tmp_path / "run").variables["params"]["memory"]
    assert set(seen) == {f"memory/{part}" for part in learned}
    for part in ("layer1", "layer2", "head"):
        expected = weights_of({"params": learned}, part)[0]
        assert_close(seen[f"memory/{part}"], np.asarray(expected))


@pytest.mark.slow
def test_eval_draws_the_memory_of_a_run(run, capsys, seen):
    evaluate_command.main(["--workdir", str(run), "--memory-pictures", "--devices", "2"])
    assert "360 images: memory_learned.png, memory_written_test.png" in capsys.readouterr().out
    variables = restore_run(run).variables
    assert_close(seen["memory"], np.asarray(weights_of(variables)[0]))
    result = read_json(run / "memory_classes_test.json")
    assert np.shape(result["distances"]) == (10, 10)
    assert result["images"] == 360
    assert np.diag(result["distances"]).max() == 0 < np.max(result["distances"])
    for name in ("memory_written_test.png", "memory_classes_test.png"):
        assert (run / name).read_bytes()[:4] == b"\x89PNG"


def test_pictures_and_alterations_are_refused_together(run, capsys):
    told = fails(
        capsys,
        evaluate_command.main,
        "--workdir",
        str(run),
        "--memory-pictures",
        "--memory",
        "zero",
    )
    assert "--memory-pictures draws the memory as it is: leave out --memory" in told
