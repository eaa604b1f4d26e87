"""The helpers of theory/, `python -m theory`, and the mechanism of claims.py."""

import numpy as np
import pytest
import torch
from claims import claim, rejects, rng
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

import wtflow
from theory import (
    Row,
    __main__,
    concentration,
    draw,
    exponent,
    learned_field,
    mean_se,
    normal,
    singularity,
    std_se,
    unconditional_field,
    worst_transport,
)


# ---- Estimates --------------------------------------------------------------------------------
def test_mean_standard_deviation_and_exponent_by_hand():
    """No slope in (0, 1, 0) on (-1, 0, 1): residuals of 2/3, one degree of freedom, over 2."""
    deviation = (14 / 3 / 2) ** 0.5  # squares of 1, 2, 4 about their mean, two degrees of freedom
    assert mean_se([1, 2, 4]) == pytest.approx((7 / 3, deviation / 3**0.5))
    assert std_se([1, 2, 4]) == pytest.approx((deviation, deviation / 6**0.5))
    assert exponent([1, 2], [1, 16]) == pytest.approx((4, 0))
    fit = exponent(np.exp([-1, 0, 1]), np.exp([0, 1, 0]))
    assert fit == pytest.approx((0, (2 / 3 / 2) ** 0.5))


@pytest.mark.parametrize("x, y", [([1, -1], [1, 1]), ([1, 2], [1, 0]), ([0, 2], [1, 1])])
def test_no_exponent_of_numbers_that_are_not_positive(x, y):
    with pytest.raises(ValueError, match="positive"):
        exponent(x, y)


def slope(generator):
    x_0 = 0.7 * normal(generator, 300, 4)
    return singularity.fitted_slope(*singularity.pairs(x_0, wtflow.independent, 0.2, generator))


def factor(generator):
    predicted = normal(generator, 300, 3)
    noise = predicted * normal(generator, 300, 3)
    return unconditional_field.slope_on(noise - 2 * predicted, predicted)


def energy(generator):
    x_0 = 0.7 * normal(generator, 300, 4)
    return concentration.energy_from_pairs(x_0, wtflow.independent, generator, nodes=1)


def power(generator):
    x = np.arange(1, 30.0)
    return exponent(x, x * np.exp(0.1 * normal(generator, 29).numpy()))


def signal_to_noise(generator):
    e = torch.tensor([0.6, 0.8], dtype=torch.float64)
    return worst_transport.signal_to_noise(2 * e + normal(generator, 200, 2), e)


@pytest.mark.parametrize("estimate", [slope, factor, energy, power, signal_to_noise])
def test_standard_errors_are_the_spread_over_repetitions(estimate):
    """To 25 %, 5 standard errors of the spread."""
    values, errors = np.transpose([estimate(rng(seed)) for seed in range(200)])
    assert 0.75 < values.std() / errors.mean() < 1.25


# ---- python -m theory -------------------------------------------------------------------------
@pytest.mark.parametrize(
    "row, expected",
    [
        (Row("S1", "constant", 100, 101), ["S1", "constant", "100", "101", "1.0e-02", "0.0e+00"]),
        (Row("W4", "radius", 0, 1.5, 0.2), ["W4", "radius", "0", "1.5", "-", "2.0e-01"]),
        (Row("W6", "area", np.nan, 0.9), ["W6", "area", "nan", "0.9", "-", "0.0e+00"]),
    ],
)
def test_line_of_the_table(row, expected):
    assert __main__.line(row).split() == expected


def test_command_prints_every_table_and_writes_every_figure(monkeypatch, tmp_path, capsys):
    """A row of each module, in their order; no picture is drawn here."""
    for module in (*__main__.CLAIMS, learned_field):
        row = Row("S1", module.__name__, 1, 1)
        monkeypatch.setattr(module, "table", lambda *args, row=row: [row])
    monkeypatch.setattr(learned_field, "run", lambda: (1, 2, 3))
    monkeypatch.setattr(draw, "figures", lambda *args: {f"a{sum(args)}": Figure((1, 1))})
    __main__.main(["--out", str(tmp_path / "new" / "folder")])
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["claim", "what", "predicted"]
    names = [module.__name__ for module in (*__main__.CLAIMS, learned_field)]
    assert [line.split()[1] for line in lines] == names
    path = tmp_path / "new" / "folder" / "a6.png"
    assert last == f"figures: {path}"
    with Image.open(path) as image:
        assert image.size == (80, 80) and image.mode == "P"


# ---- The mechanism of claims.py ---------------------------------------------------------------
@claim(lambda x: x + 1, examples=20, x=st.integers(-5, 5))
def same(formula, x):
    assert formula(x) == x


def test_a_claim_fails_with_a_wrong_formula():
    with pytest.raises(AssertionError):
        same()


def test_rejects_passes_only_if_the_claim_fails():
    """A right formula is reported, and so is one that crashes or is no argument of the claim."""
    test_rejects = rejects(same)
    test_rejects("formula", lambda x: x + 2)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_rejects("formula", lambda x: x)
    with pytest.raises(ZeroDivisionError):
        test_rejects("formula", lambda x: 1 // 0)
    with pytest.raises(AssertionError):
        test_rejects("x", abs)
