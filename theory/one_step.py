"""O1-O3: one step is not the flow, nor its end a likelihood; residuals along the path are.

[paper] WT-Flow detects "circumventing the need for exact distribution transformations". What the
exact one is, what one step makes of it and what either ranks as. Data at 0, noise at 1. Formulas
are [derived]; proofs in README.md.

O1: q = N(0, s^2 I), Gaussian coupling of correlation -rho. O2: q = N(-m, s^2)/2 + N(m, s^2)/2 on a
line, anomalies N(0, s^2) between the two modes. O3: every q; its integral is the pointwise I-MMSE
relation of Kong et al. 2023 (arXiv 2302.03792). Figure: draw.PANELS.
"""

from functools import partial

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import logsumexp, ndtr, ndtri
from scipy.stats import norm

import wtflow
from theory import Row, mean_se, normal
from theory.learned_field import auroc
from theory.singularity import marginal_field, slope, variance
from theory.unconditional_field import pairs_at_any_time, slope_on

STEPS = 1000
SEPARATIONS = (2.0, 3.0)  # m / s
EARLY = 0.3  # the time of a step from the middle, on a line


# ---- Closed forms: O1 -------------------------------------------------------------------------
def step_error(s, rho=0.0):
    """C of C/K + O(1/K^2), the relative error of the end of K Euler steps, |rho| < 1 (O1).

    C = 1/2 + rho (s + 1/s) / 4 + A arccos(-rho) / (4 s sqrt(1-rho^2)), A = 1 + s^2 + 2 rho s. For
    rFM 1/2 + pi (s + 1/s) / 8. Exactly the error is 1 - s prod_{k<K} (1 + a(k/K)/K).
    """
    A = 1 + s**2 + 2 * rho * s
    angle = np.arccos(-rho) / (1 - rho**2) ** 0.5
    return 0.5 + rho * (s + 1 / s) / 4 + A * angle / (4 * s)


def average_slope(t, s, rho=0.0):
    """g of the average velocity g x from t < 1 to 1: (1/sigma_t - 1) / (1-t) (O1).

    MeanFlow (arXiv 2505.13447) learns it. One step of it from 0 ends at x/s.
    """
    return (variance(t, s, rho) ** -0.5 - 1) / (1 - t)


# ---- Closed forms: O2 -------------------------------------------------------------------------
def modes(separation):
    """(m, s) of modes m = separation s, of variance m^2 + s^2 = 1: whitened features."""
    s = (1 + separation**2) ** -0.5
    return separation * s, s


def log_density(x, m, s):
    """log q (N,) at x (N,) (O2)."""
    exponents = np.logaddexp(-((x - m) ** 2) / (2 * s**2), -((x + m) ** 2) / (2 * s**2))
    return exponents - np.log(2 * s * (2 * np.pi) ** 0.5)


def distribution(x, m, s):
    """F (N,) of q at x (N,) (O2)."""
    return (ndtr((x - m) / s) + ndtr((x + m) / s)) / 2


def flow_map(x, m, s):
    """T = Phi^-1(F) (N,), where the flow of rFM takes x (N,): increasing, q to N(0, 1) (O2)."""
    return -np.sign(x) * ndtri(distribution(-np.abs(x), m, s))


def proxy_auroc(separation):
    """AUROC of |T| against N(0, s^2): 2 Phi(y) Phi(-y), y = m / (s sqrt 2) (O2)."""
    y = separation / 2**0.5
    return 2 * ndtr(y) * ndtr(-y)


def centre_auroc(separation):
    """AUROC of the likelihood against the centre x = 0: P(q(x_0) > q(0)) (O2).

    P(|x_0| < c), c > 0 the other root of q(c) = q(0); 0 if m <= s, where the centre is the mode.
    """
    if separation <= 1:
        return 0.0

    def above(c):  # log q(c s) - log q(0)
        return np.logaddexp(separation * c, -separation * c) - np.log(2) - c**2 / 2

    # y^2/2 - y^4/12 < log cosh(y) < y: positive at the first end, negative at the second.
    c = brentq(above, (separation**2 - 1) ** 0.5 / separation**2, 2 * separation)
    return 2 * distribution(c, separation, 1.0) - 1


def line_field(x, m, s):
    """v(x) (N,) of the time-unconditional field: (F(x) - Phi(x)) / int_0^1 p_t(x) dt (B, O2)."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    t = (1 + nodes) / 2
    p_t = np.exp(log_density(x[:, None], (1 - t) * m, variance(t, s) ** 0.5))
    return (distribution(x, m, s) - ndtr(x)) / (p_t @ weights / 2)


def auroc_by_quadrature(score, separation):
    """AUROC of score(x, m, s), even in x, of N(0, s^2) against q, on a grid of x >= 0 (O2)."""
    m, s = modes(separation)
    x = (np.arange(4000) + 0.5) * (m + 8 * s) / 4000
    normal_mass = np.exp(log_density(x, m, s))
    anomalous_mass = np.exp(log_density(x, 0.0, s))
    order = np.argsort(score(x, m, s))
    below = np.cumsum(normal_mass[order]) - normal_mass[order] / 2
    return below @ anomalous_mass[order] / normal_mass.sum() / anomalous_mass.sum()


def rarity(x, m, s):
    """The score of the likelihood, -log q (N,)."""
    return -log_density(x, m, s)


def unconditional(x, m, s):
    """|x1_hat| (N,), one step of the exact time-unconditional field; also rFM's |r| of W6."""
    return np.abs(x + line_field(x, m, s))


