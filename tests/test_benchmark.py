"""The benchmark commands run on a tiny data set and print a row for all that they compare."""

from dataclasses import replace

import pytest
from conftest import fails, make_mvtec, run, succeeds

from tests import benchmark


@pytest.fixture
def quick(monkeypatch):
    """The default at 64 px with a narrow field and four steps."""
    small = replace(benchmark.Recipe(), image_size=64, base=8, steps=4, batch=32)
    monkeypatch.setattr(benchmark, "Recipe", lambda: small)
    monkeypatch.setattr(benchmark, "USUAL", replace(benchmark.USUAL, image_size=64))


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


def test_ablation_has_the_default_and_every_change(tmp_path, quick, monkeypatch):
    changes = ({}, {"calibrate": False}, {"strength": 0.0})
    monkeypatch.setattr(benchmark, "ABLATION", changes)
    data = make_mvtec(tmp_path / "d")
    result = succeeds(run("benchmark.py", "ablation", "--data", data, "--seeds", 0))
    for name in ("the default", "calibrate=False", "strength=0.0"):
        assert result.stdout.count(name) == 1


def test_benchmarks_say_what_is_missing(tmp_path):
    fails(run("benchmark.py", "compare"), "--data")
    fails(run("benchmark.py", "compare", "--data", tmp_path / "none"), "none")
