"""The picture in README is what docs/method.py draws."""

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "method.svg"


def drawn(file):
    """Returns the words and the shapes, (style, coordinates), in the order of drawing."""
    text = file.read_text()
    words = re.findall(r"<!-- (.*?) -->", text, re.DOTALL)
    paths = ElementTree.fromstring(text).iterfind(".//{*}g[@id='axes_1']/{*}g/{*}path[@clip-path]")
    shapes = [
        (path.get("style"), [float(n) for n in re.findall(r"-?[\d.]+", path.get("d"))])
        for path in paths
    ]
    return words, shapes


def test_script_draws_the_committed_picture(tmp_path):
    runpy.run_path(ROOT / "docs" / "method.py")["main"](tmp_path / "method.svg")
    words, shapes = drawn(tmp_path / "method.svg")
    committed_words, committed_shapes = drawn(FILE)
    assert words == committed_words
    assert {"layer 3", "update", "read", "write", 'carry="state"'} <= set(words)
    assert len(shapes) == len(committed_shapes) > 100
    for (style, points), (committed_style, committed) in zip(shapes, committed_shapes, strict=True):
        assert style == committed_style
        np.testing.assert_allclose(points, committed, atol=0.01)


def test_picture_is_small_and_of_no_date_and_readme_shows_it():
    assert FILE.stat().st_size < 200_000
    assert "dc:date" not in FILE.read_text()
    (alt,) = re.findall(r"!\[([^\]]+)\]\(docs/method\.svg\)", (ROOT / "README.md").read_text())
    assert len(alt.split()) > 10  # for those who can't see it
