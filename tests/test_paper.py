"""bench/paper: rows that survive being killed, runs, verdicts from rows, docs/paper.md; no data is needed."""

import itertools
import math
from types import SimpleNamespace

import benchmarks  # noqa: F401  # puts bench/ on the path
import numpy as np
import pytest
import torch
from paper import convex, data, experiments, report, run, store
from paper.experiments import beta3, figure1, reset, weights
from paper.store import Store

WHERE = dict.fromkeys(store.ENVIRONMENT, "x") | {"seconds": 1.5}


def new(path, keys=("set", "D"), numbers=("accuracy", "curve")):
    return Store(path, keys, numbers)


def fill(own, *sets):
    for name in sets:
        own.append({"set": name, "D": 0.1, "accuracy": 0.25, "curve": [1.0, 0.5], **WHERE})


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "a.csv"
    own = new(path)
    fill(own, "iris", "wine")
    again = new(path)
    assert own.done({"set": "wine", "D": 0.1}) and own.rows == again.rows
    assert again.rows == [
        {"set": n, "D": 0.1, "accuracy": 0.25, "curve": (1.0, 0.5), **WHERE} for n in ("iris", "wine")
    ]
    assert again.done({"set": "wine", "D": 0.1})
    assert not again.done({"set": "wine", "D": 0.2}) and not again.done({"set": "dna", "D": 0.1})


def test_a_row_that_was_cut_off_is_done_again(tmp_path):
    path = tmp_path / "a.csv"
    fill(new(path), "iris", "wine")
    path.write_text(path.read_text()[:-5])
    again = new(path)
    assert again.done({"set": "iris", "D": 0.1}) and not again.done({"set": "wine", "D": 0.1})
    fill(again, "wine")
    assert [row["set"] for row in new(path).rows] == ["iris", "wine"]
    path.write_text("set,D,accu")  # not even the header
    fill(new(path), "dna")
    assert [row["set"] for row in new(path).rows] == ["dna"]


def test_a_commit_is_no_number(tmp_path):
    own = new(tmp_path / "a.csv")
    own.append({"set": "iris", "D": 1, "accuracy": 1, "curve": [], **WHERE, "commit": "625e311"})
    assert own.rows[0]["commit"] == new(own.path).rows[0]["commit"] == "625e311"


def test_other_columns_are_refused(tmp_path):
    path = tmp_path / "a.csv"
    fill(new(path), "iris")
    before = path.read_text()
    with pytest.raises(ValueError, match=r"a\.csv has other columns .* remove it"):
        new(path, numbers=("loss",))
    with pytest.raises(ValueError, match=r"a\.csv has columns"):
        new(path).append({"set": "iris"})
    assert path.read_text() == before


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    """An experiment of three runs; `did` are those that were done."""
    module = SimpleNamespace(
        __doc__="A fake.", PART="convex", PACKAGES=("numpy",), KEYS=("seed",), NUMBERS=("y",), did=[]
    )

    def once(key):
        module.did.append(key["seed"])
        if key["seed"] in module.failing:
            raise RuntimeError("no power")
        return {"y": key["seed"] ** 2}

    module.failing, module.run = set(), once
    module.runs = lambda full: ({"seed": seed} for seed in range(5 if full else 3))
    module.plot = lambda rows: {}
    module.tables = lambda rows: {"squares": [["y"], *([str(row["y"])] for row in rows)]}
    module.verdicts = lambda rows: [report.Verdict("they grow", f"{len(rows)} rows", None)]
    monkeypatch.setattr(experiments, "names", lambda: ["fake"])
    monkeypatch.setattr(experiments, "load", lambda name: module)
    return module


