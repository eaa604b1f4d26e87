"""wtflow.py: recipe, loss, couplings, whitening, Gaussian, fields, detector, backbones."""

import itertools
import re
import threading
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import kstest
from torch import nn

import train
import wtflow
from tests import benchmark
from wtflow import PAPER, Detector, InputError, PositionGaussian, Recipe, UNetField


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def gaussian(shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


def tiny(**changes):
    """A recipe of 64 px, 8 x 8 positions and a narrow field."""
    return Recipe(**{"image_size": 64, "width": 8, "steps": 4, "batch": 32, **changes})


# ---- recipe ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "setting, remedy",
    [
        (dict(backbone="vgg"), "efficientnet_lite0"),
        (dict(norm="layer"), "field=unet"),
        (dict(coupling="best"), "worst"),
        (dict(image_size=65), "multiple of 16"),
        (dict(strides=(32,)), "4, 8, 16"),
        (dict(steps=-1), "at least 0"),
        (dict(rho=1.5), "at least -1 and at most 1"),
        (dict(folds=1), "at least 2"),
        (dict(lr=float("nan")), "at least 0"),
    ],
)
def test_a_recipe_refuses_what_is_not_valid(setting, remedy):
    ((name, value),) = setting.items()
    with pytest.raises(InputError, match=rf"^{name}={re.escape(str(value))}: .*{remedy}"):
        Recipe(**setting)


def test_a_recipe_takes_aspect_and_pixels_from_the_images():
    paper = Recipe(**PAPER)
    assert wtflow.image_shape(wtflow.recipe_for(paper, [(200, 300)])) == (256, 256)
    recipe = Recipe(image_size=320)
    tall = wtflow.recipe_for(recipe, [(900, 300), (900, 300), (300, 300)])  # the median image
    assert tall.aspect == 3 and tall.image_size == 320
    h, w = wtflow.image_shape(tall)
    assert (h, w) == (560, 192) and abs(h * w / 320**2 - 1) < 0.06
    small = wtflow.recipe_for(recipe, [(100, 100)])  # enlarged, but not much
    assert wtflow.image_shape(small) == (192, 192)
    strip = wtflow.recipe_for(recipe, [(1, 20000)])
    assert strip.aspect == 1 / 8 and min(wtflow.image_shape(strip)) >= 16


# ---- loss, couplings, whitening ----------------------------------------------------------------
def test_loss_is_the_velocity_error():
    """Of v_theta(x, t) = t x, with times that are given."""
    x_0, x_1, times = gaussian((6, 4, 2, 2)), gaussian((6, 4, 2, 2), 1), torch.rand(6)
    t = times.view(-1, 1, 1, 1)

    def v_theta(x, times):
        return times.view(-1, 1, 1, 1) * x

    loss = wtflow.flow_matching_loss(v_theta, x_0, lambda x_0, generator: x_1, t=times)
    error = t * ((1 - t) * x_0 + t * x_1) - (x_1 - x_0)
    assert torch.allclose(loss, error.square().mean((1, 2, 3)))


def test_one_step_and_two_by_hand():
    x_0 = torch.tensor([[3.0, 4.0]])

    def v_theta(x, t):
        return -x * (1 + t[:, None])

    assert torch.equal(wtflow.euler(v_theta, x_0), torch.zeros(1, 2))
    assert torch.allclose(wtflow.euler(v_theta, x_0, 2), x_0 * 0.5 * (1 - 0.75))
    assert wtflow.log_density(x_0).item() == pytest.approx(-25 / 4)


@pytest.mark.parametrize(
    "settings, couple",
    [
        ({"rho": 0.9}, partial(wtflow.worst, rho=0.9)),
        ({"coupling": "independent", "rho": 0.9}, wtflow.independent),
        ({"coupling": "optimal"}, wtflow.optimal),
    ],
)
@pytest.mark.parametrize("shape", [(50, 7), (3, 7, 4, 5)])
def test_the_coupling_of_a_recipe_keeps_the_shape_and_follows_its_generator(
    settings, couple, shape
):
    x_0 = gaussian(shape)
    found = wtflow.coupling_of(Recipe(**settings))
    one, again, other = (f(x_0, seeded(s)) for f, s in ((found, 1), (couple, 1), (found, 2)))
    assert one.shape == x_0.shape and torch.equal(one, again) and not torch.equal(one, other)


