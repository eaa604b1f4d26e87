"""W1-W4, W7: theory/worst_transport.py, and the couplings of wtflow. How to read: claims.py."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from claims import (
    P,
    Z,
    candidates,
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
    times,
    within,
)
from hypothesis import assume
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import ndtr
from scipy.stats import chi, kstest
from torch.nn.functional import normalize

import wtflow
from theory import mean_se, normal, singularity, worst_transport
from theory.worst_transport import a_n, worst_candidate


# ---- W1 ---------------------------------------------------------------------------------------
def reordered_noise(plan, n, d, seed):
    """x_0 and noise z (n, d), and the cost of `plan`, which may only reorder z."""
    x_0 = normal(rng(seed), n, d)
    x_1, z = plan(x_0, rng(seed + 1)), wtflow.independent(x_0, rng(seed + 1))
    assert torch.equal(x_1.sort(0).values, z.sort(0).values)
    return x_0, z, (x_0 - x_1).square().sum().item()


def costs_of_all_plans(x_0, z):
    plans = itertools.permutations(range(len(z)))
    return [(x_0 - z[list(plan)]).square().sum().item() for plan in plans]


signs = st.sampled_from([1.0, -1.0])  # of the optimal plan, of the worst


@claim(wtflow.optimal, examples=20, n=st.integers(1, 6), d=dims, sign=signs, seed=seeds)
def test_W1_plan(plan, n, d, sign, seed):
    """Only a reordering of the noise; no other costs less, or none more if the sign is -1."""
    x_0 = normal(rng(seed), n, d)
    x_1, z = plan(x_0, rng(seed + 1), sign), wtflow.independent(x_0, rng(seed + 1))
    assert torch.equal(x_1.sort(0).values, z.sort(0).values)
    cost = (x_0 - x_1).square().sum().item()
    plans = itertools.permutations(range(n))
    costs = [(x_0 - z[list(plan)]).square().sum().item() for plan in plans]
    close(cost, min(costs) if sign > 0 else max(costs), 10 * (1 + max(costs)))
    largest = worst_transport.largest_cost(x_0.numpy(), z.numpy())
    close(largest, max(costs), 10 * (1 + largest))


test_W1_plan_rejects = rejects(
    test_W1_plan,
    plan={
        "OT for WT": lambda x_0, generator, sign: wtflow.optimal(x_0, generator),
        "WT for OT": lambda x_0, generator, sign: wtflow.optimal(x_0, generator, -1.0),
        "no plan at all": lambda x_0, generator, sign: wtflow.independent(x_0, generator),
    },
)


@claim(
    wtflow.optimal,
    examples=20,
    b=st.integers(1, 3),
    h=st.integers(1, 4),
    d=st.integers(1, 3),
    sign=signs,
    seed=seeds,
)
def test_W1_images(plan, b, h, d, sign, seed):
    """(B, d, h, w) is one set of vectors, in blocks of whole images here.

    In one dimension the plan is the sorted one, or the reversed one if the sign is -1.
    """
    x_0 = normal(rng(seed), b, d, h, 4)
    x_1, z = plan(x_0, rng(seed + 1), sign, 4 * h), wtflow.independent(x_0, rng(seed + 1))
    assert x_1.shape == x_0.shape
    for image in range(b):
        data, planned, noise = (x[image].reshape(d, -1).T for x in (x_0, x_1, z))
        assert sorted(map(tuple, planned.tolist())) == sorted(map(tuple, noise.tolist()))
        cost, cost_of_noise = ((data - x).square().sum() for x in (planned, noise))
        assert sign * cost <= sign * cost_of_noise + 1e-9
        if d == 1:
            by_data = planned[data.argsort(0)[:, 0]]
            assert torch.equal(by_data, noise.sort(0, descending=sign < 0).values)


def optimal_on_images(x_0, generator, sign, block):
    return wtflow.optimal(x_0, generator, 1.0, block)


test_W1_images_rejects = rejects(test_W1_images, plan={"OT for WT, on images": optimal_on_images})


@claim(wtflow.optimal, examples=3, seed=seeds)
def test_W1_blocks(plan, seed):
    """By default 256 vectors are matched together: in one dimension the sorted plan of them all."""
    x_0 = normal(rng(seed), 300, 1)
    x_1, z = plan(x_0, rng(seed + 1)), wtflow.independent(x_0, rng(seed + 1))
    for block in (slice(0, 256), slice(256, 300)):
        by_data = x_1[block][x_0[block, 0].argsort()]
        assert torch.equal(by_data, z[block].sort(0).values)


test_W1_blocks_rejects = rejects(
    test_W1_blocks, plan={"half the block": partial(wtflow.optimal, block=128)}
)


# ---- W2 ---------------------------------------------------------------------------------------
def cost_of_worst_map(variances):
    """E|x_1 - x_0|^2 of x_1 = -S^(-1/2) x_0: sum (1 + sqrt(variance))^2, `variances` those of S."""
    return ((1 + variances**0.5) ** 2).sum()


@claim(cost_of_worst_map, examples=15, d=dims, seed=seeds)
def test_W2_worst_map(cost, d, seed):
    """No coupling with covariance C = S^(1/2) K, |K| <= 1, costs more than x_1 = -S^(-1/2) x_0."""
    random = np.random.default_rng(seed)
    B = random.normal(size=(d, d))
    variances, Q = np.linalg.eigh(B @ B.T + 0.1 * np.eye(d))
    root = (Q * variances**0.5) @ Q.T
    predicted = cost(variances)
    marginals = variances.sum() + d
    close(marginals + 2 * np.trace(root), predicted, 10 * d * (1 + variances.sum()))
    for _ in range(20):
        U, _, V = np.linalg.svd(random.normal(size=(d, d)))
        K = (U * random.uniform(0, 1, d)) @ V
        assert marginals - 2 * np.trace(root @ K) <= predicted + 1e-9
    worst_map = -(Q * variances**-0.5) @ Q.T
    image = worst_map @ root @ root @ worst_map.T
    close(image, np.eye(d), 10 * d * variances.max() / variances.min())


test_W2_worst_map_rejects = rejects(
    test_W2_worst_map,
    cost={
        "independent cost": lambda variances: variances.sum() + len(variances),
        "S for S^(1/2)": lambda variances: ((1 + variances) ** 2).sum(),
    },
)


@claim(singularity.variance, examples=15, d=dims, t=times, s=scales, rho=rhos, seed=seeds)
def test_W2_variance(variance, d, t, s, rho, seed):
    """Var x_t by pairs of the Gaussian coupling."""
    couple = partial(worst_transport.gaussian_coupling, s=s, rho=rho)
    x_t, _ = singularity.pairs(s * normal(rng(seed), 4000, d), couple, t, rng(seed + 1))
    within(mean_se(x_t.square().mean(1)), variance(t, s, rho))


test_W2_variance_rejects = rejects(
    test_W2_variance,
    variance={
        "sign of the correlation": lambda t, s, rho: singularity.variance(t, s, -rho),
    },
)


@claim(singularity.slope, examples=15, d=dims, t=times, s=scales, rho=rhos, seed=seeds)
def test_W2_slope(slope, d, t, s, rho, seed):
    """The slope by pairs of the Gaussian coupling, at t = 0 too."""
    couple = partial(worst_transport.gaussian_coupling, s=s, rho=rho)
    x_0 = s * normal(rng(seed), 4000, d)
    for time in (0.0, t):
        x_t, u = singularity.pairs(x_0, couple, time, rng(seed + 1))
        within(singularity.fitted_slope(x_t, u), slope(time, s, rho))


test_W2_slope_rejects = rejects(
    test_W2_slope, slope={"rFM for WT": lambda t, s, rho: singularity.slope(t, s, 0.0)}
)


def test_kernel_field():
    """The field of the pictures: two points at distances 0 and h weigh 1 and exp(-1/2)."""
    x_t, u = np.array([[0.0, 0.0], [0.3, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    field, log_mass = worst_transport.kernel_field(np.zeros((1, 2)), x_t, u, 0.3)
    k = np.exp(-0.5)
    assert field[0] == pytest.approx(np.array([1, k]) / (1 + k))
    assert log_mass[0] == pytest.approx(np.log(1 + k))


# ---- W3 ---------------------------------------------------------------------------------------
@claim(worst_transport.minimum_cdf, examples=12, n=candidates, seed=seeds)
def test_W3_minimum(cdf, n, seed):
    """By definition: the minimum of n draws; and the density is its derivative."""
    smallest = normal(rng(seed), 2000, n).amin(1).numpy()
    assert kstest(smallest, lambda m: cdf(m, n)).pvalue > P
    m, step = np.linspace(-4, 2, 13), 1e-5
    slope = (cdf(m + step, n) - cdf(m - step, n)) / (2 * step)
    assert np.allclose(worst_transport.minimum_pdf(m, n), slope, atol=1e-6, rtol=1e-6)


test_W3_minimum_rejects = rejects(
    test_W3_minimum,
    cdf={
        "off-by-one in n": lambda m, n: worst_transport.minimum_cdf(m, n + 1),
        "maximum for minimum": lambda m, n: 1 - worst_transport.minimum_cdf(-m, n),
    },
)


@claim(a_n, worst_transport.minimum_variance, examples=15, n=candidates)
def test_W3_a_n(pull, variance, n):
    """By integrating the survival function, which the code does not; and Jensen's sqrt(2 ln n)."""

    def survival(s):
        return ndtr(-s) ** n

    def integral(g):
        return quad(g, 0, 12, epsabs=1e-12, limit=200)[0]

    first = integral(lambda s: survival(s) + survival(-s) - 1)
    second = integral(lambda s: 2 * s * (survival(s) + 1 - survival(-s)))
    assert abs(pull(n) + first) < 1e-9
    assert abs(variance(n) - second + first**2) < 1e-8
    assert pull(n) <= (2 * np.log(n)) ** 0.5 + 1e-12
    assert n == 1 or variance(n) < variance(n - 1) + 1e-9


