"""W5, W6: theory/local_transport.py, wtflow.worst, conditional_mean. How to read: claims.py."""

from functools import partial

import numpy as np
import torch
from claims import (
    P,
    claim,
    close,
    dims,
    dims_from_2,
    rejects,
    rhos,
    rng,
    seeds,
    table_test,
    within,
)
from hypothesis import strategies as st
from scipy.stats import chi, kstest
from torch.nn.functional import normalize

import wtflow
from theory import local_transport, mean_se, normal, singularity
from theory.worst_transport import a_n, signal_to_noise, worst_candidate

sizes = st.floats(0.01, 100)  # of x_0, which the noise does not depend on


def numpy_field(field, x, rho):
    """A closed form of arrays at tensors."""
    return torch.as_tensor(field(x.numpy(), rho))


# ---- W5: the distribution of the noise --------------------------------------------------------
@claim(wtflow.worst, examples=12, rho=rhos, d=dims, size=sizes, seed=seeds)
def test_W5_noise(couple, rho, d, size, seed):
    """Given x_0: N(-rho sqrt(d) e, (1 - rho^2) I), e = x_0/|x_0|, whatever |x_0|; 0: rFM."""
    x_0 = size * normal(rng(seed), 2000, d)
    x_1 = couple(x_0, rng(seed + 1), rho)
    z = (x_1 + rho * d**0.5 * normalize(x_0)) / (1 - rho**2) ** 0.5
    assert kstest(z.ravel().numpy(), "norm").pvalue > P
    assert kstest(z.norm(dim=1).numpy(), chi(d).cdf).pvalue > P
    within(mean_se((z * normalize(x_0)).sum(1)), 0)
    close(couple(8 * x_0, rng(seed + 1), rho), x_1, 1e3)


def antipode(x_0, generator, rho):
    return -rho * normalize(x_0) * x_0.shape[1] ** 0.5


def best(x_0, generator, rho):
    return wtflow.worst(x_0, generator, -rho)


def off_the_shell(x_0, generator, rho):
    return antipode(x_0, generator, rho) + wtflow.independent(x_0, generator)


def correlated(x_0, generator, rho):
    """The Gaussian coupling, which follows |x_0|."""
    return -rho * x_0 + (1 - rho**2) ** 0.5 * wtflow.independent(x_0, generator)


def candidates_of_rho(x_0, generator, rho):
    n = max(1.0, local_transport.candidates(abs(rho), x_0.shape[1]))
    return worst_candidate(x_0, generator, n)


test_W5_noise_rejects = rejects(
    test_W5_noise,
    couple={
        "OT for WT": best,
        "no noise": antipode,
        "all of the noise": off_the_shell,
        "the Gaussian coupling": correlated,
        "as many candidates": candidates_of_rho,
        "rFM": lambda x_0, generator, rho: wtflow.independent(x_0, generator),
    },
)


@claim(wtflow.worst, examples=6, rho=rhos, d=dims, seed=seeds)
def test_W5_images(couple, rho, d, seed):
    """(B, d, h, w): each position alone, at any scale; x_0 = 0 gives sqrt(1 - rho^2) z."""
    x_0 = normal(rng(seed), 6, d, 10, 10) * normal(rng(seed + 2), 6, 1, 10, 10).exp()
    x_0[0] = 0
    x_1 = couple(x_0, rng(seed + 1), rho)
    e = normalize(x_0, dim=1)
    z = (x_1 + rho * d**0.5 * e) / (1 - rho**2) ** 0.5
    assert kstest(z.ravel().numpy(), "norm").pvalue > P
    within(mean_se((z * e).sum(1).ravel()), 0)


def worst_of_image(x_0, generator, rho):
    return wtflow.worst(x_0.flatten(1), generator, rho).view(x_0.shape)


test_W5_images_rejects = rejects(
    test_W5_images, couple={"one direction for the whole image": worst_of_image}
)


