"""E1-E4: theory/extremes.py, wtflow's smoothing, evaluate's thresholds. How to read: claims.py."""

from itertools import product

import numpy as np
from claims import P, claim, close, rejects, rng, seeds, table_test, within
from hypothesis import strategies as st
from scipy.stats import chi2, kstest

import evaluate
import wtflow
from theory import extremes, mean_se, normal
from theory.extremes import LIMIT, RATE, gumbel

lights_and_heavies = st.sampled_from([np.inf, 20, 10, 5, 3])
few = st.integers(1, 40)
features = st.integers(1, 200)
goods = st.integers(3, 120)
rates = st.floats(0.002, 0.5)


# ---- E1 ---------------------------------------------------------------------------------------
@claim(extremes.exceedance, examples=8, n=few, d=few, nu=lights_and_heavies, seed=seeds)
def test_E1_maximum(exceedance, n, d, nu, seed):
    """The largest of n simulated positions, and its quantiles, have this distribution."""
    M = extremes.maxima(1500, n, d, nu, rng(seed))
    assert kstest(M, lambda x: 1 - exceedance(x, n, d, nu)).pvalue > P
    p = np.array([0.01, 0.5, 0.99])
    close(1 - exceedance(extremes.score_quantile(p, n, d, nu), n, d, nu), p, 1e5)


test_E1_maximum_rejects = rejects(
    test_E1_maximum,
    exceedance={
        "light for heavy": lambda x, n, d, nu: extremes.exceedance(x, n, d),
    },
)


@claim(
    extremes.norming, extremes.curvature, examples=20, n=goods, d=features, nu=lights_and_heavies
)
def test_E1_norming(norming, curvature, n, d, nu):
    """b_n is exceeded once in n; a_n and xi_n are derivatives, of the log survival and of a_n."""
    b, a = norming(n, d, nu)
    close(n * extremes.survival(b, d, nu), 1, 1e4)
    (b_0, a_0), (b_1, a_1) = norming(n * 0.999, d, nu), norming(n * 1.001, d, nu)
    assert abs((b_1 - b_0) / np.log(1.001 / 0.999) / a - 1) < 1e-4
    assert abs((a_1 - a_0) / (b_1 - b_0) - curvature(n, d, nu, log=False)) < 1e-4
    assert abs((a_1 / b_1 - a_0 / b_0) / np.log(b_1 / b_0) - curvature(n, d, nu)) < 1e-4


test_E1_norming_rejects = rejects(
    test_E1_norming,
    norming={"1/n for 1/(n f)": lambda n, d, nu: (extremes.quantile(1 / n, d, nu), 1 / n)},
    curvature={
        "score for logarithm": lambda n, d, nu, log=True: extremes.curvature(n, d, nu, False),
    },
)


@claim(extremes.gap, lambda n: -1 / np.log(n), examples=20, d=st.integers(1, 4), digits=goods)
def test_E1_rate(gap, curvature, d, digits):
    """The distance to the Gumbel distribution is 0.240 |xi_n|, and xi_n is about -1 / log n."""
    n = 10.0 ** (10 + digits)
    xi = extremes.curvature(n, d)
    assert abs(extremes.distance_to_gumbel(n, d) / gap(xi) - 1) < 0.05
    assert abs(xi / curvature(n) - 1) < 0.3


test_E1_rate_rejects = rejects(
    test_E1_rate,
    gap={"factor": lambda xi: 2 * extremes.gap(xi)},
    curvature={"of M itself": lambda n: -1 / (2 * np.log(n))},
)


@claim(lambda: (1 / 9, 1.0), wtflow.map_and_score, examples=6, side=st.integers(6, 20), seed=seeds)
def test_E1_smoothed(bounds, smooth, side, seed):
    """n_eff / n of a smoothed white map; its variance inside, and 10/6 of that at the border."""
    ratio, se = extremes.smoothed_number(600, side, rng(seed))
    assert bounds()[0] - 5 * se < ratio < bounds()[1] + 5 * se
    y, _ = smooth((20 + normal(rng(seed), 600, 20, 20)).square())
    for row, predicted in ((9, extremes.SMOOTHED**2), (0, extremes.SMOOTHED**2 * 10 / 6)):
        variance = y[:, row, 9].var().item()
        within((variance, variance / 300**0.5), predicted)


