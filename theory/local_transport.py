"""W5, W6, W8-W10: wtflow.worst, and the residual of a field. Data at 0, noise at 1.

x_1 = -rho sqrt(d) x_0/|x_0| + sqrt(1 - rho^2) z is wtflow.worst, [ours] as a reading of the paper's
local worst transport; x_1 = -rho x_0 + sqrt(1 - rho^2) z is the linear coupling, the same where
|x_0| = sqrt(d). What follows is [derived]; proofs, and what rho is good for: README.md. That the
residual v_theta - u_0 is the score is [ours]. Figure: draw.PANELS.
"""

from functools import partial

import numpy as np
import torch
from scipy.stats import ncx2

import wtflow
from theory import Row, mean_se, normal, std_se
from theory.conventions import clock
from theory.unconditional_field import pairs_at_any_time, slope_on
from theory.worst_transport import gaussian_coupling, signal_to_noise

SAMPLES = 20_000  # points behind each row of the table


# ---- Closed forms: W5, W6 ---------------------------------------------------------------------
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


def early_residual(x, grad_log_q, rho, t_max):
    """v(x) - u_0(x) (N, d) of the exact time-unconditional field, t ~ U(0, T) (W6).

    -T/2 ((1 - rho^2) grad log q + (1 + rho sqrt(d)/|x|) x), to first order in T; grad_log_q (N, d).
    """
    return -t_max / 2 * ((1 - rho**2) * grad_log_q - initial_field(x, rho))


# ---- Closed forms: W8 -------------------------------------------------------------------------
def noise_to_signal(t, rho, length=1.0):
    """Ratio of noise to signal in x_t of worst(rho) at |x_0| = length sqrt(d) (W8).

    t sqrt(1-rho^2) / (1 - t (1 + rho/length)), negative once the signal has turned round; length 1
    is the linear coupling of every q. rFM's is t / (1-t).
    """
    return t * (1 - rho**2) ** 0.5 / (1 - t * (1 + rho / length))


def time_of_ratio(ratio, rho):
    """The t of that ratio at length 1: 1 / (1 + rho + sqrt(1-rho^2) / ratio) (W8)."""
    return 1 / (1 + rho + (1 - rho**2) ** 0.5 / ratio)


def sensitivity(ratio, rho):
    """d log(ratio) / d log|x_0| of worst(rho) on the shell: -ratio rho / sqrt(1-rho^2) (W8)."""
    return -ratio * rho / (1 - rho**2) ** 0.5


def rfm_point(x, t, rho):
    """(x', t') where rFM has the E[x_0 | x_t' = x'] of the linear coupling at (x, t), any q (W8).

    x (N, d), 0 <= t <= 1, t a number.
    """
    signal, noise = 1 - t * (1 + rho), t * (1 - rho**2) ** 0.5
    time, scale = clock(abs(signal), noise)
    return (scale if signal >= 0 else -scale) * x, time


# ---- Closed forms: W9, W10 --------------------------------------------------------------------
def discount(length, rho):
    """d log|r| / d log|x| of r = -u_0, |x| = length sqrt(d): 1 / (1 + rho/length) (W9)."""
    return 1 / (1 + rho / length)


def score_spread(tau, d, rho, effective):
    """Standard deviation of the log of the score of r = -u_0 at x = k S^(1/2) z, std log k = tau.

    sqrt(tau^2 + (1-rho^2)/2d + rho^2/2d') / (1+rho), to first order, E|x|^2 near d; `effective` is
    d' = (tr S)^2 / tr S^2 (W9).
    """
    return (tau**2 + (1 - rho**2) / (2 * d) + rho**2 / (2 * effective)) ** 0.5 / (1 + rho)


def ridge_residual(x, x_0, penalty, rho):
    """Mean (N, d) and variance (N,) of the components of r at x (N, d), given x_0 (n, d) (W10).

    v is the ridge regression of u on x_0 at t = 0, r = v - u_0, for the linear coupling:
    (1+rho) penalty Q x and (1-rho^2) x'Q S Q x / n, S = x_0'x_0 / n, Q = (S + penalty I)^-1.
    """
    n, d = x_0.shape
    S = x_0.T @ x_0 / n
    Qx = torch.linalg.solve(S + penalty * torch.eye(d, dtype=S.dtype), x.T).T
    return (1 + rho) * penalty * Qx, (1 - rho**2) * ((Qx @ S) * Qx).sum(1) / n


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


def ratio_of_pairs(x_0, t, rho, generator):
    """Ratio of noise to signal in x_t of wtflow.worst, and its standard error; x_0 (N, d) one x.

    As noise over signal: std of x_t across the components, mean along x_0 over |x_0| (W8).
    """
    x_t = wtflow.path(x_0, wtflow.worst(x_0, generator, rho), torch.full((len(x_0),), t))
    signal, error = mean_se((x_t * x_0).sum(1) / x_0[0].square().sum())
    noise, error_of_noise = std_se((x_t - x_t.mean(0)).flatten())
    return noise / signal, abs(noise / signal) * np.hypot(error / signal, error_of_noise / noise)


