"""Links between the project's pages: the files are there, and so are the headings."""

import re

import pytest

from tests.runs import ROOT

PAGES = [
    "README.md",
    "CHANGELOG.md",
    *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]


def headings(page):
    """Returns the anchors of a page's headings, made as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found = []
    for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
        anchor = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        again = sum(
            other == anchor or re.fullmatch(rf"{anchor}-\d+", other) is not None for other in found
        )
        found.append(f"{anchor}-{again}" if again else anchor)
    return found


def test_headings_become_the_anchors_of_github(tmp_path):
    page = tmp_path / "x.md"
    page.write_text(
        "# A `b_c`, d: e\n```bash\n# no heading\n```\n## [Two words](x.md)\n## Two words\n"
    )
    assert headings(page) == ["a-b_c-d-e", "two-words", "two-words-1"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in headings(file), target
