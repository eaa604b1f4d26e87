"""S1-S3: the singularity of the reversed field at t = 0. Time runs from data (t = 0) to noise (t = 1).

[paper] "the reversed vector field exhibits a non-Lipschitz singularity at the initial temporal boundary, precipitating
explosive estimation errors". Every formula below is [derived]; proofs in README.md.

Data: q = (1/K) sum_k N(mu_k, s^2 I), which holds the Gaussian (K = 1), a training set (s = 0) and their mixtures.
"""
import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import minimize_scalar
from scipy.special import softmax

import wtflow
from theory import COLOURS, Row, exponent, mean_se, panels


# Closed forms -------------------------------------------------------------------------------------------------------
def variance(t, s, rho=0.0):
    """Var x_t per coordinate for q = N(0, s^2 I) and a Gaussian coupling of correlation -rho between x_0 and x_1 (S2, W2).

    rho = 0 is rFM, -1 optimal, 1 worst transport. A (t - tc)^2 + s^2 (1 - rho^2) / A when multiplied out.
    """
    return ((1 - t) * s) ** 2 + t ** 2 - 2 * rho * s * t * (1 - t)


def slope(t, s, rho=0.0):
    """a(t) of u_t(x) = a(t) x for the same q and coupling: sigma_t' / sigma_t (S2, W2). a(0) = -(1 + rho/s)."""
    return (t - (1 - t) * s ** 2 - rho * s * (1 - 2 * t)) / variance(t, s, rho)


def peak(s, rho=0.0):
    """(time, slope) where a(t) is largest: A / (2 s sqrt(1-rho^2)) at tc + s sqrt(1-rho^2) / A (S2, W2); |rho| < 1.

    A = 1 + s^2 + 2 rho s, tc = (s^2 + rho s) / A. The time lies in [0, 1] if s <= 1; for rho = 0: (1+s^2)/(2s).
    """
    A, root = 1 + s ** 2 + 2 * rho * s, s * (1 - rho ** 2) ** 0.5
    return (s ** 2 + rho * s + root) / A, A / (2 * root)


def posterior(x, t, mu, s=0.0):
    """E[x_0 | x_t = x] (N, d) and Cov(x_0 | x_t = x) (N, d, d) for rFM; x (N, d), mu (K, d), 0 < t < 1 (S2)."""
    v = variance(t, s)
    w = softmax(-((x[:, None] - (1 - t) * mu) ** 2).sum(-1) / (2 * v), axis=1)
    centre = w @ mu
    spread = np.einsum("nk,ki,kj->nij", w, mu, mu) - centre[:, :, None] * centre[:, None]
    mean = t ** 2 / v * centre + (1 - t) * s ** 2 / v * x
    return mean, (t ** 2 / v) ** 2 * spread + s ** 2 * t ** 2 / v * np.eye(x.shape[1])


def marginal_field(x, t, mu, s=0.0):
    """u_t(x) (N, d) for rFM: (x - E[x_0 | x_t = x]) / t, in a form that holds at t = 0 too when s > 0 (S2, C2)."""
    v = variance(t, s)
    c = (t - (1 - t) * s ** 2) / v
    w = softmax(-((x[:, None] - (1 - t) * mu) ** 2).sum(-1) / (2 * v), axis=1)
    return c * x - (1 + (1 - t) * c) * (w @ mu)


def jacobian(x, t, mu, s=0.0):
    """J_t(x) = (I - (1-t)/t^2 Cov(x_0 | x_t = x)) / t, (N, d, d) (S2)."""
    return (np.eye(x.shape[1]) - (1 - t) / t ** 2 * posterior(x, t, mu, s)[1]) / t


def amplification(t_0, s):
    """What an error made at t_0 has become at t = 1, per unit: 1 / sigma_{t_0}; 1 / t_0 for a point mass, s = 0 (S3)."""
    return variance(t_0, s) ** -0.5


# Estimators ---------------------------------------------------------------------------------------------------------
def pairs(x_0, couple, t, generator=None):
    """(x_t, u) as the training code makes them: wtflow's coupling and path; x_0 (N, d) tensor, t a number."""
    x_1 = couple(x_0, generator)
    return wtflow.path(x_0, x_1, torch.full((len(x_0),), t, dtype=x_0.dtype)), x_1 - x_0


