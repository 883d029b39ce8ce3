"""Shards of one tensor, stepped by themselves, are the slices of the whole, stepped at once: samples and random bits go
by the index in the whole. No process group: what an optimizer is told of its shards is put in place of DTensors."""

import math
from itertools import pairwise

import pytest
import torch
from toolbox import used
from torch import nn

from prodigy_fused import Prodigy, backends, plans
from prodigy_fused.backends import foreach, native
from prodigy_fused.dtensor import IndexMap
from prodigy_fused.step import Slot

# The whole's shape, and the dimension and the places where it is cut. Every shard has a sample, or it would not step.
CUTS = {
    "rows": ((20, 24), 0, (6,)),
    "rows, none of 8 elements": ((9, 5), 0, (3, 5)),
    "a vector": ((101,), 0, (33, 50)),
    "rows of several chunks": ((5, 30_000), 0, (1, 3)),
    "rows of two small chunks": ((2, 1101), 0, (1,)),  # in the middle, see conftest.py: the one that crawls by default
    "columns": ((12, 40), 1, (16,)),
    "columns, none of 8 elements": ((12, 7), 1, (2, 3)),
    "the middle of three": ((3, 9, 16), 1, (4,)),
    "columns of several chunks": ((3, 80_001), 1, (39_000,)),
}
# Where chunks are smaller, too.
SMALLER = {
    "rows of several chunks": ((5, 3_000), 0, (1, 3)),
    "columns of several chunks": ((3, 8_001), 1, (3_900,)),
}
OPTIONS = {
    "slice_p=3": (torch.float32, {"slice_p": 3}),
    "slice_p=11, float64": (torch.float64, {"slice_p": 11}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16, bfloat16 state, slice_p=5": (torch.bfloat16, {"slice_p": 5, "state_dtype": torch.bfloat16}),
    "float16, bfloat16 state, slice_p=2": (torch.float16, {"slice_p": 2, "state_dtype": torch.bfloat16}),
    "bfloat16 state": (torch.float32, {"state_dtype": torch.bfloat16}),
    "no momentum": (torch.bfloat16, {"slice_p": 4, "betas": (0.0, 0.999)}),
}


@pytest.fixture
def told(monkeypatch):
    """The index maps of parameters that stand for shards, by id."""
    maps = {}
    monkeypatch.setattr(plans, "is_dtensor", lambda p: id(p) in maps)
    monkeypatch.setattr(plans, "index_map", lambda p: maps[id(p)])
    return maps


def same(backend, got, wanted):
    """Equal bits; on backends that are torch's operations, which round a vector's tail in another way, nearly all."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    if backend.one_pass:
        return torch.equal(got, wanted)
    close = torch.allclose(got.double(), wanted.double(), rtol=2.0 * torch.finfo(got.dtype).eps, atol=1e-6)
    return close and (got == wanted).double().mean() > 0.9


def samples(whole, own, dim, slice_p):
    """Of the packed samples of the whole, those of a shard."""
    g = torch.arange(math.prod(whole)).view(whole).index_select(dim, own).flatten()
    return g[g % slice_p == 0] // slice_p


def reads(backend, where):
    return backend.name in {"reference", *(backends.READ_SHIFTS if where.is_short_shift else backends.READ_ROWS)}


# Each of the options with every other cut, in turn those of odd and those of even places.
PAIRS = [(cut, options) for i, options in enumerate(OPTIONS) for k, cut in enumerate(CUTS) if (i + k) % 2]


@pytest.mark.parametrize(("cut", "options"), PAIRS)
def test_shards_are_slices_of_the_whole(backend, told, cut, options):
    shape, dim, places = (SMALLER if backend.small else CUTS).get(cut, CUTS[cut])
    dtype, given = OPTIONS[options]
    if "several" in cut and backend.crawls:
        pytest.skip("crawls")
    slice_p = given.get("slice_p", 1)
    start = torch.randn(shape).to(backend.device, dtype)
    grads = [torch.randn(shape).to(start) for _ in range(3)]
    bounds = [0, *places, shape[dim]]
    owns = [torch.arange(*pair) for pair in pairwise(bounds)]
    part = lambda t, own: t.index_select(dim, own.to(t.device)).contiguous()  # noqa: E731

    # d_coef holds d at d0: the shards' sums are their own here, and must not matter.
    make = lambda p: backend([p], d0=0.01, d_coef=1e-9, weight_decay=0.1, **given)  # noqa: E731
    p = nn.Parameter(start.clone())
    whole, shards = make(p), []
    for own in owns:
        q = nn.Parameter(part(start, own))
        where = told[id(q)] = IndexMap(shape, [own if d == dim else None for d in range(len(shape))])
        shards.append((q, own, make(q)))
        if not reads(backend, where):
            q.grad = part(grads[0], own)
            with pytest.raises(RuntimeError, match="index in the whole"):
                shards.pop()[2].step()
    if not shards:
        return
    for grad in grads:
        p.grad = grad
        whole.step()
        for q, own, opt in shards:
            q.grad = part(grad, own)
            opt.step()

    for q, own, opt in shards:
        assert same(backend, q, part(p, own))
        for name in ("exp_avg", "exp_avg_sq") if given.get("betas") is None else ("exp_avg_sq",):
            assert same(backend, opt.state[q][name], part(whole.state[p][name], own)), name
        for name in ("s", "p0"):
            wanted, got = whole.state[p][name], opt.state[q][name]
            if slice_p == 1:
                assert same(backend, got, part(wanted, own)), name
            else:
                assert same(backend, got.flatten(), wanted.flatten()[samples(shape, own, dim, slice_p)]), name
    rtol = 1e-4 if dtype != torch.float64 else 1e-12
    for name in ("d_numerator", "d_denom"):
        total = sum(float(opt.param_groups[0][name]) for _, _, opt in shards)
        # Each has its own rounding of the sums; terms of both signs.
        assert total == pytest.approx(float(whole.param_groups[0][name]), rel=rtol, abs=1e-7), name


# Where shards of vectors begin, and their sizes. With slice_p=3 the last has no sample, nor has the last element of one
# that foreach cuts into pieces.
SHARDS = [(0, 100), (8, 3073), (13, 3073), (13, 40), (21, 7), (800, 64), (22, 1)]


@pytest.mark.parametrize("slice_p", [1, 3])
def test_shards_of_many_parameters(backend, told, monkeypatch, slice_p):
    monkeypatch.setattr(foreach, "RUN_ELEMENTS_PER_THREAD", 1 << 12)
    values = [torch.randn(2, size).bfloat16() for _, size in SHARDS]
    runs = []
    for each in (backend, type(backend)("reference")):
        params = [nn.Parameter(start.to(each.device, copy=True)) for start, _ in values]
        for p, (_, grad), (base, size) in zip(params, values, SHARDS, strict=True):
            p.grad = grad.to(p)
            told[id(p)] = IndexMap((base + size + 5,), [torch.arange(base, base + size)])
            if not reads(each, told[id(p)]):
                pytest.skip("refuses shards")
        opt = each(params, slice_p=slice_p, d0=0.01, state_dtype=torch.bfloat16)
        opt.step()
        runs.append([opt.d, [[p, *(opt.state[p][name] for name in ("exp_avg_sq", "s", "p0"))] for p in params]])
    (d, ours), (wanted, theirs) = runs
    assert d == pytest.approx(wanted, rel=1e-6)
    for mine, others in zip(ours, theirs, strict=True):
        for a, b in zip(mine, others, strict=True):
            assert a.shape == b.shape and (a.cpu() != b.cpu()).sum() <= 0.01 * b.numel()


# Element 2^35 has another word than the one before, see Note [Random bits]; here it is in the middle of a chunk.
BEYOND = {"across": 4185, "beyond": 4187}


@pytest.mark.parametrize("row", BEYOND)
def test_indices_of_more_than_35_bits(backend, told, row):
    where = IndexMap((2000, 6000, 2900), [torch.tensor([1974]), torch.tensor([BEYOND[row]]), None])
    assert (where.affine.base < 2**35) == (row == "across") and where.affine.base + 1868 >= 2**35
    start, grad = torch.randn(2, *where.shape).bfloat16()
    runs = []
    for each in (backend, type(backend)("reference")):
        p = nn.Parameter(start.to(each.device, copy=True))
        p.grad, told[id(p)] = grad.to(p), where
        opt = each([p], slice_p=7, d0=0.01, state_dtype=torch.bfloat16)
        if not reads(each, where):
            with pytest.raises(RuntimeError, match="index in the whole"):
                opt.step()
            return
        opt.step()
        runs.append([p, *(opt.state[p][name] for name in ("exp_avg_sq", "s", "p0"))])
    for ours, theirs in zip(*runs, strict=True):
        assert ours.shape == theirs.shape and (ours.cpu() == theirs.cpu()).double().mean() > 0.99


def test_what_a_map_makes_impossible_is_said(told):
    p = nn.Parameter(torch.zeros(2, 2, 2))
    own = torch.tensor([0, 1])
    told[id(p)] = IndexMap((4, 4, 2), [torch.tensor([0, 2]), own, None])
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="index"):
        Prodigy([p], slice_p=2, fused=True).step()
    opt = Prodigy([p], slice_p=2)
    opt.step()
    assert used(opt) == {"reference"}


def test_a_list_of_rows_that_is_larger_than_the_shard_is_not_made(told):
    p = nn.Parameter(torch.zeros(1 << 15, 1, dtype=torch.bfloat16))
    told[id(p)] = IndexMap((1 << 15, 2), [None, torch.tensor([1])])
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="memory"):
        Prodigy([p], fused=True).step()
    opt = Prodigy([p])
    opt.step()
    assert used(opt) == {"reference"}


@pytest.mark.skipif(native.MISSING is not None, reason=str(native.MISSING))
@pytest.mark.parametrize("own", [torch.tensor([0, 2]), torch.tensor([1, 2])], ids=["not affine", "not row-major"])
def test_the_compiled_module_refuses_a_map_that_it_cannot_follow(own):
    p = torch.zeros(1, 2, 2, 2).to(memory_format=torch.channels_last)
    where = IndexMap((1, 4, 4, 2), [None, own, torch.tensor([0, 1]) if own[0] == 0 else None, None])
    slot = Slot(0, p.contiguous() if own[0] == 0 else p, {}, 0, slice_p=2, where=where)
    with pytest.raises(ValueError, match="unsupported shard"):
        native._C.TensorList([slot], torch.Tensor, "float32", 1)
