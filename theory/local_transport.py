"""W5, W6: wtflow.worst, and the residual of a field at t = 0. Data at 0, noise at 1.

x_1 = -rho sqrt(d) x_0/|x_0| + sqrt(1 - rho^2) z is wtflow.worst, [ours] as a reading of the paper's
local worst transport. Its distributions and the first order of W6 are [derived]; the residual
v_theta(x_0, 0) - u_0(x_0) as the score is [ours]. What rho is good for: README.md.
Figure: draw.local_transport_figure.
"""

from functools import partial

import numpy as np
import torch
from scipy.stats import ncx2

import wtflow
from theory import Row, mean_se, normal
from theory.unconditional_field import pairs_at_any_time, slope_on
from theory.worst_transport import a_n, minimum_variance, signal_to_noise, worst_candidate

SAMPLES = 20_000  # points behind each row of the table


# ---- Closed forms -----------------------------------------------------------------------------
def initial_field(x, rho):
    """u_0(x) = -(1 + rho sqrt(d)/|x|) x (N, d), x (N, d), none 0; numpy or torch (W5)."""
    return -(1 + rho * x.shape[1] ** 0.5 / (x**2).sum(1)[:, None] ** 0.5) * x


def gain(rho, d, m2):
    """Signal-to-noise ratio of the target at t = 0 over rFM's, |x_0|^2 = m2 (W5).

    (1 + rho sqrt(d / m2))^2 / (1 - rho^2), which is (1 + rho) / (1 - rho) at m2 = d.
    """
    return (1 + rho * (d / m2) ** 0.5) ** 2 / (1 - rho**2)


def energy_distribution(rho, d):
    """Distribution of |x_1|^2: (1 - rho^2) chi'^2_d(rho^2 d / (1 - rho^2)), whatever x_0 is (W5).

    Mean d, variance 2d (1 - rho^4), where noise has 2d. A distribution of scipy.stats.
    """
    return ncx2(d, rho**2 * d / (1 - rho**2), scale=1 - rho**2)


def energy_variance(rho, d):
    """Var |x_1|^2 = 2d (1 - rho^4) (W5)."""
    return 2 * d * (1 - rho**4)


def distance_to_noise(rho):
    """W2 distance of the distribution of x_1 to N(0, I) as d grows, x_0/|x_0| uniform (W5).

    That of the radii: (1 - sqrt(1 - rho^4)) / sqrt(2), beside sqrt(d).
    """
    return (1 - (1 - rho**4) ** 0.5) / 2**0.5


def candidates(rho, d):
    """n of worst_candidate that pulls as strongly, a_n = rho sqrt(d), to second order (W5).

    rho sqrt(2 pi d) exp(rho^2 d/2 - gamma), gamma Euler's constant.
    """
    return rho * (2 * np.pi * d) ** 0.5 * np.exp(rho**2 * d / 2 - np.euler_gamma)


def candidate_energy(n, d):
    """E|x_1|^2 of worst_candidate: d - 1 + E m^2, off the shell (W5)."""
    return d - 1 + a_n(n) ** 2 + minimum_variance(n)


def early_residual(x, grad_log_q, rho, t_max):
    """v(x) - u_0(x) (N, d) of the exact time-unconditional field, t ~ U(0, T) (W6).

    -T/2 ((1 - rho^2) grad log q + (1 + rho sqrt(d)/|x|) x), to first order in T; grad_log_q (N, d).
    """
    return -t_max / 2 * ((1 - rho**2) * grad_log_q - initial_field(x, rho))


# ---- Estimators -------------------------------------------------------------------------------
def early_field(x, t, log_q, rho, nodes=8):
    """u_t(x) (d,) of wtflow.worst for one x (d,), far from 0, at small t, by quadrature (W6).

    Over the noise z, by Gauss-Hermite: x_t = x is F(x_0) = x - t sqrt(1 - rho^2) z, where F maps
    x_0 to (1-t) x_0 - t rho sqrt(d) x_0/|x_0|; its weight is q(x_0) / |det F'(x_0)|. d <= 3.
    """
    d, c = len(x), (1 - rho**2) ** 0.5
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    z = np.stack(np.meshgrid(*[points] * d), -1).reshape(-1, d)
    weight = np.prod(np.meshgrid(*[weights] * d), 0).ravel()
    y = x - t * c * z
    length = np.linalg.norm(y, axis=1)
    radius = (length + t * rho * d**0.5) / (1 - t)
    x_0 = y * (radius / length)[:, None]
    weight = weight * np.exp(log_q(x_0) - log_q(x[None])) * (radius / length) ** (d - 1)
    u = initial_field(x_0, rho) + c * z
    return weight @ u / weight.sum()


