"""S3, W5, B3, W6 in a learnt field: theory/learned_field.py. How to read: claims.py."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from claims import P, claim, close, made_up_results, made_up_step, rejects, rng, seeds, within
from hypothesis import strategies as st
from scipy.stats import chi, kstest

import wtflow
from theory import blind_field, learned_field, mean_se, normal, singularity, strength
from theory.learned_field import DATA, EDGES, MODES, POINTS, RADIUS, REPEATS, THICKNESS, D
from theory.worst_transport import gaussian_coupling


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
    for sample in (learned_field.circle, learned_field.thick_circle):
        default, on_circle = (sample(5, rng(0), *off) for off in ((), (0.0,)))
        assert torch.equal(default, on_circle)
    points = learned_field.thick_circle(20_000, rng(0))
    assert points[:, 2:].std().item() == pytest.approx(THICKNESS, rel=0.02)
    assert points[:, :2].norm(dim=1).mean().item() == pytest.approx(RADIUS, rel=0.01)
    scale = points.square().sum(1).mean().item() ** 0.5
    assert learned_field.initial_radius() == pytest.approx(scale, rel=0.01)


def test_S3_gaussian_data():
    """N(0, I_D), or wider, and its field at one time per point."""
    x = learned_field.gaussian(4000, rng(0))
    assert x.shape == (4000, D)
    within(mean_se(x.square().mean(1)), 1)
    assert torch.equal(learned_field.gaussian(4000, rng(0), 2.0), 2 * x)
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
    """A few steps bring fields side by side near to their own exact ones, at both ends of t.

    The second is shown the antipode: x_t = (1 - 2t) x_0 and u = -2 x_0, so -2x at t = 0, 2x at 1.
    Not told t both are 0: the first by B2, the second as it has as many go in as out.
    """

    def antipode(x_0, generator):
        return -x_0

    gaussian, exact = learned_field.gaussian, learned_field.gaussian_field
    couplings = [wtflow.independent, antipode]
    v_theta = learned_field.train(gaussian, couplings, 0, timed, steps=150)
    assert not any(weight.requires_grad for weight in v_theta.parameters())
    x = gaussian(400, rng(0))
    early, late = (v_theta(x.repeat(2, 1), torch.full((800,), t)).chunk(2) for t in (0.0, 1.0))
    for k, slope in enumerate((1, 2) if timed else (0, 0)):
        assert (early[k] + slope * x).square().mean() < 0.2 * (1 + slope**2)
        assert (late[k] - slope * x).square().mean() < 0.2 * (1 + slope**2)
    if timed:

        def first(x, t):
            return v_theta(x.repeat(2, 1), t.repeat(2)).chunk(2)[0]

        errors = learned_field.error_by_time(first, gaussian, exact, rng(0))
        assert errors[:, 0].max() < 0.35
    else:
        assert torch.equal(early[0], late[0]) and torch.equal(early[1], late[1])


def test_S3_range_of_t():
    """Trained on t < T, as asked: at T = 0.05 a field not told t is near u_0 (B4)."""
    gaussian = learned_field.gaussian
    v_theta = learned_field.train(gaussian, [wtflow.independent], 0, False, 0.05, steps=150)
    x = gaussian(400, rng(0))
    assert (v_theta(x, torch.zeros(400)) + x).square().mean() < 0.15


def test_S3_number_of_steps(monkeypatch):
    """STEPS by default, each of BATCH points for every coupling."""
    asked = []

    def sample(n, generator):
        asked.append(n)
        return torch.zeros(n, D)

    monkeypatch.setattr(learned_field, "STEPS", 3)
    learned_field.train(sample, [wtflow.independent] * 2, 0, steps=3)
    assert asked == [2 * learned_field.BATCH] * 3


def log_thick_circle(x):
    """log q of the thick circle up to a constant, as 4000 atoms of width THICKNESS."""
    turn = 2 * np.pi * torch.arange(4000, dtype=x.dtype) / 4000
    atoms = torch.zeros(4000, D, dtype=x.dtype)
    atoms[:, 0], atoms[:, 1] = RADIUS * turn.cos(), RADIUS * turn.sin()
    return torch.logsumexp(-(x[:, None] - atoms).square().sum(-1) / (2 * THICKNESS**2), 1)


def log_two_scales(x):
    scales = torch.tensor([blind_field.BACKGROUND, blind_field.OBJECT], dtype=x.dtype)
    squares = x.square().sum(1, keepdim=True) / scales**2
    return torch.logsumexp(-squares / 2 - x.shape[1] * scales.log(), 1)


@claim(learned_field.thick_circle_score, learned_field.two_scales_score, examples=4, seed=seeds)
def test_W6_scores_of_the_data(of_circle, of_scales, seed):
    """grad log q, by autograd."""
    for score, log_q in ((of_circle, log_thick_circle), (of_scales, log_two_scales)):
        x = normal(rng(seed), 4, D).requires_grad_()
        (gradient,) = torch.autograd.grad(log_q(x).sum(), x)
        assert np.allclose(score(x.detach().numpy()), gradient, rtol=1e-6, atol=1e-6)


test_W6_scores_of_the_data_rejects = rejects(
    test_W6_scores_of_the_data,
    of_circle={"sign": lambda x: -learned_field.thick_circle_score(x)},
    of_scales={"one scale": lambda x: -x},
)


# ---- W5, B3, W6: one step ---------------------------------------------------------------------
@claim(learned_field.two_scales, examples=4, seed=seeds)
def test_B3_points(mixture, seed):
    """Half of BACKGROUND, half of OBJECT, m2 = d; louder points, points between, and on shells."""
    radius = mixture(4000, rng(seed)).norm(dim=1).numpy()
    pair = (blind_field.BACKGROUND, blind_field.OBJECT)
    assert (
        kstest(radius, lambda r: (chi(D).cdf(r / pair[0]) + chi(D).cdf(r / pair[1])) / 2).pvalue > P
    )
    within(mean_se(radius**2), D)
    for kind, scale in (("louder", 2.0), ("between", 0.85)):
        points = DATA["two scales"][kind](4000, rng(seed)).norm(dim=1).numpy()
        assert kstest(points / scale, chi(D).cdf).pvalue > P
    for kind, scale in zip(("background", "object"), pair, strict=True):
        points = DATA["two scales"][kind](50, rng(seed))
        assert torch.allclose(points.norm(dim=1), torch.tensor(scale * D**0.5))
        assert points.std(0).min() > 0.1 * scale
    off = DATA["circle"]["off"](4000, rng(seed)).square().sum(1)
    within(mean_se(off), RADIUS**2 + 0.8**2 + D * THICKNESS**2)


test_B3_points_rejects = rejects(
    test_B3_points, mixture={"one scale": lambda n, generator: learned_field.gaussian(n, generator)}
)


@claim(learned_field.auroc, examples=20, n=st.integers(1, 30), seed=seeds)
def test_W6_auroc(auroc, n, seed):
    """P(normal < anomalous), ties one half, pair by pair."""
    normal, anomalous = np.random.default_rng(seed).integers(0, 6, (2, n))
    below, tied = normal[:, None] < anomalous, normal[:, None] == anomalous
    close(auroc(normal, anomalous), (below + 0.5 * tied).mean(), n)


test_W6_auroc_rejects = rejects(
    test_W6_auroc,
    auroc={"anomalous for normal": lambda normal, anom: learned_field.auroc(anom, normal)},
)


def test_W6_measures_of_one_step():
    """By hand, for two networks: 1.5 and 0.5 inwards; the distances from origin and landing."""
    fit = made_up_step()
    assert fit.inward().mean(1).tolist() == [1.5, 0.5]
    assert fit.distance("normal", False).tolist() == [[1, 2, 3, 4], [2, 3, 4, 5]]
    assert fit.distance("off", False).tolist() == [[11, 12, 13, 14], [12, 13, 14, 15]]
    assert fit.distance("off", True).tolist() == [[1, 2, 3, 4], [2, 3, 4, 5]]
    assert fit.auroc("off", False) == (1, 0) and fit.auroc("off", True) == (0.5, 0)


def test_W6_auroc_of_the_exact_field():
    """One half told t; near t = 0 that of W6's first order; not told t that of Gauss's law."""
    points = DATA["two scales"]
    x = {kind: points[kind](300, rng(0)).double().numpy() for kind in ("normal", "between")}
    exact = {kind: -0.9 * 4 * y / np.linalg.norm(y, axis=1)[:, None] for kind, y in x.items()}
    fit = learned_field.OneStep(x, {}, exact)

    def area(mode, rho, from_landing, data="two scales"):
        return learned_field.exact_auroc(data, mode, rho, fit, "between", from_landing)

    assert area("told t", 0.9, True) == area("told t", 0.9, False) == 0.5
    errors = {}
    for kind, y in x.items():
        errors[kind] = strength.mismatch(y, learned_field.two_scales_score(y), 0.9, 0.05)
    by_hand = [np.linalg.norm(errors[kind], axis=1) for kind in x]
    assert area("t < 0.05", 0.9, True) == learned_field.auroc(*by_hand)
    by_hand = [np.linalg.norm(errors[kind] + exact[kind], axis=1) for kind in x]
    assert area("t < 0.05", 0.9, False) == learned_field.auroc(*by_hand)
    errors = [
        strength.mismatch(y, learned_field.thick_circle_score(y), 0.9, 0.05) for y in x.values()
    ]
    by_hand = [np.linalg.norm(error, axis=1) for error in errors]
    assert area("t < 0.05", 0.9, True, "circle") == learned_field.auroc(*by_hand)
    radii = [np.linalg.norm(y, axis=1) for y in x.values()]
    pair = (blind_field.BACKGROUND, blind_field.OBJECT)
    by_hand = [np.abs(r + blind_field.radial_field(r, D, pair)) for r in radii]
    assert area("not told t", 0.0, True) == pytest.approx(learned_field.auroc(*by_hand), abs=0.01)
    assert np.isnan([area("not told t", 0.9, True), area("not told t", 0.0, True, "circle")]).all()


@pytest.fixture
def trained(monkeypatch):
    """Replaces the training by exact fields; the list of what was asked to be trained."""
    asked = []

    def train(sample, couplings, seed, timed=True, t_max=1.0):
        asked.append((sample, couplings, seed, timed, t_max))
        exact = {
            learned_field.circle: learned_field.circle_field,
            learned_field.gaussian: learned_field.gaussian_field,
        }
        if sample in exact:
            return lambda x, t: torch.as_tensor(
                exact[sample](x.double().numpy(), t.double().numpy())
            )

        def u_0(x, t):
            assert (t == 0).all() and len(t) == len(x)
            parts = zip(couplings, x.chunk(len(couplings)), strict=True)
            return torch.cat([mean_noise(one, part) - part for one, part in parts])

        return u_0

    monkeypatch.setattr(learned_field, "train", train)
    return asked


def mean_noise(couple, x):
    """E[x_1 | x_0 = x] of wtflow.worst or the Gaussian coupling, both of which it names."""
    if couple.func is wtflow.worst:
        return wtflow.landing(x, couple.keywords["rho"])
    assert couple.func is gaussian_coupling and couple.keywords["s"] == 1.0
    return -couple.keywords["rho"] * x


@pytest.mark.parametrize("straight", [False, True])
def test_W6_experiment(trained, straight):
    """REPEATS fields of each strength, all kinds of points; exact ones land where `exact` is."""
    results = learned_field.experiment("circle", "t < 0.05", (0.0, 0.9), straight, 3)
    ((sample, couplings, *rest),) = trained
    assert sample is learned_field.thick_circle and rest == [3, *MODES["t < 0.05"]]
    assert len(couplings) == 2 * REPEATS and list(results) == [0.0, 0.9]
    points = rng(1003)
    for kind in ("normal", "off"):
        x = DATA["circle"][kind](POINTS, points)
        for rho, fit in results.items():
            assert np.array_equal(fit.x[kind], x.numpy())
            assert fit.x1_hat[kind].shape == (REPEATS, POINTS, D)
            assert fit.distance(kind, True).max() < 1e-5
            radius = rho * x.norm(dim=1).numpy() if straight else np.full(POINTS, rho * D**0.5)
            assert fit.distance(kind, False) == pytest.approx(
                np.stack([radius] * REPEATS), abs=1e-5
            )
            if kind == "normal":
                inward = x.norm(dim=1).numpy() + radius
                assert fit.inward()[0] == pytest.approx(inward, rel=1e-5)


def test_S3_W6_run(trained):
    """Seed 0; the two fields of (a), then those of (b): both data in all modes, and linear u_0."""
    errors, results = learned_field.run()
    assert list(errors) == ["circle", "N(0, I)"]
    for bins in errors.values():
        assert bins.shape == (len(EDGES) - 1, 2) and bins.max() < 1e-9
    strengths = {key: list(fields) for key, fields in results.items()}
    assert strengths.pop(("circle", "told t, straight")) == [0.9]
    assert strengths.pop(("two scales", "t < 0.05, straight")) == [0.9]
    expected = {"circle": [-0.9, 0.0, 0.5, 0.9, 0.97], "two scales": [0.0, 0.9]}
    assert strengths == {(data, mode): expected[data] for mode in MODES for data in expected}
    samples, couplings, seeds_asked, *_ = zip(*trained, strict=True)
    assert set(seeds_asked) == {0}
    assert samples[:2] == (learned_field.circle, learned_field.gaussian)
    assert couplings[:2] == ([wtflow.independent], [wtflow.independent])
    straight = [all(c.func is gaussian_coupling for c in asked) for asked in couplings[2:]]
    assert straight == [False] * 6 + [True] * 2


# ---- The printed table ------------------------------------------------------------------------
def test_S3_W5_B3_W6_table():
    """Every row, predicted, measured and standard error, of results with known means."""
    rows = list(learned_field.table(*made_up_results()))
    radius = (16 + 16 * 0.2**2) ** 0.5
    assert [row[2:] for row in rows[:2]] == [(0, 0, 1), (0, 10, 11)]
    inward = [row[2:] for row in rows if row.claim == "W5"]
    assert np.array(inward) == pytest.approx(np.array([(radius, 1, 0.5), (radius + 3.6, 1, 0.5)]))
    scores = [row for row in rows if row.claim == "W6"]
    assert len(scores) == 2 * 2 * (4 + 2 * 4)  # by strength, place, and 1 or 2 kinds in 4 modes
    for row in scores:
        assert row[3:] == (0.5 if "from landing" in row.what else 1, 0)
    unknown = [row.what for row in scores if np.isnan(row.predicted)]
    assert len(unknown) == 2 * 2 * (1 + 1 + 2) + 2 * 2  # in two modes; not told t, also at 0.9
    told = [row.predicted for row in scores if ", told t, rho" in row.what]
    assert told == [1 if "origin" in row.what else 0.5 for row in scores[: len(told)]]
    energy = [row for row in rows if row.claim == "B3"]
    assert [row.what.endswith(", told t") for row in energy] == [True, False, True, False]
    assert [row.measured for row in energy] == [13] * 4  # 12.5 and 13.5
    quiet, loud = np.array([blind_field.BACKGROUND, blind_field.OBJECT]) * D**0.5
    exact = [
        r + blind_field.radial_field(r, D, (blind_field.BACKGROUND, blind_field.OBJECT))[0]
        for r in (quiet, loud)
    ]
    assert [row.predicted for row in energy] == pytest.approx([0, exact[0], 0, exact[1]])
    assert len(rows) == 2 + 2 + 4 + len(scores)
