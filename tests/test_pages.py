"""Pages of runs and studies: whole, safe whatever things are called, and always the same."""

import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from aim_flax import html
from aim_flax.data.in_memory import InMemory, Split
from aim_flax.errors import DataError
from aim_flax.evaluate.evaluation import Evaluation
from aim_flax.evaluate.mistakes import MOST, mistakes, tiles
from aim_flax.evaluate.report import write_evaluation
from aim_flax.files import save_figure, write_csv, write_json
from aim_flax.study import report as study_report
from aim_flax.train.page import MOST_CLASSES, write_page
from tests.test_comparison import recorded

HOSTILE = (
    "<script>alert(1)</script>",
    '" onmouseover="alert(2)',
    "'><img src=x onerror=alert(3)>",
    "&lt;b&gt; $x_1$ `code`",
    "日本語 🐶",
    "no utf-8: \udcff",
    "two\nlines",
    "</style></title></main>",
)


class Page(HTMLParser):
    """What a browser would find in a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(path.read_bytes().decode())
        assert self.open == []
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def images(self):
        return [attributes["src"] for tag, attributes in self.tags if tag == "img"]


def check(path) -> Page:
    """Reads a page that needs nothing else, and in which nothing runs."""
    page = Page(path)
    allowed = {"class", "lang", "charset", "name", "content", "http-equiv", "src", "alt", "style"}
    allowed |= {"title", "href"}
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base"), tag
        assert attributes.keys() <= allowed
        assert attributes.get("href", "").split(":")[0] not in ("javascript", "http", "https")
    assert all(source.startswith("data:image/png;base64,") for source in page.images())
    (policy,) = [a["content"] for tag, a in page.tags if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; img-src data:;")
    return page


def plain(name):
    """What stands for a name on a page."""
    return name.replace("\udcff", "\\udcff").replace("`", "")


def dataset(classes, count=30, shape=(8, 6, 3)):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, *shape)).astype(np.uint8)
    labels = np.arange(count, dtype=np.int32) % len(classes)
    names = lambda split, index: f"/photos/{split}/<i>{index}.png"  # noqa: E731
    return InMemory(tuple(classes), {"test": Split(images, labels)}, names=names)


def evaluation(data):
    """All images are predicted as the next class, but for those of the first."""
    labels = data.labels("test")
    predicted = np.where(labels == 0, 0, (labels + 1) % len(data.classes)).astype(np.int32)
    confusion = np.zeros((len(data.classes),) * 2, int)
    np.add.at(confusion, (labels, predicted), 1)
    probability = np.linspace(0.3, 0.9, len(labels)).astype(np.float32)
    return Evaluation(1.5, confusion, predicted == labels, 0, labels, predicted, probability)


def write_run(folder, classes=HOSTILE, finished=True):
    """Writes what a run leaves that its page shows."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"name": "<u>name</u>", "arm": "aim & co", "seed": 0, "data": {"dir": HOSTILE[0]}}
    write_json(folder / "config.json", config)
    write_csv(folder / "metrics.csv", ("epoch", "step"), [{"epoch": 1, "step": 7}])
    data = dataset(classes)
    context = {"split": "test", "checkpoint": "best", "step": 7, "memory": "keep", "at": ".*"}
    write_evaluation(folder, "test", evaluation(data), data, 255.0, context)
    figure = Figure(figsize=(1, 1))
    for name in ("history.png", "memory_use.png", "memory_learned.png"):
        save_figure(figure, folder / name)
    effect = {"kind": "zero", "layer": HOSTILE[2], "accuracy": 0.5, "loss": 1.0, "difference": -0.1}
    effect |= {"worse": 3, "better": 0, "p": 0.2, "p_holm": 0.4}
    found = {"split": "test", "step": 7, "at": HOSTILE[1], "notes": ["At `a` nothing."]}
    write_json(folder / "interventions_test.json", found | {"effects": [effect]})
    if finished:
        summary = dict(test_accuracy=0.1, test_accuracy_low=0.05, test_accuracy_high=0.2)
        summary |= dict(test_balanced_accuracy=0.12, test_macro_f1=0.11, test_examples=30)
        summary |= dict(val_accuracy=0.3, selected_on="val", best_step=7, steps=21, epochs=3)
        summary |= dict(params=1234, batch_stats=8, train_seconds=90.0, device="1 x cpu")
        write_json(folder / "summary.json", summary | {"skipped_images": 2})
    return folder


