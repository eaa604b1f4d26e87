"""B1-B5: the time-unconditional field. Time runs from data (t = 0) to noise (t = 1).

Trained on t ~ U(0, T), T = t_max, it learns v(x) = E[u_t(x) | x], the average over p(t | x),
proportional to p_t(x). By the continuity equation div (v int_0^T p_t dt) = q - p_T: data are
sources, noise is a sink. Where q is isotropic the divergence theorem gives v. The formulas are
[derived]; time-unconditional fields are those of Sun et al. 2025 (arXiv 2502.13129).
Proofs: README.md. Figure: draw.unconditional_field_figure.
"""

import numpy as np
import torch
from scipy.special import gamma, gammaln, logsumexp, softmax
from scipy.stats import chi

import wtflow
from theory import Row, mean_se, normal
from theory.singularity import marginal_field, variance
from theory.worst_transport import gaussian_coupling, minibatch_worst

SAMPLES = 40_000  # points behind each row of the table
SMALL, LARGE = 0.5, 1.75**0.5  # the two scales of B3, of equal weight: m2 = d


# ---- Closed forms -----------------------------------------------------------------------------
def chi_mean(k):
    """E chi_k = sqrt(2) Gamma((k+1)/2) / Gamma(k/2), k > 0; close to sqrt(k)."""
    return 2**0.5 * np.exp(gammaln((k + 1) / 2) - gammaln(k / 2))


def displacement(delta, m, t_max=1.0):
    """|v(x)| across a subspace of codimension m >= 2 at distance delta off it (B1, B4).

    E[chi_{m-1} | chi_{m-1} > delta / T]: one step ends at radius delta plus this.
    """
    a = delta / t_max
    return chi_mean(m - 1) * chi.sf(a, m) / chi.sf(a, m - 1)


def radial_field(r, d, scales, t_max=1.0, rho=0.0):
    """v_r (N,) at |x| = r (N,) for data of `scales` s, N(0, s^2 I_d) with equal weights (B1-B4).

    By the divergence theorem sum_s P(|x_0| < r) - P(|x_T| < r) over sum_s int_0^T of the density of
    |x_t| at r. s = 0 is a point mass. Within each scale the coupling is Gaussian, of correlation
    -rho; rho = 0 is rFM.
    """
    r = np.atleast_1d(np.asarray(r, float))
    flux, density = np.zeros_like(r), np.zeros_like(r)
    for s in scales:
        inside = chi.cdf(r / s, d) if s else np.ones_like(r)
        flux += inside - chi.cdf(r / variance(t_max, s, rho) ** 0.5, d)
        density += time_at_radius(r, d, s, t_max, rho)
    return flux / density


def time_at_radius(r, d, s, t_max, rho):
    """int_0^T of the density of |x_t| at each r > 0 (N,) for N(0, s^2 I_d): time spent there.

    By Gauss-Legendre on panels as wide as a small part of t, where sigma_t can hardly change.
    """
    nodes, weights = np.polynomial.legendre.leggauss(8)
    ends = t_max * np.append(0, np.geomspace(1e-6, 1, 400))
    half = np.diff(ends)[:, None] / 2
    t = ends[:-1, None] + half * (1 + nodes)
    sigma = variance(t, s, rho).ravel() ** 0.5
    return chi.pdf(r[:, None] / sigma, d) / sigma @ (half * weights).ravel()


def edge(delta, s, m):
    """|v| for thickness s as m grows, while s and delta / sqrt(m) are small (B1).

    sqrt(m) sqrt(1 - m s^2 / delta^2) from delta = s sqrt(m) on, 0 before: the jump of a subspace
    has become a slope.
    """
    return (m * np.maximum(1 - m * s**2 / np.asarray(delta, float) ** 2, 0)) ** 0.5


def edge_next(delta, s, m):
    """The next order in 1/m of edge, beyond s sqrt(m): edge (1 - (3 k^2 - 2 k + 3) / (4 m)) (B1).

    k = 1 / (delta^2 / (m s^2) - 1).
    """
    k = 1 / (np.asarray(delta, float) ** 2 / (m * s**2) - 1)
    return edge(delta, s, m) * (1 - (3 * k**2 - 2 * k + 3) / (4 * m))


