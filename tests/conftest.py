"""The backends, as data: every test that takes ``backend`` runs on all. A new one needs at most a line here."""

import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Before torch is imported: threads that wait spinning slow a busy two-core machine down thirtyfold.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings

from prodigy_fused import Prodigy, backends

sys.path.append(str(Path(__file__).parent / "emulation"))
import emulated

emulated.register()
pytest.register_assert_rewrite("oracle")
torch.set_num_threads(1)


@dataclass(frozen=True)
class Backend:
    name: str
    device: str = "cpu"
    one_pass: bool = False  # x is final after `update` unless d moved; nothing of parameter size is allocated
    dense_only: bool = False  # refuses tensors with gaps or more than 8 dimensions
    low_precision: bool = True  # takes 16-bit parameters and state
    small: bool = False  # too slow for more than a few steps and elements (an interpreter)

    def __str__(self) -> str:
        return self.name

    def __call__(self, params, **options) -> Prodigy:
        return Prodigy(params, backend=self.name, **options)

    def steps(self, wanted: int) -> int:
        return min(wanted, 25) if self.small else wanted


GPU = torch.cuda.is_available()
TRAITS = {
    "cpu": {"one_pass": True, "dense_only": True},
    "cuda": {"device": "cuda", "one_pass": True, "dense_only": True},
    "emulated": {"one_pass": True, "dense_only": True, "small": True},
    "triton": {
        "device": "cuda" if GPU else "cpu",
        "one_pass": True,
        "dense_only": True,
        "low_precision": False,
        "small": not GPU,
    },
}
BACKENDS = [Backend(name, **TRAITS.get(name, {})) for name in backends.NAMES]
# A backend that must be there (in CI: all that the machine can run) fails where it would be skipped.
REQUIRED = os.environ.get("PRODIGY_FUSED_REQUIRE", "").split(",")


@cache
def missing(backend: Backend) -> str | None:
    """Why the backend cannot be tested here."""
    if backend.device == "cuda" and not GPU:
        return "no GPU"
    try:
        backend([torch.nn.Parameter(torch.ones(1, device=backend.device))])
    except RuntimeError as error:
        return str(error)
    return None


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request) -> Backend:
    reason = missing(request.param)
    if reason is not None:
        (pytest.fail if request.param.name in REQUIRED else pytest.skip)(reason)
    return request.param


# A step's time varies with the load of the machine and says nothing about the numbers.
settings.register_profile("default", deadline=None, print_blob=True, derandomize=False, max_examples=80)
settings.load_profile("default")
