"""A field learnt with wtflow's own loss, where the exact one is known: S3, C2, W5, B2, B3, W6.

Data at 0, noise at 1, in R^16 at m2 = d. (a) A circle (degenerate: 1 dimension) and N(0, I), the
error by time. (b) One step from t = 0 by strength and by what is known of t: the circle with
N(0, 0.2^2 I) about it, off which a point may lie, and two scales, BACKGROUND and OBJECT of B3, with
points louder than both or between them. v_theta is a small network [ours]; the loss, path and
couplings are wtflow's. What was found, how far it carries: README.md. Figure:
draw.learned_field_figure.
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
from theory.blind_field import BACKGROUND, OBJECT, radial_field
from theory.singularity import slope
from theory.strength import mismatch
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
# The measurements: strengths of the coupling, networks for each, edges of the bins of t.
STRENGTHS = (-0.9, 0.0, 0.5, 0.9, 0.97)
REPEATS = 3
EDGES = np.array([0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0])
POINTS = 2000  # measured in each bin of t and of each kind
EARLY = 0.05
MODES = {  # whether the field is told t; the range of t
    "told t": (True, 1.0),
    "not told t": (False, 1.0),
    f"t < {EARLY}": (False, EARLY),
}


# ---- Closed forms -----------------------------------------------------------------------------
def circle_field(x, t):
    """u_t(x) (N, D) of rFM for the circle; t (N,), 0 < t <= 1 (S3). [derived]

    E[x_0 | x_t = x] = RADIUS I_1(k) / I_0(k) y/|y| (the mean of a von Mises law), y the part of x
    in the plane of the circle, k = (1-t) RADIUS |y| / t^2, I_0 and I_1 modified Bessel functions.
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


def thick_circle_score(x):
    """grad log q (N, D) of the thick circle: (E[point of the circle | x] - x) / THICKNESS^2."""
    return (mean_on_circle(x, THICKNESS**-2) - x) / THICKNESS**2


def two_scales_score(x):
    """grad log q (N, d) of the two scales: -x over the scales^2, weighted as they are likely."""
    scales = np.array([BACKGROUND, OBJECT])
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
    """n points (n, D), `off` the circle |x_0| = RADIUS in the first two axes, along a normal."""
    angle = 2 * torch.pi * torch.rand(n, 1, generator=generator)
    direction = nn.functional.normalize(torch.randn(n, D - 2, generator=generator))
    return torch.cat([RADIUS * angle.cos(), RADIUS * angle.sin(), off * direction], 1)


def thick_circle(n, generator, off=0.0):
    """The same with N(0, THICKNESS^2 I) added: normal points have a density, as features have."""
    return circle(n, generator, off) + THICKNESS * torch.randn(n, D, generator=generator)


def gaussian(n, generator, scale=1.0):
    """n points (n, D) of N(0, scale^2 I)."""
    return scale * torch.randn(n, D, generator=generator)


def two_scales(n, generator):
    """n points (n, D), half of scale BACKGROUND and half of scale OBJECT."""
    low = torch.rand(n, 1, generator=generator) < 0.5
    return torch.where(low, BACKGROUND, OBJECT) * gaussian(n, generator)


def shell(n, generator, scale):
    """n points (n, D) of |x| = scale sqrt(D)."""
    return scale * D**0.5 * nn.functional.normalize(gaussian(n, generator))


# {data: {kind of point: sample(n, generator)}}; "normal" is what fields are trained on.
DATA = {
    "circle": {"normal": thick_circle, "off": partial(thick_circle, off=0.8)},
    "two scales": {
        "normal": two_scales,
        "louder": partial(gaussian, scale=2.0),
        "between": partial(gaussian, scale=0.85),
        "background": partial(shell, scale=BACKGROUND),
        "object": partial(shell, scale=OBJECT),
    },
}


class Fields(nn.Module):
    """`count` networks v_theta side by side, no weight shared: (count N, D), (count N,) -> same.

    Three layers each; timed=False is a field not told t.
    """

    def __init__(self, count, timed=True):
        super().__init__()
        self.count, self.timed = count, timed
        sizes = (D + TIME_WIDTH * timed, WIDTH, WIDTH, D)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in pairwise(sizes):
            bound = a**-0.5
            self.weights.append(torch.empty(count, a, b).uniform_(-bound, bound))
            self.biases.append(torch.empty(count, 1, b).uniform_(-bound, bound))

    def forward(self, x, t):
        y = torch.cat([x, wtflow.sinusoid(t, TIME_WIDTH)], 1) if self.timed else x
        y = y.view(self.count, -1, y.shape[1])
        for k, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            y = torch.baddbmm(bias, nn.functional.silu(y) if k else y, weight)
        return y.reshape(x.shape)


