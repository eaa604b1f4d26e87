"""S1-S5: theory/singularity.py, and wtflow's path, loss and Euler steps. How to read: claims.py."""

import numpy as np
import pytest
import torch
from claims import (
    claim,
    close,
    dims,
    draw,
    field_condition,
    point_and_means,
    rejects,
    rhos,
    rhos_to_1,
    rng,
    scales,
    scales_or_0,
    seeds,
    table_test,
    times,
    within,
)
from hypothesis import assume
from hypothesis import strategies as st

import wtflow
from theory import exponent, mean_se, normal, singularity, worst_transport

COUPLINGS = [wtflow.independent, wtflow.worst, wtflow.optimal, worst_transport.minibatch_worst]


# ---- S1 ---------------------------------------------------------------------------------------
@claim(
    lambda t: 1 / t,
    wtflow.path,
    examples=40,
    kind=st.sampled_from(["gaussian", "atoms"]),
    couple=st.sampled_from(COUPLINGS),
    d=dims,
    t=times,
    seed=seeds,
)
def test_S1_lipschitz(lipschitz, path, kind, couple, d, t, seed):
    """Two noises at one x_0: the velocities differ 1/t times as much as the points, exactly."""
    x_0 = draw(kind, 6, d, 1.0, seed)
    x_1, y_1 = couple(x_0, rng(seed + 2)), couple(x_0, rng(seed + 3))
    x_t, y_t = (path(x_0, end, torch.full((6,), t, dtype=x_0.dtype)) for end in (x_1, y_1))
    apart = (x_1 - y_1).norm().item()
    assume(apart > 1e-3)
    condition = (1 + x_0.norm().item()) / (t**2 * apart)
    close(apart / (x_t - y_t).norm().item(), lipschitz(t), condition)


test_S1_lipschitz_rejects = rejects(
    test_S1_lipschitz,
    lipschitz={"exponent": lambda t: 1 / t**2},
    path={"path from noise to data": lambda x_0, x_1, t: wtflow.path(x_1, x_0, t)},
)


@claim(singularity.marginal_field, examples=40, d=dims, t=times, s=scales_or_0, seed=seeds)
def test_S1_S2_field(field, d, t, s, seed):
    """u^rFM_t(x) = -u^FM_{1-t}(x), both by Tweedie."""
    x, mu = point_and_means(d, seed)
    u = field(x[None], t, mu, s)[0]
    for time, forward, sign in ((t, False, 1), (1 - t, True, -1)):
        arrays = torch.tensor(x), time, torch.tensor(mu), s
        by_tweedie = sign * singularity.tweedie_field(*arrays, forward).detach().numpy()
        close(u, by_tweedie, field_condition(x, t, mu, s))


test_S1_S2_field_rejects = rejects(
    test_S1_S2_field,
    field={
        "time reversed": lambda x, t, mu, s: singularity.marginal_field(x, 1 - t, mu, s),
        "no 1/t": lambda x, t, mu, s: t * singularity.marginal_field(x, t, mu, s),
    },
)


# ---- S2 ---------------------------------------------------------------------------------------
@claim(singularity.posterior, examples=40, d=dims, t=times, s=scales_or_0, seed=seeds)
def test_S2_posterior(posterior, d, t, s, seed):
    """u_t = (x - E[x_0 | x_t = x]) / t = (E[x_1 | x_t = x] - x) / (1-t)."""
    x, mu = point_and_means(d, seed)
    mean_0 = posterior(x[None], t, mu, s)[0]
    u = singularity.marginal_field(x[None], t, mu, s)
    condition = field_condition(x, t, mu, s)
    close((x - mean_0) / t, u, condition)
    close(((x - (1 - t) * mean_0) / t - x) / (1 - t), u, condition)


def posterior_of_noise(x, t, mu, s):
    mean, covariance = singularity.posterior(x, t, mu, s)
    return x - (1 - t) * mean, covariance


test_S2_posterior_rejects = rejects(
    test_S2_posterior, posterior={"t E[x_1|x_t] for E[x_0|x_t]": posterior_of_noise}
)


