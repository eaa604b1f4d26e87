"""The figures of README.md: one function of matplotlib each, no window system, no file written.

A figure is built of panels, functions that fill one axis. What is drawn is computed by the claim
files; nothing is claimed here. Dots are estimates, lines closed forms, unless a title says other.
"""

from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure

import wtflow
from theory import exponent, normal
from theory.concentration import (
    cosine_distribution,
    inward_probability,
    kinetic_energy,
    radial_velocity,
    shell,
    turning,
)
from theory.extremes import (
    at_infinity,
    by_rank,
    coverage,
    frechet_in_score,
    good_sets,
    in_score,
    one_line,
    rank_rates,
    tail_line,
)
from theory.extremes import variance as variance_of_line
from theory.learned_field import EARLY, EDGES, MODES, RADIUS, D, exact_auroc, initial_radius
from theory.local_transport import (
    early_field,
    early_residual,
    energy_distribution,
    gain,
    initial_field,
)
from theory.one_step import (
    auroc_by_quadrature,
    distance_after,
    flow_map,
    log_density,
    measured_auroc,
    measured_factor,
    modes,
    proxy_auroc,
    rarity,
    step_error,
    unconditional,
)
from theory.singularity import (
    ATOM_AXIS,
    ATOM_RADIUS,
    ATOMS,
    MIDWAY,
    OFF,
    POWER_LAW_TIMES,
    amplification,
    autograd_slope,
    fitted_slope,
    grown,
    pairs,
    peak,
    slope,
    slope_between_atoms,
    variance,
)
from theory.unconditional_field import (
    LARGE,
    SMALL,
    displacement,
    in_shell,
    pairs_at_any_time,
    radial_field,
    scales_mixture,
)
from theory.worst_transport import (
    a_n,
    along_direction,
    gaussian_coupling,
    kernel_field,
    largest_assignment,
    minibatch_worst,
    minimum_pdf,
    worst_candidate,
)

# Okabe & Ito's palette: distinct with any colour vision, and in this order also in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
BLUE, RED = COLOURS[0], COLOURS[3]