@claim(
    local_transport.energy_distribution,
    local_transport.energy_variance,
    examples=10,
    rho=rhos,
    d=dims,
    seed=seeds,
)
def test_W5_energy(distribution, variance, rho, d, seed):
    """|x_1|^2 has this distribution, of mean d; N(0, 1) moments where x_0/|x_0| is uniform."""
    x_1 = wtflow.worst(normal(rng(seed), 8000, d), rng(seed + 1), rho)
    energy = x_1.square().sum(1)
    assert kstest(energy.numpy(), distribution(rho, d).cdf).pvalue > P
    close(distribution(rho, d).mean(), d, 100 * d)
    close(distribution(rho, d).var(), variance(rho, d), 1e3 * d)
    within(mean_se(x_1[:, 0].square()), 1)
    within(mean_se(x_1[:, 0] * x_1[:, -1]), 1 if d == 1 else 0)


test_W5_energy_rejects = rejects(
    test_W5_energy,
    distribution={
        "that of noise": lambda rho, d: local_transport.energy_distribution(0.0, d),
        "degrees of freedom off by one": lambda rho, d: local_transport.energy_distribution(
            rho, d + 1
        ),
    },
    variance={
        "that of noise": lambda rho, d: 2 * d,
        "exponent": lambda rho, d: 2 * d * (1 - rho**2),
        "no 2": lambda rho, d: d * (1 - rho**4),
    },
)


@claim(local_transport.distance_to_noise, examples=5, rho=st.sampled_from((-0.9, 0.5, 0.97)))
def test_W5_distance(distance, rho):
    """The limit of the distance of the radii, reached to 0.01 at d = 2000, and 0 for rFM."""
    probability = np.linspace(0, 1, 4001)[1:-1]
    radii, noise = (
        local_transport.energy_distribution(k, 2000).ppf(probability) ** 0.5 for k in (rho, 0.0)
    )
    assert abs(np.mean((radii - noise) ** 2) ** 0.5 - distance(rho)) < 0.01
    assert distance(0.0) == 0


test_W5_distance_rejects = rejects(
    test_W5_distance,
    distance={
        "exponent": lambda rho: (1 - (1 - rho**2) ** 0.5) / 2**0.5,
        "no 1/sqrt(2)": lambda rho: 1 - (1 - rho**4) ** 0.5,
    },
)


# ---- W5: the field, and signal to noise -------------------------------------------------------
@claim(
    local_transport.initial_field,
    wtflow.conditional_mean,
    examples=15,
    rho=rhos,
    d=dims,
    seed=seeds,
)
def test_W5_potential(field, conditional_mean, rho, d, seed):
    """u_0 is minus the gradient of |x|^2/2 + rho sqrt(d) |x|; u_0 + x is the conditional mean."""
    x = normal(rng(seed), 5, d).requires_grad_()
    potential = x.square().sum() / 2 + rho * d**0.5 * x.norm(dim=1).sum()
    (gradient,) = torch.autograd.grad(potential, x)
    x = x.detach()
    size = 10 * (1 + x.abs().max().item()) * d
    close(field(x, rho), -gradient, size)
    close(field(x.numpy(), rho), -gradient.numpy(), size)
    close(conditional_mean(x, rho), x + field(x, rho), size)


def linear_field(x, rho):
    return -(1 + rho) * x


test_W5_potential_rejects = rejects(
    test_W5_potential,
    field={
        "that of the Gaussian coupling": linear_field,
        "OT for WT": lambda x, rho: local_transport.initial_field(x, -rho),
        "rFM": lambda x, rho: -x,
    },
    conditional_mean={
        "the origin": lambda x, rho: 0 * x,
        "the other side": lambda x, rho: wtflow.conditional_mean(x, -rho),
        "no sqrt(d)": lambda x, rho: wtflow.conditional_mean(x, rho) / (x.shape[1] + 1) ** 0.5,
    },
)


@claim(local_transport.initial_field, examples=10, rho=rhos, d=dims, seed=seeds)
def test_W5_initial_field(field, rho, d, seed):
    """The mean of u at one x by pairs of wtflow.worst; its noise is d (1 - rho^2)."""
    x = normal(rng(seed), 1, d)
    _, u = singularity.pairs(x.expand(4000, d), partial(wtflow.worst, rho=rho), 0.0, rng(seed + 1))
    predicted = numpy_field(field, x, rho)[0]
    for k in range(d):
        within(mean_se(u[:, k]), predicted[k].item())
    within(mean_se((u - predicted).square().sum(1)), d * (1 - rho**2))


test_W5_initial_field_rejects = rejects(
    test_W5_initial_field,
    field={"rFM": lambda x, rho: -x, "that of the Gaussian coupling": linear_field},
)


