"""bench/: the peers and the workloads, the cost model, and the benchmarks of the parts of a step."""

import sys
from types import SimpleNamespace

import benchmarks
import compiled_foreach
import peers
import pytest
import roofline
import rows
import run
import test_micro
import torch
import workloads
from benchmarks import row
from peers import ANCHOR, COPY
from torch import nn

from prodigy_fused import Prodigy, backends
from prodigy_fused.backends.foreach import ForeachPlan

CPU = torch.device("cpu")
TOTALS = {
    "GPT-2 124 M": 124_439_808,
    "GPT-2 1.5 B": 1_557_611_200,
    "Llama-3 8 B": 8_030_261_248,
    "Llama-3 8 B, one of 8 ranks": 8_030_261_248 / 8,
    "ViT-B/16": 86_567_656,
    "SDXL UNet": 2_567_463_684,
}


@pytest.mark.parametrize("name", TOTALS)
def test_shapes_add_up_to_the_published_totals(name):
    (workload,) = (w for w in workloads.WORKLOADS if w.name == name)
    assert workload.elements == TOTALS[name]


def test_a_lora_of_sdxl_has_two_matrices_for_each_of_its_layers():
    shapes = workloads.sdxl_lora(rank=4)
    # As kohya's scripts count them: 722 in the UNet, 72 and 192 in the text encoders.
    assert len(shapes) == 2 * (722 + 72 + 192)
    assert all(4 in shape for shape in shapes)


def test_a_shard_of_an_uneven_tensor_is_that_of_the_first_rank():
    assert workloads.shard([(10, 3), (1,)], 4) == [(3, 3), (1,)]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # by torch's compiler
