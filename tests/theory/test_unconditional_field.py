"""B1-B3, B6: theory/unconditional_field.py, on pairs of wtflow's loss. How to read: claims.py."""

from functools import partial

import numpy as np
import pytest
import torch
from claims import P, claim, close, dims, dims_from_2, rejects, rhos, rng, seeds, table_test, within
from hypothesis import strategies as st
from scipy.integrate import trapezoid
from scipy.stats import chi, kstest

import wtflow
from theory import mean_se, normal, singularity, unconditional_field, worst_transport
from theory.learned_field import auroc
from theory.unconditional_field import (
    displacement,
    gaussian_score,
    in_shell,
    pairs_at_any_time,
    radial_field,
)

scales_of_two = st.tuples(st.floats(0.2, 1.0), st.floats(1.0, 1.5))


def check_velocity(x_t, u, predicted):
    """E[u | |x_t|] along x_t is `predicted`(radii): against functions of |x_t|, over all radii."""
    radii, along = in_shell(x_t, u, 0.0, np.inf)
    grid = np.geomspace(*np.quantile(radii, [0.002, 0.998]), 40)
    inside = (radii > grid[0]) & (radii < grid[-1])
    radii, along = radii[inside], along[inside]
    rest = along - np.interp(radii, grid, predicted(grid))
    rank = radii.argsort().argsort() / len(radii)
    slack = 2e-3 * np.abs(along).mean()  # of the interpolation
    for weight in (np.ones_like(rank), rank - 0.5, np.cos(np.pi * rank), rank < 0.1):
        within(mean_se(rest * weight), 0, slack)


# ---- What is averaged -------------------------------------------------------------------------
@claim(pairs_at_any_time, examples=8, t_max=st.floats(0.05, 1.0), d=dims, seed=seeds)
def test_B1_pairs(pairs, t_max, d, seed):
    """As x_0 = 0, x_t = t u: the ratio of the two is t ~ U(0, T), and u is the coupling's noise."""
    x_0 = torch.zeros(2000, d, dtype=torch.float64)
    x_t, u = pairs(x_0, wtflow.independent, rng(seed), t_max)
    t = (x_t[:, 0] / u[:, 0]).numpy()
    close(x_t.numpy(), t[:, None] * u.numpy(), 100 * u.abs().max().item())
    assert kstest(t / t_max, "uniform").pvalue > P
    assert kstest(u.norm(dim=1).numpy(), chi(d).cdf).pvalue > P
    x_0 = torch.ones(2, 1, dtype=torch.float64)
    x_t, u = pairs(x_0, lambda x_0, generator: 5 * x_0, rng(seed), t_max)
    assert torch.equal(u, 4 * x_0) and (x_t >= 1).all() and (x_t <= 1 + 4 * t_max).all()


test_B1_pairs_rejects = rejects(
    test_B1_pairs,
    pairs={"T = 1 whatever T is": lambda x, couple, g, t_max: pairs_at_any_time(x, couple, g)},
)


def test_B1_parts_in_a_shell():
    """Of radii 5 and 1 only the first lies in the shell, where u has 3/5 + 8/5 along x_t."""
    x_t = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    u = torch.tensor([[1.0, 2.0], [7.0, 7.0], [7.0, 7.0]], dtype=torch.float64)
    radii, along = in_shell(x_t, u, 2.0, 6.0)
    assert radii.tolist() == [5] and along == pytest.approx([11 / 5])
    assert in_shell(x_t, u, 0.0, 5.0)[0].tolist() == [1, 2]


