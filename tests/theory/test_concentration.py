"""C1-C5: theory/concentration.py, and the noise of wtflow. How to read: claims.py."""

from functools import partial

import numpy as np
import torch
from claims import (
    P,
    claim,
    close,
    dims,
    dims_from_2,
    draw,
    kinds,
    point_and_means,
    rejects,
    rhos_to_1,
    rng,
    scales,
    scales_or_0,
    seeds,
    table_test,
    times,
    within,
)
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import binomtest, chi, kstest

import wtflow
from theory import concentration, mean_se, normal, singularity, worst_transport


# ---- C1 ---------------------------------------------------------------------------------------
@claim(
    concentration.radius_std,
    concentration.cosine_distribution,
    wtflow.independent,
    examples=12,
    d=dims_from_2,
    seed=seeds,
)
def test_C1_shell(radius_std, distribution, noise, d, seed):
    """The radius of wtflow's noise is chi_d, and its cosine has this distribution; the limit."""
    x_1 = noise(torch.zeros(3000, d, dtype=torch.float64), rng(seed))
    radius = x_1.norm(dim=1)
    assert kstest((x_1[:, 0] / radius).numpy(), distribution(d).cdf).pvalue > P
    assert kstest(radius.numpy(), chi(d).cdf).pvalue > P
    close(distribution(d).var(), 1 / d, 10)
    close(radius_std(d), chi(d).std() / d**0.5, 100 * d)
    assert abs(radius_std(50 * d) * (100 * d) ** 0.5 - 1) < 1 / (50 * d)


test_C1_shell_rejects = rejects(
    test_C1_shell,
    radius_std={"the limit for the value": lambda d: (1 / (2 * d)) ** 0.5},
    distribution={"dimension": lambda d: concentration.cosine_distribution(d + 1)},
    noise={"5 % too long": lambda x_0, generator: 1.05 * wtflow.independent(x_0, generator)},
)


# ---- C2 ---------------------------------------------------------------------------------------
@claim(lambda x: -x, examples=20, kind=kinds, d=dims, s=scales, seed=seeds)
def test_C2_centripetal(initial, kind, d, s, seed):
    """u_0(x) = -x, of a mixture in closed form and of every q by wtflow pairs."""
    x, mu = point_and_means(d, seed)
    field = singularity.marginal_field(x[None], 0.0, mu, s)[0]
    close(field, initial(x), 1 + np.abs(x).max())
    x_0 = draw(kind, 3000, max(d, 2), s, seed)
    x_t, u = singularity.pairs(x_0, wtflow.independent, 0.0, rng(seed + 2))
    within(singularity.fitted_slope(x_t, u), initial(np.ones(1))[0])


test_C2_centripetal_rejects = rejects(
    test_C2_centripetal, initial={"centrifugal": lambda x: x, "factor": lambda x: -2 * x}
)


# ---- C3 ---------------------------------------------------------------------------------------
@claim(
    concentration.inward,
    concentration.turning,
    examples=20,
    kind=kinds,
    d=dims_from_2,
    t=times,
    s=scales,
    seed=seeds,
)
def test_C3_radial(inward, turning, kind, d, t, s, seed):
    """E<x_t, u> by wtflow pairs of every q, conditional on the sample's own m2; the dip at t*."""
    x_0 = draw(kind, 4000, d, s, seed)
    squared = x_0.square().sum(1)
    m2 = squared.mean().item()
    radial = concentration.radial_velocity(x_0, t, rng(seed + 2)) + (1 - t) * (squared - m2)
    within(mean_se(radial), inward(t, m2, d))
    time, least = turning(m2, d)
    energies = [(1 - k) ** 2 * m2 + k**2 * d for k in (time, time - 0.01, time + 0.01)]
    close(energies[0], least, m2 + d)
    assert energies[0] < min(energies[1:])
    close(inward(time, m2, d), 0, m2 + d)


test_C3_radial_rejects = rejects(
    test_C3_radial,
    inward={"missing d": lambda t, m2, d: t - (1 - t) * m2},
    turning={"t* of noise": lambda m2, d: (d / (m2 + d), m2 * d / (m2 + d))},
)


@claim(
    concentration.inward_probability,
    examples=15,
    d=dims,
    t=times,
    m2=st.floats(0.1, 40),
    seed=seeds,
)
def test_C3_sign(probability, d, t, m2, seed):
    """The number of 3000 samples that move inwards is binomial with it."""
    x_0 = concentration.shell(3000, d, rng(seed)) * (m2 / d) ** 0.5
    inside = int((concentration.radial_velocity(x_0, t, rng(seed + 1)) < 0).sum())
    share = float(np.clip(probability(t, m2, d), 1e-12, 1 - 1e-12))
    assert binomtest(inside, 3000, share).pvalue > P


def probability_in_next_dimension(t, m2, d):
    return concentration.inward_probability(t, m2, d + 1)


test_C3_sign_rejects = rejects(
    test_C3_sign, probability={"degrees of freedom off by one": probability_in_next_dimension}
)


