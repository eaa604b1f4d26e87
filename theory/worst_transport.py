"""W1-W4: worst transport, global and local. Time runs from data (t = 0) to noise (t = 1).

[paper] WT-Flow "amplifies the observed CPF of rFM to mitigate the initial singularity". W1, W2 and the laws in W3 and W4
are [derived]; "local" read as the worst of n noise candidates is [ours]. What worst transport does not do: README.md.
"""
import itertools
from functools import partial

import numpy as np
import torch
from scipy.integrate import quad
from scipy.special import log_ndtr, logsumexp, ndtr, softmax
from scipy.stats import norm

import wtflow
from theory import COLOURS, Row, mean_se, panels
from theory.singularity import fitted_slope, pairs, peak, slope


# Closed forms -------------------------------------------------------------------------------------------------------
def minimum_pdf(m, n):
    """Density at m of the minimum of n standard normals: n phi(m) (1 - Phi(m))^(n-1) (W3)."""
    return n * norm.pdf(m) * np.exp((n - 1) * log_ndtr(-m))


def minimum_cdf(m, n):
    """Its distribution function 1 - (1 - Phi(m))^n (W3)."""
    return -np.expm1(n * log_ndtr(-m))


def a(n):
    """a_n = -E min of n standard normals: 0, 1/sqrt(pi), 3/(2 sqrt(pi)), ... ~ sqrt(2 ln n) (W3); n >= 1, real or integer."""
    return quad(lambda m: -m * minimum_pdf(m, n), -12, 12, points=[-3, 0, 3], epsabs=1e-13, limit=200)[0] if n > 1 else 0.0


def minimum_variance(n):
    """Variance of that minimum: 1 for n = 1, falling in n (W3)."""
    mean = -a(n)
    return quad(lambda m: (m - mean) ** 2 * minimum_pdf(m, n), -12, 12, points=[-3, 0, 3], epsabs=1e-13, limit=200)[0]


def initial_field(x, n):
    """u_0(x) = -(1 + a_n / |x|) x = -grad(|x|^2 / 2 + a_n |x|), (N, d), for local worst transport of n candidates (W3)."""
    return -(1 + a(n) / np.linalg.norm(x, axis=-1, keepdims=True)) * x


def local_field(x, t, atoms, n):
    """u_t(x) (N, d) of local worst transport for the finite set q = atoms (K, d), none at 0; 0 < t <= 1 (W3). [ours]

    Bayes: weight of atom a is the density of x_1 = (x - (1-t) a) / t given a, phi(x_1) n (1 - Phi(<x_1, a/|a|>))^(n-1).
    n = 1 is S2's field.
    """
    x_1 = (x[:, None] - (1 - t) * atoms) / t
    along = (x_1 * atoms).sum(-1) / np.linalg.norm(atoms, axis=1)
    w = softmax(-(x_1 ** 2).sum(-1) / 2 + (n - 1) * log_ndtr(-along), axis=1)
    return (x - w @ atoms) / t


def gain(n, d, m2):
    """Signal to noise of the target at t = 0, |E[u|x_0]|^2 / tr Cov(u|x_0), relative to rFM's, at |x_0|^2 = m2 (W3). [ours]

    (1 + a_n / sqrt(m2))^2 d / (d - 1 + minimum_variance(n)): what local worst transport buys one-step inference.
    """
    return (1 + a(n) / m2 ** 0.5) ** 2 * d / (d - 1 + minimum_variance(n))


# Estimators ---------------------------------------------------------------------------------------------------------
def gaussian_coupling(x_0, generator=None, s=1.0, rho=1.0):
    """x_1 ~ N(0, I) at correlation -rho with x_0 ~ N(0, s^2 I), shape of x_0: what W2 is stated for."""
    return -rho * x_0 / s + (1 - rho ** 2) ** 0.5 * wtflow.independent(x_0, generator)


minibatch_worst = partial(wtflow.optimal, sign=-1.0)


def worst_of(x_0, generator=None, n=64):
    """Local worst transport by its definition: draw n candidates, keep the one of smallest <x_0, z>; x_0 (N, d) (W3)."""
    z = torch.randn((n, *x_0.shape), generator=generator, dtype=x_0.dtype)
    return z.gather(0, (z * x_0).sum(-1).argmin(0)[None, :, None].expand(1, *x_0.shape))[0]


def largest_cost(x_0, x_1):
    """max over all pairings of sum |x_1 - x_0|^2, tried one by one; x_0, x_1 (N, d) with N <= 8 (W1)."""
    cost = ((x_0[:, None] - x_1[None]) ** 2).sum(-1)
    rows = range(len(x_0))
    return max(sum(cost[i, j] for i, j in zip(rows, p)) for p in itertools.permutations(rows))