# ---- Table ------------------------------------------------------------------------------------
def table(seed=0):
    """Rows for W5, W6."""
    generator = torch.Generator().manual_seed(seed)
    z = normal(generator, SAMPLES, 16)
    yield from rows_W5(z, generator)
    yield from rows_W6(z, generator)


def rows_W5(z, generator):
    """Rows for W5; z (N, 16) ~ N(0, I)."""
    d = z.shape[1]
    for rho in (0.5, 0.9):
        x_1 = wtflow.worst(3 * z, generator, rho)
        energy = x_1.square().sum(1)
        yield Row("W5", f"E|x_1|^2, d=16, rho={rho}", d, *mean_se(energy))
        spread = mean_se((energy - d).square())
        yield Row("W5", f"  Var |x_1|^2, rho={rho}", energy_variance(rho, d), *spread)
        second = mean_se(x_1[:, 0].square())
        yield Row("W5", f"  E of the square of component 1, rho={rho}", 1, *second)
    e = torch.eye(d, dtype=z.dtype)[0]
    x_0 = (4 * e).expand_as(z)
    u = wtflow.worst(x_0, generator, 0.9) - x_0
    yield Row("W5", "u_0(x) along x, |x|=4, rho=0.9", -(4 + 0.9 * 4), *mean_se(u @ e))
    noise = mean_se((u + (4 + 0.9 * 4) * e).square().sum(1))
    yield Row("W5", "noise of the target, rho=0.9", d * (1 - 0.9**2), *noise)
    ratio = signal_to_noise(u, e)  # rFM's is |x|^2 / d = 1 here
    yield Row("W5", "signal to noise at t=0 over rFM's, |x|=4, rho=0.9", gain(0.9, d, 16), *ratio)
    energy = worst_candidate(z, generator, 256).square().sum(1)
    what = "E|x_1|^2 of the worst of 256 candidates, d=16"
    yield Row("W5", what, candidate_energy(256, d), *mean_se(energy))
    for rho, size in ((0.7, 16), (0.5, 152)):
        n = candidates(rho, size)
        what = f"a_n of {n:.3g} candidates for rho={rho}, d={size} (limit)"
        yield Row("W5", what, rho * size**0.5, a_n(n))
    probability = np.linspace(0, 1, 2002)[1:-1]
    radii = [energy_distribution(rho, 152).ppf(probability) ** 0.5 for rho in (0.9, 0.0)]
    measured = np.mean((radii[0] - radii[1]) ** 2) ** 0.5
    yield Row("W5", "W2 to N(0, I), rho=0.9, d=152 (limit)", distance_to_noise(0.9), measured)


def rows_W6(z, generator):
    """Rows for W6; z (N, 16) ~ N(0, I)."""
    x = 2 * z[:500]
    v_theta = torch.nn.Linear(16, 16).double().requires_grad_(False)
    for rho in (0.0, 0.9):
        residual = wtflow.euler(lambda x, t: v_theta(x), x) - wtflow.conditional_mean(x, rho)
        square = (-2 * 16 * wtflow.log_density(residual)).mean().item()
        predicted = (v_theta(x) - initial_field(x, rho)).square().sum(1).mean().item()
        yield Row("W6", f"squared residual of any v_theta, rho={rho}", predicted, square)
    widths = torch.linspace(0.3, 1.3, 16, dtype=z.dtype)
    x_0 = (widths * z).repeat(20, 1)
    for rho in (0.0, 0.9):
        t_max = 0.02
        x_t, u = pairs_at_any_time(x_0, partial(wtflow.worst, rho=rho), generator, t_max)
        first = early_residual(x_t, -x_t / widths**2, rho, t_max)
        fit = slope_on(u - initial_field(x_t, rho), first)
        yield Row("W6", f"share of the first order in v - u_0, T={t_max:g}, rho={rho}", 1, *fit)