def test_what_was_done_is_not_done_again(fake, tmp_path, capsys):
    argv = ["fake", "--jobs=1", f"--out={tmp_path}"]
    fake.failing = {1}
    with pytest.raises(RuntimeError, match="no power"):
        run.main(argv)
    fake.failing = set()
    run.main(argv)
    assert fake.did == [0, 1, 1, 2]
    run.main([*argv, "--full"])
    assert fake.did == [0, 1, 1, 2, 3, 4]
    rows = Store(tmp_path / "fake.csv", fake.KEYS, fake.NUMBERS).rows
    assert [(row["seed"], row["y"]) for row in rows] == [(seed, seed**2) for seed in range(5)]
    assert all(row["machine"] and row["seconds"] >= 0 for row in rows)
    shown = capsys.readouterr().out
    assert "squares" in shown and "they grow" in shown and "in part" in shown and "2 runs in" in shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["figure7"], "no experiment 'figure7': there are fake, convex, networks"),
        (["--jobs=0"], "--jobs must be at least 1"),
        (["fake"], "no_such_package, which has the data, is not installed: make .venv/paper"),
    ],
)
def test_what_cannot_be_run_is_one_line(fake, argv, message, capsys):
    fake.PACKAGES = ("no_such_package",) if argv == ["fake"] else ()
    with pytest.raises(SystemExit) as stopped:
        run.parse_arguments(argv)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


def test_without_a_name_it_is_the_convex_part(fake, tmp_path):
    assert run.parse_arguments([f"--out={tmp_path}"]).names == ["fake"]
    fake.PART = "networks"
    assert run.parse_arguments([f"--out={tmp_path}"]).names == []
    assert run.parse_arguments(["networks", f"--out={tmp_path}"]).names == ["fake"]


@pytest.mark.slow
def test_runs_in_processes_of_their_own():
    keys = [{"problem": "sums", "beta2": 0.9, "beta3": beta3.ROOT, "seed": seed} for seed in range(3)]
    found = list(run.outcomes([("beta3", key) for key in keys], jobs=2))
    assert sorted(row["seed"] for _, row in found) == [0, 1, 2]
    assert all(name == "beta3" and row["error"] < 1e-12 and row["seconds"] > 0 for name, row in found)


@pytest.mark.parametrize("name", experiments.names())
def test_an_experiment_is_complete(name):
    """Its runs have its keys, each is there once, and `full` leaves nothing out but what it does larger."""
    module = experiments.load(name)
    assert module.PART in experiments.PARTS and module.__doc__.splitlines()[0]
    for full in (False, True):
        keys = [tuple(key[column] for column in module.KEYS) for key in module.runs(full)]
        assert keys and len(set(keys)) == len(keys)
        assert all(set(key) == set(module.KEYS) for key in module.runs(full))


# -- the convex runs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def made_up(monkeypatch):
    """Three classes of 20 rows in two dimensions, as a data set `iris`."""
    draw = np.random.default_rng(3)
    labels = np.repeat(["a", "b", "c"], 20)
    x = draw.normal(size=(60, 2)) + np.repeat([[0, 0], [1, 0], [0, 1]], 20, axis=0)
    monkeypatch.setitem(data.READERS, "iris", lambda: (x, labels))
    monkeypatch.setitem(data.SIZES, "iris", (60, 3))
    data.convex_set.cache_clear()
    yield x, np.repeat([0, 1, 2], 20)
    data.convex_set.cache_clear()


def test_a_data_set_is_scaled_and_sampled(made_up):
    x, y = data.convex_set("iris", 60)
    raw, labels = made_up
    assert x.dtype == torch.float64 and x.shape == (60, 3) and y.tolist() == labels.tolist()
    assert (x[:, 2] == 1).all()
    wanted = 2 * (raw - raw.min(0)) / np.ptp(raw, 0) - 1
    assert np.allclose(x[:, :2], wanted)
    part, own = data.convex_set("iris", 7)
    assert len(part) == len(own) == 7
    for row, label in zip(part, own, strict=True):
        assert ((x == row).all(1) & (y == label)).any()


