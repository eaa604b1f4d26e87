"""E1-E4: the score of a good image is a maximum: its tail, the line fitted to it, and the rank.

A score M is the largest of n distances |z| / sqrt(d) on a map, z in R^d. What is fitted and ranked
is what evaluate has in use: central_line, fit_tail, threshold_of, classify; maps are those of
wtflow.map_and_score. The formulas are [derived]; proofs in README.md.
"""

import math
from itertools import product

import numpy as np
import torch
from scipy.stats import chi2, norm
from scipy.stats import f as f_ratio

import evaluate
import wtflow
from theory import Row, mean_se, normal

D, N = 152, 2000  # features, and positions of a map, of about the size in use
LIMIT = 10**12  # positions, for a limit
RATE = 0.01  # nominal share of good images above the threshold
SMOOTHED = 6 / 16  # std of a white map after map_and_score's 1 2 1 each way, off the border


# ---- Closed forms -----------------------------------------------------------------------------
def survival(x, d=D, nu=np.inf):
    """P(r |z| / sqrt(d) > x), z ~ N(0, I_d), r = 1, or r^2 = nu / chi^2_nu (Student's t_nu)."""
    return chi2.sf(d * x**2, d) if np.isinf(nu) else f_ratio.sf(x**2, d, nu)


def quantile(s, d=D, nu=np.inf):
    """The distance that a position exceeds with a probability of s."""
    return np.sqrt(chi2.isf(s, d) / d if np.isinf(nu) else f_ratio.isf(s, d, nu))


def exceedance(x, n=N, d=D, nu=np.inf):
    """P(M > x) = 1 - F(x)^n, n independent positions (E1)."""
    return -np.expm1(n * np.log1p(-survival(x, d, nu)))


def score_quantile(p, n=N, d=D, nu=np.inf):
    """The x of P(M <= x) = p (E1)."""
    return quantile(-np.expm1(np.log(p) / n), d, nu)


def norming(n=N, d=D, nu=np.inf):
    """(b_n, a_n): (log M - log b_n) b_n / a_n tends to a Gumbel variable (E1, E2).

    b_n is exceeded once in n positions on average; a_n is the reciprocal hazard there.
    """
    b = quantile(1 / n, d, nu)
    density = 2 * b * (d * chi2.pdf(d * b**2, d) if np.isinf(nu) else f_ratio.pdf(b**2, d, nu))
    return b, 1 / (n * density)


def curvature(n=N, d=D, nu=np.inf, log=True):
    """xi_n: log M, or M itself, is affine in y + xi_n y^2 / 2 to first order, y Gumbel (E1, E2).

    The derivative of the reciprocal hazard at b_n, by log x for log M.
    """
    b, a = norming(n, d, nu)
    falling = d * b if np.isinf(nu) else (d + nu) * d * b / (nu + d * b**2)
    return -1 - a * ((d - 1) / b - falling) - (a / b if log else 0)


def gap(xi):
    """sup |P(M <= x) - Gumbel| = sup_y y^2 exp(-y - exp(-y)) |xi| / 2 = 0.240 |xi| (E1)."""
    y = np.linspace(1, 4, 10_001)
    return (y**2 * np.exp(-y - np.exp(-y))).max() * abs(xi) / 2


def gumbel(p):
    return -np.log(-np.log(p))


def central(rate=RATE, nodes=100_000):
    """p between CENTRAL, and the weight there in the line's value at 1 - rate, of mean 1 (E3)."""
    low, high = evaluate.CENTRAL
    p = low + (high - low) * (np.arange(nodes) + 0.5) / nodes
    y = gumbel(p)
    return p, 1 + (y - y.mean()) * (gumbel(1 - rate) - y.mean()) / y.var()


def extrapolated(xi, rate=RATE):
    """Share above the line's threshold if log M = y + xi y^2 / 2, about rate exp(c xi) (E2).

    c = 5.56 at 1 %: y^2 / 2 at 1 - rate less its line's value there.
    """
    p, weight = central(rate)
    c = gumbel(1 - rate) ** 2 / 2 - (weight * gumbel(p) ** 2 / 2).mean()
    return -np.expm1(np.log1p(-rate) * np.exp(c * xi))