# ---- B1 ---------------------------------------------------------------------------------------
@claim(displacement, unconditional_field.chi_mean, examples=12, m=dims_from_2, a=st.floats(0, 15))
def test_B1_conditional_mean(formula, mean, m, a):
    """E[chi_{m-1} | chi_{m-1} > delta] by quadrature, E chi_{m-1} as delta -> 0."""
    across = chi(m - 1)
    y = np.linspace(a, max(a, m**0.5) + 10, 20_001)
    expected = trapezoid(y * across.pdf(y), y) / trapezoid(across.pdf(y), y)
    assert formula(a, m) == pytest.approx(expected, rel=1e-4)
    close(formula(0.0, m), across.mean(), 1e3 * m)
    close(mean(m + a), chi(m + a).mean(), 1e3 * (m + a))


def displacement_by_all_directions(delta, m):
    return displacement(delta, m + 1)


test_B1_conditional_mean_rejects = rejects(
    test_B1_conditional_mean,
    formula={
        "chi_m for chi_{m-1}": displacement_by_all_directions,
        "no condition": lambda delta, m: unconditional_field.chi_mean(m - 1) + 0 * delta,
    },
    mean={"sqrt(k), its limit": lambda k: k**0.5},
)


@claim(displacement, examples=6, m=st.integers(3, 40), k=st.integers(1, 5), seed=seeds)
def test_B1_end_of_one_step(formula, m, k, seed):
    """Off a subspace of k dimensions, one step ends at delta + it: pairs of wtflow's loss.

    The nearest points too, where a step of a time-conditioned field would end at 0.
    """
    x_0 = torch.zeros(6000, k + m, dtype=torch.float64)
    x_0[:, :k] = normal(rng(seed), 6000, k)
    x_t, u = pairs_at_any_time(x_0, wtflow.independent, rng(seed + 1))
    check_velocity(x_t[:, k:], u[:, k:], lambda delta: formula(delta, m))
    delta, along = in_shell(x_t[:, k:], u[:, k:], 0.0, 0.1)
    within(mean_se(along - formula(delta, m)), 0)


test_B1_end_of_one_step_rejects = rejects(
    test_B1_end_of_one_step,
    formula={
        "chi_m for chi_{m-1}": displacement_by_all_directions,
        "time-conditioned: to the subspace": lambda delta, m: -delta,
    },
)


@claim(radial_field, examples=8, m=st.integers(3, 60), delta=st.floats(0.01, 3))
def test_B1_divergence(field, m, delta):
    """The divergence theorem gives the same conditional mean for a point mass."""
    close(field(delta, m, (0.0,)), displacement(delta, m), 1e8)


test_B1_divergence_rejects = rejects(
    test_B1_divergence, field={"inwards": lambda r, d, scales: -radial_field(r, d, scales)}
)


@claim(lambda delta: (np.pi / 2) ** 0.5 / np.log(1 / delta), examples=8, log=st.floats(-12, -4))
def test_B1_no_jump_across_one_direction(limit, log):
    """m = 1: as delta -> 0 the displacement falls to 0, but only like 1 / ln(1/delta)."""
    delta = np.exp(log)
    y = np.geomspace(delta, 40, 20_001)
    exact = chi.sf(delta, 1) / trapezoid(chi.pdf(y, 1), np.log(y))  # B1 before it is simplified
    assert abs(limit(delta) / exact - 1) < 0.5 / abs(log)


@claim(radial_field, examples=2, d=st.integers(2, 40), s=st.floats(0.1, 0.8), seed=seeds)
def test_B1_thickness(field, d, s, seed):
    """N(0, s^2 I) by pairs of wtflow's loss, at Gaussian couplings."""
    x_0 = s * normal(rng(seed), 6000, d)
    for rho in (-0.8, 0.0, 0.8):
        couple = partial(worst_transport.gaussian_coupling, s=s, rho=rho)
        x_t, u = pairs_at_any_time(x_0, couple, rng(seed + 1))
        check_velocity(x_t, u, lambda r, rho=rho: field(r, d, (s,), rho))


test_B1_thickness_rejects = rejects(
    test_B1_thickness,
    field={
        "OT for WT": lambda r, d, scales, rho: radial_field(r, d, scales, -rho),
        "no thickness": lambda r, d, scales, rho: displacement(r, d),
    },
)


