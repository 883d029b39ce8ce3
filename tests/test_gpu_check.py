"""``bench/gpu_check`` as far as a machine without a GPU allows."""

import json
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "bench" / "gpu_check"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run it instead")


def gpu_check(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


@pytest.mark.skipif(emulated.native is None, reason=str(emulated.MISSING))
def test_dry_run_emulates_and_lists_the_rest(tmp_path):
    only = [f"--only={part}" for part in ("emulation", "suite", "triton", "gpu", "sanitizer", "large", "ncu", "bench")]
    result = gpu_check("--dry-run", "--out", tmp_path, *only)
    assert result.returncode == 0, result.stdout + result.stderr
    for words in ("RUN     emulation", "SKIPPED suite (dry run)", "racecheck"):
        assert words in result.stdout
    (folder,) = tmp_path.glob("dry-run/*")
    report = json.loads((folder / "report.json").read_text())
    outcomes = [(row["part"], row.get("rc"), row.get("skipped")) for row in report["parts"]]
    assert outcomes[0] == ("emulation", 0, None)
    assert len(outcomes) == 11
    assert all(skipped == "dry run" for _, _, skipped in outcomes[1:])
    assert {"gpu", "torch", "commit", "driver"} <= report["machine"].keys()
    assert "| bench | skipped: dry run" in (folder / "summary.md").read_text()


@pytest.mark.slow
def test_dry_run_builds(tmp_path):
    result = gpu_check("--dry-run", "--out", tmp_path, "--only=build")
    assert result.returncode == 0, result.stdout + result.stderr


def test_without_a_gpu_it_says_so():
    result = gpu_check()
    assert result.returncode != 0
    assert "--dry-run" in result.stderr


def test_an_unknown_part_is_refused(tmp_path):
    result = gpu_check("--dry-run", "--only=nonsense", "--out", tmp_path)
    assert result.returncode == 2
    assert "sanitizer" in result.stderr
