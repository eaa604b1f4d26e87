"""W5, W6, W8-W10: theory/local_transport.py, wtflow.worst. How to read: claims.py."""

from functools import partial

import numpy as np
import pytest
import torch
from claims import (
    P,
    claim,
    close,
    dims,
    dims_from_2,
    point_and_means,
    rejects,
    rhos,
    rhos_to_1,
    rng,
    seeds,
    table_test,
    within,
)
from hypothesis import assume
from hypothesis import strategies as st
from scipy.stats import chi, kstest
from torch.nn.functional import normalize

import wtflow
from theory import learned_field, local_transport, mean_se, normal, singularity, std_se
from theory.worst_transport import gaussian_coupling, signal_to_noise

sizes = st.floats(0.01, 100)  # of x_0, which the noise does not depend on


# ---- W5 ---------------------------------------------------------------------------------------
@claim(wtflow.worst, examples=12, rho=rhos, d=dims, size=sizes, seed=seeds)
def test_W5_noise(couple, rho, d, size, seed):
    """Given x_0: N(-rho sqrt(d) e, (1 - rho^2) I), e = x_0/|x_0|, whatever |x_0|; 0: rFM."""
    x_0 = size * normal(rng(seed), 2000, d)
    x_1 = couple(x_0, rng(seed + 1), rho)
    z = (x_1 + rho * d**0.5 * normalize(x_0)) / (1 - rho**2) ** 0.5
    assert kstest(z.ravel().numpy(), "norm").pvalue > P
    assert kstest(z.norm(dim=1).numpy(), chi(d).cdf).pvalue > P
    within(mean_se((z * normalize(x_0)).sum(1)), 0)
    close(couple(8 * x_0, rng(seed + 1), rho), x_1, 1e3)
    maps = normal(rng(seed), 2, d, 3, 3)  # each position alone; the mean at x_0 = 0 is 0
    maps[0] = 0
    noise = (1 - rho**2) ** 0.5 * wtflow.independent(maps, rng(seed))
    close(couple(maps, rng(seed), rho), noise - rho * d**0.5 * normalize(maps, dim=1), 100)


def linear(x_0, generator, rho):
    """The linear coupling, which follows |x_0|."""
    return gaussian_coupling(x_0, generator, 1.0, rho)


test_W5_noise_rejects = rejects(
    test_W5_noise,
    couple={
        "OT for WT": lambda x_0, generator, rho: wtflow.worst(x_0, generator, -rho),
        "the linear coupling": linear,
    },
)


@claim(local_transport.energy_distribution, examples=10, rho=rhos, d=dims, seed=seeds)
def test_W5_energy(distribution, rho, d, seed):
    """|x_1|^2 has it, of mean d, variance 2d (1-rho^4); covariance I if x_0/|x_0| is uniform."""
    x_1 = wtflow.worst(normal(rng(seed), 8000, d), rng(seed + 1), rho)
    energy = x_1.square().sum(1)
    assert kstest(energy.numpy(), distribution(rho, d).cdf).pvalue > P
    close(distribution(rho, d).mean(), d, 100 * d)
    close(distribution(rho, d).var(), 2 * d * (1 - rho**4), 1e3 * d)
    within(mean_se(x_1[:, 0].square()), 1)
    within(mean_se(x_1[:, 0] * x_1[:, -1]), 1 if d == 1 else 0)


test_W5_energy_rejects = rejects(
    test_W5_energy,
    distribution={"noise": lambda rho, d: local_transport.energy_distribution(0.0, d)},
)