def panels(rows, columns, width=4.2, height=3.4):
    """A figure of panels, width x height inches each, and their axes in reading order."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def coloured(items, colours=COLOURS):
    """(item, colour) for each item, in the order of `colours`; no more items than colours."""
    return zip(items, colours, strict=False)


def dots(axis, x, y, colour, label=None, size=4):
    """Estimates y at x as dots of `size` points."""
    axis.plot(x, y, "o", ms=size, color=colour, label=label)


def figures(errors, results):
    """{name: figure} in the order of the claims; errors, results: those of learned_field.run."""
    return {
        "singularity": singularity_figure(),
        "concentration": concentration_figure(),
        "worst_transport": worst_transport_figure(),
        "fields": fields_figure(),
        "local_transport": local_transport_figure(),
        "unconditional_field": unconditional_field_figure(),
        "one_step": one_step_figure(),
        "extremes": extremes_figure(),
        "learned_field": learned_field_figure(errors, results),
    }


def legend(axis, **options):
    """The legend of an axis, small and without a frame."""
    axis.legend(frameon=False, fontsize=8, **options)


def slopes(x_0, couple, times, generator):
    """Slope of u on x_t at each of `times`, from wtflow pairs."""
    return [fitted_slope(*pairs(x_0, couple, t, generator))[0] for t in times]


# ---- S: singularity.py ------------------------------------------------------------------------
def singularity_figure():
    """Slope over t by width s; exponents at a finite training set; growth of an error over t_0."""
    generator = torch.Generator().manual_seed(0)
    figure, (left, middle, right) = panels(1, 3, 4.6)
    slope_over_time(left, normal(generator, 20_000, 8), generator)
    slope_at_two_atoms(middle)
    growth_of_an_error(right)
    return figure


def slope_over_time(axis, z, generator):
    """S2 for N(0, s^2 I), s z being its points, beside the 1/t of S1."""
    t = np.geomspace(1e-3, 1, 400)
    times = np.geomspace(1e-3, 1, 13)
    for s, colour in coloured((1.0, 0.1, 0.01)):
        axis.plot(t, slope(t, s), color=colour)
        measured = slopes(s * z, wtflow.independent, times, generator)
        dots(axis, times, measured, colour, f"$s={s:g}$")
        if s < 1:
            axis.annotate(
                f"$(1+s^2)/2s={peak(s)[1]:.3g}$",
                peak(s),
                (0, 8),
                textcoords="offset points",
                color=colour,
                ha="center",
                fontsize=8,
            )
    axis.plot(t, 1 / t, ":", color="0.5", label="$1/t$ (conditional field)")
    axis.set(
        xscale="log",
        yscale="symlog",
        ylim=(-2, 1000),
        xlabel="$t$",
        ylabel="slope $a(t)$ of $u_t(x)=a(t)\\,x$",
        title="S2: $q=N(0,s^2I)$; dots: wtflow pairs",
    )
    legend(axis, loc="upper right")


def slope_at_two_atoms(axis):
    """S2 for a training set of two points: 1/t off it, t^-3 midway."""
    t = np.geomspace(1e-4, 0.3, 25)
    off = np.array([autograd_slope(k, ATOMS, 0.0, OFF, ATOM_AXIS) for k in t])
    between = np.array([-autograd_slope(k, ATOMS, 0.0, MIDWAY, ATOM_AXIS) for k in t])
    in_range = t <= POWER_LAW_TIMES[-1]
    for name, y, power, colour in (("off", off, -1, BLUE), ("midway", between, -3, RED)):
        fitted, _ = exponent(t[in_range], y[in_range])
        dots(axis, t, y, colour, f"{name}: fitted {fitted:.3f}, predicted {power}")
    axis.plot(t, 1 / t, color=BLUE)
    axis.plot(t, -slope_between_atoms(t, ATOM_RADIUS), color=RED)
    axis.set(
        xscale="log",
        yscale="log",
        ylim=(1, 1e17),
        xlabel="$t$",
        ylabel="|slope| of $u_t$",
        title="S2: two atoms $\\pm e$; lines: closed form",
    )
    legend(axis, loc="upper right")


def growth_of_an_error(axis):
    """S3: two solutions of the flow that start a little apart."""
    t = np.geomspace(1e-3, 1, 400)
    times = np.geomspace(1e-3, 0.9, 10)
    delta, centre = np.array([1e-3, 0.0]), np.zeros((1, 2))
    for s, colour in coloured((1.0, 0.1, 0.01, 0.0)):
        axis.plot(t, amplification(t, s), color=colour)
        measured = [grown(delta, t_0, centre, s) for t_0 in times]
        dots(axis, times, measured, colour, f"$s={s:g}$" if s else "point mass: $1/t_0$")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="$t_0$, when the error is made",
        ylabel="error at $t=1$ / error at $t_0$",
        title="S3: dots: two ODE solutions; lines: $1/\\sigma_{t_0}$",
    )
    axis.legend(frameon=False)


# ---- C: concentration.py ----------------------------------------------------------------------
def concentration_figure():
    """|x_t| over t; distribution of the cosine; sign of <x_t, u>; dip below the OT path."""
    generator = torch.Generator().manual_seed(0)
    figure, (paths, cosines, signs, dip) = panels(2, 2, 5.2, 3.6)
    for d, colour in coloured((2, 16, 256, 4096)):
        norms_over_time(paths, d, colour, generator)
        inward_share(signs, d, colour, generator)
        if d < 4096:  # its density would be too high for the axis
            cosine_density(cosines, d, colour, generator)
    t = np.linspace(0, 1, 101)
    paths.plot(t, np.sqrt((1 - t) ** 2 + t**2), "k--", label="$\\sqrt{E|x_t|^2/d}$")
    turn, least = turning(1, 1)
    paths.plot(turn, least**0.5, "kv", label="$t^*=1/2$")
    paths.set(
        xlabel="$t$",
        ylabel="$|x_t|/\\sqrt{d}$",
        ylim=(0, 2),
        title="C1, C3: 25 paths each, from and to the shell of radius $\\sqrt{d}$",
    )
    cosines.set(
        xlabel="cosine of $x_1$ with a fixed direction",
        ylabel="density",
        ylim=(0, 8),
        title="C1: bars: wtflow noise; lines: Beta distribution",
    )
    signs.axvline(0.5, color="k", ls=":", lw=1)
    signs.set(
        xlabel="$t$",
        ylabel="$P(\\langle x_t,u\\rangle<0)$",
        title="C3: inward before $t^*=1/2$; lines: exact",
    )
    dip_below_straight_line(dip, generator)
    for axis in (paths, cosines, signs):
        legend(axis)
    legend(dip, title="kinetic energy$/d$, rFM against OT")
    return figure


def norms_over_time(axis, d, colour, generator):
    """C1, C3: |x_t| / sqrt(d) along 25 paths."""
    t = np.linspace(0, 1, 101)
    x_0 = shell(25, d, generator)
    x_1 = wtflow.independent(x_0, generator)
    points = [wtflow.path(x_0, x_1, torch.full((len(x_0),), k)) for k in t]
    norms = np.stack([x_t.norm(dim=1) / d**0.5 for x_t in points])
    axis.plot(t, norms, color=colour, lw=0.5, alpha=0.5)
    axis.plot([], [], color=colour, label=f"$d={d}$")


def inward_share(axis, d, colour, generator):
    """C3: share of the samples that move inwards at t."""
    t = np.linspace(0, 1, 101)[1:-1]
    axis.plot(t, inward_probability(t, d, d), color=colour)
    times = np.linspace(0.05, 0.95, 13)
    x_0 = shell(1000, d, generator)
    shares = [(radial_velocity(x_0, k, generator) < 0).double().mean() for k in times]
    dots(axis, times, shares, colour, f"$d={d}$")


def cosine_density(axis, d, colour, generator):
    """C1: the cosine of wtflow's noise with the first axis."""
    x_1 = wtflow.independent(torch.zeros(20_000, d, dtype=torch.float64), generator)
    cosine = (x_1[:, 0] / x_1.norm(dim=1)).numpy()
    axis.hist(cosine, 60, density=True, color=colour, alpha=0.35)
    c = np.linspace(-1, 1, 401)
    label = f"$d={d}$, $1/\\sqrt{{d}}={d**-0.5:.2g}$"
    axis.plot(c, cosine_distribution(d).pdf(c), color=colour, label=label)


