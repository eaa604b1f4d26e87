"""wtflow.py: recipe, loss, couplings, whitening, scorer, fields, detector, training, backbones."""

import copy
import dataclasses
import itertools
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from scipy.stats import ks_2samp, kstest
from torch import nn

import wtflow
from tests import benchmark
from wtflow import PAPER, Detector, InputError, PointField, Recipe, UNetField


def gaussian(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(**changes):
    """A recipe of 64 px, 8 x 8 cells and a narrow field."""
    return Recipe(**{"image_size": 64, "base": 8, "steps": 4, "batch": 32, **changes})


# ---- recipe ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "setting, remedy",
    [
        (dict(backbone="vgg"), "efficientnet_lite0"),
        (dict(norm="none"), "zca"),
        (dict(coupling="best"), "worst"),
        (dict(image_size=65), "multiple of 16"),
        (dict(image_size=32), "at least 64 and at most 2048"),
        (dict(aspect=9.0), "at most 8"),
        (dict(strides=(32,)), "4, 8, 16"),
        (dict(strides=()), "4, 8, 16"),
        (dict(steps=0), "at least 1"),
        (dict(base=0), "at least 1"),
        (dict(strength=1.5), "at least -1 and at most 1"),
        (dict(strength=0.5, coupling="candidates"), "at least 1"),
        (dict(t_max=0.0), "at most 1"),
        (dict(t_max=0.0), "at least 1e-06"),
        (dict(smooth=-1.0), "at least 0"),
        (dict(lr=float("nan")), "at least 0"),
    ],
)
def test_a_recipe_refuses_what_is_not_valid(setting, remedy):
    name, value = next(iter(setting.items()))
    with pytest.raises(InputError, match=f"^{name}=.*{remedy}"):
        Recipe(**setting)
    assert str(value) in str(pytest.raises(InputError, Recipe, **setting).value)


def test_the_first_screen_counts_the_departures_from_the_release():
    default, paper = dataclasses.asdict(Recipe()), dataclasses.asdict(PAPER)
    departures = [name for name in default if default[name] != paper[name]]
    assert f"in {len(departures)} of {len(default)} settings" in wtflow.__doc__
    for name in departures:
        assert name in wtflow.__doc__, name


def test_a_recipe_takes_steps_aspect_and_pixels_from_the_images():
    assert wtflow.recipe_for(PAPER, [(200, 300)] * 209).steps == 100 * 27
    assert wtflow.image_shape(wtflow.recipe_for(PAPER, [(200, 300)])) == (256, 256)
    recipe = Recipe(image_size=320)
    tall = wtflow.recipe_for(recipe, [(900, 300), (900, 300), (300, 300)])  # the median image
    assert tall.steps == recipe.steps and tall.aspect == 3 and tall.image_size == 320
    h, w = wtflow.image_shape(tall)
    assert (h, w) == (560, 192) and abs(h * w / 320**2 - 1) < 0.06
    small = wtflow.recipe_for(recipe, [(100, 100)])  # enlarged, but not much
    assert wtflow.image_shape(small) == (192, 192)
    strip = wtflow.recipe_for(recipe, [(1, 20000)])
    assert strip.aspect == 1 / 8 and min(wtflow.image_shape(strip)) >= 16


# ---- loss and transport ------------------------------------------------------------------------
def test_loss_is_the_velocity_error():
    x_0, generator = gaussian((6, 4, 2, 2)), torch.Generator()
    x_1 = wtflow.independent(x_0, generator.manual_seed(5))
    t = torch.rand(6)
    seen = {}

    def still(x, t):
        seen.update(x=x, t=t)
        return torch.zeros_like(x)

    def exact(x, t):
        return x_1 - x_0

    def loss(v_theta):
        couple = wtflow.independent
        return wtflow.flow_matching_loss(v_theta, x_0, couple, generator.manual_seed(5), t)

    assert torch.allclose(loss(still), (x_1 - x_0).square().mean((1, 2, 3)))
    s = t.view(-1, 1, 1, 1)
    assert torch.allclose(seen["x"], (1 - s) * x_0 + s * x_1)
    assert torch.equal(seen["t"], t)
    assert loss(exact).abs().max() == 0


def test_one_step_and_two_by_hand():
    x_0 = torch.tensor([[3.0, 4.0]])

    def v_theta(x, t):
        return -x * (1 + t[:, None])

    assert torch.equal(wtflow.euler(v_theta, x_0), torch.zeros(1, 2))
    assert torch.allclose(wtflow.euler(v_theta, x_0, 2), x_0 * 0.5 * (1 - 0.75))
    assert wtflow.log_density(x_0).item() == pytest.approx(-25 / 4)


# ---- couplings ---------------------------------------------------------------------------------
COUPLINGS = [wtflow.independent, wtflow.optimal, wtflow.worst, wtflow.worst_candidate]