def edge_slope(s, m):
    """Slope of v at delta = s sqrt(m) in the same limit, where edge has a kink (B1).

    0.313 m^(1/4) / s: (Gamma(1) - Gamma(1/2) Gamma(3/4) / Gamma(1/4)) / Gamma(1/4) times
    sqrt(8) m^(1/4) / s.
    """
    moments = gamma(1) - gamma(0.5) * gamma(0.75) / gamma(0.25)
    return 8**0.5 * moments / gamma(0.25) * m**0.25 / s


def step_from_atom(delta, c, d, t_max=1.0):
    """|v(x)| at distance delta from a single atom a, and log Z (B5); delta, c of one shape, d >= 2.

    The mean, and the logarithm of the integral, of the density r^(d-2) exp(-(r+c)^2 / 2) of
    r = delta / t > delta / T; c = <a, x-a> / delta. c = 0 gives displacement. By Gauss-Legendre on
    12 around the mode: log-concave, it falls at least as fast as exp(-r^2 / 2) from there.
    """
    start = np.asarray(delta / t_max)[..., None]
    c = np.asarray(c)[..., None]
    mode = np.maximum(start, ((c**2 + 4 * (d - 2)) ** 0.5 - c) / 2)
    nodes, weights = np.polynomial.legendre.leggauss(100)
    half = (mode + 12 - np.maximum(start, mode - 12)) / 2
    r = mode + 12 - half * (1 - nodes)
    log_f = (d - 2) * np.log(r) - (r + c) ** 2 / 2 + np.log(half * weights)
    log_Z = logsumexp(log_f, axis=-1)
    return (softmax(log_f, axis=-1) * r).sum(-1), log_Z


def training_set_field(x, atoms, t_max=1.0):
    """v(x) (N, d) for a training set, and the weight P(atom | x) of each atom (N, K) (B5).

    x (N, d), none of them an atom; atoms (K, d), d >= 2. The weight is proportional to
    delta^-(d-1) exp(-h^2 / 2) Z, h the distance of the origin from the line through atom and x.
    """
    y = x[:, None] - atoms
    delta = np.linalg.norm(y, axis=-1)
    c = (y * atoms).sum(-1) / delta
    step, log_Z = step_from_atom(delta, c, x.shape[1], t_max)
    h_squared = (atoms**2).sum(-1) - c**2
    weights = softmax(-(x.shape[1] - 1) * np.log(delta) - h_squared / 2 + log_Z, axis=1)
    return ((weights * step / delta)[..., None] * y).sum(1), weights


# ---- Estimators -------------------------------------------------------------------------------
def pairs_at_any_time(x_0, couple, generator, t_max=1.0):
    """(x_t, u), each (N, d): the input and the target of a field in wtflow.flow_matching_loss."""
    recorded = {}

    def field(x_t, t):
        recorded["x_t"] = x_t
        return torch.zeros_like(x_t)

    def noise(x_0, generator):
        x_1 = couple(x_0, generator)
        recorded["u"] = x_1 - x_0
        return x_1

    wtflow.flow_matching_loss(field, x_0, noise, generator, t_max=t_max)
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


def field_by_times(x, atoms, t_max=1.0):
    """v(x) (N, d) as the mean of S2's u_t(x) over p(t | x), by quadrature over t (B5).

    Gauss-Legendre on panels as in time_at_radius; x (N, d), atoms (K, d).
    """
    nodes, weights = np.polynomial.legendre.leggauss(8)
    ends = t_max * np.geomspace(1e-4, 1, 200)
    half = np.diff(ends)[:, None] / 2
    t = (ends[:-1, None] + half * (1 + nodes)).ravel()
    squares = [((x[:, None] - (1 - k) * atoms) ** 2).sum(-1) / k**2 for k in t]
    log_p = logsumexp(np.multiply(-0.5, squares), axis=-1) - x.shape[1] * np.log(t)[:, None]
    p = softmax(log_p + np.log(half * weights).reshape(-1, 1), axis=0)
    return sum(p_t[:, None] * marginal_field(x, k, atoms) for p_t, k in zip(p, t, strict=True))


