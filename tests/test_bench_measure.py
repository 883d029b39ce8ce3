"""bench/: turns, warm-up, memory and counts; who fails is listed and the others go on."""

import math
import warnings
from types import SimpleNamespace

import counts
import gradients
import heats
import measure
import peers
import pytest
import rows
import run
import torch
import train
from measure import Race
from peers import ANCHOR, Peer
from torch import nn

from prodigy_fused import Prodigy

CPU = torch.device("cpu")


class Recorder:
    """An optimizer that notes what it is given, and fails at its `fails`-th step."""

    def __init__(self, params, name, fails=math.inf):
        self.params, self.name, self.fails, self.steps, self.state = params, name, fails, 0, {}

    def zero_grad(self):
        pass

    def step(self):
        self.steps += 1
        if self.steps == self.fails:
            raise RuntimeError(f"step {self.steps}\nand more")
        self.log.append((self.name, self.params[0].grad.sum().item()))


def recorder(name, **options):
    return Peer(name, lambda params: Recorder(params, name, **options))


@pytest.fixture
def log(monkeypatch):
    monkeypatch.setattr(Recorder, "log", [], raising=False)
    monkeypatch.setattr(measure, "extra_bytes", lambda step, device: 0)  # the profiler takes seconds to start
    return Recorder.log


def raced(*contestants, rounds=5, seconds=60.0, shapes=((30,), (2, 3))):
    racers = Race(list(shapes), list(contestants), CPU, torch.float32, 1 << 10).run(rounds, seconds)
    return {racer.name: racer for racer in racers}


def test_peers_take_turns_on_the_same_fresh_gradients(log):
    racers = raced(recorder("a"), recorder("b"), recorder("c"), rounds=6)
    turns = measure.WARM_UP + 6
    assert [name for name, _ in log[: 3 * turns]] == ["a", "b", "c"] * turns
    rounds = [{total for _, total in log[3 * i : 3 * i + 3]} for i in range(turns)]
    assert all(len(totals) == 1 for totals in rounds)
    assert len(set.union(*rounds)) == turns
    assert [len(racers[name].samples) for name in "abc"] == [6, 6, 6]
    assert len(racers[peers.COPY].samples) == 6


def test_a_race_without_time_still_has_quartiles(log):
    assert len(raced(recorder("a"), rounds=100, seconds=0.0)["a"].samples) == measure.LEAST_ROUNDS


def test_who_is_missing_or_fails_is_listed_and_the_others_go_on(log):
    absent = Peer("absent", peers.imported("no_such_package", "Adam"))
    refusing = Peer("refusing", peers.ours("cuda"))
    racers = raced(absent, recorder("late", fails=6), refusing, recorder("good"))
    outcomes = {name: run.outcome(racers[name], racers[name].peer) for name in racers}
    assert {name: o["status"] for name, o in outcomes.items() if name not in (peers.COPY, peers.IN_PLACE)} == {
        "absent": "missing", "late": "failed", "refusing": "failed", "good": "ok",
    }  # fmt: skip
    assert outcomes["late"]["reason"] == "RuntimeError: step 6"
    assert "no_such_package" in outcomes["absent"]["reason"]
    assert "ms" not in outcomes["late"]
    assert outcomes["good"]["rounds"] == 5


DRAWN = torch.arange(1.0, 7.0).view(2, 3)


def test_one_random_tensor_makes_four_gradients_that_are_new():
    made = [gradients.drawn(DRAWN, k) for k in range(4)]
    reversed_ = torch.arange(6.0, 0.0, -1).view(2, 3)
    assert all(map(torch.equal, made, (DRAWN, reversed_, -DRAWN, -reversed_)))
    assert len({g.data_ptr() for g in (DRAWN, *made)}) == 5


def test_gradients_without_a_value_have_one_at_first():
    first, later = (gradients.zero(DRAWN.clone(), first) for first in (True, False))
    assert first.count_nonzero() == 1
    assert later.count_nonzero() == 0


class Counter(Recorder):
    """Moves d in the steps listed, of which the first is 1."""

    corrections = 0

    def step(self):
        super().step()
        self.corrections += self.steps in self.moves


def counter(*moves, **options):
    def make(params):
        optimizer = Counter(params, "a")
        optimizer.moves = moves
        return optimizer

    return Peer("a", make, **options)


def test_a_turn_in_which_d_moved_is_left_out_and_counted(log):
    racer = raced(counter(measure.WARM_UP, measure.WARM_UP + 2), rounds=7)["a"]
    row = run.outcome(racer, racer.peer)
    assert (row["status"], row["moves"], row["rounds"]) == ("ok", 1, 6)
    assert row["reason"] == "1 of 7 turns left out: d moved in 1"


def test_without_enough_turns_in_which_d_rested_a_peer_has_failed(log):
    row = run.outcome(racer := raced(counter(*range(99)), rounds=7)["a"], racer.peer)
    assert (row["status"], row["moves"], row["reason"]) == ("failed", 7, "7 of 7 turns left out: d moved in 7")
    assert "ms" not in row