@pytest.mark.parametrize("couple", COUPLINGS)
@pytest.mark.parametrize("shape", [(50, 7), (3, 7, 4, 5)])
def test_couplings_keep_shape_and_follow_their_generator(couple, shape):
    x_0 = gaussian(shape)
    one, again, other = (couple(x_0, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert one.shape == x_0.shape
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_optimal_beats_every_permutation_and_worst_plan_loses_to_every_one():
    x_0, generator = gaussian((5, 3)), torch.Generator()
    for sign in (1, -1):
        x_1 = wtflow.optimal(x_0, generator.manual_seed(3), sign)
        orders = itertools.permutations(range(5))
        costs = [sign * (x_0 - x_1[list(p)]).square().sum() for p in orders]
        assert costs[0] <= min(costs) + 1e-5


@pytest.mark.parametrize("n", [1, 4, 64])
def test_worst_candidate_has_the_law_of_the_worst_of_n(n):
    """Beside literal candidates: Kolmogorov-Smirnov, false alarm 1e-6; across it stays N(0, 1)."""
    N, d = 20000, 3
    x_0 = gaussian((N, d), 1)
    e = F.normalize(x_0, dim=1)
    z = torch.randn(N, n, d, generator=torch.Generator().manual_seed(2))
    literal = z[torch.arange(N), (z @ x_0[..., None])[..., 0].argmin(1)]
    drawn = wtflow.worst_candidate(x_0, torch.Generator().manual_seed(3), n)
    assert ks_2samp((literal * e).sum(1), (drawn * e).sum(1)).pvalue > 1e-6
    axis = torch.tensor([[1.0, 0, 0]]).expand(N, 3)
    across = F.normalize(torch.linalg.cross(e, axis), dim=1)
    assert kstest((drawn * across).sum(1).numpy(), "norm").pvalue > 1e-6


def test_worst_candidate_of_a_zero_vector_is_noise():
    assert torch.isfinite(wtflow.worst_candidate(torch.zeros(4, 3), n=64)).all()


@pytest.mark.parametrize("n", [1, 64])
def test_worst_candidate_is_finite_for_any_random_number(monkeypatch, n):
    monkeypatch.setattr(torch, "rand", lambda shape, **options: torch.zeros(shape).double())
    assert torch.isfinite(wtflow.worst_candidate(torch.ones(4, 3), n=n)).all()


@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.9])
def test_worst_is_noise_about_the_landing_point_on_the_shell(rho):
    """Means within 5 standard errors; the noise is N(0, 1 - rho^2): Kolmogorov-Smirnov, 1e-6."""
    d, x_0 = 6, gaussian((4000, 6, 2, 1), 1)
    x_1 = wtflow.worst(x_0, torch.Generator().manual_seed(3), rho)
    rest = x_1 - wtflow.landing(x_0, rho)
    assert kstest(rest.flatten().numpy() / (1 - rho**2) ** 0.5, "norm").pvalue > 1e-6
    energy = x_1.square().sum(1)
    assert abs(energy.mean().item() - d) < 5 * energy.std().item() / energy.numel() ** 0.5
    along = (x_1 * F.normalize(x_0, dim=1)).sum(1)
    assert abs(along.mean().item() + rho * d**0.5) < 5 * (1 - rho**2) ** 0.5 / 8000**0.5


# ---- whitening and calibration -----------------------------------------------------------------
def test_whitening_gives_unit_covariance():
    torch.manual_seed(0)
    x = torch.einsum("ij,njhw->nihw", torch.randn(6, 6), torch.randn(400, 6, 2, 2)) + 3
    z = wtflow.whiten(x, *wtflow.fit_zca(x, 0.0)).movedim(1, -1).reshape(-1, 6)
    assert torch.allclose(z.T @ z / len(z), torch.eye(6), atol=1e-3)
    assert z.mean(0).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["constant", "one", "copies", "zero"])
def test_whitening_survives_degenerate_sets(kind):
    x = {
        "constant": torch.ones(3, 6, 2, 2),
        "one": gaussian((1, 6, 1, 1)),
        "copies": gaussian((2, 6, 1, 1)).repeat(3, 1, 1, 1),
        "zero": torch.zeros(1, 6, 1, 1),
    }[kind]
    mean, W = wtflow.fit_zca(x, 0.01)
    assert torch.isfinite(W).all() and torch.isfinite(wtflow.whiten(x, mean, W)).all()


# ---- calibration -------------------------------------------------------------------------------
class Still(nn.Module):
    """v = 0, so that x1_hat = x_0."""

    def forward(self, x, t):
        return torch.zeros_like(x)


def gaussian_law(x, prior):
    """Mean and covariance of each place by numpy, straight from the definitions; L blocks."""
    blocks = wtflow.to_blocks(x).double().numpy()
    mean = blocks.mean(1)
    deviations = (blocks - mean[:, None]).reshape(len(blocks), -1, x.shape[1])
    S = np.einsum("lni,lnj->lij", deviations, deviations) / (4 * (len(x) - 1))
    return blocks, mean, S


def test_blocks_hold_every_cell_once_and_come_back():
    x = torch.arange(2 * 3 * 5 * 4.0).view(2, 3, 5, 4)  # 5 rows: the last block juts out
    blocks = wtflow.to_blocks(x)
    assert blocks.shape == (3 * 2, 2, 4, 3)
    assert torch.equal(blocks[1, 0, :, 0], x[0, 0, :2, 2:].flatten())
    assert torch.equal(wtflow.from_blocks(blocks[..., 1], 5, 4), x[:, 1])


