"""O1, O2: theory/one_step.py, and wtflow's Euler steps. How to read: claims.py."""

import numpy as np
import torch
from claims import claim, close, rejects, rhos, rng, scales, seeds, table_test, times, within
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import ndtr

import wtflow
from theory import mean_se, one_step, singularity

separations = st.floats(0.0, 4.0)


# ---- O1 ---------------------------------------------------------------------------------------
@claim(one_step.step_error, wtflow.euler, examples=10, s=st.floats(0.2, 2), rho=rhos)
def test_O1_error(error, euler, s, rho):
    """K times the relative error, by Richardson from 1000 and 2000 steps; 1 + rho for one step."""

    def relative_error(steps):
        def u_t(x, t):
            return singularity.slope(t, s, rho)[:, None] * x

        return 1 - s * euler(u_t, torch.ones(1, 1, dtype=torch.float64), steps).item()

    close(relative_error(1), 1 + rho, 8 * (1 + 1 / s))
    limit = 4000 * relative_error(2000) - 1000 * relative_error(1000)
    assert abs(limit / error(s, rho) - 1) < 1e-2


def error_without_first_order_of_sum(s, rho):
    return one_step.step_error(s, rho) - (2 + rho * (s + 1 / s)) / 4


def error_at_right_angle(s, rho):
    return one_step.step_error(s, rho) + (1 + s**2 + 2 * rho * s) / (4 * s) * (
        (np.pi / 2 - np.arccos(-rho)) / (1 - rho**2) ** 0.5
    )


def midpoint(u_t, x, steps):
    for k in range(steps):
        t = torch.full((len(x),), k / steps, dtype=x.dtype)
        x = x + u_t(x + u_t(x, t) / (2 * steps), t + 0.5 / steps) / steps
    return x


test_O1_error_rejects = rejects(
    test_O1_error,
    error={
        "rFM's at any rho": lambda s, rho: one_step.step_error(s),
        "OT for WT": lambda s, rho: one_step.step_error(s, -rho),
        "no a(1) - a(0)": error_without_first_order_of_sum,
        "right angle": error_at_right_angle,
    },
    euler={"midpoint rule: not Euler": midpoint},
)


@claim(one_step.average_slope, examples=30, t=times, s=scales, rho=rhos)
def test_O1_average_velocity(average, t, s, rho):
    """MeanFlow's identity g = a + (1-t)(g' + a g) by a complex step; from 0 it ends at x/s."""
    g, a = average(t, s, rho), singularity.slope(t, s, rho)
    derivative = average(t + 1e-30j, s, rho).imag / 1e-30
    condition = (1 + s) ** 2 / singularity.variance(t, s, rho) ** 2 / (1 - t)
    close(g, a + (1 - t) * (derivative + a * g), 10 * condition)
    close(one_step.measured_factor(1, s, rho, average), 1 / s, 8 / s)


test_O1_average_velocity_rejects = rejects(
    test_O1_average_velocity,
    average={
        "velocity at t": singularity.slope,
        "no 1-t": lambda t, s, rho: singularity.variance(t, s, rho) ** -0.5 - 1,
        "variance": lambda t, s, rho: (1 / singularity.variance(t, s, rho) - 1) / (1 - t),
    },
)


# ---- O2 ---------------------------------------------------------------------------------------
@claim(one_step.flow_map, examples=30, separation=separations, z=st.floats(-2, 2))
def test_O2_change_of_variables(flow_map, separation, z):
    """log q = -T^2/2 + log T' + const, T' by differences; beyond a mode and between them."""
    m, s = one_step.modes(separation)
    x, h = z * (m + s), 1e-4 * s
    T = flow_map(x, m, s)
    slope = (flow_map(x + h, m, s) - flow_map(x - h, m, s)) / (2 * h)
    log_q = -(T**2) / 2 + np.log(slope) - np.log(2 * np.pi) / 2
    assert abs(log_q - one_step.log_density(x, m, s)) < 1e-5


test_O2_change_of_variables_rejects = rejects(
    test_O2_change_of_variables,
    flow_map={
        "whitening": lambda x, m, s: x / (m**2 + s**2) ** 0.5,
        "F": lambda x, m, s: one_step.distribution(x, m, s),
        "twice as wide": lambda x, m, s: one_step.flow_map(x, m, 2 * s),
    },
)


@claim(one_step.flow_map, examples=4, separation=st.floats(0.5, 2.5), z=st.floats(-2, 2))
def test_O2_is_the_end_of_the_flow(flow_map, separation, z):
    """To the error of Euler's steps, which falls as 1/K: extrapolated from K and 2 K."""
    m, s = one_step.modes(separation)
    x = np.array([z * (m + s)])
    ends = [one_step.end_of_flow(x, m, s, steps) for steps in (200, 400)]
    assert abs(2 * ends[1] - ends[0] - flow_map(x, m, s)) < 2e-3


test_O2_is_the_end_of_the_flow_rejects = rejects(
    test_O2_is_the_end_of_the_flow,
    flow_map={"whitening": lambda x, m, s: x, "x_0 - m": lambda x, m, s: (x - np.sign(x) * m) / s},
)


@claim(one_step.proxy_auroc, one_step.auroc_by_quadrature, examples=12, separation=separations)
def test_O2_proxy_auroc(proxy, by_quadrature, separation):
    """E|2 F - 1| over the anomalies; the likelihood's is the same for m <= s, and larger beyond."""
    m, s = one_step.modes(separation)

    def share(y):  # of normal points with a smaller |T|
        return (2 * one_step.distribution(y, m, s) - 1) * np.exp(-(y**2) / (2 * s**2))

    predicted = 2 * quad(share, 0, 9 * s)[0] / (s * (2 * np.pi) ** 0.5)
    assert abs(proxy(separation) - predicted) < 1e-6
    by_T = by_quadrature(lambda x, m, s: np.abs(one_step.flow_map(x, m, s)), separation)
    by_likelihood = by_quadrature(one_step.rarity, separation)
    assert abs(by_T - predicted) < 1e-4
    assert by_likelihood > predicted if separation > 1.1 else abs(by_likelihood - by_T) < 2e-3


test_O2_proxy_auroc_rejects = rejects(
    test_O2_proxy_auroc,
    proxy={
        "m/s for m/(s sqrt 2)": lambda k: 2 * ndtr(k) * ndtr(-k),
        "Phi(-y)": lambda k: ndtr(-k / 2**0.5),
    },
    by_quadrature={"always one half": lambda score, separation: 0.5},
)


@claim(one_step.centre_auroc, examples=8, separation=separations, seed=seeds)
def test_O2_centre_auroc(centre, separation, seed):
    """The share of normal points that are likelier than x = 0, which |T| = 0 calls most normal."""
    m, s = one_step.modes(separation)
    x = one_step.sample(20_000, m, s, rng(seed))
    likelier = one_step.rarity(x, m, s) < one_step.rarity(0.0, m, s)
    within(mean_se(likelier), centre(separation), 5e-4)
    for score in (one_step.flow_map, one_step.line_field):
        assert abs(score(np.zeros(1), m, s)) < 1e-12


test_O2_centre_auroc_rejects = rejects(
    test_O2_centre_auroc,
    centre={
        "never seen": lambda k: 0.0,
        "one side": lambda k: one_step.centre_auroc(k) / 2,
        "between the modes": lambda k: 2 * one_step.distribution(k, k, 1.0) - 1,
    },
)


# ---- The printed table ------------------------------------------------------------------------
test_table = table_test(one_step.table, "O1", "O2")
