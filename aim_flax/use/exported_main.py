"""Tells the classes of images: python network.zip IMAGE ..."""

import sys

from aim_network import Network


def printable(text):
    """Returns a text as one line, without control characters: those become escapes like "\\n"."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(printable(f"usage: python {sys.argv[0]} IMAGE ..."))
    network = Network(sys.path[0])
    for image in sys.argv[1:]:
        try:
            name, probability = network.predict(image)
        except (OSError, ValueError) as error:
            sys.exit(printable(f"{image}: {error}"))
        print(printable(f"{image}: {name} {probability:.2%}"))
