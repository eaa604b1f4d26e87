"""S1-S4: theory/singularity.py, and wtflow's path, loss and Euler steps. How to read: claims.py."""

from functools import partial

import numpy as np
import torch
from claims import (
    P,
    claim,
    close,
    dims,
    draw,
    field_condition,
    point_and_means,
    rejects,
    rhos,
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
from scipy.stats import kstest

import wtflow
from theory import exponent, mean_se, normal, singularity, worst_transport

COUPLINGS = [
    wtflow.independent,
    wtflow.optimal,
    partial(worst_transport.worst_candidate, n=8),
    worst_transport.minibatch_worst,
]


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
    lipschitz={
        "exponent": lambda t: 1 / t**2,
        "swapped time: FM's constant": lambda t: 1 / (1 - t),
    },
    path={"path from noise to data": lambda x_0, x_1, t: wtflow.path(x_1, x_0, t)},
)


@claim(wtflow.path, examples=10, d=dims, h=st.integers(1, 3), seed=seeds)
def test_S1_path(path, d, h, seed):
    """Each sample of a batch at its own time: the ends, a quarter, the middle."""
    x_0, x_1 = normal(rng(seed), 4, d, h, 2), normal(rng(seed + 1), 4, d, h, 2)
    t = torch.tensor([0.0, 1.0, 0.25, 0.5], dtype=x_0.dtype)
    quarter, middle = 0.75 * x_0[2] + 0.25 * x_1[2], (x_0[3] + x_1[3]) / 2
    close(path(x_0, x_1, t), torch.stack([x_0[0], x_1[1], quarter, middle]), 8)


def path_at_first_time(x_0, x_1, t):
    return wtflow.path(x_0, x_1, t[:1].expand_as(t))


test_S1_path_rejects = rejects(
    test_S1_path,
    path={
        "path not straight in t": lambda x_0, x_1, t: wtflow.path(x_0, x_1, t**2),
        "one time for the whole batch": path_at_first_time,
    },
)


@claim(singularity.marginal_field, examples=40, d=dims, t=times, s=scales_or_0, seed=seeds)
def test_S1_duality(field, d, t, s, seed):
    """u^rFM_t(x) = -u^FM_{1-t}(x)."""
    x, mu = point_and_means(d, seed)
    forward = singularity.tweedie_field(torch.tensor(x), 1 - t, torch.tensor(mu), s, forward=True)
    close(field(x[None], t, mu, s)[0], -forward.detach().numpy(), field_condition(x, t, mu, s))


test_S1_duality_rejects = rejects(
    test_S1_duality,
    field={
        "sign of the duality": lambda x, t, mu, s: -singularity.marginal_field(x, t, mu, s),
        "time not reversed": lambda x, t, mu, s: singularity.marginal_field(x, 1 - t, mu, s),
    },
)


# ---- S2 ---------------------------------------------------------------------------------------
@claim(singularity.marginal_field, examples=40, d=dims, t=times, s=scales_or_0, seed=seeds)
def test_S2_field(field, d, t, s, seed):
    """The marginal field is that of grad log p_t (Tweedie)."""
    x, mu = point_and_means(d, seed)
    by_tweedie = singularity.tweedie_field(torch.tensor(x), t, torch.tensor(mu), s)
    close(field(x[None], t, mu, s)[0], by_tweedie.detach().numpy(), field_condition(x, t, mu, s))


test_S2_field_rejects = rejects(
    test_S2_field,
    field={
        "no 1/t": lambda x, t, mu, s: t * singularity.marginal_field(x, t, mu, s),
        "width": lambda x, t, mu, s: singularity.marginal_field(x, t, mu, 0.9 * s + 0.01),
    },
)