test_E1_smoothed_rejects = rejects(
    test_E1_smoothed,
    bounds={"independent": lambda: (1, 1), "one in nine": lambda: (0, 1 / 9)},
    smooth={"not smoothed": lambda square: (square.sqrt(), None)},
)


# ---- E2 ---------------------------------------------------------------------------------------
@claim(lambda nu: 1 / nu, examples=15, d=features, nu=st.floats(1, 6), x=st.floats(1e3, 1e5))
def test_E2_index(scale, d, nu, x):
    """Scale of log M: of t_nu positions, and of a light M times one r for the whole image."""
    b, a = extremes.norming(LIMIT, d, nu)
    assert abs(a / b / scale(nu) - 1) < 0.01
    M = extremes.score_quantile((np.arange(100) + 0.5) / 100, 50, d)
    above, further = (chi2.cdf(nu * (M / y) ** 2, nu).mean() for y in (x, np.e * x))
    assert abs(np.log(above / further) * scale(nu) - 1) < 0.01


test_E2_index_rejects = rejects(
    test_E2_index,
    scale={"of the density": lambda nu: 1 / (nu + 1)},
)


@claim(extremes.extrapolated, examples=20, xi=st.floats(-1e-3, 1e-3), rate=rates)
def test_E2_extrapolated(extrapolated, xi, rate):
    """Share above the line's threshold where log M = (y + xi y^2/2) / 20, to first order in xi."""
    y = gumbel((np.arange(20_000) + 0.5) / 20_000)
    line = evaluate.Tail(*evaluate.central_line((y + xi * y**2 / 2) / 20), 0)
    x = 20 * np.log(line.threshold(rate))
    above = -np.expm1(-np.exp(-2 * x / (1 + np.sqrt(1 + 2 * xi * x))))
    assert abs(np.log(above / extrapolated(xi, rate))) < 150 * xi**2 + 1e-9


test_E2_extrapolated_rejects = rejects(
    test_E2_extrapolated,
    extrapolated={
        "factor": lambda xi, rate: extremes.extrapolated(2 * xi, rate),
    },
)


@claim(extremes.frechet_in_score, examples=15, d=features, nu=st.floats(2, 6))
def test_E2_in_score(share, d, nu):
    """What the line in M itself does to the share above, in the limit."""
    measured = extremes.at_infinity(extremes.in_score, LIMIT, d, nu)
    assert abs(measured / share(nu) - 1) < 0.02


test_E2_in_score_rejects = rejects(
    test_E2_in_score,
    share={
        "first order": lambda nu: extremes.extrapolated(1 / nu),
    },
)


# ---- E3 ---------------------------------------------------------------------------------------
@claim(
    evaluate.fit_tail,
    examples=20,
    good=goods,
    c=st.floats(0.1, 10),
    k=st.floats(0.5, 2),
    seed=seeds,
)
def test_E3_equivariant(fit, good, c, k, seed):
    """The threshold of c s^k is c times the k-th power of that of s; there p is the rate."""
    s = extremes.good_sets(1, good, rng(seed), 5)[0]
    tail, other = fit(s), fit(c * s**k)
    assert other.suspects == tail.suspects
    close(np.log(other.threshold(RATE)), np.log(c * tail.threshold(RATE) ** k), 1e4)
    close(tail.p_value(np.array(tail.threshold(RATE))), RATE, 1e3)


@claim(
    evaluate.Tail.threshold, extremes.variance, examples=4, good=st.integers(200, 400), seed=seeds
)
def test_E3_error(threshold, variance, good, seed):
    """The threshold of a Gumbel log M is right on average, and n times its variance is V."""
    lines = [
        evaluate.Tail(*evaluate.central_line(np.sort(x)), 0)
        for x in extremes.gumbel_sets(800, good, rng(seed))
    ]
    errors = np.log([threshold(line, RATE) for line in lines]) - gumbel(1 - RATE)
    within(mean_se(errors), 0, 5 / good)
    within(mean_se(good * errors**2), variance(), 0.05 * variance())


