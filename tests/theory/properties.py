"""The properties that guard S1..W4: each takes the formula it guards first, so that a wrong one can be put in its place.

Exact identities hold to 64 eps times the condition number that each property works out. Statistical ones allow Z = 7
standard errors or p > 1e-9: below 1e-9 false alarms per assertion where the normal limit holds.
"""
import itertools
from functools import partial

import numpy as np
import torch
from hypothesis import assume
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import ndtr
from scipy.stats import binomtest, chi, kstest

import wtflow
from theory import concentration, exponent, learned_field, mean_se, singularity, worst_transport

EPS, Z, P = np.finfo(float).eps, 7.0, 1e-9
seeds, dims = st.integers(0, 2 ** 31), st.integers(1, 12)
times, scales, rhos = st.floats(0.02, 0.98), st.floats(0.05, 2.0), st.floats(-0.95, 0.95)
few, kinds = st.integers(1, 300), st.sampled_from(["gaussian", "atoms", "mixture", "circle"])
COUPLES = {"independent": wtflow.independent, "optimal": wtflow.optimal, "worst": partial(wtflow.worst, n=8), "minibatch worst": worst_transport.minibatch_worst}


def close(measured, predicted, condition=1.0):
    error = np.max(np.abs(np.asarray(measured) - np.asarray(predicted)))
    assert error <= 64 * EPS * np.max(condition), (measured, predicted, error)


def within(estimate, predicted, slack=0.0):
    value, se = estimate
    assert abs(value - predicted) <= Z * se + slack, (value, predicted, se)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def draw(kind, n, d, scale, seed):
    """(n, d) points of q: Gaussian, a finite set, a mixture of Gaussians or a circle in its first two axes."""
    g = rng(seed + 1)
    z = torch.randn(n, d, generator=g, dtype=torch.float64)
    atoms = scale * torch.randn(5, d, generator=g, dtype=torch.float64)
    pick = torch.randint(5, (n,), generator=g)
    if kind == "circle":
        x = torch.zeros(n, d, dtype=torch.float64)
        x[:, :2] = scale * torch.nn.functional.normalize(z[:, :2])
        return x
    return {"gaussian": scale * z, "atoms": atoms[pick], "mixture": atoms[pick] + 0.3 * scale * z}[kind]


def mixture(d, s, seed):
    """x (d,) near the data and mu (3, d); condition of log-weights and of the field at (t, s) is `condition` below."""
    r = np.random.default_rng(seed)
    return r.normal(size=d), r.normal(size=(3, d))


def condition(x, t, mu, s):
    v = singularity.variance(t, s)
    logs = ((x - (1 - t) * mu) ** 2).sum(-1).max() / v       # rounding of the log-weights, relative rounding of the weights
    return (1 + logs) * (1 + np.abs(x).max() + np.abs(mu).max()) ** 2 * (1 + 1 / t) * (1 + t / v) / (1 - t)


# S ------------------------------------------------------------------------------------------------------------------
def conditional_lipschitz(lipschitz, path, kind, couple, d, t, seed):
    x_0 = draw(kind, 6, d, 1.0, seed)
    one, two = (COUPLES[couple](x_0, rng(seed + k)) for k in (2, 3))
    x, y = (path(x_0, x_1, torch.full((6,), t, dtype=x_0.dtype)) for x_1 in (one, two))
    assume((one - two).norm() > 1e-3)
    close(((one - two).norm() / (x - y).norm()).item(), lipschitz(t), (1 + x_0.norm().item()) / (t ** 2 * (one - two).norm().item()))


def path_ends(path, d, seed, h):
    x_0, x_1 = (torch.randn(4, d, h, 2, generator=rng(seed + k), dtype=torch.float64) for k in (0, 1))
    t = torch.tensor([0.0, 1.0, 0.25, 0.5], dtype=torch.float64)
    close(path(x_0, x_1, t), torch.stack([x_0[0], x_1[1], 0.75 * x_0[2] + 0.25 * x_1[2], (x_0[3] + x_1[3]) / 2]), 8)