@claim(
    local_transport.initial_field,
    wtflow.conditional_mean,
    examples=15,
    rho=rhos_to_1,
    d=dims,
    seed=seeds,
)
def test_W5_initial_field(field, conditional_mean, rho, d, seed):
    """Minus the gradient of |x|^2/2 + rho sqrt(d) |x|; the conditional mean less x; by pairs."""
    x = normal(rng(seed), 5, d).requires_grad_()
    potential = x.square().sum() / 2 + rho * d**0.5 * x.norm(dim=1).sum()
    (gradient,) = torch.autograd.grad(potential, x)
    x = x.detach()
    size = 10 * (1 + x.abs().max().item()) * d
    close(field(x, rho), -gradient, size)
    close(field(x.numpy(), rho), -gradient.numpy(), size)
    close(conditional_mean(x, rho), x + field(x, rho), size)
    couple = partial(wtflow.worst, rho=rho)
    _, u = singularity.pairs(x[:1].expand(4000, d), couple, 0.0, rng(seed + 1))
    rest = u - field(x[:1], rho)
    within(mean_se(rest.sum(1)), 0, slack=1e-9)
    within(mean_se(rest.square().sum(1)), d * (1 - rho**2), slack=1e-9)


test_W5_initial_field_rejects = rejects(
    test_W5_initial_field,
    field={"that of the linear coupling": lambda x, rho: -(1 + rho) * x},
    conditional_mean={"the other side": lambda x, rho: wtflow.conditional_mean(x, -rho)},
)


@claim(local_transport.gain, examples=10, rho=st.floats(-0.4, 0.95), d=dims_from_2, seed=seeds)
def test_W5_gain(gain, rho, d, seed):
    """At one x_0, |x_0| = 2 sqrt(d), over rFM's 4; (1+rho)/(1-rho) at m2 = d."""
    x_0 = 2 * d**0.5 * normalize(normal(rng(seed), 1, d)).expand(6000, d)
    u = wtflow.worst(x_0, rng(seed + 1), rho) - x_0
    ratio, error = signal_to_noise(u, normalize(x_0[0], dim=0))
    within((ratio / 4, error / 4), gain(rho, d, 4.0 * d))
    close(gain(rho, d, d), (1 + rho) / (1 - rho), 10 / (1 - rho**2) ** 2)


test_W5_gain_rejects = rejects(
    test_W5_gain,
    gain={"m2 / d for d / m2": lambda rho, d, m2: local_transport.gain(rho, m2, d)},
)


# ---- W6 ---------------------------------------------------------------------------------------
def squared_residual(v_theta, x, rho):
    """|x1_hat - E[x_1 | x_0 = x]|^2 by wtflow's functions: -2 d log p."""
    residual = wtflow.euler(v_theta, x) - wtflow.conditional_mean(x, rho)
    return -2 * x.shape[1] * wtflow.log_density(residual)


@claim(squared_residual, examples=8, rho=rhos_to_1, d=dims, seed=seeds)
def test_W6_residual(square, rho, d, seed):
    """|v_theta(x, 0) - u_0(x)|^2, for any v_theta; nothing for the exact field, at every x."""
    A, x = normal(rng(seed + 1), d, d), normal(rng(seed), 20, d)

    def v_theta(x, t):
        return torch.sin(x @ A) + t[:, None]

    u_0 = local_transport.initial_field(x, rho)
    squares = (torch.sin(x @ A) - u_0).square().sum(1)
    close(square(v_theta, x, rho), squares, 100 * (1 + squares.max().item()))
    close(square(lambda x, t: u_0, x, rho), 0, 100 * (1 + x.abs().max().item()) ** 2 * d)


test_W6_residual_rejects = rejects(
    test_W6_residual,
    square={"x1_hat for the residual": lambda v, x, rho: squared_residual(v, x, 0.0)},
)


def mixture(d, seed):
    """log q and its gradient for two Gaussians of width 0.5, on arrays (N, d), away from 0."""
    random = np.random.default_rng(seed)
    mu = random.normal(size=(2, d))
    mu[:, 0] += 3
    width = 0.5

    def log_q(x):
        squares = ((x[:, None] - mu) ** 2).sum(-1)
        return np.logaddexp(*(-squares.T / (2 * width**2)))

    def grad_log_q(x):
        weights = singularity.component_weights(x, 0.0, mu, width)
        return (weights @ mu - x) / width**2

    return mu, log_q, grad_log_q


