"""R: theory/real_features.py, on features of which all is known, and the command on made images."""

import numpy as np
import pytest
import torch
from claims import rng
from conftest import make_mvtec
from scipy.stats import gumbel_r

import evaluate
from theory import Row, __main__, normal, real_features


def known(x, v_theta=lambda x, t: torch.zeros_like(x)):
    """The Measured of features x (n, d), and good scores of tail index 20."""
    scores = np.exp(gumbel_r.ppf((np.arange(200) + 0.5) / 200, 0.3, 1 / 20))
    return real_features.Measured("a", x.float(), x.float(), v_theta, scores)


def rows(measured):
    return {row.what.removeprefix("a: "): row for row in real_features.table(measured)}


def test_R_gaussian_features_are_as_predicted():
    """In 5 % for 6,000 points in 40 dimensions: covariances have a relative error of d / n."""
    for what, row in rows(known(normal(rng(0), 6000, 40))).items():
        if "width" in what or "index" in what:
            continue
        slack = 0.05 * row.predicted if row.se == 0 else 7 * row.se
        assert abs(row.measured - row.predicted) <= slack, (what, row)


def test_R_measures_of_other_features():
    """Two axes of widths 1 and 3, five narrow ones, Laplace: by hand. A field that moves half."""
    z = normal(rng(1), 40_000, 7)
    widths = torch.tensor([3, 1, *[0.3] * 5])
    x = z * widths
    squares = widths.double() ** 2
    expected = (squares.sum() ** 2 / squares.square().sum()).item()
    Q, _ = torch.linalg.qr(normal(rng(4), 7, 7))  # whatever the axes are
    assert real_features.effective_dimension(x @ Q) == pytest.approx(expected, rel=0.03)
    assert real_features.thickness(x) == pytest.approx(0.1, rel=0.03)
    uniform = torch.rand(40_000, 3, generator=rng(2))
    laplace = uniform[:, :2].log().diff().abs() * (uniform[:, 2:] < 0.5).double().mul(2).sub(1)
    assert real_features.kurtosis(laplace) == pytest.approx(6, rel=0.2)
    found = rows(known(x, lambda x, t: -0.5 * x))
    assert found["|v(x_0)| / |x_0|, exchangeable (B2)"].measured == pytest.approx(0.5, rel=1e-5)
    correlation = found["rank correlation of |x1_hat|, |x_0| (B2)"].measured
    assert correlation == pytest.approx(1)
    assert found["tail index of the image score, light (E2)"].measured == pytest.approx(20)
    reversed_order = rows(known(x, lambda x, t: x / x.square().sum(1, keepdim=True) - x))
    correlation = reversed_order["rank correlation of |x1_hat|, |x_0| (B2)"].measured
    assert correlation == pytest.approx(-1, abs=1e-3)


SMALL = {"steps": 3, "image_size": 64, "width": 16, "batch": 64}


def test_R_measures_whitened_features_of_rfm_and_controls_with_noise(tmp_path, monkeypatch):
    """Moments of noise in 5 standard errors; whitening leaves 1 by SHRINKAGE, here 1 %, at most."""
    fitted, recipes = real_features.train.fit_detector, []

    def recording(detector, *args):
        recipes.append(detector.recipe)
        return fitted(detector, *args)

    monkeypatch.setattr(real_features.train, "fit_detector", recording)
    _, [category] = evaluate.read_dataset(make_mvtec(tmp_path / "d"))
    one, noise = real_features.measure(category, **SMALL), real_features.control(4, **SMALL)
    assert [recipe.coupling for recipe in recipes] == ["independent", "independent"]
    n = noise.raw.numel()
    assert abs(noise.raw.mean()) < 5 / n**0.5
    assert abs(noise.raw.square().mean() - 1) < 5 * (2 / n) ** 0.5
    assert one.x_0.mean(0).abs().max() < 0.01 < 0.1 < one.raw.mean(0).abs().max()
    assert one.x_0.var(0).mean() < 1.01


def test_R_command_measures_a_data_set(tmp_path, capsys, monkeypatch):
    """Of made images, of a small recipe: a row for each claim and one figure."""
    measure, control = real_features.measure, real_features.control
    monkeypatch.setattr(real_features, "measure", lambda category: measure(category, **SMALL))
    monkeypatch.setattr(real_features, "control", lambda: control(4, **SMALL))
    __main__.main(["--data", str(make_mvtec(tmp_path / "d")), "--out", str(tmp_path / "f")])
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "claim" and len(lines) == 2 * 11
    for k, line in enumerate(lines):
        assert line.startswith("R     bolt: " if k < 11 else "R     noise: ")
    assert last == f"figures: {tmp_path / 'f/real_features.png'}"
    assert isinstance(next(real_features.table(known(normal(rng(3), 50, 4)))), Row)