def fitted_slope(x_t, u):
    """Least-squares a of u = a x_t and its standard error: the linear field that the loss is smallest for."""
    a = (x_t * u).sum() / x_t.square().sum()
    return a.item(), ((u - a * x_t).square().mean() / x_t.square().sum()).sqrt().item()


def score_field(x, t, mu, s=0.0, forward=False):
    """u_t(x) for one x (d,) tensor, by autograd of log p_t (Tweedie), which knows nothing of posteriors.

    u_t = -(x + t grad log p_t(x)) / (1-t). forward=True gives FM's field instead, noise at 0 and data at 1, where
    x_t = (1-t) x_1 + t x_0 and u_t = (x + (1-t) grad log p_t(x)) / t: the duality of S1.
    """
    a, b = (t, 1 - t) if forward else (1 - t, t)            # weights of data and noise
    if not x.requires_grad:
        x = x.requires_grad_()
    v = (a * s) ** 2 + b ** 2
    log_p = torch.logsumexp(-(x - a * mu).square().sum(-1) / (2 * v), 0)
    score, = torch.autograd.grad(log_p, x, create_graph=True)
    return (x + b * score) / a if forward else -(x + b * score) / a


def grown(delta, t_0, mu, s=0.0):
    """|x(1) - x'(1)| / |delta| for two solutions of dx/dt = u_t(x) that start delta (d,) apart at t_0, at the data mean."""
    d = len(delta)
    start = np.stack([mu.mean(0) * (1 - t_0), mu.mean(0) * (1 - t_0) + delta])
    flow = solve_ivp(lambda t, x: marginal_field(x.reshape(2, d), t, mu, s).ravel(), (t_0, 1), start.ravel(), rtol=1e-9, atol=1e-12)
    end = flow.y[:, -1].reshape(2, d)
    return np.linalg.norm(end[1] - end[0]) / np.linalg.norm(delta)


def autograd_slope(t, mu, s, x, e):
    """e' J_t(x) e by differentiating score_field twice; x, e (d,) arrays."""
    J = torch.autograd.functional.jacobian(lambda y: score_field(y, t, torch.as_tensor(mu), s), torch.as_tensor(x))
    return float(e @ J.numpy() @ e)


# Two atoms +-m e in the plane: the smallest training set with a boundary between atoms.
M, E1 = 1.0, np.array([1.0, 0.0])
ATOMS = np.stack([M * E1, -M * E1])
DECADES = np.geomspace(1e-5, 1e-3, 9)                       # above the rounding floor, below the next order in t


def table(seed=0):
    """Rows for S1-S3."""
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.randn(20_000, 8, generator=generator, dtype=torch.float64)

    def ratio(t):                                           # two noises at one x_0: a difference quotient of u_t(x | x_0)
        (x, u), (y, w) = (pairs(x_0[:64], wtflow.independent, t, generator) for _ in range(2))
        return ((u - w).norm() / (x - y).norm()).item()

    yield Row("S1", "Lipschitz constant of u_t(x|x_0), t=0.01", 100, ratio(0.01))
    yield Row("S1", "its exponent in t", -1, *exponent(DECADES, [ratio(t) for t in DECADES]))
    x, mu = np.array([0.3, -0.4]), torch.as_tensor(ATOMS)
    dual = score_field(torch.as_tensor(x), 0.8, mu, 0.3, forward=True).detach().numpy()
    yield Row("S1", "duality -u^FM_0.8 at u^rFM_0.2 (component 1)", -dual[0], marginal_field(x[None], 0.2, ATOMS, 0.3)[0, 0])

    for s in (0.3, 0.03):
        best = minimize_scalar(lambda t: -autograd_slope(t, np.zeros((1, 2)), s, np.zeros(2), E1), (0.5 * s, s, 2 * s), tol=1e-9)
        yield Row("S2", f"largest slope, N(0, s^2 I), s={s}", peak(s)[1], -best.fun)
        yield Row("S2", f"  at time, s={s}", peak(s)[0], best.x)
        yield Row("S2", f"  the same from wtflow pairs, s={s}", peak(s)[1], *fitted_slope(*pairs(s * x_0, wtflow.independent, peak(s)[0], generator)))
    yield Row("S2", "slope at t=0, N(0, s^2 I), s=0.3", -1, *fitted_slope(*pairs(0.3 * x_0, wtflow.independent, 0.0, generator)))
    off = [autograd_slope(t, ATOMS, 0.0, np.array([1.5, 0.5]), E1) for t in DECADES]
    between = [-autograd_slope(t, ATOMS, 0.0, np.zeros(2), E1) for t in DECADES]
    yield Row("S2", "exponent of the slope off two atoms", -1, *exponent(DECADES, off))
    yield Row("S2", "exponent between two atoms", -3, *exponent(DECADES, between))
    yield Row("S2", "slope between them at t=0.001", (1 - 0.999 * M ** 2 / 1e-6) / 1e-3, -between[-1])

    delta = np.array([1e-3, 2e-3])
    yield Row("S3", "growth of an error made at t=0.01, point mass", 100, grown(delta, 0.01, ATOMS[:1]))
    yield Row("S3", "growth from t=0, N(0, s^2 I), s=0.1", 10, grown(delta, 0.0, np.zeros((1, 2)), 0.1))
    loss = wtflow.flow_matching_loss(lambda x, t: -x, 0.3 * x_0, wtflow.independent, generator, torch.zeros(len(x_0), dtype=x_0.dtype))
    yield Row("S3", "irreducible loss at t=0, per dimension", 1, *mean_se(loss))


