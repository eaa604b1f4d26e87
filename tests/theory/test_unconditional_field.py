"""B1-B5: theory/unconditional_field.py, on pairs of wtflow's loss. How to read: claims.py."""

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
    rejects,
    rhos,
    rng,
    scales,
    seeds,
    table_test,
    within,
)
from hypothesis import strategies as st
from scipy.integrate import trapezoid
from scipy.special import softmax
from scipy.stats import chi, kstest, spearmanr

import wtflow
from theory import local_transport, mean_se, normal, unconditional_field, worst_transport
from theory.unconditional_field import (
    displacement,
    edge,
    edge_slope,
    field_by_times,
    in_shell,
    pairs_at_any_time,
    radial_field,
    step_from_atom,
    training_set_field,
)

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


# ---- B1 ---------------------------------------------------------------------------------------
@claim(unconditional_field.chi_mean, examples=20, k=st.floats(0.5, 500))
def test_B1_chi_mean(mean, k):
    """E chi_k of scipy."""
    close(mean(k), chi(k).mean(), 1e3 * (1 + k))


test_B1_chi_mean_rejects = rejects(
    test_B1_chi_mean,
    mean={
        "sqrt(k), its limit": lambda k: k**0.5,
        "degrees of freedom off by one": lambda k: unconditional_field.chi_mean(k + 1),
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
    across = chi(m - 1)
    y = np.linspace(a, max(a, m**0.5) + 10, 20_001)
    mean = trapezoid(y * across.pdf(y), y) / trapezoid(across.pdf(y), y)
    assert formula(a * t_max, m, t_max) == pytest.approx(mean, rel=1e-5)
    close(formula(0.0, m, t_max), across.mean(), 1e3 * m)


def displacement_by_all_directions(delta, m, t_max=1.0):
    return displacement(delta, m + 1, t_max)


def displacement_without_end(delta, m, t_max=1.0):
    return np.full_like(delta, unconditional_field.chi_mean(m - 1))


def displacement_upside_down(delta, m, t_max=1.0):
    return unconditional_field.chi_mean(m - 1) ** 2 / displacement(delta, m, t_max)


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
def test_B1_end_of_one_step(formula, m, k, t_max, seed):
    """Off a subspace of k dimensions, one step ends at delta + it: pairs of wtflow's loss.

    The nearest points too, where a step of a time-conditioned field would end at 0.
    """
    x_0 = torch.zeros(6000, k + m, dtype=torch.float64)
    x_0[:, :k] = normal(rng(seed), 6000, k)
    x_t, u = pairs_at_any_time(x_0, wtflow.independent, rng(seed + 1), t_max)
    check_velocity(x_t[:, k:], u[:, k:], lambda delta: formula(delta, m, t_max))
    delta, along = in_shell(x_t[:, k:], u[:, k:], 0.0, 0.1 * t_max)
    within(mean_se(along - formula(delta, m, t_max)), 0)


test_B1_end_of_one_step_rejects = rejects(
    test_B1_end_of_one_step,
    formula={
        "chi_m for chi_{m-1}": displacement_by_all_directions,
        "time-conditioned: to the subspace": lambda delta, m, t_max: -delta,
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
def test_B1_divergence(field, m, delta, t_max):
    """The divergence theorem gives the same conditional mean for a point mass."""
    delta = min(delta, 1.5 * t_max * m**0.5)  # beyond, both parts of the fraction are rounding
    close(field(delta, m, (0.0,), t_max), displacement(delta, m, t_max), 1e8)


def field_without_sink(r, d, scales, t_max=1.0, rho=0.0):
    """Forgets that the noise is where the flow ends."""
    r = np.atleast_1d(r)
    flux = sum(chi.cdf(r / s, d) if s else 1.0 for s in scales)
    return flux / sum(unconditional_field.time_at_radius(r, d, s, t_max, rho) for s in scales)


test_B1_divergence_rejects = rejects(
    test_B1_divergence,
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
        "time-conditioned at t = 0": lambda r, d, scales, t_max, rho: -(1 + rho / scales[0]) * r,
        "no thickness": lambda r, d, scales, t_max, rho: displacement(r, d, t_max),
    },
)


@claim(edge, edge_slope, examples=4, s=st.floats(1e-3, 2e-3))
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
        "edge at s": lambda delta, s, m: edge(delta, s / m**0.5, m),
    },
    slope={
        "sqrt(m) over s sqrt(m)": lambda s, m: 1 / s,
        "exponent": lambda s, m: edge_slope(s, m) * m**0.25,
    },
)


@claim(
    unconditional_field.edge_next,
    examples=10,
    m=st.integers(100, 1000),
    y=st.floats(1.25, 3),
    s=st.floats(1e-5, 1e-4),
)
def test_B1_edge_next(formula, m, y, s):
    """Its error is of second order: at most 20 times the square of the first."""
    delta = y * s * m**0.5
    exact = radial_field(delta, m, (s,))[0]
    first = 1 - unconditional_field.edge_next(delta, s, m) / edge(delta, s, m)
    assert abs(formula(delta, s, m) / exact - 1) < 20 * first**2 + 1e-4


test_B1_edge_next_rejects = rejects(
    test_B1_edge_next,
    formula={
        "the limit": edge,
        "that of a point mass": lambda delta, s, m: edge(delta, s, m) * (1 - 3 / (4 * m)),
        "sign": lambda delta, s, m: (
            2 * edge(delta, s, m) - unconditional_field.edge_next(delta, s, m)
        ),
    },
)


def test_B1_size_of_the_errors():
    """The percentages of README.md."""

    def errors_of_edge(y, m):
        return 100 * (
            edge(y * 1e-3 * m**0.5, 1e-3, m) / radial_field(y * 1e-3 * m**0.5, m, (1e-3,)) - 1
        )

    def error_of_slope(s, m):
        below, above = radial_field(s * m**0.5 * np.array([0.999, 1.001]), m, (s,))
        return 100 * ((above - below) / (0.002 * s * m**0.5) / edge_slope(s, m) - 1)

    assert errors_of_edge(np.array([1.1, 1.2, 1.5]), 400) == pytest.approx(
        [6.0, 0.9, 0.2], abs=0.06
    )
    assert error_of_slope(0.001, 400) == pytest.approx(2.5, abs=0.06)
    for s, m in ((0.001, 100), (0.001, 1600), (0.01, 100), (0.02, 1600), (0.05, 400)):
        assert error_of_slope(s, m) == pytest.approx(45 / m**0.5 + 33 * s * m**0.25, abs=1.5)


def test_B1_position_field():
    """wtflow.PositionField trained on one point: off it, |x1_hat| is B1's to 10 %, at any t."""
    d = 16
    torch.manual_seed(0)
    v_theta = wtflow.PositionField(d, 64)
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
def test_B2_nothing(unconditional, pairs, couple, d, seed):
    """N(0, I): E[(u - v(x_t)) g(x_t)] = 0 with v = 0 for every g, at any correlation too."""
    if isinstance(couple, float):
        couple = partial(worst_transport.gaussian_coupling, s=1.0, rho=couple)
    x_t, u = pairs(normal(rng(seed), 8000, d), couple, rng(seed + 1))
    for g in (x_t, torch.sin(3 * x_t), x_t * x_t.norm(dim=1, keepdim=True)):
        values = ((u - unconditional(x_t)) * g).mean(1)
        within(mean_se(values.view(-1, block_of_plan).mean(1)), 0)


def pairs_of_early_times(x_0, couple, generator):
    return pairs_at_any_time(x_0, couple, generator, 0.9)


def pairs_of_narrower_data(x_0, couple, generator):
    return pairs_at_any_time(0.9 * x_0, couple, generator)


test_B2_nothing_rejects = rejects(
    test_B2_nothing,
    unconditional={"time-conditioned at t = 0": lambda x: -x, "a tenth of it": lambda x: -0.1 * x},
    pairs={"T = 0.9": pairs_of_early_times, "data narrower than noise": pairs_of_narrower_data},
)


@claim(radial_field, examples=10, d=dims, r=st.floats(0.1, 8), rho=rhos)
def test_B2_divergence(field, d, r, rho):
    """As many sources as sinks within each radius."""
    close(field(r, d, (1.0,), 1.0, rho), 0)


test_B2_divergence_rejects = rejects(
    test_B2_divergence,
    field={"T = 0.9": lambda r, d, scales, t_max, rho: radial_field(r, d, scales, 0.9, rho)},
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
        "time-conditioned": lambda r, d, scales: -r,
    },
)


