"""S3, W5, W6, O3, B6 in a learnt field: theory/learned_field.py. How to read: claims.py."""

from functools import cache
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
from claims import claim, close, rejects, rng, seeds, within
from hypothesis import strategies as st

import wtflow
from theory import learned_field, local_transport, mean_se, normal, singularity
from theory.learned_field import EDGES, KINDS, MODES, RADIUS, RHOS, THICKNESS, TIMES, D


# ---- Closed forms -----------------------------------------------------------------------------
@claim(
    learned_field.circle_field,
    examples=10,
    t=st.floats(0.1, 0.95),
    thickness=st.just(0.0) | st.floats(0.1, 1),
    seed=seeds,
)
def test_S3_circle_field(field, t, thickness, seed):
    """A circle is many atoms, a thick one many Gaussians."""
    turn = 2 * np.pi * np.arange(2000) / 2000
    atoms = np.zeros((2000, D))
    atoms[:, 0] = RADIUS * np.cos(turn)
    atoms[:, 1] = RADIUS * np.sin(turn)
    x = 2 * np.random.default_rng(seed).normal(size=(4, D))
    exact = singularity.marginal_field(x, t, atoms, thickness)
    close(field(x, np.full(4, t), thickness), exact, 1e4 / t**3)


test_S3_circle_field_rejects = rejects(
    test_S3_circle_field,
    field={"thin": lambda x, t, thickness: learned_field.circle_field(x, t)},
)


@claim(learned_field.auroc, examples=20, n=st.integers(1, 30), seed=seeds)
def test_auroc(auroc, n, seed):
    """P(normal < anomalous), ties one half, pair by pair."""
    normal, anomalous = np.random.default_rng(seed).integers(0, 6, (2, n))
    below, tied = normal[:, None] < anomalous, normal[:, None] == anomalous
    close(auroc(normal, anomalous), (below + 0.5 * tied).mean(), n)


@claim(learned_field.thick_circle_grad_log_q, examples=4, seed=seeds)
def test_grad_log_q(grad_log_q, seed):
    """By autograd of log q, 4000 atoms of width THICKNESS."""
    turn = 2 * np.pi * torch.arange(4000, dtype=torch.float64) / 4000
    atoms = torch.zeros(4000, D, dtype=torch.float64)
    atoms[:, 0], atoms[:, 1] = RADIUS * turn.cos(), RADIUS * turn.sin()
    x = normal(rng(seed), 4, D).requires_grad_()
    squares = (x[:, None] - atoms).square().sum(-1)
    (gradient,) = torch.autograd.grad(torch.logsumexp(-squares / (2 * THICKNESS**2), 1).sum(), x)
    assert np.allclose(grad_log_q(x.detach().numpy()), gradient, rtol=1e-6, atol=1e-6)


# ---- The data ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "kind, off, radius", [("normal", 0, 1), ("off", 0.8, 1), ("inside", 0, 0.8)]
)
def test_circle_data(kind, off, radius):
    """Normal points on a circle, anomalies 0.8 off its plane or inside, THICKNESS about all."""
    squared = KINDS[kind](20_000, rng(0)).square()
    in_plane = (radius * RADIUS) ** 2
    within(mean_se(squared.sum(1)), in_plane + off**2 + D * THICKNESS**2)
    within(mean_se(squared[:, :2].sum(1)), in_plane + 2 * THICKNESS**2)
    thin = learned_field.circle(500, rng(0))
    assert torch.allclose(thin.norm(dim=1), torch.tensor(RADIUS), atol=1e-5)
    assert not thin[:, 2:].any()
    within(mean_se(thin[:, 1]), 0)


