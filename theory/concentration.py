"""C1-C5: concentration of measure and the centripetal potential field (CPF). Data at 0, noise at 1.

[paper] "the concentration of measure in high-dimensional Gaussian manifolds induces structured
irregularities, giving rise to a Centripetal Potential Field (CPF) that steers trajectories away
from Optimal Transport (OT) paths". The formulas are [derived]; proofs in README.md.
Figure: draw.PANELS.
"""

import numpy as np
import torch
from scipy.special import gammaln
from scipy.stats import beta, ncx2

import wtflow
from theory import Row, mean_se, normal, std_se
from theory.singularity import fitted_slope, marginal_field, pairs, slope

SAMPLES = 10_000  # points behind each row of the table


# ---- Closed forms -----------------------------------------------------------------------------
def radius_std(d):
    """Standard deviation of |x_1| / sqrt(d), x_1 ~ N(0, I_d); tends to 1 / sqrt(2d) (C1)."""
    mean = np.exp(gammaln((d + 1) / 2) - gammaln(d / 2)) * (2 / d) ** 0.5
    return (1 - mean**2) ** 0.5


def cosine_distribution(d):
    """Distribution of the cosine c between x_1 and a fixed direction of R^d, d >= 2 (C1).

    (c+1)/2 ~ Beta((d-1)/2, (d-1)/2), Var c = 1/d. A distribution of scipy.stats.
    """
    return beta((d - 1) / 2, (d - 1) / 2, loc=-1, scale=2)


def inward(t, m2, d):
    """E<x_t, u_t> = t d - (1-t) m2, half the derivative of E|x_t|^2 (C3).

    Negative, centripetal, iff t < t* of turning.
    """
    return t * d - (1 - t) * m2


def turning(m2, d):
    """(t*, E|x_t*|^2) = (m2, m2 d) / (m2 + d): when and how near to the origin paths come (C3)."""
    return m2 / (m2 + d), m2 * d / (m2 + d)


def inward_probability(t, m2, d):
    """P(<x_t, u> < 0 | |x_0|^2 = m2), exactly, 0 < t < 1 (C3). [ours]

    Noncentral chi^2_d(m2 (1-2t)^2 / 4t^2) below m2 / 4t^2.
    """
    return ncx2.cdf(m2 / (4 * t**2), d, m2 * (1 - 2 * t) ** 2 / (4 * t**2))


def kinetic_energy(s, rho=0.0):
    """(1/d) int E|u_t|^2 dt for q = N(0, s^2 I) at a Gaussian coupling of correlation -rho (C4).

    1 + s^2 + 2 rho s - s sqrt(1-rho^2) arccos(-rho): 1 + s^2 - pi s / 2 for rFM and
    W2^2 / d = (1-s)^2 for rho = -1.
    """
    return 1 + s**2 + 2 * rho * s - loss_floor(s, rho)


def loss_floor(s, rho=0.0):
    """(1/d) int E|u - u_t|^2 dt for the same q: the least loss of a field (C4).

    s sqrt(1-rho^2) arccos(-rho), pi s / 2 for rFM; with kinetic_energy it is E|u|^2 / d. For every
    q of covariance s^2 I it is the loss of the best affine field, hence at least the floor.
    """
    return s * (1 - rho**2) ** 0.5 * np.arccos(-rho)


def excess(t, m2, d, squared_cost):
    """E|x_t|^2 of a coupling of E|x_1 - x_0|^2 = squared_cost over rFM's, for every q (C4).

    t (1-t) (m2 + d - squared_cost); W2^2 for optimal transport.
    """
    return t * (1 - t) * (m2 + d - squared_cost)


# ---- Estimators -------------------------------------------------------------------------------
def shell(n, d, generator):
    """n points x_0 (n, d) with |x_0|^2 = d: features as a layer norm leaves them, m2 = d."""
    return torch.nn.functional.normalize(normal(generator, n, d)) * d**0.5


def samples_by_kind(n, generator):
    """{kind: n points (n, 16)} of each kind of q that the claims hold for."""
    z = normal(generator, n, 16)
    which = torch.randint(3, (n,), generator=generator)
    angle = 2 * torch.pi * torch.rand(n, generator=generator, dtype=torch.float64)
    circle = torch.zeros_like(z)
    circle[:, 0] = 4 * angle.cos()
    circle[:, 1] = 4 * angle.sin()
    atoms = torch.zeros(3, 16, dtype=z.dtype)
    atoms[0, 0], atoms[1, 1], atoms[2, 2] = 2, 3, 4
    widths = torch.linspace(0.1, 2, 16, dtype=z.dtype)
    return {"Gaussian": widths * z, "three atoms": atoms[which], "circle in R^16": circle}


def radial_velocity(x_0, t, generator=None):
    """<x_t, u> (N,) of each x_0 (N, d), from wtflow's path and independent coupling."""
    x_t, u = pairs(x_0, wtflow.independent, t, generator)
    return (x_t * u).sum(1)


