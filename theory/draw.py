"""The figures of README.md: one function of matplotlib each, no window system, no file written.

A figure is built of panels, functions that fill one axis. What is drawn is computed by the claim
files; nothing is claimed here. Dots are estimates, lines closed forms, unless a title says other.
"""

from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure

import wtflow
from theory import (
    concentration,
    exponent,
    learned_field,
    local_transport,
    normal,
    one_step,
    singularity,
    unconditional_field,
    worst_transport,
)
from theory.singularity import pairs, peak, slope
from theory.unconditional_field import LARGE, SMALL, in_shell, pairs_at_any_time, radial_field

# Okabe & Ito's palette: distinct with any colour vision, and in this order also in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
BLUE, ORANGE, GREEN, RED = COLOURS[:4]


def panels(rows, columns, width=4.6, height=3.4):
    """A figure of panels, width x height inches each, and their axes in reading order."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def figure_of(fill, *args):
    """A figure of one panel for each function of `fill`, which gets its axis and args."""
    figure, axes = panels(1, len(fill))
    for one, axis in zip(fill, axes, strict=True):
        one(axis, *args)
    return figure


def coloured(items):
    """(item, colour) for each item; no more items than colours."""
    return zip(items, COLOURS, strict=False)


def dots(axis, x, y, colour, label=None, size=4):
    """Estimates y at x as dots of `size` points."""
    axis.plot(x, y, "o", ms=size, color=colour, label=label)


def label(axis, x, y, title, loc="best", log="", **options):
    """Name axes and curves of a panel that is filled; log: "x", "y"; options: those of axis.set."""
    axis.set(xlabel=x, ylabel=y, title=title, **{f"{one}scale": "log" for one in log}, **options)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8, loc=loc)


def seeded():
    return torch.Generator().manual_seed(0)


def slopes(x_0, couple, times, generator):
    """Slope of u on x_t at each of `times`, from wtflow pairs."""
    return [singularity.fitted_slope(*pairs(x_0, couple, t, generator))[0] for t in times]


# ---- S: singularity.py ------------------------------------------------------------------------
def slope_over_time(axis, generator):
    """S2 for N(0, s^2 I), beside the 1/t of S1."""
    z = normal(generator, 20_000, 8)
    t, times = np.geomspace(1e-3, 1, 400), np.geomspace(1e-3, 1, 13)
    for s, colour in coloured((1.0, 0.1, 0.01)):
        axis.plot(t, slope(t, s), color=colour)
        measured = slopes(s * z, wtflow.independent, times, generator)
        dots(axis, times, measured, colour, f"$s={s:g}$, peak $(1+s^2)/2s={peak(s)[1]:.3g}$")
    axis.plot(t, 1 / t, ":", color="0.5", label="$1/t$, the conditional field")
    y, title = "slope $a(t)$ of $u_t(x)=a(t)\\,x$", "S2: $q=N(0,s^2I)$; dots: wtflow pairs"
    label(axis, "$t$", y, title, "upper right", "x", yscale="symlog", ylim=(-2, 1e5))


def slope_at_two_atoms(axis, generator):
    """S2 for a training set of two points: 1/t off it, t^-3 midway."""
    t, e, atoms = np.geomspace(1e-4, 0.3, 25), singularity.ATOM_AXIS, singularity.ATOMS
    in_range = t <= singularity.POWER_LAW_TIMES[-1]
    between = -singularity.slope_between_atoms(t, singularity.ATOM_RADIUS)
    for name, x, sign, power, line, colour in (
        ("off", singularity.OFF, 1, -1, 1 / t, BLUE),
        ("midway", singularity.MIDWAY, -1, -3, between, RED),
    ):
        y = np.array([sign * singularity.autograd_slope(k, atoms, 0.0, x, e) for k in t])
        fitted, _ = exponent(t[in_range], y[in_range])
        dots(axis, t, y, colour, f"{name}: fitted {fitted:.3f}, predicted {power}")
        axis.plot(t, line, color=colour)
    y, title = "|slope| of $u_t$", "S2: two atoms $\\pm e$; lines: closed form"
    label(axis, "$t$", y, title, "upper right", "xy", ylim=(1, 1e17))


def growth_of_an_error(axis, generator):
    """S3: two solutions of the flow that start a little apart."""
    t, times = np.geomspace(1e-3, 1, 400), np.geomspace(1e-3, 0.9, 10)
    for s, colour in coloured((1.0, 0.1, 0.01, 0.0)):
        axis.plot(t, singularity.amplification(t, s), color=colour)
        start = np.array([1e-3, 0.0]), np.zeros((1, 2))
        measured = [singularity.grown(start[0], t_0, start[1], s) for t_0 in times]
        dots(axis, times, measured, colour, f"$s={s:g}$" if s else "point mass: $1/t_0$")
    x, y = "$t_0$, when the error is made", "error at $t=1$ / error at $t_0$"
    title = "S3: dots: two ODE solutions; lines: $1/\\sigma_{t_0}$"
    label(axis, x, y, title, log="xy")


# ---- C: concentration.py ----------------------------------------------------------------------
def norms_over_time(axis, generator):
    """C1, C3: |x_t| / sqrt(d) along 25 paths each."""
    t = np.linspace(0, 1, 101)
    for d, colour in coloured((2, 16, 256, 4096)):
        x_0 = concentration.shell(25, d, generator)
        x_1 = wtflow.independent(x_0, generator)
        points = [wtflow.path(x_0, x_1, torch.full((25,), k)) for k in t]
        norms = np.stack([x_t.norm(dim=1) / d**0.5 for x_t in points])
        axis.plot(t, norms, color=colour, lw=0.5, alpha=0.5)
        axis.plot([], [], color=colour, label=f"$d={d}$")
    axis.plot(t, np.sqrt((1 - t) ** 2 + t**2), "k--", label="$\\sqrt{E|x_t|^2/d}$")
    title = "C1, C3: paths from and to the shell $\\sqrt{d}$"
    label(axis, "$t$", "$|x_t|/\\sqrt{d}$", title, ylim=(0, 2))


def inward_share(axis, generator):
    """C3: share of the samples that move inwards at t."""
    t, times = np.linspace(0.01, 0.99, 99), np.linspace(0.05, 0.95, 13)
    for d, colour in coloured((2, 16, 256, 4096)):
        axis.plot(t, concentration.inward_probability(t, d, d), color=colour)
        x_0 = concentration.shell(1000, d, generator)
        radial = [concentration.radial_velocity(x_0, k, generator) for k in times]
        dots(axis, times, [(v < 0).double().mean() for v in radial], colour, f"$d={d}$")
    axis.axvline(0.5, color="k", ls=":", lw=1)
    y = "$P(\\langle x_t,u\\rangle<0)$"
    label(axis, "$t$", y, "C3: inward before $t^*=1/2$; lines: exact")


def dip_below_straight_line(axis, generator):
    """C4: sigma_t of rFM, and of OT, which is straight."""
    t = np.linspace(0, 1, 101)
    for s, colour in coloured((1.0, 0.3, 0.05)):
        x_0 = s * normal(generator, 4000, 16)
        name = f"$s={s:g}$: {concentration.kinetic_energy(s):.2f} against {(1 - s) ** 2:.2f}"
        axis.plot(t, singularity.variance(t, s) ** 0.5, color=colour, label=name)
        axis.plot(t, (1 - t) * s + t, "--", color=colour)
        points = [pairs(x_0, wtflow.independent, k, generator)[0] for k in t[::10]]
        dots(axis, t[::10], [x_t.square().mean() ** 0.5 for x_t in points], colour)
    title = "C4: rFM (dots: wtflow pairs) below OT (dashed)"
    label(axis, "$t$", "$\\sigma_t$", title)
    axis.get_legend().set_title("kinetic energy$/d$, rFM against OT")


# ---- W: worst_transport.py --------------------------------------------------------------------
def slope_by_correlation(axis, generator):
    """W2 for N(0, 0.3^2 I)."""
    s, t = 0.3, np.linspace(0, 1, 501)
    x_0 = s * normal(generator, 4000, 16)
    for rho, colour in coloured((0.0, 0.5, 0.9, 0.99)):
        name = f"$\\rho={rho:g}$: peak {peak(s, rho)[1]:.2f}"
        axis.plot(t, slope(t, s, rho), color=colour, label=name)
        couple = partial(singularity.gaussian_coupling, s=s, rho=rho)
        dots(axis, t[::25], slopes(x_0, couple, t[::25], generator), colour, size=3)
        axis.plot(*peak(s, rho), "v", color="k", ms=5)
    label(axis, "$t$", "slope $a(t)$", "W2: $N(0,0.3^2I)$; steeper at 0 and at the peak")


def fields_figure():
    """rFM, OT and WT in the plane: u_t near t = 0 (top), trajectories under u_t (bottom)."""
    generator = seeded()
    x_0 = arc(4096, generator)
    couplings = {
        "rFM (independent)": wtflow.independent,
        "OT (minibatch)": wtflow.optimal,
        "local WT, $n=16$": partial(worst_transport.worst_candidate, n=16),
        "WT (minibatch worst)": worst_transport.minibatch_worst,
    }
    figure, axes = panels(2, 4, 3.3)
    for top, bottom, (name, couple) in zip(axes[:4], axes[4:], couplings.items(), strict=True):
        x_1 = couple(x_0, generator)
        smoothed_field(top, x_0, x_1)
        top.set(title=name)
        t, paths = smoothed_paths(x_0, x_1)
        bottom.plot(*np.moveaxis(paths, -1, 0), color="0.6", lw=0.6, zorder=1)
        shown = {"c": np.repeat(t[::8], paths.shape[1]), "s": 5, "cmap": "viridis", "zorder": 2}
        coloured_by_time = bottom.scatter(*paths[::8].reshape(-1, 2).T, **shown)
    turn = np.linspace(0, 2 * np.pi, 200)
    for axis in axes:
        axis.plot(2**0.5 * np.cos(turn), 2**0.5 * np.sin(turn), ":", color=RED, lw=1.5)
        axis.plot(0, 0, "+", color="k")
        axis.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), aspect="equal")
    axes[0].set(ylabel="$u_t$ at $t=0.15$")
    axes[4].set(ylabel="paths under $u_t$")
    figure.colorbar(coloured_by_time, ax=axes[4:], label="$t$", shrink=0.8)
    title = "Data on an arc (grey: $x_t$); dotted: the shell $\\sqrt{d}$; arrows where data are"
    figure.suptitle(title, fontsize=10)
    return figure


def arc(n, generator):
    """n points (n, 2) about an arc of radius 1.6."""
    angle = 4 * torch.rand(n, generator=generator, dtype=torch.float64) - 0.4
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    return 1.6 * circle + 0.08 * normal(generator, n, 2)


def smoothed_velocity(x, x_0, x_1, t):
    """E[u | x_t = x] (N, 2) and log kernel mass (N,), from the pairs (x_0, x_1).

    The kernel is a sixteenth as wide as x_t along its narrower axis: paths pass a waist.
    """
    x_t = wtflow.path(x_0, x_1, torch.full((len(x_0),), t, dtype=x_0.dtype))
    narrow = torch.linalg.eigvalsh(torch.cov(x_t.T))[0].sqrt().item()
    return worst_transport.kernel_field(x, x_t.numpy(), (x_1 - x_0).numpy(), narrow / 16)


def smoothed_field(axis, x_0, x_1):
    """Arrows of u_t at t = 0.15 over points x_t of the loss."""
    t, ticks = 0.15, np.linspace(-2.8, 2.8, 23)
    grid = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    field, log_mass = smoothed_velocity(grid, x_0, x_1, t)
    dense = log_mass > 0  # elsewhere v_theta extrapolates
    x_t = wtflow.path(x_0, x_1, torch.full((len(x_0),), t, dtype=x_0.dtype))
    axis.scatter(*x_t[::8].T.numpy(), s=3, color="0.8")
    arrows = {"angles": "xy", "scale": 45, "width": 0.005}
    axis.quiver(*grid[dense].T, *field[dense].T, color=BLUE, **arrows)


def smoothed_paths(x_0, x_1, steps=128):
    """Times (steps + 1,) and Euler steps (steps + 1, 60, 2) of 60 points under that velocity."""
    times = np.linspace(0, 1, steps + 1)
    paths = [x_0[:60].numpy()]
    for t in times[:-1]:
        velocity, _ = smoothed_velocity(paths[-1], x_0, x_1, t + 0.5 / steps)
        paths.append(paths[-1] + velocity / steps)
    return times, np.stack(paths)


# ---- W5, W8, W9: local_transport.py -----------------------------------------------------------
def gain_by_rho(axis, generator):
    """W5: signal to noise at t = 0 over rFM's."""
    rho, gain = np.linspace(-0.97, 0.97, 300), local_transport.gain
    for ratio, colour in coloured((0.25, 1.0, 4.0)):
        axis.plot(rho, gain(rho, 1.0, ratio), color=colour, label=f"$|x|^2={ratio:g}\\,d$")
    axis.plot([0.9, 0.97], gain(np.array([0.9, 0.97]), 1.0, 1.0), "kv", ms=5)
    axis.axhline(1, color="0.5", ls=":")
    y, title = "signal-to-noise ratio over rFM's", "W5: triangles: 19 and 66 at $|x|^2=d$"
    label(axis, "$\\rho$", y, title, log="y", ylim=(1e-2, 1e3))


