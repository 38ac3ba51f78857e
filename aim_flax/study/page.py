"""A study's page, report.html: its report, its runs and what they left, in one file.

It is made from the report and the files of the study's folder alone.
"""

import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aim_flax import files, html
from aim_flax.evaluate.mistakes import caption, tiles
from aim_flax.files import read_json
from aim_flax.study.results import Row, is_finished

# Of one run of each arm; its own page has them all.
_SHOWN_MISTAKES = 12
_MEMORY = {
    "memory_learned.png": "what was learned",
    "memory_written_test.png": "what single images write",
    "memory_classes_test.png": "how far classes are apart in it",
}

# ("text", a sentence), ("items", sentences), ("code", lines), ("table", rows of cells), or
# ("figure", (file, what it shows)).
Part = tuple[str, Any]


def write_page(folder: Path, title: str, parts: Sequence[Part], rows: Sequence[Row]) -> None:
    """Writes report.html.

    Args:
      parts: of the report, in order.
      rows: of the runs, in order; what they left is in `folder`/<arm>/<seed>.
    """
    render = {"text": html.paragraph, "items": html.items, "code": html.code, "table": html.table}
    render["figure"] = lambda content: html.figure((folder / content[0]).read_bytes(), content[1])
    body = [render[kind](content) for kind, content in parts]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for arm in arms:
        body += _arm(folder, arm, [row for row in rows if row["arm"] == arm])
    body += [html.heading("Runs"), _runs(folder, rows)]
    files.write_text(folder / "report.html", html.page(title, body))


def _runs(folder: Path, rows: Sequence[Row]) -> str:
    """Returns a list of all runs, those that have a page with a link to it."""
    lines = []
    for row in rows:
        arm, seed = str(row["arm"]), str(row["seed"])
        words = f"`{arm}` seed {seed}"
        if (folder / arm / seed / "report.html").is_file():
            address = "/".join(urllib.parse.quote(part, safe="") for part in (arm, seed))
            words = html.link(f"{address}/report.html", words)
        else:
            words = html.text(words)
        result = row.get("status", "")
        if is_finished(row):
            result = f"{float(row['test_accuracy']):.2%}, best in step {row['best_step']}"
        lines.append(f"<li>{words}: {html.text(result)}</li>")
    inner = "\n".join(lines)
    return html.details(f"{len(rows)} runs, test accuracy", f"<ul>\n{inner}\n</ul>")


def _arm(folder: Path, arm: str, rows: Sequence[Row]) -> list[str]:
    """Returns the memory and the mistakes of an arm's first run that has them, folded away."""
    parts = []
    runs = [(row["seed"], folder / str(arm) / str(row["seed"])) for row in rows]
    for name, what in _MEMORY.items():
        for seed, run in runs:
            if (run / name).is_file():
                words = f"Memory of `{arm}`, seed {seed}: {what}"
                parts.append(html.figure((run / name).read_bytes(), words))
                break
    for seed, run in runs:
        sheet = run / "mistakes_test.png"
        if sheet.is_file() and (run / "eval_test.json").is_file():
            found = read_json(run / "eval_test.json").get("mistakes", [])
            captions = [caption(row) for row in found[:_SHOWN_MISTAKES]]
            images = tiles(sheet.read_bytes(), len(found))[:_SHOWN_MISTAKES]
            parts.append(html.paragraph(f"Predicted wrongly by seed {seed}, the surest first:"))
            parts.append(html.gallery(zip(images, captions, strict=True)))
            break
    return [html.details(f"What runs of `{arm}` show", "\n".join(parts))] if parts else []