def untrained_residual(x, rho):
    """r (N, d) of v = 0, by wtflow: x1_hat = x less E[x_1 | x_0 = x] (W9)."""
    return wtflow.euler(lambda x, t: 0 * x, x) - wtflow.conditional_mean(x, rho)


def log_scores(x, rho):
    """Log of the score (N,) of v = 0: Mahalanobis' distance of r of the same x (N, d) (W9)."""
    r = untrained_residual(x, rho)
    return (torch.linalg.solve(r.T @ r / len(r), r.T).T * r).sum(1).log() / 2


def fit_ridge(x_0, penalty, rho, repeats, generator):
    """B (repeats, d, d) of v(x) = x B: ridge regressions at t = 0 on pairs of the data (n, d).

    x_0 (n, d) is the same in all, the noise of the linear coupling is drawn anew (W10).
    """
    n, d = x_0.shape
    data = x_0.expand(repeats, n, d)
    u = gaussian_coupling(data, generator, 1.0, rho) - data
    penalised = x_0.T @ x_0 / n + penalty * torch.eye(d, dtype=x_0.dtype)
    return torch.linalg.solve(penalised, x_0.T @ u / n)


# ---- Table ------------------------------------------------------------------------------------
def table(seed=0):
    """Rows for W5, W6, W8-W10."""
    generator = torch.Generator().manual_seed(seed)
    z = normal(generator, SAMPLES, 16)
    yield from rows_W5(z, generator)
    yield from rows_W6(z, generator)
    yield from rows_W8(generator)
    yield from rows_W9(generator)
    yield from rows_W10(generator)


def rows_W5(z, generator):
    """Rows for W5; z (N, 16) ~ N(0, I)."""
    d = z.shape[1]
    for rho in (0.5, 0.9):
        x_1 = wtflow.worst(3 * z, generator, rho)
        energy = x_1.square().sum(1)
        yield Row("W5", f"E|x_1|^2, d=16, rho={rho}", d, *mean_se(energy))
        spread = mean_se((energy - d).square())
        yield Row("W5", f"  Var |x_1|^2, rho={rho}", energy_distribution(rho, d).var(), *spread)
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
    x_0 = (widths * z).repeat(12, 1)
    for rho in (0.0, 0.9):
        t_max = 0.02
        x_t, u = pairs_at_any_time(x_0, partial(wtflow.worst, rho=rho), generator, t_max)
        first = early_residual(x_t, -x_t / widths**2, rho, t_max)
        fit = slope_on(u - initial_field(x_t, rho), first)
        yield Row("W6", f"share of the first order in v - u_0, T={t_max:g}, rho={rho}", 1, *fit)


def rows_W8(generator):
    """Rows for W8: the ratio 1.5, rFM's at t = 0.6, on the shell of R^16 and off it."""
    e = torch.eye(16, dtype=torch.float64)[0]
    for rho in (0.25, 0.5, 0.9):
        t = time_of_ratio(1.5, rho)
        for length in (1.0, 1.1):
            x_0 = (4 * length * e).expand(SAMPLES, 16)
            what = f"noise to signal, rho={rho:g}, t={t:.3f}, |x_0|={length:g} sqrt(d)"
            measured = ratio_of_pairs(x_0, t, rho, generator)
            yield Row("W8", what, noise_to_signal(t, rho, length), *measured)


def rows_W9(generator):
    """Rows for W9, at the d of the features of EfficientNet-Lite0."""
    d, tau = 152, 0.19
    widths = torch.linspace(0.2, 2, d, dtype=torch.float64)
    widths = widths / widths.square().mean() ** 0.5
    effective = d / widths.pow(4).mean().item()
    n = SAMPLES // 2
    x = (tau * normal(generator, n, 1)).exp() * widths * normal(generator, n, d)
    for rho in (0.0, 0.5, 0.9):
        predicted = score_spread(tau, d, rho, effective)
        what = f"std of the log of the score of v=0, std log k = 0.19, d=152, rho={rho:g}"
        yield Row("W9", what, predicted, *std_se(log_scores(x, rho)))


def rows_W10(generator):
    """Rows for W10: the mean of |r|^2 over repeated fits to 64 points."""
    x_0, x = normal(generator, 64, 8), 2 * normal(generator, 1, 8)
    for penalty in (0.0, 0.3):
        for rho in (0.0, 0.9):
            mean, variance = ridge_residual(x, x_0, penalty, rho)
            fits = fit_ridge(x_0, penalty, rho, 2000, generator)
            squares = (x @ fits + (1 + rho) * x).square().sum((1, 2))
            predicted = mean.square().sum().item() + 8 * variance.item()
            what = f"E|r|^2 of a ridge regression, n=64, d=8, lambda={penalty:g}, rho={rho:g}"
            yield Row("W10", what, predicted, *mean_se(squares))
