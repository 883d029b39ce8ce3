"""Trainers of other projects: trained, saved, resumed and compared. Run by ``make test-trainers``, by nothing else."""

import pytest
import torch
from torch import nn

torch.set_num_threads(1)


def pytest_ignore_collect(collection_path, config):
    """Collects these tests only where they are asked for by path."""
    return None if any("trainers" in str(argument) for argument in config.args) else True


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """No network, and nothing written outside of the test's folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)


def net():
    """Returns a small regression model, the same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def batches(count, size=8):
    """Returns inputs and targets, the same at every call."""
    x = torch.randn(count * size, 4, generator=torch.Generator().manual_seed(1))
    return list(zip(x.split(size), x.sum(1, keepdim=True).sin().split(size), strict=True))


@pytest.fixture
def problem():
    return net, batches
