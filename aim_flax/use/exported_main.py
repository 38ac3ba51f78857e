"""Tells the classes of images: python network.zip IMAGE ..."""

import sys

from aim_network import Network

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(f"usage: python {sys.argv[0]} IMAGE ...")
    network = Network(sys.path[0])
    for image in sys.argv[1:]:
        try:
            name, probability = network.predict(image)
        except (OSError, ValueError) as error:
            sys.exit(f"{image}: {error}")
        print(f"{image}: {name} {probability:.2%}")