test_E3_error_rejects = rejects(
    test_E3_error,
    threshold={
        "rate for 1 - rate": lambda line, rate: line.threshold(1 - rate),
    },
    variance={"of the order statistic": lambda: RATE / (1 - RATE) / np.log1p(-RATE) ** 2},
)


@claim(extremes.unseen, examples=30, good=st.integers(3, 300), seed=seeds)
def test_E3_breakdown(unseen, good, seed):
    """The line does not see the highest tenth; one more moves it. As suspects they are left out."""
    s = np.sort(extremes.good_sets(1, good, rng(seed))[0])
    rank = np.arange(good) - good + unseen(good)

    def line(factor, first):
        return evaluate.central_line(np.log(np.where(rank >= first, factor * s, s)))

    assert line(1, 0) == line(1e3, 0) != line(1e3, -1)
    tail, further = (evaluate.fit_tail(np.where(rank >= 0, far * s, s)) for far in (1e3, 1e6))
    assert tail == further and tail.suspects == unseen(good)
    assert tail[:2] == evaluate.central_line(np.log(s[: good - tail.suspects]))


test_E3_breakdown_rejects = rejects(
    test_E3_breakdown,
    unseen={"one more": lambda n: extremes.unseen(n) + 1, "none": lambda n: 0},
)


@claim(extremes.tail_line, examples=1, seed=seeds)
def test_E3_coverage(threshold, seed):
    """0.5 to 2 % of good images are above, with up to 5 % of defects; at most 2 % with 15 %."""
    shares = ((0, 0.005), (0.02, 0.005), (0.05, 0.005), (0.15, 0))
    for good, nu, (share, least) in product((25, 100, 400, 1000), (np.inf, 10), shares):
        sets = extremes.good_sets(40, good, rng(seed), nu, share)
        above, se = extremes.coverage(threshold, sets, nu)
        assert least - 4 * se < above < 0.02 + 4 * se


test_E3_coverage_rejects = rejects(
    test_E3_coverage,
    threshold={"suspects not left out": extremes.one_line, "rank": extremes.by_rank},
)


# ---- E4 ---------------------------------------------------------------------------------------
def each_left_out(x):
    return [(x[k], np.delete(x, k)) for k in range(len(x))]


@claim(
    extremes.rank_rates,
    evaluate.threshold_of,
    examples=40,
    good=goods,
    defects=st.integers(0, 12),
    rate=rates,
    law=st.sampled_from([np.exp, np.sinh, lambda z: np.exp(9 * z), lambda z: np.exp(z).round(1)]),
    seed=seeds,
)
def test_E4_rank(rank_rates, threshold_of, good, defects, rate, law, seed):
    """Left out in turn, good scores and higher defects: the share above is exact; ties: at most."""
    x, high = law(normal(rng(seed), good + 1).numpy()), 1e99 * np.arange(1, defects + 2)
    pairs = [(one, np.append(rest, high[1:])) for one, rest in each_left_out(x)]
    above = sum(one > threshold_of(rest, 100 * rate, "rank") for one, rest in pairs)
    new_good, new_defect = rank_rates(good, defects, rate)
    tied = len(np.unique(x)) <= good
    assert above == round(new_good * (good + 1)) or (tied and above < new_good * (good + 1))
    assert defects or new_good <= max(rate, 1 / (good + 1)) + 1e-12
    pairs = [(one, np.append(x[:good], rest)) for one, rest in each_left_out(high)]
    above = sum(one > threshold_of(rest, 100 * rate, "rank") for one, rest in pairs)
    assert above == round(new_defect * (defects + 1))


test_E4_rank_rejects = rejects(
    test_E4_rank,
    rank_rates={
        "as without defects": lambda good, k, rate: extremes.rank_rates(good, 0, rate),
    },
    threshold_of={
        "quantile": lambda s, fpr, how: np.quantile(s, 1 - fpr / 100),
    },
)


# ---- The printed table ------------------------------------------------------------------------
def known_rows(seed):
    """Rows with a prediction that is exact or a limit."""
    rows = extremes.table(seed)
    return [row for row in rows if not np.isnan(row.predicted) and "first order" not in row.what]


test_table = table_test(known_rows, "E1", "E2", "E3", "E4")
