"""S1-S5: the singularity of the reversed field at t = 0. Time runs from data (0) to noise (1).

[paper] "the reversed vector field exhibits a non-Lipschitz singularity at the initial temporal
boundary, precipitating explosive estimation errors". Every formula below is [derived]; proofs in
README.md.

Data: q = (1/K) sum_k N(mu_k, s^2 I), which holds the Gaussian (K = 1), a training set (s = 0) and
their mixtures. Figure: draw.PANELS.
"""

from functools import partial

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import minimize_scalar
from scipy.special import softmax

import wtflow
from theory import Row, exponent, mean_se, normal

# Two atoms +-ATOM_RADIUS e in the plane: the smallest training set with a boundary between atoms.
ATOM_RADIUS = 1.0
ATOM_AXIS = np.array([1.0, 0.0])
ATOMS = ATOM_RADIUS * np.stack([ATOM_AXIS, -ATOM_AXIS])
MIDWAY, OFF = np.array([0.0, 0.0]), np.array([1.5, 0.5])
POWER_LAW_TIMES = np.geomspace(1e-5, 1e-3, 9)  # above the rounding floor, below the next order in t


# ---- Closed forms -----------------------------------------------------------------------------
def variance(t, s, rho=0.0):
    """Var x_t per coordinate, q = N(0, s^2 I), at a Gaussian coupling of correlation -rho (S2, W2).

    rho = 0 is rFM, -1 optimal, 1 worst transport. It is A (t - tc)^2 + s^2 (1 - rho^2) / A of peak
    when multiplied out.
    """
    return ((1 - t) * s) ** 2 + t**2 - 2 * rho * s * t * (1 - t)


def slope(t, s, rho=0.0):
    """a(t) of u_t(x) = a(t) x for the same q and coupling: sigma_t' / sigma_t (S2, W2).

    a(0) = -(1 + rho/s). Not defined where sigma_t = 0, as at t = s = 0.
    """
    return (t - (1 - t) * s**2 - rho * s * (1 - 2 * t)) / variance(t, s, rho)


def peak(s, rho=0.0):
    """(time, slope) where a(t) is largest, for |rho| < 1 (S2, W2).

    A / (2 s sqrt(1-rho^2)) at tc + s sqrt(1-rho^2) / A, where A = 1 + s^2 + 2 rho s and
    tc = (s^2 + rho s) / A. It is least, minus that, at tc - s sqrt(1-rho^2) / A. For rFM the slope
    is (1+s^2) / (2s), and the time lies in [0, 1] if s <= 1.
    """
    A = 1 + s**2 + 2 * rho * s
    root = s * (1 - rho**2) ** 0.5
    return (s**2 + rho * s + root) / A, A / (2 * root)


def component_weights(x, t, mu, s):
    """P(component k | x_t = x) (N, K) for rFM: a softmax of -|x - (1-t) mu_k|^2 / (2 Var x_t)."""
    squares = ((x[:, None] - (1 - t) * mu) ** 2).sum(-1)
    return softmax(-squares / (2 * variance(t, s)), axis=1)


def posterior(x, t, mu, s):
    """E[x_0 | x_t = x] (N, d) and Cov(x_0 | x_t = x) (N, d, d) for rFM (S2).

    x (N, d), mu (K, d), 0 < t < 1.
    """
    v = variance(t, s)
    weights = component_weights(x, t, mu, s)
    centre = weights @ mu
    second = np.einsum("nk,ki,kj->nij", weights, mu, mu)
    between = second - centre[:, :, None] * centre[:, None]
    mean = t**2 / v * centre + (1 - t) * s**2 / v * x
    return mean, (t**2 / v) ** 2 * between + s**2 * t**2 / v * np.eye(x.shape[1])


def marginal_field(x, t, mu, s=0.0):
    """u_t(x) (N, d) for rFM: (x - E[x_0 | x_t = x]) / t; x (N, d), mu (K, d) (S2, C2).

    Written so that it holds at t = 0 too when s > 0.
    """
    a = slope(t, s)
    return a * x - (1 + (1 - t) * a) * (component_weights(x, t, mu, s) @ mu)


def jacobian(x, t, mu, s):
    """J_t(x) = (I - (1-t)/t^2 Cov(x_0 | x_t = x)) / t, (N, d, d); 0 < t < 1 (S2)."""
    _, covariance = posterior(x, t, mu, s)
    return (np.eye(x.shape[1]) - (1 - t) / t**2 * covariance) / t


