"""``python -m prodigy_fused``, and a package that was installed where there was no compiler."""

import subprocess
import sys

from prodigy_fused import __version__, backends
from prodigy_fused.__main__ import report

WITHOUT_COMPILED_MODULE = """
import sys, warnings
sys.modules["prodigy_fused._C"] = None  # importing it fails
import torch, prodigy_fused
from prodigy_fused.__main__ import report
p = torch.nn.Parameter(torch.ones(3))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        opt = prodigy_fused.Prodigy([p])
        p.grad = torch.ones(3)
        opt.step()
print(len(caught), caught[0].message)
try:
    prodigy_fused.Prodigy([p], fused=True)
except RuntimeError as error:
    print(error)
print(report())
"""


def test_names_every_backend_and_the_version():
    lines = report().splitlines()
    assert __version__ in lines[0]
    for name in backends.names():
        assert any(line.split()[:2] == ["cpu", name] for line in lines)


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "prodigy_fused"], capture_output=True, text=True, check=True)
    assert "foreach" in done.stdout
    assert not done.stderr


def test_without_the_compiled_module_it_runs_on_foreach_and_says_so_once():
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILED_MODULE], capture_output=True, text=True, check=True)
    warned, refused, *lines = done.stdout.splitlines()
    assert warned.startswith("1 ") and "foreach" in warned and "C++ compiler" in warned
    assert "fused=True" in refused and "C++ compiler" in refused
    assert any(line.split()[:3] == ["cpu", "cpu", "no:"] for line in lines)
