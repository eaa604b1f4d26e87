"""The benchmark commands run on a tiny data set and print a row for all that they compare."""

from dataclasses import replace

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
OF_RHO = ("rho=-0.5", "rho=0.25", "rho=0.5", "rho=0.9", "rFM", "OT-CFM")


@pytest.mark.parametrize(
    "what, trained, others",
    [
        ("compare", OF_COMPARE, (*benchmark.UNTRAINED, "PaDiM", "PaDiM, 256 px")),
        ("rho", OF_RHO, ()),
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
    monkeypatch.setattr(benchmark, "ABLATION", ({}, {"time": 0.0}, {"rho": 0.0}))
    data = make_mvtec(tmp_path / "d", ("bolt", "nut"))
    result = succeeds(run("benchmark.py", "ablation", "--data", data, "--seeds", 0))
    by_category, chosen = result.stdout.split("left_out")
    for name in ("the default", "time=0.0", "rho=0.0"):
        assert by_category.count(name) == 2
    assert [line.split()[0] for line in chosen.splitlines()[1:]] == ["bolt", "nut", "mean"]


def test_one_set_is_left_out_of_the_choice():
    """ "a" is best on x alone, "b" on y and z: z and y are measured by what the others prefer."""
    merits = {"x": (9, 1), "y": (2, 3), "z": (0, 7)}
    measured = {
        (c, name): {"image_auroc": m, "pixel_auroc": 0.0, "aupro": m}
        for c, both in merits.items()
        for name, m in zip("ab", both, strict=True)
    }
    rows = benchmark.leave_one_out([*"xyz"], [*"ab"], measured)
    assert [row["chosen_on_the_others"] for row in rows[:3]] == ["b", "a", "a"]
    assert [row["aupro"] for row in rows] == [1, 2, 0, 1]
    assert benchmark.leave_one_out(["x"], [*"ab"], measured) is None


def test_few_trains_on_other_images_for_each_seed(tmp_path, quick, monkeypatch):
    trained_on = []

    def timed(sample, fit, seed):
        trained_on.append(sample.train[:, 0, 0, 0].tolist())
        return dict.fromkeys(benchmark.METRICS, 50.0)

    monkeypatch.setattr(benchmark, "timed", timed)
    data = make_mvtec(tmp_path / "d")
    result = succeeds(run("benchmark.py", "few", "--data", data, "--images", 3, 4, 1000))
    assert len(result.stdout.splitlines()) == 3
    assert [len(images) for images in trained_on] == [3, 3, 3, 4, 4, 4]
    assert len({tuple(images) for images in trained_on[:3]}) > 1


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_with_nothing_learnt_the_residual_is_that_of_a_field_of_zeros(tmp_path, quick, rho):
    """Its scores are those of a detector whose residual is x_0 - E[x_1 | x_0]."""
    (category,) = benchmark.categories_in([make_mvtec(tmp_path / "d")])
    sample = benchmark.read_sample(category, benchmark.Recipe())
    score, _, normal_scores = benchmark.fit_untrained(sample, 0, rho)
    detector = benchmark.Detector(sample.recipe)
    detector.fit_whitening(sample.train)

    def residual(features):
        x_0 = detector.normalise(features)
        return x_0 + rho * x_0.shape[1] ** 0.5 * x_0 / x_0.norm(dim=1, keepdim=True)

    r = residual(sample.train).half()
    detector.gaussian.fit(r)
    left_out = detector.gaussian.leave_one_out(r)
    assert torch.allclose(normal_scores, benchmark.wtflow.map_and_score(left_out)[1], rtol=1e-3)
    square = detector.gaussian.squared_distance(residual(sample.test))
    maps = benchmark.wtflow.map_and_score(square)[0]
    assert torch.allclose(score(sample.test)[0], maps, rtol=1e-3)


@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.5])
def test_rows_of_rho_have_one_ratio_of_noise_to_signal_on_the_shell(rho):
    t = benchmark.time_at(1.5, rho)
    x_0 = torch.full((1, 4), 1.0, dtype=torch.float64)  # |x_0| = sqrt(d)
    mean = benchmark.wtflow.conditional_mean(x_0, rho)
    signal = benchmark.wtflow.path(x_0, mean, torch.tensor([t]))[0, 0]
    assert t * (1 - rho**2) ** 0.5 / signal == pytest.approx(1.5)


@pytest.fixture
def once(monkeypatch):
    """Times are of one call, of one image."""

    def milliseconds(f, device, repeats=1):
        f()
        return 1.0, 0.0

    monkeypatch.setattr(benchmark, "milliseconds", milliseconds)
    monkeypatch.setattr(benchmark, "BATCHES", (1,))
    monkeypatch.setattr(benchmark, "EFFICIENT_AD", ("EfficientAD-S",))


def test_peers_have_a_row_each(quick, once, capsys):
    benchmark.peers(torch.device("cpu"), n=4)
    lines = capsys.readouterr().out.splitlines()
    for name in ("WT-Flow ", "v = 0", *benchmark.OTHERS, *benchmark.EFFICIENT_AD):
        assert sum(line.startswith(name) for line in lines) >= 1
    assert lines[0].split()[-1] == "ms_per_image_batch_1"


def test_efficient_ad_has_the_shapes_of_its_paper():
    x = torch.zeros(1, 3, 256, 256, dtype=torch.uint8)
    net = benchmark.EfficientAD("EfficientAD-S")
    for part in (net.teacher, benchmark.pdn_medium(384), net.autoencoder):
        assert part(x.float()).shape == (1, 384, 56, 56)
    y, score = net(x)
    assert y.shape == (1, 256, 256) and score == y.max()


def test_files_are_timed_from_reading_to_the_verdict(quick, once, capsys):
    benchmark.files(torch.device("cpu"), n=3, side=64)
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["file", "read_ms", "score_ms", "folder_ms"] and len(rows) == 4


def test_memory_is_that_of_the_two_commands(capsys):
    benchmark.main(["memory", "--images", "2"])
    images, train, score = capsys.readouterr().out.split()[-3:]
    assert images == "2" and all(200 < float(mib) < 4000 for mib in (train, score))  # torch has 200


def test_benchmarks_say_what_is_missing(tmp_path):
    fails(run("benchmark.py", "compare"), "--data")
    fails(run("benchmark.py", "compare", "--data", tmp_path / "none"), "none")
