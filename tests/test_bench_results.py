"""bench/: files of results, tables, README's figures and the regression guard."""

import dataclasses
import importlib.machinery
import importlib.util
import sys
import time
from pathlib import Path

import benchmarks
import compare
import goals
import peers
import plots
import pytest
import report
import rows
import run
import torch
import train
from benchmarks import FUSED, race, row
from peers import ANCHOR, COPY

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CPU = torch.device("cpu")
CPU_CHECK = ["--quick", "--workload=50 x", "--peer=fused(cpu)", f"--peer={ANCHOR}", "--rounds=9"]


def save(path, measured):
    rows.append(path, [{key: "" if value is None else value for key, value in r.items()} for r in measured])
    return path


def test_rows_survive_a_file_which_is_only_appended_to(tmp_path):
    path = save(tmp_path / "new" / "a.csv", race())
    before = path.read_text()
    save(path, race(run="2"))
    assert path.read_text().startswith(before)
    assert rows.read(path) == race() + race(run="2")
    assert rows.latest(rows.read(path)) == race(run="2")


def test_the_last_run_is_that_of_each_workload():
    old, new = race() + race(workload="other"), race(run="2")
    assert rows.latest(old + new) == race(workload="other") + new


def test_a_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("workload,ms\n")
    with pytest.raises(ValueError, match=r"a\.csv has other columns"):
        save(path, race())
    assert path.read_text() == "workload,ms\n"


def test_a_ratio_is_that_of_the_same_race():
    measured = race(fused=10, adamw=8) + race(fused=30, adamw=10, heat=1) + race(fused=1, adamw=1, run="2")
    assert rows.ratio(measured[0], measured, ANCHOR) == 10 / 8
    assert rows.ratio(measured[4], measured, ANCHOR) == 3
    assert rows.ratio(row(run="3"), measured, ANCHOR) is None


def test_the_share_of_a_bandwidth():
    # 40 bytes a parameter in 10 ms.
    measured = row(ms=10.0, bytes=40.0, copy_gb_s=200.0, in_place_gb_s=400.0, parameters=10**8)
    assert rows.share(measured, measured["copy_gb_s"]) == pytest.approx(2)
    assert rows.share(measured, rows.limit_gb_s(measured)) == pytest.approx(1)
    assert rows.share(row(bytes=None), 1.0) is None


def test_a_run_appends_its_rows_and_shows_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "SIZES", {"vocabulary": 9, "block": 4, "layers": 1, "heads": 1, "embd": 4})
    path = tmp_path / "a.csv"
    run.main([*CPU_CHECK, "--workload=demo", "--rounds=2", f"--csv={path}"])
    measured = rows.read(path)
    assert [(r["workload"], r["peer"]) for r in measured] == [
        *(("50 x 100", peer) for peer in (COPY, peers.IN_PLACE, ANCHOR, FUSED)),
        *((run.TRAINING, peer) for peer in (FUSED, ANCHOR)),
    ]
    assert all(r["status"] == "ok" and r["mode"] == "quick" and r["ms_25"] <= r["ms"] <= r["ms_75"] for r in measured)
    assert all(r["copy_gb_s"] > 0 and r["in_place_gb_s"] > 0 for r in measured[:4])
    assert [r["bytes"] for r in measured[2:4]] == [28, 40]
    assert [r["state_bytes"] for r in measured[2:4]] == pytest.approx([8, 16], abs=0.1)
    for r in measured[4:]:
        assert r["tokens_per_s"] == pytest.approx(1e3 * train.BATCH * 4 / (r["train_ms"] + r["ms"]), rel=1e-3)
    shown = capsys.readouterr().out
    assert "50 x 100: 5,000 parameters in 50 tensors" in shown
    assert "tokens/s" in shown
    assert "6 rows appended" in shown


# -- tables and pictures ----------------------------------------------------------------------------------------------
GPU = {"device": "a GPU", "cuda": "13.0", "driver": "580", "wall_ms": 11.0, "host_ms": 0.1, "launches": 2, "syncs": 0}


def test_tables_show_what_is_known_and_who_is_absent():
    missing = row("apex", None, status="missing", reason="no apex")
    text = report.markdown([*race(), *race(**GPU), missing])
    assert "| optimizer | ms | quartiles | to AdamW(fused) |" in text
    assert "| host ms | wall ms | launches | syncs |" in text
    assert "| prodigy_fused(cpu) | 10.000 | 9.8 - 10.2 | 1.25 x |" in text
    assert "- apex: missing: no apex (16 x 4 Mi)" in text


def test_readme_and_docs_have_the_figures_of_the_committed_rows():
    texts = {file: file.read_text() for file in report.WRITTEN}
    marks = [found[1] for text in texts.values() for found in report.MARK.findall(text)]
    assert sorted(marks) == ["cost", "cost", "demo", "gpu", "memory", "model", "policies", "samples"]
    for file, text in texts.items():
        assert report.with_figures(file, report.for_the_record()) == text, "run: make figures"


