"""Shared by the tests of bench/: puts its modules on the path, and makes up rows."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import peers
import rows

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

BENCH = Path(peers.__file__).parent
FUSED = "prodigy_fused(cpu)"


def row(peer=FUSED, ms=10.0, spread=0.02, **more):
    """Returns a row as `rows.read` does."""
    empty = dict.fromkeys(rows.FIELDS, "") | dict.fromkeys((*rows.FIGURES, *rows.COUNTS))
    quartiles = {"ms": ms, "ms_25": ms * (1 - spread), "ms_75": ms * (1 + spread)} if ms else {}
    what = {"kind": "step", "workload": "16 x 4 Mi", "tensors": 16, "parameters": 1 << 26, "dtype": "float32"}
    where = {"run": "1", "device": "a machine", "threads": 2, "mode": "full", "commit": "abc", "date": "2026-01-01"}
    who = {"heat": 0, "peer": peer, "slice_p": 1, "status": "ok", "copy_gb_s": 40.0, "rounds": 9}
    return {**empty, **where, **what, **who, **quartiles, **more}


def race(fused=10.0, adamw=8.0, copy=2.0, reference=40.0, **more):
    """Returns the rows of one race."""
    times = {FUSED: fused, peers.ANCHOR: adamw, peers.COPY: copy, "prodigyopt": reference}
    return [row(peer, ms, **more) for peer, ms in times.items()]