def test_optimal_beats_every_permutation():
    x_0 = gaussian((5, 3))
    x_1 = wtflow.optimal(x_0, seeded(3))
    costs = [(x_0 - x_1[list(p)]).square().sum() for p in itertools.permutations(range(5))]
    assert costs[0] <= min(costs) + 1e-5


@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.9])
def test_worst_is_noise_about_the_conditional_mean_on_the_shell(rho):
    """Means within 5 standard errors; the noise is N(0, 1 - rho^2): Kolmogorov-Smirnov, 1e-6."""
    d, x_0 = 6, gaussian((4000, 6, 2, 1), 1)
    x_1 = wtflow.worst(x_0, seeded(3), rho)
    rest = x_1 - wtflow.conditional_mean(x_0, rho)
    assert kstest(rest.flatten().numpy() / (1 - rho**2) ** 0.5, "norm").pvalue > 1e-6
    energy = x_1.square().sum(1)
    assert abs(energy.mean().item() - d) < 5 * energy.std().item() / energy.numel() ** 0.5
    along = (x_1 * F.normalize(x_0, dim=1)).sum(1)
    assert abs(along.mean().item() + rho * d**0.5) < 5 * (1 - rho**2) ** 0.5 / 8000**0.5


def test_whitening_is_that_of_the_covariance_shrunk_towards_the_mean_variance():
    torch.manual_seed(0)
    x = torch.einsum("ij,njhw->nihw", torch.randn(6, 6), torch.randn(400, 6, 2, 2)) + 3
    rows = x.movedim(1, -1).reshape(-1, 6)
    S = torch.cov(rows.T, correction=0)
    mean, W = wtflow.fit_zca(x)
    shrunk = 0.99 * S + 0.01 * S.trace() / 6 * torch.eye(6)
    assert torch.allclose(W @ shrunk @ W, torch.eye(6), atol=1e-4)
    z = wtflow.whiten(x, mean, W).movedim(1, -1).reshape(-1, 6)
    assert torch.allclose(z, (rows - rows.mean(0)) @ W, atol=1e-4)
    assert torch.allclose(z, wtflow.whiten(rows, mean, W), atol=1e-4)


# ---- the Gaussian at each position -------------------------------------------------------------
def fitted_gaussian(r):
    g = PositionGaussian(*r.shape[1:])
    g.fit(r)
    return g


def by_numpy(r):
    """Of residuals r, from the definitions: mean (L, 4, d), c (L,), s and Sigma (L, d, d)."""
    x = wtflow.to_blocks(r).double().numpy()
    blocks, n, _, d = x.shape
    mean = x.mean(1)
    z = (x - mean[:, None]).reshape(blocks, -1, d)
    S = np.einsum("lni,lnj->lij", z, z) / (4 * (n - 1))
    variance = np.trace(S, axis1=1, axis2=2) / d
    s = variance.mean()
    log_c = np.log(variance / s)
    c = np.exp(log_c * max(0, 1 - wtflow.PADDING**2 / np.mean(log_c**2)))
    k = wtflow.PSEUDO_COUNT * d
    return mean, c, s, n / (n + k) * S / c[:, None, None] + k / (n + k) * s * np.eye(d)


def test_blocks_hold_every_position_once_and_come_back():
    x = torch.arange(2 * 3 * 6 * 4.0).view(2, 3, 6, 4)
    blocks = wtflow.to_blocks(x)
    assert blocks.shape == (3 * 2, 2, 4, 3)
    assert torch.equal(blocks[1, 0, :, 0], x[0, 0, :2, 2:].flatten())
    assert torch.equal(wtflow.from_blocks(blocks[..., 1], 6, 4), x[:, 1])


