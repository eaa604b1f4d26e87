"""O1-O3: theory/one_step.py, and wtflow's Euler steps. How to read: claims.py."""

from functools import partial
from itertools import pairwise

import numpy as np
import torch
from claims import (
    claim,
    close,
    dims,
    draw,
    kinds,
    rejects,
    rhos,
    rng,
    scales,
    seeds,
    table_test,
    times,
    within,
)
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import logsumexp, ndtr

import wtflow
from theory import mean_se, normal, one_step, singularity
from theory.one_step import NOISE_WEIGHTS, over_noise, step_residual

separations = st.floats(0.0, 4.0)


# ---- O1 ---------------------------------------------------------------------------------------
@claim(one_step.step_error, wtflow.euler, examples=2, seed=seeds)
def test_O1_error(error, euler, seed):
    """K times the relative error, by Richardson from 125, 250, 500 steps; 1 + rho for one.

    Of 200 s and rho at once.
    """
    random = np.random.default_rng(seed)
    s, rho = random.uniform(0.2, 2, 200), random.uniform(-0.95, 0.95, 200)

    def u_t(x, t):
        return singularity.slope(t, torch.as_tensor(s), torch.as_tensor(rho))[:, None] * x

    def error_of(steps):
        return 1 - s * euler(u_t, torch.ones(200, 1, dtype=torch.float64), steps)[:, 0].numpy()

    close(error_of(1), 1 + rho, 8 * (1 + 1 / s))
    first = [k * error_of(k) for k in (125, 250, 500)]
    second = [2 * fine - coarse for coarse, fine in pairwise(first)]
    limit = (4 * second[1] - second[0]) / 3
    assert np.abs(limit / error(s, rho) - 1).max() < 3e-4


def midpoint(u_t, x, steps):
    for k in range(steps):
        t = torch.full((len(x),), k / steps, dtype=x.dtype)
        x = x + u_t(x + u_t(x, t) / (2 * steps), t + 0.5 / steps) / steps
    return x