def test_the_law_of_each_place_is_its_own_mean_and_covariance(monkeypatch):
    x = 2 * gaussian((40, 3, 4, 4)) + gaussian((1, 3, 4, 4), 1)
    monkeypatch.setattr(wtflow, "PART", 7)
    mean, S = wtflow.fit_blocks(x)
    _, by_hand, covariance = gaussian_law(x, 0)
    assert np.allclose(mean, by_hand, atol=1e-5) and np.allclose(S, covariance, atol=1e-4)


def test_covariances_are_drawn_to_their_mean_as_by_prior_d_images():
    S = torch.stack([torch.eye(2), 3 * torch.eye(2)])
    P, scales = wtflow.pooled_covariance(S, one_scale=False)
    drawn = wtflow.towards_pooled(S, 6, 1.0, P, scales)  # r = 2 / 8
    assert torch.allclose(drawn, 0.75 * S + 0.25 * 2 * torch.eye(2), atol=1e-4)
    assert torch.allclose(wtflow.towards_pooled(S, 6, 1e9, P, scales)[0], P, atol=1e-4)


def test_places_have_one_scale_and_a_shape_of_their_own():
    """tr(P^-1 T_l) / d is near 1 in each place, loud or quiet, where its shape is not P's.

    As near as the share of the frame lets it be: of a variance of 1.9 of log c, 0.01.
    """
    S = torch.stack([k * torch.diag(torch.tensor([1.0, 4.0 - k, 2.0])) for k in (0.2, 1.0, 3.0)])
    P, scales = wtflow.pooled_covariance(S, one_scale=True)
    drawn = wtflow.towards_pooled(S, 6, 1.0, P, scales)
    traces = (drawn @ torch.linalg.inv(P)).diagonal(dim1=1, dim2=2).mean(1)
    assert torch.allclose(traces, torch.ones(3), rtol=0.01)
    assert (drawn[0, 1, 1] / drawn[0, 0, 0]) > 1.5 * (drawn[2, 1, 1] / drawn[2, 0, 0])


def test_scales_are_taken_out_as_far_as_they_are_not_those_of_the_frame():
    """c_l^s, s = 1 - 0.1^2 / var: of a variance of 0.005 nothing, of 0.04 three quarters."""
    kept = {0.05: 0.0, 0.02**0.5: 0.75}  # log c = +-spread; of two places, over 2 - 1
    for spread, share in kept.items():
        P, scales = wtflow.pooled_covariance(
            torch.tensor([spread, -spread]).exp().view(2, 1, 1), True
        )
        ratio = (scales[0] / scales[1]).log().item()
        assert ratio == pytest.approx(share * 2 * spread, abs=1e-4)


def test_a_place_that_never_changes_is_judged_as_the_whole_map():
    """Its covariance is r P, r = 1/2: distances there are at most the root of 2 too large."""
    S = torch.stack([torch.zeros(2, 2), 2 * torch.eye(2)])
    P, scales = wtflow.pooled_covariance(S, one_scale=True)
    assert torch.allclose(wtflow.towards_pooled(S, 2, 1.0, P, scales)[0], P / 2, atol=1e-4)


def test_distance_is_that_of_mahalanobis():
    x = gaussian((9, 3, 4, 6))
    mean, S = wtflow.fit_blocks(x)
    drawn = wtflow.towards_pooled(S, 9, 1.0, *wtflow.pooled_covariance(S, True))
    y = wtflow.squared_distance(x, mean, wtflow.inverse_factor(drawn))
    e = wtflow.to_blocks(x)[4, 2, 3] - mean[4, 3]  # block row 1, column 1; its last cell
    by_hand = e @ torch.linalg.inv(drawn[4]) @ e / 3
    assert y[2, 3, 3].item() == pytest.approx(by_hand.item(), rel=1e-4)


@pytest.mark.parametrize("one_scale", [True, False])
@pytest.mark.parametrize("folds", [7, 2])
def test_left_out_distances_are_those_of_a_law_fitted_without_the_image(folds, one_scale):
    """Beside fitting n times; the pooled covariance and the scales without the image's fold."""
    n, d, prior = 7, 3, 0.8
    x = gaussian((n, d, 4, 4)) * torch.tensor([1.0, 1, 3, 3]) + 1  # half of it is loud
    mean, S = wtflow.fit_blocks(x)
    y = wtflow.left_out_squared_distance(x, mean, S, prior, folds, one_scale)
    r = prior * d / (prior * d + n - 1)
    for k in range(n):
        mean_k, S_k = wtflow.fit_blocks(torch.cat([x[:k], x[k + 1 :]]))
        S_f = wtflow.fit_blocks(x[[i for i in range(n) if i % folds != k % folds]])[1]
        P = S_f.mean(0)
        c = torch.einsum("lij,ji->l", S_f, torch.linalg.inv(P)) / d if one_scale else torch.ones(4)
        c = c ** (1 - 0.1**2 / c.log().var()) if one_scale else c
        W_k = wtflow.inverse_factor((1 - r) * S_k / c[:, None, None] + r * P)
        refitted = wtflow.squared_distance(x[k : k + 1], mean_k, W_k)[0]
        assert torch.allclose(y[k], refitted, rtol=1e-3)


