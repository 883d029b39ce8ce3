"""Every size and every arrangement in memory, against the reference on plain tensors."""

import itertools

import numpy as np
import pytest
import torch
from oracle import Algorithm4, Layout, Pair, Prodigyopt
from torch import Tensor

# With d0 = 0.01 an element that is left out, or taken twice, is wrong by 0.01 or more.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
SENTINEL = 7.25


def dense(t: Tensor, order: list[int], offset: int = 0) -> Tensor:
    """``t`` with its dimensions in memory in this order, at an offset, between sentinels."""
    shape = [t.shape[i] for i in order]
    base = t.new_full((offset + t.numel() + 5,), SENTINEL)
    inverse = [order.index(i) for i in range(t.dim())]
    return base[offset : offset + t.numel()].view(shape).permute(inverse).copy_(t)


def gaps(t: Tensor) -> Tensor:
    base = t.new_full((*t.shape[:-1], 2 * t.shape[-1]) if t.dim() else (2,), SENTINEL)
    return base[..., ::2].view(t.shape).copy_(t)


def odd_strides(t: Tensor) -> Tensor:
    """Contiguous, but for the strides of size-1 dimensions, which mean nothing."""
    strides = [s if n > 1 else 13 + i for i, (s, n) in enumerate(zip(t.stride(), t.shape, strict=True))]
    return t.clone().as_strided(t.shape, strides)


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


DENSE: dict[str, Layout] = {
    "contiguous": lambda t: t,
    "at offset 1": lambda t: dense(t, list(range(t.dim())), 1),
    "at offset 3": lambda t: dense(t, list(range(t.dim())), 3),
    "last dimension first": lambda t: dense(t, [*range(t.dim())][-1:] + [*range(t.dim())][:-1]),
    "reversed": lambda t: dense(t, list(range(t.dim()))[::-1]),
    "reversed, at offset 1": lambda t: dense(t, list(range(t.dim()))[::-1], 1),
    "channels last": channels_last,
    "odd strides": odd_strides,
}
SPARSE: dict[str, Layout] = {"gaps": gaps, "gaps, transposed": lambda t: gaps(t.mT).mT if t.dim() > 1 else gaps(t)}
ANY = {**DENSE, **SPARSE}

RUNS = {
    "default": {},
    "no momentum, decoupled": {"betas": (0.0, 0.99), "weight_decay": 0.1},
    "every 2nd": {"slice_p": 2},
    "every 3rd, coupled": {"slice_p": 3, "weight_decay": 0.1, "decouple": False},
    "every 11th, no momentum": {"slice_p": 11, "betas": (0.0, 0.99)},
}


@pytest.fixture(params=RUNS.values(), ids=RUNS.keys())
def options(request):
    return request.param


# Of dtypes, starts (random, or zero) and options, every pair.
each_pair = pytest.mark.parametrize(
    ("dtype", "options", "scale"),
    [
        pytest.param(dtype, options, scale, id=f"{dtype}-{name}-{scale:.0f}")
        for i, (name, options) in enumerate(RUNS.items())
        for dtype, scale in zip(TOLERANCE, [i % 2, 1 - i % 2], strict=True)
    ],
)


def agree(backend, params: list[Tensor], dtype, options, layouts=None, steps=4) -> Pair:
    both = Pair(backend, Prodigyopt, [{"params": params}], dtype, backend.device, layouts, d0=1e-2, **options)
    for k in range(steps):
        draw = torch.Generator().manual_seed(k)
        grads = [p - 2 + torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in both.theirs]
        if layouts is not None:
            # An expanded gradient holds one number only.
            grads = [torch.full_like(g, g.mean()) if layouts[i][1] is expanded else g for i, g in enumerate(grads)]
        both.step(grads)
        both.check(TOLERANCE[dtype])
    assert both.opt.d > 1e-2 or params[0].numel() == 1
    return both


def random(shape: tuple[int, ...], scale: float) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


# -- sizes -------------------------------------------------------------------------------------------------------------

AROUND = [16, 32, 64, 1 << 10, 1 << 15, 1 << 16]  # a vector, its multiples, a block, a chunk, two chunks
SIZES = sorted({0, 1, 2, 3, *(n + i for n in AROUND for i in (-1, 0, 1))})


