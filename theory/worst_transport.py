"""W1-W4, W7: worst transport, global and local. Time runs from data (t = 0) to noise (t = 1).

[paper] WT-Flow "amplifies the observed CPF of rFM to mitigate the initial singularity". W1, W2 and
the distributions in W3 and W4 are [derived]; "local" read as the worst of n noise candidates is
[ours]. Figures: draw.PANELS, draw.fields_figure.
"""

import itertools
from functools import partial

import numpy as np
import torch
from scipy.integrate import quad
from scipy.optimize import linear_sum_assignment
from scipy.special import log_ndtr, logsumexp, softmax

import wtflow
from theory import Row, mean_se, normal
from theory.singularity import fitted_slope, gaussian_coupling, pairs, peak, slope


# ---- Closed forms -----------------------------------------------------------------------------
def minimum_pdf(m, n):
    """Density at m of the minimum of n standard normals: n phi(m) (1 - Phi(m))^(n-1) (W3)."""
    return n / (2 * np.pi) ** 0.5 * np.exp(-(m**2) / 2 + (n - 1) * log_ndtr(-m))


def minimum_cdf(m, n):
    """Its distribution function 1 - (1 - Phi(m))^n (W3)."""
    return -np.expm1(n * log_ndtr(-m))


def minimum_expectation(g, n):
    """E g(m) of that minimum m, by quadrature; n >= 1, real or integer (W3)."""
    end = 12  # phi is below 1e-31 from there
    integral, _ = quad(lambda m: g(m) * minimum_pdf(m, n), -end, end, epsabs=1e-13, limit=200)
    return integral


def a_n(n):
    """a_n = -E min of n standard normals, W3: 0, 1/sqrt(pi), 3/(2 sqrt(pi)), ... ~ sqrt(2 ln n)."""
    return minimum_expectation(np.negative, n) if n > 1 else 0.0


def assignment_bounds(k):
    """Bounds of b_k, the mean entry of the largest assignment of a k x k normal matrix (W7).

    Above a_k, the mean of each row's largest; below (a_1 + ... + a_k) / k, that of a greedy plan.
    """
    return sum(a_n(j) for j in range(1, k + 1)) / k, a_n(k)


def initial_field(x, n):
    """u_0(x) (N, d) of local worst transport by n candidates; x (N, d), none 0 (W3).

    -(1 + a_n / |x|) x = -grad(|x|^2 / 2 + a_n |x|).
    """
    return -(1 + a_n(n) / np.linalg.norm(x, axis=1, keepdims=True)) * x


# ---- Estimators -------------------------------------------------------------------------------
def minibatch_worst(x_0, generator=None, block=256):
    """The worst plan (W1): noise (N, d), permuted in blocks so that E|x_1 - x_0|^2 is largest."""
    x_1 = wtflow.independent(x_0, generator)
    for a, b in zip(x_0.split(block), x_1.split(block), strict=True):
        _, order = linear_sum_assignment((a @ b.T).double().numpy())
        b.copy_(b[torch.as_tensor(order)])
    return x_1


def worst_candidate(x_0, generator=None, n=64):
    """x_1 of local worst transport for x_0 (N, d) or (B, d, h, w), at each position alone (W3).

    Of n candidates z_k the one of smallest <x_0, z_k>, sampled from its exact distribution: along
    e = x_0/|x_0| the minimum m of n standard normals, across e N(0, I). So n costs nothing; n = 1
    is rFM. Where x_0 = 0 all candidates are equal: x_1 ~ N(0, I). [ours: a reading of "local"]
    """
    z = wtflow.independent(x_0, generator)
    shape = x_0[:, :1].shape
    u = torch.rand(shape, generator=generator, dtype=torch.float64, device=x_0.device)
    log_u = u.clamp_min(2.0**-53).log()  # the smallest u but 0, of which m would be infinite
    m = torch.special.ndtri(-torch.expm1(log_u / n)).to(x_0.dtype)
    e = torch.nn.functional.normalize(x_0, dim=1)
    return z + (m - (z * e).sum(1, keepdim=True)) * e


def largest_cost(x_0, x_1):
    """max over all pairings of sum |x_1 - x_0|^2, tried one by one; (N, d) arrays, N <= 8 (W1)."""
    cost = ((x_0[:, None] - x_1[None]) ** 2).sum(-1)
    rows = np.arange(len(x_0))
    return max(cost[rows, list(plan)].sum() for plan in itertools.permutations(rows))


def largest_assignment(k, matrices, generator):
    """b_k by the Hungarian algorithm on k x k normal matrices, and its standard error (W7)."""
    entries = normal(generator, matrices, k, k).numpy()
    means = [z[linear_sum_assignment(z, maximize=True)].mean() for z in entries]
    return mean_se(means)


def strength_of_minibatch(x_0, generator, k):
    """rho of the worst plan of batches of k, and its standard error over them; x_0 (N, d) (W7).

    rho = -E<x_1, x_0/|x_0|> / sqrt(d), as in wtflow.worst, W5.
    """
    x_1 = minibatch_worst(x_0, generator, block=k)
    pull = -along_direction(x_1, x_0) / x_0.shape[1] ** 0.5
    return mean_se(pull.view(-1, k).mean(1))


