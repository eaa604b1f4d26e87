"""S3, C2, W3, W4 in a field that is learnt with wtflow's own loss, where the exact field is known. Data 0, noise 1.

Data in R^16 at m2 = d: a circle (degenerate: 1 dimension) and N(0, I) (full-dimensional) for the error by time; the
circle with N(0, 0.2^2 I) about it, off which a point may lie more or less far, for one-step inference. v_theta is a
small network [ours]; the loss, path and couplings are wtflow's. What was found, and how far it carries: README.md.
"""
from functools import partial

import numpy as np
import torch
from scipy.special import ive
from torch import nn

import wtflow
from theory import COLOURS, Row, mean_se, panels
from theory.singularity import pairs, slope
from theory.worst_transport import a, initial_field

D, RADIUS, THICKNESS, WIDTH, STEPS, BATCH = 16, 4.0, 0.2, 128, 1500, 256
CANDIDATES = (1, 4, 16, 64, 256)
OFFSETS = (0.2, 0.4, 0.8, 1.6)
EDGES = np.array([0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0])


def circle(n, generator, off=0.0):
    """n points (n, D) of the circle |x_0| = RADIUS in the first two axes, moved `off` along a random normal direction."""
    angle = 2 * torch.pi * torch.rand(n, 1, generator=generator)
    normal = nn.functional.normalize(torch.randn(n, D - 2, generator=generator))
    return torch.cat([RADIUS * angle.cos(), RADIUS * angle.sin(), off * normal], 1)


def thick_circle(n, generator, off=0.0):
    """The same with N(0, THICKNESS^2 I) added: normal points have a density, as features have."""
    return circle(n, generator, off) + THICKNESS * torch.randn(n, D, generator=generator)


def gaussian(n, generator):
    """n points (n, D) of N(0, I)."""
    return torch.randn(n, D, generator=generator)


def circle_field(x, t):
    """u_t(x) (N, D) of rFM for the circle: E[x_0|x_t=x] = RADIUS I_1(k)/I_0(k) y/|y|, k = (1-t) RADIUS |y| / t^2; t (N,) > 0.

    y is x in the plane of the circle; I_0, I_1 are modified Bessel functions (the von Mises mean). [derived]
    """
    y = x[:, :2]
    r, t = np.linalg.norm(y, axis=1), np.asarray(t)
    k = (1 - t) * RADIUS * r / t ** 2
    mean = np.zeros_like(x)
    mean[:, :2] = (RADIUS * ive(1, k) / ive(0, k) / r)[:, None] * y
    return (x - mean) / t[:, None]


class Field(nn.Module):
    """v_theta(x, t): (N, D), (N,) -> (N, D); three layers. timed=False is a field not told t."""

    def __init__(self, timed=True):
        super().__init__()
        self.timed = timed
        self.net = nn.Sequential(nn.Linear(D + 32 * timed, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, D))

    def forward(self, x, t):
        return self.net(torch.cat([x, wtflow.sinusoid(t, 32)], 1) if self.timed else x)


def train(sample, couple, seed, timed=True, steps=STEPS):
    """A Field fitted to `sample` under `couple` by wtflow.flow_matching_loss, AdamW and a one-cycle rate."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    v_theta = Field(timed)
    optimiser = torch.optim.AdamW(v_theta.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    for _ in range(steps):
        optimiser.zero_grad()
        wtflow.flow_matching_loss(v_theta, sample(BATCH, generator), couple, generator).mean().backward()
        optimiser.step()
        schedule.step()
    return v_theta.requires_grad_(False)


def error_by_time(v_theta, sample, exact, generator, n=2000):
    """(a) Mean |v_theta(x_t, t) - u_t(x_t)|^2 / d and its standard error in each bin of EDGES; exact(x, t) is u_t."""
    out = []
    for low, high in zip(EDGES, EDGES[1:]):
        t = low + (high - low) * (0.01 + 0.99 * torch.rand(n, generator=generator))
        x_0 = sample(n, generator)
        x_t = wtflow.path(x_0, wtflow.independent(x_0, generator), t)
        u_t = exact(x_t.double().numpy(), t.double().numpy())
        out.append(mean_se(((v_theta(x_t, t).numpy() - u_t) ** 2).mean(1)))
    return np.array(out)


def landing(v_theta, x):
    """(c) |x1_hat| (N,) after one step from t = 0."""
    return wtflow.euler(v_theta, x).norm(dim=1).numpy()


def residual(v_theta, x, n):
    """(c) |v_theta(x, 0) - u_0(x)| (N,): x1_hat measured from where the exact field sends x, -a_n x/|x|, not from 0. [ours]"""
    v = v_theta(x, torch.zeros(len(x))).double().numpy()
    return np.linalg.norm(v - initial_field(x.double().numpy(), n), axis=1)


def auroc(normal, anomalous):
    """P(normal < anomalous), ties one half."""
    s = np.sort(normal)
    return float((np.searchsorted(s, anomalous) + np.searchsorted(s, anomalous, "right")).mean() / 2 / len(s))


def experiment(seed=0, timed=True, candidates=CANDIDATES):
    """(b, c) Fields on the thick circle: {n: (inward part of v_theta(x, 0), {offset: |x1_hat|}, {offset: residual})}; 0 is normal."""
    out = {}
    for n in candidates:
        v_theta = train(thick_circle, partial(wtflow.worst, n=n), seed, timed)
        generator = torch.Generator().manual_seed(1000 + seed)
        points = {r: thick_circle(2000, generator, r) for r in (0.0, *OFFSETS)}
        x = points[0.0]
        inward = -(v_theta(x, torch.zeros(len(x))) * x).sum(1) / x.norm(dim=1)
        out[n] = inward.numpy(), {r: landing(v_theta, x) for r, x in points.items()}, {r: residual(v_theta, x, n) for r, x in points.items()}
    return out


def run(seed=0):
    """What table and figure share: (errors by time {name: (bins, 2)}, {told t: experiment})."""
    generator = torch.Generator().manual_seed(seed)
    ring, ball = train(circle, wtflow.independent, seed), train(gaussian, wtflow.independent, seed)
    errors = {"circle": error_by_time(ring, circle, circle_field, generator),
              "N(0, I)": error_by_time(ball, gaussian, lambda x, t: slope(t, 1.0)[:, None] * x, generator)}
    return errors, {True: experiment(seed), False: experiment(seed, timed=False, candidates=(1, 64))}


def table(errors, results):
    """Rows for (a), (b), (c). `predicted` is the exact field's value: how far v_theta is from it is the finding."""
    for name, bins in errors.items():
        yield Row("S3", f"learnt: mean square error / d at t < 0.02, {name}", 0, *bins[0])
        yield Row("S3", f"learnt:   at 0.4 < t < 0.7, {name}", 0, *bins[-2])
    radius = (RADIUS ** 2 + D * THICKNESS ** 2) ** 0.5
    for told, fields in results.items():
        for n, (inward, radius_hat, rest) in fields.items():
            name = f"n={n}" + ("" if told else ", not told t")
            if told:
                yield Row("W3" if n > 1 else "C2", f"learnt: inward part of v_theta(x, 0), {name}", radius + a(n), *mean_se(inward))
                yield Row("W4", f"learnt: |x1_hat| of normal points, {name}", a(n), *mean_se(radius_hat[0.0]))
            # 0.5 is what the exact field gives at t = 0: it sends normal and anomalous points to the same radius.
            for score, value in (("|x1_hat|", auroc(radius_hat[0.0], radius_hat[0.8])), ("|v_theta-u_0|", auroc(rest[0.0], rest[0.8]))):
                yield Row("W4", f"learnt: AUROC of {score} at distance 0.8, {name}", 0.5, value, (value * (1 - value) / 2000) ** 0.5)