def kernel_field(x, x_t, u, h):
    """E[u | x_t = x] by Nadaraya-Watson with bandwidth h, and log of the kernel mass there; all (N, d) arrays."""
    log_k = -((x[:, None] - x_t) ** 2).sum(-1) / (2 * h ** 2)
    return softmax(log_k, axis=1) @ u, logsumexp(log_k, axis=1)


def table(seed=0):
    """Rows for W1-W4."""
    generator = torch.Generator().manual_seed(seed)
    N = 20_000
    x_0 = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    x_1 = minibatch_worst(x_0, generator)
    yield Row("W1", "cost of the worst plan, 7! plans tried", largest_cost(x_0.numpy(), x_1.numpy()), (x_1 - x_0).square().sum().item())

    z = torch.randn(N, 16, generator=generator, dtype=torch.float64)
    for s, rho in ((0.3, 0.5), (0.3, 0.9), (1.0, 0.5)):
        couple = partial(gaussian_coupling, s=s, rho=rho)
        yield Row("W2", f"slope at t=0, s={s}, rho={rho}", slope(0.0, s, rho), *fitted_slope(*pairs(s * z, couple, 0.0, generator)))
        yield Row("W2", f"largest slope, t={peak(s, rho)[0]:.3f}, s={s}, rho={rho}", peak(s, rho)[1], *fitted_slope(*pairs(s * z, couple, peak(s, rho)[0], generator)))
    x_0 = 0.3 * torch.randn(1024, 1, generator=generator, dtype=torch.float64)
    x_1 = minibatch_worst(x_0, generator, block=1024)
    yield Row("W2", "cost (1+s)^2 of the worst plan, d=1, s=0.3, Hungarian", 1.69, *mean_se((x_1 - x_0).square()))

    for n in (2, 64):
        x_1 = wtflow.worst(3 * z, generator, n)
        along = (x_1 * z).sum(1) / z.norm(dim=1)
        yield Row("W3", f"component of x_1 along x_0, n={n}", -a(n), *mean_se(along))
        yield Row("W3", f"  its variance, n={n}", minimum_variance(n), *mean_se((along + a(n)).square()))
        yield Row("W3", f"  mean square of the others, n={n}", 1, *mean_se((x_1.square().sum(1) - along.square()) / 15))
        drawn = worst_of(z[:4000], generator, n)
        yield Row("W3", f"  the component by {n} draws", -a(n), *mean_se((drawn * z[:4000]).sum(1) / z[:4000].norm(dim=1)))
    yield Row("W3", "a_3", 3 / (2 * np.pi ** 0.5), a(3))
    x_0 = 4 * torch.eye(16, dtype=torch.float64)[0].expand(N, 16)
    u = wtflow.worst(x_0, generator, 64) - x_0
    yield Row("W3", "u_0(x) along x, |x|=4, n=64", -(4 + a(64)), *mean_se(u[:, 0]))
    m, v = u.mean(0), u.var(0, correction=0)
    snr = (m[0] ** 2 / v.sum()).item()
    yield Row("W3", "signal to noise at t=0 over rFM's, |x|=4, n=64", gain(64, 16, 16), snr, snr * 2 * (v[0] / N).sqrt().item() / -m[0].item())

    x = z[:200].numpy()
    hat = wtflow.euler(lambda x, t: torch.as_tensor(initial_field(x.numpy(), 64)), z[:200])
    yield Row("W4", "|x1_hat| of one step under u_0, n=64", a(64), hat.norm(dim=1).mean().item())
    yield Row("W4", "log p = -a_n^2 / 2d, d=16", -a(64) ** 2 / 32, wtflow.log_density(hat).mean().item())