test_W3_a_n_rejects = rejects(
    test_W3_a_n,
    pull={
        "off-by-one in a_n": lambda n: a_n(n + 1),
        "the asymptote for a_n": lambda n: (2 * np.log(n)) ** 0.5,
    },
    variance={
        "second moment for variance": lambda n: worst_transport.minimum_variance(n) + a_n(n) ** 2,
    },
)


def check_distribution_of_worst(couple, n, d, scale, seed):
    """The minimum of n along x_0, N(0, I) across it, whatever |x_0|; n = 1 is rFM."""
    x_0 = scale * normal(rng(seed), 3000, d)
    x_1 = couple(x_0, rng(seed + 1), n)
    e = normalize(x_0)
    along = (x_1 * e).sum(1)
    assert kstest(along.numpy(), lambda m: worst_transport.minimum_cdf(m, n)).pvalue > P
    across = (x_1.square().sum(1) - along.square()).numpy()
    if d == 1:
        close(across, 0, 100 * along.square().max().item())
    else:
        radius = np.sqrt(np.maximum(across, 0))
        assert kstest(radius, chi(d - 1).cdf).pvalue > P
        within(mean_se((x_1 - along[:, None] * e)[:, 0]), 0)
        within(mean_se((across - across.mean()) * along.numpy()), 0)
    close(couple(8 * x_0, rng(seed + 1), n), x_1, 1e3)