def test_B3_the_small_scale_moves_outwards():
    """The values of README.md: from 2.0 to 2.8, from 5.3 to 1.3; at T = 0.05 both go inwards."""
    radii = 4 * np.array([unconditional_field.SMALL, unconditional_field.LARGE])
    assert np.mean(radii**2) == pytest.approx(16)
    ends = radii + radial_field(radii, 16, tuple(radii / 4))
    assert np.append(radii, ends) == pytest.approx([2.0, 5.29, 2.82, 1.25], abs=0.01)
    assert (radial_field(radii, 16, tuple(radii / 4), 0.05) < 0).all()


# ---- B4 ---------------------------------------------------------------------------------------
@claim(
    local_transport.early_residual,
    examples=10,
    d=st.integers(2, 30),
    s=scales.filter(lambda s: s > 0.3),
    y=st.floats(0.5, 1.5),
)
def test_B4_first_order(first, d, s, y):
    """v = u_0 + O(T), and W6 has the first order: the field of N(0, s^2 I)."""
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
        "T for T/2": lambda x, grad_log_q, rho, t_max: (
            2 * local_transport.early_residual(x, grad_log_q, rho, t_max)
        ),
        "sign": lambda x, grad_log_q, rho, t_max: (
            -local_transport.early_residual(x, grad_log_q, rho, t_max)
        ),
        "none": lambda x, grad_log_q, rho, t_max: 0 * x,
    },
)


