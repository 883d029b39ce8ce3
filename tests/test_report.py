"""``python -m prodigy_fused``, and a package that was installed where there was no compiler."""

import subprocess
import sys
import warnings
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch

from prodigy_fused import Prodigy, __version__, backends, low_precision, state
from prodigy_fused import report as module
from prodigy_fused.report import report

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


@pytest.mark.parametrize("dtype", module.DTYPES, ids=str)
def test_shows_what_would_be_chosen_and_why(dtype):
    """As an optimizer with all defaults chooses."""
    p = torch.zeros(3, dtype=dtype)
    group = Prodigy([p]).param_groups[0]
    mode = low_precision.mode_of(p, group)
    (line,) = (line for line in report().splitlines() if line.split()[:3] == ["cpu", module._name(dtype), "->"])
    assert f"-> {backends.choose(p, group)} (the first of " in line
    assert f"; state {module._name(state.state_dtype(p, group))}; " in line
    assert line.endswith(f'"{mode}" ({module.WHY_ROUNDED[mode]})' if mode else "x not rounded")


def test_does_not_spend_the_warning_of_a_slower_backend(monkeypatch):
    monkeypatch.setattr(backends.cpu, "MISSING", "no compiler")
    backends._say_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "-> " in report()
    with pytest.warns(UserWarning, match="slower foreach backend: no compiler"):
        Prodigy([torch.zeros(3)])


def test_versions():
    facts = dict(line.split(maxsplit=1) for line in report().split("\n\n")[0].splitlines())
    assert facts["torch"].startswith(f"{torch.__version__}, ")
    for name in ("triton", "numpy", "prodigyopt"):
        assert facts[name] == module._version(name)
    assert module._version("numpy") == metadata.version("numpy")
    assert module._version("no-such-package") == "not installed"
    assert {"python", "system", "torch", "prodigy_fused"} <= set(facts)


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({"cuda": "13.0"}, "CUDA 13.0"),
        ({"hip": "7.0"}, "ROCm 7.0"),
        ({"xpu": "2025"}, "XPU 2025"),
        ({}, "the CPU only"),
    ],
)
def test_toolkit(monkeypatch, versions, said):
    monkeypatch.setattr(torch, "version", SimpleNamespace(**versions))
    assert module._toolkit() == said


@pytest.mark.parametrize(
    ("nvidia_smi", "said"),
    [("echo 580.65.06", "580.65.06"), ("exit 9", "unknown: "), ("true", "unknown"), (None, "unknown: no nvidia-smi")],
)
def test_driver(monkeypatch, tmp_path, nvidia_smi, said):
    if nvidia_smi is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module, "devices", list)
    assert any(line.startswith("driver") and said in line for line in report().splitlines())


def test_hardware(monkeypatch):
    found = SimpleNamespace(name="A GPU", total_memory=80 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert module._hardware(torch.device("cuda", 0)) == "A GPU, 80 GiB, compute capability 9.0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a device that cannot be used")
def test_a_device_that_cannot_be_used_does_not_hide_the_others(monkeypatch):
    monkeypatch.setattr(module, "devices", lambda: [torch.device("cuda", 0), torch.device("cpu")])
    lines = report().splitlines()
    assert any(line.startswith("cuda:0 cannot be used: ") for line in lines)
    assert any(line.split()[:2] == ["cpu", "reference"] for line in lines)


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
    assert any(line.split()[:4] == ["cpu", "bfloat16", "->", "foreach"] and "C++ compiler" in line for line in lines)
