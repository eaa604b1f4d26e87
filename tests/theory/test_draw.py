"""theory/draw.py: every panel of every figure is drawn, and estimates lie on the closed forms."""

from functools import cache

import numpy as np
import pytest
from claims import made_up_results
from matplotlib.colors import same_color

from theory import draw
from theory.learned_field import MODES

FIGURES = {
    "singularity": draw.singularity_figure,
    "concentration": draw.concentration_figure,
    "worst_transport": draw.worst_transport_figure,
    "fields": draw.fields_figure,
    "strength": draw.strength_figure,
    "blind_field": draw.blind_field_figure,
    "learned_field": lambda: draw.learned_field_figure(*made_up_results()),
}


@cache
def figure(name):
    return FIGURES[name]()


@pytest.mark.parametrize("name", FIGURES)
def test_every_panel(name):
    """Something is drawn in it, and named."""
    for axis in figure(name).axes:
        assert axis.has_data()
        assert axis.get_xlabel() or axis.get_ylabel()


def coordinates(axis, line):
    """x and y of a line as they lie on the page: logarithms on a logarithmic axis."""
    x, y = (np.asarray(values, float) for values in line.get_data())
    x = np.log(x) if axis.get_xscale() == "log" else x
    return x, np.log(y) if axis.get_yscale() == "log" else y


@pytest.mark.parametrize(
    "name, panel, curves, tolerance",
    [
        ("singularity", 0, 3, 0.05),
        ("singularity", 1, 2, 1e-3),
        ("singularity", 2, 4, 1e-3),
        ("concentration", 2, 4, 0.1),
        ("concentration", 3, 3, 0.02),
        ("worst_transport", 0, 4, 0.05),
        ("strength", 2, 3, 0.01),
        ("blind_field", 0, 3, 0.1),
        ("blind_field", 1, 2, 0.1),
        ("blind_field", 2, 3, 0.05),
    ],
)
def test_dots_lie_on_lines(name, panel, curves, tolerance):
    """Estimates on the solid line of their colour; the tolerance is relative beyond 1."""
    axis = figure(name).axes[panel]
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    solid = [line for line in axis.lines if line.get_linestyle() == "-"]
    assert len(dots) == curves
    for estimates in dots:
        colour = estimates.get_color()
        (closed_form,) = (line for line in solid if same_color(line.get_color(), colour))
        x, y = coordinates(axis, estimates)
        predicted = np.interp(x, *coordinates(axis, closed_form))
        assert (abs(y - predicted) <= tolerance * (1 + abs(predicted))).all()


def test_learned_field_panels():
    """The means and AUROCs of the made-up results: from landing 0.5, from the origin 1."""
    axes = figure("learned_field").axes
    (circle,) = (container.lines[0] for container in axes[0].containers)
    assert list(circle.get_ydata()) == [0, 2, 4, 6, 8, 10, 12]
    (inward,) = (line for line in axes[1].lines if line.get_marker() == "o")
    assert list(inward.get_ydata()) == [1, 1]
    told, not_told = (line for line in axes[2].lines if line.get_marker() == "o")
    assert list(told.get_ydata()) == list(not_told.get_ydata()) == [1, 2, 3, 4]
    for axis in axes[3:]:
        lines = [line for line in axis.lines if len(line.get_xdata())]
        dotted = [list(line.get_ydata()) for line in lines if line.get_linestyle() == ":"]
        assert dotted == [[1, 1]] * len(MODES)
        for marker, count in (("o", len(MODES)), ("x", 1)):
            areas = [list(line.get_ydata()) for line in lines if line.get_marker() == marker]
            assert [area for area in areas if area] == [[0.5, 0.5]] * count
