"""S3, W5, B3, W6 in a learnt field: theory/learned_field.py. How to read: claims.py."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from claims import P, claim, close, rejects, rng, run_of_exact_fields, seeds, within
from hypothesis import strategies as st
from scipy.stats import chi, kstest

import wtflow
from theory import learned_field, mean_se, normal, singularity, unconditional_field
from theory.learned_field import DATA, EDGES, MODES, POINTS, RADIUS, REPEATS, THICKNESS, D


# ---- S3: error by time ------------------------------------------------------------------------
@claim(learned_field.circle_field, examples=10, t=st.floats(0.1, 0.95), seed=seeds)
def test_S3_circle_field(field, t, seed):
    """A circle is many atoms."""
    turn = 2 * np.pi * np.arange(2000) / 2000
    atoms = np.zeros((2000, D))
    atoms[:, 0] = RADIUS * np.cos(turn)
    atoms[:, 1] = RADIUS * np.sin(turn)
    x = 2 * np.random.default_rng(seed).normal(size=(4, D))
    close(field(x, np.full(4, t)), singularity.marginal_field(x, t, atoms), 1e4 / t**3)


test_S3_circle_field_rejects = rejects(
    test_S3_circle_field,
    field={"factor": lambda x, t: 0.999 * learned_field.circle_field(x, t)},
)


@claim(learned_field.auroc, examples=20, n=st.integers(1, 30), seed=seeds)
def test_auroc(auroc, n, seed):
    """P(normal < anomalous), ties one half, pair by pair."""
    normal, anomalous = np.random.default_rng(seed).integers(0, 6, (2, n))
    below, tied = normal[:, None] < anomalous, normal[:, None] == anomalous
    close(auroc(normal, anomalous), (below + 0.5 * tied).mean(), n)


test_auroc_rejects = rejects(
    test_auroc,
    auroc={"anomalous for normal": lambda normal, anom: learned_field.auroc(anom, normal)},
)


# ---- The data ---------------------------------------------------------------------------------
def test_circle_data():
    """Normal points on a circle of radius RADIUS, anomalies 0.8 off it, THICKNESS about both."""
    for kind, off in (("normal", 0.0), ("off", 0.8)):
        squared = DATA["circle"][kind](20_000, rng(0)).square()
        within(mean_se(squared.sum(1)), RADIUS**2 + off**2 + D * THICKNESS**2)
        within(mean_se(squared[:, :2].sum(1)), RADIUS**2 + 2 * THICKNESS**2)
    thin = learned_field.circle(500, rng(0))
    assert torch.allclose(thin.norm(dim=1), torch.tensor(RADIUS), atol=1e-5)
    assert not thin[:, 2:].any()
    within(mean_se(thin[:, 1]), 0)


def test_two_scales_data():
    """Half of SMALL, half of LARGE; anomalies of one scale; shells have no other radius."""
    pair = (unconditional_field.SMALL, unconditional_field.LARGE)
    points = {kind: sample(4000, rng(0)) for kind, sample in DATA["two scales"].items()}

    def cdf(r, *scales):
        return np.mean([chi(D).cdf(r / s) for s in scales], 0)

    for kind, scales in (("normal", pair), ("larger", (2.0,)), ("between", (0.85,))):
        assert kstest(points[kind].norm(dim=1).numpy(), cdf, scales).pvalue > P
    for kind, scale in zip(("small", "large"), pair, strict=True):
        assert torch.allclose(points[kind].norm(dim=1), torch.tensor(scale * D**0.5))
        within(mean_se(points[kind][:, 0]), 0)


def log_thick_circle(x):
    """log q of the thick circle up to a constant, as 4000 atoms of width THICKNESS."""
    turn = 2 * np.pi * torch.arange(4000, dtype=x.dtype) / 4000
    atoms = torch.zeros(4000, D, dtype=x.dtype)
    atoms[:, 0], atoms[:, 1] = RADIUS * turn.cos(), RADIUS * turn.sin()
    return torch.logsumexp(-(x[:, None] - atoms).square().sum(-1) / (2 * THICKNESS**2), 1)


def log_two_scales(x):
    scales = torch.tensor([unconditional_field.SMALL, unconditional_field.LARGE], dtype=x.dtype)
    squares = x.square().sum(1, keepdim=True) / scales**2
    return torch.logsumexp(-squares / 2 - x.shape[1] * scales.log(), 1)


@claim(
    learned_field.thick_circle_grad_log_q,
    learned_field.two_scales_grad_log_q,
    examples=4,
    seed=seeds,
)
def test_grad_log_q(of_circle, of_scales, seed):
    """By autograd of log q."""
    for grad_log_q, log_q in ((of_circle, log_thick_circle), (of_scales, log_two_scales)):
        x = normal(rng(seed), 4, D).requires_grad_()
        (gradient,) = torch.autograd.grad(log_q(x).sum(), x)
        assert np.allclose(grad_log_q(x.detach().numpy()), gradient, rtol=1e-6, atol=1e-6)


test_grad_log_q_rejects = rejects(
    test_grad_log_q,
    of_circle={"sign": lambda x: -learned_field.thick_circle_grad_log_q(x)},
    of_scales={"one scale": lambda x: -x},
)


# ---- Training and its error --------------------------------------------------------------------
@pytest.mark.parametrize("time_conditioned, t_max", [(True, 1.0), (False, 1.0), (False, 0.05)])
def test_training_approaches_the_exact_fields(time_conditioned, t_max):
    """Of two networks in one training, each that of its coupling, after a few steps.

    The second is the antipode: x_t = (1 - 2t) x_0 and u = -2 x_0, so -2x at t = 0, 2x at 1. Without
    time conditioning both are 0, by B2 and by symmetry; near t = 0 they are u_0 (B4).
    """

    def antipode(x_0, generator):
        return -x_0

    gaussian = learned_field.gaussian
    couplings = [wtflow.independent, antipode]
    v_theta = learned_field.train(gaussian, couplings, 0, time_conditioned, t_max, steps=150)
    assert not any(weight.requires_grad for weight in v_theta.parameters())
    x = gaussian(400, rng(0))
    early, late = (v_theta(x.repeat(2, 1), torch.full((800,), t)).chunk(2) for t in (0.0, 1.0))
    for k, slope in enumerate((1, 2)):
        at_0 = -slope if time_conditioned or t_max < 1 else 0
        at_1 = slope if time_conditioned else at_0
        assert (early[k] - at_0 * x).square().mean() < 0.2 * (1 + at_0**2)
        assert (late[k] - at_1 * x).square().mean() < 0.2 * (1 + at_1**2)
        assert time_conditioned or torch.equal(early[k], late[k])


def test_error_by_time_is_that_of_the_field_in_each_bin():
    """t over all of each bin of EDGES; 4 if the field is off by 2."""
    times = []

    def v_theta_off_by_2(x, t):
        times.append(t)
        return ((2 * t - 1) / ((1 - t) ** 2 + t**2))[:, None] * x + 2

    gaussian, exact = learned_field.gaussian, learned_field.gaussian_field
    errors = learned_field.error_by_time(v_theta_off_by_2, gaussian, exact, rng(0))
    assert errors[:, 0] == pytest.approx(4, abs=1e-4) and errors[:, 1].max() < 1e-4
    for t, (low, high) in zip(times, pairwise(EDGES), strict=True):
        tenth = 0.1 * (high - low)
        assert low <= t.min() < low + tenth and high - tenth < t.max() <= high + 1e-6


# ---- What is run, and the printed table --------------------------------------------------------
def test_exact_fields_have_no_error_and_no_residual():
    """learned_field.run with exact fields for networks, REPEATS of each coupling."""
    errors, results = run_of_exact_fields()
    assert list(errors) == ["circle", "N(0, I)"]
    assert all(bins.shape == (len(EDGES) - 1, 2) and bins.max() < 1e-9 for bins in errors.values())
    rhos = {key: list(fields) for key, fields in results.items()}
    expected = {"circle": [-0.9, 0.0, 0.5, 0.9, 0.97], "two scales": [0.0, 0.9]}
    linear = [("circle", "time-conditioned, linear u_0"), ("two scales", "t < 0.05, linear u_0")]
    assert [rhos.pop(key) for key in linear] == [[0.9], [0.9]]
    assert rhos == {(data, mode): expected[data] for mode in MODES for data in expected}
    for (data, mode), fields in results.items():
        for fit in fields.values():
            residual = np.stack([fit.score(kind, True) for kind in DATA[data]])
            assert residual.shape == (len(DATA[data]), REPEATS, POINTS)
            assert not mode.startswith("time-conditioned") or residual.max() < 1e-5
            radius = np.linalg.norm(fit.conditional_mean["normal"], axis=1)
            assert (np.ptp(radius) > 0.1) == mode.endswith("linear u_0")  # |x| matters to it alone


def test_table_of_exact_fields():
    """Measured is what is predicted, equal networks have no spread; nan where nothing is known."""
    errors, results = run_of_exact_fields()
    numbered = dict.fromkeys(errors, np.arange(14.0).reshape(7, 2))
    rows = list(learned_field.table(numbered, results))
    assert [row[2:] for row in rows[:4]] == [(0, 0, 1), (0, 10, 11)] * 2
    assert len(rows) == 4 + 5 + 4 + 2 * (3 * (5 + 2 * 2) + 1 + 2)
    scores = [row for row in rows if "AUROC" in row.what]
    assert sum(np.isnan(row.predicted) for row in scores) == 2 * (1 + 2 + 5 + 2)
    for row in rows[4:]:
        assert row.se < 1e-6
        if row in scores and "time-conditioned" in row.what:  # of points that all score the same
            assert row.predicted == 0.5 or "linear" in row.what
        elif not np.isnan(row.predicted):
            assert row.measured == pytest.approx(row.predicted, abs=0.02)