@claim(local_transport.gain, examples=10, rho=st.floats(-0.4, 0.95), d=dims_from_2, seed=seeds)
def test_W5_gain(gain, rho, d, seed):
    """At one x_0, |x_0| = 2 sqrt(d), over rFM's 4; (1+rho)/(1-rho) at m2 = d."""
    x_0 = 2 * d**0.5 * normalize(normal(rng(seed), 1, d)).expand(6000, d)
    u = wtflow.worst(x_0, rng(seed + 1), rho) - x_0
    ratio, error = signal_to_noise(u, normalize(x_0[0], dim=0))
    within((ratio / 4, error / 4), gain(rho, d, 4.0 * d))
    close(gain(rho, d, d), (1 + rho) / (1 - rho), 10 / (1 - rho**2) ** 2)


test_W5_gain_rejects = rejects(
    test_W5_gain,
    gain={
        "missing square": lambda rho, d, m2: (1 + rho * (d / m2) ** 0.5) / (1 - rho**2),
        "no noise taken away": lambda rho, d, m2: (1 + rho * (d / m2) ** 0.5) ** 2,
        "m2 / d for d / m2": lambda rho, d, m2: local_transport.gain(rho, m2, d),
    },
)


# ---- W5: beside sampled candidates ------------------------------------------------------------
@claim(local_transport.candidates, examples=15, pull=st.floats(3, 7), d=st.integers(64, 1000))
def test_W5_candidates(candidates, pull, d):
    """a_n = rho sqrt(d) up to the third order in 1/a_n."""
    n = candidates(pull / d**0.5, d)
    assert abs(a_n(n) - pull) < 2 / pull**3


def exponential_alone(rho, d):
    return np.exp(rho**2 * d / 2)


test_W5_candidates_rejects = rejects(
    test_W5_candidates,
    candidates={
        "the leading order alone": exponential_alone,
        "without Euler's constant": lambda rho, d: local_transport.candidates(rho, d) * 1.78,
        "exp(rho^2 d)": lambda rho, d: local_transport.candidates(2**0.5 * rho, d),
    },
)


@claim(
    local_transport.candidate_energy, examples=8, n=st.integers(1, 300), d=dims_from_2, seed=seeds
)
def test_W5_candidate_energy(energy, n, d, seed):
    """E|x_1|^2 of the worst of n candidates, by pairs."""
    x_1 = worst_candidate(normal(rng(seed), 4000, d), rng(seed + 1), n)
    within(mean_se(x_1.square().sum(1)), energy(n, d))


test_W5_candidate_energy_rejects = rejects(
    test_W5_candidate_energy,
    energy={
        "on the shell": lambda n, d: d,
        "d for d - 1": lambda n, d: local_transport.candidate_energy(n, d) + 1,
        "square of the mean": lambda n, d: d - 1 + a_n(n) ** 2,
    },
)


# ---- W6 ---------------------------------------------------------------------------------------
def squared_residual(v_theta, x, rho):
    """|x1_hat - E[x_1 | x_0 = x]|^2 by wtflow's functions: -2 d log p."""
    residual = wtflow.euler(v_theta, x) - wtflow.conditional_mean(x, rho)
    return -2 * x.shape[1] * wtflow.log_density(residual)


@claim(squared_residual, examples=8, rho=rhos, d=dims, seed=seeds)
def test_W6_residual(square, rho, d, seed):
    """|v_theta(x, 0) - u_0(x)|^2, for any v_theta; nothing for the exact field, at every x."""
    torch.manual_seed(seed % 1000)
    network = (
        wtflow.PositionField(d, 8, time_conditioned=True).double().eval().requires_grad_(False)
    )
    x = normal(rng(seed), 20, d)
    u_0 = local_transport.initial_field(x, rho)
    squares = (network(x, torch.zeros(20, dtype=x.dtype)) - u_0).square().sum(1)
    close(square(network, x, rho), squares, 100 * (1 + squares.max().item()))
    close(square(lambda x, t: u_0, x, rho), 0, 100 * (1 + x.abs().max().item()) ** 2 * d)


def residual_of_two_steps(v_theta, x, rho):
    return (wtflow.euler(v_theta, x, 2) - wtflow.conditional_mean(x, rho)).square().sum(1)