# ---- B5 ---------------------------------------------------------------------------------------
@claim(
    step_from_atom,
    examples=15,
    d=dims_from_2,
    b=st.floats(0.01, 15),
    c=st.floats(-6, 6),
    t_max=ranges,
)
def test_B5_step_from_one_atom(step, d, b, c, t_max):
    """The mean of its density by the trapezoid rule; B1's where c = 0; it grows with delta."""
    r = np.linspace(b, max(b, d**0.5 + abs(c)) + 12, 40_001)
    log_f = (d - 2) * np.log(r) - (r + c) ** 2 / 2
    f = np.exp(log_f - log_f.max())
    mean, log_Z = step(b * t_max, c, d, t_max)
    assert mean == pytest.approx(trapezoid(r * f, r) / trapezoid(f, r), rel=1e-4)
    assert log_Z == pytest.approx(np.log(trapezoid(f, r)) + log_f.max(), abs=1e-3)
    assert step(b * t_max, 0.0, d, t_max)[0] == pytest.approx(displacement(b * t_max, d, t_max))
    further, _ = step(b * np.linspace(1, 2, 9) * t_max, np.full(9, c), d, t_max)
    assert (np.diff(further) > -1e-12).all()


def step_with(of_c=lambda c: c, of_d=lambda d: d):
    return lambda delta, c, d, t_max=1.0: step_from_atom(delta, of_c(c), of_d(d), t_max)


test_B5_step_from_one_atom_rejects = rejects(
    test_B5_step_from_one_atom,
    step={
        "a function of delta alone": step_with(of_c=lambda c: 0 * c),
        "sign of c": step_with(of_c=lambda c: -c),
        "chi_d": step_with(of_d=lambda d: d + 1),
    },
)


def atoms_and_points(d, scale, t_max, seed):
    """4 atoms (4, d), and 6 points at distances of the order of T from them."""
    atoms = scale * normal(rng(seed), 4, d)
    x = atoms[torch.arange(6) % 4] + t_max * normal(rng(seed + 1), 6, d)
    return atoms.numpy(), x.numpy()