@each_pair
def test_sizes(backend, dtype, options, scale):
    shapes = [(), (0, 3), (1, 1, 1), *((n,) for n in SIZES if not backend.small or n < 100)]
    agree(backend, [random(shape, scale) for shape in shapes], dtype, options)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 33, 65, 1025])
def test_one_tensor(backend, size, options):
    """Alone, no other tensor's sums hide its own."""
    agree(backend, [random((size,), 1.0)], torch.float64, options)


def test_a_long_sum_in_float32(backend):
    """A million terms: what is summed in float32 must be short."""
    if backend.small:
        pytest.skip("a million elements")
    both = agree(backend, [1 + 1e-3 * random((1 << 20,), 1.0)], torch.float32, {})
    ours, theirs = both.opt.param_groups[0], both.oracle.param_groups[0]
    for key in ("d", "d_denom", "d_numerator"):
        assert float(ours[key]) == pytest.approx(theirs[key], rel=5e-7)


def test_only_empty_tensors(backend):
    both = Pair(backend, Algorithm4, [{"params": [torch.zeros(0), torch.zeros(3, 0)]}], device=backend.device)
    for _ in range(2):
        both.step([torch.zeros(0), torch.zeros(3, 0)])
    assert (both.opt.d, both.opt.step_count) == (1e-6, 0)


def test_thousands_of_tensors(backend):
    count = 211 if backend.small else 20_011 if backend.one_pass else 5_003
    sizes = [1 + i % 3 for i in range(count)]
    # The reference sees them as one: but for slicing and storage, tensors mean nothing to Algorithm 4.
    one = random((sum(sizes),), 1.0)
    whole = torch.nn.Parameter(one.clone())
    parts = [torch.nn.Parameter(t.to(backend.device, copy=True)) for t in one.split(sizes)]
    oracle, opt = Prodigyopt([whole], d0=1e-2), backend(parts, d0=1e-2)
    for k in range(2):
        whole.grad = whole.detach() - 2 + random((one.numel() + k,), 1.0)[k:]
        for p, g in zip(parts, whole.grad.split(sizes), strict=True):
            p.grad = g.to(backend.device)
        oracle.step()
        opt.step()
    assert opt.d == pytest.approx(oracle.d, rel=1e-10)
    assert oracle.d > 1e-2
    assert torch.allclose(torch.cat([p.detach().cpu() for p in parts]), whole.detach(), rtol=1e-10, atol=1e-10)


BEYOND_INT32 = (1 << 31) + 65_543
SPOTS = [0, 1, 2, 3, 6, 22, 2**30, *range(2**31 - 12, 2**31 + 12), BEYOND_INT32 - 2, BEYOND_INT32 - 1]


def zeros(device: str) -> Tensor:
    """On the host, pages that are never written cost nothing (torch.zeros would write them)."""
    if device == "cuda":
        return torch.zeros(BEYOND_INT32, device=device)
    return torch.from_numpy(np.zeros(BEYOND_INT32, np.float32))


def free_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as info:
        return next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slice_p", "beta1", "scale"),
    [
        (1, 0.0, 0.0),
        (1, 0.9, 1.0),
        (2, 0.0, 0.0),
        (2, 0.9, 1.0),
        (3, 0.0, 0.0),
        (3, 0.9, 1.0),
        (11, 0.0, 0.0),
        (11, 0.9, 1.0),
    ],
)
def test_beyond_int32(backend, slice_p, beta1, scale):
    """A few elements have gradients; all others are zero and stay so, for the oracle may as well not exist."""
    arrays = 2 + (beta1 > 0) + (1 + (scale > 0)) / slice_p  # x, v, m, s, p0
    arrays += backend.device == "cuda"  # the gradient, see zeros()
    arrays += 0 if backend.one_pass else 6
    need = int(4 * BEYOND_INT32 * arrays) + (4 << 30)
    if backend.small or free_memory(backend.device) < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB")

    p = torch.nn.Parameter(zeros(backend.device))
    spots = torch.tensor(SPOTS)
    sampled = spots % slice_p == 0
    x = random((len(SPOTS),), scale).float().double()
    p.data[spots.to(p.device)] = x.to(p.device, p.dtype)
    # The first element stands for the sampled ones of the second tensor.
    theirs = [x[sampled], torch.cat([torch.zeros(1), x[~sampled]]).double()]
    groups = [{"params": theirs[:1]}, {"params": theirs[1:], "slice_p": len(SPOTS) + 1}]
    options = {"betas": (beta1, 0.99), "d0": 1e-2, "weight_decay": 0.1}
    oracle, opt = Algorithm4(groups, **options), backend([p], slice_p=slice_p, **options)
    p.grad = zeros(backend.device)
    for k in range(5):
        g = x - 2 + random((len(SPOTS) + k,), 0.3)[k:]
        theirs[0].grad, theirs[1].grad = g[sampled], torch.cat([torch.zeros(1), g[~sampled]]).double()
        p.grad[spots.to(p.device)] = g.to(p.device, p.dtype)
        oracle.step()
        opt.step()
    ours = p.detach()[spots.to(p.device)].cpu().double()
    assert opt.d == pytest.approx(oracle.d, rel=1e-4)
    assert oracle.d > 1e-2
    assert torch.allclose(ours[sampled], theirs[0], rtol=1e-4, atol=1e-4)
    assert torch.allclose(ours[~sampled], theirs[1][1:], rtol=1e-4, atol=1e-4)
    assert p.detach().count_nonzero() == ours.count_nonzero()