# ---- Closed forms: O3 -------------------------------------------------------------------------
def noise_power(squared, d, t):
    """E|r_t|^2 over x_1 of rFM's exact field for N(0, I_d), at |x_0|^2 = squared (O3).

    (t^2 |x_0|^2 + (1-t)^2 d) / ((1-t)^2 + t^2)^2: d at t = 0, |x_0|^2 at t = 1.
    """
    return (t**2 * squared + (1 - t) ** 2 * d) / variance(t, 1.0) ** 2


# ---- Estimators -------------------------------------------------------------------------------
def step_residual(v_theta, x_0, x_1, time):
    """r_t = v_theta(x_t, t) - (x_1 - x_0), (N, d), at `time` of the path from x_0 to x_1 (O3)."""
    t = torch.full((len(x_0),), time, dtype=x_0.dtype)
    return v_theta(wtflow.path(x_0, x_1, t), t) - (x_1 - x_0)


def log_density_by_noise(v_theta, x_0, x_1, nodes=60):
    """(N,) numbers whose mean over x_1 (N, d) is log q at each x_0 (N, d), v_theta exact rFM (O3).

    log N(x_0; 0, I) - int_0^1 (1-t)/t (|r_t|^2 - |r_t of N(0, I)|^2) dt, by Gauss-Legendre. Both
    residuals are of the same x_1, which keeps the spread finite.
    """
    times, weights = np.polynomial.legendre.leggauss(nodes)
    log_q = -x_0.square().sum(1) / 2 - x_0.shape[1] / 2 * np.log(2 * np.pi)
    for t, weight in zip((1 + times) / 2, weights / 2, strict=True):
        r = step_residual(v_theta, x_0, x_1, t)
        of_noise = step_residual(lambda x, t: slope(t, 1.0)[:, None] * x, x_0, x_1, t)
        log_q -= weight * (1 - t) / t * (r.square() - of_noise.square()).sum(1)
    return log_q.numpy()


def exact_field(mu, s):
    """v_theta of the exact rFM field of the mixture of N(mu_k, s^2 I), mu (K, d) (S2)."""
    return lambda x, t: torch.as_tensor(marginal_field(x.numpy(), t[0].item(), mu, s))


# Noise on a line, so fine that sums by these weights are integrals over x_1 ~ N(0, 1), to 1e-10.
NOISE = np.linspace(-8, 8, 81)
NOISE_WEIGHTS = norm.pdf(NOISE) / norm.pdf(NOISE).sum()


def over_noise(function, x, m, s):
    """function(v_theta, x_0, x_1) (N, 81) of the two modes, for each x (N,) and each of NOISE."""
    pairs = np.broadcast_arrays(np.atleast_1d(x)[:, None], NOISE)
    x_0, x_1 = (torch.tensor(values.reshape(-1, 1)) for values in pairs)
    field = exact_field(np.array([[m], [-m]]), s)
    return np.asarray(function(field, x_0, x_1)).reshape(-1, len(NOISE))


def mean_square(x, m, s, t):
    """E|r_t|^2 (N,) over x_1 at x (N,), two modes (O3)."""
    return over_noise(partial(step_residual, time=t), x, m, s) ** 2 @ NOISE_WEIGHTS


def square_of_mean(x, m, s, t):
    """|E r_t|^2 (N,) of the same: 0 at a centre of symmetry, whatever its density is (O3)."""
    return (over_noise(partial(step_residual, time=t), x, m, s) @ NOISE_WEIGHTS) ** 2


def measured_factor(steps, s, rho=0.0, a=slope):
    """What wtflow's Euler steps of the velocity a(t) x multiply x by; a has slope's arguments."""
    x = torch.ones(1, 1, dtype=torch.float64)
    return wtflow.euler(lambda x, t: a(t, s, rho)[:, None] * x, x, steps).item()


def end_of_flow(x, m, s, steps):
    """End (N,) of wtflow's Euler steps of rFM's exact field from x (N,); one step is x1_hat."""
    u_t = exact_field(np.array([[m], [-m]]), s)
    return wtflow.euler(u_t, torch.as_tensor(x)[:, None], steps)[:, 0].numpy()


def distance_after(x, m, s, steps):
    """|end_of_flow| (N,), the score of `steps` steps without a Jacobian; 0 after one (C2)."""
    return np.abs(end_of_flow(x, m, s, steps))