@claim(
    training_set_field, examples=10, d=st.integers(2, 20), scale=scales, t_max=ranges, seed=seeds
)
def test_B5_field(field, d, scale, t_max, seed):
    """One Euler step under S2's field, averaged over t; the weights by the trapezoid rule in t."""
    atoms, x = atoms_and_points(d, scale, t_max, seed)
    v, weights = field(x, atoms, t_max)

    def exact(x, t):
        return torch.as_tensor(field_by_times(x.numpy(), atoms, t_max))

    x1_hat = wtflow.euler(exact, torch.as_tensor(x)).numpy()
    assert np.allclose(x + v, x1_hat, rtol=1e-7, atol=1e-7)
    t = t_max * np.geomspace(1e-3, 1, 4001)[:, None, None]
    squares = [((x[:, None] - (1 - k) * atoms) ** 2).sum(-1) / k**2 for k in t]
    log_p = -0.5 * np.array(squares) - d * np.log(t)
    mass = trapezoid(t * np.exp(log_p - log_p.max((0, 2), keepdims=True)), np.log(t), axis=0)
    assert np.allclose(weights, mass / mass.sum(1, keepdims=True), atol=1e-3)


def field_of_the_nearest(x, atoms, t_max):
    nearest = ((x[:, None] - atoms) ** 2).sum(-1).argmin(1)
    fields = [training_set_field(x[[k]], atoms[[a]], t_max)[0] for k, a in enumerate(nearest)]
    return np.concatenate(fields), np.eye(len(atoms))[nearest]


def field_weighted_by_distance(x, atoms, t_max):
    delta = np.linalg.norm(x[:, None] - atoms, axis=-1)
    weights = softmax((1 - x.shape[1]) * np.log(delta), axis=1)
    fields = [training_set_field(x, atoms[[a]], t_max)[0] for a in range(len(atoms))]
    return np.einsum("nk,kni->ni", weights, fields), weights


test_B5_field_rejects = rejects(
    test_B5_field,
    field={
        "the nearest atom alone": field_of_the_nearest,
        "delta^-(d-1) alone": field_weighted_by_distance,
        "all times": lambda x, atoms, t_max: training_set_field(x, atoms),
    },
)


def test_B5_lone_atom_ranks_by_distance_and_new_points_do_not():
    """The numbers of README.md: 300 atoms and 100 new points of N(0, I), d = 20."""
    d = 20
    x, atoms = normal(rng(0), 100, d).numpy(), normal(rng(1), 300, d).numpy()
    v, weights = training_set_field(x, atoms)
    distance = np.linalg.norm(x[:, None] - atoms, axis=-1)
    nearest = weights[np.arange(100), distance.argmin(1)]
    x1_hat, delta = np.linalg.norm(x + v, axis=1), distance.min(1)
    size = np.linalg.norm(x, axis=1)
    ranks = spearmanr(x1_hat, size)[0], spearmanr(x1_hat, delta)[0]
    assert [np.median(nearest), *ranks] == pytest.approx([0.02, 0.99, 0.81], abs=0.006)
    away = normal(rng(2), 100, d).numpy()
    away *= np.linspace(0.02, 0.2, 100)[:, None] * d**0.5 / np.linalg.norm(away, axis=1)[:, None]
    v, weights = training_set_field(atoms[:100] + away, atoms)
    assert weights[np.arange(100), np.arange(100)].min() > 0.99999
    half = (5**0.5 - 1) / 2
    a = np.zeros((1, 40_000))
    a[0, 0] = 200.0  # of norm sqrt(d)
    for side, step in ((1, half), (-1, 1 + half)):
        v, _ = training_set_field(a * (1 + side * 1e-3), a)
        assert np.linalg.norm(v) / 200 == pytest.approx(step, rel=1e-3)


# ---- The printed table ------------------------------------------------------------------------
test_table = table_test(unconditional_field.table, "B1", "B2", "B3", "B4", "B5")
