"""Every program in examples/ runs and learns, says how to run it, and is listed in docs/examples.md."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PROGRAMS = sorted(EXAMPLES.glob("*.py"))


def run(program, folder):
    """Runs a program in a process of its own, warnings as errors; the time limit is for one that hangs."""
    command, environment = [sys.executable, "-W", "error", program], {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=600)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_runs_and_learns(program, tmp_path):
    done = run(program, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loss" in done.stdout
    assert "not installed" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_says_how_to_run_it_and_is_documented(program):
    text = program.read_text()
    assert f"\n    python examples/{program.name}\n" in ast.get_docstring(ast.parse(text))
    assert f"](../examples/{program.name})" in (EXAMPLES.parent / "docs" / "examples.md").read_text()


def test_an_example_that_does_not_learn_fails(tmp_path):
    text = (EXAMPLES / "plain_loop.py").read_text()
    spoilt = tmp_path / "plain_loop.py"
    spoilt.write_text(text.replace("opt.step()", "pass"))
    assert spoilt.read_text() != text
    done = run(spoilt, tmp_path)
    assert done.returncode == 1
    assert "did not learn" in done.stderr