def duality(reversed_field, d, t, s, seed):
    x, mu = mixture(d, s, seed)
    forward = singularity.score_field(torch.tensor(x), 1 - t, torch.tensor(mu), s, forward=True).detach()
    close(reversed_field(x[None], t, mu, s)[0], -forward.numpy(), condition(x, t, mu, s))


def field_is_score(field, d, t, s, seed):
    x, mu = mixture(d, s, seed)
    close(field(x[None], t, mu, s)[0], singularity.score_field(torch.tensor(x), t, torch.tensor(mu), s).detach().numpy(), condition(x, t, mu, s))


def posterior_is_field(posterior, d, t, s, seed):
    x, mu = mixture(d, s, seed)
    mean, _ = posterior(x[None], t, mu, s)
    u = singularity.marginal_field(x[None], t, mu, s)
    close((x - mean) / t, u, condition(x, t, mu, s))
    close(((x - (1 - t) * mean) / t - x) / (1 - t), u, condition(x, t, mu, s))       # E[x_1 | x_t = x] by x_t = (1-t) x_0 + t x_1


def jacobian_is_autograd(jacobian, d, t, s, seed):
    x, mu = mixture(d, s, seed)
    J = torch.autograd.functional.jacobian(lambda y: singularity.score_field(y, t, torch.tensor(mu), s), torch.tensor(x))
    close(jacobian(x[None], t, mu, s)[0], J.numpy(), condition(x, t, mu, s) ** 2)


def slope_is_log_derivative(slope, t, s, rho):
    close(slope(t, s, rho), np.log(singularity.variance(t + 1e-30j, s, rho)).imag / 2e-30, (1 + s) ** 2 / singularity.variance(t, s, rho) ** 2)


def variance_of_pairs(variance, d, t, s, rho, seed):
    z = torch.randn(4000, d, generator=rng(seed), dtype=torch.float64)
    x_t, _ = singularity.pairs(s * z, partial(worst_transport.gaussian_coupling, s=s, rho=rho), t, rng(seed + 1))
    within(mean_se(x_t.square().mean(1)), variance(t, s, rho))


def slope_of_pairs(slope, d, t, s, rho, seed):
    z = torch.randn(4000, d, generator=rng(seed), dtype=torch.float64)
    for time in (0.0, t):
        x_t, u = singularity.pairs(s * z, partial(worst_transport.gaussian_coupling, s=s, rho=rho), time, rng(seed + 1))
        within(singularity.fitted_slope(x_t, u), slope(time, s, rho))


def peak_is_largest(peak, s, rho):
    time, top = peak(s, rho)
    close(singularity.slope(time, s, rho), top, top / (1 - rho ** 2) ** 2 * (1 + 1 / s) ** 2)
    assert (singularity.slope(np.linspace(-3, 4, 2001), s, rho) <= top * (1 + 1e-9)).all()
    A, tc = 1 + s ** 2 + 2 * rho * s, (s ** 2 + rho * s) / (1 + s ** 2 + 2 * rho * s)
    t = np.linspace(0, 1, 11)
    close(singularity.variance(t, s, rho), A * (t - tc) ** 2 + s ** 2 * (1 - rho ** 2) / A, (1 + s) ** 4 / A)


def exponents(powers, m, seed):
    e = np.random.default_rng(seed).normal(size=3)
    e /= np.linalg.norm(e)
    atoms, t = m * np.stack([e, -e]), np.geomspace(1e-5, 1e-3, 7) * m
    off = [singularity.autograd_slope(k, atoms, 0.0, 1.5 * m * e + 0.3, e) for k in t]
    between = np.array([-singularity.autograd_slope(k, atoms, 0.0, 0 * e, e) for k in t])
    close(exponent(t, off)[0], powers[0], 1e3)
    assert abs(exponent(t, between)[0] - powers[1]) < 2e-3 * max(m, 1)    # the next order is a factor 1 - t
    close((between * t ** 3 - (1 - t) * m ** 2 + t ** 2) * t ** 2, 0, 10 * (1 + m) ** 4)      # log-weights are m^2 / t^2 large


