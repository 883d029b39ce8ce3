"""Reads the machine code that ``cuobjdump -sass`` prints: how many instructions a kernel's inner loop takes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple


class Instruction(NamedTuple):
    address: int
    text: str  # with its predicate

    @property
    def name(self) -> str:
        """``LDG.E.128``, without the predicate."""
        return re.sub(r"^@!?U?P\w+ ", "", self.text).split(" ")[0].rstrip(";")

    @property
    def target(self) -> int | None:
        found = re.search(r"^(?:@!?U?P\w+ )?BRA(?:\.\w+)* .*?(0x[0-9a-f]+)", self.text)
        return int(found.group(1), 16) if found else None

    @property
    def falls_through(self) -> bool:
        always = not re.match(r"@|BRA(\.\w+)* !?U?P\w", self.text)
        return not (always and self.name.split(".")[0] in ("BRA", "EXIT", "RET", "BRX"))


def kernels(text: str) -> Iterator[tuple[str, str, list[Instruction]]]:
    """Yields (architecture, mangled name, instructions)."""
    architecture = ""
    for part in re.split(r"(?=Fatbin elf code:|\t\tFunction : |code for sm_)", text):
        if found := re.search(r"code for sm_(\d+)", part):
            architecture = found.group(1)
        if found := re.match(r"\t\tFunction : (\S+)", part):
            lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.+?) ;", part)
            yield architecture, found.group(1), [Instruction(int(a, 16), " ".join(t.split())) for a, t in lines]


def blocks(code: list[Instruction]) -> dict[int, list[Instruction]]:
    """Basic blocks by address."""
    starts = {code[0].address} | {t for i in code if (t := i.target) is not None}
    starts |= {b.address for a, b in zip(code, code[1:], strict=False) if a.target is not None or not a.falls_through}
    found: dict[int, list[Instruction]] = {}
    for instruction in code:
        if instruction.address in starts:
            current = found.setdefault(instruction.address, [])
        current.append(instruction)
    return found


def longest_round(code: list[Instruction], needs=(r"LDG?\.E\.128", r"STG?\.E\.128")) -> int:
    """Returns the most instructions of one round of the loop that has 16-byte loads and stores.

    Left out are the ways that a round seldom takes: those of packs that are not whole, which load less at a time, and
    the calls of subroutines, for subnormal roots and quotients.
    """
    whole = blocks(code)
    order = sorted(whole)
    usual = {
        start: block
        for start, block in whole.items()
        if not any(re.match(r"(LDG?|STG?)\.E(?!\.128|\.64\b)|CALL|BAR|EXIT|RET", i.name) for i in block)
    }
    after = {
        start: [t for t in (block[-1].target, next((s for s in order if s > start), None) if block[-1].falls_through else None)
                if t is not None]
        for start, block in whole.items()
    }
    best = 0
    for head in usual:
        latches = [start for start in usual if head in after[start] and start >= head]
        if latches:
            best = max(best, _longest(head, set(latches), usual, after, needs))
    return best


def _longest(head, latches, usual, after, needs) -> int:
    """The longest way from the head of a loop to a jump back to it, along which there is all that is needed."""
    # By address and what has been met; ways lead forward but for the jump back.
    has = {s: sum(1 << n for n, what in enumerate(needs) if any(re.match(what, i.name) for i in b)) for s, b in usual.items()}
    lengths = {(head, has[head]): len(usual[head])}
    todo = [head]
    best = 0
    seen = {head}
    # Blocks out of line lie behind the loop: relax until nothing changes, without the head.
    for _ in range(len(usual)):
        changed = False
        for (start, met), length in list(lengths.items()):
            for to in after[start]:
                if to == head or to not in usual:
                    continue
                key = (to, met | has[to])
                if lengths.get(key, 0) < length + len(usual[to]) <= 20000:
                    lengths[key] = length + len(usual[to])
                    changed = True
        if not changed:
            break
    else:
        return 0  # an inner loop
    for (start, met), length in lengths.items():
        if start in latches and met == (1 << len(needs)) - 1:
            best = max(best, length)
    return best