@pytest.mark.parametrize("really", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_compiled_foreach_makes_the_same_steps(monkeypatch, request, really):
    if not really:
        functions = ForeachPlan.update_run, ForeachPlan.step_run
        monkeypatch.setattr(compiled_foreach, "compiled", lambda: functions)
    torch.manual_seed(0)
    params = [[nn.Parameter(torch.full((n,), 2.0, dtype=torch.float64)) for n in (5000, 3)] for _ in range(2)]
    optimizers = compiled_foreach.make(params[0]), Prodigy(params[1], backend="foreach")
    request.addfinalizer(lambda: backends.unregister(compiled_foreach.NAME))
    for _ in range(6):
        for a, b in zip(*params, strict=True):
            a.grad = 1 + torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert optimizers[0].d == pytest.approx(optimizers[1].d, rel=1e-12)
    assert optimizers[0].d > 1e-6
    for a, b in zip(*params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_the_backends_of_this_machine_are_found():
    names = [peer.name for peer in peers.table(CPU)]
    assert len(names) == len(set(names))
    assert {benchmarks.FUSED, "prodigy_fused(cpu, slice_p=11)", "prodigy_fused(foreach)", ANCHOR} <= set(names)


def test_bfloat16_has_its_own_peers():
    names = {peer.name for peer in peers.table(CPU, torch.bfloat16)} - {peer.name for peer in peers.table(CPU)}
    more = ("", ", slice_p=11", ", bfloat16 state", ", bfloat16 state, slice_p=11")
    ours = {f"prodigy_fused(cpu, {what})" for what in ("displacement", *(f"stochastic{how}" for how in more))}
    assert names == {*ours, "torchao AdamW, stochastic"}


def test_a_peer_that_needs_a_gpu_says_so():
    (flash,) = (peer for peer in peers.table(CPU) if peer.package == "flashoptim")
    assert flash.unfit(1, CPU) == "it needs a GPU" and flash.unfit(1, torch.device("cuda")) is None
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flashoptim", SimpleNamespace(FlashAdamW=lambda _, **options: made.append(options)))
        for dtype in (torch.float32, torch.bfloat16):
            flash.make([nn.Parameter(torch.ones(1, dtype=dtype))])
    assert [options["master_weight_bits"] for options in made] == [None, 24]
    assert [flash.count(dtype) for dtype in (torch.float32, torch.bfloat16)] == [16.25, 12.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_variants_can_be_made_and_their_bytes_are_known(dtype):
    for peer in peers.own(CPU, dtype):
        if peer.count is not None:
            peer.make([nn.Parameter(torch.ones(3, dtype=dtype))])
            assert peer.count(dtype) > 10
    counts = {peer.name: peer.count for peer in peers.own(CPU, torch.float32) if peer.count}
    assert counts["prodigy_fused(cpu, d moves)"](torch.float32) == 56
    assert counts["prodigy_fused(cpu, frozen)"](torch.float32) == 28
    assert counts["prodigy_fused(cpu, bfloat16 state)"](torch.bfloat16) == 22
    counts = {peer.name: peer.count for peer in peers.own(CPU, torch.bfloat16) if peer.count}
    assert counts["prodigy_fused(cpu)"](torch.bfloat16) == 34
    assert counts["prodigy_fused(cpu, stochastic)"](torch.bfloat16) == 32
    assert counts["prodigy_fused(cpu, displacement)"](torch.bfloat16) == 40
    coded = counts["prodigy_fused(cpu, 8-bit state, slice_p=11)"](torch.bfloat16)
    assert coded == roofline.coded_bytes(2, 11, beside=1)


def test_most_variants_take_part_only_where_all_of_them_race():
    plain, policies, scan = (workloads.Workload("", list, **how) for how in ({}, {"policies": True}, {"scan": True}))
    names = [{p.name for p in peers.table(CPU) if run.takes_part(p, w)} for w in (plain, policies, scan)]
    assert "prodigy_fused(cpu, frozen)" in names[1] - names[0]
    assert "adv_optm Prodigy" in names[0] - names[1]
    assert names[2] == {benchmarks.FUSED, ANCHOR, "prodigyopt"}
    assert {benchmarks.FUSED, ANCHOR, "prodigyopt", "prodigy_fused(cpu, slice_p=11)"} <= names[0] & names[1]


# -- the cost model ---------------------------------------------------------------------------------------------------
BYTES = {
    "ours": (roofline.prodigy_bytes(), 40),
    "ours, slice_p=11": (roofline.prodigy_bytes(slice_p=11), 29.1),
    "AdamW": (roofline.adamw_bytes(), 28),
    "prodigyopt": (roofline.prodigyopt_bytes(), 124),
    # g, x, x0 of 2 bytes, x written; m, v, s of 4, read and written
    "bfloat16": (roofline.prodigy_bytes(x=2), 2 + 2 + 2 + 2 + 24),
    # x is read all the same, to see whether the caller has written to it; x - x0 is read and written
    "bfloat16, displacement": (roofline.prodigy_bytes(x=2, beside=4), 32 + 4 + 4),
    "float64": (roofline.prodigy_bytes(x=8, state=8), 80),
    "frozen": (roofline.prodigy_bytes(frozen=True, slice_p=11), 28),  # an AdamW
    # d moves: x, m, v are read once more, x is written
    "moving": (roofline.prodigy_bytes(moves=True), 56),
    "moving displacement": (roofline.prodigy_bytes(x=2, beside=4, moves=True), 40 + 2 + 4 + 4 + 2 + 8),
    # g, x, x', and four codes, read and written; with samples two codes, and at every 11th element s and x0
    "8 bits": (roofline.coded_bytes(), 12 + 8 + 8 / 256),
    "8 bits, sampled": (roofline.coded_bytes(slice_p=11), 12 + 4 + 4 / 256 + 12 / 11),
    "8 and 24 bits, sampled": (roofline.coded_bytes(2, 11, beside=1), 6 + 2 + 4 + 4 / 256 + 10 / 11),
    # the byte is read and written
    "24 bits": (roofline.prodigy_bytes(x=2, beside=1), 32 + 2),
    "24 bits, moving": (roofline.prodigy_bytes(x=2, beside=1, moves=True), 34 + 2 + 4 + 4 + 2 + 2),
    # g, x, x', m, v of 2 bytes; m, v written; a byte; at every 11th element s, read and written, and x0
    "24 bits, 16-bit state, sampled": (roofline.prodigy_bytes(2, 2, 11, beside=1), 14 + 2 + 6 / 11),
}


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float32, (40, 28)), (torch.float64, (80, 56)), (torch.bfloat16, (34, 14)), (torch.float16, (40, 14))],
    ids=str,
)
def test_bytes_of_the_peers_with_default_options(dtype, expected):
    assert (peers.our_bytes(dtype), peers.adam_bytes(dtype)) == expected


