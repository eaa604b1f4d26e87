"""theory/conventions.py: what is exact is so to the last bit. How to read: claims.py."""

import torch
from claims import claim, close, field_condition, point_and_means, rejects, rng, seeds, times
from hypothesis import strategies as st
from scipy.special import softmax

import wtflow
from theory import singularity
from theory.conventions import (
    clock,
    reversed_in_time,
    velocity_of_data,
    velocity_of_noise,
    velocity_of_score,
)

sixteenths = st.integers(1, 15).map(lambda k: k / 16)  # with small whole numbers no rounding at all


@claim(
    velocity_of_noise, velocity_of_data, velocity_of_score, examples=25, t=sixteenths, seed=seeds
)
def test_velocity_of_a_pair(of_noise, of_data, of_score, t, seed):
    """From either end of a path u = x_1 - x_0, to the last bit; the score given x_0 is -x_1/t."""
    x_0, x_1 = torch.randint(-99, 100, (2, 5, 3), generator=rng(seed)).double()
    x_t = wtflow.path(x_0, x_1, torch.full((5,), t, dtype=x_0.dtype))
    assert torch.equal(of_noise(x_t, x_1, t), x_1 - x_0)
    assert torch.equal(of_data(x_t, x_0, t), x_1 - x_0)
    close(of_score(x_t, -x_1 / t, t), x_1 - x_0, 1e3 / (1 - t))


test_velocity_of_a_pair_rejects = rejects(
    test_velocity_of_a_pair,
    of_noise={"the clock of flow matching": lambda x, eps, t: (eps - x) / t},
    of_data={"the clock of flow matching": lambda x, x_0, t: (x - x_0) / (1 - t)},
    of_score={"eps for the score": velocity_of_noise},
)


@claim(reversed_in_time, examples=25, seed=seeds)
def test_reversed_field(reverse, seed):
    """Flow matching's path and target at 1 - t are these, to the last bit; twice gives it back."""
    x_0, x_1 = torch.randn(2, 64, 3, generator=rng(seed))
    t = torch.rand(64, generator=rng(seed + 1))

    def forward(x, s):  # the target of flow matching: data minus noise, of its path at s
        assert torch.equal(x, wtflow.path(x_1, x_0, s))
        return (x_0 - x_1) * s[:, None]

    field = reverse(forward)(wtflow.path(x_0, x_1, t), t)
    assert torch.equal(field, (x_1 - x_0) * (1 - t)[:, None])
    assert torch.equal(reverse(reverse(torch.mul))(x_0, t[:, None]), x_0 * t[:, None])


test_reversed_field_rejects = rejects(
    test_reversed_field,
    reverse={"the clock alone": lambda field: lambda x, t: field(x, 1 - t)},
)


def velocity_of_ddpm(x, alpha_bar, mu):
    """u_t (1, d) at DDPM's point x (1, d) of atoms mu (K, d), by its eps-prediction."""
    alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    weights = softmax(-((x[:, None] - alpha * mu) ** 2).sum(-1) / (2 * sigma**2), axis=1)
    eps = (x - alpha * weights @ mu) / sigma
    t, scale = clock(alpha, sigma)
    return velocity_of_noise(scale * x, eps, t)


@claim(velocity_of_ddpm, examples=20, alpha_bar=times, d=st.integers(1, 6), seed=seeds)
def test_ddpm(velocity, alpha_bar, d, seed):
    """The exact eps-prediction for a training set gives S2's exact field."""
    x, mu = point_and_means(d, seed)
    t, scale = clock(alpha_bar**0.5, (1 - alpha_bar) ** 0.5)
    assert clock(1.0, 0.0) == (0, 1) and clock(0.0, 1.0) == (1, 1)
    u = singularity.marginal_field(scale * x[None], t, mu)
    close(velocity(x[None], alpha_bar, mu), u, 10 * field_condition(scale * x, t, mu, 0.0))


test_ddpm_rejects = rejects(
    test_ddpm,
    velocity={"alpha for its root": lambda x, a, mu: velocity_of_ddpm(x, a**2, mu)},
)