def train(sample, couplings, seed, timed=True, t_max=1.0, steps=STEPS):
    """Fields fitted to `sample`, one for each of `couplings`, by wtflow.flow_matching_loss.

    AdamW and a one-cycle rate; sample(n, generator) gives n points (n, D). Without gradients.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    count = len(couplings)
    v_theta = Fields(count, timed)
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
        # The lowest 1 % of a bin is left out: u_0 of the circle is not defined.
        t = low + (high - low) * (0.01 + 0.99 * torch.rand(n, generator=generator))
        x_0 = sample(n, generator)
        x_t = wtflow.path(x_0, wtflow.independent(x_0, generator), t)
        u_t = exact(x_t.double().numpy(), t.double().numpy())
        bins.append(mean_se(((v_theta(x_t, t).numpy() - u_t) ** 2).mean(1)))
    return np.array(bins)


class OneStep(NamedTuple):
    """Where one step from t = 0 takes points under the REPEATS networks of one coupling.

    x: {kind: points (N, D)}; x1_hat: {kind: (REPEATS, N, D)}; exact: {kind: (N, D)}, the landing
    points of the exact field told t.
    """

    x: dict
    x1_hat: dict
    exact: dict

    def inward(self):
        """Part (REPEATS, N) of v_theta(x, 0) towards the origin at normal points."""
        x = self.x["normal"]
        v = self.x1_hat["normal"] - x
        return -(v * x).sum(-1) / np.linalg.norm(x, axis=-1)

    def distance(self, kind, from_landing):
        """|x1_hat| (REPEATS, N), or |x1_hat - exact| = |v_theta(x, 0) - u_0(x)| (W6)."""
        centre = self.exact[kind] if from_landing else 0.0
        return np.linalg.norm(self.x1_hat[kind] - centre, axis=-1)

    def auroc(self, kind, from_landing):
        """AUROC of `kind` by that distance: mean over networks, standard error."""
        scores = (self.distance(k, from_landing) for k in ("normal", kind))
        return mean_se([auroc(*pair) for pair in zip(*scores, strict=True)])


def auroc(normal, anomalous):
    """P(normal < anomalous) for scores (N,) and (M,), ties one half."""
    ordered = np.sort(normal)
    below = np.searchsorted(ordered, anomalous)
    not_above = np.searchsorted(ordered, anomalous, "right")
    return float((below + not_above).mean() / 2 / len(ordered))


def exact_auroc(data, mode, rho, fit, kind, from_landing):
    """AUROC of `kind` in the OneStep `fit` if v_theta were exact, nan where that is not known (W6).

    One half if it is told t, as all points land where they are measured from or as far from it;
    near t = 0 to first order; not told t, by Gauss's law for the two scales and rFM (B3).
    """
    landed = []
    for name in ("normal", kind):
        x = fit.x[name]
        centre = np.zeros_like(x) if from_landing else fit.exact[name]
        if mode == "told t":
            landed.append(np.linalg.norm(centre, axis=1).round(3))
        elif mode == f"t < {EARLY}":
            score = thick_circle_score(x) if data == "circle" else two_scales_score(x)
            landed.append(np.linalg.norm(centre + mismatch(x, score, rho, EARLY), axis=1))
        elif mode == "not told t" and data == "two scales" and rho == 0:
            radius = np.linalg.norm(x, axis=1)
            grid = np.linspace(radius.min(), radius.max(), 60)
            velocity = radial_field(grid, x.shape[1], (BACKGROUND, OBJECT))
            landed.append(np.abs(radius + np.interp(radius, grid, velocity)))
        else:
            return np.nan
    return auroc(*landed)


def experiment(data, mode, strengths=STRENGTHS, straight=False, seed=0):
    """(b) {rho: OneStep} of fields trained on `data` (of DATA) in `mode` (of MODES).

    straight: the Gaussian coupling x_1 = -rho x_0 + sqrt(1 - rho^2) z in place of wtflow.worst,
    whose u_0 = -(1 + rho) x is linear.
    """
    if straight:
        couplings = [partial(gaussian_coupling, s=1.0, rho=rho) for rho in strengths]
    else:
        couplings = [partial(wtflow.worst, rho=rho) for rho in strengths]
    repeated = [couple for couple in couplings for _ in range(REPEATS)]
    v_theta = train(DATA[data]["normal"], repeated, seed, *MODES[mode])
    generator = torch.Generator().manual_seed(1000 + seed)  # not the points of the training
    x = {kind: sample(POINTS, generator) for kind, sample in DATA[data].items()}
    x1_hat = {
        kind: wtflow.euler(v_theta, points.repeat(len(repeated), 1))
        .view(len(strengths), REPEATS, POINTS, D)
        .numpy()
        for kind, points in x.items()
    }
    results = {}
    for k, rho in enumerate(strengths):
        exact = {
            kind: (-rho * points if straight else wtflow.landing(points, rho)).numpy()
            for kind, points in x.items()
        }
        points = {kind: values.numpy() for kind, values in x.items()}
        results[rho] = OneStep(points, {kind: y[k] for kind, y in x1_hat.items()}, exact)
    return results


def run(seed=0):
    """What table and figure share: {data: error_by_time} and {(data, mode): {rho: OneStep}}."""
    generator = torch.Generator().manual_seed(seed)
    errors = {}
    for name, sample, exact in (
        ("circle", circle, circle_field),
        ("N(0, I)", gaussian, gaussian_field),
    ):
        v_theta = train(sample, [wtflow.independent], seed)
        errors[name] = error_by_time(v_theta, sample, exact, generator)
    results = {}
    for mode in MODES:
        results["circle", mode] = experiment("circle", mode, seed=seed)
        results["two scales", mode] = experiment("two scales", mode, (0.0, 0.9), seed=seed)
    results["circle", "told t, straight"] = experiment("circle", "told t", (0.9,), True, seed)
    near = experiment("two scales", "t < 0.05", (0.9,), True, seed)
    results["two scales", "t < 0.05, straight"] = near
    return errors, results


# ---- Table ------------------------------------------------------------------------------------
def table(errors, results):
    """Rows for (a) and (b) of what run returns.

    `predicted` is the exact field's value, nan where it is not known: how far v_theta is from it is
    the finding. Standard errors are over points in (a), over networks in (b).
    """
    for name, bins in errors.items():
        yield Row("S3", f"learnt: mean square error / d at t < 0.02, {name}", 0, *bins[0])
        yield Row("S3", f"learnt:   at 0.4 < t < 0.7, {name}", 0, *bins[-2])
    for rho, fit in results["circle", "told t"].items():
        what = f"learnt: inward part of v_theta(x, 0), told t, rho={rho:g}"
        inward = mean_se(fit.inward().mean(1))
        yield Row("W5", what, initial_radius() + rho * RADIUS, *inward)
    yield from rows_of_energy(results)
    for (data, mode), fields in results.items():
        for rho, fit in fields.items():
            yield from rows_of_scores(data, mode, rho, fit)


def rows_of_energy(results):
    """B3: where rFM's fields send points of low and of high energy."""
    for kind, scale in (("background", BACKGROUND), ("object", OBJECT)):
        radius = scale * D**0.5
        blind = radius + radial_field(radius, D, (BACKGROUND, OBJECT))[0]
        for mode, exact in (("told t", 0.0), ("not told t", blind)):
            landed = results["two scales", mode][0.0].distance(kind, False)
            what = f"learnt: |x1_hat| from |x| = {radius:.2f} ({kind}), {mode}"
            yield Row("B3", what, exact, *mean_se(landed.mean(1)))


def rows_of_scores(data, mode, rho, fit):
    """W6: how well the scores of a OneStep tell points from normal ones."""
    for kind in {"circle": ("off",), "two scales": ("louder", "between")}[data]:
        for place in ("origin", "landing"):
            exact = exact_auroc(data, mode, rho, fit, kind, place == "landing")
            area = fit.auroc(kind, place == "landing")
            what = f"learnt: AUROC, {kind}, from {place}, {mode}, rho={rho:g}"
            yield Row("W6", what, exact, *area)