# ---- Training and its error --------------------------------------------------------------------
@pytest.mark.parametrize("time_conditioned, t_max", [(True, 1.0), (False, 1.0), (False, 0.05)])
def test_training_approaches_the_exact_fields(time_conditioned, t_max):
    """Of two networks in one training, each that of its coupling, after a few steps.

    The second is the antipode: x_t = (1 - 2t) x_0 and u = -2 x_0, so -2x at t = 0, 2x at 1. Without
    time conditioning both are 0, by B2 and by symmetry; near t = 0 they are u_0.
    """

    def antipode(x_0, generator):
        return -x_0

    couplings = [wtflow.independent, antipode]
    args = (learned_field.gaussian, couplings, 0, time_conditioned, t_max)
    v_theta = learned_field.train(*args, steps=150)
    assert not any(weight.requires_grad for weight in v_theta.parameters())
    x = learned_field.gaussian(400, rng(0))
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
def exact_train(sample, couplings, seed, time_conditioned=True, t_max=1.0):
    """In place of learned_field.train: fields that are exact, near t = 0 to first order."""
    thick = sample is learned_field.thick_circle

    def field(couple, x, t):
        if sample is learned_field.gaussian:
            return learned_field.gaussian_field(x, t)
        if couple is wtflow.independent:
            return learned_field.circle_field(x, t, THICKNESS * thick)
        rho = couple.keywords["rho"]
        u_0 = local_transport.initial_field(x, rho)
        if time_conditioned or t_max == 1:
            return u_0
        grad_log_q = learned_field.thick_circle_grad_log_q(x)
        return u_0 + local_transport.early_residual(x, grad_log_q, rho, t_max)

    def v_theta(x, t):
        parts = (v.double().numpy().reshape(len(couplings), -1, *v.shape[1:]) for v in (x, t))
        fields = [field(*part) for part in zip(couplings, *parts, strict=True)]
        return torch.as_tensor(np.concatenate(fields))

    return v_theta


@cache
def run_of_exact_fields():
    with mock.patch.object(learned_field, "train", exact_train):
        return learned_field.run()


def test_rows_of_exact_fields_are_as_predicted():
    """Every row but those of fields that see no time, where nothing is known; no spread."""
    errors, by_rho, by_time = run_of_exact_fields()
    assert all(bins.shape == (len(EDGES) - 1, 2) and bins.max() < 1e-9 for bins in errors.values())
    assert list(by_rho) == list(MODES) and list(by_time) == list(TIMES)
    assert all(list(fits) == list(RHOS) for fits in by_rho.values())
    rows = list(learned_field.table(errors, by_rho, by_time))
    assert len(rows) == 4 + 5 + 3 * 5 + 2 + 2 * len(TIMES)
    for row in rows[4:]:
        if "x_0" in row.what:  # a Gaussian of the features sees what is off the plane alone
            assert (row.measured > 0.9) == ("off" in row.what) == (row.measured > 0.5)
        elif not np.isnan(row.predicted) and row.predicted != 0.5:  # where r is 0, see below
            slack = {"W5": 0.02}.get(row.claim, 1e-3)  # E|x| for sqrt(m2)
            assert row.measured == pytest.approx(row.predicted, abs=slack), row
            assert row.se < 0.02
    for fit in (*by_rho["time-conditioned"].values(), by_time[0.0]):
        assert max(np.abs(r).max() for r in fit.r.values()) < 1e-5


def test_residual_of_a_known_network():
    """v = 0 in one of two networks, at t = 0 and 1: r by hand; its AUROC by length."""

    def v_theta(x, t):
        return torch.cat([0 * x[: len(x) // 2], -x[len(x) // 2 :]])

    zero, inwards = learned_field.residuals(v_theta, 0.0, rhos=(0.5, 0.0))
    x = zero.x["normal"]
    size = np.linalg.norm(x, axis=1, keepdims=True)
    assert np.allclose(zero.r["normal"][0], x + 0.5 * RADIUS * x / size, atol=1e-5)
    assert np.abs(inwards.r["normal"]).max() < 1e-5
    assert zero.inward(0.5) == pytest.approx(0, abs=1e-5)
    assert inwards.inward(0.0) == pytest.approx(size.mean(), rel=1e-5)
    by_hand = learned_field.auroc(
        *(np.linalg.norm(zero.x[k], axis=1) for k in ("normal", "inside"))
    )
    assert zero.auroc("inside") == pytest.approx((by_hand, 0.0), abs=1e-5)