def test_the_readme_is_written_from_rows():
    text = report.with_figures(README, race(fused=12.34) + race(fused=5.6, **GPU, workload="1 B"))
    assert "| 16 x 4 Mi | 12.3 ms | 8 ms | 40 ms | 1.54 x | 3.2 x |" in text
    assert "| 1 B | 5.6 ms |" in text


def test_the_goals_on_a_gpu_are_shown_as_measured_or_not():
    assert {line[-1] for line in goals.table(race(workload=goals.MANY))} == {"not measured yet"}  # a CPU's
    many = GPU | {"workload": goals.MANY}
    measured = [
        *race(workload=goals.MANY),
        *race(**many | {"device": "an older GPU", "run": "0"}),
        row(ANCHOR, 5.0, heat=1, **many),
        row(goals.OURS, 2.0, **many, kernel_us=13.0),
        row(ANCHOR, 4.0, **many | {"host_ms": 2.0}),
        row("prodigyopt", 500.0, heat=1, **many),
    ]
    shown = {(what, workload): value for what, workload, _, value in goals.table(measured) if "not" not in value}
    assert shown == {
        ("faster than prodigyopt", goals.MANY): "200.0 x",
        ("host time", goals.MANY): "0.100 ms",
        ("host time to AdamW(fused)", goals.MANY): "0.05 x",
        ("launches", goals.MANY): "2",
        ("host synchronisations", goals.MANY): "0",
        ("the update kernel alone", goals.MANY): "13.0 us",
    }


def test_policies_are_compared_with_a_copy_with_adamw_and_with_the_cuda_backend():
    here = GPU | {"workload": goals.POLICY_WORKLOADS["cuda"][0], "dtype": "bfloat16", "parameters": 10**9}
    sampled = "prodigy_fused({}, stochastic, slice_p=11)"
    measured = [
        row(sampled.format("cuda"), 10.0, **here, bytes=40.0, copy_gb_s=5e3),
        row(sampled.format("triton"), 8.0, **here, heat=1),
        *(row(ANCHOR, ms, **here, heat=heat) for heat, ms in ((0, 5.0), (1, 2.0))),
        row(sampled.format("cuda"), 1.0, **here | {"dtype": "float16"}),
    ]
    earlier = [row(sampled.format("cuda"), 1.0, **here | {"workload": goals.BILLION})]
    workload, table = goals.policies(earlier + measured, "cuda")
    lines = {cells[0]: cells[1:] for cells in table}
    assert workload == here["workload"]
    assert goals.policies(earlier, "cuda")[0] == goals.BILLION
    assert lines["bfloat16, stochastic, slice_p=11"] == [
        "22.9",
        "80% (>= 85%)",
        "2.00 x (<= 1.10 x)",
        "0.50 x (>= 0.93 x)",
    ]
    assert lines["bfloat16, stochastic"] == ["32", "- (>= 92%)", "- (<= 1.40 x)", "- (>= 0.93 x)"]
    slow = [row("prodigy_fused(cpu, d moves)", 10.0, workload=(cpu := goals.POLICY_WORKLOADS["cpu"][0]))]
    lines = {cells[0]: cells[1:] for cells in goals.policies([*slow, row(ANCHOR, 4.0, workload=cpu)], "cpu")[1]}
    assert lines["float32, d moves"] == ["56", "2.50 x (<= 1.90 x)"]


@pytest.mark.parametrize("device", goals.POLICY_WORKLOADS)
def test_every_policy_is_a_peer_of_its_dtype(device):
    (workload,) = (w for w in run.WORKLOADS if w.name == goals.POLICY_WORKLOADS[device][0])
    assert workload.policies
    assert workload.cpu == (device == "cpu")
    for policy in goals.POLICIES:
        assert policy.peer("cpu") in [peer.name for peer in peers.own(CPU, getattr(torch, policy.dtype))]


@pytest.mark.parametrize("goal", goals.GOALS, ids=lambda goal: f"{goal.what}, {goal.workload}")
def test_a_goal_is_about_something_that_is_measured(goal):
    assert goal.workload in [workload.name for workload in run.WORKLOADS]


def test_across_heats_prodigyopt_is_compared_through_the_anchor():
    measured = [row(FUSED, 10), row(ANCHOR, 5), row("prodigyopt", 90, heat=1), row(ANCHOR, 9, heat=1)]
    assert "| 10 ms | 5 ms | 90 ms | 2.00 x | 5.0 x |" in report.cost(measured)


