"""``bench/gpu_check`` as far as a machine without a GPU allows."""

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import benchmarks
import emulated
import gpu_steps
import pytest
import torch

SCRIPT = benchmarks.BENCH / "gpu_check"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: run it instead")


def gpu_check(*arguments, **environment):
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def module():
    loader = importlib.machinery.SourceFileLoader("gpu_check", str(SCRIPT))
    found = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_check", loader))
    sys.modules["gpu_check"] = found  # where a dataclass looks itself up
    loader.exec_module(found)
    return found


@without_gpu
@pytest.mark.skipif(emulated.native is None, reason=str(emulated.MISSING))
def test_dry_run_emulates_and_lists_the_rest(tmp_path):
    only = [f"--only={part}" for part in ("emulation", "parity", "policies", "ncu", "sanitizer", "suite", "large")]
    result = gpu_check("--dry-run", "--out", tmp_path, *only, "--commit", "0ddba11")
    assert result.returncode == 0, result.stdout + result.stderr
    for words in ("RUN     emulation, at most", "  | ", " passed", "SKIPPED suite (dry run)", "racecheck"):
        assert words in result.stdout
    (folder,) = tmp_path.glob("dry-run/*")
    report = json.loads((folder / "report.json").read_text())
    outcomes = [(row["part"], row.get("rc"), row.get("skipped")) for row in report["parts"]]
    assert outcomes[0] == ("emulation", 0, None)
    assert len(outcomes) == 12
    assert all(skipped == "dry run" for _, _, skipped in outcomes[1:])
    assert report["machine"]["commit"] == "0ddba11"
    assert {"gpu", "torch", "driver"} <= report["machine"].keys()
    assert "| suite | skipped: dry run" in (folder / "summary.md").read_text()
    assert " passed" in (folder / "log.txt").read_text()


@without_gpu
@pytest.mark.slow
def test_dry_run_builds(tmp_path):
    result = gpu_check("--dry-run", "--out", tmp_path, "--only=build")
    assert result.returncode == 0, result.stdout + result.stderr


@without_gpu
def test_without_a_gpu_or_on_an_unknown_part_it_says_so(tmp_path):
    refused = gpu_check()
    assert refused.returncode != 0
    assert "--dry-run" in refused.stderr
    unknown = gpu_check("--dry-run", "--only=nonsense", "--out", tmp_path)
    assert unknown.returncode == 2
    assert "sanitizer" in unknown.stderr


def check(module, folder, seconds=60.0):
    return module.Check(folder, True, False, time.monotonic() + seconds, "0ddba11")


def test_a_commands_output_is_logged_and_shown_and_so_is_how_it_ended(module, tmp_path, capfd):
    code = "import os; print(os.environ['PRODIGY_FUSED_COMMIT']); print('last'); print(); raise SystemExit(3)"
    row = check(module, tmp_path).run("host", [sys.executable, "-c", code], 50)
    assert (row["part"], row["rc"], row["last_line"]) == ("host", 3, "last")
    assert "0ddba11\nlast\n" in (tmp_path / "log.txt").read_text()
    assert "  | 0ddba11\n  | last" in capfd.readouterr().out


def test_without_time_left_nothing_is_started(module, tmp_path):
    row = check(module, tmp_path, seconds=module.LEAST - 1).run("host", ["touch", str(tmp_path / "started")], 50)
    assert row["skipped"] == "no time left"
    assert not (tmp_path / "started").exists()


def test_what_hangs_is_ended_with_all_its_children(module, tmp_path, monkeypatch):
    """One of which ignores that it is asked to, and keeps the output open."""
    monkeypatch.setattr(module, "GRACE", 0.5)
    child = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', flush=True); time.sleep(99)"
    )
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid); p.wait()"
    row = check(module, tmp_path).run("host", [sys.executable, "-u", "-c", code], 2)
    assert row["rc"] == 124
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[-1] == "stopped after 2 s"
    assert "here" in lines
    (pid,) = (line for line in lines if line.isdigit())
    stat = Path("/proc", pid, "stat")  # where nobody waits for orphans, it stays as a zombie
    assert not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_commands_together_end_as_the_first_did_when_all_have(module, tmp_path):
    code = "import sys, time; time.sleep(float(sys.argv[1])); open(sys.argv[2], 'w'); sys.exit(int(sys.argv[3]))"
    runs = [[sys.executable, "-c", code, wait, str(tmp_path / name), rc] for wait, name, rc in
            (("0", "first", "3"), ("0.5", "a b", "0"), ("0", "c", "1"))]  # fmt: skip
    row = check(module, tmp_path).run("build", module.together(runs[0], runs[1:]), 50)
    assert row["rc"] == 3
    assert all((tmp_path / name).exists() for name in ("first", "a b", "c"))


def test_triton_compiles_while_the_module_is_built(module, tmp_path):
    shell, _, line = module.parts(tmp_path, has_gpu=True)["build"].commands[-1]
    assert shell == "sh" and all(f"--backend=triton --dtype={dtype} &" in line for dtype in module.DTYPES)
    assert "build_ext" in line and module.parts(tmp_path)["build"].commands[-1][1] == "setup.py"


def test_the_most_valuable_parts_come_first_and_races_of_prototypes_are_run(module, tmp_path):
    (tmp_path / "race_1.py").touch()
    parts = module.parts(tmp_path, variants=tmp_path)
    names = [name for name in parts if name not in module.DRY]
    assert " ".join(names) == "parity policies host ncu sanitizer variants suite bench geometry large"
    assert parts["variants"].commands == [[sys.executable, str(tmp_path / "race_1.py")]]


def test_steps_for_profilers_are_of_every_variant(capsys):
    gpu_steps.main(["--backend=cpu", "--elements=100", "--dtype=float32"])
    lines = capsys.readouterr().out.splitlines()
    assert "float32 prodigy_fused(cpu, bfloat16 state, slice_p=11): d 1e-06" in lines
    gpu_steps.main(["--backend=cpu", "--elements=100", "--dtype=bfloat16", "--peer=8-bit state)"])
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "bfloat16 prodigy_fused(cpu, 8-bit state)"
    ]
    (moved,) = (line for line in lines if line.startswith("float32 prodigy_fused(cpu, d moves)"))
    assert not moved.endswith(" 1e-06")