@claim(singularity.jacobian, examples=25, d=st.integers(1, 4), t=times, s=scales_or_0, seed=seeds)
def test_S2_jacobian(jacobian, d, t, s, seed):
    """J_t(x) is the derivative of the field, by autograd."""
    x, mu = point_and_means(d, seed)

    def field(y):
        return singularity.tweedie_field(y, t, torch.tensor(mu), s)

    J = torch.autograd.functional.jacobian(field, torch.tensor(x))
    close(jacobian(x[None], t, mu, s)[0], J.numpy(), field_condition(x, t, mu, s) ** 2)


test_S2_jacobian_rejects = rejects(
    test_S2_jacobian, jacobian={"no Cov": lambda x, t, mu, s: np.eye(x.shape[1])[None] / t}
)


@claim(singularity.slope, examples=60, t=st.floats(0, 1), s=scales, rho=rhos_to_1)
def test_S2_slope(slope, t, s, rho):
    """a = sigma' / sigma, by a complex step through log Var x_t."""
    assume(singularity.variance(t, s, rho) > 1e-4)  # the paths of rho = 1 meet in one point
    step = 1e-30
    log_derivative = np.log(singularity.variance(t + 1j * step, s, rho)).imag / step
    condition = (1 + s) ** 2 / singularity.variance(t, s, rho) ** 2
    close(slope(t, s, rho), log_derivative / 2, condition)


test_S2_slope_rejects = rejects(
    test_S2_slope, slope={"OT for WT": lambda t, s, rho: singularity.slope(t, s, -rho)}
)


def completed_square(s, rho):
    """(A, tc) of Var x_t = A (t - tc)^2 + s^2 (1 - rho^2) / A."""
    A = 1 + s**2 + 2 * rho * s
    return A, (s**2 + rho * s) / A


@claim(singularity.peak, examples=60, s=scales, rho=rhos)
def test_S2_peak(peak, s, rho):
    """Peak and, mirrored at tc, trough; where they lie; the square completed (W2)."""
    time, top = peak(s, rho)
    A, tc = completed_square(s, rho)
    condition = top / (1 - rho**2) ** 2 * (1 + 1 / s) ** 2
    close(singularity.slope(time, s, rho), top, condition)
    close(singularity.slope(2 * tc - time, s, rho), -top, condition)
    assert (np.abs(singularity.slope(np.linspace(-3, 4, 2001), s, rho)) <= top * (1 + 1e-9)).all()
    assert rho != 0 or (time <= 1) == (s <= 1)
    t = np.linspace(0, 1, 11)
    square = A * (t - tc) ** 2 + s**2 * (1 - rho**2) / A
    close(singularity.variance(t, s, rho), square, (1 + s) ** 4 / A)


def peak_at_tc(s, rho):
    return completed_square(s, rho)[1], singularity.peak(s, rho)[1]


test_S2_peak_rejects = rejects(test_S2_peak, peak={"at tc": peak_at_tc})


@claim(-1, -3, singularity.slope_between_atoms, examples=8, m=st.floats(0.5, 3), seed=seeds)
def test_S2_two_atoms(power_off, power_between, slope, m, seed):
    """Atoms +-m e: the slope along e grows as 1/t off them and as t^-3 midway."""
    e = np.random.default_rng(seed).normal(size=3)
    e /= np.linalg.norm(e)
    atoms = m * np.stack([e, -e])
    t = m * np.geomspace(1e-5, 1e-3, 7)
    off = [singularity.autograd_slope(k, atoms, 0.0, 1.5 * m * e + 0.3, e) for k in t]
    between = np.array([-singularity.autograd_slope(k, atoms, 0.0, 0 * e, e) for k in t])
    close(exponent(t, off)[0], power_off, 1e3)
    assert abs(exponent(t, between)[0] - power_between) < 2e-3 * max(m, 1)  # next order: 1 - t
    for k in (0.05, 0.5, 0.9):
        exact = singularity.autograd_slope(k, atoms, 0.0, 0 * e, e)
        close(slope(k, m), exact, (1 + m) ** 4 / k**5)


