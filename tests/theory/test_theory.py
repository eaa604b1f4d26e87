"""The helpers of theory/__init__.py, `python -m theory`, and the mechanism of claims.py."""

import inspect

import numpy as np
import pytest
import torch
from claims import claim, rejects, rng
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image

import theory
from theory import (
    Row,
    __main__,
    blind_field,
    concentration,
    draw,
    learned_field,
    singularity,
    strength,
    worst_transport,
)


def test_mean_and_its_standard_error():
    values = np.array([1.0, 2.0, 4.0])
    expected = (7 / 3, values.std(ddof=1) / 3**0.5)
    assert theory.mean_se(values) == pytest.approx(expected)


def test_standard_deviation_and_its_standard_error():
    """By hand; the spread over repetitions to 20 %, 5 of its own standard errors at 400."""
    std = (14 / 3 / 2) ** 0.5  # squares of 1, 2, 4 about their mean, over two degrees of freedom
    assert theory.std_se([1, 2, 4]) == pytest.approx((std, std / 6**0.5))
    pairs = [theory.std_se(3 * theory.normal(rng(seed), 50)) for seed in range(400)]
    stds, errors = np.transpose(pairs)
    assert abs(stds.mean() - 3) < 0.1
    assert 0.8 < stds.std() / errors.mean() < 1.2


def test_exponent():
    """Exact for a power law; the standard error is the spread over repetitions, to 20 %."""
    x = np.arange(1, 30.0)
    assert theory.exponent(x, 5 * x**-3) == pytest.approx((-3, 0))
    assert theory.exponent([1, 2], [1, 16]) == pytest.approx((4, 0))
    noise = 0.1 * np.random.default_rng(0).normal(size=(400, 29))
    slopes, errors = np.transpose([theory.exponent(x, x * np.exp(z)) for z in noise])
    assert 0.8 < slopes.std() / errors.mean() < 1.2


def test_exponent_of_three_points():
    """No slope in (0, 1, 0) on (-1, 0, 1): residuals of 2/3 by one degree of freedom, over 2."""
    fit = theory.exponent(np.exp([-1, 0, 1]), np.exp([0, 1, 0]))
    assert fit == pytest.approx((0, (2 / 3 / 2) ** 0.5))


@pytest.mark.parametrize("x, y", [([1, -1], [1, 1]), ([1, 2], [1, 0]), ([0, 2], [1, 1])])
def test_exponent_of_no_power_law(x, y):
    with pytest.raises(ValueError, match="positive"):
        theory.exponent(x, y)


def test_normal():
    values = theory.normal(rng(0), 3, 2)
    assert values.shape == (3, 2) and values.dtype == torch.float64


SEEDED = [
    singularity.table,
    concentration.table,
    worst_transport.table,
    strength.table,
    blind_field.table,
    learned_field.experiment,
    learned_field.run,
    draw.singularity_figure,
    draw.concentration_figure,
    draw.worst_transport_figure,
    draw.fields_figure,
    draw.strength_figure,
    draw.blind_field_figure,
]


@pytest.mark.parametrize("function", SEEDED)
def test_seed_0_by_default(function):
    """The one behind the numbers of README.md."""
    assert inspect.signature(function).parameters["seed"].default == 0


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


def test_command(monkeypatch, tmp_path, capsys):
    """`python -m theory --out DIR` prints every row of every module and writes the figures."""
    errors, results = {"errors": 1}, {"results": 2}
    monkeypatch.setattr(learned_field, "run", lambda: (errors, results))
    modules = (*__main__.CLAIMS, learned_field)
    for module in modules:
        given = (errors, results) if module is learned_field else ()
        row = Row("S1", module.__name__, 1, 1)
        monkeypatch.setattr(module, "table", returns_if_given([row], given))
    names = ["singularity", "concentration", "worst_transport", "fields", "strength"]
    names += ["blind_field", "learned_field"]
    for inches, name in enumerate(names, 1):
        given = (errors, results) if name == "learned_field" else ()
        figure = Figure(figsize=(inches, 1))
        monkeypatch.setattr(draw, f"{name}_figure", returns_if_given(figure, given))
    out = tmp_path / "new" / "folder"
    __main__.main(["--out", str(out)])

    head, *lines, last = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["claim", "what", "predicted"]
    assert [line.split()[1] for line in lines] == [module.__name__ for module in modules]
    paths = [out / f"{name}.png" for name in names]
    assert last == "figures: " + ", ".join(map(str, paths))
    for inches, path in enumerate(paths, 1):
        with Image.open(path) as image:
            assert image.size == (80 * inches, 80) and image.mode == "P"


def returns_if_given(result, expected):
    """A function that returns `result` and insists on the arguments `expected`."""

    def function(*given):
        assert given == expected
        return result

    return function


# ---- The mechanism ----------------------------------------------------------------------------
@claim(abs, lambda x: x * x, examples=20, x=st.integers(-5, 5))
def test_claim(size, square, x):
    assert size(x) * size(x) == square(x)


test_claim_rejects = rejects(
    test_claim,
    size={"no size": lambda x: x + 1},
    square={"a cube": lambda x: x**3},
)


def test_rejects_passes_only_if_the_claim_fails():
    """A right formula is reported, and so is one that crashes or has no place in the claim."""
    test_rejects = rejects(test_claim)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_rejects("size", abs)
    with pytest.raises(ZeroDivisionError):
        test_rejects("size", lambda x: 1 // 0)
    with pytest.raises(AssertionError):
        test_rejects("x", abs)


def test_claim_fails_with_a_wrong_formula():
    @claim(lambda x: x + 1, examples=20, x=st.integers(-5, 5))
    def identity(same, x):
        assert same(x) == x

    with pytest.raises(AssertionError):
        identity()