test_W6_residual_rejects = rejects(
    test_W6_residual,
    square={
        "x1_hat for the residual": lambda v, x, rho: squared_residual(v, x, 0.0),
        "OT for WT": lambda v, x, rho: squared_residual(v, x, -rho),
        "two steps": residual_of_two_steps,
    },
)


def mixture(d, seed):
    """log q and its gradient for two Gaussians of width 0.5, on arrays (N, d), away from 0."""
    random = np.random.default_rng(seed)
    mu = random.normal(size=(2, d))
    mu[:, 0] += 3
    width = 0.5

    def log_q(x):
        squares = ((x[:, None] - mu) ** 2).sum(-1)
        return np.logaddexp(*(-squares.T / (2 * width**2)))

    def grad_log_q(x):
        weights = singularity.component_weights(x, 0.0, mu, width)
        return (weights @ mu - x) / width**2

    return mu, width, log_q, grad_log_q


@claim(local_transport.early_residual, examples=12, rho=rhos, d=st.integers(1, 3), seed=seeds)
def test_W6_early_residual(early_residual, rho, d, seed):
    """The first order of u_t - u_0 at small t, by quadrature: that of v - u_0 at T = 2t."""
    mu, _, log_q, grad_log_q = mixture(d, seed)
    x, t = mu[:1] + 0.3, 1e-4
    u_0 = local_transport.initial_field(x, rho)[0]
    measured = (local_transport.early_field(x[0], t, log_q, rho) - u_0) / t
    predicted = early_residual(x, grad_log_q(x), rho, 2 * t)[0] / t
    assert np.abs(measured - predicted).max() < 0.01 * (1 + np.abs(predicted).max())


def early_residual_of_all_noise(x, grad_log_q, rho, t_max):
    return -t_max / 2 * (grad_log_q - local_transport.initial_field(x, rho))


def early_residual_of_opposite_pull(x, grad_log_q, rho, t_max):
    return local_transport.early_residual(x, grad_log_q, -rho, t_max)


test_W6_early_residual_rejects = rejects(
    test_W6_early_residual,
    early_residual={
        "no 1 - rho^2": early_residual_of_all_noise,
        "OT for WT": early_residual_of_opposite_pull,
        "T for T/2": lambda *x: 2 * local_transport.early_residual(*x),
        "the time-conditioned field": lambda x, grad_log_q, rho, t_max: 0 * x,
    },
)


@claim(local_transport.early_field, examples=6, rho=rhos, d=st.integers(1, 2), seed=seeds)
def test_W6_early_field(field, rho, d, seed):
    """E[(u - u_t(x_t)) g(x_t)] = 0 by pairs of wtflow.worst; rho = 0 is S2's field."""
    mu, width, log_q, _ = mixture(d, seed)
    t = 0.05
    chosen = torch.randint(2, (600,), generator=rng(seed))
    x_0 = torch.as_tensor(mu)[chosen] + width * normal(rng(seed + 1), 600, d)
    x_t, u = singularity.pairs(x_0, partial(wtflow.worst, rho=rho), t, rng(seed + 2))
    exact = np.stack([field(x, t, log_q, rho) for x in x_t.numpy()])
    rest = u.numpy() - exact
    for g in (np.ones_like(rest), x_t.numpy(), np.sin(3 * x_t.numpy())):
        within(mean_se((rest * g).mean(1)), 0, slack=1e-3)
    x = x_t[:1].numpy()
    rfm = singularity.marginal_field(x, t, mu, width)[0]
    assert np.allclose(field(x[0], t, log_q, 0.0), rfm, atol=1e-3 * (1 + np.abs(rfm).max()))


def field_at_0(x, t, log_q, rho):
    return local_transport.initial_field(x[None], rho)[0]


def field_of_opposite_pull(x, t, log_q, rho):
    return local_transport.early_field(x, t, log_q, -rho)


def field_of_other_data(x, t, log_q, rho):
    return local_transport.early_field(x, t, lambda x: -log_q(x), rho)


test_W6_early_field_rejects = rejects(
    test_W6_early_field,
    field={
        "u_0 for u_t": field_at_0,
        "OT for WT": field_of_opposite_pull,
        "data where they are not": field_of_other_data,
    },
)


# ---- The printed table ------------------------------------------------------------------------
test_table = table_test(local_transport.table, "W5", "W6")