def error_growth(amplification, t_0, s, seed):
    delta = 1e-3 * np.random.default_rng(seed).normal(size=2)
    measured = singularity.grown(delta, t_0, np.zeros((1, 2)), s)
    assert abs(measured / amplification(t_0, s) - 1) < 1e-5        # tolerance of the ODE solver, times the growth


def bayes_loss(loss, d, t, s, seed):
    """E|u - u_t|^2 / d = s^2 / sigma_t^2 at the exact field; at t = 0 it is 1: the noise itself (S3)."""
    x_0 = s * torch.randn(4000, d, generator=rng(seed), dtype=torch.float64)
    for time in (0.0, t):
        values = loss(lambda x, k: singularity.slope(time, s) * x, x_0, wtflow.independent, rng(seed + 1), torch.full((4000,), time, dtype=x_0.dtype))
        assert values.shape == (4000,)
        within(mean_se(values), s ** 2 / singularity.variance(time, s))


def uniform_time(loss, d, seed):
    seen = []
    values = loss(lambda x, t: seen.append((x, t)) or 0 * x, torch.zeros(3000, d, dtype=torch.float64), wtflow.independent, rng(seed))
    x, t = seen[0]
    assert kstest(t.numpy(), "uniform").pvalue > P
    assert t.unique().numel() > 2900                              # one time per sample
    close((x / t[:, None]).square().mean(1).numpy(), values.numpy(), 100 * values.max().item())     # x_0 = 0: u = x_1 = x_t / t


# C ------------------------------------------------------------------------------------------------------------------
def radius(radius_std, d):
    close(radius_std(d), chi(d).std() / d ** 0.5, 100 * d)
    assert d < 50 or abs(radius_std(d) * (2 * d) ** 0.5 - 1) < 1 / d


def cosine(law, noise, d, seed):
    x_1 = noise(torch.zeros(3000, d, dtype=torch.float64), rng(seed))
    assert kstest((x_1[:, 0] / x_1.norm(dim=1)).numpy(), law(d).cdf).pvalue > P
    assert kstest(x_1.square().sum(1).sqrt().numpy(), chi(d).cdf).pvalue > P
    close(law(d).var(), 1 / d, 10)


def centripetal(initial, kind, d, s, seed):
    x, mu = mixture(d, s, seed)
    close(singularity.marginal_field(x[None], 0.0, mu, s)[0], initial(x), 1 + np.abs(x).max())
    x_0 = draw(kind, 3000, max(d, 2), s, seed)
    x_t, u = singularity.pairs(x_0, wtflow.independent, 0.0, rng(seed + 2))
    within(singularity.fitted_slope(x_t, u), initial(np.ones(1))[0])


def radial(inward, kind, d, t, s, seed):
    x_0 = draw(kind, 4000, max(d, 2), s, seed)
    m2, d = x_0.square().sum(1), x_0.shape[1]
    r = concentration.radial_velocity(x_0, t, rng(seed + 2)) + (1 - t) * (m2 - m2.mean())     # conditional on the sample's own m2
    within(mean_se(r), inward(t, m2.mean().item(), d))


def dip(turning, m2, d):
    time, least = turning(m2, d)
    energy = lambda t: (1 - t) ** 2 * m2 + t ** 2 * d
    close(energy(time), least, m2 + d)
    assert (energy(np.linspace(0, 1, 101)) >= least * (1 - 1e-12)).all()
    close(concentration.inward(time, m2, d), 0, m2 + d)


def inward_sign(probability, d, t, m2, seed):
    x_0 = concentration.shell(3000, d, rng(seed)) * (m2 / d) ** 0.5
    inside = int((concentration.radial_velocity(x_0, t, rng(seed + 1)) < 0).sum())
    assert binomtest(inside, 3000, float(np.clip(probability(t, m2, d), 1e-12, 1 - 1e-12))).pvalue > P