def ratio_by_length(axis, generator):
    """W8: at the t whose ratio is 1.5 on the shell."""
    length, few = np.linspace(0.7, 1.5, 100), np.linspace(0.7, 1.5, 9)
    e = torch.eye(16, dtype=torch.float64)[:1]
    for rho, colour in coloured((0.0, 0.25, 0.5)):
        t = local_transport.time_of_ratio(1.5, rho)
        axis.plot(length, local_transport.noise_to_signal(t, rho, length), color=colour)
        points = [(4 * k * e).expand(4000, 16) for k in few]
        ratios = [local_transport.ratio_of_pairs(x_0, t, rho, generator)[0] for x_0 in points]
        dots(axis, few, ratios, colour, f"$\\rho={rho:g}$, $t={t:.2f}$")
    x, title = "$|x_0|/\\sqrt{d}$", "W8: one clock on the shell; dots: wtflow.worst"
    label(axis, x, "noise to signal in $x_t$", title)


def spread_by_rho(axis, generator):
    """W9: v = 0, features of one scale for each position."""
    d, rho = 152, np.linspace(0, 0.97, 100)
    for tau, colour in coloured((0.0, 0.1, 0.19)):
        spread = [local_transport.score_spread(tau, d, k, d) for k in rho]
        axis.plot(rho, spread, color=colour)
        x = (tau * normal(generator, 4000, 1)).exp() * normal(generator, 4000, d)
        measured = [local_transport.log_scores(x, k).std() for k in rho[::11]]
        dots(axis, rho[::11], measured, colour, f"std of $\\log k$: {tau:g}")
    title = "W9: $v=0$, $d=152$: $\\rho$ discounts length"
    label(axis, "$\\rho$", "std of the log of the score", title, ylim=(0, 0.22))