def test_B1_position_field():
    """wtflow.PositionField without t, trained on one point: off it, |x1_hat| is B1's to 10 %."""
    d = 16
    torch.manual_seed(0)
    network = wtflow.PositionField(d, 64)
    optimiser = torch.optim.AdamW(network.parameters(), 0.01)

    def v_theta(x, t):  # which does not see t
        return network(x, torch.zeros_like(t))

    generator = rng(0)
    x_0 = torch.zeros(256, d)
    for _ in range(250):
        optimiser.zero_grad()
        loss = wtflow.flow_matching_loss(v_theta, x_0, wtflow.independent, generator)
        loss.mean().backward()
        optimiser.step()
    network.eval().requires_grad_(False)
    x = torch.nn.functional.normalize(torch.randn(500, d, generator=generator))
    x1_hat = wtflow.euler(v_theta, x)
    assert x1_hat.norm(dim=1).mean().item() == pytest.approx(1 + displacement(1.0, d), rel=0.1)


# ---- B2 ---------------------------------------------------------------------------------------
PLAN = 256  # rows of one plan of wtflow.optimal: one value of the mean
EXCHANGEABLE = [wtflow.independent, worst_transport.minibatch_worst, wtflow.optimal]


@claim(
    lambda x: 0 * x,
    pairs_at_any_time,
    examples=9,
    couple=st.sampled_from(EXCHANGEABLE) | rhos,
    d=dims,
    seed=seeds,
)
def test_B2_nothing(unconditional, pairs, couple, d, seed):
    """N(0, I): E[(u - v(x_t)) g(x_t)] = 0 with v = 0 for every g, at any correlation too."""
    if isinstance(couple, float):
        couple = partial(worst_transport.gaussian_coupling, s=1.0, rho=couple)
    x_t, u = pairs(normal(rng(seed), 64 * PLAN, d), couple, rng(seed + 1))
    for g in (x_t, torch.sin(3 * x_t), x_t * x_t.norm(dim=1, keepdim=True)):
        values = ((u - unconditional(x_t)) * g).mean(1)
        within(mean_se(values.view(-1, PLAN).mean(1)), 0)


test_B2_nothing_rejects = rejects(
    test_B2_nothing,
    unconditional={"a tenth of the time-conditioned one at t = 0": lambda x: -0.1 * x},
    pairs={
        "T = 0.9": lambda x, couple, g: pairs_at_any_time(x, couple, g, 0.9),
        "data narrower than noise": lambda x, couple, g: pairs_at_any_time(0.9 * x, couple, g),
    },
)


# ---- B3 ---------------------------------------------------------------------------------------
@claim(radial_field, examples=5, d=st.integers(2, 30), pair=scales_of_two, seed=seeds)
def test_B3_two_scales(field, d, pair, seed):
    """Data of two scales by pairs of wtflow's loss."""
    x_0 = unconditional_field.scales_mixture(8000, d, pair, rng(seed))
    x_t, u = pairs_at_any_time(x_0, wtflow.independent, rng(seed + 1))
    check_velocity(x_t, u, lambda r: field(r, d, pair))


def field_of_mean_scale(r, d, scales):
    return radial_field(r, d, (np.mean(np.square(scales)) ** 0.5,))


test_B3_two_scales_rejects = rejects(
    test_B3_two_scales,
    field={
        "one scale of the same energy": field_of_mean_scale,
        "only the larger": lambda r, d, scales: radial_field(r, d, scales[1:]),
    },
)