def test_where_d_is_to_move_the_turns_in_which_it_rested_are_left_out(log):
    peer = counter(*range(measure.WARM_UP + 2, 99), gradients=gradients.positive)
    row = run.outcome(racer := raced(peer, rounds=7)["a"], peer)
    assert (row["status"], row["moves"], row["rounds"]) == ("ok", 6, 6)
    assert racer.reason == "1 of 7 turns left out: d moved in 6"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_d_rests_in_the_turns_of_all_peers_of_ours_but_those_that_are_to_move_it(monkeypatch, dtype):
    monkeypatch.setattr(measure, "extra_bytes", lambda step, device: 0)
    own = [p for p in peers.own(CPU, dtype) if p.policies]
    # Of fewer elements, sampled, the random roundings of 16 bits move d now and then; of so many only with the random
    # numbers of some versions of torch.
    halves = dtype.itemsize == 2
    if halves and not torch.__version__.startswith("2.13."):
        own = [p for p in own if "slice_p" not in p.name]
    found = Race([(1 << (20 if halves else 14),)], own, CPU, dtype, 1 << 10).run(5, 60.0)[2:]
    assert {r.name: (r.status, r.moves, len(r.samples)) for r in found} == {
        peer.name: ("ok", 5 if "d moves" in peer.name else 0, 5) for peer in own
    }


def test_what_cannot_be_counted_is_said_and_the_times_stay(log, monkeypatch):
    def refused(step, device):
        raise RuntimeError("no permission to profile")

    monkeypatch.setattr(measure, "extra_bytes", refused)
    racer = raced(recorder("a"))["a"]
    row = run.outcome(racer, racer.peer)
    assert (row["status"], row["reason"]) == ("ok", "no extra_bytes: RuntimeError: no permission to profile")
    assert row["ms"] > 0
    assert row["state_bytes"] == 0
    assert "extra_bytes" not in row


def test_every_heat_has_the_anchor_and_fits():
    everybody = peers.table(CPU)
    (anchor,) = (peer for peer in everybody if peer.name == ANCHOR)
    groups, rejected = heats.distribute(everybody, 100, budget=2000)
    assert not rejected
    assert len(groups) > 1
    assert all(heats.needed(group, 100) <= 2000 and anchor in group for group in groups)
    raced = [peer.name for group in groups for peer in group if peer is not anchor]
    assert sorted(raced) == sorted(peer.name for peer in everybody if peer is not anchor)


@pytest.mark.parametrize(("budget", "fit"), [(499, []), (500, [ANCHOR]), (10**6, "all")])
def test_what_does_not_fit_into_memory_is_rejected(budget, fit):
    everybody = peers.table(CPU)
    groups, rejected = heats.distribute(everybody, 100, budget)
    names = [peer.name for peer in everybody]
    raced = {peer.name for group in groups for peer in group}
    assert raced == set(names if fit == "all" else fit)
    assert raced | {peer.name for peer in rejected} == set(names)


def test_too_many_tensors_are_listed_and_take_no_place_in_a_heat(monkeypatch, tmp_path, log):
    everybody = [recorder(ANCHOR), Peer("limited", recorder("limited").make, most_tensors={"cpu": 49})]
    monkeypatch.setattr(run, "table", lambda device, dtype: everybody)
    run.main(["--quick", "--workload=50 x", f"--csv={tmp_path / 'a.csv'}"])
    found = {row["peer"]: (row["status"], row["reason"]) for row in rows.read(tmp_path / "a.csv")}
    assert found["limited"] == ("not run", "not on more than 49 tensors: it would take minutes")
    assert found[ANCHOR] == ("ok", "")
    assert {name for name, _ in log} == {ANCHOR}


def test_bandwidth_counts_what_is_read_and_what_is_written():
    racers = [measure.Racer(name, samples=[measure.Sample(ms)]) for name, ms in ((peers.COPY, 1), (peers.IN_PLACE, 2))]
    assert run.bandwidths(racers, 10**6) == {"copy_gb_s": 8, "in_place_gb_s": 4}


def test_a_workload_without_room_is_listed(monkeypatch, tmp_path):
    monkeypatch.setattr(heats, "free_bytes", lambda device: 0)
    run.main(["--quick", "--workload=50 x", f"--csv={tmp_path / 'a.csv'}"])
    assert {row["status"] for row in rows.read(tmp_path / "a.csv")} == {"not run"}


@pytest.mark.parametrize(("slice_p", "expected"), [(1, 16.0), (10, 8.8)])
def test_state_bytes(slice_p, expected):
    params = [nn.Parameter(torch.randn(1000)) for _ in range(3)]
    optimizer = Prodigy(params, slice_p=slice_p)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert counts.state_bytes(optimizer) / 3000 == expected


