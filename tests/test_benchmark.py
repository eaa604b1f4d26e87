"""The benchmark commands run on a tiny data set and print a row for all that they compare."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import fails, make_mvtec, run, succeeds

from tests import benchmark


@pytest.fixture
def quick(monkeypatch):
    """The default at 64 px with a narrow field and four steps."""
    small = replace(benchmark.Recipe(), image_size=64, width=8, steps=4, batch=32)
    monkeypatch.setattr(benchmark, "Recipe", lambda: small)
    monkeypatch.setattr(benchmark, "USUAL", replace(small, aspect=1.0))


OF_COMPARE = ("WT-Flow", "rFM", "OT-CFM", "PatchCore 1 %", "PatchCore 10 %, 256 px")
OF_RHO = ("rho=-0.5", "rho=0.1", "rho=0.25", "rho=0.5", "rho=0.9", "rFM", "OT-CFM")
OF_SPOILED = [
    f"{n} % spoiled, {how}" for n in (0, 1, 5, 10) for how in ("rank", "tail", "left out")
]


@pytest.mark.parametrize(
    "what, trained, others",
    [
        ("compare", OF_COMPARE, (*benchmark.UNTRAINED, "PaDiM", "PaDiM, 256 px")),
        ("rho", OF_RHO, ()),
        ("spoiled", OF_SPOILED, ()),
    ],
)
def test_every_method_has_a_row_and_what_depends_on_the_seed_its_spread(
    tmp_path, quick, what, trained, others
):
    data = make_mvtec(tmp_path / "d")
    result = succeeds(run("benchmark.py", what, "--data", data, "--seeds", 0, 1))
    for method in (*trained, *others):
        (line,) = [line for line in result.stdout.splitlines() if f" {method}  " in line]
        assert line.count("+-") == 3 * (method in trained)


def test_ablation_leaves_one_set_out(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(benchmark, "ABLATION", ({}, {"time": 0.0}, {"aspect": 1.0}))
    data = make_mvtec(tmp_path / "d", ("bolt", "nut"))
    result = succeeds(run("benchmark.py", "ablation", "--data", data, "--seeds", 0))
    by_category, chosen = result.stdout.split("left_out")
    for name in ("the default", "time=0.0", "aspect=1.0"):
        assert by_category.count(name) == 2
    assert [line.split()[0] for line in chosen.splitlines()[1:]] == ["bolt", "nut", "mean"]


def test_one_set_is_left_out_of_the_choice():
    """ "a" is best on x alone, "b" on y and z: z and y are measured by what the others prefer."""
    merits = {"x": {"a": 9, "b": 1}, "y": {"a": 2, "b": 3}, "z": {"a": 0, "b": 7}}
    metrics = {
        category: {k: dict.fromkeys(benchmark.METRICS, m) for k, m in own.items()}
        for category, own in merits.items()
    }
    rows = benchmark.leave_one_out(metrics)
    assert [row["chosen_on_the_others"] for row in rows[:3]] == ["b", "a", "a"]
    assert [row["aupro"] for row in rows] == [1, 2, 0, 1]


def test_few_trains_on_other_images_for_each_seed(tmp_path, quick, monkeypatch):
    trained_on = []

    def rows_of(sample, fit, seeds):
        trained_on.append(sample.train[:, 0, 0, 0].tolist())
        return [dict.fromkeys(benchmark.METRICS, 50.0)]

    monkeypatch.setattr(benchmark, "rows_of", rows_of)
    data = make_mvtec(tmp_path / "d")
    result = succeeds(run("benchmark.py", "few", "--data", data, "--images", 3, 4, 1000))
    assert len(result.stdout.splitlines()) == 3
    assert [len(images) for images in trained_on] == [3, 3, 3, 4, 4, 4]
    assert len({tuple(images) for images in trained_on[:3]}) > 1


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_with_nothing_learnt_the_residual_is_that_of_a_field_of_zeros(tmp_path, quick, rho):
    """Its scores are those of a detector whose residual is x_0 - E[x_1 | x_0]."""
    make_mvtec(tmp_path / "d")
    (category,) = benchmark.evaluate.read_dataset(tmp_path / "d")[1]
    sample = benchmark.read_sample(category, benchmark.Recipe())
    score, _ = benchmark.fit_untrained(sample, 0, rho)
    detector = score.__self__
    features = (detector.normalise(part) for part in (sample.train, sample.test))
    good, test = (x + rho * x.shape[1] ** 0.5 * x / x.norm(dim=1, keepdim=True) for x in features)
    detector.gaussian.fit(good.half())
    maps, _ = benchmark.wtflow.map_and_score(detector.gaussian.squared_distance(test))
    assert torch.allclose(score(sample.test)[0], maps, rtol=1e-3)


def test_the_coreset_takes_the_row_that_is_farthest_from_those_chosen(monkeypatch):
    """Of 300 rows, 40 of which the pool holds at a time, and each twice."""
    monkeypatch.setattr(benchmark, "POOL", 40)
    rows = torch.randn(300, 3, generator=torch.Generator().manual_seed(0)).repeat(2, 1).half()
    chosen = benchmark.greedy_coreset(rows, 50, 0)
    distance = torch.cdist(rows.double(), rows.double())
    for k in range(1, 50):
        to_nearest = distance[:, chosen[:k]].amin(1)
        assert to_nearest[chosen[k]] > 0.999 * to_nearest.max()
    assert len(benchmark.greedy_coreset(rows, 600, 0)) >= 300


@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.5])
def test_rows_of_rho_have_one_ratio_of_noise_to_signal_on_the_shell(rho):
    t = benchmark.time_at(1.5, rho)
    x_0 = torch.full((1, 4), 1.0, dtype=torch.float64)  # |x_0| = sqrt(d)
    mean = benchmark.wtflow.conditional_mean(x_0, rho)
    signal = benchmark.wtflow.path(x_0, mean, torch.tensor([t]))[0, 0]
    assert t * (1 - rho**2) ** 0.5 / signal == pytest.approx(1.5)


def test_speed_has_a_row_of_each_stage(monkeypatch, capsys):
    once = partial(benchmark.milliseconds, repeats=-2)
    monkeypatch.setattr(benchmark, "milliseconds", once)
    monkeypatch.setattr(benchmark, "BATCHES", (1,))
    monkeypatch.setitem(benchmark.PAPER, "width", 8)
    benchmark.main(["speed", "--device", "cpu"])
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_benchmarks_say_what_is_missing(tmp_path):
    fails(run("benchmark.py", "compare"), "--data")
    fails(run("benchmark.py", "compare", "--data", tmp_path / "none"), "none")
