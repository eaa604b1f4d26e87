"""A field learnt with wtflow's own loss, where the exact one is known: S3, C2, W5, B2, B3, W6.

Data at 0, noise at 1, in R^16 at m2 = d.
(a) The error by time, for a circle (a set of one dimension) and for N(0, I).
(b) One step from t = 0, by rho, of time-conditioned and time-unconditional fields. The data are
    the circle with noise N(0, 0.2^2 I), anomalies lying off it; and the two scales of B3, SMALL and
    LARGE, anomalies being larger than both or between them.
v_theta is a small network [ours]; the loss, path and couplings are wtflow's. Results and their
limits: README.md. Figure: draw.learned_field_figure.
"""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ive, softmax
from torch import nn

import wtflow
from theory import Row, mean_se
from theory.local_transport import early_residual
from theory.singularity import slope
from theory.unconditional_field import LARGE, SMALL, radial_field
from theory.worst_transport import gaussian_coupling

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
# The measurements: rho of the coupling, networks for each, edges of the bins of t.
RHOS = (-0.9, 0.0, 0.5, 0.9, 0.97)
REPEATS = 3
EDGES = np.array([0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0])
POINTS = 2000  # measured in each bin of t and of each kind
EARLY = 0.05
MODES = {  # time_conditioned; the range of t
    "time-conditioned": (True, 1.0),
    "time-unconditional": (False, 1.0),
    f"t < {EARLY}": (False, EARLY),
}


# ---- Closed forms -----------------------------------------------------------------------------
def circle_field(x, t):
    """u_t(x) (N, D) of rFM for the circle; t (N,), 0 < t <= 1 (S3). [derived]

    E[x_0 | x_t = x] = RADIUS I_1(k) / I_0(k) y/|y| (mean of a von Mises distribution), y the part
    of x in the plane of the circle, k = (1-t) RADIUS |y| / t^2, I_0, I_1 modified Bessel functions.
    """
    t = np.asarray(t)[:, None]
    return (x - mean_on_circle(x, (1 - t) / t**2)) / t


def mean_on_circle(x, power):
    """E[x_0 | x] (N, D) for x_0 on the circle, weight exp(power <x, x_0>); power (N, 1) or 1."""
    mean = np.zeros_like(x)
    radius = np.linalg.norm(x[:, :2], axis=1, keepdims=True)
    k = power * RADIUS * radius
    mean[:, :2] = RADIUS * ive(1, k) / ive(0, k) / radius * x[:, :2]
    return mean


def thick_circle_grad_log_q(x):
    """grad log q (N, D) of the thick circle: (E[point of the circle | x] - x) / THICKNESS^2."""
    return (mean_on_circle(x, THICKNESS**-2) - x) / THICKNESS**2


def two_scales_grad_log_q(x):
    """grad log q (N, d) of the two scales: -x over the scales^2, weighted as they are likely."""
    scales = np.array([SMALL, LARGE])
    log_weights = -(x**2).sum(1, keepdims=True) / (2 * scales**2) - x.shape[1] * np.log(scales)
    return -x * (softmax(log_weights, axis=1) @ scales**-2)[:, None]


def gaussian_field(x, t):
    """u_t(x) (N, D) of rFM for N(0, I); t (N,) (S2)."""
    return slope(t, 1.0)[:, None] * x


def initial_radius():
    """sqrt(m2) of the thick circle: by W5 the inward part of u_0 is this plus rho sqrt(d)."""
    return (RADIUS**2 + D * THICKNESS**2) ** 0.5


# ---- Estimators -------------------------------------------------------------------------------
def circle(n, generator, off=0.0):
    """n points (n, D) at distance `off` from the circle |x_0| = RADIUS in the first two axes."""
    angle = 2 * torch.pi * torch.rand(n, 1, generator=generator)
    direction = nn.functional.normalize(torch.randn(n, D - 2, generator=generator))
    return torch.cat([RADIUS * angle.cos(), RADIUS * angle.sin(), off * direction], 1)


def thick_circle(n, generator, off=0.0):
    """The same with N(0, THICKNESS^2 I) added, so that normal points have a density."""
    return circle(n, generator, off) + THICKNESS * torch.randn(n, D, generator=generator)


