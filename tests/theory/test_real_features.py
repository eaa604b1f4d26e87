"""R: theory/real_features.py, on features of which all is known, and the command on made images."""

import numpy as np
import pytest
import torch
from claims import rng
from conftest import make_mvtec
from scipy.stats import gumbel_r

import evaluate
from theory import __main__, normal, real_features
from theory.real_features import TIMES


def known(x):
    """The Measured of features x (n, d), and good scores of tail index 20."""
    scores = np.exp(gumbel_r.ppf((np.arange(200) + 0.5) / 200, 0.3, 1 / 20))
    return real_features.Measured("a", x.float(), x.float(), scores, {0.6: (0.25, 0.9)})


def rows(measured):
    return {row.what.removeprefix("a: "): row for row in real_features.table(measured)}


def test_R_gaussian_features_are_as_predicted():
    """In 5 % for 6,000 points in 40 dimensions: covariances have a relative error of d / n."""
    for what, row in rows(known(normal(rng(0), 6000, 40))).items():
        if "width" in what or "index" in what or "r_t" in what:
            continue
        slack = 0.05 * row.predicted if row.se == 0 else 7 * row.se
        assert abs(row.measured - row.predicted) <= slack, (what, row)


def test_R_measures_of_other_features():
    """Two axes of widths 1 and 3, five narrow ones, Laplace, positions of two scales: by hand."""
    z = normal(rng(1), 40_000, 7)
    widths = torch.tensor([3, 1, *[0.3] * 5])
    squares = widths.double() ** 2
    expected = (squares.sum() ** 2 / squares.square().sum()).item()
    Q, _ = torch.linalg.qr(normal(rng(4), 7, 7))  # whatever the axes are
    x = z * widths
    assert real_features.effective_dimension(x @ Q) == pytest.approx(expected, rel=0.03)
    assert real_features.thickness(x) == pytest.approx(0.1, rel=0.03)
    uniform = torch.rand(40_000, 3, generator=rng(2))
    laplace = uniform[:, :2].log().diff().abs() * (uniform[:, 2:] < 0.5).double().mul(2).sub(1)
    assert real_features.kurtosis(laplace) == pytest.approx(6, rel=0.2)
    scale = torch.where(torch.arange(10_000) % 2 == 0, 0.8, 1.25).double()[:, None]
    tau, effective = real_features.scale_spread(scale * normal(rng(3), 10_000, 100))
    assert tau == pytest.approx(np.log(1.25), rel=0.03) and effective == pytest.approx(
        100, rel=0.02
    )
    found = rows(known(scale * normal(rng(3), 10_000, 100)))
    for what, row in found.items():
        assert "W9" not in what or row.measured == pytest.approx(row.predicted, rel=0.05)
    assert found["tail index of the image score, light (E2)"].measured == pytest.approx(20)
    assert found["share of E|r_t|^2 not affine in x_0, t=0.6 (B6)"].measured == 0.25
    assert found["  image AUROC of the score of r_t, t=0.6 (O3)"].measured == 0.9


def test_R_share_that_is_not_affine():
    """Of r = B x + b + a e, e independent: a^2 d over all; 5,000 points in 20 dimensions."""
    x, e, B = normal(rng(0), 5000, 20), normal(rng(1), 5000, 20), normal(rng(2), 20, 20)
    for a in (0.0, 1.0, 10.0):
        share = real_features.not_affine(x @ B + 3 + a * e, x)
        expected = a**2 * 20 / (a**2 * 20 + B.square().sum().item())
        assert share == pytest.approx(expected, rel=0.03, abs=1e-9)


SMALL = {"steps": 3, "image_size": 64, "width": 16, "batch": 64}


def test_R_measures_whitened_features_and_controls_with_noise(tmp_path):
    """Moments of noise in 5 standard errors; whitening leaves 1 by SHRINKAGE, here 1 %, at most.

    A few steps of training on defects of white squares: the score separates them at every t.
    """
    _, [category] = evaluate.read_dataset(make_mvtec(tmp_path / "d"))
    one, noise = real_features.measure(category, **SMALL), real_features.control(4, **SMALL)
    n = noise.raw.numel()
    assert abs(noise.raw.mean()) < 5 / n**0.5
    assert abs(noise.raw.square().mean() - 1) < 5 * (2 / n) ** 0.5
    assert one.x_0.mean(0).abs().max() < 0.01 < 0.1 < one.raw.mean(0).abs().max()
    assert one.x_0.var(0).mean() < 1.01
    assert list(one.by_time) == list(noise.by_time) == list(TIMES)
    assert all(np.isnan(area) and 0 < share < 1 for share, area in noise.by_time.values())
    assert all(area == 1 for _, area in one.by_time.values())


def test_R_command_measures_a_data_set(tmp_path, capsys, monkeypatch):
    """Of made images, of a small recipe: a row for each measure, and one figure."""
    measure, control = real_features.measure, real_features.control
    monkeypatch.setattr(real_features, "measure", lambda category: measure(category, **SMALL))
    monkeypatch.setattr(real_features, "control", lambda: control(4, **SMALL))
    __main__.main(["--data", str(make_mvtec(tmp_path / "d")), "--out", str(tmp_path / "f")])
    head, *lines, last = capsys.readouterr().out.splitlines()
    count = 9 + 3 + 2 * len(TIMES)
    assert head.split()[0] == "claim" and len(lines) == 2 * count
    for k, line in enumerate(lines):
        assert line.startswith("R     bolt: " if k < count else "R     noise: ")
    assert last == f"figures: {tmp_path / 'f/real_features.png'}"
