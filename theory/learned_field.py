"""A field learnt with wtflow's own loss, where the exact one is known: S3, W5, W6, O3, B6.

Data at 0, noise at 1, in R^16 at m2 = d.
(a) The error by time, for a circle (a set of one dimension) and for N(0, I).
(b) The residual at t = 0 by rho, for time-conditioned and other fields. The data are the circle
    with noise N(0, 0.2^2 I), the anomalies lie off its plane.
(c) The residual of a step from the middle, by t, of rFM's time-conditioned field. The same data,
    and anomalies that lie in the plane, inside the circle: a Gaussian of x_0 does not see them.
v_theta is a small network [ours]; the loss, path and couplings are wtflow's. Results and their
limits: README.md. Figure: draw.figures.
"""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ive
from torch import nn

import wtflow
from theory import Row, mean_se
from theory.local_transport import early_residual
from theory.singularity import slope, variance
from theory.unconditional_field import gaussian_score

# Data. RADIUS = sqrt(D), so that m2 = d for the circle as for N(0, I).
D = 16
RADIUS = 4.0
THICKNESS = 0.2
# The networks and their training.
WIDTH = 64
TIME_WIDTH = 32
STEPS = 1000
BATCH = 256
RATE = 1e-2
SEED = 0
# The measurements: rho of the coupling, networks for each, edges of the bins of t, times of (c).
RHOS = (-0.9, 0.0, 0.5, 0.9, 0.97)
REPEATS = 3
EDGES = np.array([0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0])
POINTS = 2000  # measured in each bin of t and of each kind
TIMES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0)
EARLY = 0.05
MODES = {  # time_conditioned; the range of t
    "time-conditioned": (True, 1.0),
    "time-unconditional": (False, 1.0),
    f"t < {EARLY}": (False, EARLY),
}


# ---- Closed forms -----------------------------------------------------------------------------
def circle_field(x, t, thickness=0.0):
    """u_t(x) (N, D) of rFM for the circle with N(0, thickness^2 I) added; t (N,), 0 < t <= 1 (S3).

    [derived] (x - E[x_0 | x_t = x]) / t, written so that it holds at t = 0 if thickness > 0:
    E[point of the circle | x] is mean_on_circle, and a(t) is that of N(0, thickness^2 I).
    """
    t = np.asarray(t)[:, None]
    a = slope(t, thickness)
    return a * x - (1 + (1 - t) * a) * mean_on_circle(x, (1 - t) / variance(t, thickness))


def mean_on_circle(x, power):
    """E[x_0 | x] (N, D) for x_0 on the circle, weight exp(power <x, x_0>); power (N, 1) or 1.

    RADIUS I_1(k) / I_0(k) y/|y| (mean of a von Mises distribution), y the part of x in the plane of
    the circle, k = power RADIUS |y|, I_0, I_1 modified Bessel functions.
    """
    mean = np.zeros_like(x)
    radius = np.linalg.norm(x[:, :2], axis=1, keepdims=True)
    k = power * RADIUS * radius
    mean[:, :2] = RADIUS * ive(1, k) / ive(0, k) / radius * x[:, :2]
    return mean


def thick_circle_grad_log_q(x):
    """grad log q (N, D) of the thick circle: (E[point of the circle | x] - x) / THICKNESS^2."""
    return (mean_on_circle(x, THICKNESS**-2) - x) / THICKNESS**2


def gaussian_field(x, t):
    """u_t(x) (N, D) of rFM for N(0, I); t (N,) (S2)."""
    return slope(t, 1.0)[:, None] * x


def initial_radius():
    """sqrt(m2) of the thick circle: by W5 the inward part of u_0 is this plus rho sqrt(d)."""
    return (RADIUS**2 + D * THICKNESS**2) ** 0.5


# ---- Estimators -------------------------------------------------------------------------------
def circle(n, generator, off=0.0, radius=RADIUS):
    """n points (n, D) at distance `off` from a circle of this radius in the first two axes."""
    angle = 2 * torch.pi * torch.rand(n, 1, generator=generator)
    direction = nn.functional.normalize(torch.randn(n, D - 2, generator=generator))
    return torch.cat([radius * angle.cos(), radius * angle.sin(), off * direction], 1)


def thick_circle(n, generator, **where):
    """The same with N(0, THICKNESS^2 I) added, so that normal points have a density."""
    return circle(n, generator, **where) + THICKNESS * torch.randn(n, D, generator=generator)


def gaussian(n, generator):
    """n points (n, D) of N(0, I)."""
    return torch.randn(n, D, generator=generator)


# {kind of point: sample(n, generator)}; "normal" is what fields are trained on.
KINDS = {
    "normal": thick_circle,
    "off": partial(thick_circle, off=0.8),
    "inside": partial(thick_circle, radius=0.8 * RADIUS),
}


