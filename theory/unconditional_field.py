"""B1-B3, B6: a field that does not see the time, and one that is affine. Data at 0, noise at 1.

Without t it learns v(x) = E[u_t(x) | x], the average over p(t | x), proportional to p_t(x). By the
continuity equation div (v int_0^1 p_t dt) = q - p_1: data are sources, noise is a sink. Where q is
isotropic the divergence theorem gives v. The formulas are [derived]; fields without time are those
of Sun et al. 2025 (arXiv 2502.13129). Proofs: README.md. Figure: draw.PANELS.
"""

import numpy as np
import torch
from scipy.special import gammaln
from scipy.stats import chi

import wtflow
from theory import Row, mean_se, normal
from theory.singularity import slope, variance
from theory.worst_transport import gaussian_coupling, minibatch_worst

SAMPLES = 40_000  # points behind each row of the table
SMALL, LARGE = 0.5, 1.75**0.5  # the two scales of B3, of equal weight: m2 = d


# ---- Closed forms -----------------------------------------------------------------------------
def chi_mean(k):
    """E chi_k = sqrt(2) Gamma((k+1)/2) / Gamma(k/2), k > 0; close to sqrt(k)."""
    return 2**0.5 * np.exp(gammaln((k + 1) / 2) - gammaln(k / 2))


def displacement(delta, m):
    """|v(x)| across a subspace of codimension m >= 2 at distance delta off it (B1).

    E[chi_{m-1} | chi_{m-1} > delta]: one step ends at radius delta plus this.
    """
    return chi_mean(m - 1) * chi.sf(delta, m) / chi.sf(delta, m - 1)


def radial_field(r, d, scales, rho=0.0):
    """v_r (N,) at |x| = r (N,) for data of `scales` s, N(0, s^2 I_d) with equal weights (B1-B3).

    By the divergence theorem sum_s P(|x_0| < r) - P(|x_1| < r) over sum_s int_0^1 of the density of
    |x_t| at r. s = 0 is a point mass. Within each scale the coupling is Gaussian, of correlation
    -rho; rho = 0 is rFM.
    """
    r = np.atleast_1d(np.asarray(r, float))
    inside = sum(chi.cdf(r / s, d) if s else np.ones_like(r) for s in scales)
    flux = inside - len(scales) * chi.cdf(r, d)
    return flux / sum(time_at_radius(r, d, s, rho) for s in scales)


def time_at_radius(r, d, s, rho):
    """int_0^1 of the density of |x_t| at each r > 0 (N,) for N(0, s^2 I_d): time spent there.

    By Gauss-Legendre on panels as wide as a small part of t, where sigma_t can hardly change.
    """
    nodes, weights = np.polynomial.legendre.leggauss(8)
    ends = np.append(0, np.geomspace(1e-6, 1, 400))
    half = np.diff(ends)[:, None] / 2
    t = ends[:-1, None] + half * (1 + nodes)
    sigma = variance(t, s, rho).ravel() ** 0.5
    return chi.pdf(r[:, None] / sigma, d) / sigma @ (half * weights).ravel()


# ---- Estimators -------------------------------------------------------------------------------
def pairs_at_any_time(x_0, couple, generator, t_max=1.0):
    """(x_t, u), each (N, d): the input and the target of a field in wtflow.flow_matching_loss.

    t ~ U(0, t_max).
    """
    recorded = {}

    def field(x_t, t):
        recorded["x_t"] = x_t
        return torch.zeros_like(x_t)

    def noise(x_0, generator):
        x_1 = couple(x_0, generator)
        recorded["u"] = x_1 - x_0
        return x_1

    t = t_max * torch.rand(len(x_0), generator=generator, dtype=x_0.dtype)
    wtflow.flow_matching_loss(field, x_0, noise, generator, t)
    return recorded["x_t"], recorded["u"]


def in_shell(x_t, u, low, high):
    """Radii |x_t| (M,) between low and high, and the parts (M,) of u along x_t there; arrays."""
    radius = x_t.norm(dim=1)
    chosen = (radius > low) & (radius < high)
    along = (x_t * u).sum(1)[chosen] / radius[chosen]
    return radius[chosen].numpy(), along.numpy()


def slope_on(u, predicted):
    """Least-squares factor of `predicted` in u, both (N, d), and its standard error over rows."""
    power = predicted.square().sum()
    factor = (u * predicted).sum() / power
    rest = ((u - factor * predicted) * predicted).sum(1)
    return factor.item(), (rest.norm() / power).item()


def scales_mixture(n, d, scales, generator):
    """n points (n, d) of N(0, s^2 I), s drawn from `scales` with equal weights."""
    chosen = torch.randint(len(scales), (n, 1), generator=generator)
    return torch.tensor(scales, dtype=torch.float64)[chosen] * normal(generator, n, d)


