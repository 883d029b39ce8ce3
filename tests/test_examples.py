"""Every program in examples/ runs, learns, and says how to run it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PROGRAMS = sorted(EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_runs_and_learns(program, tmp_path):
    # Warnings are errors, as in the suite. The time limit is there for a program that hangs, not for a slow one.
    command = [sys.executable, "-W", "error", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loss" in done.stdout
    assert "not installed" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_says_how_to_run_it(program):
    text = program.read_text()
    assert f"\n    python examples/{program.name}\n" in ast.get_docstring(ast.parse(text))
    assert f"]({program.name})" in (EXAMPLES / "README.md").read_text()


def test_an_example_that_does_not_learn_fails(tmp_path):
    text = (EXAMPLES / "plain_loop.py").read_text()
    spoilt = tmp_path / "plain_loop.py"
    spoilt.write_text(text.replace("opt.step()", "pass"))
    assert spoilt.read_text() != text
    done = subprocess.run([sys.executable, spoilt], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "did not learn" in done.stderr
