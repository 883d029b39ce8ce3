"""The regression guard: reports what became slower between two files of results, by more than the noise observed.

    python bench/compare.py OLD.csv NEW.csv [--floor 0.05]

Times of two runs cannot be compared: the machine or its load may differ. So each optimizer's time is taken relative to
AdamW(fused) and to the copy of its own race, and it counts as slower only if it is slower relative to both. The exit
status is then 1, as it is if something that was measured now fails, or is ours and is no longer measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from operator import itemgetter

import rows
from peers import ANCHOR, COPY, IN_PLACE
from rows import Row

WHERE = ("device", "threads", "kind", "workload", "dtype")
WORKLOAD, KEY = itemgetter(*WHERE), itemgetter(*WHERE, "peer")
RACE = itemgetter("run", "kind", "workload", "dtype", "heat")
Rows = list[Row]


@dataclass(frozen=True)
class Change:
    """The change of one peer on one workload."""

    row: Row
    to: str  # the peer that both times are relative to
    factor: float  # new over old
    noise: float  # by which the factor may exceed 1 by chance

    @property
    def slower(self) -> bool:
        """Whether the factor exceeds 1 by more than noise."""
        return self.factor > 1 + self.noise


def spread(row: Row) -> float:
    """Returns half the distance between the quartiles, relative to the median."""
    return (row["ms_75"] - row["ms_25"]) / 2 / row["ms"]


def _references(row: Row, measured: Rows) -> dict[str, Row]:
    """Returns AdamW(fused) and the copy of the same race, by name; an optimizer is not its own reference."""
    race = [other for other in measured if other["status"] == "ok" and RACE(other) == RACE(row)]
    return {other["peer"]: other for other in race if other["peer"] in (ANCHOR, COPY) and other["peer"] != row["peer"]}


def changes(old: Row, new: Row, before: Rows, after: Rows, floor: float) -> list[Change]:
    """Returns the changes of one peer, one relative to each reference that both races have.

    Args:
        old, new: the rows of the peer.
        before, after: all rows of the two files.
        floor: changes below it count as noise.
    """
    references = _references(old, before), _references(new, after)
    found = []
    for name in references[0].keys() & references[1].keys():
        first, second = references[0][name], references[1][name]
        factor = (new["ms"] / second["ms"]) / (old["ms"] / first["ms"])
        # Independent spreads add in squares; doubled, so that among dozens of peers none is reported by chance.
        noise = 2 * math.hypot(*map(spread, (old, new, first, second)))
        found.append(Change(new, name, factor, max(noise, floor)))
    return found


def slower(before: Rows, after: Rows, floor: float = 0.05) -> list[Change]:
    """Returns, for every peer that is slower relative to each of its references, the smallest of these changes."""
    old = {KEY(row): row for row in before if row["status"] == "ok" and row["ms"]}
    found = []
    for new in after:
        if KEY(new) not in old or new["status"] != "ok" or new["peer"] in (COPY, IN_PLACE):
            continue
        by = changes(old[KEY(new)], new, before, after, floor)
        if by and all(change.slower for change in by):
            found.append(min(by, key=lambda change: change.factor))
    return found


def broken(before: Rows, after: Rows) -> Rows:
    """Returns the rows of peers that were measured before and fail now, and the old rows of ours that are gone now."""
    old = {KEY(row): row for row in before if row["status"] == "ok"}
    new, workloads = {KEY(row) for row in after}, set(map(WORKLOAD, after))
    failed = [row for row in after if row["status"] == "failed" and KEY(row) in old]
    ours = [row for row in old.values() if row["peer"].startswith("prodigy_fused") and WORKLOAD(row) in workloads]
    return failed + [{**row, "reason": "no longer measured"} for row in ours if KEY(row) not in new]


def main(argv: list[str] | None = None) -> int:
    """Prints what is slower or broken; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=rows.file)
    parser.add_argument("new", type=rows.file)
    parser.add_argument("--floor", type=float, default=0.05, help="changes below this are noise, whatever was seen")
    args = parser.parse_args(argv)
    before, after = (rows.latest(rows.read(path)) for path in (args.old, args.new))
    compared = len({KEY(row) for row in before if row["ms"]} & {KEY(row) for row in after if row["ms"]})
    if not compared:
        parser.error("the files have nothing in common: another device, number of threads, or other workloads")
    worse, failed = slower(before, after, args.floor), broken(before, after)
    for change in worse:
        where = f"{change.row['workload']}, {change.row['dtype']}: {change.row['peer']}"
        print(f"SLOWER {where}: {change.factor:.2f} x, relative to {change.to} (noise {change.noise:.0%})")
    for row in failed:
        print(f"BROKEN {row['workload']}, {row['dtype']}: {row['peer']}: {row['reason']}")
    print(f"{compared} measurements compared, {len(worse)} slower, {len(failed)} broken")
    return int(bool(worse or failed))


if __name__ == "__main__":
    sys.exit(main())