def test_a_run_is_that_of_the_formulas(made_up, monkeypatch):
    """Algorithm 1 in NumPy, with the subgradient written out."""
    monkeypatch.setattr(convex, "STEPS", 100)
    monkeypatch.setattr(convex, "EVERY", 5)
    points = (0, 62, 64, 66, 68, 70, 75, 80, 100)  # d has grown by then
    monkeypatch.setattr(convex, "POINTS", points)
    found = figure1.run({"set": "iris", "rows": 60, "method": "Prodigy GD", "seed": 5})
    x, y = (each.numpy() for each in data.convex_set("iris", 60))
    own, start = np.eye(3)[y], convex.start(3, 3, 5).numpy()
    w, d, squares, inner, total, mean, accuracies = start.copy(), 1e-6, 0.0, 0.0, 0.0, 0 * start, {}
    for k in range(101):
        average = start + mean / total if k else start
        accuracies[k] = ((x @ average.T).argmax(1) == y).mean()
        scores = x @ w.T
        wrong = ((1 - scores[own == 1][:, None] + scores > 0) & (own == 0)).astype(float)
        g = (wrong - wrong.sum(1, keepdims=True) * own).T @ x / (60 * 3)
        last, squares = d, squares + d**2 * (g**2).sum()
        eta = d**2 / math.sqrt(squares)
        inner, total, mean = inner + eta * (g * (start - w)).sum(), total + eta, mean + eta * (w - start)
        w = w - eta * g
        d = max(d, inner / np.linalg.norm(w - start))
    assert found["d"] == pytest.approx(last, rel=1e-6)
    assert found["accuracy"] == pytest.approx(accuracies[100])
    assert found["area"] == pytest.approx(np.mean([accuracies[k] for k in range(5, 101, 5)]))
    assert found["accuracies"] == pytest.approx([100 * accuracies[k] for k in points], abs=0.051)


def test_the_nearest_minimiser(made_up):
    """Of the made-up set: at the minimum, and nothing nearer is; against a subgradient method with many steps."""
    pytest.importorskip("scipy")
    from paper import exact

    exact.multi_margin.cache_clear()
    minimum, start = exact.multi_margin("iris"), convex.start(3, 3, 0)
    exact.multi_margin.cache_clear()
    x, y = data.convex_set("iris", 60)
    loss = lambda w: torch.nn.functional.multi_margin_loss(x @ w.T, y)  # noqa: E731
    nearest = exact.nearest(minimum, start)
    assert loss(nearest).item() == pytest.approx(minimum.loss, abs=1e-12)
    assert all(loss(nearest + 1e-3 * torch.randn_like(nearest)) >= minimum.loss for _ in range(20))
    for _ in range(20):  # other minimisers, nearest to other points
        other = exact.nearest(minimum, torch.randn_like(start) * 9)
        assert loss(other).item() == pytest.approx(minimum.loss, abs=1e-12)
        # The projection onto a convex set: at an obtuse angle to all of it.
        assert ((start - nearest) * (other - nearest)).sum() <= 1e-8
    a, b = torch.randn(30, 1).double(), torch.randn(30).double()
    best = min((a[:, 0] * (b[i] / a[i, 0]) - b).abs().mean().item() for i in range(30))
    assert exact.absolute_deviations(a, b) == pytest.approx(best)


# -- verdicts and pages ------------------------------------------------------------------------------------------------


def figure1_rows(area, d=8.0, D=10.0, sets=tuple(data.SIZES)):
    """Rows of two starts in which each method has the given area; others have 0.5."""
    rows = []
    for name, method, seed in itertools.product(sets, figure1.METHODS, range(2)):
        own = area.get(method, 0.5) + 0.01 * seed
        curves = {"accuracies": (50.0,) * len(convex.POINTS), "ds": (d,) * len(convex.POINTS)}
        rows.append({"set": name, "rows": 99, "method": method, "seed": seed, "accuracy": own, "area": own, "loss": 0.1,
                     "d": d, **curves, **WHERE})  # fmt: skip
    solved = {"rows": 99, "method": figure1.SOLUTION, "seed": 0, "accuracy": 1.0, "area": "", "loss": 0.1, "d": D}
    known = [name for name in data.SOLVED if name in sets]
    return rows + [{"set": name, **solved, "accuracies": "", "ds": "", **WHERE} for name in known]


def holds(found):
    return [verdict.holds for verdict in found]


def test_the_verdicts_of_figure_1_are_made_of_rows():
    best = {"Prodigy GD": 0.9, "Prodigy DA": 0.8, "resetting": 0.7}
    assert holds(figure1.verdicts(figure1_rows(best))) == [True, True, True, True, True, True]
    assert holds(figure1.verdicts(figure1_rows({}, d=3.0))) == [False] * 6
    assert holds(figure1.verdicts(figure1_rows({"Prodigy GD": 0.6}, d=8.0, D=30.0))) == [
        None,
        False,
        None,
        True,
        True,
        False,
    ]
    worse = figure1_rows(best, sets=list(data.SIZES)[:3]) + figure1_rows({}, sets=list(data.SIZES)[3:])
    claim = figure1.verdicts(worse)[0]
    assert claim.holds is False and "on 3 of 12" in claim.seen