def slope_between_atoms(t, m):
    """Slope of u_t midway between atoms +-m e, along e: (1 - (1-t) m^2 / t^2) / t (S2)."""
    return (1 - (1 - t) * m**2 / t**2) / t


def amplification(t_0, s):
    """Factor by which an error made at t_0 has grown at t = 1: 1 / sigma_{t_0} (S3).

    1 / t_0 for a point mass, s = 0.
    """
    return variance(t_0, s) ** -0.5


def estimation_variance(t, n, d, s, rho=0.0):
    """Variance of each entry of a least-squares A in u = A x_t, from n pairs in R^d (S4).

    s^2 (1-rho^2) / ((n - d - 1) (Var x_t)^2), n > d + 1; Gaussian coupling of correlation -rho.
    """
    return s**2 * (1 - rho**2) / ((n - d - 1) * variance(t, s, rho) ** 2)


def collapse_time(n, d, s):
    """Before this t one of n points of N(0, s^2 I_d) has all the weight, as d grows (S4).

    s / (s + sqrt(n^(2/d) - 1)), where ln n is I(x_0; x_t) = (d/2) ln(Var x_t / t^2).
    """
    return s / (s + (n ** (2 / d) - 1) ** 0.5)


def jump_slope(above, below):
    """Limit of t J_t across a plane where the density of q jumps from `below` to `above` (S5).

    (2/pi) ((above - below) / (above + below))^2, as t -> 0.
    """
    return 2 / np.pi * ((above - below) / (above + below)) ** 2


def slope_bound(t, s, radius):
    """Bound of |J_t(x)|, all x, for q = q_0 * N(0, s^2 I), |q_0| <= radius, s > 0 (S5).

    |a| + t (1-t) radius^2 / (Var x_t)^2, reached where a < 0 by two atoms, midway.
    """
    return abs(slope(t, s)) + t * (1 - t) * radius**2 / variance(t, s) ** 2


# ---- Estimators -------------------------------------------------------------------------------
def pairs(x_0, couple, t, generator=None):
    """(x_t, u), each (N, d), as the training code makes them: wtflow's coupling and path.

    x_0 (N, d) tensor, t a number.
    """
    x_1 = couple(x_0, generator)
    return wtflow.path(x_0, x_1, torch.full((len(x_0),), t, dtype=x_0.dtype)), x_1 - x_0


def gaussian_coupling(x_0, generator, s, rho):
    """x_1 ~ N(0, I) at correlation -rho with x_0 ~ N(0, s^2 I), of its shape (W2)."""
    return -rho * x_0 / s + (1 - rho**2) ** 0.5 * wtflow.independent(x_0, generator)


def fitted_slope(x_t, u):
    """Least-squares a of u = a x_t, the linear field of smallest loss, and its standard error."""
    power = x_t.square().sum()
    a = (x_t * u).sum() / power
    return a.item(), ((u - a * x_t).square().mean() / power).sqrt().item()


def difference_quotient(x_0, t, generator):
    """|u - u'| / |x_t - x_t'| for two noises at one x_0 (N, d): the Lipschitz constant of S1."""
    x, u = pairs(x_0, wtflow.independent, t, generator)
    y, v = pairs(x_0, wtflow.independent, t, generator)
    return ((u - v).norm() / (x - y).norm()).item()


def tweedie_field(x, t, mu, s, forward=False):
    """u_t(x) (d,) for one x (d,), by autograd of log p_t (Tweedie), without the posterior.

    u_t = -(x + t grad log p_t(x)) / (1-t); x and mu (K, d) are tensors. forward=True gives FM's
    field instead, noise at 0 and data at 1, where x_t = (1-t) x_1 + t x_0 and
    u_t = (x + (1-t) grad log p_t(x)) / t: the duality of S1.
    """
    of_data, of_noise = (t, 1 - t) if forward else (1 - t, t)
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    v = (of_data * s) ** 2 + of_noise**2
    log_p = torch.logsumexp(-(x - of_data * mu).square().sum(-1) / (2 * v), 0)
    (gradient,) = torch.autograd.grad(log_p, x, create_graph=True)
    field = (x + of_noise * gradient) / of_data
    return field if forward else -field


def autograd_slope(t, mu, s, x, e):
    """e' J_t(x) e, the derivative of tweedie_field; x, e (d,) and mu (K, d) arrays (S2)."""
    mu, x = torch.as_tensor(mu), torch.as_tensor(x)
    J = torch.autograd.functional.jacobian(lambda y: tweedie_field(y, t, mu, s), x)
    return float(e @ J.numpy() @ e)


