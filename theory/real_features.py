"""R: what the claims assume and predict, beside real features. Data at 0, noise at 1.

The features, the field and the scores are those of the default recipe. No claim says that features
fulfil an assumption: a row shows how far they are from it. Maps of noise, which fulfil all of them,
are the control. Figure: draw.real_features_figure.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

import evaluate
import train
import wtflow
from theory import Row, mean_se, std_se
from theory.concentration import inward_probability, radius_std, turning
from theory.learned_field import auroc
from theory.local_transport import log_scores, score_spread

ROWS = 20_000  # positions that are drawn from a set
TIMES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the step's start
RHOS = (0.0, 0.5, 0.9)


class Measured(NamedTuple):
    """What is measured of one category.

    raw, x_0 (n, d): positions before whitening and after it; scores: those of good images; by_time:
    {t: (share of E|r_t|^2 that is not affine in x_0, image AUROC of its score or nan)}.
    """

    name: str
    raw: torch.Tensor
    x_0: torch.Tensor
    scores: np.ndarray
    by_time: dict


def measure(category, seed=0, **settings):
    """The Measured of an evaluate.Category: train.fit_detector on its good images."""
    detector = evaluate.new_detector(category.train, wtflow.Recipe(**settings), device="cpu")
    features, _ = evaluate.extract_good(detector, category.train)
    tests, *_ = evaluate.extract(detector, [item.path for item in category.test])
    defective = np.array([item.kind != "good" for item in category.test])
    return fitted(category.name, detector, features, seed, tests, defective)


def control(n=200, seed=0, **settings):
    """The Measured of n maps of noise, which fulfil every assumption: what training alone adds."""
    detector = wtflow.Detector(wtflow.Recipe(**settings))
    features = torch.randn((n, *detector.z.shape), generator=torch.Generator().manual_seed(seed))
    return fitted("noise", detector, features.half(), seed)


def fitted(name, detector, features, seed, tests=None, defective=None):
    """The Measured of features (n, d, h, w), and of a detector that is fitted to them here.

    tests (m, d, h, w) and whether they are defective (m,): what the AUROC is of.
    """
    train.fit_detector(detector, features, seed)
    scores = detector.normal_scores.numpy()
    chosen = torch.randperm(rows_of(features).shape[0], generator=seeded(seed))[:ROWS]
    raw = rows_of(features)[chosen].float()
    x_0, by_time = detector.normalise(raw), {}
    for t in TIMES:
        detector.recipe = replace(detector.recipe, time=t)
        r = torch.cat([detector.residual(part).half() for part in features.split(wtflow.SCORED)])
        area = np.nan
        if tests is not None:
            train.fit_gaussians(detector, features)
            found = detector.score(tests)[1].numpy()
            area = auroc(found[~defective], found[defective])
        by_time[t] = not_affine(rows_of(r)[chosen].float(), x_0), area
    return Measured(name, raw, x_0, scores, by_time)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def rows_of(maps):
    """(n, d, h, w) -> (n h w, d)."""
    return maps.movedim(1, -1).flatten(0, 2)


def not_affine(r, x_0):
    """Share of E|r - E r|^2 that no affine function of x_0 gives, for r and x_0 (n, d) (B6, O3)."""
    x, y = (v.double() - v.double().mean(0) for v in (x_0, r))
    rest = y - x @ torch.linalg.lstsq(x, y).solution
    freedom = (len(x) - 1) / (len(x) - 1 - x.shape[1])
    return (freedom * rest.square().sum() / y.square().sum()).item()


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


def scale_spread(x):
    """std of log k if x (n, d) is k S^(1/2) z, to first order, and (tr S)^2 / tr S^2 (W9)."""
    effective = effective_dimension(x)
    variance = x.double().norm(dim=1).log().var().item() - 1 / (2 * effective)
    return max(variance, 0.0) ** 0.5, effective


@torch.no_grad()
def table(measured, seed=0):
    """Rows for R of one Measured. Predicted is what the claim says where its assumption holds."""
    name, raw, x_0, scores, by_time = measured
    d = x_0.shape[1]
    squared = x_0.double().square().sum(1)
    m2, radius = squared.mean().item(), (squared / d).sqrt().numpy()
    rows = [
        ("effective dimension before whitening", d, effective_dimension(raw)),
        ("after it", d, effective_dimension(x_0)),
        ("median width over the largest before whitening (S2)", 1, thickness(raw)),
        ("E|x_0|^2 / d (C3, W5)", 1, m2 / d),
        ("std of |x_0| / sqrt(d), noise has (C1)", radius_std(d), radius.std()),
        ("kurtosis of a component, Gaussian", 3, kurtosis(x_0)),
        ("tail index of the image score, light (E2)", np.inf, 1 / evaluate.fit_tail(scores).scale),
    ]
    time, least = turning(m2, d)
    t = torch.full((len(x_0),), time)
    x_1 = wtflow.independent(x_0, seeded(seed))
    dip = mean_se(wtflow.path(x_0, x_1, t).double().square().sum(1) / d)
    rows.append(("least E|x_t|^2 / d, at t* (C3)", least / d, *dip))
    inward = ((wtflow.path(x_0, x_1, 0.9 * t) * (x_1 - x_0)).sum(1) < 0).double()
    expected = float(np.mean(inward_probability(0.9 * time, squared.numpy(), d)))
    rows.append(("share of inward paths at 0.9 t* (C3)", expected, *mean_se(inward)))
    tau, effective = scale_spread(x_0)
    for rho in RHOS:
        spread = std_se(log_scores(x_0.double(), rho))
        what = f"std of the log of the score of v=0, rho={rho:g} (W9)"
        rows.append((what, score_spread(tau, d, rho, effective), *spread))
    for t, (share, area) in by_time.items():
        rows.append((f"share of E|r_t|^2 not affine in x_0, t={t:g} (B6)", 0, share))
        rows.append((f"  image AUROC of the score of r_t, t={t:g} (O3)", np.nan, area))
    for what, *numbers in rows:
        yield Row("R", f"{name}: {what}", *numbers)
