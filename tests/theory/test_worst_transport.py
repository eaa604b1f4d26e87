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
from theory.worst_transport import a_n, minibatch_worst, worst_candidate


# ---- W1 ---------------------------------------------------------------------------------------
@claim(wtflow.optimal, minibatch_worst, examples=20, n=st.integers(1, 6), d=dims, seed=seeds)
def test_W1_plan(best, worst, n, d, seed):
    """A reordering of the noise; of all plans none costs less than the one, more than the other."""
    x_0 = normal(rng(seed), n, d)
    z = wtflow.independent(x_0, rng(seed + 1))
    plans = itertools.permutations(range(n))
    costs = [(x_0 - z[list(plan)]).square().sum().item() for plan in plans]
    for couple, extreme in ((best, min(costs)), (worst, max(costs))):
        x_1 = couple(x_0, rng(seed + 1))
        assert torch.equal(x_1.sort(0).values, z.sort(0).values)
        close((x_0 - x_1).square().sum().item(), extreme, 10 * (1 + max(costs)))
    largest = worst_transport.largest_cost(x_0.numpy(), z.numpy())
    close(largest, max(costs), 10 * (1 + largest))


test_W1_plan_rejects = rejects(
    test_W1_plan,
    best={"WT for OT": minibatch_worst},
    worst={
        "OT for WT": wtflow.optimal,
        "optimal to x_0, turned to -x_1": lambda x_0, generator: -wtflow.optimal(x_0, generator),
    },
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
    test_W2_worst_map, cost={"independent": lambda variances: variances.sum() + len(variances)}
)


@claim(
    singularity.variance,
    singularity.slope,
    examples=15,
    d=dims,
    t=times,
    s=scales,
    rho=rhos,
    seed=seeds,
)
def test_W2_pairs(variance, slope, d, t, s, rho, seed):
    """Var x_t and the slope of u on x_t by pairs of the Gaussian coupling; a(0) = -(1 + rho/s)."""
    couple = partial(worst_transport.gaussian_coupling, s=s, rho=rho)
    x_0 = s * normal(rng(seed), 4000, d)
    noise = (1 - rho**2) ** 0.5 * wtflow.independent(x_0, rng(seed))
    close(couple(0 * x_0, rng(seed)), noise, 100)
    for time in (0.0, t):
        x_t, u = singularity.pairs(x_0, couple, time, rng(seed + 1))
        within(mean_se(x_t.square().mean(1)), variance(time, s, rho))
        within(singularity.fitted_slope(x_t, u), slope(time, s, rho))
    close(slope(0.0, s, rho), -(1 + rho / s), (1 + 1 / s) ** 2)
    close(variance(s / (1 + s), s, 1.0), 0, 4)  # all paths of worst transport meet in the origin


test_W2_pairs_rejects = rejects(
    test_W2_pairs,
    variance={"OT for WT": lambda t, s, rho: singularity.variance(t, s, -rho)},
    slope={"rFM for WT": lambda t, s, rho: singularity.slope(t, s, 0.0)},
)