def along_direction(x_1, x_0):
    """Component (N,) of x_1 along x_0 / |x_0|, both (N, d)."""
    return (x_1 * x_0).sum(1) / x_0.norm(dim=1)


def signal_to_noise(u, e):
    """|E u|^2 / tr Cov u for targets u (N, d) of one x_0, and its standard error (W3, W5).

    The mean is taken along its direction e (d,).
    """
    mean, mean_error = mean_se(u @ e)
    noise, noise_error = mean_se((u - u.mean(0)).square().sum(1))
    ratio = mean**2 / noise
    return ratio, ratio * np.hypot(2 * mean_error / mean, noise_error / noise)


def kernel_field(x, x_t, u, h):
    """E[u | x_t = x] (N, d) by Nadaraya-Watson of bandwidth h, and log (N,) of the kernel mass.

    Arrays: x (N, d); x_t and u (M, d), inputs and targets of the loss.
    """
    log_k = -((x[:, None] - x_t) ** 2).sum(-1) / (2 * h**2)
    return softmax(log_k, axis=1) @ u, logsumexp(log_k, axis=1)


# ---- Table ------------------------------------------------------------------------------------
def table(seed=0):
    """Rows for W1-W4 and W7."""
    generator = torch.Generator().manual_seed(seed)
    yield from rows_W1(generator)
    z = normal(generator, 20_000, 16)
    yield from rows_W2(z, generator)
    yield from rows_W3(z, generator)
    yield from rows_W4(z[:200])
    yield from rows_W7(generator)


def rows_W1(generator):
    """Rows for W1."""
    x_0 = normal(generator, 7, 3)
    x_1 = minibatch_worst(x_0, generator)
    largest = largest_cost(x_0.numpy(), x_1.numpy())
    cost = (x_1 - x_0).square().sum().item()
    yield Row("W1", "cost of the worst plan, 7! plans tried", largest, cost)


def rows_W2(z, generator):
    """Rows for W2; z (N, d) ~ N(0, I)."""
    for s, rho in ((0.3, 0.6), (0.3, 0.9), (1.0, 0.5)):
        couple = partial(gaussian_coupling, s=s, rho=rho)
        name = f"s={s}, rho={rho}"
        fit = fitted_slope(*pairs(s * z, couple, 0.0, generator))
        yield Row("W2", f"slope at t=0, {name}", slope(0.0, s, rho), *fit)
        time, largest = peak(s, rho)
        fit = fitted_slope(*pairs(s * z, couple, time, generator))
        yield Row("W2", f"largest slope, t={time:.3f}, {name}", largest, *fit)
        trough = 2 * (s**2 + rho * s) / (1 + s**2 + 2 * rho * s) - time
        fit = fitted_slope(*pairs(s * z, couple, trough, generator))
        yield Row("W2", f"least slope, t={trough:.3f}, {name}", -largest, *fit)


def rows_W3(z, generator):
    """Rows for W3; z (N, 16) ~ N(0, I)."""
    for n in (2, 64):
        x_1 = worst_candidate(3 * z, generator, n)
        along = along_direction(x_1, z)
        yield Row("W3", f"component of x_1 along x_0, n={n}", -a_n(n), *mean_se(along))
        across = (x_1.square().sum(1) - along.square()) / 15
        yield Row("W3", f"  mean square of the others, n={n}", 1, *mean_se(across))
    yield Row("W3", "a_3", 3 / (2 * np.pi**0.5), a_n(3))


def rows_W4(x_0):
    """Rows for W4 at points x_0 (N, 16)."""
    x1_hat = wtflow.euler(lambda x, t: torch.as_tensor(initial_field(x.numpy(), 64)), x_0)
    radius = x1_hat.norm(dim=1).mean().item()
    yield Row("W4", "|x1_hat| of one step under u_0, n=64", a_n(64), radius)
    log_p = wtflow.log_density(x1_hat).mean().item()
    yield Row("W4", "log p = -a_n^2 / 2d, d=16", -(a_n(64) ** 2) / (2 * 16), log_p)


def rows_W7(generator):
    """Rows for W7: the worst plan of k vectors, beside that of k x k normal numbers."""
    b_2 = largest_assignment(2, 10_000, generator)
    yield Row("W7", "b_2, simulated", (2 * np.pi) ** -0.5, *b_2)
    for k, d, batches in ((8, 120, 1000), (8, 4096, 200), (256, 4096, 4)):
        b_k, b_error = largest_assignment(k, max(40, 16_000 // k**2), generator)
        x_0 = normal(generator, batches * k, d)
        rho, error = strength_of_minibatch(x_0, generator, k)
        what = f"rho of the worst plan of {k}, d={d}: b_{k} / sqrt(d)"
        yield Row("W7", what, b_k / d**0.5, rho, float(np.hypot(error, b_error / d**0.5)))
