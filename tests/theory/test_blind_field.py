"""B1-B4: theory/blind_field.py, on pairs of wtflow's loss. How to read: claims.py."""

from functools import partial

import numpy as np
import pytest
import torch
from claims import (
    P,
    check_rows,
    claim,
    close,
    dims,
    dims_from_2,
    rejects,
    rhos,
    rng,
    scales,
    seeds,
    within,
)
from hypothesis import strategies as st
from scipy.integrate import trapezoid
from scipy.stats import chi, kstest

import wtflow
from theory import blind_field, mean_se, normal, strength, worst_transport
from theory.blind_field import displacement, in_shell, pairs_at_any_time, radial_field

ranges = st.floats(0.05, 1.0)  # of t
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
@claim(pairs_at_any_time, examples=8, t_max=ranges, d=dims, seed=seeds)
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


def pairs_of_all_times(x_0, couple, generator, t_max):
    return pairs_at_any_time(x_0, couple, generator)


test_B1_pairs_rejects = rejects(test_B1_pairs, pairs={"T = 1 whatever T is": pairs_of_all_times})


def test_B1_parts_in_a_shell():
    """Of radii 5 and 1 only the first lies in the shell, where u has 3/5 + 8/5 along x_t."""
    x_t = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
    u = torch.tensor([[1.0, 2.0], [7.0, 7.0], [7.0, 7.0]], dtype=torch.float64)
    radii, along = in_shell(x_t, u, 2.0, 6.0)
    assert radii.tolist() == [5] and along == pytest.approx([11 / 5])
    assert in_shell(x_t, u, 0.0, 5.0)[0].tolist() == [1, 2]


def test_B1_factor_and_its_standard_error():
    """That of a fitted factor is its spread over repetitions, to 30 %, 5 standard errors at 120."""
    fits = []
    for seed in range(120):
        predicted = normal(rng(seed), 300, 3)
        noise = predicted * normal(rng(1000 + seed), 300, 3)
        fits.append(blind_field.slope_on(-2 * predicted + noise, predicted))
    factors, errors = np.transpose(fits)
    within(mean_se(factors), -2)
    assert 0.7 < factors.std() / errors.mean() < 1.3


# ---- B1 ---------------------------------------------------------------------------------------
@claim(blind_field.chi_mean, examples=20, k=st.floats(0.5, 500))
def test_B1_chi_mean(mean, k):
    """E chi_k of scipy."""
    close(mean(k), chi(k).mean(), 1e3 * (1 + k))


test_B1_chi_mean_rejects = rejects(
    test_B1_chi_mean,
    mean={
        "sqrt(k), its limit": lambda k: k**0.5,
        "degrees of freedom off by one": lambda k: blind_field.chi_mean(k + 1),
    },
)


@claim(
    displacement,
    examples=12,
    m=dims_from_2,
    a=st.floats(1e-3, 15),
    t_max=ranges,
)
def test_B1_conditional_mean(formula, m, a, t_max):
    """E[chi_{m-1} | chi_{m-1} > delta / T] by quadrature, E chi_{m-1} as delta -> 0."""
    law = chi(m - 1)
    y = np.linspace(a, max(a, m**0.5) + 10, 20_001)
    mean = trapezoid(y * law.pdf(y), y) / trapezoid(law.pdf(y), y)
    assert formula(a * t_max, m, t_max) == pytest.approx(mean, rel=1e-5)
    close(formula(0.0, m, t_max), law.mean(), 1e3 * m)


def displacement_by_all_directions(delta, m, t_max=1.0):
    return displacement(delta, m + 1, t_max)


def displacement_without_end(delta, m, t_max=1.0):
    return np.full_like(delta, blind_field.chi_mean(m - 1))


def displacement_upside_down(delta, m, t_max=1.0):
    return blind_field.chi_mean(m - 1) ** 2 / displacement(delta, m, t_max)


