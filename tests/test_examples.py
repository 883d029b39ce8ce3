"""Every program in examples/ runs and learns, says how to run it, and is listed in docs/examples.md."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
PROGRAMS = sorted(EXAMPLES.glob("*.py"))


# Each in a process of its own, forked from one that has imported what takes seconds.
FORKS = """
import json, os, runpy, sys
import torch, torch._dynamo
for program, folder in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{folder}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        os.chdir(folder)
        sys.argv, sys.path[0] = [program], os.path.dirname(program)
        runpy.run_path(program, run_name="__main__")
        sys.exit()
    with open(f"{folder}.status", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


def run(programs, folder):
    """Runs programs, warnings as errors; returns by path what came of each. The time limit is for one that hangs."""
    places = {str(program): folder / str(i) for i, program in enumerate(programs)}
    for place in places.values():
        place.mkdir()
    pairs = json.dumps([(program, str(place)) for program, place in places.items()])
    allowed = "ignore:The epoch parameter"  # torch 2.6, of what its own SequentialLR does
    command = [sys.executable, "-W", "error", "-W", allowed, "-c", FORKS, pairs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    parent = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert parent.returncode == 0, parent.stderr

    def outcome(place):
        status, stdout, stderr = (place.with_suffix(f".{n}").read_text() for n in ("status", "stdout", "stderr"))
        return SimpleNamespace(returncode=int(status), stdout=stdout, stderr=stderr, left=list(place.iterdir()))

    return {program: outcome(place) for program, place in places.items()}


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """An example that forgets to step."""
    text = (EXAMPLES / "plain_loop.py").read_text()
    program = tmp_path_factory.mktemp("spoilt") / "plain_loop.py"
    program.write_text(text.replace("opt.step()", "pass"))
    assert program.read_text() != text
    return program


# DTensor's caches keep a process group alive beyond its destruction, and a thread of gloo that lets go of its last
# tensor while Python shuts down ends a process that is done by SIGABRT. Rare, and without this package, too.
ABORTED_AT_EXIT = "terminate called without an active exception"


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, spoilt):
    done = run([*PROGRAMS, spoilt], tmp_path_factory.mktemp("examples"))
    again = [program for program in PROGRAMS if ABORTED_AT_EXIT in done[str(program)].stderr]
    return done | run(again, tmp_path_factory.mktemp("again")) if again else done


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_runs_and_learns(outcomes, program):
    if program.stem == "fsdp2" and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch has FSDP2 on GPUs only")
    done = outcomes[str(program)]
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loss" in done.stdout
    assert "not installed" not in done.stdout
    assert done.left == []


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_says_how_to_run_it_and_is_documented(program):
    text = program.read_text()
    assert f"\n    python examples/{program.name}\n" in ast.get_docstring(ast.parse(text))
    assert f"](../examples/{program.name})" in (EXAMPLES.parent / "docs" / "examples.md").read_text()


def test_an_example_that_does_not_learn_fails(outcomes, spoilt):
    done = outcomes[str(spoilt)]
    assert done.returncode == 1
    assert "did not learn" in done.stderr