def energy_integral(energy, s, rho):
    exact = quad(lambda t: singularity.slope(t, s, rho) ** 2 * singularity.variance(t, s, rho), 0, 1, points=[np.clip(singularity.peak(s, rho)[0], 0, 1)], epsabs=1e-11)[0]
    assert abs(energy(s, rho) - exact) < 1e-8
    assert energy(s, rho) >= (1 - s) ** 2 - 1e-12
    t = np.linspace(0, 1, 21)
    straight = (1 - t) * s + t
    assert (singularity.variance(t, s, rho) ** 0.5 <= straight + 1e-12).all() and (singularity.variance(t, s)[1:-1] < straight[1:-1] ** 2).all()


def energy_of_pairs(energy, s, rho, seed):
    x_0 = s * torch.randn(2000, 4, generator=rng(seed), dtype=torch.float64)
    within(concentration.energy_from_pairs(x_0, partial(worst_transport.gaussian_coupling, s=s, rho=rho), rng(seed + 1)), energy(s, rho))


def final_field(final, d, s, seed):
    x, mu = mixture(d, s, seed)
    close(singularity.marginal_field(x[None], 1.0, mu, s)[0], final(x, mu.mean(0)), 20 * (1 + np.abs(x).max() ** 2 + np.abs(mu).max() ** 2) * (1 + d))


# W ------------------------------------------------------------------------------------------------------------------
def plan_is_extreme(plan, sign, n, d, seed):
    """Against every permutation; and the plan only reorders the noise."""
    x_0 = torch.randn(n, d, generator=rng(seed), dtype=torch.float64)
    x_1, z = plan(x_0, rng(seed + 1)), wtflow.independent(x_0, rng(seed + 1))
    assert torch.equal(x_1.sort(0).values, z.sort(0).values)
    costs = [(x_0 - z[list(p)]).square().sum().item() for p in itertools.permutations(range(n))]
    close((x_0 - x_1).square().sum().item(), min(costs) if sign > 0 else max(costs), 10 * (1 + max(costs)))
    if sign < 0:
        close(worst_transport.largest_cost(x_0.numpy(), z.numpy()), max(costs), 10 * (1 + max(costs)))


def plan_on_images(plan, sign, b, h, d, seed):
    """(B, d, h, w) is one cloud of vectors in blocks of whole images; in one dimension the extreme plan is the (anti)sorted one."""
    x_0 = torch.randn(b, d, h, 4, generator=rng(seed), dtype=torch.float64)
    x_1, z = plan(x_0, rng(seed + 1), block=4 * h), wtflow.independent(x_0, rng(seed + 1))
    assert x_1.shape == x_0.shape
    for k in range(b):
        rows = lambda x: x[k].reshape(d, -1).T
        a, p, q = rows(x_0), rows(x_1), rows(z)
        assert sorted(map(tuple, p.tolist())) == sorted(map(tuple, q.tolist()))
        assert sign * (a - p).square().sum() <= sign * (a - q).square().sum() + 1e-9
        if d == 1:
            assert torch.equal(p[a.argsort(0)[:, 0]], q.sort(0, descending=sign < 0).values)


def blocks_are_large(plan, seed):
    """By default 256 vectors are matched together, in one dimension the sorted plan of them all."""
    x_0 = torch.randn(300, 1, generator=rng(seed), dtype=torch.float64)
    x_1, z = plan(x_0, rng(seed + 1)), wtflow.independent(x_0, rng(seed + 1))
    for k in (slice(0, 256), slice(256, 300)):
        assert torch.equal(x_1[k][x_0[k, 0].argsort()], z[k].sort(0).values)


