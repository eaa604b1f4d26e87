"""The method: backbones against recorded outputs, the field, couplings, loss, scorer."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import wtflow
from wtflow import InputError, PointField, RECIPE, VectorField

# Recorded from the original implementations in float64: mean, population standard deviation of each output.
LITE0 = {3: (-0.6397166871904888, 12.273338279716263), 4: (-1.399435967395532, 12.003240472558458), 10: (-0.2963033457524406, 6.313499158570445),
         15: (0.02329468677585999, 2.345086640552387)}
WIDE = {4: (0.7189124466396698, 0.8413680279831285), 8: (1.6350482906882018, 1.944722968928098), 16: (3.9649682403631163, 4.895756651621443)}
WIDE_FIRST = {4: (1.1820854901593623, 1.7910680043940983), 16: (8.091662645361714, 6.913593869673142)}


def wave(n):
    return torch.cos(0.01 * torch.arange(3 * n * n, dtype=torch.float64)).view(1, 3, n, n)


def close(a, b):
    assert abs(float(a) - b) <= 1e-6 * abs(b), (float(a), b)


@torch.no_grad()
def test_efficientnet_lite0_agrees_with_its_reference():
    net = wtflow.EfficientNetLite("efficientnet_lite0").double().eval()
    state = torch.load(wtflow.package_weights("efficientnet_lite0"), weights_only=True)
    net.load_state_dict({k: v for k, v in state.items() if not k.startswith(("_conv_head", "_bn1", "_fc"))})
    y = F.relu6(net._bn0(net._conv_stem(wave(128))))               # the recorded input is already preprocessed
    for k, block in enumerate(net._blocks):
        y = block(y)
        if k in LITE0:
            close(y.mean(), LITE0[k][0]), close(y.std(unbiased=False), LITE0[k][1])
    levels = net(wave(128) * 128 + 127)
    assert {s: tuple(v.shape[1:]) for s, v in levels.items()} == {2: (16, 64, 64), 4: (24, 32, 32), 8: (40, 16, 16), 16: (112, 8, 8), 32: (320, 4, 4)}
    close(levels[16].mean(), LITE0[10][0]), close(levels[32].std(unbiased=False), LITE0[15][1])


def fill(state):
    """The recorded rule for weights: cosines of the position of the key and of the entry."""
    for i, k in enumerate(sorted(state)):
        v = state[k]
        if not v.is_floating_point():
            v.zero_()
            continue
        c = torch.cos(0.7 * torch.arange(v.numel(), dtype=torch.float64) + i).view(v.shape)
        v.copy_(c * (2 / v[0].numel()) ** 0.5 if v.ndim >= 2 else 1 + 0.1 * c.abs() if k.endswith("running_var") else
                1 + 0.1 * c if k.endswith("weight") else 0.1 * c)


@torch.no_grad()
def test_wide_resnet50_2_agrees_with_torchvision(tmp_path):
    with torch.device("meta"):
        net = wtflow.WideResNet50()
    net = net.to_empty(device="cpu").double().eval()
    state = net.state_dict()
    assert len(state) == 320 and state["layer4.2.conv3.weight"].shape == (2048, 1024, 1, 1) and state["layer1.0.downsample.1.running_var"].shape == (256,)
    fill(state)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (net.MEAN, net.STD))
    for s, y in net((wave(64) * std + mean) * 255).items():                  # the recorded input is already preprocessed
        close(y.mean(), WIDE[s][0]), close(y.std(unbiased=False), WIDE[s][1])
        if s in WIDE_FIRST:
            close(y.flatten()[0], WIDE_FIRST[s][0])
    torch.save(net.float().state_dict(), tmp_path / "wide.pth")    # --weights FILE
    folded = wtflow.extractor("wide_resnet50_2", tmp_path / "wide.pth")
    x = torch.rand(1, 3, 64, 64) * 255
    assert torch.allclose(folded(x, (16,))[16], net(x, (16,))[16], rtol=1e-3, atol=1e-3)


def test_weights_that_are_absent_or_foreign_say_so(tmp_path, monkeypatch):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "x.pth")
    for backbone in wtflow.BACKBONES:
        with pytest.raises(InputError, match="x.pth"):
            wtflow.extractor(backbone, tmp_path / "x.pth")
    with pytest.raises(InputError, match="choose from"):
        wtflow.extractor("resnet18")

    def offline(*args, **kwargs):
        assert args[0].endswith("wide_resnet50_2-95faca4d.pth") and kwargs["check_hash"] and kwargs["weights_only"]
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(InputError, match="--weights FILE"):
        wtflow.extractor("wide_resnet50_2")


@pytest.mark.parametrize("n", [64, 96, 128])
def test_features_are_one_grid_of_concatenated_levels(n):
    net = wtflow.extractor("efficientnet_lite0")
    x = torch.rand(2, 3, n, n) * 255
    y = wtflow.features(net, x, RECIPE)
    assert y.shape == (2, 152, n // 16, n // 16) and not y.requires_grad
    own = F.avg_pool2d(net(x)[16], 3, 1, 1)
    assert torch.allclose(y[:, 40:], own, atol=1e-5)


def test_whitening_gives_unit_covariance_and_survives_degenerate_sets():
    torch.manual_seed(0)
    x = torch.einsum("ij,njhw->nihw", torch.randn(6, 6), torch.randn(400, 6, 2, 2)) + 3
    z = wtflow.whiten(x, *wtflow.fit_zca(x, 0.0)).movedim(1, -1).reshape(-1, 6)
    assert torch.allclose(z.T @ z / len(z), torch.eye(6), atol=1e-3) and z.mean(0).abs().max() < 1e-4
    for bad in (torch.ones(3, 6, 2, 2), torch.randn(1, 6, 1, 1), torch.randn(2, 6, 1, 1).repeat(3, 1, 1, 1), torch.zeros(1, 6, 1, 1)):
        mean, W = wtflow.fit_zca(bad, 0.01)
        assert torch.isfinite(W).all() and torch.isfinite(wtflow.whiten(bad, mean, W)).all()


def test_cells_are_whitened_each_by_its_own_law_when_images_are_many():
    torch.manual_seed(0)
    x = torch.randn(4000, 3, 1, 2) * torch.tensor([1.0, 5.0]) + torch.tensor([2.0, -7.0])      # two cells, two laws
    z = wtflow.whiten(x, *wtflow.fit_cells(x))
    assert z.mean(0).abs().max() < 1e-4
    S, (near, far) = z.var((0, 1)), (1.0, 25.0)
    a, s2 = 3 / 4003, (near + far) / 2
    for cell, v in enumerate((near, far)):
        assert S[0, cell].item() == pytest.approx(v / ((1 - a) * v + a * s2), rel=0.05)      # standard error 0.013
    few = wtflow.fit_cells(x[:2])[1]                           # two images: a = 3/5 keeps the matrices finite and bounded
    assert torch.isfinite(few).all() and few.abs().max() < 5


def test_calibration_measures_x1_hat_in_units_of_where_normal_features_land():
    """With v = 0, x1_hat = x_0: after calibration the mean of -2 log p over the training features is their whitened size, near 1."""
    detector = wtflow.Detector(dict(RECIPE, image_size=64))
    detector.field = lambda x, t: torch.zeros_like(x)
    x_0 = 3 * gaussian((3000, 4, 1, 2)) + 5
    plain = -2 * detector.log_density(x_0).mean().item()
    detector.calibrate(x_0)
    assert plain == pytest.approx(34, rel=0.05)                # |x_0|^2 / d = 9 + 25; standard error 0.2
    assert -2 * detector.log_density(x_0).mean().item() == pytest.approx(1, rel=0.02)      # standard error 0.009
    detector.recipe["calibrate"], detector.calibration = False, ()
    detector.calibrate(x_0)
    assert detector.calibration == ()


@pytest.mark.parametrize("h, w", [(1, 1), (3, 5), (8, 8), (16, 9)])
@pytest.mark.parametrize("time", [True, False])
def test_field_keeps_the_shape_of_any_grid_and_every_parameter_learns(h, w, time):
    torch.manual_seed(0)
    v = VectorField(10, 8, time)
    y = v(torch.randn(3, 10, h, w), torch.rand(3))
    assert y.shape == (3, 10, h, w)
    y.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in v.parameters())
    v.eval()
    x = torch.randn(1, 10, h, w)
    same = torch.equal(v(x, torch.zeros(1)), v(x, torch.ones(1)))
    assert same != time


def test_point_field_sees_each_location_alone_and_not_t():
    torch.manual_seed(0)
    v, x = PointField(5, 16), gaussian((3, 5, 2, 4))
    y = v(x, torch.rand(3))
    rows = v(x.movedim(1, -1).reshape(-1, 5), torch.rand(24))
    assert y.shape == x.shape and torch.equal(rows.view(3, 2, 4, 5).movedim(-1, 1), y)
    y.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in v.parameters())
    v.eval()
    changed = x.clone()
    changed[1, :, 0, 2] += 1
    moved = (v(changed, torch.ones(3)) - v(x, torch.zeros(3))).abs().amax(1) > 1e-6
    assert moved[1, 0, 2] and moved.sum() == 1


def test_released_size_of_the_field():
    def count(base):
        with torch.device("meta"):
            return sum(p.numel() for p in VectorField(1024, base, True).parameters()) / 1e6
    assert 760 < count(768) < 766 and 21 < count(128) < 22


def gaussian(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("couple", [wtflow.independent, wtflow.optimal, wtflow.worst])
@pytest.mark.parametrize("shape", [(50, 7), (3, 7, 4, 5)])
def test_couplings_keep_shape_and_follow_their_generator(couple, shape):
    x_0 = gaussian(shape)
    draw = lambda seed: couple(x_0, torch.Generator().manual_seed(seed))
    assert draw(1).shape == x_0.shape and torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


def test_optimal_beats_every_permutation_and_worst_plan_loses_to_every_one():
    from itertools import permutations
    x_0, g = gaussian((5, 3)), torch.Generator()
    for sign in (1, -1):
        x_1 = wtflow.optimal(x_0, g.manual_seed(3), sign)
        costs = [sign * (x_0 - x_1[list(p)]).square().sum() for p in permutations(range(5))]
        assert costs[0] <= min(costs) + 1e-5


def test_worst_has_the_law_of_the_worst_of_n_candidates():
    """Against literal candidates: two-sample Kolmogorov-Smirnov, false alarm 1e-6; orthogonal part stays standard normal."""
    from scipy.stats import ks_2samp, kstest
    N, d = 20000, 3
    x_0 = gaussian((N, d), 1)
    e = F.normalize(x_0, dim=1)
    for n in (1, 4, 64):
        z = torch.randn(N, n, d, generator=torch.Generator().manual_seed(2))
        literal = z[torch.arange(N), (z @ x_0[..., None])[..., 0].argmin(1)]
        drawn = wtflow.worst(x_0, torch.Generator().manual_seed(3), n)
        assert ks_2samp((literal * e).sum(1), (drawn * e).sum(1)).pvalue > 1e-6
        other = F.normalize(torch.linalg.cross(e, torch.tensor([[1.0, 0, 0]]).expand(N, 3)), dim=1)
        assert kstest((drawn * other).sum(1).numpy(), "norm").pvalue > 1e-6
    assert torch.isfinite(wtflow.worst(torch.zeros(4, d), n=64)).all()


def test_loss_is_the_velocity_error():
    x_0, g = gaussian((6, 4, 2, 2)), torch.Generator()
    x_1 = wtflow.independent(x_0, g.manual_seed(5))
    t = torch.rand(6)
    seen = {}

    def v(x, s):
        seen.update(x=x, t=s)
        return torch.zeros_like(x)
    loss = wtflow.flow_matching_loss(v, x_0, wtflow.independent, g.manual_seed(5), t)
    assert torch.allclose(loss, (x_1 - x_0).square().mean((1, 2, 3)))
    assert torch.allclose(seen["x"], (1 - t.view(-1, 1, 1, 1)) * x_0 + t.view(-1, 1, 1, 1) * x_1) and torch.equal(seen["t"], t)
    exact = lambda x, s: x_1 - x_0
    assert wtflow.flow_matching_loss(exact, x_0, wtflow.independent, g.manual_seed(5), t).abs().max() == 0


def test_scorer_against_a_hand_computed_case():
    x_0 = torch.tensor([[3.0, 4.0]])
    v = lambda x, t: -x * (1 + t[:, None])
    assert torch.equal(wtflow.euler(v, x_0), torch.zeros(1, 2))
    assert torch.allclose(wtflow.euler(v, x_0, 2), x_0 * 0.5 * (1 - 0.75))
    assert wtflow.log_density(x_0).item() == pytest.approx(-25 / 4)
    log_p = torch.tensor([[[-1.0, -2.0], [-3.0, -4.0]]])
    y, s = wtflow.anomaly_map(log_p, (2, 2))
    assert torch.equal(y, -log_p) and s.item() == 4
    y, s = wtflow.anomaly_map(log_p, (2, 2), score="released")
    p = np.exp([[-1.0, -2], [-3, -4]])
    assert np.allclose(y[0], p.max() - p) and s.item() == pytest.approx(p.max() - p.min())
    assert wtflow.image_score(torch.arange(200.0).view(1, 10, 20), 0.03).item() == pytest.approx(np.mean(range(194, 200)))


def test_blur_keeps_the_mean_and_matches_scipy():
    from scipy.ndimage import gaussian_filter1d
    y = gaussian((2, 30, 40))
    out = wtflow.gaussian_blur(y, 2.0, 1)
    assert np.allclose(out, gaussian_filter1d(y.numpy(), 2.0, axis=1, mode="nearest", truncate=3), atol=1e-5)
    assert torch.allclose(wtflow.gaussian_blur(torch.ones(1, 9, 9), 3.0, 2), torch.ones(1, 9, 9))
    log_p = -gaussian((1, 6, 6)).square()
    up = F.interpolate(-log_p[:, None], (48, 48), mode="bilinear")[:, 0]
    smoothed, _ = wtflow.anomaly_map(log_p, (48, 48), smooth=0.5)          # half a cell is 4 pixels here
    assert torch.allclose(smoothed, wtflow.gaussian_blur(wtflow.gaussian_blur(up, 4.0, 1), 4.0, 2), atol=1e-5)
