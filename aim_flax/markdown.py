"""Markdown tables."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], left: int = 1, padded: bool = False) -> str:
    """Returns a Markdown table.

    Args:
      rows: the header, then the others.
      left: number of columns that are aligned to the left; the others are aligned to the right.
      padded: whether cells are padded with spaces to the width of their column.
    """
    widths = [max(map(len, column)) if padded else 0 for column in zip(*rows, strict=True)]
    rule = ["-" * (width or 3) for width in widths[:left]]
    rule += ["-" * (width - 1 if padded else 3) + ":" for width in widths[left:]]
    lines = []
    for row in rows:
        cells = list(zip(row, widths, strict=True))
        aligned = [cell.ljust(width) for cell, width in cells[:left]]
        lines.append(aligned + [cell.rjust(width) for cell, width in cells[left:]])
    lines.insert(1, rule)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