# -- arrangements in memory --------------------------------------------------------------------------------------------

SHAPES = [(5, 7), (3, 5, 2, 4), (1, 6, 1), (1, 4, 1, 1), (8,), (2, 1, 3, 1, 2), (3, 6, 1, 1)]


def expanded(t: Tensor) -> Tensor:
    return t.flatten()[0].expand(t.shape)


def untouched_outside(p: Tensor) -> bool:
    """Whether everything in the storage of ``p`` but itself is still the sentinel; overwrites ``p``."""
    p.detach().fill_(SENTINEL)
    storage = torch.empty(0, dtype=p.dtype, device=p.device).set_(p.untyped_storage())
    return bool((storage == SENTINEL).all())


@each_pair
def test_layouts(backend, dtype, options, scale):
    """Each layout of a parameter with each of its gradient, in two or three of the shapes, others in other runs."""
    kinds = list(itertools.product((DENSE if backend.dense_only else ANY).values(), [*ANY.values(), expanded]))
    layouts = [kind for kind in kinds for _ in SHAPES]
    params = [random(shape, scale) for _ in kinds for shape in SHAPES]
    first = [*RUNS.values()].index(options)
    every = 8 if backend.small else 3  # no divisor of the number of shapes
    params, layouts = params[first % every :: every], layouts[first % every :: every]
    both = agree(backend, params, dtype, options, layouts, steps=2)
    assert all(map(untouched_outside, both.ours))


@pytest.mark.parametrize("grad", ["contiguous", "channels last"])
@pytest.mark.parametrize("param", ["channels last", "reversed"])
def test_large_layouts(backend, options, param, grad):
    """More than a chunk in another order than row-major."""
    if backend.small:
        pytest.skip("40,000 elements")
    agree(backend, [random((40, 31, 6, 6), 1.0)], torch.float64, options, [(ANY[param], ANY[grad])])


def test_the_layout_of_the_gradient_may_change(backend):
    both = Pair(backend, Prodigyopt, [{"params": [random((5, 7), 1.0)]}], device=backend.device, d0=1e-2)
    for layout in [*ANY.values()] * 2:
        both.layouts = [(layout, layout)]
        both.step([both.theirs[0] - 2])
        both.check(1e-10)


@pytest.mark.parametrize("layout", SPARSE)
def test_a_parameter_with_gaps_is_taken_or_refused(backend, layout):
    p = torch.nn.Parameter(SPARSE[layout](random((4, 5), 1.0).to(backend.device)))
    if backend.dense_only:
        with pytest.raises(RuntimeError, match=rf"(?s){backend.name}.*strides.*contiguous"):
            backend([p])
    else:
        backend([p])


def test_nine_dimensions(backend):
    p = random((1, 2, 1, 2, 1, 2, 1, 2, 3), 1.0)
    agree(backend, [p], torch.float64, {})
    other = torch.nn.Parameter(DENSE["reversed"](p).to(backend.device))
    if backend.dense_only:
        with pytest.raises(RuntimeError, match="9 dimensions"):
            backend([other])
    else:
        backend([other])