def gaussian_score(r, new):
    """Mahalanobis distances (m, h, w) of maps new (m, d, h, w) under wtflow's Gaussians of r (B6).

    r (n, d, h, w): the maps that the Gaussians are fitted to, at each position.
    """
    gaussian = wtflow.PositionGaussian(*r.shape[1:])
    gaussian.fit(r)
    return gaussian.squared_distance(new.float()).sqrt()


# ---- Table ------------------------------------------------------------------------------------
def table(seed=0):
    """Rows for B1-B3 and B6."""
    generator = torch.Generator().manual_seed(seed)
    yield from rows_B1(generator)
    yield from rows_B2(generator)
    yield from rows_B3(generator)
    yield from rows_B6(generator)


def rows_B1(generator):
    """Rows for B1: a subspace of 8 dimensions, and points about it."""
    k = 8
    for m, low, high in ((20, 0.05, 0.2), (20, 0.5, 1.0), (100, 0.05, 0.2)):
        x_0 = torch.zeros(SAMPLES, k + m, dtype=torch.float64)
        x_0[:, :k] = normal(generator, SAMPLES, k)
        x_t, u = pairs_at_any_time(x_0, wtflow.independent, generator)
        delta, velocity = in_shell(x_t[:, k:], u[:, k:], low, high)
        what = f"|x1_hat| across a subspace, m={m}, off by {low:g} to {high:g}"
        predicted = (delta + displacement(delta, m)).mean()
        yield Row("B1", what, predicted, *mean_se(delta + velocity))
        if m == 20 and high < 0.5:
            near = x_t[:, k:].norm(dim=1) < high
            fit = slope_on(u[near, :k], x_t[near, :k])
            yield Row("B1", "  slope of u along the subspace there", -1, *fit)
    s, m = 0.1, 20
    x_0 = s * normal(generator, 2 * SAMPLES, m)
    x_t, u = pairs_at_any_time(x_0, wtflow.independent, generator)
    for y in (1.0, 1.5, 3.0):
        delta = y * s * m**0.5
        radii, velocity = in_shell(x_t, u, 0.95 * delta, 1.05 * delta)
        what = f"v across data of thickness {s:g}, m={m}, off by {y:g} s sqrt(m)"
        predicted = np.interp(radii, *on_grid(radii, m, (s,))).mean()
        yield Row("B1", what, predicted, *mean_se(velocity))


def on_grid(radii, d, scales):
    """17 radii (N,) that span `radii`, and radial_field there."""
    grid = np.linspace(radii.min(), radii.max(), 17)
    return grid, radial_field(grid, d, scales)


def rows_B2(generator):
    """Rows for B2: one step does not move whitened Gaussian data, so x1_hat has slope 1."""
    x_0 = normal(generator, 20_480, 16)
    couplings = {
        "rFM": wtflow.independent,
        "correlation -0.9": lambda x, g: gaussian_coupling(x, g, 1.0, 0.9),
        "minibatch worst": minibatch_worst,
    }
    for name, couple in couplings.items():
        x_t, u = pairs_at_any_time(x_0, couple, generator)
        fit = slope_on(u + x_t, x_t)
        yield Row("B2", f"slope of x1_hat on x, N(0, I), {name}", 1, *fit)


def rows_B3(generator):
    """Rows for B3: |x1_hat| of the two scales and of points between them."""
    d = 16
    scales = (SMALL, LARGE)
    x_0 = scales_mixture(8 * SAMPLES, d, scales, generator)
    x_t, u = pairs_at_any_time(x_0, wtflow.independent, generator)
    for s, name in ((SMALL, "small"), (0.85, "between"), (LARGE, "large")):
        radii, velocity = in_shell(x_t, u, 0.95 * s * d**0.5, 1.05 * s * d**0.5)
        what = f"|x1_hat| from |x|/sqrt(d) = {s:.2f} ({name})"
        predicted = (radii + np.interp(radii, *on_grid(radii, d, scales))).mean()
        yield Row("B3", what, predicted, *mean_se(radii + velocity))


def rows_B6(generator):
    """Rows for B6: the score of a residual over that of the features, of fields affine in x."""
    widths = torch.tensor([0.6, 0.8, 1.0, 1.2], dtype=torch.float64)[:, None, None]
    x_0, z = widths * normal(generator, 4000, 4, 2, 2), normal(generator, 1, 4, 2, 2)
    turn, _ = torch.linalg.qr(normal(generator, 4, 4))
    fields = {
        "exact for a Gaussian": lambda x, t: slope(t[0], widths) * x,
        "half a rotation": lambda x, t: torch.einsum("ij,njhw->nihw", turn / 2, x),
    }
    for name, v in fields.items():
        r = wtflow.residual(v, x_0, z, 0.5, 0.0)
        ratio = (gaussian_score(r, r) / gaussian_score(x_0, x_0)).mean().item()
        yield Row("B6", f"score of r_t over that of x_0, t=0.5, field: {name}", 1, ratio)
