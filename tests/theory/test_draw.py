"""theory/draw.py: every panel of every figure is drawn, and estimates lie on the closed forms."""

from functools import cache

import numpy as np
import pytest
from claims import made_up_results
from matplotlib.colors import same_color

from theory import draw

FIGURES = {
    "singularity": draw.singularity_figure,
    "concentration": draw.concentration_figure,
    "worst_transport": draw.worst_transport_figure,
    "fields": draw.fields_figure,
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
    """The means and AUROCs of the made-up results."""
    axes = figure("learned_field").axes
    (circle,) = (container.lines[0] for container in axes[0].containers)
    assert list(circle.get_ydata()) == [0, 2, 4, 6, 8, 10, 12]
    inward, landing = (line for line in axes[1].lines if line.get_marker() in "os")
    assert list(inward.get_ydata()) == [4, 4] and list(landing.get_ydata()) == [2.5, 2.5]
    assert axes[2].lines[0].get_ydata() == pytest.approx([2.5, 4.5, 6.5, 10.5, 18.5])
    by_radius = [list(line.get_ydata()) for line in axes[3].lines]
    assert by_radius == [[0.875, 1, 1, 1]] * 3
    assert [list(line.get_ydata()) for line in axes[4].lines] == [[0.5] * 4] * 2
    assert [list(line.get_ydata()) for line in axes[5].lines] == [[1, 1], [0.5, 0.5]]