def sample(n, m, s, generator):
    """n points (n,) of q."""
    sign = 2 * torch.randint(2, (n,), generator=generator) - 1
    return (m * sign + s * normal(generator, n)).numpy()


def measured_auroc(score, separation, generator, n=500, repeats=20):
    """AUROC of score(x, m, s) for n points of q and n of N(0, s^2): mean, standard error."""
    m, s = modes(separation)
    points = [(sample(n, m, s, generator), sample(n, 0, s, generator)) for _ in range(repeats)]
    return mean_se([auroc(score(x, m, s), score(y, m, s)) for x, y in points])


# ---- Table ------------------------------------------------------------------------------------
def table(seed=0):
    """Rows for O1-O3."""
    yield from rows_O1()
    yield from rows_O2(torch.Generator().manual_seed(seed))
    yield from rows_O3(torch.Generator().manual_seed(seed))


def rows_O1():
    """Rows for O1."""
    for s, rho in ((1.0, 0.0), (0.1, 0.0), (0.1, 0.6)):
        name = f"s={s:g}, rho={rho:g}"
        one, many = (1 - s * measured_factor(steps, s, rho) for steps in (1, STEPS))
        yield Row("O1", f"relative error of one step, {name}", 1 + rho, one)
        what = f"limit of many steps: K times the relative error, {name}"
        yield Row("O1", what, step_error(s, rho), STEPS * many)
    what = "one step of the average velocity (MeanFlow), s=0.1"
    yield Row("O1", what, 10, measured_factor(1, 0.1, a=average_slope))


def rows_O2(generator):
    """Rows for O2."""
    m, s = modes(2.0)
    end = end_of_flow(np.array([m / 2]), m, s, 3 * STEPS)
    yield Row("O2", "end of rFM's flow from x=m/2, m=2s", flow_map(m / 2, m, s), end[0])
    x_0 = torch.as_tensor(sample(20_000, m, s, generator))[:, None]
    x_t, u = pairs_at_any_time(x_0, wtflow.independent, generator)
    v = torch.as_tensor(line_field(x_t[:, 0].numpy(), m, s))[:, None]
    yield Row("O2", "factor of the time-unconditional field in u, m=2s", 1, *slope_on(u, v))
    for separation in SEPARATIONS:
        by_quadrature = partial(auroc_by_quadrature, separation=separation)
        for name, predicted, score in (
            ("|T|", proxy_auroc(separation), partial(distance_after, steps=50)),
            ("|x1_hat|, time-conditioned", 0.5, partial(distance_after, steps=1)),
            ("|x1_hat|, time-unconditional", by_quadrature(unconditional), unconditional),
            ("the likelihood", by_quadrature(rarity), rarity),
        ):
            what = f"AUROC of {name}, m={separation:g}s"
            yield Row("O2", what, predicted, *measured_auroc(score, separation, generator))
    below = rarity(sample(20_000, m, s, generator), m, s) < rarity(0.0, m, s)
    yield Row("O2", "AUROC of the likelihood at x=0, m=2s", centre_auroc(2.0), *mean_se(below))


def rows_O3(generator):
    """Rows for O3."""
    m, s = modes(3.0)
    for x, where in ((0.0, "between two modes"), (m, "at one"), (2 * m, "beyond one")):
        log_q = over_noise(log_density_by_noise, x, m, s)[0] @ NOISE_WEIGHTS
        yield Row("O3", f"log q {where}, m=3s, from E|r_t|^2", log_density(x, m, s), log_q)
    d, s = 16, 0.7
    mu = normal(generator, 3, d).numpy()
    x_0 = torch.as_tensor(mu[:1] + 0.5).expand(4000, d)
    log_q = log_density_by_noise(exact_field(mu, s), x_0, normal(generator, 4000, d))
    exponents = -((x_0[0].numpy() - mu) ** 2).sum(1) / (2 * s**2)
    predicted = logsumexp(exponents) - np.log(3) - d / 2 * np.log(2 * np.pi * s**2)
    yield Row("O3", "log q of three Gaussians, d=16, from |r_t|^2", predicted, *mean_se(log_q))
    x_0 = wtflow.independent(torch.zeros(1, d, dtype=torch.float64), generator).expand(4000, d)
    r = step_residual(exact_field(np.zeros((1, d)), 1.0), x_0, normal(generator, 4000, d), 0.6)
    power = noise_power(x_0[0].square().sum().item(), d, 0.6)
    yield Row("O3", "E|r_t|^2 of N(0, I), d=16, t=0.6", power, *mean_se(r.square().sum(1)))
    for separation in SEPARATIONS:
        for name, power in (("E|r_t|^2", mean_square), ("|E r_t|^2", square_of_mean)):
            score = partial(power, t=EARLY)
            predicted = auroc_by_quadrature(score, separation)
            what = f"AUROC of {name}, t={EARLY}, m={separation:g}s"
            measured = measured_auroc(score, separation, generator, n=250)
            yield Row("O3", what, predicted, *measured)
