"""XLA's text of a compiled program: where in the network its instructions are, and what they move.

The text is described at openxla.org/xla/tiled_layout (layouts) and in XLA's hlo_parser.cc.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

# Leaves of a network's parameters, as JAX names the arguments of a step: state.params['a']['b'].
_PARAMETER = re.compile(r"\bparams((?:\[\\?'[^'\\]+\\?'\])+)")
_KEY = re.compile(r"\[\\?'([^'\\]+)\\?'\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+(\d+)\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLED = re.compile(r"(?:body|condition|to_apply|(?:true|false)_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONTROL_FLOW = ("while", "conditional", "call")
# What only names arrays that others have written.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", *_CONTROL_FLOW)


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of the program.

    Attributes:
      bytes: that it takes, with the padding of its tiles.
      space: the number of the memory that it is in; 0 is the device's own.
    """

    bytes: int
    space: int


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction.

    Attributes:
      name, opcode: XLA's.
      outputs: the arrays it makes, those of nested tuples one after the other.
      operands: the names of the instructions whose outputs it takes.
      op_name: what JAX calls the operation that it computes, or of several the last; "": unknown.
      text: the line.
    """

    name: str
    opcode: str
    outputs: tuple[Array, ...]
    operands: tuple[str, ...]
    op_name: str
    text: str


class Place(NamedTuple):
    """Where in a training step an operation is.

    Attributes:
      path: of the innermost module with parameters; "": in none.
      direction: "forward", "backward", or "" for what is neither.
    """

    path: str
    direction: str


class Program:
    """A compiled training step.

    Attributes:
      instructions: all of them, by name; those within fusions too.
      layers: the names of the parameters of each module that has some, by its path.
    """

    def __init__(self, text: str):
        """Reads what `jax.stages.Compiled.as_text` returns."""
        self._computations: dict[str, list[Instruction]] = {}
        self._entry = ""
        lines: list[Instruction] = []
        for line in text.splitlines():
            if start := _COMPUTATION.match(line):
                lines = self._computations.setdefault(start[2], [])
                if start[1]:
                    self._entry = start[2]
            elif instruction := _parse(line):
                lines.append(instruction)
        if not self._entry:
            raise ValueError("no ENTRY computation: this is not the text of a compiled program")
        self.instructions = {i.name: i for lines in self._computations.values() for i in lines}
        self.layers = _layers(i.op_name for i in self._computations[self._entry])
        self._users: dict[str, list[str]] = {}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                self._users.setdefault(operand, []).append(instruction.name)

    def in_order(self, computation: str | None = None) -> Iterator[Instruction]:
        """Yields what runs by itself: that of fusions is left out, that of loops comes once."""
        for instruction in self._computations[computation or self._entry]:
            yield instruction
            if instruction.opcode in _CONTROL_FLOW:
                called = _CALLED.findall(instruction.text)
                for branches in _BRANCHES.findall(instruction.text):
                    called += [name.strip().lstrip("%") for name in branches.split(",")]
                for name in called:
                    yield from self.in_order(name)

    def op_name(self, name: str) -> str:
        """Returns the operation that an instruction computes, or "".

        One that XLA added, such as a copy to memory on the chip, belongs to what uses its result.
        """
        waiting, seen = [name], {name}
        while waiting:
            instruction = self.instructions.get(waiting.pop(0))
            if instruction is None:
                continue
            # Arguments are called state.params['head']['bias']; XLA's own names have no path.
            if "/" in instruction.op_name:
                return instruction.op_name
            users = [u for u in self._users.get(instruction.name, []) if u not in seen]
            seen.update(users)
            waiting += users
        return ""

    def moved(self, instruction: Instruction) -> int:
        """Returns the bytes that an instruction reads from the device's memory and writes to it.

        Its operands and its outputs are taken to be read and written whole, once each; of a slice
        only the part is read. What is in memory on the chip doesn't count.
        """
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith("-done") or "ConcatBitcast" in instruction.text:
            return 0
        sources = [self.instructions[o].outputs for o in instruction.operands]
        read = [array for outputs in sources for array in outputs]
        written = list(instruction.outputs)
        if opcode == "copy-start":  # (copy, source, semaphore)
            written = written[:1]
        elif opcode == "slice-start":  # ((source), slice, semaphore)
            written = written[len(read) : len(read) + 1]
        if opcode in ("slice", "slice-start", "dynamic-slice", "gather"):
            read = [dataclasses.replace(written[0], space=read[0].space)]
        return sum(array.bytes for array in (*read, *written) if array.space == 0)

    def place(self, op_name: str) -> Place:
        """Returns where an operation is, by the names that Flax gives to modules' calls."""
        path = ""
        for token in op_name.split("/"):
            # What is latched on is called by its class: MemoryUpdate.
            for name in (token, re.sub(r"(?<=[a-z])(?=[A-Z])", "_", token).lower()):
                longer = f"{path}/{name}" if path else name
                if longer in self._modules:
                    path = longer
                    break
        backward = "transpose(" in op_name
        return Place(path, "backward" if backward else "forward" if "jvp(" in op_name else "")

    @functools.cached_property
    def _modules(self) -> frozenset[str]:
        parts = [path.split("/") for path in self.layers]
        return frozenset("/".join(p[: i + 1]) for p in parts for i in range(len(p)))