def largest_slope(s):
    """(time, slope) where the slope of u_t for N(0, s^2 I) is largest, by search (S2)."""
    origin = np.zeros((1, 2))

    def downhill(t):
        return -autograd_slope(t, origin, s, origin[0], ATOM_AXIS)

    best = minimize_scalar(downhill, (0.5 * s, s, 2 * s), tol=1e-9)
    return best.x, -best.fun


def grown(delta, t_0, mu, s=0.0):
    """|x(1) - x'(1)| / |delta| for two solutions of dx/dt = u_t(x), delta (d,) apart at t_0 (S3).

    They start at the data mean. The ODE is solved to a relative 1e-9.
    """

    def velocity(t, x):
        return marginal_field(x.reshape(2, -1), t, mu, s).ravel()

    centre = (1 - t_0) * mu.mean(0)
    start = np.concatenate([centre, centre + delta])
    flow = solve_ivp(velocity, (t_0, 1), start, rtol=1e-9, atol=1e-12)
    end, other_end = flow.y[:, -1].reshape(2, -1)
    return np.linalg.norm(other_end - end) / np.linalg.norm(delta)


def spread_of_fits(t, n, s, rho, d, repeats, generator):
    """Mean (A - a I)^2 per entry over `repeats` fits A of u = A x_t to n pairs, with its error."""
    x_0 = s * normal(generator, repeats * n, d)
    x_t, u = pairs(x_0, partial(gaussian_coupling, s=s, rho=rho), t, generator)
    fits = torch.linalg.lstsq(x_t.view(repeats, n, d), u.view(repeats, n, d)).solution
    errors = fits - slope(t, s, rho) * torch.eye(d, dtype=fits.dtype)
    return mean_se(errors.square().mean((1, 2)))


def measured_collapse(n, d, s, points, generator):
    """The t where the mean weight of x_0 itself, one of `points` atoms of n, is one half (S4)."""
    atoms = s * normal(generator, n, d)
    times = collapse_time(n, d, s) * np.linspace(0.8, 1.2, 9)
    own = []
    for t in times:
        x_t, _ = pairs(atoms[:points], wtflow.independent, t, generator)
        weights = component_weights(x_t.numpy(), t, atoms.numpy(), 0.0)
        own.append(weights.diagonal().mean())
    return np.interp(-0.5, -np.array(own), times)


def slope_at_jump(t, above, below, points, generator):
    """t J_t and its standard error at x = 0, where the density jumps, by wtflow pairs (S5).

    1 - (1-t)/t^2 Var(x_0 | x_t), of the pairs whose |x_t| < t/10.
    """
    size = 10 * t * torch.rand(points, 1, generator=generator, dtype=torch.float64)
    negative = torch.rand(points, 1, generator=generator) < below / (above + below)
    x_0 = torch.where(negative, -size, size)
    x_t, _ = pairs(x_0, wtflow.independent, t, generator)
    near = x_0[x_t.abs() < t / 10]
    var, se = mean_se((near - near.mean()).square())
    return 1 - (1 - t) / t**2 * var, (1 - t) / t**2 * se


# ---- Table ------------------------------------------------------------------------------------
def table(seed=0):
    """Rows for S1-S5."""
    generator = torch.Generator().manual_seed(seed)
    x_0 = normal(generator, 20_000, 8)
    yield from rows_S1(x_0[:64], generator)
    yield from rows_S2(x_0, generator)
    yield from rows_S3(x_0, generator)
    yield from rows_S4(generator)
    yield from rows_S5(generator)


def rows_S1(x_0, generator):
    """Rows for S1 at points x_0 (N, d)."""
    constant = difference_quotient(x_0, 0.01, generator)
    yield Row("S1", "Lipschitz constant of u_t(x|x_0), t=0.01", 100, constant)
    constants = [difference_quotient(x_0, t, generator) for t in POWER_LAW_TIMES]
    yield Row("S1", "its exponent in t", -1, *exponent(POWER_LAW_TIMES, constants))
    x = np.array([0.3, -0.4])
    dual = tweedie_field(torch.as_tensor(x), 0.8, torch.as_tensor(ATOMS), 0.3, forward=True)
    u = marginal_field(x[None], 0.2, ATOMS, 0.3)
    what = "duality -u^FM_0.8 at u^rFM_0.2 (component 1)"
    yield Row("S1", what, -dual[0].item(), u[0, 0])