def figure(seed=0):
    """W2: the slope moves and its peak grows; W3: law of the worst candidate, a_n against sqrt(d), the potential."""
    generator = torch.Generator().manual_seed(seed)
    fig, axes = panels(2, 2, 5.2, 3.6)
    t, s = np.linspace(0, 1, 501), 0.3
    z = s * torch.randn(4000, 16, generator=generator, dtype=torch.float64)
    for rho, colour in zip((0.0, 0.5, 0.9, 0.99), COLOURS):
        axes[0].plot(t, slope(t, s, rho), color=colour, label=f"$\\rho={rho:g}$: peak {peak(s, rho)[1]:.2f}")
        couple = partial(gaussian_coupling, s=s, rho=rho)
        axes[0].plot(t[::25], [fitted_slope(*pairs(z, couple, k, generator))[0] for k in t[::25]], "o", ms=3, color=colour)
        axes[0].plot(*peak(s, rho), "v", color="k", ms=5)
    axes[0].set(xlabel="$t$", ylabel="slope $a(t)$", title="W2: $q=N(0,0.3^2I)$; steeper at 0 and at the peak")
    m = np.linspace(-5.5, 4, 400)
    x_0 = torch.randn(20_000, 16, generator=generator, dtype=torch.float64)
    for n, colour in zip((1, 4, 64, 1024), COLOURS):
        along = (wtflow.worst(x_0, generator, n) * x_0).sum(1) / x_0.norm(dim=1)
        axes[1].hist(along.numpy(), 60, density=True, color=colour, alpha=0.35)
        axes[1].plot(m, minimum_pdf(m, n), color=colour, label=f"$n={n}$, $a_n={a(n):.2f}$")
        r = np.linspace(-4, 4, 401)
        axes[3].plot(r, r ** 2 / 2 + a(n) * abs(r), color=colour, label=f"$n={n}$")
    axes[1].set(xlabel="$\\langle x_1, x_0\\rangle/|x_0|$", ylabel="density", title="W3: bars: wtflow.worst; lines: closed form")
    n = np.unique(np.geomspace(1, 1e6, 25).astype(int))
    axes[2].plot(n, [a(k) for k in n], color=COLOURS[0], label="$a_n$")
    axes[2].plot(n[1:], np.sqrt(2 * np.log(n[1:])), "--", color=COLOURS[1], label="$\\sqrt{2\\ln n}$")
    for d, y in ((16, 4), (152, 152 ** 0.5)):
        axes[2].axhline(y, color="0.5", ls=":")
        axes[2].annotate(f"antipode, $\\sqrt{{d}}$, $d={d}$", (1.2, y + 0.2), color="0.3")
    axes[2].set(xscale="log", ylim=(0, 14), xlabel="candidates $n$", ylabel="pull towards the origin", title="W3: moderate $n$ stays far from the antipode")
    axes[3].set(xlabel="$x$ along a line through the origin", ylabel="potential", title="W3: $|x|^2/2+a_n|x|$: the CPF, then a cusp")
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
    return fig


def figure_fields(seed=0):
    """rFM, OT and WT side by side in the plane: u_t near t = 0 (top), trajectories of the marginal field (bottom)."""
    generator = torch.Generator().manual_seed(seed)
    N, h, times = 4096, 0.12, np.linspace(0.02, 0.98, 33)
    angle = torch.rand(N, generator=generator, dtype=torch.float64) * 4 - 0.4
    x_0 = 1.6 * torch.stack([angle.cos(), angle.sin()], 1) + 0.08 * torch.randn(N, 2, generator=generator, dtype=torch.float64)
    couples = {"rFM (independent)": wtflow.independent, "OT (minibatch)": wtflow.optimal,
               "local WT, $n=16$": partial(wtflow.worst, n=16), "WT (minibatch worst)": minibatch_worst}
    fig, axes = panels(2, 4, 3.3, 3.4)
    ticks = np.linspace(-2.8, 2.8, 23)
    grid = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 2)
    turn = np.linspace(0, 2 * np.pi, 200)
    for top, bottom, (name, couple) in zip(axes[:4], axes[4:], couples.items()):
        x_1 = couple(x_0, generator)
        u = (x_1 - x_0).numpy()

        def seen(t):
            return wtflow.path(x_0, x_1, torch.full((N,), t, dtype=x_0.dtype)).numpy()

        field, mass = kernel_field(grid, seen(0.15), u, h)
        keep = mass > np.log(4)                             # where the loss has seen points; elsewhere v_theta extrapolates
        top.scatter(*seen(0.15)[::8].T, s=3, color="0.8")
        top.quiver(*grid[keep].T, *field[keep].T, color=COLOURS[0], angles="xy", scale=45, width=0.005)
        top.set(title=name)
        x, steps = x_0[:60].numpy(), []
        for t, step in zip(times, np.diff(np.append(times, 1.0))):
            steps.append(x)
            x = x + step * kernel_field(x, seen(t), u, h)[0]
        steps = np.stack(steps + [x])
        bottom.plot(*np.moveaxis(steps, -1, 0), color="0.6", lw=0.6, zorder=1)
        dots = bottom.scatter(*steps[::4].reshape(-1, 2).T, c=np.repeat(np.append(times, 1)[::4], 60), s=5, cmap="viridis", zorder=2)
        for axis in (top, bottom):
            axis.plot(2 ** 0.5 * np.cos(turn), 2 ** 0.5 * np.sin(turn), ":", color=COLOURS[3], lw=1.5)
            axis.plot(0, 0, "+", color="k")
            axis.set(xlim=(-2.8, 2.8), ylim=(-2.8, 2.8), aspect="equal", xlabel="coordinate 1")
    axes[0].set(ylabel="$u_t$ at $t=0.15$\ncoordinate 2")
    axes[4].set(ylabel="trajectories\ncoordinate 2")
    fig.colorbar(dots, ax=axes[4:], label="$t$", shrink=0.8)
    fig.suptitle("Data on an arc (grey: $x_t$); dotted: the shell $\\sqrt{d}$; arrows only where the loss has seen points", fontsize=10)
    return fig