@claim(singularity.posterior, examples=40, d=dims, t=times, s=scales_or_0, seed=seeds)
def test_S2_posterior(posterior, d, t, s, seed):
    """u_t = (x - E[x_0 | x_t = x]) / t = (E[x_1 | x_t = x] - x) / (1-t)."""
    x, mu = point_and_means(d, seed)
    mean_0, _ = posterior(x[None], t, mu, s)
    mean_1 = (x - (1 - t) * mean_0) / t
    u = singularity.marginal_field(x[None], t, mu, s)
    condition = field_condition(x, t, mu, s)
    close((x - mean_0) / t, u, condition)
    close((mean_1 - x) / (1 - t), u, condition)


def noise_for_data(x, t, mu, s):
    mean, covariance = singularity.posterior(x, t, mu, s)
    return x - (1 - t) * mean, covariance


test_S2_posterior_rejects = rejects(
    test_S2_posterior, posterior={"t E[x_1|x_t] for E[x_0|x_t]": noise_for_data}
)


@claim(singularity.jacobian, examples=25, d=st.integers(1, 4), t=times, s=scales_or_0, seed=seeds)
def test_S2_jacobian(jacobian, d, t, s, seed):
    """J_t(x) is the derivative of the field, by autograd."""
    x, mu = point_and_means(d, seed)

    def field(y):
        return singularity.tweedie_field(y, t, torch.tensor(mu), s)

    J = torch.autograd.functional.jacobian(field, torch.tensor(x))
    close(jacobian(x[None], t, mu, s)[0], J.numpy(), field_condition(x, t, mu, s) ** 2)


def jacobian_of_factor(factor):
    """The Jacobian with `factor`(t) in place of -(1-t)/t^2."""

    def jacobian(x, t, mu, s):
        _, covariance = singularity.posterior(x, t, mu, s)
        return (np.eye(x.shape[1]) + factor(t) * covariance) / t

    return jacobian


test_S2_jacobian_rejects = rejects(
    test_S2_jacobian,
    jacobian={
        "1/t for 1/t^2": jacobian_of_factor(lambda t: -(1 - t) / t),
        "sign of Cov": jacobian_of_factor(lambda t: (1 - t) / t**2),
        "no 1-t": jacobian_of_factor(lambda t: -1 / t**2),
    },
)


@claim(singularity.slope, examples=60, t=st.floats(0, 1), s=scales, rho=rhos)
def test_S2_slope(slope, t, s, rho):
    """a = sigma' / sigma, by a complex step through log Var x_t."""
    step = 1e-30
    log_derivative = np.log(singularity.variance(t + 1j * step, s, rho)).imag / step
    condition = (1 + s) ** 2 / singularity.variance(t, s, rho) ** 2
    close(slope(t, s, rho), log_derivative / 2, condition)


test_S2_slope_rejects = rejects(
    test_S2_slope,
    slope={
        "log variance for log sigma": lambda t, s, rho: 2 * singularity.slope(t, s, rho),
        "OT for WT": lambda t, s, rho: singularity.slope(t, s, -rho),
    },
)


def completed_square(s, rho):
    """(A, tc) of Var x_t = A (t - tc)^2 + s^2 (1 - rho^2) / A."""
    A = 1 + s**2 + 2 * rho * s
    return A, (s**2 + rho * s) / A


@claim(singularity.peak, examples=60, s=scales, rho=rhos)
def test_S2_peak(peak, s, rho):
    """No slope is larger than that of the peak, which is reached; and the square completed."""
    time, top = peak(s, rho)
    condition = top / (1 - rho**2) ** 2 * (1 + 1 / s) ** 2
    close(singularity.slope(time, s, rho), top, condition)
    assert (singularity.slope(np.linspace(-3, 4, 2001), s, rho) <= top * (1 + 1e-9)).all()
    A, tc = completed_square(s, rho)
    t = np.linspace(0, 1, 11)
    square = A * (t - tc) ** 2 + s**2 * (1 - rho**2) / A
    close(singularity.variance(t, s, rho), square, (1 + s) ** 4 / A)


def peak_at_tc(s, rho):
    return completed_square(s, rho)[1], singularity.peak(s, rho)[1]


def peak_without_square_root_of_noise(s, rho):
    return singularity.peak(s, rho)[0], completed_square(s, rho)[0] / (2 * s)