def test_calibration_measures_in_units_of_where_normal_features_land():
    """With v = 0, landing at the origin: the mean of -2 log p of good features is near 1."""
    x_0 = 3 * gaussian((3000, 4, 4, 4)) + 5
    plain, calibrated = (Detector(tiny(calibrate=c, from_landing=False)) for c in (False, True))
    means = []
    for detector in (plain, calibrated):
        detector.fields = nn.ModuleList([Still()])
        detector.calibrate(x_0.clone())
        means.append(-2 * detector.log_p(x_0).mean().item())
    assert means[0] == pytest.approx(34, rel=0.05)  # |x_0|^2 / d = 9 + 25; standard error 0.05
    assert means[1] == pytest.approx(1, rel=0.02)  # standard error 0.003
    assert "normal_mean" not in plain.state_dict()


def test_scores_of_good_images_are_those_that_new_ones_have():
    """40 images for d = 152: fitted to them, they score less than new ones; left out, as they do.

    The mean score of 40 left out beside that of 200 new images, within 4 standard errors and what
    half of the images cost the pooled covariance: the inverse of one of N = 64 n rows is too large
    by 1 / (1 - d / N), a distance by the root of that.
    """
    detector = Detector(tiny())
    detector.fields = nn.ModuleList([Still()])
    x_0 = gaussian((240, 152, 8, 8))
    known, new = x_0[:40], x_0[40:]
    detector.calibrate(known.clone())
    scores = detector.score(new)[1]
    left_out = detector.normal_scores
    error = (scores.var() / 200 + left_out.var() / 40).sqrt().item()
    assert len(left_out) == 40
    dearer = ((1 - 152 / (64 * 40)) / (1 - 152 / (64 * 20))) ** 0.5
    mean = scores.mean().item()
    assert mean - 4 * error < left_out.mean().item() < dearer * mean + 4 * error
    assert mean - detector.score(known)[1].mean().item() > 8 * error


class Scaled(nn.Module):
    """v = (c - 1) x, so that x1_hat = c x_0."""

    def __init__(self, c):
        super().__init__()
        self.c = c

    def forward(self, x, t):
        return (self.c - 1) * x


def test_each_image_is_judged_by_the_field_of_its_fold():
    """With folds that scale by 1 and by 2 * 1.5: what is kept of image k is that of fold k % 2."""
    detector = Detector(tiny(from_landing=False, calibrate=False))
    x_0 = gaussian((7, 152, 4, 4))
    detector.fields = nn.ModuleList([Scaled(1.0), Scaled(1.5)])
    detector.fold_whitening = torch.stack([torch.eye(152), 2 * torch.eye(152)])
    detector.fold_mean = torch.zeros(2, 152)
    left = x_0.clone()
    detector.calibrate(left)
    scale = torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0, 3.0, 1.0]).view(7, 1, 1, 1)
    assert torch.allclose(left, scale * x_0)
    by_both = detector.score(x_0)[1]  # the mean of |x_0|^2 and |3 x_0|^2 is 5 |x_0|^2
    assert torch.allclose(detector.normal_scores * 5**0.5 / scale.flatten(), by_both, rtol=1e-5)


def test_no_field_of_a_fold_has_seen_its_images(monkeypatch):
    counts = {n: wtflow.count_folds(Recipe(folds=2), n) for n in (1, 2, 3, 9, 99, 100)}
    assert counts == {1: 0, 2: 2, 3: 2, 9: 2, 99: 2, 100: 0}
    assert wtflow.count_folds(Recipe(folds=0), 9) == 0
    assert wtflow.count_folds(Recipe(folds=3, folds_below=101), 100) == 3
    detector, used = Detector(tiny(folds=2, norm="layer")), []

    def loss(field, batch, *args, **options):
        used.append(set(batch[:, 0].tolist()))
        return field(batch, None).square().mean(1)

    x_0 = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 152, 2, 2)  # channels name the image
    monkeypatch.setattr(wtflow, "flow_matching_loss", loss)
    wtflow.train_fields(detector, x_0, 0)
    seen = [set.union(*used[k : k + 4]) for k in range(0, 8, 4)]
    assert [{*range(6)} - images for images in seen] == [{0, 2, 4}, {1, 3, 5}]


@pytest.mark.parametrize("kind", ["point", "unet"])
def test_a_batch_is_drawn_from_the_others_of_a_fold_whitened_by_themselves(kind):
    """All 7 x 16 locations that are not of fold 1, and nothing else."""
    x_0 = gaussian((9, 3, 4, 4)) * torch.tensor([1.0, 2, 3]).view(1, 3, 1, 1) + 5
    recipe = Recipe(field=kind, base=8, shrinkage=0.1, batch=4096 if kind == "point" else 256)
    device, W_0 = torch.device("cpu"), torch.diag(torch.tensor([0.5, 1.0, 4.0]))
    detector = SimpleNamespace(recipe=recipe, device=device, feature_whitening=W_0)
    training = wtflow.Training(detector, x_0, 1, 6, 0)
    numbers = torch.tensor([0, 2, 3, 4, 5, 6, 8])
    expected = wtflow.fit_zca(x_0, 0.1, numbers, W_0)
    assert all(map(torch.equal, training.whitening, expected))
    rows = wtflow.whiten(x_0[numbers], *training.whitening).movedim(1, -1).reshape(-1, 3)
    distance, drawn = torch.cdist(training.draw().movedim(1, -1).reshape(-1, 3), rows).min(1)
    assert distance.max() < 1e-2 and set(drawn.tolist()) == set(range(len(rows)))