def dip_below_straight_line(axis, generator):
    """C4: sigma_t of rFM, and of OT, which is straight."""
    t = np.linspace(0, 1, 101)
    for s, colour in coloured((1.0, 0.3, 0.05)):
        x_0 = s * normal(generator, 4000, 16)
        label = f"$s={s:g}$: {kinetic_energy(s):.2f} against {(1 - s) ** 2:.2f}"
        axis.plot(t, variance(t, s) ** 0.5, color=colour, label=label)
        axis.plot(t, (1 - t) * s + t, "--", color=colour)
        points = [pairs(x_0, wtflow.independent, k, generator)[0] for k in t[::10]]
        dots(axis, t[::10], [x_t.square().mean() ** 0.5 for x_t in points], colour)
    axis.set(
        xlabel="$t$",
        ylabel="$\\sigma_t$",
        title="C4: rFM (solid, dots: wtflow pairs) below OT (dashed)",
    )


# ---- W: worst_transport.py --------------------------------------------------------------------
def worst_transport_figure():
    """W2: the slope moves and its peak grows; W3, W7: the worst candidate, a_n, b_k, potential."""
    generator = torch.Generator().manual_seed(0)
    figure, (slope_axis, minimum_axis, pull_axis, potential_axis) = panels(2, 2, 5.2, 3.6)
    slope_by_correlation(slope_axis, generator)
    minimum_density(minimum_axis, (1, 4, 64, 1024), generator)
    pull_by_candidates(pull_axis, generator)
    potential_by_candidates(potential_axis, (1, 4, 64, 1024))
    for axis in figure.axes:
        legend(axis)
    return figure


def slope_by_correlation(axis, generator):
    """W2 for N(0, 0.3^2 I)."""
    s, t = 0.3, np.linspace(0, 1, 501)
    x_0 = s * normal(generator, 4000, 16)
    for rho, colour in coloured((0.0, 0.5, 0.9, 0.99)):
        label = f"$\\rho={rho:g}$: peak {peak(s, rho)[1]:.2f}"
        axis.plot(t, slope(t, s, rho), color=colour, label=label)
        couple = partial(gaussian_coupling, s=s, rho=rho)
        dots(axis, t[::25], slopes(x_0, couple, t[::25], generator), colour, size=3)
        axis.plot(*peak(s, rho), "v", color="k", ms=5)
    axis.set(
        xlabel="$t$",
        ylabel="slope $a(t)$",
        title="W2: $q=N(0,0.3^2I)$; steeper at 0 and at the peak",
    )


def minimum_density(axis, candidates, generator):
    """W3: the component of worst_candidate's noise along x_0."""
    m = np.linspace(-5.5, 4, 400)
    x_0 = normal(generator, 20_000, 16)
    for n, colour in coloured(candidates):
        along = along_direction(worst_candidate(x_0, generator, n), x_0)
        axis.hist(along.numpy(), 60, density=True, color=colour, alpha=0.35)
        axis.plot(m, minimum_pdf(m, n), color=colour, label=f"$n={n}$, $a_n={a_n(n):.2f}$")
    axis.set(
        xlabel="$\\langle x_1, x_0\\rangle/|x_0|$",
        ylabel="density",
        title="W3: bars: worst of $n$; lines: closed form",
    )


