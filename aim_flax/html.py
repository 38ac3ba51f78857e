"""HTML pages that need nothing else: plots and images are in them, and no script is.

What comes from a user (names of classes, files and arms, paths, configs) goes through `escape`.
"""

import base64
import html
import re
from collections.abc import Iterable, Sequence
from string import Template

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2228; --quiet: #5a6672; --paper: #ffffff;
  --card: #f3f5f7; --line: #d8dee4; --mark: 31, 119, 180; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --quiet: #9ba6b1; --paper: #14181c; --card: #1f252b; --line: #38414a;
    --mark: 86, 160, 220; }
}
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem 1rem 4rem; }
h1, h2, h3 { line-height: 1.25; margin: 2rem 0 0.5rem; }
h1, h2, h3, p, li, summary, figcaption { overflow-wrap: anywhere; }
h1 { margin-top: 1rem; font-size: clamp(1.4rem, 5vw, 2rem); }
a { color: inherit; }
code, pre { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 0.9em; }
pre { background: var(--card); padding: 0.75rem; border-radius: 6px; overflow-x: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
th { vertical-align: bottom; }
td { white-space: nowrap; }
.left { text-align: left; }
.matrix td { padding: 0.2rem; min-width: 1.6rem; text-align: center; border: 0;
  background: rgba(var(--mark), var(--share)); }
.matrix thead th { writing-mode: vertical-rl; padding: 0.3rem 0; text-align: left; }
.matrix th { max-height: 14rem; max-width: 16rem; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; border: 0; font-weight: normal; }
figure { margin: 1rem 0; }
figure > img { max-width: 100%; height: auto; background: #ffffff; border-radius: 6px; }
figcaption { color: var(--quiet); font-size: 0.9rem; }
.numbers, .gallery { display: grid; gap: 0.75rem; padding: 0; margin: 1rem 0; }
.numbers { grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
.numbers div { background: var(--card); border-radius: 6px; padding: 0.6rem 0.8rem; }
.numbers dt, .numbers dd + dd { color: var(--quiet); font-size: 0.85rem; }
.numbers dd { margin: 0; overflow-wrap: anywhere; }
.numbers dt + dd { font-size: 1.4rem; }
.gallery { grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); }
.gallery figure { margin: 0; }
.gallery img { width: 100%; border-radius: 4px; }
details { margin: 1rem 0; }
@media (max-width: 40rem) {
  .plot { overflow-x: auto; }
  .plot img { max-width: 44rem; }
  .gallery { grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); }
}
summary { cursor: pointer; }
"""
# Nothing is loaded and nothing runs, whatever stands in the page.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="$policy">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
</main>
</body>
</html>
""")


def escape(words: str) -> str:
    """Returns words as HTML in which nothing has a meaning, also between quotes."""
    # Names of files may be no UTF-8, which Python holds as lone surrogates.
    return html.escape(words.encode("utf-8", "backslashreplace").decode())


def text(words: str) -> str:
    """Returns words as HTML, with those between backticks as code; nothing else has a meaning."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(words))


def page(title: str, parts: Iterable[str]) -> str:
    """Returns a whole page; the parts are HTML."""
    body = "\n".join(parts)
    return _PAGE.substitute(title=escape(title), style=_STYLE, policy=_POLICY, body=body)


def heading(words: str, level: int = 2) -> str:
    return f"<h{level}>{text(words)}</h{level}>"


def paragraph(words: str) -> str:
    return f"<p>{text(words)}</p>"


def items(lines: Iterable[str]) -> str:
    """Returns a list."""
    return "<ul>\n" + "\n".join(f"<li>{text(line)}</li>" for line in lines) + "\n</ul>"


def code(words: str) -> str:
    """Returns lines of a program or a file as they are."""
    return f"<pre>{escape(words)}</pre>"


def details(words: str, content: str) -> str:
    """Returns content that is folded away below a line."""
    return f"<details>\n<summary>{text(words)}</summary>\n{content}\n</details>"


def link(address: str, words: str) -> str:
    """Returns a link to a file beside the page; `address` is quoted as an URL is."""
    return f'<a href="{escape(address)}">{text(words)}</a>'


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Returns a table, as `markdown.table` does, that scrolls where a page is narrow."""

    def line(row: Sequence[str], cell: str) -> str:
        opening = [f'<{cell} class="left">'] * left + [f"<{cell}>"] * (len(row) - left)
        cells = (f"{tag}{text(words)}</{cell}>" for tag, words in zip(opening, row, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    body = "\n".join(line(row, "td") for row in rows[1:])
    head = line(rows[0], "th")
    return (
        f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def matrix(names: Sequence[str], shares: Sequence[Sequence[float]], cells: Sequence) -> str:
    """Returns a square table, each cell as dark as its share, 0 to 1; cells of 0 stay empty."""
    head = "".join(f'<th title="{escape(name)}">{text(name)}</th>' for name in names)
    lines = []
    for name, row, values in zip(names, shares, cells, strict=True):
        columns = zip(row, values, strict=True)
        inner = "".join(f'<td style="--share: {s:.2f}">{v or ""}</td>' for s, v in columns)
        lines.append(f'<tr><th class="left" title="{escape(name)}">{text(name)}</th>{inner}</tr>')
    body = "\n".join(lines)
    return (
        f'<div class="wide"><table class="matrix">\n<thead><tr><td></td>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def numbers(cards: Iterable[tuple[str, str, str]]) -> str:
    """Returns (what, number, note) as cards."""
    inner = "\n".join(
        f"<div><dt>{text(what)}</dt><dd>{text(number)}</dd><dd>{text(note)}</dd></div>"
        for what, number, note in cards
    )
    return f'<dl class="numbers">\n{inner}\n</dl>'


def figure(png: bytes, caption: str) -> str:
    """Returns a plot of the width of the page, at most, with what it shows.

    On a phone it is as wide as can be read, and scrolls.
    """
    return f'<div class="plot">{_figure(png, caption)}</div>'


def gallery(images: Iterable[tuple[bytes, str]]) -> str:
    """Returns small images, each (PNG, caption), side by side."""
    inner = "\n".join(_figure(*image) for image in images)
    return f'<div class="gallery">\n{inner}\n</div>'


def _figure(png: bytes, caption: str) -> str:
    return f"<figure>{_image(png, caption)}<figcaption>{text(caption)}</figcaption></figure>"


def _image(png: bytes, words: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(words)}">'