def peak_without_root(s, rho):
    return singularity.peak(s, rho)[0], completed_square(s, rho)[0] / (2 * s * (1 - rho**2))


test_S2_peak_rejects = rejects(
    test_S2_peak,
    peak={
        "peak without sqrt(1-rho^2)": peak_without_square_root_of_noise,
        "peak without the root": peak_without_root,
        "peak at tc": peak_at_tc,
    },
)


@claim(-1, -3, examples=8, m=st.floats(0.5, 3), seed=seeds)
def test_S2_exponents(power_off, power_between, m, seed):
    """Two atoms +-m e: the slope along e grows as 1/t off them and as t^-3 midway."""
    e = np.random.default_rng(seed).normal(size=3)
    e /= np.linalg.norm(e)
    atoms = m * np.stack([e, -e])
    t = m * np.geomspace(1e-5, 1e-3, 7)
    off = [singularity.autograd_slope(k, atoms, 0.0, 1.5 * m * e + 0.3, e) for k in t]
    between = np.array([-singularity.autograd_slope(k, atoms, 0.0, 0 * e, e) for k in t])
    close(exponent(t, off)[0], power_off, 1e3)
    assert abs(exponent(t, between)[0] - power_between) < 2e-3 * max(m, 1)  # next order: 1 - t
    rest = (between * t**3 - (1 - t) * m**2 + t**2) * t**2
    close(rest, 0, 10 * (1 + m) ** 4)  # log-weights are as large as m^2 / t^2


test_S2_exponents_rejects = rejects(
    test_S2_exponents,
    power_off={"t^-2 off the data": -2},
    power_between={"t^-2 between atoms": -2},
)


@claim(singularity.slope_between_atoms, examples=20, t=times, m=st.floats(0.5, 3))
def test_S2_slope_between_atoms(slope, t, m):
    """Midway between two atoms +-m e, by autograd."""
    e = np.array([1.0, 0.0])
    atoms = m * np.stack([e, -e])
    condition = (1 + m) ** 4 / t**5
    close(slope(t, m), singularity.autograd_slope(t, atoms, 0.0, 0 * e, e), condition)


test_S2_slope_between_atoms_rejects = rejects(
    test_S2_slope_between_atoms,
    slope={
        "off the atoms": lambda t, m: 1 / t,
        "no 1-t": lambda t, m: (1 - m**2 / t**2) / t,
    },
)


# ---- S3 ---------------------------------------------------------------------------------------
@claim(singularity.amplification, examples=15, t_0=times, s=scales_or_0, seed=seeds)
def test_S3_growth(amplification, t_0, s, seed):
    """Two solutions of the flow, to the ODE solver's tolerance times the growth."""
    delta = 1e-3 * np.random.default_rng(seed).normal(size=2)
    measured = singularity.grown(delta, t_0, np.zeros((1, 2)), s)
    assert abs(measured / amplification(t_0, s) - 1) < 1e-5


@claim(singularity.grown, examples=4, t_0=st.floats(0.05, 0.9), seed=seeds)
def test_S3_growth_does_not_depend_on_the_origin(grown, t_0, seed):
    """The solutions start at the mean of the data wherever that is: atoms about 0, about (2, 2)."""
    delta = 1e-3 * np.random.default_rng(seed).normal(size=2)
    about_0, about_2 = (grown(delta, t_0, centre + singularity.ATOMS, 0.5) for centre in (0, 2))
    assert abs(about_2 / about_0 - 1) < 1e-5


def grown_off_the_mean(delta, t_0, mu, s):
    """Data whose mean is 0 whatever mu is."""
    return singularity.grown(delta, t_0, np.concatenate([mu, -mu]), s)


test_S3_growth_does_not_depend_on_the_origin_rejects = rejects(
    test_S3_growth_does_not_depend_on_the_origin, grown={"mirrored data": grown_off_the_mean}
)


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


def summed_loss(v_theta, x_0, *rest):
    return wtflow.flow_matching_loss(v_theta, x_0, *rest) * x_0.shape[1]