def frechet_in_score(nu, rate=RATE):
    """Share above the threshold of a line in M itself where M is Frechet of index nu (E2)."""
    p, weight = central(rate)
    return -np.expm1(-((weight * np.exp(gumbel(p) / nu)).mean() ** -nu))


def variance(rate=RATE):
    """V: n Var(log threshold) / scale^2 tends to it; 43.1 at 1 % (E3).

    A score of rank u moves the log threshold by E h - h(u), h(u) = int_{p > u} weight y'(p) dp over
    CENTRAL, y' = 1 / (-p log p).
    """
    p, weight = central(rate)
    low, high = evaluate.CENTRAL
    h = np.cumsum((weight / (-p * np.log(p)))[::-1])[::-1] / len(p)
    mean = low * h[0] + (high - low) * h.mean()
    return low * h[0] ** 2 + (high - low) * (h**2).mean() - mean**2


def unseen(n):
    """How many of the highest of n scores do not move central_line, whatever they are (E3)."""
    return n - (9 * n + 5) // 10


def rank_rates(good, defects=0, rate=RATE):
    """P(a new good score, a new defect's > threshold by rank); defects among n are higher (E4).

    The threshold is the j-th largest of n = good + defects, j = n + 1 - ceil((n+1) (1-rate)) >= 1.
    """
    n = good + defects
    j = max(n + 1 - math.ceil((n + 1) * (1 - rate) - 1e-9), 1)
    if j <= defects:
        return 0.0, j / (defects + 1)
    return (j - defects) / (good + 1), 1.0


# ---- Estimators -------------------------------------------------------------------------------
def maxima(images, n, d, nu, generator):
    """M (images,) of n positions each, from normal numbers."""
    square = normal(generator, images, n, d).square().mean(2)
    if not np.isinf(nu):
        square = square / normal(generator, images, n, nu).square().mean(2)
    return square.amax(1).sqrt().numpy()


def effective_number(log_F):
    """n_eff of P(M <= x) = F(x)^n_eff from log F(M) of independent images, its standard error."""
    n_eff = -1 / np.mean(log_F)
    return n_eff, n_eff / len(log_F) ** 0.5


def smoothed_number(images, side, generator):
    """n_eff / n of a white map that wtflow smooths, off its border, and its standard error (E1)."""
    distance = 20 + normal(generator, images, side + 2, side + 2)
    inner = wtflow.map_and_score(distance.square())[0][:, 1:-1, 1:-1] - 20
    n_eff = effective_number(norm.logcdf(inner.flatten(1).amax(1).numpy() / SMOOTHED))
    return tuple(np.array(n_eff) / side**2)


def good_sets(sets, good, generator, nu=np.inf, share=0.0):
    """Scores (sets, good), a share of them times 1 + Exp(0.5): defects among the good images."""
    u, chosen, excess = torch.rand(3, sets, good, generator=generator, dtype=torch.float64).numpy()
    factor = np.where(chosen < share, 1 - 0.5 * np.log1p(-excess), 1)
    return score_quantile(u, nu=nu) * factor


def one_line(scores):
    """The threshold of one line, the suspects not left out."""
    return evaluate.Tail(*evaluate.central_line(np.sort(np.log(scores))), 0).threshold(RATE)


def in_score(scores):
    """The threshold of one line in M itself, not in its logarithm."""
    location, scale = evaluate.central_line(np.sort(scores))
    return location + scale * gumbel(1 - RATE)


def tail_line(scores):
    """The threshold in use: of the line without the suspects."""
    return evaluate.threshold_of(scores, 100 * RATE)


def by_rank(scores):
    return evaluate.threshold_of(scores, 100 * RATE, "rank")


def coverage(threshold, sets, nu=np.inf):
    """Mean share of new good images above the threshold of each set, and its standard error."""
    return mean_se(exceedance(np.array([threshold(scores) for scores in sets]), nu=nu))


def at_infinity(threshold, n=N, d=D, nu=np.inf):
    """The same of infinitely many good images: of the 4000 quantiles of M."""
    scores = score_quantile((np.arange(4000) + 0.5) / 4000, n, d, nu)
    return exceedance(threshold(scores), n, d, nu)