test_B1_conditional_mean_rejects = rejects(
    test_B1_conditional_mean,
    formula={
        "chi_m for chi_{m-1}": displacement_by_all_directions,
        "no condition": displacement_without_end,
        "the fraction upside down": displacement_upside_down,
    },
)


@claim(
    displacement, examples=6, m=st.integers(3, 40), k=st.integers(1, 5), t_max=ranges, seed=seeds
)
def test_B1_landing(formula, m, k, t_max, seed):
    """Off a subspace of k dimensions, one step lands at delta + it: pairs of wtflow's loss.

    The nearest points too, on which a field told t would land at 0; along the subspace u_0 = -x.
    """
    x_0 = torch.zeros(6000, k + m, dtype=torch.float64)
    x_0[:, :k] = normal(rng(seed), 6000, k)
    x_t, u = pairs_at_any_time(x_0, wtflow.independent, rng(seed + 1), t_max)
    check_velocity(x_t[:, k:], u[:, k:], lambda delta: formula(delta, m, t_max))
    delta, along = in_shell(x_t[:, k:], u[:, k:], 0.0, 0.1 * t_max)
    within(mean_se(along - formula(delta, m, t_max)), 0)


test_B1_landing_rejects = rejects(
    test_B1_landing,
    formula={
        "chi_m for chi_{m-1}": displacement_by_all_directions,
        "told t: to the subspace": lambda delta, m, t_max: -delta,
        "no end of the range": displacement_without_end,
        "inwards": lambda delta, m, t_max: -displacement(delta, m, t_max),
    },
)


@claim(
    radial_field,
    examples=8,
    m=st.integers(3, 60),
    delta=st.floats(0.01, 3),
    t_max=ranges,
)
def test_B1_gauss(field, m, delta, t_max):
    """Gauss's law for a point mass is the same conditional mean."""
    delta = min(delta, 1.5 * t_max * m**0.5)  # beyond, both parts of the fraction are rounding
    close(field(delta, m, (0.0,), t_max), displacement(delta, m, t_max), 1e8)


def field_without_sink(r, d, scales, t_max=1.0, rho=0.0):
    """Forgets that the noise is where the flow ends."""
    r = np.atleast_1d(r)
    flux = sum(chi.cdf(r / s, d) if s else 1.0 for s in scales)
    return flux / sum(blind_field.time_at_radius(r, d, s, t_max, rho) for s in scales)


test_B1_gauss_rejects = rejects(
    test_B1_gauss,
    field={
        "data without noise": field_without_sink,
        "inwards": lambda r, d, scales, t_max: -radial_field(r, d, scales, t_max),
        "all times": lambda r, d, scales, t_max: radial_field(r, d, scales),
    },
)


@claim(
    radial_field,
    examples=6,
    d=st.integers(2, 40),
    s=st.floats(0.1, 1.5),
    rho=rhos,
    t_max=ranges,
    seed=seeds,
)
def test_B1_thickness(field, d, s, rho, t_max, seed):
    """N(0, s^2 I) by pairs of wtflow's loss, at a Gaussian coupling."""
    x_0 = s * normal(rng(seed), 6000, d)
    couple = partial(worst_transport.gaussian_coupling, s=s, rho=rho)
    x_t, u = pairs_at_any_time(x_0, couple, rng(seed + 1), t_max)
    check_velocity(x_t, u, lambda r: field(r, d, (s,), t_max, rho))


def field_of_opposite_coupling(r, d, scales, t_max, rho):
    return radial_field(r, d, scales, t_max, -rho)


test_B1_thickness_rejects = rejects(
    test_B1_thickness,
    field={
        "OT for WT": field_of_opposite_coupling,
        "told t = 0": lambda r, d, scales, t_max, rho: -(1 + rho / scales[0]) * r,
        "no thickness": lambda r, d, scales, t_max, rho: displacement(r, d, t_max),
    },
)