def figure(seed=0):
    """Slope over t by width s; exponents at a finite training set; growth of an error over t_0."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(20_000, 8, generator=generator, dtype=torch.float64)
    fig, (left, middle, right) = panels(1, 3, 4.6)
    t = np.geomspace(1e-3, 1, 400)
    for s, colour in zip((1.0, 0.1, 0.01), COLOURS):
        left.plot(t, slope(t, s), color=colour)
        times = np.geomspace(1e-3, 1, 13)
        left.plot(times, [fitted_slope(*pairs(s * z, wtflow.independent, k, generator))[0] for k in times], "o", color=colour, ms=4, label=f"$s={s:g}$")
        if s < 1:
            left.annotate(f"$(1+s^2)/2s={peak(s)[1]:.3g}$", peak(s), (0, 8), textcoords="offset points", color=colour, ha="center", fontsize=8)
    left.plot(t, 1 / t, ":", color="0.5", label="$1/t$ (conditional field)")
    left.set(xscale="log", yscale="symlog", ylim=(-2, 1000), xlabel="$t$", ylabel="slope $a(t)$ of $u_t(x)=a(t)\\,x$", title="S2: $q=N(0,s^2I)$; dots: wtflow pairs")
    left.legend(frameon=False, loc="upper right", fontsize=8)

    wide = np.geomspace(1e-4, 0.3, 25)
    off = np.array([autograd_slope(k, ATOMS, 0.0, np.array([1.5, 0.5]), E1) for k in wide])
    between = np.array([-autograd_slope(k, ATOMS, 0.0, np.zeros(2), E1) for k in wide])
    for y, power, name, colour in ((off, -1, "off", COLOURS[0]), (between, -3, "midway", COLOURS[3])):
        keep = wide <= DECADES[-1]
        middle.plot(wide, y, "o", ms=4, color=colour, label=f"{name}: fitted {exponent(wide[keep], y[keep])[0]:.3f}, predicted {power}")
    middle.plot(wide, 1 / wide, color=COLOURS[0])
    middle.plot(wide, ((1 - wide) * M ** 2 / wide ** 2 - 1) / wide, color=COLOURS[3])
    middle.set(xscale="log", yscale="log", ylim=(1, 1e17), xlabel="$t$", ylabel="|slope| of $u_t$", title="S2: two atoms $\\pm e$; lines: closed form")
    middle.legend(frameon=False, loc="upper right", fontsize=8)

    times = np.geomspace(1e-3, 0.9, 10)
    for s, colour in zip((1.0, 0.1, 0.01, 0.0), COLOURS):
        right.plot(t, amplification(t, s), color=colour)
        right.plot(times, [grown(np.array([1e-3, 0.0]), k, np.zeros((1, 2)), s) for k in times], "o", ms=4, color=colour, label=f"$s={s:g}$" if s else "point mass: $1/t_0$")
    right.set(xscale="log", yscale="log", xlabel="$t_0$, when the error is made", ylabel="error at $t=1$ / error at $t_0$", title="S3: dots: two ODE solutions; lines: $1/\\sigma_{t_0}$")
    right.legend(frameon=False)
    return fig
