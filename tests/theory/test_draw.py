"""theory/draw.py: every panel of every figure is drawn, and estimates lie on the closed forms."""

from functools import cache

import numpy as np
import pytest
from claims import run_of_exact_fields
from matplotlib.colors import same_color

from theory import draw
from theory.learned_field import EARLY

ERRORS = {"circle": np.arange(1.0, 15).reshape(7, 2)}
NAMES = ["singularity", "concentration", "worst_transport", "fields", "local_transport"]
NAMES += ["unconditional_field", "one_step", "extremes", "learned_field"]


@cache
def figures():
    return draw.figures(ERRORS, run_of_exact_fields()[1])


def test_figures_are_those_of_the_readme():
    assert list(figures()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_panel_is_drawn_and_named(name):
    for axis in figures()[name].axes:
        assert axis.has_data()
        assert axis.get_xlabel() or axis.get_ylabel()


def lines(axis, **style):
    """Lines of an axis of this marker or line style that hold points."""
    ((kind, value),) = style.items()
    return [
        line
        for line in axis.lines
        if getattr(line, f"get_{kind}")() == value and len(line.get_xdata())
    ]


def coordinates(axis, line):
    """x and y of a line as they lie on the page: logarithms on a logarithmic axis."""
    x, y = (np.asarray(values, float) for values in line.get_data())
    x = np.log(x) if axis.get_xscale() == "log" else x
    return x, np.log(y) if axis.get_yscale() == "log" else y


def check_on_line(axis, estimates, closed_form, tolerance):
    """The tolerance is relative beyond 1."""
    x, y = coordinates(axis, estimates)
    predicted = np.interp(x, *coordinates(axis, closed_form))
    assert (abs(y - predicted) <= tolerance * (1 + abs(predicted))).all()


@pytest.mark.parametrize(
    "name, panel, curves, tolerance",
    [
        ("singularity", 0, 3, 0.05),
        ("singularity", 1, 2, 1e-3),
        ("singularity", 2, 4, 1e-3),
        ("concentration", 2, 4, 0.1),
        ("concentration", 3, 3, 0.02),
        ("worst_transport", 0, 4, 0.05),
        ("local_transport", 2, 3, 0.01),
        ("unconditional_field", 0, 3, 0.1),
        ("unconditional_field", 1, 2, 0.1),
        ("unconditional_field", 2, 3, 0.05),
        ("one_step", 2, 3, 0.05),
        ("extremes", 0, 3, 0.3),
    ],
)
def test_dots_lie_on_the_solid_line_of_their_colour(name, panel, curves, tolerance):
    axis = figures()[name].axes[panel]
    dots, solid = lines(axis, marker="o"), lines(axis, linestyle="-")
    assert len(dots) == curves
    for estimates in dots:
        colour = estimates.get_color()
        (closed_form,) = (line for line in solid if same_color(line.get_color(), colour))
        check_on_line(axis, estimates, closed_form, tolerance)


def test_exact_fields_lie_on_the_exact_lines_of_the_learned_figure():
    axes = figures()["learned_field"].axes
    (circle,) = (container.lines[0] for container in axes[0].containers)
    assert list(circle.get_ydata()) == [1, 3, 5, 7, 9, 11, 13]
    check_on_line(axes[1], *lines(axes[1], marker="o"), *lines(axes[1], linestyle="--"), 0.01)
    conditioned, unconditional = lines(axes[2], marker="o")
    check_on_line(axes[2], unconditional, *lines(axes[2], linestyle="-"), 0.01)
    assert abs(conditioned.get_ydata()).max() < 1e-5
    for axis in axes[3:]:
        (exact,) = lines(axis, linestyle="--")
        assert same_color(exact.get_color(), draw.MODE_COLOURS[f"t < {EARLY}"])
        (early,) = (
            line
            for line in lines(axis, marker="o")
            if line.get_label() == "_nolegend_" and same_color(line.get_color(), exact.get_color())
        )
        check_on_line(axis, early, exact, 1e-3)