def pull_by_candidates(axis, generator):
    """W3: a_n, its bound, and sqrt(d), which the antipode would need; W7: b_k, below a_k."""
    n = np.unique(np.geomspace(1, 1e6, 25).astype(int))
    axis.plot(n, [a_n(k) for k in n], color=COLOURS[0], label="$a_n$")
    bound = np.sqrt(2 * np.log(n[1:]))
    axis.plot(n[1:], bound, "--", color=COLOURS[1], label="$\\sqrt{2\\ln n}$")
    k = 2 ** np.arange(1, 9)
    b_k = [largest_assignment(j, max(20, 8000 // j**2), generator)[0] for j in k]
    dots(axis, k, b_k, COLOURS[2], "$b_k$, worst plan of $k=n$", 3)
    for d in (16, 152):
        axis.axhline(d**0.5, color="0.5", ls=":")
        axis.annotate(f"antipode, $\\sqrt{{d}}$, $d={d}$", (1.2, d**0.5 + 0.2), color="0.3")
    axis.set(
        xscale="log",
        ylim=(0, 14),
        xlabel="candidates $n$, or vectors of a batch",
        ylabel="pull towards the origin",
        title="W3, W7: moderate $n$ stays far from the antipode",
    )


def potential_by_candidates(axis, candidates):
    """W3: the potential whose negative gradient is u_0."""
    x = np.linspace(-4, 4, 401)
    for n, colour in coloured(candidates):
        axis.plot(x, x**2 / 2 + a_n(n) * abs(x), color=colour, label=f"$n={n}$")
    axis.set(
        xlabel="$x$ along a line through the origin",
        ylabel="potential",
        title="W3: $|x|^2/2+a_n|x|$: the CPF, then a cusp",
    )


def fields_figure():
    """rFM, OT and WT in the plane: u_t near t = 0 (top), trajectories under u_t (bottom)."""
    generator = torch.Generator().manual_seed(0)
    x_0 = arc(4096, generator)
    couplings = {
        "rFM (independent)": wtflow.independent,
        "OT (minibatch)": wtflow.optimal,
        "local WT, $n=16$": partial(worst_candidate, n=16),
        "WT (minibatch worst)": minibatch_worst,
    }
    figure, axes = panels(2, 4, 3.3, 3.4)
    top, bottom = axes[:4], axes[4:]
    for k, (name, couple) in enumerate(couplings.items()):
        x_1 = couple(x_0, generator)
        smoothed_field(top[k], x_0, x_1)
        top[k].set(title=name)
        coloured_by_time = smoothed_trajectories(bottom[k], x_0, x_1)
    for axis in axes:
        shell_outline(axis)
    top[0].set(ylabel="$u_t$ at $t=0.15$\ncoordinate 2")
    bottom[0].set(ylabel="trajectories\ncoordinate 2")
    figure.colorbar(coloured_by_time, ax=bottom, label="$t$", shrink=0.8)
    figure.suptitle(
        "Data on an arc (grey: $x_t$); dotted: the shell $\\sqrt{d}$; "
        "arrows only where the loss has points",
        fontsize=10,
    )
    return figure


def arc(n, generator):
    """n points (n, 2) about an arc of radius 1.6."""
    angle = 4 * torch.rand(n, generator=generator, dtype=torch.float64) - 0.4
    circle = torch.stack([angle.cos(), angle.sin()], 1)
    return 1.6 * circle + 0.08 * normal(generator, n, 2)


def smoothed_velocity(x, x_0, x_1, t):
    """E[u | x_t = x] (N, 2) and log kernel mass (N,), from the pairs (x_0, x_1)."""
    bandwidth = 0.12
    x_t = wtflow.path(x_0, x_1, torch.full((len(x_0),), t, dtype=x_0.dtype))
    return kernel_field(x, x_t.numpy(), (x_1 - x_0).numpy(), bandwidth)


def smoothed_field(axis, x_0, x_1):
    """Arrows of u_t at t = 0.15 over points x_t of the loss."""
    t = 0.15
    ticks = np.linspace(-2.8, 2.8, 23)
    grid = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    field, log_mass = smoothed_velocity(grid, x_0, x_1, t)
    dense = log_mass > np.log(4)  # elsewhere v_theta extrapolates
    x_t = wtflow.path(x_0, x_1, torch.full((len(x_0),), t, dtype=x_0.dtype))
    axis.scatter(*x_t[::8].T.numpy(), s=3, color="0.8")
    arrows = {"angles": "xy", "scale": 45, "width": 0.005}
    axis.quiver(*grid[dense].T, *field[dense].T, color=BLUE, **arrows)


def smoothed_trajectories(axis, x_0, x_1):
    """Euler steps of 60 points under the smoothed field; the dots, coloured by t."""
    times = np.append(np.linspace(0.02, 0.98, 33), 1.0)
    trajectory = [x_0[:60].numpy()]
    for t, step in zip(times[:-1], np.diff(times), strict=True):
        x = trajectory[-1]
        trajectory.append(x + step * smoothed_velocity(x, x_0, x_1, t)[0])
    trajectory = np.stack(trajectory)
    axis.plot(*np.moveaxis(trajectory, -1, 0), color="0.6", lw=0.6, zorder=1)
    points = trajectory[::4].reshape(-1, 2)
    colours = np.repeat(times[::4], 60)
    return axis.scatter(*points.T, c=colours, s=5, cmap="viridis", zorder=2)


def shell_outline(axis):
    """The shell of radius sqrt(d), d = 2, and the origin; the frame of a panel of fields_figure."""
    turn = np.linspace(0, 2 * np.pi, 200)
    axis.plot(2**0.5 * np.cos(turn), 2**0.5 * np.sin(turn), ":", color=RED, lw=1.5)
    axis.plot(0, 0, "+", color="k")
    limits = (-2.8, 2.8)
    axis.set(xlim=limits, ylim=limits, aspect="equal", xlabel="coordinate 1")


# ---- B: unconditional_field.py ----------------------------------------------------------------
def unconditional_field_figure():
    """|x1_hat| of the time-unconditional field: B1's jump, B3's two scales, B4's range of t."""
    generator = torch.Generator().manual_seed(0)
    figure, (jump, scales, range_of_t) = panels(1, 3, 4.6)
    x1_hat_off_data(jump, generator)
    x1_hat_by_radius(scales, generator)
    x1_hat_by_range(range_of_t, generator)
    for axis in figure.axes:
        legend(axis)
    return figure


def mean_radii(x_t, u, edges):
    """Mean |x_t| and mean |x_t| + v_r in each shell between `edges` that has 50 points."""
    shells = [in_shell(x_t, u, *ends) for ends in zip(edges[:-1], edges[1:], strict=True)]
    means = [(r.mean(), (r + v).mean()) for r, v in shells if len(r) >= 50]
    return np.transpose(means)


def x1_hat_off_data(axis, generator):
    """B1: data of thickness s across m = 20 directions; a time-conditioned field ends at 0."""
    m, delta = 20, np.geomspace(0.02, 8, 120)
    for s, colour in coloured((0.0, 0.05, 0.2)):
        exact = delta + (radial_field(delta, m, (s,)) if s else displacement(delta, m))
        axis.plot(delta, exact, color=colour)
        points = pairs_at_any_time(s * normal(generator, 60_000, m), wtflow.independent, generator)
        label = f"thickness {s:g}" if s else "subspace"
        dots(axis, *mean_radii(*points, np.geomspace(0.03, 6, 14)), colour, label)
    axis.axhline(0, color="k", ls=":", label="time-conditioned: 0 (C2)")
    axis.set(
        xscale="log",
        ylim=(-0.3, 8),
        xlabel="distance $\\delta$ off the data",
        ylabel="$|\\hat x_1|$ across them",
        title="B1: $m=20$; dots: wtflow pairs",
    )


def x1_hat_by_radius(axis, generator):
    """B2, B3: N(0, I) is not moved; of two scales the small one moves outwards."""
    d, r = 16, np.linspace(0.8, 7.5, 80)
    for scales, colour, name in (
        ((1.0,), BLUE, "B2: $N(0,I)$"),
        ((SMALL, LARGE), RED, "B3: two scales"),
    ):
        axis.plot(r / 4, (r + radial_field(r, d, scales)) / 4, color=colour)
        x_0 = scales_mixture(60_000, d, scales, generator)
        points = pairs_at_any_time(x_0, wtflow.independent, generator)
        dots(axis, *mean_radii(*points, np.linspace(1, 7, 16)) / 4, colour, name)
    for s, name in ((SMALL, "small"), (LARGE, "large")):
        axis.axvline(s, color="0.6", ls="--", lw=1)
        axis.annotate(name, (s + 0.03, 1.9), color="0.3", fontsize=8)
    axis.axhline(0, color="k", ls=":")
    axis.set(
        ylim=(-0.1, 2),
        xlabel="$|x|/\\sqrt{d}$",
        ylabel="$|\\hat x_1|/\\sqrt{d}$",
        title="B2, B3: $d=16$; time-conditioned: 0",
    )


def x1_hat_by_range(axis, generator):
    """B4: a subspace (solid, dots) keeps its jump below T sqrt(m); two scales contract (dashed)."""
    d, r = 16, np.linspace(0.8, 7.5, 60)
    for t_max, colour in coloured((1.0, 0.2, 0.05)):
        delta = np.geomspace(0.02, min(8, 30 * t_max), 120)  # further off the loss has no points
        axis.plot(delta, delta + displacement(delta, d, t_max), color=colour)
        origin = torch.zeros(60_000, d, dtype=torch.float64)
        points = pairs_at_any_time(origin, wtflow.independent, generator, t_max)
        edges = np.geomspace(0.03, 6 * t_max, 12)
        dots(axis, *mean_radii(*points, edges), colour, f"$T={t_max:g}$")
        axis.plot(r, r + radial_field(r, d, (SMALL, LARGE), t_max), "--", color=colour)
    axis.plot([], [], "k-", label="off a subspace, $m=16$")
    axis.plot([], [], "k--", label="two scales, $d=16$")
    axis.set(
        xscale="log",
        ylim=(-0.3, 10),
        xlabel="distance $\\delta$, or $|x|$",
        ylabel="$|\\hat x_1|$",
        title="B4: $t\\sim U(0,T)$",
    )


# ---- W5, W6: local_transport.py ---------------------------------------------------------------
def local_transport_figure():
    """W5: distribution of |x_1|, signal to noise; W6: first-order residual of the exact field."""
    generator = torch.Generator().manual_seed(0)
    figure, (radii, signal, residual) = panels(1, 3, 4.6)
    radius_by_rho(radii, generator)
    gain_by_rho(signal)
    residual_by_rho(residual)
    for axis in figure.axes:
        legend(axis)
    return figure


def radius_by_rho(axis, generator):
    """W5: |x_1| of wtflow.worst, and of the worst of 64 candidates, d = 152."""
    d, r = 152, np.linspace(10, 15, 400)
    x_0 = normal(generator, 20_000, d)
    for rho, colour in coloured((0.0, 0.5, 0.9)):
        radius = wtflow.worst(x_0, generator, rho).norm(dim=1).numpy()
        axis.hist(radius, 60, density=True, color=colour, alpha=0.35)
        density = 2 * r * energy_distribution(rho, d).pdf(r**2)
        axis.plot(r, density, color=colour, label=f"$\\rho={rho:g}$")
    radius = worst_candidate(x_0, generator, 64).norm(dim=1).numpy()
    axis.hist(radius, 60, density=True, histtype="step", color="k", label="worst of 64")
    axis.axvline(d**0.5, color="0.5", ls=":")
    axis.set(
        ylim=(0, 1.45),
        xlabel="$|x_1|$",
        ylabel="density",
        title="W5: $d=152$; bars: wtflow.worst; lines: exact",
    )


def gain_by_rho(axis):
    """W5: signal to noise at t = 0 over rFM's."""
    rho = np.linspace(-0.97, 0.97, 300)
    for ratio, colour in coloured((0.25, 1.0, 4.0)):
        axis.plot(rho, gain(rho, 1.0, ratio), color=colour, label=f"$|x|^2={ratio:g}\\,d$")
    axis.plot([0.9, 0.97], gain(np.array([0.9, 0.97]), 1.0, 1.0), "kv", ms=5)
    axis.axhline(1, color="0.5", ls=":")
    axis.set(
        yscale="log",
        ylim=(1e-2, 1e3),
        xlabel="$\\rho$",
        ylabel="signal-to-noise ratio over rFM's",
        title="W5: triangles: 19 and 66 at $|x|^2=d$",
    )


def residual_by_rho(axis):
    """W6: v - u_0 at |x| = s sqrt(d) is this times (T/2) x/s, for N(0, s^2 I)."""
    t, rho = 1e-3, np.linspace(-0.97, 0.97, 200)
    for s, colour in coloured((0.3, 0.5, 1.0)):
        x = np.full((1, 3), s)
        factor = [early_residual(x, -x / s**2, k, 2.0)[0, 0] for k in rho]
        axis.plot(rho, factor, color=colour)
        measured = [early_slope(x[0], t, s, k) for k in rho[::20]]
        dots(axis, rho[::20], measured, colour, f"$s={s:g}$")
    axis.axhline(0, color="0.5", ls=":")
    axis.set(
        xlabel="$\\rho$",
        ylabel="$(v-u_0)\\cdot x\\ /\\ \\frac{T}{2}\\sqrt{d}\\,|x|$",
        title="W6: $q=N(0,s^2I)$; dots: quadrature, $d=3$",
    )


def early_slope(x, t, s, rho):
    """The first component of (u_t(x) - u_0(x)) / t for N(0, s^2 I), x (d,)."""
    u = early_field(x, t, lambda y: -(y**2).sum(1) / (2 * s**2), rho)
    return (u - initial_field(x[None], rho)[0])[0] / t


# ---- O: one_step.py ---------------------------------------------------------------------------
def one_step_figure():
    """O1: relative error by steps; O2: three scores between two modes, their AUROC."""
    figure, (steps, scores, areas) = panels(1, 3, 4.6)
    error_by_steps(steps)
    scores_of_two_modes(scores)
    auroc_by_separation(areas, torch.Generator().manual_seed(0))
    for axis in figure.axes:
        legend(axis)
    return figure


def error_by_steps(axis):
    """O1: Euler's steps; the first order, C / K, from 16 steps on."""
    steps = 2 ** np.arange(11)
    for (s, rho), colour in coloured(((1.0, 0.0), (0.1, 0.0), (0.1, 0.6), (0.1, -0.9))):
        error = [abs(1 - s * measured_factor(int(k), s, rho)) for k in steps]
        dots(axis, steps, error, colour, f"$s={s:g}$, $\\rho={rho:g}$")
        axis.plot(steps[4:], step_error(s, rho) / steps[4:], color=colour)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="steps $K$",
        ylabel="|relative error of the end|",
        title="O1: $q=N(0,s^2I)$; one step: $1+\\rho$; lines: $C/K$",
    )


def scores_of_two_modes(axis):
    """O2 at m = 3 s: the scores over x, and where the data are."""
    m, s = modes(3.0)
    x = np.linspace(-2, 2, 401)
    axis.fill_between(x, np.exp(log_density(x, m, s)), color="0.85", label="$q$, $m=3s$")
    axis.plot(x, rarity(x, m, s), color=COLOURS[2], label="$-\\log q$")
    axis.plot(x, np.abs(flow_map(x, m, s)), color=BLUE, label="$|T|$")
    axis.plot(x, unconditional(x, m, s), color=RED, label="$|\\hat x_1|$, time-unconditional")
    axis.set(ylim=(0, 6), xlabel="$x$", ylabel="score", title="O2: $|T|$ is 0 between the modes")


def auroc_by_separation(axis, generator):
    """O2: AUROC of the scores against a third mode between the two."""
    separation = np.linspace(0, 4, 81)
    few = separation[::10]
    for name, line, score, colour in (
        ("likelihood", None, rarity, COLOURS[2]),
        ("$|T|$", proxy_auroc(separation), partial(distance_after, steps=50), BLUE),
        ("$|\\hat x_1|$, time-unconditional", None, unconditional, RED),
    ):
        if line is None:
            line = [auroc_by_quadrature(score, k) for k in separation]
        axis.plot(separation, line, color=colour)
        measured = [measured_auroc(score, k, generator, repeats=5)[0] for k in few]
        dots(axis, few, measured, colour, name)
    axis.axhline(0.5, color="k", ls=":", label="$|\\hat x_1|$, time-conditioned")
    axis.set(
        ylim=(0, 1.02),
        xlabel="$m/s$",
        ylabel="AUROC",
        title="O2: anomalies between; dots: simulated",
    )


# ---- E: extremes.py ---------------------------------------------------------------------------
def extremes_figure():
    """Share of good images above the 1 % threshold: by their number, and by defects among them."""
    generator = torch.Generator().manual_seed(0)
    figure, (number, defects) = panels(1, 2, 5.2, 3.6)
    share_by_number(number, generator)
    share_by_defects(defects, generator)
    for axis in figure.axes:
        axis.axhline(1, color="0.5", ls=":")
        axis.set(yscale="log", ylabel="good images above the threshold, %")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
        legend(axis, loc="upper right")
    return figure


def share_by_number(axis, generator):
    """E2, E3, E4: the line in log M and in M, and the rank, where no defect is among them."""
    n = np.arange(25, 1001)
    sizes = np.array([25, 50, 100, 200, 400, 1000])
    error = 1 + variance_of_line() / (2 * n)
    rank = np.array([rank_rates(k)[0] for k in n])
    for nu, threshold, line, colour, name in (
        (np.inf, one_line, at_infinity(one_line) * error, BLUE, "light tail, line in $\\log M$"),
        (3, one_line, at_infinity(one_line, nu=3) * error, COLOURS[1], "$t_3$, line in $\\log M$"),
        (np.inf, by_rank, rank, COLOURS[2], "rank"),
    ):
        axis.plot(n, 100 * line, color=colour)
        dots(axis, sizes, measured_shares(threshold, sizes, generator, nu), colour, name)
    shares = measured_shares(in_score, sizes, generator, 3)
    axis.plot(sizes, shares, "s", ms=4, color=RED, label="$t_3$, line in $M$; dashed: limit")
    axis.axhline(100 * frechet_in_score(3), color=RED, ls="--")
    axis.set(
        xscale="log",
        ylim=(0.4, 12),
        xlabel="good training images",
        title="E2, E3, E4: dots: simulated; lines: to first order",
    )


def measured_shares(threshold, sizes, generator, nu):
    """Percent of new good images above the threshold of each number of good images."""
    return [100 * coverage(threshold, good_sets(400, n, generator, nu), nu)[0] for n in sizes]


def share_by_defects(axis, generator):
    """E3, E4: defects, of scores 1 + Exp(0.5) times as high, are taken for good images."""
    shares = np.linspace(0, 0.2, 9)
    for name, threshold, good, style, colour in (
        ("without suspects, 100 images", tail_line, 100, "o-", BLUE),
        ("without suspects, 1000 images", tail_line, 1000, "o--", BLUE),
        ("one line, 100 images", one_line, 100, "o-", COLOURS[1]),
        ("rank, 1000 images", by_rank, 1000, "o--", COLOURS[2]),
    ):
        sets = [good_sets(100, good, generator, share=share) for share in shares]
        above = [100 * coverage(threshold, scores)[0] for scores in sets]
        axis.plot(100 * shares, above, style, ms=4, color=colour, label=name)
    axis.set(
        ylim=(0.01, 30),
        xlabel="defects among the training images, %",
        title="E3, E4: light tail; lines join estimates",
    )


# ---- R: real_features.py ----------------------------------------------------------------------
def real_features_figure(measured):
    """Density of |x_0|/sqrt(d); E|x_t|^2/d over t, measured (dots) and by C3."""
    generator = torch.Generator().manual_seed(0)
    figure, (left, right) = panels(1, 2, 4.6)
    times = np.linspace(0, 1, 21)
    for k, one in enumerate(measured):
        x_0, d = one.x_0[:4000].double(), one.x_0.shape[1]
        radius = x_0.norm(dim=1) / d**0.5
        left.hist(
            radius.numpy(), np.linspace(0.4, 2, 81), density=True, histtype="step", label=one.name
        )
        x_1 = normal(generator, *x_0.shape)
        power = [(((1 - t) * x_0 + t * x_1) ** 2).sum(1).mean() / d for t in times]
        m2 = (radius**2).mean().item()
        right.plot(times, power, "o", markersize=3, color=f"C{k}", label=one.name)
        right.plot(times, (1 - times) ** 2 * m2 + times**2, color=f"C{k}", linewidth=1)
    left.set(xlabel="|x_0| / sqrt(d)", ylabel="density", title="R: features are no shell")
    right.set(xlabel="t", ylabel="E|x_t|^2 / d", title="C3: the dip")
    legend(left)
    legend(right)
    return figure


# ---- learned_field.py -------------------------------------------------------------------------
MODE_COLOURS = dict(zip(MODES, COLOURS, strict=False))


def learned_field_figure(errors, results):
    """(a) error by t; (b) one step by rho, time conditioning and data.

    errors, results: what learned_field.run returns.
    """
    figure, axes = panels(2, 3, 4.4, 3.6)
    error_over_time(axes[0], errors)
    inward_by_rho(axes[1], results["circle", "time-conditioned"])
    x1_hat_of_two_scales(axes[2], results)
    for axis, data, kind in (
        (axes[3], "circle", "off"),
        (axes[4], "two scales", "larger"),
        (axes[5], "two scales", "between"),
    ):
        auroc_by_rho(axis, results, data, kind)
        axis.set(title=f"(b) W6: {data}, anomalies {kind}")
    for axis in axes[:4]:
        legend(axis)
    return figure


def error_over_time(axis, errors):
    """(a) Error of a learnt rFM field in each bin of t, with two standard errors."""
    bins = range(len(EDGES) - 1)
    for (name, values), colour in coloured(errors.items()):
        mean, se = values.T
        axis.errorbar(bins, mean, 2 * se, marker="o", capsize=2, color=colour, label=name)
    names = [f"{EDGES[k]:g}-{EDGES[k + 1]:g}" for k in bins]
    axis.set_xticks(bins, names, rotation=45)
    axis.set(
        yscale="log",
        xlabel="$t$",
        ylabel="$E|v_\\theta-u_t|^2/d$",
        title="(a) S3: error of the learnt rFM field",
    )


def inward_by_rho(axis, fields):
    """(b) Inward part of time-conditioned v_theta(x, 0), and the exact one; {rho: OneStep}."""
    rho = np.array(list(fields))
    axis.plot(rho, initial_radius() + rho * RADIUS, "k--", label="exact: $|x|+\\rho\\sqrt{d}$")
    dots(axis, rho, [fit.inward().mean() for fit in fields.values()], BLUE, "learnt")
    axis.set(
        ylim=(0, 9),
        xlabel="$\\rho$",
        ylabel="inward part of $v_\\theta(x,0)$",
        title="(b) W5: thick circle, time-conditioned",
    )


def x1_hat_of_two_scales(axis, results):
    """(b) B3: |x1_hat| of 300 normal points by |x|, rFM; lines: exact."""
    for mode in ("time-conditioned", "time-unconditional"):
        fit = results["two scales", mode][0.0]
        radius = np.linalg.norm(fit.x["normal"], axis=1)
        chosen = slice(0, 300)
        x1_hat = fit.score("normal", False)[0]
        colour = MODE_COLOURS[mode]
        dots(axis, radius[chosen], x1_hat[chosen], colour, f"learnt, {mode}", 2)
    r = np.linspace(0.8, 8, 80)
    exact = np.abs(r + radial_field(r, D, (SMALL, LARGE)))
    axis.plot(r, exact, "k-", label="exact, time-unconditional")
    axis.axhline(0, color="k", ls=":", label="exact, time-conditioned")
    axis.set(
        xlim=(0.5, 8),
        ylim=(-0.3, 8),
        xlabel="$|x|$",
        ylabel="$|\\hat x_1|$",
        title="(b) B3: two scales, rFM",
    )


def auroc_by_rho(axis, results, data, kind):
    """(b) W6: AUROC of |r| over rho by mode; dotted: of |x1_hat|."""
    for mode, colour in MODE_COLOURS.items():
        fields = results[data, mode]
        of_residual, se = np.transpose([fit.auroc(kind, True) for fit in fields.values()])
        of_x1_hat = [fit.auroc(kind, False)[0] for fit in fields.values()]
        bars = {"marker": "o", "ms": 4, "capsize": 2, "color": colour, "label": mode}
        axis.errorbar(list(fields), of_residual, 2 * se, **bars)
        axis.plot(list(fields), of_x1_hat, ":", color=colour)
        linear = results.get((data, f"{mode}, linear u_0"), {})
        areas = [fit.auroc(kind, True)[0] for fit in linear.values()]
        axis.plot(list(linear), areas, "x", ms=7, color=colour)
    mode = f"t < {EARLY}"
    fields = results[data, mode]
    exact = [exact_auroc(data, mode, rho, fit, kind, True) for rho, fit in fields.items()]
    label = f"exact, {mode}, to first order"
    axis.plot(list(fields), exact, "--", color=MODE_COLOURS[mode], label=label)
    axis.plot([], [], "x", color="0.4", label="linear $u_0$")
    axis.set(ylim=(0.1, 1.02), xlabel="$\\rho$", ylabel="AUROC of $|r|$; dotted: of $|\\hat x_1|$")
