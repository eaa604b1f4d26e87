"""C1-C5: concentration of measure and the centripetal potential field (CPF). Time runs from data (0) to noise (1).

[paper] "the concentration of measure in high-dimensional Gaussian manifolds induces structured irregularities, giving
rise to a Centripetal Potential Field (CPF) that steers trajectories away from Optimal Transport (OT) paths". The
formulas are [derived]; proofs in README.md.
"""
import numpy as np
import torch
from scipy.special import gammaln
from scipy.stats import beta, ncx2

import wtflow
from theory import COLOURS, Row, mean_se, panels
from theory.singularity import fitted_slope, marginal_field, pairs, variance


# Closed forms -------------------------------------------------------------------------------------------------------
def radius_std(d):
    """Standard deviation of |x_1| / sqrt(d), x_1 ~ N(0, I_d); tends to 1 / sqrt(2d) (C1)."""
    mean = np.exp(gammaln((d + 1) / 2) - gammaln(d / 2)) * (2 / d) ** 0.5
    return (1 - mean ** 2) ** 0.5


def cosine_law(d):
    """Law of the cosine c between x_1 and a fixed direction: (c+1)/2 ~ Beta((d-1)/2, (d-1)/2), Var c = 1/d; d >= 2 (C1)."""
    return beta((d - 1) / 2, (d - 1) / 2, loc=-1, scale=2)


def inward(t, m2, d):
    """E<x_t, u_t> = t d - (1-t) m2: negative, centripetal, iff t < t* (C3). Half the derivative of E|x_t|^2."""
    return t * d - (1 - t) * m2


def turning(m2, d):
    """(t*, E|x_t*|^2) = (m2, m2 d) / (m2 + d): when and how near to the origin the paths come (C3)."""
    return m2 / (m2 + d), m2 * d / (m2 + d)


def inward_probability(t, m2, d):
    """P(<x_t, u> < 0 | |x_0|^2 = m2), exactly: noncentral chi^2_d(m2 (1-2t)^2 / 4t^2) below m2 / 4t^2; 0 < t < 1 (C3). [ours]"""
    return ncx2.cdf(m2 / (4 * t ** 2), d, m2 * (1 - 2 * t) ** 2 / (4 * t ** 2))


def kinetic_energy(s, rho=0.0):
    """(1/d) int E|u_t|^2 dt for q = N(0, s^2 I) and a Gaussian coupling of correlation -rho (C4).

    1 + s^2 + 2 rho s - s sqrt(1-rho^2) arccos(-rho): 1 + s^2 - pi s / 2 for rFM, W2^2 / d = (1-s)^2 for rho = -1.
    """
    return 1 + s ** 2 + 2 * rho * s - s * (1 - rho ** 2) ** 0.5 * np.arccos(-rho)


# Estimators ---------------------------------------------------------------------------------------------------------
def radial_velocity(x_0, t, generator=None):
    """<x_t, u> of each sample (N,), from wtflow's path and independent coupling; x_0 (N, d) tensor."""
    x_t, u = pairs(x_0, wtflow.independent, t, generator)
    return (x_t * u).sum(1)


def shell(n, d, generator):
    """n points x_0 (n, d) with |x_0|^2 = d: features as a layer norm leaves them, m2 = d."""
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64)) * d ** 0.5


def energy_from_pairs(x_0, couple, generator, nodes=12):
    """(1/d) int E|a_t x_t|^2 dt and its standard error: regression of u on x_t at Gauss-Legendre times."""
    times, weights = np.polynomial.legendre.leggauss(nodes)
    values, errors = [], []
    for t in (times + 1) / 2:
        x_t, u = pairs(x_0, couple, t, generator)
        a, se = fitted_slope(x_t, u)
        power, power_se = mean_se(x_t.square().mean(1))
        values.append(a ** 2 * power)
        errors.append(np.hypot(2 * a * se * power, a ** 2 * power_se))
    return weights @ values / 2, float(np.linalg.norm(weights * errors / 2))


def table(seed=0):
    """Rows for C1-C5."""
    generator = torch.Generator().manual_seed(seed)
    N = 20_000
    for d in (16, 256):
        x_1 = wtflow.independent(torch.zeros(N, d, dtype=torch.float64), generator)
        radius, cosine = x_1.norm(dim=1) / d ** 0.5, x_1[:, 0] / x_1.norm(dim=1)
        yield Row("C1", f"std of |x_1|/sqrt(d), d={d}", radius_std(d), radius.std().item(), radius_std(d) / (2 * N) ** 0.5)
        yield Row("C1", f"variance of a cosine, d={d}", 1 / d, *mean_se(cosine.square()))

    for name, x_0 in data(N, generator).items():
        yield Row("C2", f"slope of u on x at t=0, {name}", -1, *fitted_slope(*pairs(x_0, wtflow.independent, 0.0, generator)))
    mu = np.array([[2.0, 1.0], [-1.0, 0.5], [0.0, -1.0]])
    x = np.array([[0.7, -0.2]])
    yield Row("C2", "<u_t(x), x> / |x|^2 at t=1e-8, three Gaussians", -1, (marginal_field(x, 1e-8, mu, 0.5) * x).sum() / (x ** 2).sum())

    for name, x_0 in data(N, generator).items():
        m2, d, t = x_0.square().sum(1).mean().item(), x_0.shape[1], 0.3
        # Against this sample's own m2 the error of the mean is that of |x_1|^2 and <x_0, x_1> alone.
        r = radial_velocity(x_0, t, generator) + (1 - t) * (x_0.square().sum(1) - m2)
        yield Row("C3", f"E<x_t, u>, t=0.3, {name}", inward(t, m2, d), *mean_se(r))
    for d in (16, 256):
        x_0 = shell(N, d, generator)
        yield Row("C3", f"E|x_t|^2 at t*=1/2, d={d}", turning(d, d)[1], *mean_se(pairs(x_0, wtflow.independent, 0.5, generator)[0].square().sum(1)))
        yield Row("C3", f"P(<x_t, u> < 0), t=0.45, d={d}", inward_probability(0.45, d, d), *mean_se(radial_velocity(x_0, 0.45, generator) < 0))

    for s in (1.0, 0.3):
        x_0 = s * torch.randn(N, 16, generator=generator, dtype=torch.float64)
        yield Row("C4", f"kinetic energy of rFM / d, s={s} (W2^2/d={(1 - s) ** 2:.2f})", kinetic_energy(s), *energy_from_pairs(x_0, wtflow.independent, generator))
    yield Row("C4", "coupling cost E|x_1 - x_0|^2 / d, s=0.3", 1.09, *mean_se((wtflow.independent(x_0, generator) - x_0).square().mean(1)))

    x_0 = data(N, generator)["three atoms"]
    u = pairs(x_0, wtflow.independent, 1.0, generator)
    yield Row("C5", "intercept of u - x at t=1, component 1, three atoms", -2 / 3, *mean_se((u[1] - u[0])[:, 0]))


