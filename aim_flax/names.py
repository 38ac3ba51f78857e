"""Names that come from outside, of files and classes: safe to print in a line, and to draw."""

import functools

# Families that have the letters and signs that Matplotlib's own font lacks; those that a machine
# has are used.
_FALLBACKS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Noto Serif CJK JP",
    "Noto Serif CJK SC",
    "Source Han Sans",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "PingFang SC",
    "Hiragino Sans",
    "Arial Unicode MS",
    "Noto Sans",
    "Noto Sans Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Symbola",
    "Noto Sans Symbols2",
    "Noto Emoji",
)
_OWN = "DejaVu Sans"


def printable(text: str) -> str:
    """Returns a text as one line of what can be printed anywhere UTF-8 can.

    Line breaks, other control characters and bytes that are no text become escapes like "\\n".
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shortened(text: str, most: int) -> str:
    """Returns a text of at most `most` characters; what a longer one loses is in its middle."""
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def drawable(text: str, most: int = 40) -> str:
    """Returns a name as Matplotlib can draw it: short, without mathematics, in letters of `fonts`.

    A character that no font of this machine has becomes an escape like "\\u732b".
    """
    have = _characters()
    drawn = "".join(
        c if ord(c) in have else c.encode("unicode_escape").decode()
        for c in shortened(printable(text), most)
    )
    return drawn.replace("$", r"\$")


@functools.cache
def fonts() -> list[str]:
    """Returns the families to draw with: Matplotlib's own, then those that have other letters."""
    from matplotlib import font_manager

    there = set(font_manager.get_font_names())
    return [_OWN, *(family for family in _FALLBACKS if family in there)]


@functools.cache
def _characters() -> frozenset[int]:
    """Returns the characters that `fonts` have."""
    from matplotlib import font_manager

    files = [font_manager.findfont(family) for family in fonts()]
    return frozenset().union(*(font_manager.get_font(file).get_charmap() for file in files))