# ---- B: unconditional_field.py ----------------------------------------------------------------
def mean_radii(x_t, u, edges):
    """Mean |x_t| and mean |x_t| + v_r in each shell between `edges` that has 50 points."""
    shells = [in_shell(x_t, u, *ends) for ends in zip(edges[:-1], edges[1:], strict=True)]
    return np.transpose([(r.mean(), (r + v).mean()) for r, v in shells if len(r) >= 50])


def x1_hat_off_data(axis, generator):
    """B1: data of thickness s across m = 20 directions; a time-conditioned field ends at 0."""
    m, delta = 20, np.geomspace(0.02, 8, 120)
    for s, colour in coloured((0.0, 0.05, 0.2)):
        axis.plot(delta, delta + radial_field(delta, m, (s,)), color=colour)
        points = pairs_at_any_time(s * normal(generator, 60_000, m), wtflow.independent, generator)
        name = f"thickness {s:g}" if s else "subspace"
        dots(axis, *mean_radii(*points, np.geomspace(0.03, 6, 14)), colour, name)
    axis.axhline(0, color="k", ls=":", label="time-conditioned: 0 (C2)")
    x, y = "distance $\\delta$ off the data", "$|\\hat x_1|$ across them"
    label(axis, x, y, "B1: $m=20$; dots: wtflow pairs", log="x", ylim=(-0.3, 8))