def test_a_storage_that_two_states_share_is_counted_once():
    shared = torch.zeros(10)
    optimizer = SimpleNamespace(state={0: {"a": shared, "b": [shared[:5], torch.zeros(1)]}, 1: {"k": 3}})
    assert counts.state_bytes(optimizer) == 44
    optimizer.state[2] = {"m": SimpleNamespace(codes=torch.zeros(8, dtype=torch.int8), scales=torch.zeros(1).half())}
    assert counts.state_bytes(optimizer) == 44 + 8 + 2


def test_extra_memory_is_the_peak_and_not_the_sum():
    def step():
        for _ in range(3):
            torch.ones(1 << 20)

    assert counts.peak([5, -5, 3, 4, -1, -6]) == 7
    assert 4 << 20 <= counts.extra_bytes(step, CPU) < 5 << 20


def test_the_gpu_is_timed_by_its_events(monkeypatch):
    """As far as a machine without one allows: the order of calls."""
    calls = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def elapsed_time(self, last):
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("busy"))
    sample = measure.time_on_cuda(lambda: calls.append("step"), lambda: calls.append("renew"))
    assert calls == ["wait", "step", "wait", "renew", "wait", "busy", "record", "step", "record", "wait"]
    assert sample.ms == 7.0
    assert sample.wall_ms >= 0 <= sample.host_ms


def test_the_step_that_is_timed_on_a_gpu_has_gradients_of_its_own(monkeypatch, log):
    """The same for all peers, and not those of the step before."""

    def timed_twice(step, renew):
        step()
        renew()
        return measure.time_on_cpu(step)

    monkeypatch.setattr(measure, "time_on_cuda", timed_twice)
    race = Race([(30,)], [recorder("a"), recorder("b")], CPU, torch.float32, 1 << 10)
    race.device = SimpleNamespace(type="cuda")
    drawn = [torch.arange(30.0)]
    for racer in race.racers[2:]:
        racer.optimizer.log = seen = []
        racer.optimizer.step = lambda o=racer.optimizer, seen=seen: seen.append(o.params[0].grad)
        racer.give(drawn)
        race._time(drawn, racer)
        assert torch.equal(seen[0], drawn[0])
        assert torch.equal(seen[1], drawn[0].flip(0))


def test_launches_and_synchronisations_of_a_gpu_are_counted(monkeypatch):
    kinds = torch.autograd.DeviceType
    events = [("kernel", kinds.CUDA), ("aten::mul", kinds.CPU), ("Optimizer.step", kinds.CUDA), ("Memcpy", kinds.CUDA)]
    events = [
        SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(elapsed_us=lambda us=us: us))
        for us, (name, kind) in enumerate(events)
    ]
    assert counts.launch_counts(events) == {"launches": 2, "kernel_us": 3}
    assert counts.launch_counts([]) == {"launches": 0, "kernel_us": 0}

    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        notice = (
            "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
        )
        warnings.warn(notice, stacklevel=1)

    assert counts.count_syncs(step) == 2
    assert modes == ["warn", "default"]


def test_memory_and_machine_of_a_gpu_are_read_from_torch(monkeypatch):
    device = torch.device("cuda", 0)
    for name, value in {"reset_peak_memory_stats": None, "synchronize": None, "memory_allocated": 100}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (7, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    assert counts.extra_bytes(lambda: None, device) == 23
    assert heats.free_bytes(device) == 7
    where = rows.environment(device, "full")
    assert where["device"] == "a GPU" != where["cpu"]


def test_on_a_gpu_a_row_has_launches_and_synchronisations(monkeypatch, log):
    monkeypatch.setattr(measure, "count_syncs", lambda step: 3)
    monkeypatch.setattr(measure, "count_launches", lambda step: {"launches": 2, "kernel_us": 9.0})
    race = Race([(3,)], [recorder("a")], CPU, torch.float32, 1 << 10)
    race.device = SimpleNamespace(type="cuda")
    racer = race.racers[-1]
    race._count([torch.ones(3)], racer)
    racer.samples = [measure.Sample(1.0, 4.0, 0.1), measure.Sample(3.0, 6.0, 0.3)]
    row = run.outcome(racer, racer.peer)
    assert {key: row[key] for key in ("launches", "kernel_us", "syncs", "ms", "wall_ms", "host_ms")} == {
        "launches": 2, "kernel_us": 9.0, "syncs": 3, "ms": 2.0, "wall_ms": 5.0, "host_ms": 0.2,
    }  # fmt: skip


def test_training_takes_turns_and_splits_its_time(monkeypatch, log):
    monkeypatch.setattr(train, "SIZES", {"vocabulary": 9, "block": 4, "layers": 1, "heads": 1, "embd": 4})
    trainers = train.train([recorder("a"), recorder("late", fails=2), recorder("b")], CPU, rounds=3)
    assert [len(trainer.train_ms) for trainer in trainers] == [3, 0, 3]
    assert trainers[1].racer.status == "failed"
    assert [name for name, _ in log[-4:]] == ["a", "b", "a", "b"]