def _layers(names: Iterator[str]) -> Mapping[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for name in names:
        if match := _PARAMETER.search(name):
            *path, leaf = _KEY.findall(match[1])
            found.setdefault("/".join(path), set()).add(leaf)
    return {path: frozenset(leaves) for path, leaves in found.items()}


def _parse(line: str) -> Instruction | None:
    start = _INSTRUCTION.match(line)
    if start is None:
        return None
    end = _end(line, start.end())
    bracket = line.find("(", end)
    if bracket < 0:
        return None
    operands = line[bracket : _end(line, bracket)]
    op_name = _OP_NAME.search(line, bracket)
    return Instruction(
        name=start[1],
        opcode=line[end:bracket].strip(),
        outputs=tuple(_arrays(line[start.end() : end])),
        operands=tuple(re.findall(r"%([\w.\-]+)", operands)),
        op_name=op_name[1].replace("\\'", "'") if op_name else "",
        text=line,
    )


def _end(line: str, start: int) -> int:
    """Returns where a type, or a list in brackets, ends: at a space outside of brackets."""
    depth = 0
    for i in range(start, len(line)):
        depth += (line[i] in "([{") - (line[i] in ")]}")
        if depth == 0 and (line[i] == " " or (line[start] == "(" and line[i] == ")")):
            return i + (line[i] != " ")
    return len(line)


def _arrays(text: str) -> Iterator[Array]:
    for kind, bits, sizes, layout in _ARRAY.findall(text):
        shape = [int(size.strip("<=")) for size in sizes.split(",") if size]
        order, _, rest = layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if tile:
            shape = _padded(shape, [int(i) for i in order.split(",") if i], tile[1])
        space = re.search(r"S\((\d+)\)", rest)
        width = {"pred": 8, "token": 0}.get(kind) if not bits else int(bits)
        yield Array(-(-math.prod(shape) * width // 8), int(space[1]) if space else 0)


def _padded(shape: list[int], minor_to_major: list[int], tile: str) -> list[int]:
    """Returns a shape, from major to minor, with its minor sides padded to whole tiles."""
    sides = [int(side) for side in tile.split(",")]
    sizes = [shape[i] for i in reversed(minor_to_major)]
    sizes = [1] * (len(sides) - len(sizes)) + sizes
    first = len(sizes) - len(sides)
    return sizes[:first] + [-(-n // t) * t for n, t in zip(sizes[first:], sides, strict=True)]