def test_a_fold_is_whitened_as_if_the_images_left_out_did_not_exist():
    """Whitened features, whitened again without an image, are the features whitened without it.

    But for a rotation, as lengths show; with the same shrinkage, though it has been applied twice.
    """
    features = gaussian((5, 3, 4, 4)) * torch.tensor([0.01, 1, 3]).view(1, 3, 1, 1) + 5
    features[4] *= 20
    others = torch.arange(4)
    first = wtflow.fit_zca(features, 0.05)
    x_0 = wtflow.whiten(features, *first)
    twice = wtflow.whiten(x_0, *wtflow.fit_zca(x_0, 0.05, others, first[1]))
    once = wtflow.whiten(features, *wtflow.fit_zca(features, 0.05, others))
    assert torch.allclose(twice.norm(dim=1), once.norm(dim=1), rtol=1e-3)
    alone = wtflow.whiten(x_0[others], *wtflow.fit_zca(x_0, 0.0, others, first[1]))
    rows = alone.movedim(1, -1).reshape(-1, 3)
    assert torch.allclose(rows.T @ rows / len(rows), torch.eye(3), atol=1e-4)


def test_few_images_have_scores_no_lower_than_new_ones_have():
    """12 images of fewer locations than twice d: whitening and law know them by heart.

    By these they score less than three quarters of what 60 new ones do; left out of all that is
    fitted, no less than these: too much rather than too little, as half of the images teach less.
    """
    features = gaussian((72, 152, 5, 5))
    detector = Detector(tiny(steps=40))
    detector.fit_whitening(features[:12])
    x_0 = detector.normalise(features[:12])
    wtflow.train_fields(detector, x_0, 0)
    detector.calibrate(x_0.clone())
    new = detector.score(detector.normalise(features[12:]))[1].mean()
    assert detector.score(x_0)[1].mean() < 0.75 * new
    assert detector.normal_scores.mean() > 0.95 * new


# ---- map and score -----------------------------------------------------------------------------
def test_map_and_score_by_hand():
    log_p = torch.tensor([[[-1.0, -2.0], [-3.0, -4.0]]])
    y, s = wtflow.anomaly_map(log_p, (2, 2))
    assert torch.allclose(y, (-2 * log_p).sqrt()) and s.item() == pytest.approx(8**0.5)
    y, s = wtflow.anomaly_map(log_p, (2, 2), score="released")
    p = np.exp([[-1.0, -2], [-3, -4]])
    assert np.allclose(y[0], p.max() - p) and s.item() == pytest.approx(p.max() - p.min())
    ramp = torch.arange(200.0).view(1, 10, 20)
    assert wtflow.image_score(ramp, 0.03).item() == pytest.approx(np.mean(range(194, 200)))


def test_blur_matches_scipy_and_keeps_a_constant():
    y = gaussian((2, 30, 40))
    by_scipy = gaussian_filter1d(y.numpy(), 2.0, axis=1, mode="nearest", truncate=3)
    assert np.allclose(wtflow.gaussian_blur(y, 2.0, 1), by_scipy, atol=1e-5)
    flat = torch.ones(1, 9, 9)
    assert torch.allclose(wtflow.gaussian_blur(flat, 3.0, 2), flat)


def test_smoothing_is_counted_in_cells():
    log_p = -gaussian((1, 6, 6)).square()
    up = F.interpolate((-2 * log_p[:, None]).sqrt(), (48, 48), mode="bilinear")[:, 0]
    smoothed, _ = wtflow.anomaly_map(log_p, (48, 48), smooth=0.5)  # half a cell is 4 pixels here
    by_hand = wtflow.gaussian_blur(wtflow.gaussian_blur(up, 4.0, 1), 4.0, 2)
    assert torch.allclose(smoothed, by_hand, atol=1e-5)


# ---- fields ------------------------------------------------------------------------------------
def every_parameter_learns(field, y):
    y.square().sum().backward()
    return all(p.grad is not None and torch.isfinite(p.grad).all() for p in field.parameters())


@pytest.mark.parametrize("h, w", [(1, 1), (3, 5), (8, 8), (16, 9)])
@pytest.mark.parametrize("told_t", [True, False])
def test_unet_keeps_the_shape_of_any_grid_and_every_parameter_learns(h, w, told_t):
    torch.manual_seed(0)
    v_theta = UNetField(10, 8, told_t)
    y = v_theta(torch.randn(3, 10, h, w), torch.rand(3))
    assert y.shape == (3, 10, h, w) and every_parameter_learns(v_theta, y)
    v_theta.eval()
    x = torch.randn(1, 10, h, w)
    same = torch.equal(v_theta(x, torch.zeros(1)), v_theta(x, torch.ones(1)))
    assert same != told_t