@claim(blind_field.edge, blind_field.edge_slope, examples=4, s=st.floats(1e-3, 2e-3))
def test_B1_edge(edge, slope, s):
    """What is left of the jump at m = 3000: 0 before s sqrt(m), a slope there, the jump after."""
    m = 3000
    start = s * m**0.5
    y = np.array([1.2, 1.5, 3.0])
    exact = radial_field(y * start, m, (s,))
    assert np.allclose(exact, edge(y * start, s, m), rtol=0.01)
    assert edge(0.9 * start, s, m) == 0
    assert radial_field(0.9 * start, m, (s,))[0] < 0.1 * m**0.5
    below, above = radial_field(start * np.array([0.999, 1.001]), m, (s,))
    assert (above - below) / (0.002 * start) == pytest.approx(slope(s, m), rel=0.03)


test_B1_edge_rejects = rejects(
    test_B1_edge,
    edge={
        "no root": lambda delta, s, m: m**0.5 * np.maximum(1 - m * s**2 / delta**2, 0),
        "no edge": lambda delta, s, m: m**0.5,
        "edge at s": lambda delta, s, m: blind_field.edge(delta, s / m**0.5, m),
    },
    slope={
        "sqrt(m) over s sqrt(m)": lambda s, m: 1 / s,
        "exponent": lambda s, m: blind_field.edge_slope(s, m) * m**0.25,
    },
)


def test_B1_point_field():
    """wtflow.PointField trained on one point: off it, it lands at B1's radius to 10 %, at any t."""
    d = 16
    torch.manual_seed(0)
    v_theta = wtflow.PointField(d, 64)
    optimiser = torch.optim.AdamW(v_theta.parameters(), 0.01)
    generator = rng(0)
    x_0 = torch.zeros(256, d)
    for _ in range(250):
        optimiser.zero_grad()
        loss = wtflow.flow_matching_loss(v_theta, x_0, wtflow.independent, generator)
        loss.mean().backward()
        optimiser.step()
    v_theta.eval().requires_grad_(False)
    x = torch.nn.functional.normalize(torch.randn(500, d, generator=generator))
    x1_hat = wtflow.euler(v_theta, x)
    assert x1_hat.norm(dim=1).mean().item() == pytest.approx(1 + displacement(1.0, d), rel=0.1)
    assert torch.equal(x1_hat, x + v_theta(x, torch.full((500,), 0.9)))


# ---- B2 ---------------------------------------------------------------------------------------
block_of_plan = 8  # so that there are many plans, each one value of the mean
EXCHANGEABLE = {
    "rFM": wtflow.independent,
    "WT": partial(worst_transport.minibatch_worst, block=block_of_plan),
    "OT": partial(wtflow.optimal, block=block_of_plan),
}


@claim(
    lambda x: 0 * x,
    pairs_at_any_time,
    examples=12,
    couple=st.sampled_from(list(EXCHANGEABLE.values())) | rhos,
    d=dims,
    seed=seeds,
)
def test_B2_nothing(blind, pairs, couple, d, seed):
    """N(0, I): E[(u - v(x_t)) g(x_t)] = 0 with v = 0 for every g, at any correlation too."""
    if isinstance(couple, float):
        couple = partial(worst_transport.gaussian_coupling, s=1.0, rho=couple)
    x_t, u = pairs(normal(rng(seed), 8000, d), couple, rng(seed + 1))
    for g in (x_t, torch.sin(3 * x_t), x_t * x_t.norm(dim=1, keepdim=True)):
        values = ((u - blind(x_t)) * g).mean(1)
        within(mean_se(values.view(-1, block_of_plan).mean(1)), 0)


def pairs_of_early_times(x_0, couple, generator):
    return pairs_at_any_time(x_0, couple, generator, 0.9)


def pairs_of_narrower_data(x_0, couple, generator):
    return pairs_at_any_time(0.9 * x_0, couple, generator)


test_B2_nothing_rejects = rejects(
    test_B2_nothing,
    blind={"told t = 0": lambda x: -x, "a tenth of it": lambda x: -0.1 * x},
    pairs={"T = 0.9": pairs_of_early_times, "data narrower than noise": pairs_of_narrower_data},
)