@pytest.mark.parametrize(("count", "expected"), BYTES.values(), ids=BYTES.keys())
def test_bytes_per_parameter(count, expected):
    assert count == pytest.approx(expected, abs=0.05)


RING = roofline.Gather(base_us=10, near_us=1, far_us=5, per_node=4)
MACHINE = roofline.Machine("m", gb_s=100, launch_us=10, gather=RING, tflops=2)


def test_a_step_is_bytes_over_bandwidth_and_launches():
    assert roofline.step_seconds(10**9, 40, MACHINE, launches=0) == pytest.approx(0.4)
    assert roofline.step_seconds(0, 40, MACHINE, launches=2) == pytest.approx(20e-6)
    assert roofline.training_seconds(10**9, 1000, MACHINE) == pytest.approx(3)


@pytest.mark.parametrize(("ranks", "us"), [(1, 0), (2, 10 + 1), (4, 10 + 3), (8, 10 + 6 + 5), (16, 10 + 12 + 15)])
def test_a_ring_goes_through_all_gpus(ranks, us):
    assert RING.seconds(ranks) == pytest.approx(1e-6 * us)


def test_a_prediction_is_of_one_ranks_shard():
    shapes = [(1000, 10**6), (7, 10**6)]
    ours = roofline.Optimizer("ours", 24, "ours")
    alone = roofline.predict(shapes, MACHINE, 1, 1000, ours, 4e-10)
    shared = roofline.predict(shapes, MACHINE, 4, 1000, ours, 4e-10)
    assert alone.gb == pytest.approx(24 * 1.007)
    assert shared.gb == pytest.approx(24 * 0.252)  # the first rank's: two of the seven
    assert (alone.update, alone.gather) == pytest.approx((1.007 * 0.4, 0))
    assert (shared.update, shared.gather) == pytest.approx((0.252 * 0.4, 13e-6))
    assert 0 < shared.share < alone.share < 1
    assert roofline.predict(shapes, MACHINE, 4, 1000, roofline.Optimizer("a", 16, "a", gathers=False), 1e-9).gather == 0


def test_the_table_of_predictions_is_of_measured_rows_and_says_that_it_predicts():
    measured = rows.read(roofline.MEASURED)
    ours = next(o for o in roofline.OPTIMIZERS if o.name == "slice_p=1")
    found = next(r for r in measured if r["workload"] == roofline.LARGE and r["peer"] == ours.peer)
    assert roofline.seconds_per_element(measured, ours) == pytest.approx(1e-3 * found["ms"] / found["parameters"])
    lines = roofline.table().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:14:4]] == ["8 B", "70 B", "405 B"]
    assert "**Predicted, not measured.**" in lines[15]
    with pytest.raises(ValueError, match="no row of"):
        roofline.seconds_per_element([], ours)


def test_the_error_of_the_model_is_reported():
    measured = row(ms=8.0, bytes=40.0, copy_gb_s=200.0, parameters=10**8)
    assert roofline.predicted_ms(measured) == pytest.approx(20)
    text = roofline.report([measured, row(COPY), row(status="missing", bytes=40.0, ms=None)])
    assert "| 8.000 | 20.000 | +150% |" in text
    assert "Median error from 16,777,216 parameters on: 150%." in text


def test_the_micro_benchmarks_run():
    def once(work, *arguments):
        return work(*arguments)

    test_micro.test_plan_building(once, "cpu")
    test_micro.test_looking_whether_all_tensors_are_still_the_same(once, "cpu")
    test_micro.test_address_refresh(once, "cpu")
    test_micro.test_packing_the_numbers_of_a_hundred_groups(once)
    test_micro.test_update_and_sums(once, "cpu", [test_micro.CHUNK])
    test_micro.test_finish(once, "cpu", moved=True)
    test_micro.test_finish(once, "cpu", moved=False)