def energy_from_pairs(x_0, couple, generator, nodes=12):
    """(1/d) int E|a_t x_t|^2 dt and its standard error, for x_0 (N, d) (C4).

    a_t is the regression of u on x_t at `nodes` Gauss-Legendre times.
    """
    times, weights = np.polynomial.legendre.leggauss(nodes)
    values, errors = [], []
    for t in (times + 1) / 2:
        x_t, u = pairs(x_0, couple, t, generator)
        a, a_se = fitted_slope(x_t, u)
        power, power_se = mean_se(x_t.square().mean(1))
        values.append(a**2 * power)
        errors.append(np.hypot(2 * a * a_se * power, a**2 * power_se))
    return weights @ values / 2, float(np.linalg.norm(weights * errors / 2))


# ---- Table ------------------------------------------------------------------------------------
def table(seed=0):
    """Rows for C1-C5."""
    generator = torch.Generator().manual_seed(seed)
    yield from rows_C1(generator)
    yield from rows_C2(generator)
    yield from rows_C3(generator)
    yield from rows_C4(generator)
    yield from rows_C5(generator)


def rows_C1(generator):
    """Rows for C1."""
    for d in (16, 256):
        x_1 = wtflow.independent(torch.zeros(SAMPLES, d, dtype=torch.float64), generator)
        norm = x_1.norm(dim=1)
        yield Row("C1", f"std of |x_1|/sqrt(d), d={d}", radius_std(d), *std_se(norm / d**0.5))
        squared_cosine = (x_1[:, 0] / norm).square()
        yield Row("C1", f"variance of a cosine, d={d}", 1 / d, *mean_se(squared_cosine))


def rows_C2(generator):
    """Rows for C2."""
    for kind, x_0 in samples_by_kind(SAMPLES, generator).items():
        fit = fitted_slope(*pairs(x_0, wtflow.independent, 0.0, generator))
        yield Row("C2", f"slope of u on x at t=0, {kind}", -1, *fit)
    mu = np.array([[2.0, 1.0], [-1.0, 0.5], [0.0, -1.0]])
    x = np.array([[0.7, -0.2]])
    u = marginal_field(x, 1e-8, mu, 0.5)
    what = "<u_t(x), x> / |x|^2 at t=1e-8, three Gaussians"
    yield Row("C2", what, -1, (u * x).sum() / (x**2).sum())


def rows_C3(generator):
    """Rows for C3."""
    t = 0.3
    for kind, x_0 in samples_by_kind(SAMPLES, generator).items():
        squared = x_0.square().sum(1)
        m2, d = squared.mean().item(), x_0.shape[1]
        # Against the sample's own m2 the error of the mean is that of |x_1|^2 and <x_0, x_1> alone.
        radial = radial_velocity(x_0, t, generator) + (1 - t) * (squared - m2)
        yield Row("C3", f"E<x_t, u>, t={t}, {kind}", inward(t, m2, d), *mean_se(radial))
    for d in (16, 256):
        x_0 = shell(SAMPLES, d, generator)
        turn, least = turning(d, d)
        x_t, _ = pairs(x_0, wtflow.independent, turn, generator)
        yield Row("C3", f"E|x_t|^2 at t*=1/2, d={d}", least, *mean_se(x_t.square().sum(1)))
        share = mean_se(radial_velocity(x_0, 0.45, generator) < 0)
        what = f"P(<x_t, u> < 0), t=0.45, d={d}"
        yield Row("C3", what, inward_probability(0.45, d, d), *share)


def rows_C4(generator):
    """Rows for C4; the signs +-1 are data of covariance I that are not Gaussian."""
    for s in (1.0, 0.3):
        x_0 = s * normal(generator, SAMPLES, 16)
        energy = energy_from_pairs(x_0, wtflow.independent, generator)
        what = f"kinetic energy of rFM / d, s={s} (W2^2/d={(1 - s) ** 2:.2f})"
        yield Row("C4", what, kinetic_energy(s), *energy)
    cost = (wtflow.independent(x_0, generator) - x_0).square().mean(1)
    yield Row("C4", "coupling cost E|x_1 - x_0|^2 / d, s=0.3", 1 + 0.3**2, *mean_se(cost))
    signs = torch.sign(normal(generator, SAMPLES, 16))
    loss = wtflow.flow_matching_loss(
        lambda x, t: slope(t, 1.0)[:, None] * x, signs, wtflow.independent, generator
    )
    yield Row("C4", "loss of the affine field, x_0 = +-1", loss_floor(1.0), *mean_se(loss))
    x_0 = signs[:2560, :1]
    x_1 = torch.cat([wtflow.optimal(part, generator) for part in x_0.split(256)])
    measured = ((x_0 + x_1) / 2).square().mean() - (x_0.square() + x_1.square()).mean() / 4
    squared_cost = 2 - 2 * (2 / np.pi) ** 0.5  # W2^2: x_0 is the sign of x_1
    what = "limit of large batches: E|x_t|^2 of OT over rFM's, x_0 = +-1, t=1/2"
    yield Row("C4", what, excess(0.5, 1, 1, squared_cost), measured.item())


def rows_C5(generator):
    """Rows for C5. The mean of the three atoms is 2/3 in component 1."""
    x_0 = samples_by_kind(SAMPLES, generator)["three atoms"]
    x_t, u = pairs(x_0, wtflow.independent, 1.0, generator)
    what = "intercept of u - x at t=1, component 1, three atoms"
    yield Row("C5", what, -2 / 3, *mean_se((u - x_t)[:, 0]))