def test_point_field_sees_each_location_alone_and_not_t():
    torch.manual_seed(0)
    v_theta, x = PointField(5, 16), gaussian((3, 5, 2, 4))
    y = v_theta(x, torch.rand(3))
    rows = v_theta(x.movedim(1, -1).reshape(-1, 5), torch.rand(24))
    assert y.shape == x.shape and torch.equal(rows.view(3, 2, 4, 5).movedim(-1, 1), y)
    assert every_parameter_learns(v_theta, y)
    v_theta.eval()
    changed = x.clone()
    changed[1, :, 0, 2] += 1
    moved = v_theta(changed, torch.ones(3)) - v_theta(x, torch.zeros(3))
    moved = moved.abs().amax(1) > 1e-6
    assert moved[1, 0, 2] and moved.sum() == 1


def test_point_field_that_is_told_t_has_the_time_of_its_image():
    torch.manual_seed(0)
    v_theta, x = PointField(5, 16, told_t=True).eval(), gaussian((2, 5, 2, 4))
    t = torch.tensor([0.1, 0.7])
    y = v_theta(x, t)
    rows = v_theta(x.movedim(1, -1).reshape(-1, 5), t.repeat_interleave(8))
    assert torch.allclose(rows.view(2, 2, 4, 5).movedim(-1, 1), y, atol=1e-6)
    assert not torch.allclose(v_theta(x, t.flip(0)), y)


@pytest.mark.parametrize("base, low, high", [(768, 760, 766), (128, 21, 22)])
def test_released_size_of_the_field_in_millions(base, low, high):
    with torch.device("meta"):
        parameters = UNetField(1024, base, True).parameters()
    assert low < sum(p.numel() for p in parameters) / 1e6 < high


# ---- detector ----------------------------------------------------------------------------------
def fitted(recipe, seed=0, n=6, device="cpu"):
    """A detector of a recipe fitted to n random images, and those images."""
    size = recipe.image_size
    generator = torch.Generator().manual_seed(seed)
    shape = (n, 3, size, size)
    images = torch.randint(0, 255, shape, dtype=torch.uint8, generator=generator)
    detector = Detector(recipe).to(device)
    features = detector.features(images)
    detector.fit_whitening(features)
    x_0 = detector.normalise(features)
    wtflow.train_fields(detector, x_0, seed)
    detector.calibrate(x_0)
    return detector, images


def test_a_detector_refuses_to_score_before_it_is_fitted():
    detector = Detector(tiny())
    with pytest.raises(RuntimeError, match="not fitted"):
        detector(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize("recipe", [tiny(), tiny(norm="layer", field="unet", calibrate=False)])
def test_a_detector_goes_through_its_state_dict_unchanged(recipe):
    detector, images = fitted(recipe)
    state = detector.state_dict()
    assert not any(name.startswith("extractor.") for name in state)
    again = Detector(recipe)
    again.load_state_dict(state)
    for one, other in zip(detector(images), again(images), strict=True):
        assert torch.equal(one, other)
    for wrong in ({}, {**state, "more": torch.zeros(1)}, {**state, "out.bias": torch.zeros(2)}):
        with pytest.raises(RuntimeError):
            again.load_state_dict(wrong)


def test_whole_images_and_stored_features_score_alike():
    detector, images = fitted(tiny())
    x_0 = detector.normalise(detector.features(images))
    for whole, parts in zip(detector(images), detector.score(x_0), strict=True):
        assert torch.allclose(whole, parts, rtol=1e-5)


def test_normalising_into_the_features_is_the_same():
    detector, images = fitted(tiny())
    features = detector.features(images).half()
    x_0 = detector.normalise(features)
    assert x_0.dtype == torch.float16 and not torch.equal(x_0, features)
    assert torch.equal(detector.normalise(features, out=features), x_0)
    assert torch.equal(features, x_0)


# ---- training ----------------------------------------------------------------------------------
def test_the_rate_of_each_schedule():
    cycle, step = Recipe(steps=100), Recipe(steps=100, schedule="step")
    rates = [wtflow.learning_rate(k, cycle) / cycle.lr for k in (0, 5, 10, 55, 100)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])
    rates = [wtflow.learning_rate(k, step) / step.lr for k in (0, 66, 67, 99)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1])


def test_training_goes_on_from_any_saved_state_to_the_same_field(monkeypatch):
    monkeypatch.setattr(wtflow, "SAVE_SECONDS", 0)
    monkeypatch.setattr(wtflow, "REPORT_STEPS", 1)
    x_0 = gaussian((4, 152, 4, 4))
    states, steps, detector = [], [], Detector(tiny())
    detector.feature_whitening += torch.eye(152)

    def report(step, total, loss):
        steps.append((step, total))

    wtflow.train_fields(detector, x_0, 3, report, lambda state: states.append(clone(state)))
    whole = [field.state_dict() for field in detector.fields]
    assert [[t["step"] for t in state["trainings"]] for state in states] == [
        [step, step] for step in (1, 2, 3, 4)
    ]
    assert steps == [(2, 8), (4, 8), (6, 8), (8, 8)]
    for state in states:
        wtflow.train_fields(detector, x_0, 3, state=state)
        for field, of_whole in zip(detector.fields, whole, strict=True):
            assert same_values(field.state_dict(), of_whole)