@claim(
    worst_candidate,
    examples=15,
    n=candidates,
    d=dims,
    scale=st.floats(0.01, 100),
    seed=seeds,
)
def test_W3_local_worst(couple, n, d, scale, seed):
    """The distribution of worst_candidate."""
    check_distribution_of_worst(couple, n, d, scale, seed)


def best(x_0, generator, n):
    return -worst_candidate(x_0, generator, n)


def antipode(x_0, generator, n):
    return -normalize(x_0) * x_0.shape[1] ** 0.5


def all_components(x_0, generator, n):
    return normal(generator, n, *x_0.shape).amin(0)


def raw_projection(x_0, generator, n):
    """Forgets to normalise x_0 before removing the component along it."""
    z, fixed = wtflow.independent(x_0, generator), worst_candidate(x_0, generator, n)
    e = normalize(x_0)
    return z + (fixed * e).sum(1, keepdim=True) * e - (z * x_0).sum(1, keepdim=True) * e


test_W3_local_worst_rejects = rejects(
    test_W3_local_worst,
    couple={
        "maximum for minimum: locally optimal": best,
        "antipode for the local worst": antipode,
        "minimum in every coordinate": all_components,
        "projection on x_0 instead of x_0/|x_0|": raw_projection,
        "off-by-one in n": lambda x_0, generator, n: worst_candidate(x_0, generator, n + 1),
    },
)