test_O1_error_rejects = rejects(
    test_O1_error,
    error={
        "OT for WT": lambda s, rho: one_step.step_error(s, -rho),
        "no a(1) - a(0)": lambda s, rho: one_step.step_error(s, rho) - (2 + rho * (s + 1 / s)) / 4,
        "a factor of 1.001": lambda s, rho: 1.001 * one_step.step_error(s, rho),
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
    test_O1_average_velocity, average={"velocity at t": singularity.slope}
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
    gain = by_likelihood - by_T
    assert gain > 1e-4 if separation > 1.01 else abs(gain) < 4e-4


test_O2_proxy_auroc_rejects = rejects(
    test_O2_proxy_auroc,
    proxy={"m/s for m/(s sqrt 2)": lambda k: 2 * ndtr(k) * ndtr(-k)},
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
    test_O2_centre_auroc, centre={"one side": lambda k: one_step.centre_auroc(k) / 2}
)


# ---- O3 ---------------------------------------------------------------------------------------
@claim(
    lambda x_0, mean, t: (x_0 - mean) / t,
    step_residual,
    examples=20,
    time=times,
    d=dims,
    s=st.just(0.0) | scales,
    seed=seeds,
)
def test_O3_denoising_error(formula, residual, time, d, s, seed):
    """r_t of the exact field of a mixture, by its posterior mean; the miss of the step to t = 1."""
    mu = normal(rng(seed), 3, d).numpy()
    x_0, x_1 = torch.as_tensor(mu) + s * normal(rng(seed + 1), 3, d), normal(rng(seed + 2), 3, d)
    v = one_step.exact_field(mu, s)
    r = residual(v, x_0, x_1, time)
    x_t = (1 - time) * x_0 + time * x_1
    squares = ((x_t[:, None].numpy() - (1 - time) * mu) ** 2).sum(-1)
    variance = ((1 - time) * s) ** 2 + time**2
    weights = np.exp(
        -squares / (2 * variance) + logsumexp(squares / (-2 * variance), 1)[:, None] * -1
    )
    of_atoms = mu + (1 - time) * s**2 / variance * (x_t[:, None].numpy() - (1 - time) * mu)
    mean = np.einsum("nk,nki->ni", weights, of_atoms)  # E[x_0 | x_t], component by component
    size = 1e3 * (1 + np.abs(squares).max() / variance) / time / variance
    close(r, formula(x_0.numpy(), mean, time), size)
    missed = x_t + (1 - time) * v(x_t, torch.full((3,), time, dtype=x_0.dtype)) - x_1
    close(missed, (1 - time) * r, size)


test_O3_denoising_error_rejects = rejects(
    test_O3_denoising_error,
    formula={
        "1 - t for t": lambda x_0, mean, t: (x_0 - mean) / (1 - t),
        "sign": lambda x_0, mean, t: (mean - x_0) / t,
    },
    residual={"noise for data": lambda v, x_0, x_1, t: step_residual(v, x_1, x_0, t)},
)


@claim(lambda x, x_0: (0 * x, x - x_0.mean(0)), examples=12, kind=kinds, d=dims, seed=seeds)
def test_O3_ends(ends, kind, d, seed):
    """For every q the mean over x_1 is 0 at t = 0 and x_0 - E x_0 at t = 1.

    With v fitted to wtflow's pairs at these times: there it is affine (C2, C5).
    """
    x_0 = draw(kind, 4000, max(d, 2), 1.0, seed)
    x_1 = wtflow.independent(x_0, rng(seed))
    for time, expected in zip((0.0, 1.0), ends(x_0[:50], x_0), strict=True):
        x_t = wtflow.path(x_0, x_1, torch.full((len(x_0),), time, dtype=x_0.dtype))
        constant = torch.ones(len(x_0), 1, dtype=x_0.dtype)
        fit = torch.linalg.lstsq(torch.cat([x_t, constant], 1), x_1 - x_0, driver="gelsd").solution

        def v(x, t, fit=fit):
            return x @ fit[:-1] + fit[-1]

        r = (step_residual(v, x_0, x_1, time) + step_residual(v, x_0, -x_1, time))[:50] / 2
        assert (r - expected).abs().max() < 7 * 4000**-0.5 * (1 + x_0.abs().sum(1).max())


test_O3_ends_rejects = rejects(
    test_O3_ends,
    ends={
        "x_0 at the end": lambda x, x_0: (0 * x, x - x_0.mean(0) + 1),
        "-x_0 at the start": lambda x, x_0: (-x, x - x_0.mean(0)),
    },
)


@claim(one_step.noise_power, examples=8, d=dims, time=st.floats(0, 1), seed=seeds)
def test_O3_power_of_noise(power, d, time, seed):
    """E|r_t|^2 of N(0, I), over wtflow's noise."""
    x_0 = normal(rng(seed), 1, d).expand(20_000, d)
    x_1 = wtflow.independent(x_0, rng(seed + 1))
    r = step_residual(lambda x, t: singularity.slope(time, 1.0) * x, x_0, x_1, time)
    squared = x_0[0].square().sum().item()
    within(mean_se(r.square().sum(1)), power(squared, d, time), 1e-12 * squared)


test_O3_power_of_noise_rejects = rejects(
    test_O3_power_of_noise,
    power={"data for noise": lambda y, d, t: one_step.noise_power(y, d, 1 - t)},
)


@claim(one_step.log_density_by_noise, examples=12, separation=separations, z=st.floats(-2, 2))
def test_O3_integral_is_the_likelihood(log_density, separation, z):
    """On a line, two modes: all of x_1 ~ N(0, 1) by quadrature, between the modes and beyond."""
    m, s = one_step.modes(separation)
    x = np.array([0.0, z * (m + s)])
    log_q = over_noise(log_density, x, m, s) @ NOISE_WEIGHTS
    assert np.abs(log_q - one_step.log_density(x, m, s)).max() < 1e-5


def log_density_with(of_integral, v_theta, x_0, x_1):
    log_noise = -x_0.square().sum(1) / 2 - x_0.shape[1] / 2 * np.log(2 * np.pi)
    right = torch.as_tensor(one_step.log_density_by_noise(v_theta, x_0, x_1))
    return (log_noise + of_integral(right - log_noise)).numpy()


test_O3_integral_is_the_likelihood_rejects = rejects(
    test_O3_integral_is_the_likelihood,
    log_density={
        "sign": partial(log_density_with, lambda integral: -integral),
        "half": partial(log_density_with, lambda integral: integral / 2),
        "Gaussian": partial(log_density_with, lambda integral: 0 * integral),
    },
)


@claim(one_step.log_density_by_noise, examples=4, d=st.integers(2, 10), seed=seeds)
def test_O3_integral_in_more_dimensions(log_density, d, seed):
    """Mixtures, one point, 3,000 noises."""
    mu, s = normal(rng(seed), 3, d).numpy(), 0.6
    x = mu[0] + 0.5 * normal(rng(seed + 1), d).numpy()
    x_0 = torch.as_tensor(x).expand(3000, d)
    estimate = mean_se(
        log_density(one_step.exact_field(mu, s), x_0, normal(rng(seed + 2), 3000, d))
    )
    log_q = logsumexp(-((x - mu) ** 2).sum(1) / (2 * s**2)) - np.log(3)
    within(estimate, log_q - d / 2 * np.log(2 * np.pi * s**2))


@claim(one_step.mean_square, one_step.square_of_mean, examples=8, t=times, separation=separations)
def test_O3_centre_of_symmetry(power, of_mean, t, separation):
    """At x = 0 the mean of r_t is 0, its square is not; at the ends both are known."""
    m, s = one_step.modes(separation)
    assert of_mean(np.zeros(1), m, s, t) < 1e-20 < power(np.zeros(1), m, s, t)
    x = np.array([0.3, 1.2])
    close(power(x, m, s, 1e-7), 1, 1e11)
    close(of_mean(x, m, s, 1 - 1e-7), x**2, 1e11)


test_O3_centre_of_symmetry_rejects = rejects(
    test_O3_centre_of_symmetry,
    power={"of the mean": one_step.square_of_mean},
    of_mean={"of the square": one_step.mean_square},
)


# ---- The printed table ------------------------------------------------------------------------
test_table = table_test(one_step.table, "O1", "O2", "O3")
