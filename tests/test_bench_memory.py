"""bench/memory.py: what it counts, on a small model, and what it makes of the rows."""

import json

import benchmarks  # noqa: F401  # puts bench/ on the path
import memory
import plots
import pytest
import torch
from memory import ANCHOR, Case

SMALL = {"vocabulary": 20, "block": 8, "layers": 4, "heads": 2, "embd": 64}
STATE = {  # bytes per parameter, by count
    "float32: float32 state": 16,
    "float32: bfloat16 state, slice_p=11": 2 + 2 + (2 + 4) / 11,
    "float32: 8-bit state": 4 * (1 + 1 / 256) + 0.142,  # 1.2 % of the elements are in small tensors: float32
    "bfloat16: AdamW(fused)": 4,
    "bfloat16: 24bit, bfloat16 state, slice_p=11": 2 + 2 + 1 + (2 + 2) / 11,
    "bfloat16: displacement, bfloat16 state": 6 + 2 + 4,
}


def name(row):
    return f"{row['dtype']}: {row['optimizer']}"


def test_state_and_gradients_of_a_step():
    """Of a model whose matrices are of about one size, gradients that are released are a small part of all."""
    chosen = [c for c in memory.cases() if f"{str(c.dtype)[6:]}: {c.name}" in STATE]
    found = memory.bars({"rows": [memory.measure(case, SMALL, 2) for case in chosen]})
    assert {name(bar): bar["state"] for bar in found} == pytest.approx(STATE, abs=0.06)  # tails of samples, steps
    for bar in found:
        size = 4 if bar["dtype"] == "float32" else 2
        assert bar["parameters"] == size
        assert 0.9 * size < bar["gradients"] < 1.3 * size  # backward frees activations, and needs some itself
        assert (bar["released"] is None) == (bar["optimizer"] == ANCHOR)
        assert bar["released"] is None or bar["released"] < 0.6 * size


def test_every_way_to_store_is_combined_with_every_other():
    names = [f"{case.dtype}: {case.name}" for case in memory.cases() if not case.release]
    assert len(names) == len(set(names)) == 1 + 6 + 1 + 14
    assert [n.partition("displacement, ")[2] for n in names if "displacement" in n] == [
        "float32 state",
        "bfloat16 state",
    ]
    assert all(case.options is not None for case in memory.cases() if case.release)


def test_the_committed_rows_are_of_all_cases():
    results = json.loads(memory.FILE.read_text())
    wanted = {(str(c.dtype)[6:], c.name, c.release) for c in memory.cases()}
    assert {(row["dtype"], row["optimizer"], row["release"]) for row in results["rows"]} == wanted


def test_table_and_chart(monkeypatch, tmp_path):
    what = {"parameters": 2.0, "dtype": "bfloat16"}
    rows = [
        {"optimizer": ANCHOR, "release": False, "state": 4.0, "gradients": 2.5, **what},
        {"optimizer": "ours", "release": False, "state": 6.0, "gradients": 2.4, **what},
        {"optimizer": "ours", "release": True, "state": 6.0, "gradients": 0.5, **what},
    ]
    rows += [{**row, "dtype": "float32"} for row in rows]
    where = {"device": "a machine", "torch": "1", "commit": "abc", "date": "today", "elements": 12345}
    monkeypatch.setattr(memory, "FILE", tmp_path / "memory.json")
    memory.FILE.write_text(json.dumps({**where, "rows": rows}))
    lines = memory.table().splitlines()
    assert lines[2] == f"| bfloat16: {ANCHOR} | 2 | 4.00 | 2.50 | - | 8.5 | 1.00 x |"
    assert lines[3] == "| bfloat16: ours | 2 | 6.00 | 2.40 | 0.50 | 8.5 | 1.00 x |"
    assert lines[-1] == "Measured; 12,345 parameters, a machine, torch 1, commit abc, today."
    assert plots.memory({"rows": rows}, tmp_path / "memory.png").stat().st_size > 1000


def test_a_case_makes_its_optimizer():
    p = torch.nn.Parameter(torch.ones(3))
    assert isinstance(Case(torch.float32, ANCHOR).make([p]), torch.optim.AdamW)
    assert Case(torch.float32, "", {"slice_p": 5}).make([p]).param_groups[0]["slice_p"] == 5