def test_pictures(tmp_path):
    scan = [r for n in (20, 24) for r in race(workload=f"scan, {n}", parameters=1 << n, bytes=40.0)]
    training = [{**r, "train_ms": 50.0, "tokens_per_s": 9e3} for r in race(kind="train", workload="GPT")]
    paths = plots.draw([*scan, *race(), *race(workload="b"), *training, *race(**GPU)], tmp_path)
    assert [path.name for path in paths] == [
        "a-machine-sizes.png", "a-machine-ratios.png", "a-machine-training.png", "a-GPU-ratios.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_gpu_check_measures_what_its_goals_are_about(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "WORKLOADS", [dataclasses.replace(w, cpu=True) for w in run.WORKLOADS])
    loader = importlib.machinery.SourceFileLoader("gpu_check", str(benchmarks.BENCH / "gpu_check"))
    check = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_check", loader))
    sys.modules["gpu_check"] = check  # where a dataclass looks itself up
    loader.exec_module(check)
    commands = [command for part in check.parts(tmp_path).values() for command in part.commands]
    found = set()
    for _, script, *arguments in (command for command in commands if command[1:2] == ["bench/run.py"]):
        assert (ROOT / script).exists()
        args = run.parse_arguments([*arguments, "--device=cpu"])
        names = [workload.name for workload in run.WORKLOADS] + [run.TRAINING]
        found |= {(name, args.dtype) for name in names if run.chosen(args.workload, name)}
    assert {(goal.workload, torch.float32) for goal in goals.GOALS} <= found
    assert {(goals.POLICY_WORKLOADS["cuda"][0], getattr(torch, policy.dtype)) for policy in goals.POLICIES} <= found
    machine = {"machine": {"gpu": "a GPU"}, "parts": []}
    assert "| prodigy_fused(cpu) | 10.000 |" in check.summary(machine, save(args.csv, race(**GPU)))


# -- the regression guard ---------------------------------------------------------------------------------------------
def guard(tmp_path, old, new):
    paths = [tmp_path / "old.csv", tmp_path / "new.csv"]
    for path, measured in zip(paths, (old, new), strict=True):
        path.unlink(missing_ok=True)
        save(path, measured)
    return compare.main(list(map(str, paths)))


GUARDED = {
    "the same": (race(), race(run="2"), 0),
    "another, slower machine load": (race(), race(30, 24, 6, 120, run="2"), 0),
    "slower": (race(), race(fused=13, run="2"), 1),
    "faster": (race(), race(fused=5, run="2"), 0),
    "slower within the noise": (race(spread=0.3), race(fused=13, spread=0.3, run="2"), 0),
    "slower by less than the floor": (race(spread=0.001), race(fused=10.3, spread=0.001, run="2"), 0),
    "slower than a small noise": (race(spread=0.01), race(fused=10.8, spread=0.01, run="2"), 1),
    "only AdamW is faster": (race(), race(adamw=5, run="2"), 0),
    "AdamW itself is slower": (race(), race(adamw=12, run="2"), 1),
    "slower in the second heat": (race(heat=1), race(fused=13, heat=1, run="2"), 1),
    "broken": (race(), [*race(run="2")[1:], row(ms=None, run="2", status="failed")], 1),
    "not installed": (race(), [*race(run="2")[:-1], row("prodigyopt", None, run="2", status="missing")], 0),
    "another workload was not run": (race() + race(workload="b"), race(run="2"), 0),
    "without its compiled module": (race(), race(run="2")[1:], 1),
}


@pytest.mark.parametrize(("old", "new", "status"), GUARDED.values(), ids=GUARDED.keys())
def test_the_guard(tmp_path, old, new, status, capsys):
    assert guard(tmp_path, old, new) == status
    out = capsys.readouterr().out
    assert ("SLOWER" in out or "BROKEN" in out) == bool(status)


def test_the_guard_does_not_compare_what_is_not_comparable(tmp_path):
    with pytest.raises(SystemExit):
        guard(tmp_path, race(), race(threads=4))


def test_a_peer_that_is_slowed_down_is_found(tmp_path, monkeypatch, capsys):
    paths = [tmp_path / name for name in ("old.csv", "new.csv")]
    run.main([*CPU_CHECK, f"--csv={paths[0]}"])

    def slowed(peer):
        def make(params):
            optimizer = peer.make(params)
            step = optimizer.step
            optimizer.step = lambda: (time.sleep(0.2), step())
            return optimizer

        return dataclasses.replace(peer, make=make) if peer.name == FUSED else peer

    everybody = run.table
    monkeypatch.setattr(run, "table", lambda device, dtype: list(map(slowed, everybody(device))))
    run.main([*CPU_CHECK, f"--csv={paths[1]}"])
    capsys.readouterr()
    assert compare.main(list(map(str, paths))) == 1
    assert f"SLOWER 50 x 100, float32: {FUSED}" in capsys.readouterr().out
