"""Read the text of a disassembled kernel (``cuobjdump -sass``): instructions, loops and counts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

BYTES_PER_INSTRUCTION = 16
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P(?:\d+|T))\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*?)\s*;"
)
_FUNCTION = re.compile(r"^\s*Function : (\S+)")
# Opcodes after which the next instruction runs only if a branch leads to it.
_ENDS = ("BRA", "BRX", "JMP", "JMX", "EXIT", "RET", "KILL")
_BRANCHES = ("BRA", "JMP")
# Accesses whose width matters: global memory, straight to shared memory or to registers.
_GLOBAL_LOADS, _GLOBAL_STORES = ("LDG", "LDGSTS"), ("STG",)
MATRIX_PRODUCTS = ("HGMMA", "HMMA", "QGMMA", "IGMMA")
LOCAL_MEMORY = ("LDL", "STL")


@dataclass(frozen=True)
class Instruction:
    """opcode: with its modifiers, ``LDG.E.128``.  guard: ``!P0``, or "" where it always runs."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """The address that a branch leads to; None for other instructions."""
        if self.name not in _BRANCHES:
            return None
        match = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        if match is None:
            raise ValueError(f"sass: a branch without an address: {self}")
        return int(match.group(1), 16)

    @property
    def always_leaves(self) -> bool:
        """Whether the next instruction is never reached from this one."""
        # `BRA P0, 0x...`, `BRA.DIV UR4, 0x...` and `BRA.U !UP0, 0x...` have a condition, too.
        unconditional = self.guard in ("", "PT") and "," not in self.operands
        return self.name in _ENDS and unconditional


@dataclass(frozen=True)
class Loop:
    """The instructions of a natural loop, those of loops inside it included, in address order."""

    header: int
    body: tuple[Instruction, ...]

    def count(self, *names: str) -> int:
        """How many instructions have one of these opcodes."""
        return sum(instruction.name in names for instruction in self.body)


def parse(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every function.

    Raises:
        ValueError: the text has no instruction, or one is missing between two others.
    """
    functions: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    for line in text.splitlines():
        if match := _FUNCTION.match(line):
            current = functions.setdefault(match.group(1), [])
        elif match := _INSTRUCTION.match(line):
            address, guard, opcode, operands = match.groups()
            if current is None:
                current = functions.setdefault("", [])
            current.append(Instruction(int(address, 16), guard or "", opcode, operands))
    for name, instructions in functions.items():
        for before, after in pairwise(instructions):
            if after.address != before.address + BYTES_PER_INSTRUCTION:
                raise ValueError(
                    f"sass: {name}: no instruction could be read between 0x{before.address:x} and "
                    f"0x{after.address:x}"
                )
    if not any(functions.values()):
        raise ValueError("sass: the text has no instruction")
    return functions


def counts(instructions: Iterable[Instruction]) -> Counter[str]:
    """How often each opcode occurs, without modifiers."""
    return Counter(instruction.name for instruction in instructions)


def _width(instruction: Instruction) -> int:
    """Bits that one thread moves; 32 where the opcode names none."""
    for part in instruction.opcode.split(".")[1:]:
        if part in ("128", "64"):
            return int(part)
        if part in ("U8", "S8", "8"):
            return 8
        if part in ("U16", "S16", "16"):
            return 16
    return 32


def global_accesses(instructions: Iterable[Instruction]) -> dict[str, int]:
    """How many loads from and stores to global memory there are of each width in bits.

    Returns:
        {"load 128": ..., "store 32": ...}, sorted.
    """
    found: Counter[str] = Counter()
    for instruction in instructions:
        if instruction.name in _GLOBAL_LOADS:
            found[f"load {_width(instruction)}"] += 1
        elif instruction.name in _GLOBAL_STORES:
            found[f"store {_width(instruction)}"] += 1
    return dict(sorted(found.items()))


# --- loops --------------------------------------------------------------------------------------


@dataclass
class _Block:
    instructions: list[Instruction]
    successors: list[int]


def _blocks(instructions: Sequence[Instruction]) -> dict[int, _Block]:
    """Basic blocks by the address of their first instruction."""
    addresses = {instruction.address for instruction in instructions}
    starts = {instructions[0].address}
    for instruction in instructions:
        target = instruction.target
        if target is not None:
            if target not in addresses:
                raise ValueError(f"sass: a branch leads out of the function: {instruction}")
            starts.add(target)
        if target is not None or instruction.name in _ENDS:
            starts.add(instruction.address + BYTES_PER_INSTRUCTION)
    blocks: dict[int, _Block] = {}
    for instruction in instructions:
        if instruction.address in starts:
            start = instruction.address
            blocks[start] = _Block([], [])
        blocks[start].instructions.append(instruction)
    for block in blocks.values():
        last = block.instructions[-1]
        after = last.address + BYTES_PER_INSTRUCTION
        if last.target is not None:
            block.successors.append(last.target)
        if not last.always_leaves and after in blocks:
            block.successors.append(after)
    return blocks


def _dominators(blocks: dict[int, _Block], entry: int) -> dict[int, set[int]]:
    """Of every reachable block: the blocks that each path from the entry to it passes."""
    reachable, waiting = {entry}, [entry]
    while waiting:
        for successor in blocks[waiting.pop()].successors:
            if successor not in reachable:
                reachable.add(successor)
                waiting.append(successor)
    before: dict[int, list[int]] = {start: [] for start in reachable}
    for start in reachable:
        for successor in blocks[start].successors:
            before[successor].append(start)
    dominators = {start: set(reachable) for start in reachable}
    dominators[entry] = {entry}
    changed = True
    while changed:
        changed = False
        for start in sorted(reachable - {entry}):
            common = set.intersection(*(dominators[source] for source in before[start])) | {start}
            if common != dominators[start]:
                dominators[start], changed = common, True
    return dominators


def loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """Every natural loop, by address.

    A backward branch alone makes no loop: code that is moved behind the function's end (a slow path
    of a division) branches back as well. A loop's first block dominates the branch.
    """
    blocks = _blocks(instructions)
    dominators = _dominators(blocks, instructions[0].address)
    before: dict[int, list[int]] = {}
    for start in dominators:
        for successor in blocks[start].successors:
            before.setdefault(successor, []).append(start)
    bodies: dict[int, set[int]] = {}
    for start, over in dominators.items():
        for header in blocks[start].successors:
            # A block that branches to itself alone and holds nothing else fills up the function.
            empty = header == start and len(blocks[start].instructions) == 1
            if header not in over or empty:
                continue
            body, waiting = bodies.setdefault(header, {header}), [start]
            while waiting:
                member = waiting.pop()
                if member not in body:
                    body.add(member)
                    waiting += [source for source in before.get(member, []) if source in dominators]
    return [
        Loop(
            header,
            tuple(i for start in sorted(bodies[header]) for i in blocks[start].instructions),
        )
        for header in sorted(bodies)
    ]


def innermost(found: Sequence[Loop]) -> list[Loop]:
    """The loops that contain no other one."""
    headers = {loop.header for loop in found}
    return [
        loop
        for loop in found
        if not any(i.address in headers and i.address != loop.header for i in loop.body)
    ]


def product_loops(instructions: Sequence[Instruction]) -> list[Loop]:
    """The innermost loops that compute matrix products on tensor cores."""
    return [loop for loop in innermost(loops(instructions)) if loop.count(*MATRIX_PRODUCTS)]