def rows_S2(x_0, generator):
    """Rows for S2; x_0 (N, d) ~ N(0, I)."""
    for s in (0.3, 0.03):
        time, largest = peak(s)
        measured_time, measured = largest_slope(s)
        yield Row("S2", f"largest slope, N(0, s^2 I), s={s}", largest, measured)
        yield Row("S2", f"  at time, s={s}", time, measured_time)
        fit = fitted_slope(*pairs(s * x_0, wtflow.independent, time, generator))
        yield Row("S2", f"  the same from wtflow pairs, s={s}", largest, *fit)
    fit = fitted_slope(*pairs(0.3 * x_0, wtflow.independent, 0.0, generator))
    yield Row("S2", "slope at t=0, N(0, s^2 I), s=0.3", -1, *fit)

    off = [autograd_slope(t, ATOMS, 0.0, OFF, ATOM_AXIS) for t in POWER_LAW_TIMES]
    between = [autograd_slope(t, ATOMS, 0.0, MIDWAY, ATOM_AXIS) for t in POWER_LAW_TIMES]
    fit = exponent(POWER_LAW_TIMES, off)
    yield Row("S2", "exponent of the slope off two atoms", -1, *fit)
    fit = exponent(POWER_LAW_TIMES, np.negative(between))
    yield Row("S2", "exponent between two atoms", -3, *fit)
    predicted = slope_between_atoms(1e-3, ATOM_RADIUS)
    yield Row("S2", "slope between them at t=0.001", predicted, between[-1])


def rows_S3(x_0, generator):
    """Rows for S3; x_0 (N, d) ~ N(0, I)."""
    delta = np.array([1e-3, 2e-3])
    what = "growth of an error made at t=0.01, point mass"
    yield Row("S3", what, 100, grown(delta, 0.01, ATOMS[:1]))
    what = "growth from t=0, N(0, s^2 I), s=0.1"
    yield Row("S3", what, 10, grown(delta, 0.0, np.zeros((1, 2)), 0.1))
    s = 0.3
    for t in (0.0, 0.1):
        a, times = slope(t, s), torch.full((len(x_0),), t, dtype=x_0.dtype)
        loss = wtflow.flow_matching_loss(
            lambda x, t, a=a: a * x, s * x_0, wtflow.independent, generator, times
        )
        predicted = s**2 / variance(t, s)
        yield Row(
            "S3", f"irreducible loss at t={t:g}, s=0.3, per dimension", predicted, *mean_se(loss)
        )


def rows_S4(generator):
    """Rows for S4."""
    n, d, s = 200, 2, 0.3
    for rho, times in ((0.0, (0.0, 0.083, 1.0)), (0.6, (0.0, 0.186, 1.0)), (-0.6, (0.0, 0.186))):
        for t in times:  # 0.083 and 0.186 are tc
            what = f"n Var of the fitted slope at t={t:g}, s=0.3, rho={rho:g}"
            spread = spread_of_fits(t, n, s, rho, d, 2000, generator)
            yield Row("S4", what, n * estimation_variance(t, n, d, s, rho), *(n * np.array(spread)))
    time = collapse_time(1000, 64, 1.0)
    measured = measured_collapse(1000, 64, 1.0, 200, generator)
    yield Row("S4", "limit of large d: collapse of 1000 points, s=1, d=64", time, measured)


def rows_S5(generator):
    """Rows for S5: far from a bounded set, at a jump, and the bound of a set with noise."""
    far = 50 * OFF
    measured = 0.01 * autograd_slope(0.01, ATOMS, 0.0, far, ATOM_AXIS)
    yield Row("S5", "t J_t far from two atoms, t=0.01", 1, measured)
    for below in (0.0, 0.1):
        what = f"t J_t where the density jumps from {below:g} to 1, t=0.001"
        jump = slope_at_jump(1e-3, 1.0, below, 1_000_000, generator)
        yield Row("S5", what, jump_slope(1.0, below), *jump)
    for s in (0.3, 0.1):
        t = s**2 / 2  # the slope a is negative there
        measured = -autograd_slope(t, ATOMS, s, MIDWAY, ATOM_AXIS)
        what = f"bound of |J_t|, t=s^2/2: two atoms of width s={s:g}"
        yield Row("S5", what, slope_bound(t, s, ATOM_RADIUS), measured)
