"""theory/draw.py: estimates lie on the closed forms, and paths end where the exact flow does."""

import numpy as np
import pytest
from matplotlib.colors import same_color

from theory import draw, worst_transport


def coordinates(axis, line):
    """x and y of a line as they lie on the page: logarithms on a logarithmic axis."""
    x, y = (np.asarray(values, float) for values in line.get_data())
    x = np.log(x) if axis.get_xscale() == "log" else x
    return x, np.log(y) if axis.get_yscale() == "log" else y


@pytest.mark.parametrize(
    "panel, curves, tolerance",
    [
        (draw.slope_over_time, 3, 0.05),
        (draw.slope_at_two_atoms, 2, 1e-3),
        (draw.dip_below_straight_line, 3, 0.02),
        (draw.slope_by_correlation, 4, 0.05),
        (draw.ratio_by_length, 3, 0.05),
        (draw.x1_hat_by_radius, 2, 0.1),
    ],
)
def test_dots_lie_on_the_solid_line_of_their_colour(panel, curves, tolerance):
    """Linear between the points of the line; the tolerance is relative beyond 1."""
    (axis,) = draw.figure_of((panel,), draw.seeded()).axes
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert len(dots) == curves
    for estimates in dots:
        (closed_form,) = (
            line
            for line in axis.lines
            if line.get_linestyle() == "-" and same_color(line.get_color(), estimates.get_color())
        )
        x, y = coordinates(axis, estimates)
        predicted = np.interp(x, *coordinates(axis, closed_form))
        assert (abs(y - predicted) <= tolerance * (1 + abs(predicted))).all()


def test_smoothed_paths_end_on_the_noise():
    """A spread of 1 on each axis, to 4 standard errors of 60 points, past the waist."""
    generator = draw.seeded()
    x_0 = draw.arc(2048, generator)
    x_1 = worst_transport.minibatch_worst(x_0, generator)
    times, paths = draw.smoothed_paths(x_0, x_1, steps=64)
    assert times[0] == 0 and times[-1] == 1
    assert np.array_equal(paths[0], x_0[:60])
    assert (abs(paths[-1].std(0) - 1) < 4 / 120**0.5).all()