# ---- Table ------------------------------------------------------------------------------------
def table(seed=0):
    """Rows for B1-B5."""
    generator = torch.Generator().manual_seed(seed)
    yield from rows_B1(generator)
    yield from rows_B2(generator)
    yield from rows_B3(generator)
    yield from rows_B4(generator)
    yield from rows_B5(generator)


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
    s, m = 0.001, 1000
    below, above = radial_field(s * m**0.5 * np.array([0.999, 1.001]), m, (s,))
    slope = (above - below) / (0.002 * s * m**0.5)
    what = f"slope of v at s sqrt(m), thickness {s:g}, m={m} (limit)"
    yield Row("B1", what, edge_slope(s, m), slope)


def on_grid(radii, d, scales, t_max=1.0):
    """17 radii (N,) that span `radii`, and radial_field there."""
    grid = np.linspace(radii.min(), radii.max(), 17)
    return grid, radial_field(grid, d, scales, t_max)


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


def rows_B4(generator):
    """Rows for B4, T = 0.05: off a point mass the jump remains; N(0, s^2 I) contracts."""
    d, t_max = 20, 0.05
    origin = torch.zeros(SAMPLES, d, dtype=torch.float64)
    x_t, u = pairs_at_any_time(origin, wtflow.independent, generator, t_max)
    for low, high in ((0.02, 0.1), (0.25, 0.3)):
        delta, velocity = in_shell(x_t, u, low, high)
        what = f"|x1_hat| across a subspace, m={d}, off by {low:g} to {high:g}, T={t_max:g}"
        predicted = (delta + displacement(delta, d, t_max)).mean()
        yield Row("B4", what, predicted, *mean_se(delta + velocity))
    for s in (1.0, SMALL):
        x_0 = s * normal(generator, SAMPLES, d)
        x_t, u = pairs_at_any_time(x_0, wtflow.independent, generator, t_max)
        radii, velocity = in_shell(x_t, u, 0.95 * s * d**0.5, 1.05 * s * d**0.5)
        what = f"v_r from |x| = s sqrt(d), s={s:g}, T={t_max:g}"
        predicted = np.interp(radii, *on_grid(radii, d, (s,), t_max)).mean()
        yield Row("B4", what, predicted, *mean_se(velocity))


def rows_B5(generator):
    """Rows for B5: 8 atoms in 20 dimensions, the others far from the nearest."""
    d = 20
    atoms = 2 * normal(generator, 8, d)
    e = torch.nn.functional.normalize(normal(generator, 1, d), dim=1)
    x = atoms[:1] + 0.7 * e
    near = x - atoms[:1]
    x1_hat = wtflow.euler(lambda x, t: torch.as_tensor(field_by_times(x.numpy(), atoms.numpy())), x)
    step, _ = step_from_atom(0.7, (near @ atoms[0]).item() / 0.7, d)
    what = f"|x1_hat - atom| from 0.7 off it, d={d}, quadrature"
    yield Row("B5", what, 0.7 + step, (x1_hat - atoms[:1]).norm().item())
    atoms *= 0.25
    x_0 = atoms[torch.randint(8, (SAMPLES // 10,), generator=generator)]
    x_t, u = pairs_at_any_time(x_0, wtflow.independent, generator)
    v, _ = training_set_field(x_t.numpy(), atoms.numpy())
    fit = slope_on(u, torch.as_tensor(v))
    yield Row("B5", "factor of the exact field of 8 atoms in u, wtflow pairs", 1, *fit)
    a = np.zeros((2, d))
    a[:, 0] = -0.0010, 0.0011
    _, weights = training_set_field(np.zeros((1, d)), a)
    what = "weight of the nearer of two atoms, 0.0010 to 0.0011 (limit)"
    yield Row("B5", what, 1 / (1 + 1.1 ** (1 - d)), weights[0, 0])