def test_page_of_a_run_shows_what_it_left_whatever_things_are_called(tmp_path):
    write_page(write_run(tmp_path))
    page = check(tmp_path / "report.html")
    assert page.words.count("<u>name</u>:aim & co, seed 0") == 2
    for name in HOSTILE:
        # Row and column of the matrix, the table of classes, and the captions of its mistakes.
        assert page.text.count(plain(name)) >= 3, name
    for shown in ("10.00%", "12.00%", "11.00%", "1 of 3", "1,234", "1.5 minutes", "2 images could"):
        assert shown in page.text
    wrong = (~evaluation(dataset(HOSTILE)).is_correct).sum()
    assert len(page.images()) == 3 + min(wrong, MOST)
    assert "<i>29.png" in page.text
    assert "/photos" not in page.text
    before = (tmp_path / "report.html").read_bytes()
    write_page(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before


def test_page_of_a_run_that_is_not_finished_or_from_before(tmp_path):
    write_run(tmp_path, finished=False)
    (tmp_path / "mistakes_test.png").unlink()
    result = json.loads((tmp_path / "eval_test.json").read_text())
    for key in ("balanced_accuracy", "macro_f1", "mistakes"):
        del result[key]
    write_json(tmp_path / "eval_test.json", result)
    write_page(tmp_path)
    page = check(tmp_path / "report.html")
    assert "This run is not finished." in page.text
    assert len(page.images()) == 3
    for file in tmp_path.iterdir():
        if file.name != "config.json":
            file.unlink()
    write_page(tmp_path)
    assert check(tmp_path / "report.html").images() == []


def test_many_classes_are_listed_by_what_is_confused_most(tmp_path):
    classes = [f"class {i}" for i in range(MOST_CLASSES + 1)]
    write_page(write_run(tmp_path, classes))
    page = check(tmp_path / "report.html")
    assert "What is confused most often:" in page.text
    assert not any(a.get("class") == "matrix" for _, a in page.tags)
    # Two of 30 images each; the first class is never confused.
    start = page.words.index("of that class")
    cells = [word for word in page.words[start + 1 :] if word.strip()][:4]
    assert cells == ["class 1", "class 2", "2", "100%"]


def test_mistakes_are_the_surest_first_and_their_tiles_are_the_images():
    data = dataset(("a", "b", "c"))
    rows, sheet = mistakes(evaluation(data), data, "test", 255.0)
    assert [row["image"] for row in rows[:2]] == [f"/photos/test/<i>{i}.png" for i in (29, 28)]
    assert rows[0] == {
        "image": "/photos/test/<i>29.png",
        "class": "c",
        "predicted": "a",
        "probability": pytest.approx(0.9),
    }
    chances = [row["probability"] for row in rows]
    assert chances == sorted(chances, reverse=True)
    for tile, i in zip(tiles(sheet, len(rows)), (29, 28), strict=False):
        with Image.open(io.BytesIO(tile)) as image:
            assert image.size == (72, 96)
            np.testing.assert_array_equal(np.asarray(image)[6::12, 6::12], data.image("test", i))


def test_a_split_without_mistakes_or_images_has_no_sheet(monkeypatch):
    data = dataset(("a", "b"), shape=(8, 8, 1))
    found = evaluation(data)
    right = Evaluation(0.0, np.eye(2, dtype=int), np.ones(30, bool), 0, *[found.labels] * 3)
    assert mistakes(right, data, "test", 16.0) == ([], None)
    left_out = np.full(30, -1, np.int32)
    nothing = Evaluation(
        0.0, np.eye(2, dtype=int), np.zeros(30, bool), 30, left_out, left_out, left_out
    )
    assert mistakes(nothing, data, "test", 16.0) == ([], None)

    def gone(split, index):
        raise DataError("gone")

    monkeypatch.setattr(data, "image", gone)
    rows, sheet = mistakes(found, data, "test", 16.0)
    assert (len(rows), sheet) == (15, None)


def test_page_of_a_study_has_its_report_its_runs_and_their_pictures(tmp_path):
    rows = [row | {"arm": row["arm"].replace("half", "<b>half")} for row in recorded("planted")]
    rows[0] |= {"status": "diverged at step 30"}
    write_page(write_run(tmp_path / "<b>half" / rows[21]["seed"]))
    study_report.write(tmp_path, rows, {}, "control", "Ablation of <x>", "python ablate.py '<y>'")
    page = check(tmp_path / "report.html")
    assert "Ablation of <x>" in page.text
    assert "python ablate.py '<y>'" in page.text
    report = (tmp_path / "report.md").read_text()
    sentences = [line for line in report.splitlines() if line and line[0] not in "|`#!-"]
    assert len(sentences) >= 5
    for sentence in sentences:
        assert sentence.replace("`", "") in page.text
    links = [a["href"] for tag, a in page.tags if tag == "a"]
    assert links == [f"%3Cb%3Ehalf/{rows[21]['seed']}/report.html"]
    # The plots, the memory, and the first twelve mistakes of that run.
    assert len(page.images()) == 2 + 1 + 12
    assert page.text.count("best in step") == 59
    assert "control seed 0: diverged at step 30" in page.text


def test_text_is_escaped_and_code_is_marked():
    assert html.text('a `b<c>` & "d"') == "a <code>b&lt;c&gt;</code> &amp; &quot;d&quot;"
    assert html.escape("\udcff`x`'") == "\\udcff`x`&#x27;"