test_S2_two_atoms_rejects = rejects(
    test_S2_two_atoms,
    power_off={"t^-2": -2},
    power_between={"t^-2": -2},
    slope={"no 1-t": lambda t, m: (1 - m**2 / t**2) / t},
)


# ---- S3 ---------------------------------------------------------------------------------------
@claim(singularity.amplification, examples=15, t_0=times, s=scales_or_0, seed=seeds)
def test_S3_growth(amplification, t_0, s, seed):
    """Two solutions of the flow, to the ODE solver's tolerance times the growth."""
    delta = 1e-3 * np.random.default_rng(seed).normal(size=2)
    measured = singularity.grown(delta, t_0, np.zeros((1, 2)), s)
    assert abs(measured / amplification(t_0, s) - 1) < 1e-5


test_S3_growth_rejects = rejects(
    test_S3_growth,
    amplification={
        "variance for standard deviation": lambda t_0, s: 1 / singularity.variance(t_0, s),
        "1/t_0 for data with a density": lambda t_0, s: 1 / t_0,
    },
)


@claim(wtflow.flow_matching_loss, examples=12, d=dims, t=times, s=scales, seed=seeds)
def test_S3_loss(loss, d, t, s, seed):
    """E|u - u_t|^2 / d = s^2 / sigma_t^2 at the exact field; at t = 0 it is 1: the noise itself."""
    x_0 = s * normal(rng(seed), 4000, d)

    def exact_field(x, t):
        return singularity.slope(t, s)[:, None] * x

    for time in (0.0, t):
        at_time = torch.full((4000,), time, dtype=x_0.dtype)
        values = loss(exact_field, x_0, wtflow.independent, rng(seed + 1), at_time)
        assert values.shape == (4000,)
        within(mean_se(values), s**2 / singularity.variance(time, s))


test_S3_loss_rejects = rejects(
    test_S3_loss, loss={"no 1/d": lambda *x: x[1].shape[1] * wtflow.flow_matching_loss(*x)}
)


# ---- S4 ---------------------------------------------------------------------------------------
@claim(
    singularity.estimation_variance,
    examples=8,
    t=st.floats(0.1, 1),
    extra=st.integers(16, 40),
    d=st.integers(1, 3),
    s=st.floats(0.1, 2),
    rho=rhos,
    seed=seeds,
)
def test_S4_variance_of_a_fit(variance, t, extra, d, s, rho, seed):
    """The spread of fits to n pairs, n = d + extra, at t = 0 too."""
    n = d + extra
    for time in (0.0, t):
        spread = singularity.spread_of_fits(time, n, s, rho, d, 4000, rng(seed))
        within(spread, variance(time, n, d, s, rho))


test_S4_variance_of_a_fit_rejects = rejects(
    test_S4_variance_of_a_fit,
    variance={
        "n for n-d-1": lambda t, n, d, s, rho: singularity.estimation_variance(
            t, n + d + 1, d, s, rho
        ),
        "OT for WT": lambda t, n, d, s, rho: singularity.estimation_variance(t, n, d, s, -rho),
    },
)


def largest_in_the_middle(s, rho):
    """Whether the variance is largest at tc, inside (0, 1)."""
    return rho > -s and rho > -1 / s


@claim(-4, lambda rho: 1 - rho**2, largest_in_the_middle, examples=60, s=scales, rho=rhos)
def test_S4_ends_and_middle(power, mitigation, in_the_middle, s, rho):
    """s^-4 from end to end; 1-rho^2 of rFM's at 0, even in rho; A^2/(n s^2 (1-rho^2)) at tc."""

    def variance(t, rho=rho):
        return singularity.estimation_variance(t, 10**15, 4, s, rho)

    A, tc = completed_square(s, rho)
    start, middle, end = variance(0.0), variance(tc), variance(1.0)
    close(start / end * s**4, s ** (power + 4), 16)
    close(start / variance(0.0, 0.0), mitigation(rho), 16)
    formula = A**2 / (10**15 * s**2 * (1 - rho**2))
    close(middle / formula, 1, (1 + 1 / s) ** 4 / (1 - rho**2) ** 4)
    assume(min(abs(tc), abs(1 - tc)) > 1e-6)
    assert (0 < tc < 1) == in_the_middle(s, rho)
    assert variance(np.linspace(0, 1, 501)).max() <= (middle if 0 < tc < 1 else max(start, end))