def gaussian_worst_cost(cost, d, seed):
    """No coupling with covariance C = S^(1/2) K, |K| <= 1, costs more than x_1 = -S^(-1/2) x_0 does (W2)."""
    r = np.random.default_rng(seed)
    B = r.normal(size=(d, d))
    values, Q = np.linalg.eigh(B @ B.T + 0.1 * np.eye(d))
    root = (Q * values ** 0.5) @ Q.T
    predicted = cost(values)
    close(values.sum() + d + 2 * np.trace(root), predicted, 10 * d * (1 + values.sum()))
    for _ in range(20):
        U, _, V = np.linalg.svd(r.normal(size=(d, d)))
        assert values.sum() + d - 2 * np.trace(root @ (U * r.uniform(0, 1, d)) @ V) <= predicted + 1e-9
    T = -(Q * values ** -0.5) @ Q.T
    close(T @ root @ root @ T.T, np.eye(d), 10 * d * values.max() / values.min())


def minimum_law(cdf, n, seed):
    """By definition: the minimum of n draws; and pdf is its derivative."""
    z = torch.randn(2000, n, generator=rng(seed), dtype=torch.float64).amin(1).numpy()
    assert kstest(z, lambda m: cdf(m, n)).pvalue > P
    m = np.linspace(-4, 2, 13)
    slope = (cdf(m + 1e-5, n) - cdf(m - 1e-5, n)) / 2e-5
    assert np.allclose(worst_transport.minimum_pdf(m, n), slope, atol=1e-6, rtol=1e-6)


def moments(a, variance, n):
    """By integrating the survival function, which the code does not; and Jensen's bound sqrt(2 ln n)."""
    tail = lambda s: ndtr(-s) ** n
    first = quad(lambda s: tail(s) + tail(-s) - 1, 0, 12, epsabs=1e-12, limit=200)[0]
    second = quad(lambda s: 2 * s * (tail(s) + 1 - tail(-s)), 0, 12, epsabs=1e-12, limit=200)[0]
    assert abs(a(n) + first) < 1e-9 and abs(variance(n) - second + first ** 2) < 1e-8
    assert a(n) <= (2 * np.log(n)) ** 0.5 + 1e-12 and (n == 1 or variance(n) < variance(n - 1) + 1e-9)


def worst_is_local(couple, n, d, scale, seed):
    """The exact law of wtflow.worst: minimum of n along x_0, N(0, I) across it, whatever |x_0|; n = 1 is rFM."""
    x_0 = scale * torch.randn(3000, d, generator=rng(seed), dtype=torch.float64)
    x_1 = couple(x_0, rng(seed + 1), n)
    e = torch.nn.functional.normalize(x_0)
    along = (x_1 * e).sum(1)
    assert kstest(along.numpy(), lambda m: worst_transport.minimum_cdf(m, n)).pvalue > P
    across = (x_1.square().sum(1) - along.square()).numpy()
    if d == 1:
        close(across, 0, 100 * along.square().max().item())
    else:
        assert kstest(across, lambda v: chi(d - 1).cdf(np.sqrt(np.maximum(v, 0)))).pvalue > P
        within(mean_se((x_1 - along[:, None] * e)[:, 0]), 0)
        within(mean_se((across - across.mean()) * along.numpy()), 0)
    close(couple(8 * x_0, rng(seed + 1), n), x_1, 1e3)                # the choice does not depend on |x_0|


def worst_on_images(couple, n, d, seed):
    """(B, d, h, w): one choice per location; x_0 = 0 gives plain noise."""
    x_0 = torch.randn(6, d, 20, 20, generator=rng(seed), dtype=torch.float64)
    x_0[0] = 0
    x_1 = couple(x_0, rng(seed + 1), n)
    along = ((x_1 * x_0).sum(1) / x_0.norm(dim=1))[1:]
    assert kstest(along.ravel().numpy(), lambda m: worst_transport.minimum_cdf(m, n)).pvalue > P
    assert kstest(x_1[0].ravel().numpy(), "norm").pvalue > P