def distance_to_gumbel(n=N, d=D, nu=np.inf):
    """sup |P(M <= b_n exp(y a_n / b_n)) - exp(-exp(-y))|."""
    b, a = norming(n, d, nu)
    y = np.linspace(-3, 12, 3001)
    return abs(1 - exceedance(b * np.exp(a / b * y), n, d, nu) - np.exp(-np.exp(-y))).max()


def gumbel_sets(sets, good, generator):
    """log M (sets, good) where it is Gumbel of location 0 and scale 1."""
    return gumbel(torch.rand(sets, good, generator=generator, dtype=torch.float64).numpy())


# ---- Table ------------------------------------------------------------------------------------
def table(seed=0):
    """Rows for E1-E4."""
    generator = torch.Generator().manual_seed(seed)
    yield from rows_E1(generator)
    yield from rows_E2()
    yield from rows_E3(generator)
    yield from rows_E4(generator)


def rows_E1(generator):
    """Rows for E1."""
    above = maxima(4000, 100, 16, np.inf, generator) > score_quantile(0.8, 100, 16)
    yield Row("E1", "P(M > its 0.8-quantile), d=16, n=100", 0.2, *mean_se(above))
    for d in (1, D):
        what = f"distance of log M to Gumbel, d={d}"
        yield Row("E1", f"{what}, n={N}", np.nan, distance_to_gumbel(N, d))
        predicted = gap(curvature(LIMIT, d))
        yield Row("E1", f"{what}, n=10^12, limit", predicted, distance_to_gumbel(LIMIT, d))
    for side in (24, 45):
        ratio = smoothed_number(1000, side, generator)
        yield Row("E1", f"effective number / n, smoothed white map, n={side**2}", np.nan, *ratio)


def rows_E2():
    """Rows for E2."""
    for nu in (3, 10):
        b, a = norming(LIMIT, D, nu)
        yield Row("E2", f"scale of log M, t_{nu}, limit", 1 / nu, a / b)
    what = "share above the 1 % line in M, t_3, n=10^12, limit"
    yield Row("E2", what, frechet_in_score(3), at_infinity(in_score, LIMIT, D, 3))
    what = "share above the 1 % line in log M, light, n=10^12, limit"
    yield Row("E2", what, extrapolated(curvature(LIMIT)), at_infinity(one_line, LIMIT))
    for nu, (threshold, of) in product((np.inf, 10, 3), ((one_line, "log M"), (in_score, "M"))):
        what = f"share above the 1 % line in {of}, {law(nu)}, n={N}"
        yield Row("E2", what, np.nan, at_infinity(threshold, nu=nu))


def law(nu):
    return "light" if np.isinf(nu) else f"t_{nu}"


def rows_E3(generator):
    """Rows for E3."""
    for good in (100, 400):
        sets = np.exp(gumbel_sets(1500, good, generator))
        errors = np.log([one_line(scores) for scores in sets]) - gumbel(1 - RATE)
        what = f"n Var(log threshold) / scale^2, {good} good images"
        yield Row("E3", what, variance(), *mean_se(good * errors**2))
    sets = np.exp(gumbel_sets(2000, 25, generator))
    for threshold, name in ((one_line, "one line"), (tail_line, "the fit in use")):
        above = -np.expm1(-1 / np.array([threshold(scores) for scores in sets]))
        what = f"share above, log M Gumbel, 25 good images, {name}; to first order"
        yield Row("E3", what, RATE * (1 + variance() / 50), *mean_se(above))
    for good in (100, 1000):
        sets = np.exp(gumbel_sets(400, good, generator))
        found = [evaluate.fit_tail(scores).suspects for scores in sets]
        what = f"share of good sets with suspects, log M Gumbel, {good} good images"
        yield Row("E3", what, np.nan, *mean_se(np.array(found) > 0))
    for nu, good, share in product((np.inf, 3), (25, 1000), (0.0, 0.05)):
        sets = good_sets(150, good, generator, nu, share)
        what = f"share above, {law(nu)}, {good} good images, {100 * share:g} % defects"
        yield Row("E3", what, np.nan, *coverage(tail_line, sets, nu))


def rows_E4(generator):
    """Rows for E4."""
    for good, sets in ((25, 700), (150, 700), (1000, 200)):
        above = coverage(by_rank, good_sets(sets, good, generator))
        yield Row("E4", f"share above, {good} good images", rank_rates(good)[0], *above)