def test_B3_the_small_scale_moves_outwards():
    """The values of README.md: from 2.0 to 2.8, from 5.3 to 1.3; AUROC 0.073 and 0.93.

    The AUROC of points 2 and 0.85 times as long as noise, in 20,000 quantiles of each length.
    """
    radii = 4 * np.array([unconditional_field.SMALL, unconditional_field.LARGE])
    assert np.mean(radii**2) == pytest.approx(16)
    ends = radii + radial_field(radii, 16, tuple(radii / 4))
    assert np.append(radii, ends) == pytest.approx([2.0, 5.29, 2.82, 1.25], abs=0.01)
    length = chi(16).ppf((np.arange(20_000) + 0.5) / 20_000)
    grid = np.linspace(0.2, 18, 600)
    x1_hat = np.abs(grid + radial_field(grid, 16, tuple(radii / 4)))
    normal_scores = np.concatenate([np.interp(length * s / 4, grid, x1_hat) for s in radii])
    areas = [auroc(normal_scores, np.interp(length * scale, grid, x1_hat)) for scale in (2.0, 0.85)]
    assert areas == pytest.approx([0.073, 0.93], abs=0.003)


# ---- B6 ---------------------------------------------------------------------------------------
@claim(gaussian_score, examples=8, d=st.integers(1, 6), time=st.floats(0.1, 0.9), seed=seeds)
def test_B6_score_of_the_exact_residual_of_noise(score, d, time, seed):
    """q = N(0, I), few maps: r_t is a multiple of x_0 for every z, and its score that of x_0."""

    def exact(x, t):
        return singularity.slope(time, 1.0) * x

    x_0, new = normal(rng(seed), 30, d, 2, 4), normal(rng(seed + 1), 5, d, 2, 4)
    z = normal(rng(seed + 2), 1, d, 2, 4)
    r, r_new = (wtflow.residual(exact, x, z, time, 0.0) for x in (x_0, new))
    expected = time / singularity.variance(time, 1.0) * x_0
    assert torch.allclose(r, expected, atol=1e-5)
    assert torch.allclose(score(r, r_new), score(x_0, new), rtol=1e-3)


test_B6_score_of_the_exact_residual_of_noise_rejects = rejects(
    test_B6_score_of_the_exact_residual_of_noise,
    score={"length": lambda r, new: new.square().sum(1).mean((1, 2)).sqrt()},
)


@claim(
    lambda v: v,
    wtflow.residual,
    examples=8,
    d=st.integers(2, 5),
    time=st.floats(0.0, 0.9),
    seed=seeds,
)
def test_B6_an_affine_field_adds_nothing(kind, residual, d, time, seed):
    """v = B x + b, wtflow's Gaussians of 4,000 maps: to their shrinkage, n_0 / n, the score of x_0.

    Anomalies of every size; z is one for all, as in use.
    """
    turn, _ = torch.linalg.qr(normal(rng(seed), d, d))
    B = 0.3 * turn  # r = (1 + (1-t) B) x_0 + .. is well conditioned
    b = normal(rng(seed + 1), d, 1, 1)
    v = kind(lambda x, t: torch.einsum("ij,njhw->nihw", B, x) + b)
    x_0, z = normal(rng(seed + 2), 4000, d, 2, 2), normal(rng(seed + 3), 1, d, 2, 2)
    new = 3 * normal(rng(seed + 4), 50, d, 2, 2)
    r, r_new = (residual(v, x, z, time, 0.0) for x in (x_0, new))
    assert torch.allclose(gaussian_score(r, r_new), gaussian_score(x_0, new), rtol=0.01)


def with_discount_of_length(v):  # the term of worst transport, W9
    return lambda x, t: v(x, t) + torch.nn.functional.normalize(x, dim=1)


test_B6_an_affine_field_adds_nothing_rejects = rejects(
    test_B6_an_affine_field_adds_nothing,
    kind={
        "not affine": lambda v: lambda x, t: v(x, t).tanh(),
        "affine and x/|x|": with_discount_of_length,
    },
    residual={"worst": lambda v, x_0, z, t, rho: wtflow.residual(v, x_0, z, t, 0.5)},
)


# ---- The printed table ------------------------------------------------------------------------
test_table = table_test(unconditional_field.table, "B1", "B2", "B3", "B6")