def test_shown_are_the_most_rows_and_the_best_of_adagrad():
    sampled = [{**row, "rows": 9, "accuracy": 1.0} for row in figure1_rows({}, sets=("letter",))]
    rows = figure1_rows({f"{figure1.ADAGRAD} 30": 0.8}, sets=("letter",)) + sampled
    own = figure1.shown(rows)["letter"]
    assert set(own) == set(figure1.SHOWN)
    assert {row["rows"] for row in own["DoG"]} == {99}
    assert {row["method"] for row in own[figure1.ADAGRAD]} == {f"{figure1.ADAGRAD} 30"}


def test_the_other_verdicts_are_made_of_rows():
    blank = {"problem": "line", "seed": 0, "accuracy": "", "area": ""}
    line = [{**blank, "threshold": t, "steps_per_doubling": s, "resets": n}
            for t, s, n in ((1.8, 10.5, 9), (2, 10.7, 8), (20, "", 1), (22, "", 0))]  # fmt: skip
    assert holds(reset.verdicts(line)) == [True, True]
    assert holds(reset.verdicts([*line[:1], {**line[1], "steps_per_doubling": 12.0}, *line[2:]])) == [False, True]
    assert holds(reset.verdicts([*line[:3], {**line[3], "resets": 1}])) == [True, False]

    gaps = {weights.UNIFORM: 1.0, weights.POLYNOMIAL: 0.5, weights.EXPONENTIAL: 0.5, weights.FALLING: 2.0}
    rows = [{"problem": p, "weights": w, "seed": s, "gap": (s + 1) * gaps.get(w, 1.0), "d": 1.0}
            for p in weights.PROBLEMS for w in weights.WEIGHTS for s in range(2)]  # fmt: skip
    assert weights.relative(rows, "gap")["iris"][weights.POLYNOMIAL] == pytest.approx(0.5)
    assert holds(weights.verdicts(rows)) == [True, True, False]

    keys = itertools.product(("sums", "mnist"), beta3.BETA2, (beta3.ROOT, beta3.SAME), range(3))
    rows = [{"problem": p, "beta2": b2, "beta3": b3, "seed": s, "error": 1e-15 if b3 == beta3.ROOT else 1e-3,
             "accuracy": 0.9 + 0.01 * s, "loss": 0.3, "d": 0.1} for p, b2, b3, s in keys]  # fmt: skip
    assert holds(beta3.verdicts(rows)) == [True, False]
    better = [{**row, "accuracy": row["accuracy"] + 0.05 * (row["beta3"] == beta3.SAME)} for row in rows]
    assert holds(beta3.verdicts(better)) == [True, True]


def test_pictures_and_the_block_of_an_experiment(tmp_path):
    path, other = report.draw("figure1", figure1_rows({}, sets=("iris", "dna")), tmp_path)
    assert path.name == "figure1.png" and other.name == "figure1-d.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    text = report.block("figure1", figure1_rows({}))
    assert "| set | Prodigy GD |" in text and "| claim | seen | holds |" in text
    assert "| d plateaus close to D | Prodigy GD's d / D: iris 0.8" in text


def test_the_page_has_the_figures_of_the_committed_rows():
    text = report.PAGE.read_text()
    assert sorted(found[1] for found in report.MARK.findall(text)) == experiments.names()
    assert report.with_figures(text) == text, "run: make figures"


@pytest.mark.parametrize("name", experiments.names())
def test_committed_rows_are_of_runs_that_there_are(name):
    module, own = experiments.load(name), report.store_of(name, report.COMMITTED)
    known = {own.identity(key) for full in (False, True) for key in module.runs(full)}
    there = {own.identity(row) for row in own.rows}
    assert {own.identity(key) for key in module.runs(True)} <= there <= known
    assert {row["commit"] for row in own.rows if "dirty" in str(row["commit"])} == set()
    pictures = list(report.COMMITTED.glob(f"{name}*.png"))
    assert pictures and all(path.stat().st_size <= 150_000 for path in pictures)