@claim(
    worst_transport.worst_of,
    examples=6,
    n=st.integers(1, 20),
    d=dims,
    scale=st.floats(0.01, 100),
    seed=seeds,
)
def test_W3_by_draws(couple, n, d, scale, seed):
    """The same distribution by its definition: n draws, the worst kept."""
    check_distribution_of_worst(couple, n, d, scale, seed)


@claim(worst_candidate, examples=8, n=candidates, d=dims, seed=seeds)
def test_W3_images(couple, n, d, seed):
    """(B, d, h, w): one choice per position; x_0 = 0 gives plain noise."""
    x_0 = normal(rng(seed), 6, d, 20, 20)
    x_0[0] = 0
    x_1 = couple(x_0, rng(seed + 1), n)
    along = (x_1[1:] * normalize(x_0[1:], dim=1)).sum(1)
    cdf = partial(worst_transport.minimum_cdf, n=n)
    assert kstest(along.ravel().numpy(), cdf).pvalue > P
    assert kstest(x_1[0].ravel().numpy(), "norm").pvalue > P


def rfm_on_images(x_0, generator, n):
    return wtflow.independent(x_0, generator)


test_W3_images_rejects = rejects(test_W3_images, couple={"rFM for WT, on images": rfm_on_images})


@pytest.mark.parametrize("n", [1, 64])
def test_W3_finite_for_any_random_number(monkeypatch, n):
    """Of the type of x_0, and finite where the random number is 0."""
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.zeros(shape).double())
    x_1 = worst_candidate(torch.ones(4, 3), n=n)
    assert x_1.dtype == torch.float32 and torch.isfinite(x_1).all()


@claim(worst_transport.initial_field, examples=15, n=candidates, d=dims, seed=seeds)
def test_W3_potential(field, n, d, seed):
    """u_0 is minus the gradient of |x|^2 / 2 + a_n |x|."""
    x = normal(rng(seed), 5, d).requires_grad_()
    potential = x.square().sum() / 2 + a_n(n) * x.norm(dim=1).sum()
    (gradient,) = torch.autograd.grad(potential, x)
    x = x.detach()
    close(field(x.numpy(), n), -gradient.numpy(), 10 * (1 + x.abs().max().item()))


def initial_field_of_opposite_pull(x, n):
    return -(1 - a_n(n) / np.linalg.norm(x, axis=-1, keepdims=True)) * x


test_W3_potential_rejects = rejects(
    test_W3_potential,
    field={
        "a_n |x|^2 / 2 for a_n |x|": lambda x, n: -(1 + a_n(n)) * x,
        "sign of a_n": initial_field_of_opposite_pull,
    },
)