def initial_is_gradient(field, n, d, seed):
    x = torch.randn(5, d, generator=rng(seed), dtype=torch.float64, requires_grad=True)
    potential = x.square().sum() / 2 + worst_transport.a_n(n) * x.norm(dim=1).sum()
    close(field(x.detach().numpy(), n), -torch.autograd.grad(potential, x)[0].numpy(), 10 * (1 + x.abs().max().item()))


def initial_of_pairs(field, n, d, seed):
    x = torch.randn(1, d, generator=rng(seed), dtype=torch.float64)
    x_t, u = singularity.pairs(x.expand(4000, d), partial(wtflow.worst, n=n), 0.0, rng(seed + 1))
    predicted = field(x.numpy(), n)[0]
    for k in range(d):
        within(mean_se(u[:, k]), predicted[k])


def local_field_is_mean(field, n, d, t, seed):
    """E[(u - u_t(x_t)) g(x_t)] = 0 for every g; n = 1 is S2's field."""
    atoms = torch.randn(4, d, generator=rng(seed), dtype=torch.float64)
    assume(atoms.norm(dim=1).min() > 0.05)
    x_0 = atoms[torch.randint(4, (6000,), generator=rng(seed + 1))]
    x_t, u = singularity.pairs(x_0, partial(wtflow.worst, n=n), t, rng(seed + 2))
    rest = (u - torch.as_tensor(field(x_t.numpy(), t, atoms.numpy(), n))) * t
    for g in (torch.ones_like(x_t), x_t, torch.sin(3 * x_t)):
        within(mean_se((rest * g).mean(1)), 0, slack=1e-9)
    x = x_t[:5].numpy()
    assert np.allclose(field(x, t, atoms.numpy(), 1), singularity.marginal_field(x, t, atoms.numpy()), rtol=1e-7, atol=1e-7 / t)


def gain_of_pairs(gain, n, d, seed):
    x_0 = torch.nn.functional.normalize(torch.randn(1, d, generator=rng(seed), dtype=torch.float64)).expand(8000, d) * 2
    u = wtflow.worst(x_0, rng(seed + 1), n) - x_0
    along, across = u @ x_0[0] / 2, (u - u.mean(0)).square().sum(1)
    (m, m_se), (v, v_se) = mean_se(along), mean_se(across)
    snr = m ** 2 / v / (4 / d)
    within((snr, snr * np.hypot(2 * m_se / m, v_se / v)), gain(n, d, 4.0))


def one_step(density, n, d, seed):
    """W4: one Euler step under u_0 lands at |x1_hat| = a_n, and log p = -a_n^2 / 2d there."""
    x = torch.randn(50, d, generator=rng(seed), dtype=torch.float64)
    assume(x.norm(dim=1).min() > 1e-3)
    hat = wtflow.euler(lambda y, t: torch.as_tensor(worst_transport.initial_field(y.numpy(), n)), x)
    close(hat.norm(dim=1), worst_transport.a_n(n), 10 * (1 + x.abs().max().item()))
    close(density(hat), -worst_transport.a_n(n) ** 2 / (2 * d), 100 * (1 + x.abs().max().item()))
    y = torch.randn(2, d, 3, 3, generator=rng(seed), dtype=torch.float64)
    close(density(y), -(y ** 2).sum(1) / (2 * d), 100)


def euler_product(euler, steps, d, s, seed):
    """K steps of u_t = a(t) x multiply by prod (1 + a(k/K) / K), which tends to sigma_1 / sigma_0 = 1 / s (S3)."""
    x = torch.randn(3, d, 2, 2, generator=rng(seed), dtype=torch.float64)
    field = lambda y, t: singularity.slope(t, s)[:, None, None, None] * y
    factor = np.prod([1 + singularity.slope(k / steps, s) / steps for k in range(steps)])
    close(euler(field, x, steps), factor * x, 100 * steps * (1 + abs(factor)) / s ** 2 * x.abs().max().item())
    assert abs(euler(field, torch.ones(1, 1, 1, 1, dtype=torch.float64), 4000).item() * s - 1) < 0.02 / s