def test_fields_that_train_side_by_side_are_those_that_train_in_turn(two_threads):
    """A core each: so not even the last bit depends on whether there are one or two."""
    x_0, trained = gaussian((6, 152, 4, 4)), []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        detector = Detector(tiny(steps=30))
        detector.feature_whitening += torch.eye(152)
        wtflow.train_fields(detector, x_0, 0)
        trained.append(detector.state_dict())
    assert same_values(*trained)


@pytest.mark.parametrize("kind", ["point", "unet"])
def test_a_field_for_use_gives_what_the_trained_one_gives(kind):
    """Its normalisations, with moments that training left, are folded into the layers."""
    field = wtflow.new_field(tiny(field=kind, told_t=True), 6)
    x, t = 3 * gaussian((8, 6, 4, 4)) + 1, torch.rand(8)
    for _ in range(20):
        field(x, t)  # moments
    trained = copy.deepcopy(field).eval()
    (used,) = wtflow.for_use([field])
    assert not [m for m in used.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    with torch.no_grad():
        assert torch.allclose(used(x, t), trained(x, t), rtol=1e-4, atol=1e-5)


def same_values(one, other):
    return all(torch.equal(v, other[name]) for name, v in one.items())


def clone(value):
    """A deep copy of tensors in dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {k: clone(v) for k, v in value.items()}
    if isinstance(value, list):
        return [clone(v) for v in value]
    return value


def test_a_loss_that_is_not_finite_stops_the_training():
    x_0 = gaussian((4, 6, 2, 2))
    x_0[1, 2, 0, 1] = float("inf")
    with pytest.raises(InputError, match="loss is not finite at step 20.*rate"):
        wtflow.train_fields(Detector(Recipe(base=8, folds=0)), x_0, 0)


# ---- side by side ------------------------------------------------------------------------------
@pytest.fixture
def two_threads():
    with benchmark.threads(2):
        yield


def test_side_by_side_keeps_the_order_and_the_number_of_threads(two_threads):
    """With a core for each; an error of one item is that of all."""
    cpu = torch.device("cpu")
    both, together = threading.Barrier(2, timeout=60), []

    def seen(item):
        if item < 2:
            both.wait()  # the two are worked on at once
        together.append(torch.get_num_threads())
        return item

    assert wtflow.side_by_side(seen, range(5), cpu) == [*range(5)]
    assert together == [1] * 5 and torch.get_num_threads() == 2
    later = threading.Thread(target=lambda: together.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert together[-1] == 2  # what threads to come begin with
    assert wtflow.side_by_side(lambda _: torch.get_num_threads(), [0], cpu) == [2]
    with pytest.raises(ZeroDivisionError):
        wtflow.side_by_side(lambda item: 1 / item, (1, 0), cpu)
    assert torch.get_num_threads() == 2


def test_inverses_are_right_after_side_by_side(two_threads):
    """torch.linalg.inv of these is not, with two threads, in PyTorch 2.13."""
    wtflow.side_by_side(lambda item: item, range(4), torch.device("cpu"))
    A = gaussian((64, 152, 200))
    S = A @ A.mT / 200 + 0.01 * torch.eye(152)
    W = wtflow.inverse_factor(S)
    for found in (wtflow.inverse(S), W.mT @ W):
        assert torch.allclose(found @ S, torch.eye(152).expand_as(S), atol=1e-3)


def test_images_side_by_side_score_as_alone(two_threads):
    detector, images = fitted(tiny())
    images = torch.cat([images] * 3)
    together = detector.score(detector.normalise(detector.features(images)))
    for k in range(len(images)):
        alone = detector(images[k : k + 1])
        for one, of_all in zip(alone, together, strict=True):
            assert torch.allclose(one[0], of_all[k], rtol=1e-4)


# ---- backbones ---------------------------------------------------------------------------------
# Recorded from the original implementations in float64: {block or stride: mean, population
# standard deviation of its output}, and the first entry and another of two layers.
LITE0 = {
    3: (-0.6397166871904888, 12.273338279716263),
    4: (-1.399435967395532, 12.003240472558458),
    10: (-0.2963033457524406, 6.313499158570445),
    15: (0.02329468677585999, 2.345086640552387),
}
LITE0_SHAPES = {2: (16, 64), 4: (24, 32), 8: (40, 16), 16: (112, 8), 32: (320, 4)}  # C, side
WIDE = {
    4: (0.7189124466396698, 0.8413680279831285),
    8: (1.6350482906882018, 1.944722968928098),
    16: (3.9649682403631163, 4.895756651621443),
}
WIDE_FIRST = {4: 1.1820854901593623, 16: 8.091662645361714}


def wave(n):
    return torch.cos(0.01 * torch.arange(3 * n * n, dtype=torch.float64)).view(1, 3, n, n)


def close(measured, recorded):
    assert abs(float(measured) - recorded) <= 1e-6 * abs(recorded), (float(measured), recorded)


@torch.no_grad()
def test_efficientnet_lite0_agrees_with_its_reference():
    net = wtflow.EfficientNetLite("efficientnet_lite0").double().eval()
    state = torch.load(wtflow.package_weights("efficientnet_lite0"), weights_only=True)
    net.load_state_dict({k: v for k, v in state.items() if not k.startswith(net.HEAD)})
    y = F.relu6(net._bn0(net._conv_stem(wave(128))))  # the recorded input is preprocessed already
    for k, block in enumerate(net._blocks):
        y = block(y)
        if k in LITE0:
            close(y.mean(), LITE0[k][0])
            close(y.std(unbiased=False), LITE0[k][1])
    levels = net(wave(128) * 128 + 127)
    assert {s: tuple(v.shape[1:]) for s, v in levels.items()} == {
        stride: (c, side, side) for stride, (c, side) in LITE0_SHAPES.items()
    }
    assert net.channels == {stride: c for stride, (c, _) in LITE0_SHAPES.items()}
    close(levels[16].mean(), LITE0[10][0])
    close(levels[32].std(unbiased=False), LITE0[15][1])


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["efficientnet_lite0", "wide_resnet50_2"])
def test_folded_normalisations_leave_the_features_as_they_are(backbone):
    """In float64, with statistics that are not those of an untrained network."""
    torch.manual_seed(0)
    wide = backbone == "wide_resnet50_2"
    net = wtflow.WideResNet50() if wide else wtflow.EfficientNetLite(backbone)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 2)
            module.bias.normal_()
    net = net.double().eval()
    x = 255 * torch.rand(2, 3, 64, 64, dtype=torch.float64)
    before = net(x, (4, 8, 16))
    wtflow.fold_batch_norms(net)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    for stride, y in net(x, (4, 8, 16)).items():
        assert torch.allclose(y, before[stride], rtol=1e-9, atol=1e-9)


def fill(state):
    """The recorded rule for weights: cosines of the position of the key and of the entry."""
    for i, key in enumerate(sorted(state)):
        v = state[key]
        if not v.is_floating_point():
            v.zero_()
            continue
        c = torch.cos(0.7 * torch.arange(v.numel(), dtype=torch.float64) + i).view(v.shape)
        if v.ndim >= 2:
            v.copy_(c * (2 / v[0].numel()) ** 0.5)
        elif key.endswith("running_var"):
            v.copy_(1 + 0.1 * c.abs())
        elif key.endswith("weight"):
            v.copy_(1 + 0.1 * c)
        else:
            v.copy_(0.1 * c)


@torch.no_grad()
def test_wide_resnet50_2_agrees_with_torchvision(tmp_path):
    with torch.device("meta"):
        net = wtflow.WideResNet50()
    net = net.to_empty(device="cpu").double().eval()
    state = net.state_dict()
    assert len(state) == 320
    assert state["layer4.2.conv3.weight"].shape == (2048, 1024, 1, 1)
    assert state["layer1.0.downsample.1.running_var"].shape == (256,)
    fill(state)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (net.MEAN, net.STD))
    levels = net((wave(64) * std + mean) * 255)  # the recorded input is preprocessed already
    for stride, y in levels.items():
        close(y.mean(), WIDE[stride][0])
        close(y.std(unbiased=False), WIDE[stride][1])
        assert y.shape[1] == net.channels[stride]
    for stride, first in WIDE_FIRST.items():
        close(levels[stride].flatten()[0], first)
    torch.save(net.float().state_dict(), tmp_path / "wide.pth")  # --weights FILE
    loaded = wtflow.load_extractor("wide_resnet50_2", tmp_path / "wide.pth")
    x = torch.rand(1, 3, 64, 64) * 255
    assert torch.allclose(loaded(x, (16,))[16], net(x, (16,))[16], rtol=1e-3, atol=1e-3)


def test_weights_that_are_absent_or_foreign_say_so(tmp_path, monkeypatch):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "x.pth")
    for backbone in wtflow.CHOICES["backbone"]:
        with pytest.raises(InputError, match="x.pth"):
            wtflow.load_extractor(backbone, tmp_path / "x.pth")
    with pytest.raises(InputError, match="choose from"):
        wtflow.load_extractor("resnet18")

    def offline(url, **options):
        assert url.endswith("wide_resnet50_2-95faca4d.pth")
        assert options["check_hash"] and options["weights_only"]
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(InputError, match="--weights FILE"):
        wtflow.load_extractor("wide_resnet50_2")


@pytest.mark.parametrize("n", [64, 96, 128])
def test_features_are_one_grid_of_joined_levels(n):
    net = wtflow.load_extractor("efficientnet_lite0")
    x = torch.rand(2, 3, n, 2 * n) * 255
    levels = net(x)
    three = Recipe(strides=(4, 8, 16))
    y = wtflow.join_levels(levels, three, (n, 2 * n))
    assert y.shape == (2, 176, n // 8, n // 4) and not y.requires_grad
    assert torch.allclose(y[:, 24:64], F.avg_pool2d(levels[8], 3, 1, 1), atol=1e-5)
    coarse = wtflow.join_levels(levels, Recipe(strides=three.strides, cell=16), (n, 2 * n))
    assert torch.allclose(coarse[:, 64:], F.avg_pool2d(levels[16], 3, 1, 1), atol=1e-5)
    assert torch.allclose(coarse[:, 24:64], y[:, 24:64, ::2, ::2], atol=1e-5)
