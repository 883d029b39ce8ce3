"""bench/slice_p.py: what it follows is what an optimizer computes."""

from math import gcd

import benchmarks  # noqa: F401  # puts bench/ on the path
import pytest
import torch
from slice_p import SLICES, WIDTHS, Starts, figures, shared_factor, table
from toolbox import feed, make_params
from torch import nn

from prodigy_fused import Prodigy

SHAPES = ((7, 9), (5,), (2, 3, 4))


def test_the_estimates_are_those_of_an_optimizer():
    """Of all elements in every step; of the samples from the first on until d has moved: then the paths part."""
    opt = Prodigy(make_params(torch.float32, shapes=SHAPES))
    starts = Starts(opt, (3, 10))
    sampled = {p: Prodigy(make_params(torch.float32, shapes=SHAPES), slice_p=p) for p in starts.places}
    for t in range(6):
        feed(opt, t)
        starts.step()
        for p, other in sampled.items() if t < 2 else ():
            feed(other, t)
            other.step()
            assert starts.largest[p][0].item() == pytest.approx(other.report()["d_hat"], rel=1e-3)
        assert max(starts.whole, 1e-6) == pytest.approx(opt.param_groups[0]["d_max"], rel=1e-5)
    assert opt.d > 1e-6
    assert {p: len(ratios) for p, ratios in starts.ratios().items()} == {3: 3, 10: 10}


def test_figures():
    found = figures([torch.tensor([0.7]), torch.tensor([1.0, 1.4])])
    assert found == {"deviation": pytest.approx(0.289, abs=1e-3), "least": 0.7, "most": 1.4}
    params = [nn.Parameter(torch.zeros(9, 4)), nn.Parameter(torch.zeros(6, 12))]
    assert [shared_factor(params, p) for p in (3, 8, 11)] == [3, 4, 1]


def test_the_committed_figures_make_a_table():
    lines = table().splitlines()
    assert len(lines) == 2 + len(SLICES) + 2
    factors = [[int(line.split("|")[i]) for i in (2, 5)] for line in lines[2:-2]]
    assert factors == [[gcd(p, width) for width in WIDTHS] for p in SLICES]
