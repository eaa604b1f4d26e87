"""Conversions of other conventions to this project's: data at t = 0, noise at t = 1, u = x_1 - x_0.

The table is in README.md. Functions of arrays or tensors; a time is a number or broadcasts. All are
[derived] from x_t = (1-t) x_0 + t x_1; the conventions are those of the papers named.
"""


def reversed_in_time(field):
    """u_t(x) of a field whose noise is at 0 and data at 1, or the other way round (S1).

    Flow matching (Lipman et al. 2023), rectified flow (Liu et al. 2023): field(x, t) -> -field(x,
    1-t). Twice gives the field back, to the last bit where 1 - t is exact: for multiples of 2^-24
    in single precision, 2^-53 in double, as torch.rand draws them.
    """
    return lambda x, t: -field(x, 1 - t)


def clock(alpha, sigma):
    """(t, scale) of alpha x_0 + sigma eps, alpha + sigma > 0: times `scale`, it is x_t of this t.

    DDPM (Ho et al. 2020): alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar). EDM (Karras et al.
    2022), variance-exploding scores (Song et al. 2021): alpha = 1.
    """
    return sigma / (alpha + sigma), 1 / (alpha + sigma)


def velocity_of_noise(x, eps, t):
    """u_t(x) from E[x_1 | x_t = x], what an eps-prediction learns: (eps - x) / (1-t), t < 1."""
    return (eps - x) / (1 - t)


def velocity_of_data(x, x_0, t):
    """u_t(x) from E[x_0 | x_t = x], what an x_0-prediction learns: (x - x_0) / t, t > 0."""
    return (x - x_0) / t


def velocity_of_score(x, score, t):
    """u_t(x) from grad log p_t(x) = -E[x_1 | x_t = x] / t (Tweedie), t < 1."""
    return velocity_of_noise(x, -t * score, t)