class Fields(nn.Module):
    """`count` networks v_theta of three layers that share no weight.

    (count N, D), (count N,) -> (count N, D).
    """

    def __init__(self, count, time_conditioned=True):
        super().__init__()
        self.count, self.time_conditioned = count, time_conditioned
        sizes = (D + TIME_WIDTH * time_conditioned, WIDTH, WIDTH, D)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in pairwise(sizes):
            bound = a**-0.5
            self.weights.append(torch.empty(count, a, b).uniform_(-bound, bound))
            self.biases.append(torch.empty(count, 1, b).uniform_(-bound, bound))

    def forward(self, x, t):
        y = torch.cat([x, wtflow.sinusoid(t, TIME_WIDTH)], 1) if self.time_conditioned else x
        y = y.view(self.count, -1, y.shape[1])
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            y = torch.baddbmm(bias, nn.functional.silu(y) if k else y, weight)
        return y.reshape(x.shape)


def train(sample, couplings, seed, time_conditioned=True, t_max=1.0, steps=STEPS):
    """Fields fitted to `sample`, one for each of `couplings`, by wtflow.flow_matching_loss.

    t ~ U(0, t_max). AdamW and a one-cycle rate; sample(n, generator) gives n points (n, D).
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    count = len(couplings)
    v_theta = Fields(count, time_conditioned)
    optimiser = torch.optim.AdamW(v_theta.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps)

    def couple(x_0, generator):
        parts = zip(couplings, x_0.chunk(count), strict=True)
        return torch.cat([one(part, generator) for one, part in parts])

    for _ in range(steps):
        optimiser.zero_grad()
        x_0 = sample(count * BATCH, generator)
        t = t_max * torch.rand(len(x_0), generator=generator)
        loss = wtflow.flow_matching_loss(v_theta, x_0, couple, generator, t)
        (count * loss.mean()).backward()  # the sum over fields: each is trained as if alone
        optimiser.step()
        schedule.step()
    return v_theta.requires_grad_(False)


def error_by_time(v_theta, sample, exact, generator, n=POINTS):
    """(a) Mean |v_theta(x_t, t) - u_t(x_t)|^2 / d and its standard error: (bins of EDGES, 2).

    exact(x, t) is u_t, on arrays (n, D) and (n,).
    """
    bins = []
    for low, high in pairwise(EDGES):
        # Not the lowest 1 % of a bin: u_0 of the circle is not defined.
        t = low + (high - low) * (0.01 + 0.99 * torch.rand(n, generator=generator))
        x_0 = sample(n, generator)
        x_t = wtflow.path(x_0, wtflow.independent(x_0, generator), t)
        u_t = exact(x_t.double().numpy(), t.double().numpy())
        bins.append(mean_se(((v_theta(x_t, t).numpy() - u_t) ** 2).mean(1)))
    return np.array(bins)


def auroc(normal, anomalous):
    """P(normal < anomalous) for scores (N,) and (M,), ties one half."""
    ordered = np.sort(normal)
    below = np.searchsorted(ordered, anomalous)
    not_above = np.searchsorted(ordered, anomalous, "right")
    return float((below + not_above).mean() / 2 / len(ordered))


def length(normal, r):
    """|r| (N,) of residuals r (N, D), whatever the normal ones are."""
    return np.linalg.norm(r, axis=1)


def mahalanobis(normal, r):
    """Distances (N,) of r (N, D) under wtflow's Gaussian of normal (M, D), in maps of 2 x 2."""
    maps = [torch.as_tensor(rows).view(-1, 2, 2, D).permute(0, 3, 1, 2) for rows in (normal, r)]
    return gaussian_score(*maps).flatten().numpy()


class Residuals(NamedTuple):
    """Residuals r {kind: (networks, N, D)} at points x {kind: (N, D)}, of one coupling and time."""

    x: dict
    r: dict

    def auroc(self, kind, score=length):
        """AUROC of `kind` by score(normal r, r): mean over networks, standard error."""
        pairs = zip(self.r["normal"], self.r[kind], strict=True)
        areas = [auroc(score(normal, normal), score(normal, r)) for normal, r in pairs]
        return mean_se(areas) if len(areas) > 1 else (areas[0], 0.0)

    def inward(self, rho):
        """Part (networks,) of v_theta(x, 0) = u_0 + r towards the origin, mean of normal points."""
        x = torch.as_tensor(self.x["normal"])
        v = self.r["normal"] + (wtflow.conditional_mean(x, rho) - x).numpy()
        return -((v * self.x["normal"]).sum(-1) / np.linalg.norm(x, axis=1)).mean(1)