@claim(local_transport.early_residual, examples=12, rho=rhos, d=st.integers(1, 3), seed=seeds)
def test_W6_early_residual(early_residual, rho, d, seed):
    """The first order of u_t - u_0 at small t, by quadrature: that of v - u_0 at T = 2t."""
    mu, log_q, grad_log_q = mixture(d, seed)
    x, t = mu[:1] + 0.3, 1e-4
    assume(np.linalg.norm(x) > 1)
    u_0 = local_transport.initial_field(x, rho)[0]
    measured = (local_transport.early_field(x[0], t, log_q, rho) - u_0) / t
    predicted = early_residual(x, grad_log_q(x), rho, 2 * t)[0] / t
    assert np.abs(measured - predicted).max() < 0.01 * (1 + np.abs(predicted).max())


def early_residual_of_all_noise(x, grad_log_q, rho, t_max):
    return -t_max / 2 * (grad_log_q - local_transport.initial_field(x, rho))


test_W6_early_residual_rejects = rejects(
    test_W6_early_residual,
    early_residual={
        "no 1 - rho^2": early_residual_of_all_noise,
        "T for T/2": lambda *x: 2 * local_transport.early_residual(*x),
    },
)


def test_W6_numbers_of_the_readme():
    """AUROC of |r| off a thick circle at rho = +-0.9: with 1 - rho^2 alone, rho alone, both."""
    points = [learned_field.thick_circle(8000, rng(k), off=k * 0.8).numpy() for k in (0, 1)]

    def auroc(noise, pull):
        """The first order, with rho = `noise` before grad log q and `pull` before x/|x|."""
        terms = [(x, learned_field.thick_circle_grad_log_q(x)) for x in points]
        r = [(1 - noise**2) * g - local_transport.initial_field(x, pull) for x, g in terms]
        return learned_field.auroc(*(np.linalg.norm(y, axis=1) for y in r))

    found = [auroc(0, 0), auroc(0.9, 0), auroc(0, 0.9), auroc(0.9, 0.9), auroc(-0.9, -0.9)]
    assert found == pytest.approx([0.93, 0.81, 0.92, 0.61, 0.93], abs=0.015)


# ---- W8 ---------------------------------------------------------------------------------------
@claim(local_transport.rfm_point, examples=40, d=dims, t=st.floats(0.05, 1), rho=rhos, seed=seeds)
def test_W8_clock(point, d, t, rho, seed):
    """E[x_0 | x_t] of the linear coupling by Bayes, of a training set: rFM's by the other clock."""
    x, mu = point_and_means(d, seed)
    signal, noise = 1 - t * (1 + rho), t * (1 - rho**2) ** 0.5
    log_weights = -((x - signal * mu) ** 2).sum(1) / (2 * noise**2)
    weights = np.exp(log_weights - log_weights.max())
    mean = weights @ mu / weights.sum()
    other, time = point(x[None], t, rho)
    assume(time < 1 - 1e-6)
    rfm = singularity.posterior(other, time, mu, 0.0)[0][0]
    condition = (1 + np.abs(log_weights).max()) * (1 + np.abs(mu).max()) * (1 + 1 / (1 - time))
    close(mean, rfm, 10 * condition)


def clock_without_root(x, t, rho):
    other, time = local_transport.rfm_point(x, t, rho)
    return other, time * (1 - rho**2) ** 0.5


def point_not_turned(x, t, rho):
    other, time = local_transport.rfm_point(x, t, rho)
    return np.copysign(other, x), time


test_W8_clock_rejects = rejects(
    test_W8_clock,
    point={"another clock": clock_without_root, "the signal's sign": point_not_turned},
)