@claim(worst_transport.initial_field, examples=12, n=candidates, d=dims, seed=seeds)
def test_W3_initial_field(field, n, d, seed):
    """u_0(x) is the mean of u at x by wtflow pairs."""
    x = normal(rng(seed), 1, d)
    couple = partial(worst_candidate, n=n)
    _, u = singularity.pairs(x.expand(4000, d), couple, 0.0, rng(seed + 1))
    predicted = field(x.numpy(), n)[0]
    for k in range(d):
        within(mean_se(u[:, k]), predicted[k])


test_W3_initial_field_rejects = rejects(
    test_W3_initial_field, field={"rFM's field for WT's": lambda x, n: -x}
)


@claim(
    worst_transport.local_field,
    examples=15,
    n=candidates,
    d=dims,
    t=st.floats(0.1, 0.95),
    seed=seeds,
)
def test_W3_local_field(field, n, d, t, seed):
    """E[(u - u_t(x_t)) g(x_t)] = 0 for every g; n = 1 is S2's field."""
    atoms = normal(rng(seed), 4, d)
    assume(atoms.norm(dim=1).min() > 0.05)
    x_0 = atoms[torch.randint(4, (6000,), generator=rng(seed + 1))]
    x_t, u = singularity.pairs(x_0, partial(worst_candidate, n=n), t, rng(seed + 2))
    u_t = torch.as_tensor(field(x_t.numpy(), t, atoms.numpy(), n))
    for g in (torch.ones_like(x_t), x_t, torch.sin(3 * x_t)):
        within(mean_se((t * (u - u_t) * g).mean(1)), 0, slack=1e-9)
    x = x_t[:5].numpy()
    one_candidate = field(x, t, atoms.numpy(), 1)
    rfm = singularity.marginal_field(x, t, atoms.numpy())
    assert np.allclose(one_candidate, rfm, rtol=1e-7, atol=1e-7 / t)


def local_field_of_one_more(x, t, atoms, n):
    return worst_transport.local_field(x, t, atoms, n + 1)


test_W3_local_field_rejects = rejects(
    test_W3_local_field, field={"off-by-one in n": local_field_of_one_more}
)


@claim(worst_transport.gain, examples=12, n=candidates, d=dims_from_2, seed=seeds)
def test_W3_gain(gain, n, d, seed):
    """At one x_0, |x_0| = 2, over rFM's 4 / d; the noise matters most at d = 2."""
    for size in (2, d):
        x_0 = 2 * normalize(normal(rng(seed), 1, size)).expand(8000, size)
        u = worst_candidate(x_0, rng(seed + 1), n) - x_0
        ratio, error = worst_transport.signal_to_noise(u, x_0[0] / 2)
        within((ratio * size / 4, error * size / 4), gain(n, size, 4.0))


test_W3_gain_rejects = rejects(
    test_W3_gain, gain={"missing square": lambda n, d, m2: 1 + a_n(n) / m2**0.5}
)


# ---- W4 ---------------------------------------------------------------------------------------
@claim(wtflow.log_density, examples=15, n=candidates, d=dims, seed=seeds)
def test_W4_one_step(density, n, d, seed):
    """One Euler step under u_0 ends at |x1_hat| = a_n, where log p = -a_n^2 / 2d."""

    def exact_field(x, t):
        return torch.as_tensor(worst_transport.initial_field(x.numpy(), n))

    x = normal(rng(seed), 50, d)
    assume(x.norm(dim=1).min() > 1e-3)
    x1_hat = wtflow.euler(exact_field, x)
    largest = 1 + x.abs().max().item()
    close(x1_hat.norm(dim=1), a_n(n), 10 * largest)
    close(density(x1_hat), -(a_n(n) ** 2) / (2 * d), 100 * largest)
    maps = normal(rng(seed), 2, d, 3, 3)
    close(density(maps), -(maps**2).sum(1) / (2 * d), 100)


