"""R: what the claims assume and predict, beside real features. Data at 0, noise at 1.

The features are those that the default recipe is trained on, whitened; the field is rFM's without
time conditioning, of the same recipe. No claim says that features fulfil an assumption: a row shows
how far they are from it. README.md has the table of three sets. Figure: draw.real_features_figure.
"""

from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr

import evaluate
import train
import wtflow
from theory import Row, mean_se
from theory.concentration import inward_probability, radius_std, turning

ROWS = 20_000  # positions that are drawn from a set


class Measured(NamedTuple):
    """Positions of a category before whitening (n, d) and after it, its field and good scores."""

    name: str
    raw: torch.Tensor
    x_0: torch.Tensor
    v_theta: torch.nn.Module
    good_scores: np.ndarray


def measure(category, seed=0, **settings):
    """The Measured of an evaluate.Category: train.fit_detector on its good images."""
    recipe = wtflow.Recipe(coupling="independent", **settings)
    detector = evaluate.new_detector(category.train, recipe, device="cpu")
    features, _ = evaluate.extract_good(detector, category.train, category.train)
    return fitted(category.name, detector, features, seed)


def control(n=200, seed=0, **settings):
    """The Measured of n maps of noise, which fulfil every assumption: what training alone adds."""
    detector = wtflow.Detector(wtflow.Recipe(coupling="independent", **settings))
    h, w = (side // detector.recipe.spacing for side in wtflow.image_shape(detector.recipe))
    shape = (n, len(detector.feature_mean), h, w)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()
    return fitted("noise", detector, features, seed)


def fitted(name, detector, features, seed):
    """The Measured of features (n, d, h, w), and of a detector that is fitted to them here."""
    train.fit_detector(detector, features, seed)
    rows = features.movedim(1, -1).reshape(-1, features.shape[1])
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:ROWS]
    raw, scores = rows[chosen].float(), detector.normal_scores.numpy()
    return Measured(name, raw, detector.normalise(raw), detector.field, scores)


def effective_dimension(x):
    """(tr S)^2 / tr S^2 of the covariance S of x (n, d): d if it is isotropic, 1 if on a line."""
    S = torch.cov(x.double().T)
    return (S.trace() ** 2 / S.square().sum()).item()


def kurtosis(x):
    """Mean over the components of x (n, d) of E z^4 / (E z^2)^2: 3 if they are Gaussian."""
    z = x.double() - x.double().mean(0)
    return (z.pow(4).mean(0) / z.square().mean(0).square()).mean().item()


def thickness(x):
    """Median standard deviation along the principal axes of x (n, d), over the largest."""
    values = torch.linalg.eigvalsh(torch.cov(x.double().T)).clamp_min(0).sqrt()
    return (values.median() / values[-1]).item()


@torch.no_grad()
def table(measured, seed=0):
    """Rows for R of one Measured. Predicted is what the claim says where its assumption holds."""
    name, raw, x_0, v_theta, scores = measured
    generator, d = torch.Generator().manual_seed(seed), x_0.shape[1]
    squared = x_0.double().square().sum(1)
    m2, radius = squared.mean().item(), (squared / d).sqrt().numpy()
    yield Row("R", f"{name}: effective dimension before whitening", d, effective_dimension(raw))
    yield Row("R", f"{name}: after it", d, effective_dimension(x_0))
    yield Row(
        "R", f"{name}: median width over the largest before whitening (S2)", 1, thickness(raw)
    )
    yield Row("R", f"{name}: E|x_0|^2 / d (C3, W5)", 1, m2 / d)
    yield Row("R", f"{name}: std of |x_0| / sqrt(d), noise has (C1)", radius_std(d), radius.std())
    yield Row("R", f"{name}: kurtosis of a component, Gaussian", 3, kurtosis(x_0))

    time, least = turning(m2, d)
    t = torch.full((len(x_0),), time)
    x_1 = wtflow.independent(x_0, generator)
    x_t = wtflow.path(x_0, x_1, t)
    dip = mean_se(x_t.double().square().sum(1) / d)
    yield Row("R", f"{name}: least E|x_t|^2 / d, at t* (C3)", least / d, *dip)
    inward = ((wtflow.path(x_0, x_1, 0.9 * t) * (x_1 - x_0)).sum(1) < 0).double()
    expected = float(np.mean(inward_probability(0.9 * time, squared.numpy(), d)))
    yield Row("R", f"{name}: share of inward paths at 0.9 t* (C3)", expected, *mean_se(inward))

    v = v_theta(x_0, torch.zeros(len(x_0)))
    share = v.norm(dim=1) / x_0.norm(dim=1)
    yield Row("R", f"{name}: |v(x_0)| / |x_0|, exchangeable (B2)", 0, *mean_se(share))
    rank = spearmanr((x_0 + v).norm(dim=1), radius).statistic
    yield Row("R", f"{name}: rank correlation of |x1_hat|, |x_0| (B2)", 1, rank)
    index = 1 / evaluate.fit_tail(scores).scale
    yield Row("R", f"{name}: tail index of the image score, light (E2)", np.inf, index)
