"""Claims S1..S3, C1..C5 and W1..W4 of WT-Flow, each as a closed form, an estimator that does not use it, and a figure.

Time runs from data (t = 0) to noise (t = 1). x_0 ~ q in R^d, x_1 ~ N(0, I_d), x_t = (1-t) x_0 + t x_1, u = x_1 - x_0,
u_t(x) = E[u | x_t = x], m2 = E|x_0|^2. No unit but that of the features. Proofs and figures: README.md beside this file.
Tags: [paper] the abstract says so; [derived] proved in README.md; [ours] a choice of this project.
"""
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

# Okabe & Ito's palette: told apart with any colour vision, and in this order also in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")


class Row(NamedTuple):
    """One line of the table. se: standard error of `measured`, 0 where it is exact up to rounding or quadrature."""
    claim: str
    what: str
    predicted: float
    measured: float
    se: float = 0.0


def mean_se(values):
    """Mean and standard error of independent values (N,)."""
    values = np.asarray(values, float)
    return values.mean(), values.std(ddof=1) / len(values) ** 0.5


def exponent(x, y):
    """Least-squares slope of log y on log x, and its standard error. Raises ValueError unless all are positive."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if (x <= 0).any() or (y <= 0).any():
        raise ValueError("a power law is fitted to positive numbers")
    a, b = np.log(x) - np.log(x).mean(), np.log(y) - np.log(y).mean()
    slope = a @ b / (a @ a)
    return slope, (((b - slope * a) ** 2).sum() / max(len(x) - 2, 1) / (a @ a)) ** 0.5


def panels(rows, columns, width=4.2, height=3.4):
    """A figure and its axes in reading order, without a window system."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes
