"""Reads the machine code that ``cuobjdump -sass`` prints: how many instructions a kernel's inner loop takes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

NEEDED = (r"LDG?\.E\.128", r"STG?\.E\.128")  # a loop over packs has both
# Ways that a round seldom takes: packs that are not whole, which are moved by less at a time; the calls of subroutines
# for subnormal roots and quotients.
SELDOM = re.compile(r"(LDG?|STG?)\.E(?!\.128|\.64\b)|CALL|BAR|EXIT|RET")


class Instruction(NamedTuple):
    address: int
    text: str  # with its predicate

    @property
    def name(self) -> str:
        """For instance ``LDG.E.128``, without the predicate."""
        return re.sub(r"^@!?U?P\w+ ", "", self.text).split(" ")[0]

    @property
    def target(self) -> int | None:
        """The address that a branch leads to; not of one that only a warp takes which is not together."""
        if "BRA.DIV" in self.text:
            return None
        found = re.search(r"^(?:@!?U?P\w+ )?BRA\b.*?(0x[0-9a-f]+)", self.text)
        return int(found.group(1), 16) if found else None

    @property
    def seldom(self) -> bool:
        """Whether a round seldom takes it. With a predicate, 4 bytes are also what a pack of four keeps beside x."""
        return bool(SELDOM.match(self.name)) and not re.match(r"@\S+ (LDG?|STG?)\.E ", self.text)

    @property
    def falls_through(self) -> bool:
        always = not re.match(r"@|BRA(\.\w+)* !?U?P\w|BRA\.DIV", self.text)
        return not (always and self.name.split(".")[0] in ("BRA", "EXIT", "RET", "BRX"))


class Block(NamedTuple):
    code: list[Instruction]
    after: list[int]  # the addresses of the blocks that may follow
    has: int  # a bit for each of NEEDED
    seldom: bool


def kernels(text: str) -> Iterator[tuple[str, list[Instruction]]]:
    """Yields the mangled name and the instructions of each kernel."""
    for part in re.split(r"(?=\t\tFunction : )", text)[1:]:
        lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?) ;", part)
        yield part.split()[2], [Instruction(int(a, 16), " ".join(t.split())) for a, t in lines]


def blocks(code: list[Instruction]) -> dict[int, Block]:
    """Returns the basic blocks by address."""
    starts = {code[0].address} | {t for i in code if (t := i.target) is not None}
    starts |= {b.address for a, b in itertools.pairwise(code) if a.target is not None or not a.falls_through}
    parts: dict[int, list[Instruction]] = {}
    for instruction in code:
        if instruction.address in starts:
            current = parts.setdefault(instruction.address, [])
        current.append(instruction)
    following = dict(itertools.pairwise(sorted(parts)))
    coded = any(i.name.startswith("REDUX") for i in code)  # then a round has a word of scale, of 4 bytes
    found = {}
    for start, part in parts.items():
        to = [part[-1].target, following.get(start) if part[-1].falls_through else None]
        has = sum(1 << n for n, what in enumerate(NEEDED) if any(re.match(what, i.name) for i in part))
        seldom = any(i.seldom and not (coded and i.name == "LDG.E") for i in part)
        found[start] = Block(part, [t for t in to if t is not None], has, seldom)
    return found


def longest_round(code: list[Instruction]) -> int:
    """Returns the most instructions of one round of the loop that has 16-byte loads and stores; 0 if there is none."""
    return _round(code, max)


def shortest_round(code: list[Instruction]) -> int:
    """The fewest: where what a round seldom has to do is on ways of its own."""
    return _round(code, min)


def _round(code: list[Instruction], best: Callable[..., int]) -> int:
    usual = {start: block for start, block in blocks(code).items() if not block.seldom}
    heads = {to for start, block in usual.items() for to in block.after if to <= start and to in usual}
    return best(filter(None, (_way(head, _loop(head, usual), best) for head in heads)), default=0)


def _loop(head: int, usual: dict[int, Block]) -> dict[int, Block]:
    """The blocks of the loop with this head: those that lead back to it. Not those of a loop around it."""
    found, left = {head}, [start for start, block in usual.items() if head in block.after and start >= head]
    while left:
        start = left.pop()
        if start not in found:
            found.add(start)
            left += [before for before, block in usual.items() if start in block.after]
    return {start: usual[start] for start in found}


def _way(head: int, usual: dict[int, Block], best: Callable[..., int]) -> int:
    """The best way from the head of a loop to a jump back to it that has all that is needed; 0 if it has a loop."""
    lengths = {(head, usual[head].has): len(usual[head].code)}
    for _ in range(len(usual)):
        changed = False
        for (start, has), length in list(lengths.items()):
            for to in usual[start].after:
                if to == head or to not in usual:
                    continue
                key, new = (to, has | usual[to].has), length + len(usual[to].code)
                if best(lengths.get(key, new), new) != lengths.get(key):
                    lengths[key], changed = new, True
        if not changed:
            rounds = [n for (s, has), n in lengths.items() if has == (1 << len(NEEDED)) - 1 and head in usual[s].after]
            return best(rounds, default=0)
    return 0