def reversed_time_loss(v_theta, x_0, couple, generator, t):
    x_1 = couple(x_0, generator)
    return (v_theta(wtflow.path(x_1, x_0, t), t) - (x_1 - x_0)).square().flatten(1).mean(1)


test_S3_loss_rejects = rejects(
    test_S3_loss,
    loss={"missing 1/d": summed_loss, "swapped time in the loss": reversed_time_loss},
)


@claim(wtflow.flow_matching_loss, examples=6, d=dims, seed=seeds)
def test_S3_uniform_time(loss, d, seed):
    """t ~ U(0, 1), one per sample; the input of the field is x_t. As x_0 = 0, u = x_1 = x_t / t."""
    inputs = []

    def zero_field(x, t):
        inputs.append((x, t))
        return 0 * x

    x_0 = torch.zeros(3000, d, dtype=torch.float64)
    values = loss(zero_field, x_0, wtflow.independent, rng(seed))
    x_t, t = inputs[0]
    assert kstest(t.numpy(), "uniform").pvalue > P
    assert t.unique().numel() > 2900
    target = (x_t / t[:, None]).square().mean(1)
    close(target.numpy(), values.numpy(), 100 * values.max().item())


def squared_time_loss(v_theta, x_0, couple, generator):
    t = torch.rand(len(x_0), generator=generator, dtype=x_0.dtype) ** 2
    return wtflow.flow_matching_loss(v_theta, x_0, couple, generator, t)


test_S3_uniform_time_rejects = rejects(
    test_S3_uniform_time, loss={"t not uniform": squared_time_loss}
)


@claim(
    wtflow.euler,
    examples=4,
    steps=st.integers(1, 20),
    d=dims,
    s=st.floats(0.3, 1.5),
    seed=seeds,
)
def test_S3_euler(euler, steps, d, s, seed):
    """K steps of u_t = a(t) x multiply by prod (1 + a(k/K) / K), which tends to 1 / s."""

    def field(x, t):
        return singularity.slope(t, s)[:, None, None, None] * x

    x = normal(rng(seed), 3, d, 2, 2)
    factor = np.prod([1 + singularity.slope(k / steps, s) / steps for k in range(steps)])
    condition = 100 * steps * (1 + abs(factor)) / s**2 * x.abs().max().item()
    close(euler(field, x, steps), factor * x, condition)
    one = torch.ones(1, 1, 1, 1, dtype=x.dtype)
    assert abs(euler(field, one, 4000).item() * s - 1) < 0.02 / s


def full_steps(v_theta, x, steps):
    for k in range(steps):
        x = x + v_theta(x, torch.full((len(x),), k / steps, dtype=x.dtype))
    return x


def late_steps(v_theta, x, steps):
    for k in range(steps):
        x = x + v_theta(x, torch.full((len(x),), (k + 1) / steps, dtype=x.dtype)) / steps
    return x


test_S3_euler_rejects = rejects(
    test_S3_euler,
    euler={"step of 1 instead of 1/K": full_steps, "off-by-one in t": late_steps},
)


# ---- S4 ---------------------------------------------------------------------------------------
@claim(
    singularity.estimation_variance,
    examples=8,
    t=st.just(0.0) | st.floats(0, 1),
    extra=st.integers(16, 40),
    d=st.integers(1, 3),
    s=st.floats(0.1, 2),
    rho=rhos,
    seed=seeds,
)
def test_S4_variance_of_a_fit(variance, t, extra, d, s, rho, seed):
    """The spread of fits to n pairs, n = d + extra."""
    n = d + extra
    spread = singularity.spread_of_fits(t, n, s, rho, d, 10_000, rng(seed))
    within(spread, variance(t, n, s, rho, d))


def first_order_variance(t, n, s, rho, d):
    return singularity.estimation_variance(t, n + d + 1, s, rho, d)


def variance_over_variance(t, n, s, rho, d):
    return singularity.estimation_variance(t, n, s, rho, d) * singularity.variance(t, s, rho)


def variance_without_coupling(t, n, s, rho, d):
    return singularity.estimation_variance(t, n, s, rho, d) / (1 - rho**2)