# ---- C4 ---------------------------------------------------------------------------------------
def gaussian_pairs(n, d, s, rho, seed):
    """Points (n, d) of N(0, s^2 I) and the coupling of correlation -rho."""
    couple = partial(worst_transport.gaussian_coupling, s=s, rho=rho)
    return s * normal(rng(seed), n, d), couple


@claim(concentration.kinetic_energy, concentration.loss_floor, examples=30, s=scales, rho=rhos_to_1)
def test_C4_energy(energy, floor, s, rho):
    """The integral of a^2 sigma^2, at least W2^2; with the floor it is the cost of the coupling."""

    def power(t):
        return singularity.slope(t, s, rho) ** 2 * singularity.variance(t, s, rho)

    if abs(rho) < 1:
        steepest = np.clip(singularity.peak(s, rho)[0], 0, 1)
        exact, _ = quad(power, 0, 1, points=[steepest], epsabs=1e-11)
        assert abs(energy(s, rho) - exact) < 1e-8
    assert energy(s, rho) >= (1 - s) ** 2 - 1e-12
    close(energy(s, rho) + floor(s, rho), 1 + s**2 + 2 * rho * s, 10)
    t = np.linspace(0, 1, 21)[1:-1]
    straight = (1 - t) * s + t
    assert (singularity.variance(t, s) < straight**2).all()


def energy_of_right_angle(s, rho):
    return 1 + s**2 + 2 * rho * s - s * (1 - rho**2) ** 0.5 * np.pi / 2


test_C4_energy_rejects = rejects(
    test_C4_energy,
    energy={"arccos(0) for arccos(-rho)": energy_of_right_angle},
    floor={"OT for WT": lambda s, rho: concentration.loss_floor(s, -rho)},
)


@claim(
    concentration.loss_floor,
    wtflow.flow_matching_loss,
    examples=10,
    d=dims,
    s=scales,
    rho=rhos_to_1,
    seed=seeds,
)
def test_C4_floor(floor, loss, d, s, rho, seed):
    """wtflow's loss of the affine field, t ~ U(0, 1): of Gaussian data and of the signs +-s."""

    def field(x, t):
        return singularity.slope(t, s, rho)[:, None] * x

    gaussian, couple = gaussian_pairs(4000, d, s, rho, seed)
    for x_0 in (gaussian, s * gaussian.sign()):
        within(mean_se(loss(field, x_0, couple, rng(seed + 1))), floor(s, rho), slack=1e-9)


def loss_at_early_times(v_theta, x_0, couple, generator):
    t = torch.rand(len(x_0), generator=generator, dtype=x_0.dtype) ** 2
    return wtflow.flow_matching_loss(v_theta, x_0, couple, generator, t)


test_C4_floor_rejects = rejects(
    test_C4_floor,
    floor={"the start for the mean": lambda s, rho: 1 - rho**2},
    loss={"t not uniform": loss_at_early_times},
)


@claim(concentration.excess, examples=20, kind=kinds, d=dims_from_2, t=times, s=scales, seed=seeds)
def test_C4_every_q(excess, kind, d, t, s, seed):
    """wtflow's plans of a batch, against its own m2, E|x_1|^2 and cost; >= 0 if optimal."""
    x_0 = draw(kind, 60, d, s, seed)
    m2 = x_0.square().sum(1).mean().item()
    for plan, sign in ((wtflow.optimal, 1), (worst_transport.minibatch_worst, -1)):
        x_t, u = singularity.pairs(x_0, plan, t, rng(seed + 1))
        power = (x_0 + u).square().sum(1).mean().item()
        rfm = (1 - t) ** 2 * m2 + t**2 * power
        predicted = excess(t, m2, power, u.square().sum(1).mean().item())
        close(x_t.square().sum(1).mean().item() - rfm, predicted, 10 * (m2 + power))
        independent = (x_0.mean(0) * (x_0 + u).mean(0)).sum().item()  # of all plans, on average
        assert sign * (predicted / (t * (1 - t)) - 2 * independent) >= -1e-9


test_C4_every_q_rejects = rejects(
    test_C4_every_q,
    excess={
        "2 t (1-t)": lambda *x: 2 * concentration.excess(*x),
        "sign": lambda *x: -concentration.excess(*x),
    },
)


# ---- C5 ---------------------------------------------------------------------------------------
@claim(lambda x, mean: x - mean, examples=25, d=dims, s=scales_or_0, seed=seeds)
def test_C5_final(final, d, s, seed):
    """u_1(x) = x - E x_0."""
    x, mu = point_and_means(d, seed)
    condition = 20 * (1 + np.abs(x).max() ** 2 + np.abs(mu).max() ** 2) * (1 + d)
    field = singularity.marginal_field(x[None], 1.0, mu, s)[0]
    close(field, final(x, mu.mean(0)), condition)


test_C5_final_rejects = rejects(test_C5_final, final={"sign": lambda x, mean: x + mean})


# ---- The printed table ------------------------------------------------------------------------
test_table = table_test(concentration.table, "C1", "C2", "C3", "C4", "C5")
