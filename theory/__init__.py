"""Claims S1..S5, C1..C5, W1..W10, B1..B3, B6, O1..O3, E1..E4, R: formula, estimator, table.

Time runs from data (t = 0) to noise (t = 1). x_0 ~ q in R^d, x_1 ~ N(0, I_d), u = x_1 - x_0,
x_t = (1-t) x_0 + t x_1, u_t(x) = E[u | x_t = x], m2 = E|x_0|^2. No unit but that of the features.
A claim file holds its closed forms, its estimators and its table, in that order; draw.py draws.
Proofs and figures: README.md beside this file.
Tags: [paper] the abstract says so; [derived] proved in README.md; [ours] a choice of this project.
"""

from typing import NamedTuple

import numpy as np
import torch


class Row(NamedTuple):
    """One line of the table.

    predicted: nan where no closed form is known. se: standard error of `measured`, 0 where it is
    exact up to rounding or quadrature.
    """

    claim: str
    what: str
    predicted: float
    measured: float
    se: float = 0.0


def normal(generator, *shape):
    """Standard normal numbers of `shape` in double precision: no claim is to fail by rounding."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def mean_se(values):
    """Mean and standard error of independent values (N,)."""
    values = np.asarray(values, float)
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5


def std_se(values):
    """Standard deviation of independent normal values (N,), its standard error std / sqrt(2N)."""
    values = np.asarray(values, float)
    std = values.std(ddof=1)
    return std, std / (2 * len(values)) ** 0.5


def exponent(x, y):
    """Least-squares slope of log y on log x, both (N,), and its standard error.

    Raises ValueError unless all numbers are positive.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if (x <= 0).any() or (y <= 0).any():
        raise ValueError("a power law is fitted to positive numbers")
    log_x, log_y = np.log(x) - np.log(x).mean(), np.log(y) - np.log(y).mean()
    slope = log_x @ log_y / (log_x @ log_x)
    residual = log_y - slope * log_x
    freedom = max(len(x) - 2, 1)
    return slope, (residual @ residual / freedom / (log_x @ log_x)) ** 0.5