def x1_hat_by_radius(axis, generator):
    """B2, B3: N(0, I) is not moved; of two scales the small one moves outwards."""
    d, r = 16, np.linspace(0.8, 7.5, 80)
    for scales, colour in coloured(((1.0,), (SMALL, LARGE))):
        axis.plot(r / 4, (r + radial_field(r, d, scales)) / 4, color=colour)
        x_0 = unconditional_field.scales_mixture(60_000, d, scales, generator)
        points = pairs_at_any_time(x_0, wtflow.independent, generator)
        name = "B3: half of scale 0.5, half of 1.32" if len(scales) > 1 else "B2: $N(0,I)$"
        dots(axis, *mean_radii(*points, np.linspace(1, 7, 16)) / 4, colour, name)
    axis.axhline(0, color="k", ls=":", label="time-conditioned: 0 (C2)")
    x, y = "$|x|/\\sqrt{d}$", "$|\\hat x_1|/\\sqrt{d}$"
    label(axis, x, y, "B2, B3: $d=16$; dots: wtflow pairs", ylim=(-0.1, 2))


# ---- O: one_step.py ---------------------------------------------------------------------------
def error_by_steps(axis, generator):
    """O1: Euler's steps; the first order, C / K, from 16 steps on."""
    steps = 2 ** np.arange(11)
    for (s, rho), colour in coloured(((1.0, 0.0), (0.1, 0.0), (0.1, 0.6), (0.1, -0.9))):
        error = [abs(1 - s * one_step.measured_factor(int(k), s, rho)) for k in steps]
        dots(axis, steps, error, colour, f"$s={s:g}$, $\\rho={rho:g}$")
        axis.plot(steps[4:], one_step.step_error(s, rho) / steps[4:], color=colour)
    title = "O1: $q=N(0,s^2I)$; one step: $1+\\rho$; lines: $C/K$"
    label(axis, "steps $K$", "|relative error of the end|", title, log="xy")