test_S4_ends_and_middle_rejects = rejects(
    test_S4_ends_and_middle,
    power={"s^-2": -2},
    mitigation={"odd in rho": lambda rho: (1 - rho) / (1 + rho)},
    in_the_middle={"for every rho": lambda s, rho: True},
)


# ---- S5 ---------------------------------------------------------------------------------------
@claim(lambda t: 1 / t, examples=30, d=dims, t=times, n=st.integers(1, 6), seed=seeds)
def test_S5_far_from_a_bounded_set(slope, d, t, n, seed):
    """Atoms: along any direction e the slope tends to 1/t, as the posterior collapses."""
    random = np.random.default_rng(seed)
    mu, e = random.normal(size=(n, d)), random.normal(size=d)
    e /= np.linalg.norm(e)
    first = np.sort(mu @ e)[::-1]
    assume(n == 1 or first[0] - first[1] > 0.01)
    J = singularity.jacobian(1e5 * e[None] / (1 - t), t, mu, 0.0)[0]
    close(e @ J @ e, slope(t), 1e6 / t)


test_S5_far_from_a_bounded_set_rejects = rejects(
    test_S5_far_from_a_bounded_set,
    slope={"1, as if whitening bounded it": lambda t: 1.0, "t^-3": lambda t: t**-3},
)


@claim(singularity.jump_slope, examples=2, seed=seeds)
def test_S5_jump(slope, seed):
    """t J_t at a jump, by wtflow pairs; 0.01 of it is the next order in t."""
    for below in (0.0, 0.25, 4.0):
        measured = singularity.slope_at_jump(0.005, 1.0, below, 600_000, rng(seed))
        within(measured, slope(1.0, below), slack=0.01)


test_S5_jump_rejects = rejects(
    test_S5_jump,
    slope={
        "1 - 2/pi": lambda above, below: 1 - singularity.jump_slope(above, below),
        "no square": lambda above, below: 2 / np.pi * abs(above - below) / (above + below),
    },
)


@claim(
    singularity.slope_bound,
    examples=60,
    d=st.integers(1, 4),
    t=times,
    s=st.floats(0.05, 1.5),
    seed=seeds,
)
def test_S5_bound(bound, d, t, s, seed):
    """Of mixtures of width s: not exceeded; reached by two atoms midway, where a < 0."""
    x, mu = point_and_means(d, seed)
    for means in (mu, np.stack([mu[0], -mu[0]])):
        radius = np.linalg.norm(means, axis=1).max()
        for y in (x, 0 * x, (1 - t) * means.mean(0)):
            J = singularity.jacobian(y[None], t, means, s)[0]
            assert np.linalg.norm(J, 2) <= bound(t, s, radius) * (1 + 1e-9)
    early = 0.9 * s**2 / (1 + s**2)
    J = singularity.jacobian(0 * x[None], early, means, s)[0]
    assert np.linalg.norm(J, 2) == pytest.approx(bound(early, s, radius), rel=1e-6)


test_S5_bound_rejects = rejects(
    test_S5_bound,
    bound={
        "sigma^2 for sigma^4": lambda t, s, radius: (
            abs(singularity.slope(t, s)) + t * (1 - t) * radius**2 / singularity.variance(t, s)
        ),
        "the Gaussian's alone": lambda t, s, radius: abs(singularity.slope(t, s)),
    },
)


# ---- The printed table ------------------------------------------------------------------------
test_table = table_test(singularity.table, "S1", "S2", "S3", "S4", "S5")
