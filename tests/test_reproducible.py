"""A step is bitwise the same with any number of threads, and for any arrangement of the tensors in groups."""

import random
from functools import cache

import pytest
import torch
from conftest import BACKENDS, missing
from torch import Tensor, nn

# More than a chunk, around the size from which torch shares out a sum among threads, and a few small ones.
SHAPES = [(70_001,), (90, 90), (1 << 15,), (5, 7), (32_769,), (), (4000,), (1,), (64, 3, 3, 3), (17,)]
STEPS = 8
CPU = next((backend for backend in BACKENDS if backend.name == "cpu" and missing(backend) is None), None)
CONFIGURATIONS = {
    "float32": ([torch.float32], {}),
    "float64": ([torch.float64], {}),
    "sampled, mixed": ([torch.float32, torch.float64], {"slice_p": 3, "weight_decay": 0.1}),
    "no momentum": ([torch.float32], {"betas": (0.0, 0.99), "use_bias_correction": True}),
}


@pytest.fixture(params=CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def configuration(request):
    return request.param


@pytest.fixture(autouse=True)
def _restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@cache
def values(small: bool) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Parameters and gradients, of magnitudes far apart, so that every order of summation has its own rounding."""
    draw = torch.Generator().manual_seed(0)

    def random_like(scale: float) -> list[Tensor]:
        shapes = [s for s in SHAPES if not small or torch.Size(s).numel() < 2000]
        return [torch.randn(s, generator=draw) * scale * 7.0**-i for i, s in enumerate(shapes)]

    start, drift = random_like(1.0), random_like(0.1)
    start[-3].zero_()
    return start, [[a + b for a, b in zip(drift, random_like(0.03), strict=True)] for _ in range(STEPS)]


def run(backend, configuration, groups: list[list[int]], threads: int) -> list[Tensor]:
    """Everything that a few steps leave behind, in the order of the tensors."""
    torch.set_num_threads(threads)
    dtypes, options = configuration
    start, grads = values(backend.small)

    def cast(i: int, value: Tensor) -> Tensor:
        return value.to(backend.device, dtypes[i % len(dtypes)], copy=True)

    params = [nn.Parameter(cast(i, x)) for i, x in enumerate(start)]
    opt = backend([{"params": [params[i] for i in group]} for group in groups], d0=1e-4, **options)
    left = []
    for step in grads:
        for i, g in enumerate(step):
            params[i].grad = cast(i, g)
        opt.step()
        estimate = [float(opt.param_groups[0][key]) for key in ("d", "d_numerator", "d_denom")]
        left.append(torch.tensor(estimate, dtype=torch.float64))
    assert opt.d > 1e-4
    for p in params:
        left += [p.detach(), *(torch.as_tensor(opt.state[p][key]) for key in sorted(opt.state[p]))]
    return left


def assert_bitwise(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    assert [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if not torch.equal(a, b)] == []


def test_threads(backend, configuration):
    groups = [list(range(len(values(backend.small)[0])))]
    alone = run(backend, configuration, groups, 1)
    for threads in (2, 2, 3):
        assert_bitwise(run(backend, configuration, groups, threads), alone)


OF_ALL_TYPES = {
    "stochastic": {"low_precision": "stochastic"},
    "displacement": {"low_precision": "displacement", "state_dtype": torch.bfloat16},
    "nearest": {"low_precision": "nearest", "state_dtype": None},
    "16-bit state": {"low_precision": "stochastic", "state_dtype": torch.bfloat16, "weight_decay": 0.1},
    "sampled, 16-bit state": {"low_precision": "stochastic", "state_dtype": torch.bfloat16, "slice_p": 3},
    "frozen": {"low_precision": "displacement", "prodigy_steps": 3},
    "no momentum": {"low_precision": "stochastic", "betas": (0.0, 0.99)},
    "24 bits": {"low_precision": "24bit", "weight_decay": 0.1},
    "8 bits": {"low_precision": "stochastic", "state_dtype": "8bit", "min_8bit_size": 1},
    "8 bits, sampled, 24 bits": {"low_precision": "24bit", "state_dtype": "8bit", "min_8bit_size": 1, "slice_p": 3},
    "24 bits, sampled, 16-bit state": {"low_precision": "24bit", "slice_p": 3, "state_dtype": torch.bfloat16},
}


@pytest.fixture
def on_each_set():
    """Calls a function with each of the machine's instruction sets, whose results must be equal bit by bit."""
    native = pytest.importorskip("prodigy_fused._C")
    best = native.instruction_set()
    sets = [name for name in ("baseline", "x86-64-v3", "x86-64-v4") if native.use_instruction_set(name)]
    assert best in sets and not native.use_instruction_set("another")

    def call(function):
        left = []
        for name in sets:
            assert native.use_instruction_set(name) and native.instruction_set() == name
            left.append(function())
        for other in left[1:]:
            assert_bitwise(other, left[0])

    yield call
    native.use_instruction_set(best)


@pytest.mark.skipif(CPU is None, reason="no compiled module")
@pytest.mark.parametrize("options", OF_ALL_TYPES.values(), ids=OF_ALL_TYPES.keys())
def test_instruction_sets(on_each_set, options):
    """Each has loops of its own for every kind of tensor, and the best of a machine is otherwise the only one that
    runs."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    configuration = [t for t in dtypes if (t, options["low_precision"]) != (torch.float16, "24bit")], options
    on_each_set(lambda: run(CPU, configuration, [list(range(len(SHAPES)))], 1))


@pytest.mark.skipif(CPU is None, reason="no compiled module")
@pytest.mark.parametrize("mode", ["stochastic", "displacement", "nearest"])
def test_instruction_sets_round_all_of_float16_alike(on_each_set, mode):
    """Subnormal numbers, infinities and NaN among them; steps end between them, and beyond the largest."""
    draw = torch.Generator().manual_seed(5)
    numbers = torch.arange(-(1 << 15), (1 << 15) - 3).to(torch.int16).view(torch.float16)
    grad = torch.randn(numbers.shape, generator=draw).half()

    def steps():
        p = torch.nn.Parameter(numbers.clone())
        opt = CPU([p], d0=1e-5, low_precision=mode)
        left = []
        for d in (1e-5, 1e-3, 40.0):
            opt.param_groups[0]["d"] = opt.param_groups[0]["d_max"] = d
            p.grad = grad
            opt.step()
            left.append(p.detach().view(torch.int16).clone())
        return left

    on_each_set(steps)


def test_partitions(backend, configuration):
    indices = list(range(len(values(backend.small)[0])))
    together = run(backend, configuration, [indices], 1)
    assert_bitwise(run(backend, configuration, [[i] for i in indices], 1), together)
    shuffle = random.Random(0)
    for _ in range(1 if backend.small else 3):
        shuffle.shuffle(indices)
        cut, end = sorted(shuffle.sample(range(1, len(indices)), 2))
        parts = [indices[:cut], indices[cut:end], indices[end:]]
        assert_bitwise(run(backend, configuration, parts, 1), together)


def test_partitions_of_many_buckets(backend):
    """Every other parameter is sampled, and there are three dtypes: six plans (or five), whose sums are added in the
    order of their keys, whichever comes first among the groups."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    groups = [{"params": i, "slice_p": 1 + 2 * (i % 2)} for i in range(len(values(backend.small)[0]))]

    def trace(order: list[dict]) -> list[tuple[float, ...]]:
        torch.set_num_threads(1)
        start, grads = values(backend.small)
        # Rounded to nearest, since random bits depend on a parameter's index.
        made = [nn.Parameter(x.to(backend.device, dtypes[i % 3], copy=True)) for i, x in enumerate(start)]
        opt = backend(
            [{**group, "params": [made[group["params"]]]} for group in order], d0=1e-4, low_precision="nearest"
        )
        left = []
        for step in grads:
            for p, g in zip(made, step, strict=True):
                p.grad = g.to(p, copy=True)
            opt.step()
            left.append(tuple(float(opt.param_groups[0][key]) for key in ("d", "d_numerator", "d_denom")))
        assert len(opt._runtime.plans.keys) == (5 if backend.small else 6)
        assert opt.d > 1e-4
        return left

    together = trace(groups)
    shuffle = random.Random(0)
    for _ in range(1 if backend.crawls else 4):
        shuffle.shuffle(groups)
        assert trace(groups) == together