def circle_is_many_atoms(field, t, seed):
    turn = 2 * np.pi * np.arange(2000) / 2000
    atoms = np.zeros((2000, learned_field.D))
    atoms[:, 0], atoms[:, 1] = learned_field.RADIUS * np.cos(turn), learned_field.RADIUS * np.sin(turn)
    x = np.random.default_rng(seed).normal(size=(4, learned_field.D)) * 2
    close(field(x, np.full(4, t)), singularity.marginal_field(x, t, atoms), 1e4 / t ** 3)


def area_under(auroc, n, seed):
    a, b = np.random.default_rng(seed).integers(0, 6, (2, n))
    close(auroc(a, b), ((a[:, None] < b) + 0.5 * (a[:, None] == b)).mean(), n)


def learned_data(thick, off, seed):
    x, y = learned_field.circle(500, rng(seed), off), thick(4000, rng(seed), off)
    assert torch.allclose(x[:, :2].norm(dim=1), torch.tensor(learned_field.RADIUS), atol=1e-5)
    assert torch.allclose(x[:, 2:].norm(dim=1), torch.tensor(float(off)), atol=1e-5)
    within(mean_se(y.square().sum(1)), learned_field.RADIUS ** 2 + off ** 2 + learned_field.D * learned_field.THICKNESS ** 2)