def points():
    """({kind: x (POINTS, D)}, {kind: z}): not the points of the training, and noise for each."""
    generator = torch.Generator().manual_seed(1000 + SEED)
    x = {kind: sample(POINTS, generator) for kind, sample in KINDS.items()}
    return x, {kind: torch.randn(POINTS, D, generator=generator) for kind in KINDS}


def residuals(v_theta, time, rhos=(0.0,), repeats=1):
    """[Residuals at `time` for each of rhos], of `repeats` networks each, all in one v_theta."""
    x, z = points()
    count = len(rhos) * repeats
    rho = torch.tensor(rhos).repeat_interleave(repeats * POINTS)[:, None]
    r = {}
    for kind in KINDS:
        many = x[kind].repeat(count, 1), z[kind].repeat(count, 1)
        of_all = wtflow.residual(v_theta, *many, time, rho)
        r[kind] = of_all.view(len(rhos), repeats, POINTS, D).numpy()
    arrays = {kind: points.numpy() for kind, points in x.items()}
    return [Residuals(arrays, {kind: r[kind][k] for kind in KINDS}) for k in range(len(rhos))]


def exact_residuals(time):
    """(c) Residuals of the exact field of the thick circle."""

    def exact(x, t):
        return torch.as_tensor(circle_field(x.double().numpy(), t.double().numpy(), THICKNESS))

    return residuals(exact, time)[0]


def early_auroc(fit, kind, rho):
    """AUROC of |r| of the exact field near t = 0, to first order, at the points of `fit` (W6)."""
    x = (fit.x[name] for name in ("normal", kind))
    first = [early_residual(y, thick_circle_grad_log_q(y), rho, EARLY) for y in x]
    return auroc(*(length(None, r) for r in first))


def run():
    """What table and figure share: {data: error_by_time}, Residuals {mode: {rho: }}, and {t: }."""
    generator = torch.Generator().manual_seed(SEED)
    errors = {}
    for name, sample, exact in (
        ("circle", circle, circle_field),
        ("N(0, I)", gaussian, gaussian_field),
    ):
        v_theta = train(sample, [wtflow.independent], SEED)
        errors[name] = error_by_time(v_theta, sample, exact, generator)
    by_rho = {}
    couplings = [partial(wtflow.worst, rho=rho) for rho in RHOS for _ in range(REPEATS)]
    for mode, (time_conditioned, t_max) in MODES.items():
        v_theta = train(thick_circle, couplings, SEED, time_conditioned, t_max)
        by_rho[mode] = dict(zip(RHOS, residuals(v_theta, 0.0, RHOS, REPEATS), strict=True))
    v_theta = train(thick_circle, [wtflow.independent] * REPEATS, SEED)
    by_time = {t: residuals(v_theta, t, repeats=REPEATS)[0] for t in TIMES}
    return errors, by_rho, by_time


# ---- Table ------------------------------------------------------------------------------------
def table(errors, by_rho, by_time):
    """Rows for (a) to (c) of what run returns.

    `predicted` is the value of the exact field, nan where it is not known. Standard errors are over
    points in (a), over networks in (b) and (c).
    """
    for name, bins in errors.items():
        yield Row("S3", f"learnt: mean square error / d at t < 0.02, {name}", 0, *bins[0])
        yield Row("S3", f"learnt:   at 0.4 < t < 0.7, {name}", 0, *bins[-2])
    for rho, fit in by_rho["time-conditioned"].items():
        what = f"learnt: inward part of v_theta(x, 0), time-conditioned, rho={rho:g}"
        yield Row("W5", what, initial_radius() + rho * RADIUS, *mean_se(fit.inward(rho)))
    for mode, fits in by_rho.items():
        for rho, fit in fits.items():
            exact = {"time-conditioned": 0.5, f"t < {EARLY}": early_auroc(fit, "off", rho)}
            what = f"learnt: AUROC of |r| at t=0, off the circle, {mode}, rho={rho:g}"
            yield Row("W6", what, exact.get(mode, np.nan), *fit.auroc("off"))
    fit = by_time[0.0]
    for kind in ("off", "inside"):
        area = auroc(*(mahalanobis(fit.x["normal"], fit.x[name]) for name in ("normal", kind)))
        what = f"AUROC of the Mahalanobis distance of x_0, {kind} the circle"
        yield Row("B6", what, np.nan, area)
    for t, kind in ((t, kind) for t in TIMES for kind in ("off", "inside")):
        exact = exact_residuals(t).auroc(kind, mahalanobis)[0] if t else 0.5  # there r_t = 0, C2
        what = f"learnt: AUROC of the score of r_t, t={t:g}, {kind} the circle"
        yield Row("O3", what, exact, *by_time[t].auroc(kind, mahalanobis))
