"""PTX as Triton writes it, taken apart: one kernel, its instructions and labels."""

import re
from typing import NamedTuple

_LABEL = re.compile(r"^([\w$]+):$")
_STATEMENT = re.compile(r"^(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)$")
_PARAMETER = re.compile(r"\.param\b[^,)]*?(\w+)\s*[,\n]")
# A vector in braces, an address in brackets, or anything else up to a comma.
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_FLOAT = re.compile(r"^0[fFdD]([0-9A-Fa-f]+)$")
_INTEGER = re.compile(r"^(-?(?:0x[0-9A-Fa-f]+|\d+))U?$")


class Address(NamedTuple):
    """[base + offset]"""

    base: str
    offset: int


# A register or symbol, a number or the bits of one, an address, a vector of registers.
Operand = str | int | Address | tuple


class Instruction(NamedTuple):
    """One instruction, done by the threads whose `guard` is set or, `negated`, is not."""

    name: tuple[str, ...]  # taken apart at the points
    operands: tuple[Operand, ...]
    guard: str | None
    negated: bool
    text: str

    @property
    def type(self) -> str:
        return self.name[-1]


class Program(NamedTuple):
    parameters: tuple[str, ...]
    threads: int
    instructions: list[Instruction]
    labels: dict[str, int]  # → number of the instruction that follows


def parse(ptx: str) -> Program:
    """The only kernel of this PTX."""
    head, _, body = ptx[ptx.index(".entry") :].partition("{")
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    block = ""  # of inline assembler, in braces, which has labels of its own
    for number, line in enumerate(body.splitlines()):
        line = line.partition("//")[0].strip()
        if line == "}" and not block:
            break
        if line.startswith("{"):
            block, line = f"@{number}", line[1:].strip()
        if match := _LABEL.match(line):
            labels[match[1] + block] = len(instructions)
            continue
        ends, line = block and line.endswith("}"), line.rstrip()
        for statement in map(str.strip, line.removesuffix("}" if ends else "").split(";")):
            if statement and not statement.startswith("."):
                instruction = _instruction(statement)
                if instruction.name[0] == "bra":
                    label = instruction.operands[0] + block
                    instruction = instruction._replace(operands=(label,))
                instructions.append(instruction)
        if ends:
            block = ""
    threads = int(re.search(r"\.reqntid\s+(\d+)", head)[1])
    return Program(tuple(_PARAMETER.findall(head)), threads, instructions, labels)


def _instruction(text: str) -> Instruction:
    negated, guard, name, operands = _STATEMENT.match(text).groups()
    return Instruction(
        tuple(re.split(r"\.|::", name)),
        tuple(map(_operand, _OPERAND.findall(operands))),
        guard,
        negated == "!",
        text,
    )


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(_operand(x.strip()) for x in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(base, int(offset or "0", 0))
    if match := _FLOAT.match(text):
        return int(match[1], 16)
    match = _INTEGER.match(text)
    return int(match[1], 0) if match else text