@pytest.mark.parametrize("scales", [[1, 1, 2, 2, 5, 5], [1, 1, 1, 1, 1, 1]])
def test_squared_distance_is_that_of_mahalanobis_by_its_definition(scales):
    """Log scales of equal blocks differ by 0.07, by chance alone: less than by zero padding."""
    r = gaussian((40, 3, 4, 6)) * torch.tensor(scales) + gaussian((1, 3, 4, 6), 1)
    g, (mean, c, _, Sigma) = fitted_gaussian(r), by_numpy(r)
    new = gaussian((5, 3, 4, 6), 2)
    z = wtflow.to_blocks(new).double().numpy() - mean[:, None]
    by_hand = np.einsum("lnpi,lij,lnpj->lnp", z, np.linalg.inv(Sigma), z) / 3
    y = g.squared_distance(new)
    assert torch.allclose(g.scale * 40 / 42.25, torch.from_numpy(c).float(), rtol=1e-4)
    assert (c == 1).all() == (max(scales) == 1)
    assert np.allclose(wtflow.to_blocks(y[:, None])[..., 0], by_hand, rtol=1e-3)


def test_leave_one_out_is_a_fit_without_the_image_given_scales_and_divisor():
    """Beside the covariance of the others about their mean, n - 1 as its divisor."""
    n, d = 7, 3
    r = gaussian((n, d, 4, 4)) * torch.tensor([1.0, 1, 3, 3]) + 1
    g = fitted_gaussian(r)
    left_out = wtflow.to_blocks(g.leave_one_out(r)[:, None])[..., 0]
    x = wtflow.to_blocks(r).double()
    _, c, s, _ = by_numpy(r)
    pseudo = wtflow.PSEUDO_COUNT * d
    for k in range(n):
        others = torch.cat([x[:, :k], x[:, k + 1 :]], 1).numpy()
        z = (others - others.mean(1, keepdims=True)).reshape(4, -1, d)
        S_k = np.einsum("lni,lnj->lij", z, z) / (4 * (n - 1))
        Sigma_k = (n * S_k / c[:, None, None] + pseudo * s * np.eye(d)) / (n + pseudo)
        e = x[:, k].numpy() - others.mean(1)
        refitted = np.einsum("lpi,lij,lpj->lp", e, np.linalg.inv(Sigma_k), e) / d
        assert np.allclose(left_out[:, k], refitted, rtol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize("kind", ["constant", "zero", "copies", "half", "one position"])
def test_whitening_and_gaussian_survive_features_that_never_change(n, kind):
    r = torch.full((n, 5, 4, 4), float(kind != "zero"))
    if kind == "copies":
        r = gaussian((1, 5, 4, 4)).repeat(n, 1, 1, 1)
    if kind == "half":
        r[:, :, :2] = gaussian((n, 5, 2, 4))
    if kind == "one position":
        r[:, :, 0, 0] = gaussian((n, 5))
    g, (mean, W) = fitted_gaussian(r), wtflow.fit_zca(r)
    found = [wtflow.whiten(r, mean, W), g.squared_distance(r + 1)]
    assert all(v.isfinite().all() for v in (*found, *([g.leave_one_out(r)] if n > 1 else [])))


# ---- map and score -----------------------------------------------------------------------------
def test_map_and_score_by_hand():
    square = torch.zeros(1, 5, 5)
    square[0, 2, 2] = 36.0
    y, s = wtflow.map_and_score(square)
    weights = torch.tensor([1.0, 2.0, 1.0]) / 4
    assert torch.allclose(y[0, 1:4, 1:4], 6 * weights[:, None] * weights)
    assert s.item() == pytest.approx(6 / 4)
    assert wtflow.map_and_score(-square)[1].item() == 0  # of rounding
    flat, s = wtflow.map_and_score(torch.full((2, 4, 3), 2.25))
    assert torch.allclose(flat, torch.tensor(1.5)) and torch.allclose(s, torch.tensor(1.5))


def test_released_map_and_score_by_hand():
    log_p = torch.tensor([[[-1.0, -2.0], [-3.0, -4.0]]])
    y, s = wtflow.released_map(log_p, (2, 2))
    p = np.exp([[-1.0, -2], [-3, -4]])
    assert np.allclose(y[0], p.max() - p) and s.item() == pytest.approx(p.max() - p.min())
    ramp = -torch.arange(200.0).view(1, 10, 20) / 100
    y, s = wtflow.released_map(ramp, (10, 20))
    assert s.item() == pytest.approx(np.mean(1 - np.exp(-np.arange(194, 200) / 100)), rel=1e-5)


# ---- fields ------------------------------------------------------------------------------------
def every_parameter_learns(field, y):
    y.square().sum().backward()
    return all(p.grad.any() and torch.isfinite(p.grad).all() for p in field.parameters())


@pytest.mark.parametrize("h, w", [(1, 1), (3, 5), (8, 8), (16, 9)])
def test_unet_keeps_the_shape_of_any_grid_sees_t_and_every_parameter_learns(h, w):
    torch.manual_seed(0)
    v_theta = wtflow.new_field(tiny(field="unet"), 10)
    y = v_theta(torch.randn(3, 10, h, w), torch.rand(3))
    assert y.shape == (3, 10, h, w) and every_parameter_learns(v_theta, y)
    v_theta.eval()
    x = torch.randn(1, 10, h, w)
    assert not torch.equal(v_theta(x, torch.zeros(1)), v_theta(x, torch.ones(1)))


def test_a_position_field_sees_each_position_alone_and_the_time_of_its_image():
    torch.manual_seed(0)
    v_theta = wtflow.new_field(tiny(width=16), 5)
    x = gaussian((2, 5, 2, 4))
    assert every_parameter_learns(v_theta, v_theta(x, torch.rand(2)))
    v_theta.eval()
    t = torch.tensor([0.1, 0.7])
    y = v_theta(x, t)
    rows = v_theta(x.movedim(1, -1).reshape(-1, 5), t.repeat_interleave(8))
    assert torch.allclose(rows.view(2, 2, 4, 5).movedim(-1, 1), y, atol=1e-6)
    assert not torch.equal(v_theta(x, t.flip(0)), y)


def test_the_embedding_of_time_by_hand():
    angles = np.array([300.0, 3.0])  # 1000 t 10^0 and 1000 t 10^-2
    by_hand = np.concatenate([np.cos(angles), np.sin(angles)])
    assert np.allclose(wtflow.sinusoid(torch.tensor([0.3], dtype=torch.float64), 4), by_hand)


def test_released_size_of_the_field():
    with torch.device("meta"):
        parameters = UNetField(1024, 768).parameters()
    assert 760e6 < sum(p.numel() for p in parameters) < 766e6


# ---- detector ----------------------------------------------------------------------------------
def fitted(recipe, seed=0, n=6, device="cpu"):
    """A detector of a recipe fitted to n random images, and those images."""
    shape = (n, 3, recipe.image_size, recipe.image_size)
    images = torch.randint(0, 255, shape, dtype=torch.uint8, generator=seeded(seed))
    detector = Detector(recipe).to(device)
    train.fit_detector(detector, detector.features(images), seed)
    return detector, images


RELEASED = {"norm": "layer", "field": "unet", "score": "released", "batch": 4, "lr": 1e-3}


@pytest.mark.parametrize("recipe", [tiny(), tiny(**RELEASED)])
def test_an_image_has_one_score_whichever_way_it_comes(recipe):
    """And by a detector of the same state; stored features stay, whatever is fitted to them."""
    detector, images = fitted(recipe, n=9)
    features, again = detector.features(images), Detector(recipe)
    with pytest.raises(RuntimeError, match="not fitted"):
        again(images)
    assert features.dtype == torch.float16
    before, stored = features.clone(), detector.score(features)
    again.normal_scores = torch.zeros(9)
    again.load_state_dict(detector.state_dict())
    assert not any(name.startswith("extractor.") for name in again.state_dict())
    for k in range(9):
        for alone, of_all in zip(again(images[k : k + 1]), stored, strict=True):
            assert torch.allclose(alone[0], of_all[k], rtol=1e-5, atol=1e-6)
    train.fit_detector(detector, features, 1)
    assert torch.equal(features, before)


def test_the_residual_is_the_mean_error_of_the_velocity_over_noise_and_its_mirror_image():
    """By hand, of a v_theta that is not linear."""
    x_0, z, rho, t = gaussian((2, 6, 3, 2)), gaussian((6, 3, 2), 1), 0.6, 0.3

    def v_theta(x, t):
        return x.square() * (1 + t.view(-1, 1, 1, 1))

    r = 0
    for sign in (1, -1):
        x_1 = -rho * 6**0.5 * x_0 / x_0.norm(dim=1, keepdim=True) + sign * 0.8 * z
        r = r + (((1 - t) * x_0 + t * x_1).square() * (1 + t) - (x_1 - x_0)) / 2
    assert torch.allclose(wtflow.residual(v_theta, x_0, z, t, rho), r, atol=1e-5)


@pytest.mark.parametrize("coupling, rho", [("worst", 0.9), ("independent", 0), ("optimal", 0)])
def test_a_detector_scores_the_residual_at_the_time_and_rho_of_its_recipe(coupling, rho):
    detector = Detector(tiny(coupling=coupling, rho=0.9, time=0.4))
    detector.field = torch.nn.Identity()
    detector.field.forward = lambda x, t: x * t.view(-1, 1, 1, 1)
    detector.feature_whitening += 2 * torch.eye(152)
    features = gaussian((2, 152, 8, 8))
    expected = wtflow.residual(detector.field, 2 * features, detector.z, 0.4, rho)
    assert torch.allclose(detector.residual(features), expected, rtol=1e-4, atol=1e-4)


def test_the_released_score_is_measured_from_the_origin():
    detector = Detector(tiny(**RELEASED, rho=0.9))
    detector.field = benchmark.Zero()
    features = gaussian((2, 152, 8, 8))
    x_0 = F.layer_norm(features, features.shape[1:])
    y, scores = detector.score(features)
    by_hand = wtflow.released_map(-x_0.square().mean(1) / 2, (64, 64))
    assert torch.allclose(y, by_hand[0], atol=1e-6) and torch.allclose(scores, by_hand[1])


def test_features_of_any_scale_have_finite_scores():
    """float16 holds no more than 65504: residuals of training images are clamped to its range."""
    detector = Detector(tiny())
    detector.field = benchmark.Zero()
    detector.feature_whitening += torch.eye(152)
    features = (3e4 * gaussian((5, 152, 8, 8))).clamp(-65504, 65504).half()
    detector.feature_whitening *= 10
    assert torch.isfinite(train.fit_gaussians(detector, features)[1]).all()
    assert torch.isfinite(detector.score(features)[1]).all()


# ---- parallel map ------------------------------------------------------------------------------
@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_parallel_map_keeps_the_order_and_the_number_of_threads(two_threads):
    """With a core for each; an error of one item is that of all."""
    both, threads = threading.Barrier(2, timeout=60), []

    def seen(item):
        threads.append(torch.get_num_threads())
        if item < 2:
            both.wait()  # the two are worked on at once
        return 1 / (item - 5)

    cpu = torch.device("cpu")
    assert wtflow.parallel_map(seen, range(5), cpu) == [1 / (k - 5) for k in range(5)]
    later = threading.Thread(target=seen, args=(9,))
    later.start()
    later.join()
    assert threads == [1] * 5 + [2]  # which threads to come begin with
    with pytest.raises(ZeroDivisionError):
        wtflow.parallel_map(seen, (6, 5), cpu)
    assert torch.get_num_threads() == 2


def test_a_gaussian_is_right_after_parallel_map(two_threads):
    """The batched LU of such matrices is not, with two threads, in PyTorch 2.13."""
    r = gaussian((4, 152, 16, 16))
    R = fitted_gaussian(r).factor
    Sigma = by_numpy(r)[-1]
    product = (R.mT @ R).double().numpy() @ Sigma
    assert np.allclose(product, np.eye(152), atol=1e-3)


# ---- backbones ---------------------------------------------------------------------------------
# Recorded from the original implementations in float64: {stride: mean, population standard
# deviation of its map}, and the first entry of two.
LITE0 = {
    8: (-1.399435967395532, 12.003240472558458),
    16: (-0.2963033457524406, 6.313499158570445),
    32: (0.02329468677585999, 2.345086640552387),
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


def close(y, recorded):
    for measured, value in zip((y.mean(), y.std(unbiased=False)), recorded, strict=True):
        assert abs(float(measured) - value) <= 1e-6 * abs(value), (float(measured), value)


@torch.no_grad()
def test_efficientnet_lite0_agrees_with_its_reference():
    net = wtflow.EfficientNetLite("efficientnet_lite0").double().eval()
    state = torch.load(wtflow.package_weights("efficientnet_lite0"), weights_only=True)
    net.load_state_dict({k: v for k, v in state.items() if not k.startswith(net.HEAD)})
    levels = net(wave(128) * 128 + 127)  # the recorded input is preprocessed already
    assert {k: (v.shape[1], v.shape[2]) for k, v in levels.items()} == LITE0_SHAPES
    assert net.channels == {stride: c for stride, (c, _) in LITE0_SHAPES.items()}
    for stride, recorded in LITE0.items():
        close(levels[stride], recorded)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["EfficientNetLite", "WideResNet50", "position", "unet"])
def test_a_frozen_network_gives_what_it_gave(kind):
    """In float64, with statistics that are not those of an untrained network."""
    torch.manual_seed(0)
    x = 255 * torch.rand(2, 3, 64, 64, dtype=torch.float64)
    if kind in ("position", "unet"):
        net, given = wtflow.new_field(tiny(field=kind), 3), (x / 255, x[:, 0, 0, 0] / 255)
    else:
        net, given = getattr(wtflow, kind)(), (x, (4, 8, 16))
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for v in (module.running_var, module.weight):
                v.uniform_(0.5, 2)
            for v in (module.running_mean, module.bias):
                v.normal_()
    net = net.double().eval()
    before = net(*given)
    wtflow.freeze(net)
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in net.modules())
    torch.testing.assert_close(net(*given), before, rtol=1e-9, atol=1e-9)


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
def test_wide_resnet50_2_agrees_with_torchvision():
    with torch.device("meta"):
        net = wtflow.WideResNet50()
    net = net.to_empty(device="cpu").double().eval()
    state = net.state_dict()
    assert len(state) == 320
    fill(state)
    mean, std = torch.tensor(net.MEAN_STD, dtype=torch.float64).T.reshape(2, 3, 1, 1)
    levels = net((wave(64) * std + mean) * 255)  # the recorded input is preprocessed already
    for stride, y in levels.items():
        close(y, WIDE[stride])
        assert y.shape[1] == net.channels[stride]
    for stride, first in WIDE_FIRST.items():
        assert levels[stride].flatten()[0].item() == pytest.approx(first, rel=1e-6)