def variance_at_optimal(t, n, s, rho, d):
    return singularity.estimation_variance(t, n, s, -rho, d)


test_S4_variance_of_a_fit_rejects = rejects(
    test_S4_variance_of_a_fit,
    variance={
        "n for n-d-1": first_order_variance,
        "Var x_t not squared": variance_over_variance,
        "no 1-rho^2": variance_without_coupling,
        "OT for WT": variance_at_optimal,
    },
)


@claim(-4, lambda rho: 1 - rho**2, 2, examples=30, s=scales, rho=rhos)
def test_S4_ends_and_middle(power, mitigation, power_of_A, s, rho):
    """s^-4 from end to end; 1-rho^2 of rFM's at 0; A^2/(n s^2 (1-rho^2)) at tc, n large."""
    n = 10**15
    start, end = (singularity.estimation_variance(t, n, s, rho) for t in (0.0, 1.0))
    close(start / end * s**4, s ** (power + 4), 16)
    close(start / singularity.estimation_variance(0.0, n, s), mitigation(rho), 16)
    A, tc = completed_square(s, rho)
    middle = n * singularity.estimation_variance(tc, n, s, rho) * s**2 * (1 - rho**2)
    close(middle / A**2, A ** (power_of_A - 2), (1 + 1 / s) ** 4 / (1 - rho**2) ** 4)


test_S4_ends_and_middle_rejects = rejects(
    test_S4_ends_and_middle,
    power={"s^-2": -2},
    mitigation={"worst transport removes it": lambda rho: 0, "of the slope": lambda rho: 1 + rho},
    power_of_A={"A for A^2": 1},
)


@claim(
    singularity.collapse_time,
    examples=5,
    n=st.integers(200, 1000),
    d=st.integers(40, 80),
    s=st.floats(0.5, 1.5),
    seed=seeds,
)
def test_S4_collapse(collapse, n, d, s, seed):
    """Where an atom's own weight is one half, to 10 % (limit of large d); ln n = I(x_0; x_t)."""
    t = collapse(n, d, s)
    information = d / 2 * np.log(singularity.variance(t, s) / t**2)
    close(information, np.log(n), 1e4)
    measured = singularity.measured_collapse(n, d, s, 200, rng(seed))
    assert abs(measured / t - 1) < 0.1


test_S4_collapse_rejects = rejects(
    test_S4_collapse,
    collapse={
        "small s, large d": lambda n, d, s: s * (d / (2 * np.log(n))) ** 0.5,
        "distance to the nearest": lambda n, d, s: s * n ** (-1 / d),
        "1/d for 2/d": lambda n, d, s: singularity.collapse_time(n, 2 * d, s),
    },
)


@claim(singularity.effective_number, examples=15, t=times, d=st.integers(1, 9), s=st.floats(0.2, 2))
def test_S4_effective_number(number, t, d, s):
    """n (E w)^2 / E w^2 at |x|^2 = d Var x_t, one coordinate by Gauss-Hermite quadrature."""
    x = singularity.variance(t, s) ** 0.5
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)
    assume(t > 0.3 * s)
    w = np.exp(-((x - (1 - t) * s * nodes) ** 2) / (2 * t**2))
    weights /= weights.sum()
    per_coordinate = (weights @ w) ** 2 / (weights @ w**2)
    assert abs(number(t, 50, d, s) / (50 * per_coordinate**d) - 1) < 1e-6


def number_without_exponential(t, n, d, s):
    r = singularity.variance(t, s) / t**2
    return n * ((2 * r - 1) ** 0.5 / r) ** d


test_S4_effective_number_rejects = rejects(
    test_S4_effective_number,
    number={
        "all n": lambda t, n, d, s: n,
        "x at the origin": number_without_exponential,
        "1/d": lambda t, n, d, s: singularity.effective_number(t, n, d / 2, s),
    },
)


# ---- The printed table ------------------------------------------------------------------------
test_table = table_test(singularity.table, "S1", "S2", "S3", "S4")