@claim(local_transport.rfm_point, examples=15, d=dims_from_2, rho=rhos, seed=seeds)
def test_W8_residual(point, d, rho, seed):
    """Pairs of wtflow.worst on the shell: r_t = (x_0 - E[x_0 | x_t]) / t is orthogonal to x_t."""
    atoms = d**0.5 * normalize(normal(rng(seed), 4, d))
    x_0 = atoms[torch.randint(4, (2000,), generator=rng(seed + 1))]
    for ratio in (0.7, 1.5, -3.0):  # the last after the signal has turned round
        t = local_transport.time_of_ratio(ratio, rho)
        if not 0 < t <= 1:
            continue
        x_t, u = singularity.pairs(x_0, partial(wtflow.worst, rho=rho), t, rng(seed + 2))
        other, time = point(x_t.numpy(), t, rho)
        mean = torch.as_tensor(singularity.posterior(other, time, atoms.numpy(), 0.0)[0])
        r = (x_t - mean) / t - u
        close(r, (x_0 - mean) / t, 100 * (1 + 1 / t) * x_t.abs().max().item())
        for g in (x_t, torch.sin(2 * x_t), torch.ones_like(x_t)):
            within(mean_se((t * r * g).mean(1)), 0, slack=1e-9)


test_W8_residual_rejects = rejects(
    test_W8_residual,
    point={
        "rFM's own clock": lambda x, t, rho: (x, t),
        "OT for WT": lambda x, t, rho: local_transport.rfm_point(x, t, -rho),
    },
)


@claim(
    local_transport.noise_to_signal,
    local_transport.sensitivity,
    examples=15,
    rho=rhos,
    d=dims_from_2,
    ratio=st.floats(0.3, 3),
    seed=seeds,
)
def test_W8_ratio(noise_to_signal, sensitivity, rho, d, ratio, seed):
    """Of wtflow.worst on the shell and off it; its logarithmic derivative; rFM's t / (1-t)."""
    t = local_transport.time_of_ratio(ratio, rho)
    e = normalize(normal(rng(seed), 1, d))
    for length in (1.0, 1.3):
        x_0 = length * d**0.5 * e.expand(4000, d)
        measured = local_transport.ratio_of_pairs(x_0, t, rho, rng(seed + 1))
        within(measured, noise_to_signal(t, rho, length))
    close(noise_to_signal(t, rho), ratio, 100 * (1 + ratio**2) / (1 - rho**2))
    h = 1e-5
    up, down = (np.log(abs(noise_to_signal(t, rho, np.exp(k * h)))) for k in (1, -1))
    assert sensitivity(ratio, rho) == pytest.approx(
        (up - down) / (2 * h), abs=1e-4 * (1 + ratio**3)
    )
    close(local_transport.time_of_ratio(ratio, 0.0), ratio / (1 + ratio), 4)


test_W8_ratio_rejects = rejects(
    test_W8_ratio,
    noise_to_signal={
        "no length": lambda t, rho, length=1.0: local_transport.noise_to_signal(t, rho),
    },
    sensitivity={"no root": lambda ratio, rho: -ratio * rho},
)


# ---- W9 ---------------------------------------------------------------------------------------
@claim(local_transport.discount, examples=20, rho=rhos_to_1, size=st.floats(0.2, 5), seed=seeds)
def test_W9_discount(discount, rho, size, seed):
    """d log|r| / d log|x| of wtflow's residual of v = 0; r has the direction of x."""
    d = 7
    x = size * d**0.5 * normalize(normal(rng(seed), 10, d))
    assume(abs(size + rho) > 0.05)
    h = 1e-5
    r, up, down = (local_transport.untrained_residual(x * np.exp(k * h), rho) for k in (0, 1, -1))
    slope = (up.norm(dim=1).log() - down.norm(dim=1).log()) / (2 * h)
    assert np.allclose(slope, discount(size, rho), atol=1e-4 / abs(size + rho))
    cosine = (normalize(r) * normalize(x)).sum(1)
    close(cosine, np.sign(size + rho), 10)


test_W9_discount_rejects = rejects(
    test_W9_discount,
    discount={
        "the linear coupling's": lambda length, rho: 1.0,
        "OT for WT": lambda length, rho: 1 / (1 - rho / length),
    },
)