def test_weights_that_are_absent_say_so(monkeypatch):
    def offline(url, **options):
        assert url.endswith("wide_resnet50_2-95faca4d.pth")
        assert options["check_hash"] and options["weights_only"]
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(InputError, match="--weights FILE"):
        wtflow.load_extractor("wide_resnet50_2")


def test_features_are_one_grid_of_joined_levels():
    """Averages over 3 x 3, which are sampled at every `spacing` pixels; half precision."""
    n, net = 96, wtflow.load_extractor("efficientnet_lite0")
    images = torch.randint(0, 255, (2, 3, n, 2 * n), dtype=torch.uint8)
    three, wide = Recipe(strides=(4, 8, 16)), Recipe(strides=(4, 8, 16), spacing=16)
    with wtflow.autocast(images.device, torch.float16):
        levels = net(images.float())
    y, coarse = (wtflow.extract_features(net, images, r).float() for r in (three, wide))
    assert y.shape == (2, 176, n // 8, n // 4)
    close = partial(torch.allclose, rtol=1e-2, atol=1e-2)
    assert close(y[:, :24], F.avg_pool2d(levels[4], 3, 2, 1).float())
    assert close(y[:, 24:64], F.avg_pool2d(levels[8], 3, 1, 1).float())
    upper = F.avg_pool2d(levels[16], 3, 1, 1).float()
    assert close(y[:, 64:], F.interpolate(upper, y.shape[-2:], mode="bilinear"))
    assert close(coarse[:, 64:], F.avg_pool2d(levels[16], 3, 1, 1).float())
    assert close(coarse[:, 24:64], y[:, 24:64, ::2, ::2])