# {score of two modes: (function, colour)}
SCORES = {
    "$-\\log q$": (one_step.rarity, GREEN),
    "$E|r_t|^2$, $t=0.3$": (partial(one_step.mean_square, t=one_step.EARLY), ORANGE),
    "$|\\hat x_1|$, time-unconditional": (one_step.unconditional, RED),
    "$|T|$": (partial(one_step.distance_after, steps=50), BLUE),
}


def scores_of_two_modes(axis, generator):
    """O2, O3 at m = 3 s: the scores over x, and where the data are."""
    m, s = one_step.modes(3.0)
    x = np.linspace(-2, 2, 401)
    density = np.exp(one_step.log_density(x, m, s))
    axis.fill_between(x, density, color="0.85", label="$q$, $m=3s$")
    for name, (score, colour) in SCORES.items():
        axis.plot(x, score(x, m, s), color=colour, label=name)
    title = "O2, O3: $|T|$ is 0 between the modes"
    label(axis, "$x$", "score", title, "upper center", ylim=(0, 9))


def auroc_by_separation(axis, generator):
    """O2, O3: AUROC of the scores against a third mode between the two."""
    separation = np.linspace(0, 4, 41)
    few = separation[::5]
    for name, (score, colour) in SCORES.items():
        exact = [one_step.auroc_by_quadrature(score, k) for k in separation]
        axis.plot(separation, exact, color=colour)
        measured = [one_step.measured_auroc(score, k, generator, repeats=3)[0] for k in few]
        dots(axis, few, measured, colour, name)
    axis.axhline(0.5, color="k", ls=":", label="$|\\hat x_1|$, time-conditioned")
    title = "O2, O3: anomalies between; dots: simulated"
    label(axis, "$m/s$", "AUROC", title, (0.5, 0.16), ylim=(0, 1.02))


# ---- learned_field.py -------------------------------------------------------------------------
def error_over_time(axis, errors, by_rho, by_time):
    """(a) Error of a learnt rFM field in each bin of t, with two standard errors."""
    edges = learned_field.EDGES
    bins = range(len(edges) - 1)
    for (name, values), colour in coloured(errors.items()):
        mean, se = values.T
        axis.errorbar(bins, mean, 2 * se, marker="o", capsize=2, color=colour, label=name)
    axis.set_xticks(bins, [f"{edges[k]:g}-{edges[k + 1]:g}" for k in bins], rotation=45)
    y, title = "$E|v_\\theta-u_t|^2/d$", "(a) S3: error of the learnt rFM field"
    label(axis, "$t$", y, title, log="y")


