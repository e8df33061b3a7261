"""The loops of a kernel's SASS: jumps back to an instruction that every way to them passes, and what lies between.

So code that a compiler has put at the end of a function, a wait for a copy for example, is found in the loop that it
belongs to, and the jump back from it is no loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from fastprefix.measure.kernels.sass import Function, Instruction


@dataclass
class Loop:
    """One loop without the loops inside it: what runs in each iteration, and what stands under a branch."""

    address: int  # of its first instruction
    always: list[Instruction]
    sometimes: list[Instruction]


def find_loops(function: Function) -> list[Loop]:
    """The loops of a function by address, an outer one before those inside it."""
    blocks, after = _blocks(function.instructions)
    above = _dominators(after)
    bodies: dict[int, set[int]] = {}
    ends: dict[int, set[int]] = {}
    for block, nexts in enumerate(after):
        for head in nexts:
            if head in above[block]:
                bodies.setdefault(head, {head}).update(_reaching(block, head, after))
                ends.setdefault(head, set()).add(block)
    loops = []
    for head, body in sorted(bodies.items()):
        own = body.difference(*(x for x in bodies.values() if x < body))
        every = own.intersection(*(above[end] for end in ends[head]))
        always, sometimes = ([x for b in sorted(part) for x in blocks[b]] for part in (every, own - every))
        loops.append(Loop(blocks[head][0].address, always, sometimes))
    return loops


def source_lines(instructions: Iterable[Instruction]) -> str:
    """Where in the source they come from, ``file.py:44-45``: the lines of the innermost function that has them all.

    Empty where the binary does not tell lines.
    """
    chains = [x.places[::-1] for x in instructions if x.places]  # outermost call first
    if not chains:
        return ""
    shared = next((i for i, level in enumerate(zip(*chains, strict=False)) if len(set(level)) > 1), None)
    if shared is None:
        shared = min(map(len, chains)) - 1
    elif len({chain[shared][0] for chain in chains}) > 1:  # they part in calls from one line
        shared = max(shared - 1, 0)
    lines = sorted(chain[shared][1] for chain in chains)
    return f"{chains[0][shared][0]}:{lines[0]}" + (f"-{lines[-1]}" if lines[-1] > lines[0] else "")


def _blocks(instructions: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks, and the numbers of the blocks that can follow each."""
    starts = {instructions[0].address} | {x.target for x in instructions if x.target is not None}
    starts |= {after.address for x, after in itertools.pairwise(instructions) if x.jumps}
    blocks: list[list[Instruction]] = []
    for x in instructions:
        if x.address in starts:
            blocks.append([])
        blocks[-1].append(x)
    number = {block[0].address: i for i, block in enumerate(blocks)}
    after = []
    for i, (*_, last) in enumerate(blocks):
        nexts = {i + 1} if last.falls_through and i + 1 < len(blocks) else set()
        after.append(sorted(nexts | ({number[last.target]} if last.target in number else set())))
    return blocks, after


def _dominators(after: list[list[int]]) -> list[set[int]]:
    """For each block the blocks that every way from the first one to it passes, itself included; none of a block to
    which there is no way, such as the padding at the end.
    """
    reached, todo = {0}, [0]
    while todo:
        new = set(after[todo.pop()]) - reached
        reached |= new
        todo.extend(new)
    before = [[j for j in reached if i in after[j]] for i in range(len(after))]
    above = [set(reached) if i in reached else set() for i in range(len(after))]
    above[0] = {0}
    changed = True
    while changed:
        changed = False
        for i in sorted(reached - {0}):
            new = set.intersection(*(above[j] for j in before[i])) | {i}
            if new != above[i]:
                above[i], changed = new, True
    return above


def _reaching(block: int, head: int, after: list[list[int]]) -> set[int]:
    """The blocks from which ``block`` is reached without passing ``head``, and itself."""
    found, todo = {block}, [block]
    while todo:
        here = todo.pop()
        if here != head:
            new = {i for i, nexts in enumerate(after) if here in nexts} - found - {head}
            found |= new
            todo.extend(new)
    return found
