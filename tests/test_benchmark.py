"""The benchmark commands run on a tiny data set and print a row for all that they compare."""

from dataclasses import replace

import pytest
import torch
from conftest import fails, make_mvtec, run, succeeds

from tests import benchmark


@pytest.fixture
def quick(monkeypatch):
    """The default at 64 px with a narrow field and four steps."""
    small = replace(benchmark.Recipe(), image_size=64, base=8, steps=4, batch=32)
    monkeypatch.setattr(benchmark, "Recipe", lambda: small)
    monkeypatch.setattr(benchmark, "USUAL", replace(small, aspect=1.0))


def test_compare_has_every_method_with_its_spread(tmp_path, quick):
    data = make_mvtec(tmp_path / "d")
    result = succeeds(run("benchmark.py", "compare", "--data", data, "--seeds", 0, 1))
    lines = result.stdout.splitlines()
    for method in ("WT-Flow", "rFM", "OT-CFM", "PatchCore 1 %", "PatchCore 10 %, 256 px"):
        (line,) = [line for line in lines if f" {method}  " in line]
        assert line.count("+-") == 3
    for method in ("Mahalanobis, no field", "PaDiM", "PaDiM, 256 px"):
        (line,) = [line for line in lines if f" {method}  " in line]
        assert "+-" not in line


def test_ablation_leaves_one_set_out(tmp_path, quick, monkeypatch):
    changes = ({}, {"calibrate": False}, {"strength": 0.0})
    monkeypatch.setattr(benchmark, "ABLATION", changes)
    data = make_mvtec(tmp_path / "d", ("bolt", "nut"))
    result = succeeds(run("benchmark.py", "ablation", "--data", data, "--seeds", 0))
    by_category, chosen = result.stdout.split("left_out")
    for name in ("the default", "calibrate=False", "strength=0.0"):
        assert by_category.count(name) == 2
    assert [line.split()[0] for line in chosen.splitlines()[1:]] == ["bolt", "nut", "mean"]


def test_one_set_is_left_out_of_the_choice():
    """ "a" is best on x alone, "b" on y and z: z and y are judged by what the other two prefer."""
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

    def flows(sample, recipes, seed):
        trained_on.append(sample.train[:, 0, 0, 0].tolist())
        return [dict.fromkeys(benchmark.FIGURES, 50.0)]

    monkeypatch.setattr(benchmark, "flows", flows)
    data = make_mvtec(tmp_path / "d")
    result = succeeds(run("benchmark.py", "few", "--data", data, "--images", 3, 4, 1000))
    assert len(result.stdout.splitlines()) == 3
    assert [len(images) for images in trained_on] == [3, 3, 3, 4, 4, 4]
    assert len({tuple(images) for images in trained_on[:3]}) > 1


def test_strength_has_every_coupling_told_t_or_not(tmp_path, quick):
    data = make_mvtec(tmp_path / "d")
    result = succeeds(run("benchmark.py", "strength", "--data", data, "--seeds", 0))
    assert len(result.stdout.splitlines()) == 1 + 6 * 4
    for name in ("worst 0.97, told t, plain", "OT-CFM, not told t, calibrated"):
        assert result.stdout.count(f" {name}  ") == 1


def test_recipes_that_differ_in_scoring_share_a_training(tmp_path, quick, monkeypatch):
    (category,) = benchmark.categories_in([make_mvtec(tmp_path / "d")])
    recipe = benchmark.Recipe()
    sample = benchmark.read_sample(category, recipe)
    train, trained = benchmark.wtflow.train_fields, []

    def counted(*args):
        trained.append(1)
        train(*args)

    monkeypatch.setattr(benchmark.wtflow, "train_fields", counted)
    recipes = [recipe, replace(recipe, prior=9.0), replace(recipe, t_max=0.5)]
    rows = benchmark.flows(sample, recipes, 0)
    assert len(trained) == 2
    alone = benchmark.flows(sample, recipes[1:2], 0)[0]
    assert all(rows[1][name] == alone[name] for name in benchmark.FIGURES)
    assert rows[0] != rows[1]


def test_peers_are_timed_on_the_same_features(quick, capsys):
    benchmark.peers(torch.device("cpu"), n=4)
    lines = capsys.readouterr().out.splitlines()
    assert "ms_per_image_batch_16" in lines[0] and len(lines) == 1 + 2 + len(benchmark.OTHERS)
    seconds = [[float(number) for number in line.split()[-4:]] for line in lines[1:]]
    assert all(value > 0 for row in seconds for value in row[1:])


def test_memory_is_that_of_the_two_commands(capsys):
    benchmark.main(["memory", "--images", "2"])
    images, train, score = capsys.readouterr().out.split()[-3:]
    assert images == "2" and all(200 < float(mib) < 4000 for mib in (train, score))  # torch has 200


def test_benchmarks_say_what_is_missing(tmp_path):
    fails(run("benchmark.py", "compare"), "--data")
    fails(run("benchmark.py", "compare", "--data", tmp_path / "none"), "none")