def gaussian(n, generator, scale=1.0):
    """n points (n, D) of N(0, scale^2 I)."""
    return scale * torch.randn(n, D, generator=generator)


def two_scales(n, generator):
    """n points (n, D), half of scale SMALL and half of scale LARGE."""
    small = torch.rand(n, 1, generator=generator) < 0.5
    return torch.where(small, SMALL, LARGE) * gaussian(n, generator)


def shell(n, generator, scale):
    """n points (n, D) of |x| = scale sqrt(D)."""
    return scale * D**0.5 * nn.functional.normalize(gaussian(n, generator))


# {data: {kind of point: sample(n, generator)}}; "normal" is what fields are trained on.
DATA = {
    "circle": {"normal": thick_circle, "off": partial(thick_circle, off=0.8)},
    "two scales": {
        "normal": two_scales,
        "larger": partial(gaussian, scale=2.0),
        "between": partial(gaussian, scale=0.85),
        "small": partial(shell, scale=SMALL),
        "large": partial(shell, scale=LARGE),
    },
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

    AdamW and a one-cycle rate; sample(n, generator) gives n points (n, D). Without gradients.
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
        loss = wtflow.flow_matching_loss(v_theta, x_0, couple, generator, t_max=t_max)
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


class OneStep(NamedTuple):
    """One step from t = 0 under the REPEATS networks of one coupling.

    x: {kind: points (N, D)}; x1_hat: {kind: (REPEATS, N, D)}; conditional_mean: {kind: (N, D)},
    E[x_1 | x_0 = x], where the step of the exact time-conditioned field ends.
    """

    x: dict
    x1_hat: dict
    conditional_mean: dict

    def inward(self):
        """Part (REPEATS, N) of v_theta(x, 0) towards the origin at normal points."""
        x = self.x["normal"]
        v = self.x1_hat["normal"] - x
        return -(v * x).sum(-1) / np.linalg.norm(x, axis=-1)

    def score(self, kind, residual):
        """|x1_hat| (REPEATS, N), or if residual |r|, r = v_theta(x, 0) - u_0(x) (W6)."""
        centre = self.conditional_mean[kind] if residual else 0.0
        return np.linalg.norm(self.x1_hat[kind] - centre, axis=-1)

    def auroc(self, kind, residual):
        """AUROC of `kind` by that score: mean over networks, standard error."""
        scores = (self.score(k, residual) for k in ("normal", kind))
        return mean_se([auroc(*pair) for pair in zip(*scores, strict=True)])


def auroc(normal, anomalous):
    """P(normal < anomalous) for scores (N,) and (M,), ties one half."""
    ordered = np.sort(normal)
    below = np.searchsorted(ordered, anomalous)
    not_above = np.searchsorted(ordered, anomalous, "right")
    return float((below + not_above).mean() / 2 / len(ordered))


def exact_auroc(data, mode, rho, fit, kind, residual):
    """AUROC of `kind` in the OneStep `fit` if v_theta were exact, nan where that is not known (W6).

    One half if time-conditioned, as the score is the same at all points; near t = 0 to first order;
    time-unconditional for the two scales and rFM, by B3's field.
    """
    scores = []
    for name in ("normal", kind):
        x = fit.x[name]
        centre = np.zeros_like(x) if residual else fit.conditional_mean[name]
        if mode == "time-conditioned":
            scores.append(np.linalg.norm(centre, axis=1).round(3))
        elif mode == f"t < {EARLY}":
            grad_log_q = thick_circle_grad_log_q if data == "circle" else two_scales_grad_log_q
            first_order = early_residual(x, grad_log_q(x), rho, EARLY)
            scores.append(np.linalg.norm(centre + first_order, axis=1))
        elif mode == "time-unconditional" and data == "two scales" and rho == 0:
            radius = np.linalg.norm(x, axis=1)
            grid = np.linspace(radius.min(), radius.max(), 60)
            velocity = radial_field(grid, x.shape[1], (SMALL, LARGE))
            scores.append(np.abs(radius + np.interp(radius, grid, velocity)))
        else:
            return np.nan
    return auroc(*scores)


def experiment(data, mode, rhos=RHOS, linear=False):
    """(b) {rho: OneStep} of fields trained on `data` (of DATA) in `mode` (of MODES).

    linear: the Gaussian coupling x_1 = -rho x_0 + sqrt(1 - rho^2) z in place of wtflow.worst; its
    u_0 = -(1 + rho) x is linear.
    """
    if linear:
        couplings = [partial(gaussian_coupling, s=1.0, rho=rho) for rho in rhos]
    else:
        couplings = [partial(wtflow.worst, rho=rho) for rho in rhos]
    repeated = [couple for couple in couplings for _ in range(REPEATS)]
    v_theta = train(DATA[data]["normal"], repeated, SEED, *MODES[mode])
    generator = torch.Generator().manual_seed(1000 + SEED)  # not the points of the training
    x = {kind: sample(POINTS, generator) for kind, sample in DATA[data].items()}
    x1_hat = {
        kind: wtflow.euler(v_theta, points.repeat(len(repeated), 1))
        .view(len(rhos), REPEATS, POINTS, D)
        .numpy()
        for kind, points in x.items()
    }
    results = {}
    for k, rho in enumerate(rhos):
        conditional_mean = {
            kind: (-rho * points if linear else wtflow.conditional_mean(points, rho)).numpy()
            for kind, points in x.items()
        }
        points = {kind: values.numpy() for kind, values in x.items()}
        ends = {kind: y[k] for kind, y in x1_hat.items()}
        results[rho] = OneStep(points, ends, conditional_mean)
    return results


def run():
    """What table and figure share: {data: error_by_time} and {(data, mode): {rho: OneStep}}."""
    generator = torch.Generator().manual_seed(SEED)
    errors = {}
    for name, sample, exact in (
        ("circle", circle, circle_field),
        ("N(0, I)", gaussian, gaussian_field),
    ):
        v_theta = train(sample, [wtflow.independent], SEED)
        errors[name] = error_by_time(v_theta, sample, exact, generator)
    results = {}
    for mode in MODES:
        results["circle", mode] = experiment("circle", mode)
        results["two scales", mode] = experiment("two scales", mode, (0.0, 0.9))
    for data, mode in (("circle", "time-conditioned"), ("two scales", f"t < {EARLY}")):
        results[data, f"{mode}, linear u_0"] = experiment(data, mode, (0.9,), linear=True)
    return errors, results


# ---- Table ------------------------------------------------------------------------------------
def table(errors, results):
    """Rows for (a) and (b) of what run returns.

    `predicted` is the value of the exact field, nan where it is not known. Standard errors are over
    points in (a), over networks in (b).
    """
    for name, bins in errors.items():
        yield Row("S3", f"learnt: mean square error / d at t < 0.02, {name}", 0, *bins[0])
        yield Row("S3", f"learnt:   at 0.4 < t < 0.7, {name}", 0, *bins[-2])
    for rho, fit in results["circle", "time-conditioned"].items():
        what = f"learnt: inward part of v_theta(x, 0), time-conditioned, rho={rho:g}"
        inward = mean_se(fit.inward().mean(1))
        yield Row("W5", what, initial_radius() + rho * RADIUS, *inward)
    yield from rows_of_energy(results)
    for (data, mode), fields in results.items():
        for rho, fit in fields.items():
            yield from rows_of_scores(data, mode, rho, fit)


def rows_of_energy(results):
    """B3: |x1_hat| of points of the small and of the large scale under rFM's fields."""
    for kind, scale in (("small", SMALL), ("large", LARGE)):
        radius = scale * D**0.5
        unconditional = radius + radial_field(radius, D, (SMALL, LARGE))[0]
        for mode, exact in (("time-conditioned", 0.0), ("time-unconditional", unconditional)):
            ends = results["two scales", mode][0.0].score(kind, False)
            what = f"learnt: |x1_hat| from |x| = {radius:.2f} ({kind}), {mode}"
            yield Row("B3", what, exact, *mean_se(ends.mean(1)))


def rows_of_scores(data, mode, rho, fit):
    """W6: how well the scores of a OneStep separate anomalies from normal points."""
    for kind in {"circle": ("off",), "two scales": ("larger", "between")}[data]:
        for name, residual in (("|x1_hat|", False), ("|r|", True)):
            exact = exact_auroc(data, mode, rho, fit, kind, residual)
            what = f"learnt: AUROC of {name}, {kind}, {mode}, rho={rho:g}"
            yield Row("W6", what, exact, *fit.auroc(kind, residual))