def auroc_by_rho(axis, errors, by_rho, by_time):
    """(b) W6: AUROC of |r| at t = 0, anomalies off the circle; dashed: exact, to first order."""
    for (mode, fits), colour in coloured(by_rho.items()):
        rhos = list(fits)
        mean, se = np.transpose([fit.auroc("off") for fit in fits.values()])
        axis.errorbar(rhos, mean, 2 * se, marker="o", ms=4, capsize=2, color=colour, label=mode)
    exact = [learned_field.early_auroc(fit, "off", rho) for rho, fit in fits.items()]
    axis.plot(rhos, exact, "--", color=colour, label="exact, to first order")
    y, title = "AUROC of $|r|$", "(b) W6: step from $t=0$, anomalies off the circle"
    label(axis, "$\\rho$", y, title, "lower left", ylim=(0.2, 1))


def auroc_by_time(axis, errors, by_rho, by_time):
    """(c) O3, B6: AUROC of the score of r_t; of x_0 itself dotted."""
    score, t = learned_field.mahalanobis, list(by_time)
    exact = [learned_field.exact_residuals(k) for k in t[1:]]  # at t = 0 it is 0
    for kind, colour in coloured(("off", "inside")):
        mean, se = np.transpose([fit.auroc(kind, score) for fit in by_time.values()])
        bars = {"fmt": "o", "ms": 4, "capsize": 2, "color": colour}
        axis.errorbar(t, mean, 2 * se, **bars, label=f"learnt, {kind} the circle")
        axis.plot(t[1:], [fit.auroc(kind, score)[0] for fit in exact], color=colour)
        x = [score(by_time[t[0]].x["normal"], by_time[t[0]].x[name]) for name in ("normal", kind)]
        axis.axhline(learned_field.auroc(*x), color=colour, ls=":")
    y, title = "AUROC of the score of $r_t$", "(c) O3: lines: exact; dotted: score of $x_0$"
    label(axis, "$t$", y, title, "lower left", ylim=(0.2, 1))


# ---- R: real_features.py ----------------------------------------------------------------------
def lengths(axis, measured):
    """C1: density of |x_0|/sqrt(d)."""
    for one, colour in coloured(measured):
        radius = (one.x_0.norm(dim=1) / one.x_0.shape[1] ** 0.5).numpy()
        bins = {"density": True, "histtype": "step", "color": colour, "label": one.name}
        axis.hist(radius, np.linspace(0.4, 2, 81), **bins)
    label(axis, "$|x_0|/\\sqrt{d}$", "density", "C1: features are no shell")


def residual_by_time(axis, measured):
    """B6, O3: share of E|r_t|^2 that is not affine in x_0 (solid); image AUROC (dashed)."""
    for one, colour in coloured(measured):
        share, area = np.transpose(list(one.by_time.values()))
        axis.plot(list(one.by_time), share, "o-", ms=4, color=colour, label=one.name)
        axis.plot(list(one.by_time), area, "s--", ms=4, color=colour)
    title = "B6, O3: solid: not affine; dashed: AUROC"
    label(axis, "$t$", "share of $E|r_t|^2$; image AUROC", title, ylim=(0, 1.02))


# ---- All of them ------------------------------------------------------------------------------
PANELS = {
    "singularity": (slope_over_time, slope_at_two_atoms, growth_of_an_error),
    "concentration": (norms_over_time, inward_share, dip_below_straight_line),
    "worst_transport": (slope_by_correlation, gain_by_rho),
    "local_transport": (ratio_by_length, spread_by_rho),
    "unconditional_field": (x1_hat_off_data, x1_hat_by_radius),
    "one_step": (error_by_steps, scores_of_two_modes, auroc_by_separation),
}


def figures(errors, by_rho, by_time):
    """{name: figure}; the arguments are what learned_field.run returns."""
    drawn = {name: figure_of(fill, seeded()) for name, fill in PANELS.items()}
    learned = figure_of((error_over_time, auroc_by_rho, auroc_by_time), errors, by_rho, by_time)
    return drawn | {"fields": fields_figure(), "learned_field": learned}


def real_features_figure(measured):
    """R: the figure of several real_features.Measured."""
    return figure_of((lengths, residual_by_time), measured)