n_dims, two_up = dict(n=few, d=dims, seed=seeds), st.integers(2, 40)
mix = dict(d=dims, t=times, s=st.just(0.0) | scales, seed=seeds)
# name: (property, formulas it guards, strategies, examples)
PROPERTIES = {
    "S1 Lipschitz": (conditional_lipschitz, (lambda t: 1 / t, wtflow.path), dict(kind=st.sampled_from(["gaussian", "atoms"]), couple=st.sampled_from(list(COUPLES)), d=dims, t=times, seed=seeds), 40),
    "S1 path": (path_ends, (wtflow.path,), dict(d=dims, seed=seeds, h=st.integers(1, 3)), 10),
    "S1 duality": (duality, (singularity.marginal_field,), mix, 40),
    "S2 field": (field_is_score, (singularity.marginal_field,), mix, 40),
    "S2 posterior": (posterior_is_field, (singularity.posterior,), mix, 40),
    "S2 Jacobian": (jacobian_is_autograd, (singularity.jacobian,), dict(mix, d=st.integers(1, 4)), 25),
    "S2 slope": (slope_is_log_derivative, (singularity.slope,), dict(t=st.floats(0, 1), s=scales, rho=rhos), 60),
    "S2 peak": (peak_is_largest, (singularity.peak,), dict(s=scales, rho=rhos), 60),
    "S2 exponents": (exponents, ((-1, -3),), dict(m=st.floats(0.5, 3), seed=seeds), 8),
    "S3 growth": (error_growth, (singularity.amplification,), dict(t_0=times, s=st.just(0.0) | scales, seed=seeds), 15),
    "S3 loss": (bayes_loss, (wtflow.flow_matching_loss,), dict(d=dims, t=times, s=scales, seed=seeds), 12),
    "S3 uniform time": (uniform_time, (wtflow.flow_matching_loss,), dict(d=dims, seed=seeds), 6),
    "S3 Euler": (euler_product, (wtflow.euler,), dict(steps=st.integers(1, 20), d=dims, s=st.floats(0.3, 1.5), seed=seeds), 4),
    "C1 radius": (radius, (concentration.radius_std,), dict(d=st.integers(1, 2000)), 30),
    "C1 cosine": (cosine, (concentration.cosine_law, wtflow.independent), dict(d=two_up, seed=seeds), 10),
    "C2 centripetal": (centripetal, (lambda x: -x,), dict(kind=kinds, d=dims, s=scales, seed=seeds), 20),
    "C3 radial": (radial, (concentration.inward,), dict(kind=kinds, d=dims, t=times, s=scales, seed=seeds), 20),
    "C3 dip": (dip, (concentration.turning,), dict(m2=st.floats(0.01, 100), d=st.integers(1, 500)), 30),
    "C3 sign": (inward_sign, (concentration.inward_probability,), dict(d=dims, t=times, m2=st.floats(0.1, 40), seed=seeds), 15),
    "C4 energy": (energy_integral, (concentration.kinetic_energy,), dict(s=scales, rho=rhos), 30),
    "C4 pairs": (energy_of_pairs, (concentration.kinetic_energy,), dict(s=scales, rho=rhos, seed=seeds), 6),
    "C5 final": (final_field, (lambda x, mean: x - mean,), dict(d=dims, s=st.just(0.0) | scales, seed=seeds), 25),
    "W1 worst plan": (partial(plan_is_extreme, sign=-1), (worst_transport.minibatch_worst,), dict(n=st.integers(1, 6), d=dims, seed=seeds), 15),
    "W1 optimal plan": (partial(plan_is_extreme, sign=1), (wtflow.optimal,), dict(n=st.integers(1, 6), d=dims, seed=seeds), 15),
    "W1 images, worst": (partial(plan_on_images, sign=-1), (worst_transport.minibatch_worst,), dict(b=st.integers(1, 3), h=st.integers(1, 4), d=st.integers(1, 3), seed=seeds), 15),
    "W1 images, optimal": (partial(plan_on_images, sign=1), (wtflow.optimal,), dict(b=st.integers(1, 3), h=st.integers(1, 4), d=st.integers(1, 3), seed=seeds), 15),
    "W1 blocks": (blocks_are_large, (wtflow.optimal,), dict(seed=seeds), 3),
    "W2 worst map": (gaussian_worst_cost, (lambda e: (1 + e ** 0.5) @ (1 + e ** 0.5),), dict(d=dims, seed=seeds), 15),
    "W2 variance": (variance_of_pairs, (singularity.variance,), dict(d=dims, t=times, s=scales, rho=rhos, seed=seeds), 15),
    "W2 slope": (slope_of_pairs, (singularity.slope,), dict(d=dims, t=times, s=scales, rho=rhos, seed=seeds), 15),
    "W3 minimum": (minimum_law, (worst_transport.minimum_cdf,), dict(n=few, seed=seeds), 12),
    "W3 a_n": (moments, (worst_transport.a_n, worst_transport.minimum_variance), dict(n=few), 15),
    "W3 local worst": (worst_is_local, (wtflow.worst,), dict(n_dims, scale=st.floats(0.01, 100)), 15),
    "W3 by draws": (worst_is_local, (worst_transport.worst_of,), dict(n=st.integers(1, 20), d=dims, scale=st.floats(0.01, 100), seed=seeds), 6),
    "W3 images": (worst_on_images, (wtflow.worst,), n_dims, 8),
    "W3 potential": (initial_is_gradient, (worst_transport.initial_field,), n_dims, 15),
    "W3 initial field": (initial_of_pairs, (worst_transport.initial_field,), n_dims, 12),
    "W3 local field": (local_field_is_mean, (worst_transport.local_field,), dict(n=few, d=dims, t=st.floats(0.1, 0.95), seed=seeds), 15),
    "W3 gain": (gain_of_pairs, (worst_transport.gain,), dict(n=few, d=two_up, seed=seeds), 12),
    "W4 one step": (one_step, (wtflow.log_density,), n_dims, 15),
    "learnt circle": (circle_is_many_atoms, (learned_field.circle_field,), dict(t=st.floats(0.1, 0.95), seed=seeds), 10),
    "learnt AUROC": (area_under, (learned_field.auroc,), dict(n=st.integers(1, 30), seed=seeds), 20),
    "learnt data": (learned_data, (learned_field.thick_circle,), dict(off=st.floats(0, 3), seed=seeds), 6),
}