def test_kernel_field():
    """The field of the pictures: two points at distances 0 and h weigh 1 and exp(-1/2)."""
    x_t, u = np.array([[0.0, 0.0], [0.3, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    field, log_mass = worst_transport.kernel_field(np.zeros((1, 2)), x_t, u, 0.3)
    k = np.exp(-0.5)
    assert field[0] == pytest.approx(np.array([1, k]) / (1 + k))
    assert log_mass[0] == pytest.approx(np.log(1 + k))


# ---- W3 ---------------------------------------------------------------------------------------
@claim(a_n, worst_transport.minimum_pdf, examples=15, n=candidates)
def test_W3_a_n(pull, pdf, n):
    """By integrating the survival function, which the code does not; and the bound sqrt(2 ln n)."""
    m, step = np.linspace(-4, 2, 13), 1e-5
    cdf = worst_transport.minimum_cdf
    assert np.allclose(pdf(m, n), (cdf(m + step, n) - cdf(m - step, n)) / (2 * step), atol=1e-6)
    mean, _ = quad(lambda s: ndtr(-s) ** n + ndtr(s) ** n - 1, 0, 12, epsabs=1e-12, limit=200)
    assert abs(pull(n) + mean) < 1e-9
    assert pull(n) <= (2 * np.log(n)) ** 0.5 + 1e-12


test_W3_a_n_rejects = rejects(
    test_W3_a_n,
    pull={"off-by-one in a_n": lambda n: a_n(n + 1)},
    pdf={"off-by-one in n": lambda m, n: worst_transport.minimum_pdf(m, n + 1)},
)


@claim(worst_candidate, examples=15, n=candidates, d=dims, scale=st.floats(0.01, 100), seed=seeds)
def test_W3_local_worst(couple, n, d, scale, seed):
    """The minimum of n draws along x_0, N(0, I) across it, whatever |x_0|; n = 1 is rFM."""
    smallest = normal(rng(seed), 2000, n).amin(1).numpy()
    assert kstest(smallest, lambda m: worst_transport.minimum_cdf(m, n)).pvalue > P
    x_0 = scale * normal(rng(seed), 3000, d)
    x_1 = couple(x_0, rng(seed + 1), n)
    e = normalize(x_0)
    along = (x_1 * e).sum(1)
    assert kstest(along.numpy(), lambda m: worst_transport.minimum_cdf(m, n)).pvalue > P
    close(worst_transport.along_direction(x_1, x_0), along, 10 * along.abs().max().item())
    across = (x_1.square().sum(1) - along.square()).numpy()
    if d == 1:
        close(across, 0, 100 * along.square().max().item())
    else:
        radius = np.sqrt(np.maximum(across, 0))
        assert kstest(radius, chi(d - 1).cdf).pvalue > P
        within(mean_se((x_1 - along[:, None] * e)[:, 0]), 0)
    close(couple(8 * x_0, rng(seed + 1), n), x_1, 1e3)
    maps = torch.zeros(8, d, 10, 10)  # at x_0 = 0 plain noise, of the type of x_0
    assert kstest(couple(maps, rng(seed), n).ravel().numpy(), "norm").pvalue > P
    assert couple(maps, rng(seed), n).dtype == torch.float32


def antipode(x_0, generator, n):
    return -normalize(x_0) * x_0.shape[1] ** 0.5


def candidates_at_each_component(x_0, generator, n):
    return normal(generator, n, *x_0.shape).amin(0)


test_W3_local_worst_rejects = rejects(
    test_W3_local_worst,
    couple={
        "antipode for the local worst": antipode,
        "minimum in every coordinate": candidates_at_each_component,
    },
)


@claim(worst_transport.initial_field, examples=15, n=candidates, d=dims, seed=seeds)
def test_W3_initial_field(field, n, d, seed):
    """Minus the gradient of |x|^2 / 2 + a_n |x|, and the mean of u at one x by wtflow pairs."""
    x = normal(rng(seed), 5, d).requires_grad_()
    potential = x.square().sum() / 2 + a_n(n) * x.norm(dim=1).sum()
    (gradient,) = torch.autograd.grad(potential, x)
    x = x.detach()
    predicted = field(x.numpy(), n)
    close(predicted, -gradient.numpy(), 10 * (1 + x.abs().max().item()))
    couple = partial(worst_candidate, n=n)
    _, u = singularity.pairs(x[:1].expand(4000, d), couple, 0.0, rng(seed + 1))
    for k in range(d):
        within(mean_se(u[:, k]), predicted[0, k])


test_W3_initial_field_rejects = rejects(
    test_W3_initial_field, field={"a_n |x|^2 / 2 for a_n |x|": lambda x, n: -(1 + a_n(n)) * x}
)


# ---- W4 ---------------------------------------------------------------------------------------
@claim(a_n, wtflow.log_density, examples=15, n=candidates, d=dims, seed=seeds)
def test_W4_one_step(distance, density, n, d, seed):
    """One Euler step under u_0 ends at |x1_hat| = a_n, where log p = -a_n^2 / 2d."""
    x = normal(rng(seed), 50, d)
    assume(x.norm(dim=1).min() > 1e-3)
    u_0 = torch.as_tensor(worst_transport.initial_field(x.numpy(), n))
    x1_hat = wtflow.euler(lambda x, t: u_0, x)
    largest = 1 + x.abs().max().item()
    close(x1_hat.norm(dim=1), distance(n), 10 * largest)
    close(density(x1_hat), -(distance(n) ** 2) / (2 * d), 100 * largest)


test_W4_one_step_rejects = rejects(
    test_W4_one_step,
    distance={"the origin": lambda n: 0.0},
    density={"missing 1/d": lambda x: -x.square().sum(1) / 2},
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
    greedy = sum(entries[:, j, : k - j].amax(1) for j in range(k)) / k
    within(mean_se(greedy), below)
    within(assignment(2, 2000, rng(seed)), (2 * np.pi) ** -0.5)


def row_by_row(k, matrices, generator):
    return mean_se(normal(generator, matrices, k, k).amax(2).mean(1))


test_W7_bounds_rejects = rejects(
    test_W7_bounds,
    assignment={"each row's largest": row_by_row},
    bounds={"a_k below": lambda k: (a_n(k), a_n(k))},
)


def rho_of_matrices(k, d, generator):
    """The prediction b_k / sqrt(d), and its standard error."""
    return np.divide(worst_transport.largest_assignment(k, 2000, generator), d**0.5)


@claim(
    rho_of_matrices,
    worst_transport.strength_of_minibatch,
    examples=4,
    k=st.integers(6, 12),
    d=st.integers(250, 500),
    scale=st.floats(0.1, 10),
    seed=seeds,
)
def test_W7_strength(rho, strength, k, d, scale, seed):
    """The worst plan of wtflow's noise, whatever the scale of x_0."""
    x_0 = scale * normal(rng(seed), 600 * k, d)
    measured, error = strength(x_0, rng(seed + 1), k)
    predicted, error_of_prediction = rho(k, d, rng(seed + 2))
    within((measured, np.hypot(error, error_of_prediction)), predicted)


test_W7_strength_rejects = rejects(
    test_W7_strength,
    rho={
        "a_k of W3": lambda k, d, generator: (a_n(k) / d**0.5, 0.0),
        "a tenth more": lambda k, d, generator: 1.1 * rho_of_matrices(k, d, generator),
    },
)


def test_W7_number_of_the_readme():
    """k = 256 beyond d = 120, where the plan is weaker than b_k / sqrt(d)."""
    measured, _ = worst_transport.strength_of_minibatch(normal(rng(0), 2048, 120), rng(1), 256)
    assert measured == pytest.approx(0.240, abs=0.002)


# ---- The printed table ------------------------------------------------------------------------
test_table = table_test(worst_transport.table, "W1", "W2", "W3", "W4", "W7")