def data(n, generator):
    """One sample (n, d) of each kind of q that the claims hold for."""
    z = torch.randn(n, 16, generator=generator, dtype=torch.float64)
    pick = torch.randint(3, (n,), generator=generator)
    angle = 2 * torch.pi * torch.rand(n, generator=generator, dtype=torch.float64)
    circle = torch.zeros(n, 16, dtype=torch.float64)
    circle[:, 0], circle[:, 1] = 4 * angle.cos(), 4 * angle.sin()
    atoms = torch.eye(16, dtype=torch.float64)[:3] * torch.tensor([[2.0], [3.0], [4.0]], dtype=torch.float64)
    return {"Gaussian": z * torch.linspace(0.1, 2, 16, dtype=torch.float64), "three atoms": atoms[pick], "circle in R^16": circle}


def figure(seed=0):
    """Concentration of |x_t| over t; the cosine's law; the sign of <x_t, u>; the dip below the optimal path."""
    generator = torch.Generator().manual_seed(seed)
    fig, axes = panels(2, 2, 5.2, 3.6)
    t = np.linspace(0, 1, 101)
    for d, colour in zip((2, 16, 256, 4096), COLOURS):
        x_0 = shell(25, d, generator)
        x_1 = wtflow.independent(x_0, generator)
        norms = np.stack([wtflow.path(x_0, x_1, torch.full((25,), k)).norm(dim=1) / d ** 0.5 for k in t], 1)
        axes[0].plot(t, norms.T, color=colour, lw=0.5, alpha=0.5)
        axes[0].plot([], [], color=colour, label=f"$d={d}$")
        axes[2].plot(t[1:-1], inward_probability(t[1:-1], d, d), color=colour)
        times, x_0 = np.linspace(0.05, 0.95, 13), shell(1000, d, generator)
        axes[2].plot(times, [(radial_velocity(x_0, k, generator) < 0).double().mean() for k in times], "o", ms=4, color=colour, label=f"$d={d}$")
        if d < 4096:
            c = np.linspace(-1, 1, 401)
            x_1 = wtflow.independent(torch.zeros(20_000, d, dtype=torch.float64), generator)
            axes[1].hist((x_1[:, 0] / x_1.norm(dim=1)).numpy(), 60, density=True, color=colour, alpha=0.35)
            axes[1].plot(c, cosine_law(d).pdf(c), color=colour, label=f"$d={d}$, $1/\\sqrt{{d}}={d ** -0.5:.2g}$")
    axes[0].plot(t, np.sqrt((1 - t) ** 2 + t ** 2), "k--", label="$\\sqrt{E|x_t|^2/d}$")
    axes[0].plot(*(turning(1, 1)[0], turning(1, 1)[1] ** 0.5), "kv", label="$t^*=1/2$")
    axes[0].set(xlabel="$t$", ylabel="$|x_t|/\\sqrt{d}$", ylim=(0, 2), title="C1, C3: 25 paths each, from and to the shell of radius $\\sqrt{d}$")
    axes[1].set(xlabel="cosine of $x_1$ with a fixed direction", ylabel="density", ylim=(0, 8), title="C1: bars: wtflow noise; lines: Beta law")
    axes[2].axvline(0.5, color="k", ls=":", lw=1)
    axes[2].set(xlabel="$t$", ylabel="$P(\\langle x_t,u\\rangle<0)$", title="C3: inward before $t^*=1/2$; lines: exact")
    for s, colour in zip((1.0, 0.3, 0.05), COLOURS):
        z = s * torch.randn(4000, 16, generator=generator, dtype=torch.float64)
        axes[3].plot(t, variance(t, s) ** 0.5, color=colour, label=f"$s={s:g}$: {kinetic_energy(s):.2f} against {(1 - s) ** 2:.2f}")
        axes[3].plot(t, (1 - t) * s + t, "--", color=colour)
        axes[3].plot(t[::10], [pairs(z, wtflow.independent, k, generator)[0].square().mean() ** 0.5 for k in t[::10]], "o", ms=4, color=colour)
    axes[3].set(xlabel="$t$", ylabel="$\\sigma_t$", title="C4: rFM (solid, dots: wtflow pairs) below OT (dashed)")
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    axes[3].legend(frameon=False, fontsize=8, title="kinetic energy$/d$, rFM against OT")
    return fig
