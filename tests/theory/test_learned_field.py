"""S3, C2, W3, W4 in a learnt field: theory/learned_field.py. How to read: claims.py."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from claims import claim, close, made_up_results, rejects, rng, seeds, within
from hypothesis import strategies as st

import wtflow
from theory import learned_field, mean_se, singularity, worst_transport
from theory.learned_field import EDGES, OFFSETS, POINTS, RADIUS, THICKNESS, D


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


@claim(learned_field.thick_circle, examples=6, off=st.floats(0, 3), seed=seeds)
def test_S3_data(thick, off, seed):
    """RADIUS in the plane, `off` it across, and THICKNESS about that."""
    thin = learned_field.circle(500, rng(seed), off)
    assert torch.allclose(thin[:, :2].norm(dim=1), torch.tensor(RADIUS), atol=1e-5)
    assert torch.allclose(thin[:, 2:].norm(dim=1), torch.tensor(float(off)), atol=1e-5)
    squared = thick(4000, rng(seed), off).square().sum(1)
    within(mean_se(squared), RADIUS**2 + off**2 + D * THICKNESS**2)


def test_S3_normal_points_by_default():
    """Points lie on the thick circle unless they are moved off; initial_radius is their scale."""
    default, on_circle = (learned_field.thick_circle(5, rng(0), *off) for off in ((), (0.0,)))
    assert torch.equal(default, on_circle)
    points = learned_field.thick_circle(20_000, rng(0))
    assert points[:, 2:].std().item() == pytest.approx(THICKNESS, rel=0.02)
    assert points[:, :2].norm(dim=1).mean().item() == pytest.approx(RADIUS, rel=0.01)
    scale = points.square().sum(1).mean().item() ** 0.5
    assert learned_field.initial_radius() == pytest.approx(scale, rel=0.01)


def test_S3_gaussian_data():
    """N(0, I_D), and its field at one time per point."""
    x = learned_field.gaussian(4000, rng(0))
    assert x.shape == (4000, D)
    within(mean_se(x.square().mean(1)), 1)
    x, t = x[:3].double().numpy(), np.array([0.1, 0.5, 0.9])
    field = learned_field.gaussian_field(x, t)
    for k in range(3):
        close(field[k], singularity.marginal_field(x[[k]], t[k], np.zeros((1, D)), 1.0)[0], 100)


def test_S3_times_of_the_bins():
    """error_by_time draws t inside each bin of EDGES."""
    asked = []

    def field(x, t):
        asked.append(t)
        return x

    learned_field.error_by_time(field, learned_field.gaussian, lambda x, t: x, rng(0), 200)
    for t, (low, high) in zip(asked, pairwise(EDGES), strict=True):
        tenth = 0.1 * (high - low)
        assert low <= t.min() < low + tenth and high - tenth < t.max() <= high + 1e-6


def test_S3_error_of_the_exact_field():
    """None in any bin; and the mean square of what is added to it."""

    def exact_v_theta(x, t):
        return torch.as_tensor(learned_field.gaussian_field(x.numpy(), t.numpy()))

    def v_theta_off_by_2(x, t):
        return exact_v_theta(x, t) + 2

    gaussian, exact = learned_field.gaussian, learned_field.gaussian_field
    errors = learned_field.error_by_time(exact_v_theta, gaussian, exact, rng(0))
    assert errors.shape == (len(EDGES) - 1, 2) and errors.max() < 1e-9
    errors = learned_field.error_by_time(v_theta_off_by_2, gaussian, exact, rng(0))
    assert errors[:, 0] == pytest.approx(4, abs=1e-4) and errors[:, 1].max() < 1e-4


@pytest.mark.parametrize("timed", [True, False])
def test_S3_training(timed):
    """A few steps bring a field near to the exact one, in every bin if it is told t."""
    gaussian, exact = learned_field.gaussian, learned_field.gaussian_field
    v_theta = learned_field.train(gaussian, wtflow.independent, 0, timed, steps=150)
    x = torch.ones(2, D)
    early, late = v_theta(x, torch.zeros(2)), v_theta(x, torch.ones(2))
    assert torch.equal(early, late) != timed
    if timed:
        errors = learned_field.error_by_time(v_theta, gaussian, exact, rng(0))
        assert errors[:, 0].max() < 0.35


# ---- C2, W3, W4: one step ---------------------------------------------------------------------
@claim(learned_field.auroc, examples=20, n=st.integers(1, 30), seed=seeds)
def test_W4_auroc(auroc, n, seed):
    """P(normal < anomalous), ties one half, pair by pair."""
    normal, anomalous = np.random.default_rng(seed).integers(0, 6, (2, n))
    below, tied = normal[:, None] < anomalous, normal[:, None] == anomalous
    close(auroc(normal, anomalous), (below + 0.5 * tied).mean(), n)


test_W4_auroc_rejects = rejects(
    test_W4_auroc,
    auroc={"anomalous for normal": lambda normal, anom: learned_field.auroc(anom, normal)},
)


def exact_u_0(n):
    """v_theta of a network that has learnt u_0 exactly."""

    def v_theta(x, t):
        assert (t == 0).all() and len(t) == len(x)
        return torch.as_tensor(worst_transport.initial_field(x.numpy(), n))

    return v_theta


def test_W4_measures_of_one_step():
    """The exact field has inward part |x| + a_n, lands at a_n, leaves nothing; v = x goes away."""
    x = torch.ones(2, D)
    norm, a_4 = D**0.5, worst_transport.a_n(4)
    assert learned_field.inward_part(exact_u_0(4), x) == pytest.approx(norm + a_4)
    assert learned_field.landing(exact_u_0(4), x) == pytest.approx(a_4, rel=1e-5)
    assert learned_field.residual(exact_u_0(4), x, 4) == pytest.approx(0, abs=1e-5)
    assert learned_field.inward_part(lambda x, t: x, x) == pytest.approx(-norm)
    assert learned_field.landing(lambda x, t: x, x) == pytest.approx(2 * norm)
    assert learned_field.residual(lambda x, t: x, x, 4) == pytest.approx(2 * norm + a_4)


@pytest.fixture
def trained(monkeypatch):
    """Replaces the training by an exact field; the list of what was asked to be trained."""
    asked = []

    def train(sample, couple, seed, timed=True):
        asked.append((sample, couple, seed, timed))
        if sample is learned_field.thick_circle:
            return exact_u_0(couple.keywords["n"])
        exact = {
            learned_field.circle: learned_field.circle_field,
            learned_field.gaussian: learned_field.gaussian_field,
        }[sample]
        return lambda x, t: torch.as_tensor(exact(x.double().numpy(), t.double().numpy()))

    monkeypatch.setattr(learned_field, "train", train)
    return asked


def test_W4_experiment(trained):
    """A field for each n, measured at normal points and at points off the circle."""
    results = learned_field.experiment(3, timed=False, candidates=(1, 16))
    for (sample, couple, seed, timed), n in zip(trained, (1, 16), strict=True):
        assert sample is learned_field.thick_circle and (seed, timed) == (3, False)
        assert couple.func is wtflow.worst_candidate and couple.keywords == {"n": n}
    assert list(results) == [1, 16]
    for n, fit in results.items():
        points = rng(1003)
        normal_points = learned_field.thick_circle(POINTS, points, 0.0)
        pull = worst_transport.a_n(n)
        norms = normal_points.norm(dim=1).numpy()
        assert fit.inward == pytest.approx(norms + pull, rel=1e-5)
        assert list(fit.radius) == list(fit.residual) == [0.0, *OFFSETS]
        for off in (0.0, *OFFSETS):
            assert fit.radius[off] == pytest.approx(np.full(POINTS, pull), abs=1e-5)
            assert fit.residual[off] == pytest.approx(np.zeros(POINTS), abs=1e-5)


def test_W4_experiment_moves_the_points(trained, monkeypatch):
    """The field is asked at points that lie `off` the circle: v = 0 lands where they are."""
    monkeypatch.setattr(learned_field, "train", lambda *asked: lambda x, t: 0 * x)
    fit = learned_field.experiment(candidates=(1,))[1]
    for off in (0.0, *OFFSETS):
        expected = RADIUS**2 + off**2 + D * THICKNESS**2
        within(mean_se(fit.radius[off] ** 2), expected)
        within(mean_se(fit.residual[off] ** 2), expected)


def test_S3_W4_run(trained):
    """Seed 0; the two fields of (a), then those of (b) and (c), told t and not."""
    errors, results = learned_field.run()
    assert list(errors) == ["circle", "N(0, I)"]
    for bins in errors.values():
        assert bins.shape == (len(EDGES) - 1, 2) and bins.max() < 1e-9
    assert {told: list(fields) for told, fields in results.items()} == {
        True: list(learned_field.CANDIDATES),
        False: [1, 64],
    }
    samples, couples, seeds_asked, timed = zip(*trained, strict=True)
    assert set(seeds_asked) == {0}
    assert samples[:2] == (learned_field.circle, learned_field.gaussian)
    assert couples[:2] == (wtflow.independent, wtflow.independent)
    assert timed == (True,) * 7 + (False,) * 2


# ---- The printed table ------------------------------------------------------------------------
def test_S3_C2_W3_W4_table():
    """Every row, predicted, measured and standard error, of results with known means."""
    a_4 = worst_transport.a_n(4)
    radius = (16 + 16 * 0.2**2) ** 0.5
    half = (0.5, 0.5, (0.25 / POINTS) ** 0.5)
    separated = (0.5, 1.0, 0.0)
    landing = (2.5, (5 / 3 / 4) ** 0.5)
    rows = list(learned_field.table(*made_up_results()))
    assert [row.claim for row in rows] == ["S3", "S3", "C2", *["W4"] * 3, "W3", *["W4"] * 5]
    expected = [
        (0, 0, 1),
        (0, 10, 11),
        (radius, 4, 1),
        (0, *landing),
        separated,
        half,
        (radius + a_4, 4, 1),
        (a_4, *landing),
        separated,
        half,
        separated,
        half,
    ]
    assert np.array([row[2:] for row in rows]) == pytest.approx(np.array(expected))
    assert [row.what.endswith(", not told t") for row in rows] == [False] * 10 + [True] * 2