def figure(errors, results):
    """(a) error by t; (b) v_theta(x, 0) against the exact field; (c) landing radius and AUROC by distance and n."""
    fig, axes = panels(2, 3, 4.4, 3.6)
    for (name, bins), colour in zip(errors.items(), (COLOURS[3], COLOURS[0])):
        axes[0].errorbar(range(len(bins)), bins[:, 0], 2 * bins[:, 1], marker="o", capsize=2, color=colour, label=name)
    axes[0].set_xticks(range(len(EDGES) - 1), [f"{low:g}-{high:g}" for low, high in zip(EDGES, EDGES[1:])], rotation=45)
    axes[0].set(yscale="log", xlabel="$t$", ylabel="$E|v_\\theta-u_t|^2/d$", title="(a) error of the learnt rFM field")
    told, n = results[True], list(results[True])
    axes[1].plot(n, [(RADIUS ** 2 + D * THICKNESS ** 2) ** 0.5 + a(k) for k in n], "k--", label="exact: $|x|+a_n$")
    axes[1].plot(n, [told[k][0].mean() for k in n], "o", color=COLOURS[0], label="learnt, inward part of $v_\\theta(x,0)$")
    axes[1].plot(n, [a(k) for k in n], "k:", label="exact: $|\\hat x_1|=a_n$")
    axes[1].plot(n, [told[k][1][0.0].mean() for k in n], "s", color=COLOURS[3], label="learnt, $|\\hat x_1|$, normal points")
    axes[1].set(xscale="log", ylim=(0, 11), xlabel="candidates $n$ (1: rFM)", title="(b) at $t=0$, thick circle")
    for (k, (_, radius_hat, rest)), colour in zip(told.items(), COLOURS):
        axes[2].plot([0.0, *OFFSETS], [v.mean() for v in radius_hat.values()], "o-", color=colour, label=f"$n={k}$")
        axes[3].plot(OFFSETS, [auroc(radius_hat[0.0], radius_hat[r]) for r in OFFSETS], "o-", color=colour, label=f"$n={k}$")
        axes[4].plot(OFFSETS, [auroc(rest[0.0], rest[r]) for r in OFFSETS], "o-", color=colour, label=f"$n={k}$")
    for (k, (_, radius_hat, rest)), colour in zip(results[False].items(), (COLOURS[0], COLOURS[3])):
        axes[3].plot(OFFSETS, [auroc(radius_hat[0.0], radius_hat[r]) for r in OFFSETS], "s:", color=colour, label=f"$n={k}$, not told $t$")
    axes[2].axhline(D ** 0.5, color="0.5", ls=":")
    axes[2].set(ylim=(1, 6), xlabel="distance off the thick circle (0: normal)", ylabel="mean $|\\hat x_1|$", title="(c) landing radius; dotted: shell $\\sqrt{d}$")
    axes[3].set(ylim=(0.4, 1.02), xlabel="distance off", ylabel="AUROC", title="(c) by $|\\hat x_1|$")
    axes[4].set(ylim=(0.4, 1.02), xlabel="distance off", ylabel="AUROC", title="(c) by $|v_\\theta(x,0)-u_0(x)|$")
    for score, k, colour in (("$|\\hat x_1|$", 1, COLOURS[3]), ("$|v_\\theta(x,0)-u_0(x)|$", 2, COLOURS[0])):
        axes[5].plot(n, [auroc(told[m][k][0.0], told[m][k][0.8]) for m in n], "o-", color=colour, label=score)
    axes[5].set(xscale="log", ylim=(0.7, 1), xlabel="candidates $n$ (1: rFM)", ylabel="AUROC", title="(c) at distance 0.8")
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    return fig