test_W4_one_step_rejects = rejects(
    test_W4_one_step,
    density={
        "missing 1/d": lambda x: -x.square().sum(1) / 2,
        "sign of log p": lambda x: x.square().mean(1) / 2,
        "factor 1/2": lambda x: -x.square().mean(1),
    },
)


# ---- W7 ---------------------------------------------------------------------------------------
@claim(
    worst_transport.largest_assignment,
    worst_transport.assignment_bounds,
    examples=10,
    k=st.integers(1, 24),
    seed=seeds,
)
def test_W7_bounds(assignment, bounds, k, seed):
    """Between a greedy plan, simulated too, and each row's largest; 1/sqrt(2 pi) for k = 2."""
    mean, se = assignment(k, 400, rng(seed))
    below, above = bounds(k)
    assert below - Z * se <= mean <= above + Z * se
    entries = normal(rng(seed), 400, k, k)
    within(mean_se(entries.amax(2).mean(1)), above)
    greedy = [sum(rows[j, : k - j].max().item() for j in range(k)) / k for rows in entries]
    within(mean_se(greedy), below)
    within(assignment(2, 2000, rng(seed)), (2 * np.pi) ** -0.5)
    within(assignment(1, 2000, rng(seed)), 0)


def smallest_assignment(k, matrices, generator):
    mean, se = worst_transport.largest_assignment(k, matrices, generator)
    return -mean, se


test_W7_bounds_rejects = rejects(
    test_W7_bounds,
    assignment={
        "OT for WT": smallest_assignment,
        "one row more": lambda k, matrices, generator: worst_transport.largest_assignment(
            k + 1, matrices, generator
        ),
        "the upper bound": lambda k, matrices, generator: (a_n(k), 1e-3),
    },
    bounds={
        "a_(k+1) above": lambda k: (worst_transport.assignment_bounds(k)[0], a_n(k + 1)),
        "a_k below": lambda k: (a_n(k), a_n(k)),
    },
)


def rho_of_matrices(k, d, generator):
    """The prediction b_k / sqrt(d), and its standard error."""
    return np.divide(worst_transport.largest_assignment(k, 600, generator), d**0.5)


@claim(
    rho_of_matrices,
    worst_transport.strength_of_minibatch,
    examples=8,
    k=st.integers(2, 12),
    d=st.integers(500, 2000),
    scale=st.floats(0.1, 10),
    seed=seeds,
)
def test_W7_strength(rho, strength, k, d, scale, seed):
    """wtflow's worst plan, whatever the scale of x_0."""
    x_0 = scale * normal(rng(seed), 60 * k, d)
    measured, error = strength(x_0, rng(seed + 1), k)
    predicted, error_of_prediction = rho(k, d, rng(seed + 2))
    within((measured, np.hypot(error, error_of_prediction)), predicted)


test_W7_strength_rejects = rejects(
    test_W7_strength,
    rho={
        "b_k": lambda k, d, generator: worst_transport.largest_assignment(k, 600, generator),
        "a_k of W3": lambda k, d, generator: (a_n(k) / d**0.5, 0.0),
        "rFM": lambda k, d, generator: (0.0, 0.0),
        "the antipode": lambda k, d, generator: (1.0, 0.0),
    },
)


@pytest.mark.parametrize(
    "k, d, rho, error",
    [(8, 120, 0.110, 0.004), (256, 120, 0.240, 0.002), (256, 4096, 0.0418, 3e-4)],
)
def test_W7_numbers_of_the_readme(k, d, rho, error):
    x_0 = normal(rng(0), 2048, d)
    measured, _ = worst_transport.strength_of_minibatch(x_0, rng(1), k)
    assert measured == pytest.approx(rho, abs=error)


# ---- The printed table ------------------------------------------------------------------------
test_table = table_test(worst_transport.table, "W1", "W2", "W3", "W4", "W7")