@claim(
    local_transport.score_spread,
    examples=8,
    tau=st.floats(0.1, 0.2),
    d=st.integers(80, 160),
    rho=st.floats(0, 0.95),
    narrow=st.floats(0.1, 1),
    seed=seeds,
)
def test_W9_spread(spread, tau, d, rho, narrow, seed):
    """Of 8,000 points of widths from `narrow` to 1, to 2 % of the next order."""
    widths = torch.linspace(narrow, 1, d, dtype=torch.float64)
    widths = widths / widths.square().mean() ** 0.5
    generator = rng(seed)
    x = (tau * normal(generator, 8000, 1)).exp() * widths * normal(generator, 8000, d)
    close(spread(tau, d, rho, d) * (1 + rho), (tau**2 + 1 / (2 * d)) ** 0.5, 10)  # S = I
    predicted = spread(tau, d, rho, d / widths.pow(4).mean().item())
    within(std_se(local_transport.log_scores(x, rho)), predicted, slack=0.02 * predicted)


test_W9_spread_rejects = rejects(
    test_W9_spread,
    spread={
        "only tau is discounted": lambda tau, d, rho, effective: (
            (tau**2 / (1 + rho) ** 2 + 1 / (2 * d)) ** 0.5
        ),
        "nothing is": lambda tau, d, rho, effective: (tau**2 + 1 / (2 * d)) ** 0.5,
    },
)


# ---- W10 --------------------------------------------------------------------------------------
@claim(
    local_transport.ridge_residual,
    examples=12,
    n=st.integers(12, 60),
    d=st.integers(1, 6),
    penalty=st.sampled_from([0.0, 0.1, 1.0]),
    rho=rhos,
    seed=seeds,
)
def test_W10_ridge(residual, n, d, penalty, rho, seed):
    """Mean and variance over 3,000 fits of data that are not Gaussian; Mahalanobis at penalty 0."""
    x_0, x = normal(rng(seed), n, d).exp() - 1, 3 * normal(rng(seed + 1), 1, d)
    mean, variance = residual(x, x_0, penalty, rho)
    fits = local_transport.fit_ridge(x_0, penalty, rho, 3000, rng(seed + 2))
    r = (x @ fits + (1 + rho) * x)[:, 0]
    for k in range(d):
        within(mean_se(r[:, k]), mean[0, k].item(), slack=1e-9)
    within(mean_se((r - mean).square().mean(1)), variance.item())
    inverse = torch.linalg.inv(x_0.T @ x_0)
    mahalanobis = (1 - rho**2) * (x @ inverse * x).sum().item()
    if penalty == 0:
        close(
            variance.item(),
            mahalanobis,
            1e4 * (1 + mahalanobis) * torch.linalg.cond(inverse).item(),
        )


def ridge_of_all_noise(x, x_0, penalty, rho):
    mean, variance = local_transport.ridge_residual(x, x_0, penalty, rho)
    return mean, variance / (1 - rho**2)


def ridge_of_rfm_bias(x, x_0, penalty, rho):
    mean, variance = local_transport.ridge_residual(x, x_0, penalty, rho)
    return mean / (1 + rho), variance


test_W10_ridge_rejects = rejects(
    test_W10_ridge,
    residual={"rFM's noise": ridge_of_all_noise, "rFM's bias": ridge_of_rfm_bias},
)


def test_W10_numbers_of_the_readme():
    """AUROC off a thick circle, of regressions of 256 points: 20 data sets, to 0.01."""
    generator = rng(0)
    points = [learned_field.thick_circle(2000, generator, off=off).double() for off in (0.0, 0.8)]
    expected = {-0.9: 0.758, 0.0: 0.869, 0.5: 0.905, 0.9: 0.930}
    for rho, area in expected.items():
        areas = []
        for _ in range(20):
            x_0 = learned_field.thick_circle(256, generator).double()
            (B,) = local_transport.fit_ridge(x_0, 0.1, rho, 1, generator)
            scores = ((x @ B + (1 + rho) * x).norm(dim=1).numpy() for x in points)
            areas.append(learned_field.auroc(*scores))
        assert np.mean(areas) == pytest.approx(area, abs=0.02 if rho < 0 else 0.01)


# ---- The printed table ------------------------------------------------------------------------
test_table = table_test(local_transport.table, "W5", "W6", "W8", "W9", "W10")
