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

sys.path += [str(Path(__file__).parent / "emulation"), str(Path(__file__).parents[1] / "bench")]
import emulated
import interpreted

emulated.register()
interpreted.register()
pytest.register_assert_rewrite("oracle")
torch.set_num_threads(1)


@dataclass(frozen=True)
class Backend:
    name: str
    device: str = "cpu"
    one_pass: bool = False  # x is final after `update` unless d moved; nothing of parameter size is allocated
    dense_only: bool = False  # refuses tensors with gaps or more than 8 dimensions
    small: bool = False  # too slow for more than a few steps and elements (an interpreter)
    crawls: bool = False  # slower still: by default only a few variants of each test
    views: bool = False  # publishes views of a device's memory, not numbers

    def __str__(self) -> str:
        return self.name

    def __call__(self, params, **options) -> Prodigy:
        return Prodigy(params, backend=self.name, **options)

    def steps(self, wanted: int) -> int:
        return min(wanted, 15 if self.crawls else 25) if self.small else wanted


GPU = torch.cuda.is_available()
TRAITS = {
    "cpu": {"one_pass": True, "dense_only": True},
    "cuda": {"device": "cuda", "one_pass": True, "dense_only": True, "views": True},
    "emulated": {"one_pass": True, "dense_only": True, "small": True, "views": True},
    "triton": {
        "one_pass": True,
        "dense_only": True,
        **({"device": "cuda", "views": True} if GPU else {"small": True, "crawls": True}),
    },
}
BACKENDS = [Backend(name, **TRAITS.get(name, {})) for name in backends.names()]
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


# Of each test one variant, that in the middle, runs on a backend that crawls, and none of those over hundreds of
# tensors or steps, or of what is around the steps; the others are slow tests.
CRAWLING = {
    "test_a_checkpoint_of_split_groups_continues", "test_a_graph_from_before_the_step_raises", "test_files",
    "test_no_warning_without_a_cause", "test_own_options_with_a_checkpoint_of_prodigyopt",
    "test_partitions_of_many_buckets", "test_scheduler", "test_training_goes_on_when_tensors_move",
    "test_any_list_of_tensors", "test_any_step", "test_corrections_are_rare", "test_float32",
    "test_second_moments_of_16_bits_are_right_on_average", "test_state_of_one_among_many_parameters_is_changed",
    "test_thousands_of_tensors", "test_threads", "test_two_threads_cannot_step_at_once",
}  # fmt: skip


# They take their time each, most in a process of their own: first, so that no worker is left with one at the end.
LONG = {
    "test_nothing_that_changes_between_steps_compiles_anew", "test_wheel", "test_editable_install", "test_demo",
    "test_runs_and_learns", "test_dry_run_emulates_and_lists_the_rest", "test_ranks_agree_with_one_process",
    "test_an_example_that_does_not_learn_fails", "test_kernels_keep_to_registers_and_16_byte_accesses",
}  # fmt: skip
# Files of hundreds of variants that run the same lines: coverage, which slows a test by a half, looks away.
VARIANTS = {
    "edges", "emulation", "examples", "fuzz", "numbers", "reproducible", "rounding", "shapes", "split_groups",
    "torch_gradients", "torch_hooks", "torch_optim", "torch_state", "torch_tools",
}  # fmt: skip
# Files in which coverage finds nothing that others do not have.
UNCOVERED = {"bench_peers", "bench_results", "dcp", "paper", "schedulers"}
# Where the emulated kernels walk memory in ways of their own: under the sanitizers, and there only.
WALKS = VARIANTS | {"index_maps"}


def pytest_collection_modifyitems(items) -> None:
    items.sort(key=lambda item: getattr(item, "originalname", None) not in LONG)
    crawling = {backend.name for backend in BACKENDS if backend.crawls}
    variants: dict[tuple[Path, str, str], list[pytest.Item]] = {}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        name = item.path.stem.removeprefix("test_")
        emulates = name == "emulated_policies" or (name in WALKS and "emulated" in map(str, params.values()))
        role = next((role for role, value in params.items() if str(value) in crawling), None)
        if role is not None:
            variants.setdefault((item.path, item.originalname, role), []).append(item)
        if name in VARIANTS | UNCOVERED or role is not None:  # traced, an interpreter is slower still
            item.add_marker("no_cover")
        if emulates:
            item.add_marker("sanitized")
    for same in variants.values():
        kept = None if same[0].originalname in CRAWLING else same[len(same) // 2]
        for item in same:
            if item is not kept:
                item.add_marker("slow")


# A step's time varies with the load of the machine and says nothing about the numbers.
settings.register_profile("default", deadline=None, print_blob=True, derandomize=False, max_examples=80)
settings.load_profile("default")