@claim(radial_field, examples=10, d=dims, r=st.floats(0.1, 8), rho=rhos)
def test_B2_gauss(field, d, r, rho):
    """As many sources as sinks within each radius."""
    close(field(r, d, (1.0,), 1.0, rho), 0)


test_B2_gauss_rejects = rejects(
    test_B2_gauss,
    field={"T = 0.9": lambda r, d, scales, t_max, rho: radial_field(r, d, scales, 0.9, rho)},
)


# ---- B3 ---------------------------------------------------------------------------------------
@claim(radial_field, examples=5, d=st.integers(2, 30), pair=scales_of_two, seed=seeds)
def test_B3_two_scales(field, d, pair, seed):
    """Data of two scales by pairs of wtflow's loss."""
    x_0 = blind_field.scales_mixture(8000, d, pair, rng(seed))
    x_t, u = pairs_at_any_time(x_0, wtflow.independent, rng(seed + 1))
    check_velocity(x_t, u, lambda r: field(r, d, pair))


def field_of_mean_scale(r, d, scales):
    return radial_field(r, d, (np.mean(np.square(scales)) ** 0.5,))


test_B3_two_scales_rejects = rejects(
    test_B3_two_scales,
    field={
        "one scale of the same energy": field_of_mean_scale,
        "only the larger": lambda r, d, scales: radial_field(r, d, scales[1:]),
        "told t": lambda r, d, scales: -r,
    },
)


@claim(blind_field.scales_mixture, examples=5, d=dims, pair=scales_of_two, seed=seeds)
def test_B3_data(mixture, d, pair, seed):
    """Half of the points from either scale."""
    radius = mixture(4000, d, pair, rng(seed)).norm(dim=1).numpy()

    def cdf(r):
        return (chi(d).cdf(r / pair[0]) + chi(d).cdf(r / pair[1])) / 2

    assert kstest(radius, cdf).pvalue > P


test_B3_data_rejects = rejects(
    test_B3_data,
    mixture={
        "a third scale": lambda n, d, pair, generator: blind_field.scales_mixture(
            n, d, (*pair, 2.0), generator
        )
    },
)


def test_B3_quiet_data_are_sent_out():
    """Two scales at m2 = d: the quiet one is sent out, the loud one in; told t both land at 0."""
    d, pair = 16, (blind_field.BACKGROUND, blind_field.OBJECT)
    assert np.mean(np.square(pair)) == pytest.approx(1)
    quiet, loud = radial_field(np.array(pair) * d**0.5, d, pair)
    assert quiet > 0 and loud < -0.5 * pair[1] * d**0.5


# ---- B4 ---------------------------------------------------------------------------------------
@claim(
    strength.mismatch,
    examples=10,
    d=st.integers(2, 30),
    s=scales.filter(lambda s: s > 0.3),
    y=st.floats(0.5, 1.5),
)
def test_B4_first_order(first, d, s, y):
    """v = u_0 + O(T), and W6 has the first order: the field of N(0, s^2 I) by Gauss's law."""
    t_max = 1e-4 * s**2
    r = y * s * d**0.5
    x = np.zeros((1, d))
    x[0, 0] = r
    order = first(x, -x / s**2, 0.0, t_max)[0, 0]
    rest = radial_field(r, d, (s,), t_max)[0] + r
    assert abs(rest - order) < 2e-3 * t_max * d * (r + r / s**2)


test_B4_first_order_rejects = rejects(
    test_B4_first_order,
    first={
        "T for T/2": lambda x, score, rho, t_max: 2 * strength.mismatch(x, score, rho, t_max),
        "sign": lambda x, score, rho, t_max: -strength.mismatch(x, score, rho, t_max),
        "none": lambda x, score, rho, t_max: 0 * x,
    },
)


# ---- The printed table ------------------------------------------------------------------------
@pytest.fixture(scope="module")
def rows():
    return list(blind_field.table(seed=1))


@pytest.mark.parametrize("name", ["B1", "B2", "B3", "B4"])
def test_table(rows, name):
    check_rows(rows, name)
