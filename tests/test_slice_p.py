"""``slice_p``: a warning where it samples only some columns of the matrices, and none where that is no matter."""

import copy
import warnings

import pytest
import torch
from toolbox import feed, make_params, parameters
from torch import nn

from prodigy_fused import Prodigy
from prodigy_fused.sampling import fitting, width
from prodigy_fused.step import Slot


def said(opt, steps=2, without=()):
    """Returns the warnings of some steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in range(steps):
            feed(opt, t, without)
            opt.step()
    return [str(warning.message) for warning in caught]


def start(*shapes, **options):
    return Prodigy(make_params(torch.float32, shapes=shapes), **{"fused": False, **options})


@pytest.mark.parametrize("fused", [None, False])
def test_it_names_the_parameter_and_what_fits(fused):
    opt = start((5,), (3, 16), (64, 24), (20, 30), (100, 36), slice_p=9, fused=fused)
    assert said(opt) == [
        "parameter 2 of shape (64, 24) and 2 more: slice_p=9 and the last dimension have the factor 3 in common, so "
        "that only one in 3 columns is sampled, and d may be far off; slice_p=7 would sample all columns"
    ]


@pytest.mark.parametrize(
    ("slice_p", "shapes"),
    [
        (1, [(64, 64)]),
        (11, [(64, 64), (40, 512)]),
        (11, [(1, 2, 768), (2, 1024), (2, 3072), (2, 4096), (2, 11008), (2, 14336)]),  # of common models
        (16, [(64, 25)]),  # rows are sampled evenly
        (16, [(4096,), (4096, 1), (1, 4096, 1), ()]),
        (16, [(31, 32)]),  # small
        (16, [(32, 32), (96, 97)]),  # a small share of all elements
    ],
)
def test_nothing_to_say(slice_p, shapes):
    assert said(start(*shapes, slice_p=slice_p)) == []


@pytest.mark.parametrize(
    ("slice_p", "shapes", "factor", "better"),
    [
        (16, [(32, 32)], 16, 15),
        (16, [(32, 32), (94, 97)], 16, 15),  # more than a tenth
        (11, [(2, 5632)], 11, 9),
        (11, [(4, 16, 33)], 11, 13),
        (11, [(64, 33, 1, 1)], 11, 13),
        (2, [(64, 34)], 2, 3),
    ],
)
def test_what_matters(slice_p, shapes, factor, better):
    (message,) = said(start(*shapes, slice_p=slice_p))
    assert f"the factor {factor} in common" in message and f"slice_p={better} would" in message


def test_it_is_said_once():
    opt = start((64, 66), (64, 66), slice_p=11)
    assert len(said(opt, without=(1,))) == 1
    assert said(opt) == []  # the second one's first gradient
    opt.add_param_group({"params": [nn.Parameter(torch.ones(64, 66))]})
    assert said(opt) == []
    assert said(copy.deepcopy(opt)) == []


def test_a_group_that_is_added_later():
    opt = start((64, 65), slice_p=11)
    assert said(opt) == []
    opt.add_param_group({"params": [nn.Parameter(torch.ones(64, 66))]})
    assert "parameter 1 of" in said(opt)[0]


def test_not_where_a_checkpoint_decides():
    opt = start((64, 66), slice_p=11)
    said(opt)
    resumed = start((64, 66), slice_p=11)
    resumed.load_state_dict(opt.state_dict())
    assert said(resumed) == []


def test_estimates_that_have_ended_sample_nothing():
    opt = start((64, 65), slice_p=11, prodigy_steps=1)
    said(opt)
    opt.add_param_group({"params": [nn.Parameter(torch.ones(64, 66))]})
    assert said(opt) == []


@pytest.mark.parametrize(("split", "count"), [(False, 0), (True, 1)])
def test_the_share_is_that_of_the_estimate(split, count):
    params = make_params(torch.float32, shapes=((97, 101), (16, 64)))
    opt = Prodigy([{"params": [p]} for p in params], slice_p=16, split_groups=split, fused=False)
    assert len(said(opt)) == count


def test_of_a_shard_the_whole_counts():
    whole, part = torch.empty(64, 66), torch.empty(64, 6)
    assert width(Slot(0, part, {}, 0, slice_p=11, whole=whole)) == 66
    assert width(Slot(0, part, {}, 0, slice_p=11)) == 6


@pytest.mark.parametrize(
    ("slice_p", "widths", "wanted"),
    [
        (2, {4, 1}, 3),
        (16, {768}, 17),
        (11, {11, 9}, 13),
        (11, {33 * 13 * 7}, 5),
        (12, {11, 13, 7}, 9),
        (1 << 40, {2}, -1),
    ],
)
def test_what_fits(slice_p, widths, wanted):
    assert fitting(slice_p, widths) == (wanted if wanted > 0 else slice_p + wanted)


def test_what_it_says_is_so():
    """One in `factor` columns, the same ones in every row, and with what it advises all of them."""
    opt = start((64, 66), slice_p=12)
    (message,) = said(opt)
    better = int(message.split("slice_p=")[2].split()[0])
    columns = [{i % 66 for i in range(0, 64 * 66, p)} for p in (12, better)]
    assert columns == [set(range(0, 66, 6)), set(range(66))] and "the factor 6 in" in message
    assert parameters(opt)[0].shape == (64, 66)
