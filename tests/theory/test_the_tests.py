"""Each wrong formula below must be rejected by the property that guards the right one."""
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from properties import PROPERTIES

import wtflow
from theory import concentration as C
from theory import learned_field as L
from theory import singularity as S
from theory import worst_transport as W


def scaled_noise(x_0, generator=None):
    return 1.05 * wtflow.independent(x_0, generator)


def best(x_0, generator=None, n=64):
    return -wtflow.worst(x_0, generator, n)


def antipode(x_0, generator=None, n=64):
    return -torch.nn.functional.normalize(x_0) * x_0.shape[1] ** 0.5


def all_components(x_0, generator=None, n=64):
    return torch.randn((n, *x_0.shape), generator=generator, dtype=x_0.dtype).amin(0)


def raw_projection(x_0, generator=None, n=64):
    """Forgets to normalise x_0 before removing the component along it."""
    z, fixed = wtflow.independent(x_0, generator), wtflow.worst(x_0, generator, n)
    e = torch.nn.functional.normalize(x_0)
    return z + (fixed * e).sum(1, keepdim=True) * e - (z * x_0).sum(1, keepdim=True) * e


def summed_loss(*args):
    x_0 = args[1]
    return wtflow.flow_matching_loss(*args) * x_0.shape[1]


def reversed_time_loss(v_theta, x_0, couple, generator=None, t=None):
    t = torch.rand(len(x_0), generator=generator, dtype=x_0.dtype) if t is None else t
    x_1 = couple(x_0, generator)
    return (v_theta(wtflow.path(x_1, x_0, t), t) - (x_1 - x_0)).square().flatten(1).mean(1)


def squared_time_loss(v_theta, x_0, couple, generator=None, t=None):
    t = torch.rand(len(x_0), generator=generator, dtype=x_0.dtype) ** 2 if t is None else t
    return wtflow.flow_matching_loss(v_theta, x_0, couple, generator, t)


def full_steps(v_theta, x_0, steps=1):
    for k in range(steps):
        x_0 = x_0 + v_theta(x_0, torch.full((len(x_0),), k / steps, dtype=x_0.dtype))
    return x_0


def late_steps(v_theta, x_0, steps=1):
    for k in range(steps):
        x_0 = x_0 + v_theta(x_0, torch.full((len(x_0),), (k + 1) / steps, dtype=x_0.dtype)) / steps
    return x_0


A = lambda s, r: 1 + s ** 2 + 2 * r * s
# (property, which of its formulas, the wrong formula, what is wrong)
WRONG = [
    ("S1 Lipschitz", 0, lambda t: 1 / t ** 2, "exponent"),
    ("S1 Lipschitz", 0, lambda t: 1 / (1 - t), "swapped time: FM's constant"),
    ("S1 Lipschitz", 1, lambda a, b, t: wtflow.path(b, a, t), "path from noise to data"),
    ("S1 path", 0, lambda a, b, t: wtflow.path(a, b, t ** 2), "path not straight in t"),
    ("S1 path", 0, lambda a, b, t: wtflow.path(a, b, t[:1].expand_as(t)), "one time for the whole batch"),
    ("S1 duality", 0, lambda x, t, mu, s: -S.marginal_field(x, t, mu, s), "sign of the duality"),
    ("S1 duality", 0, lambda x, t, mu, s: S.marginal_field(x, 1 - t, mu, s), "duality without reversing time"),
    ("S2 field", 0, lambda x, t, mu, s: S.marginal_field(x, t, mu, s) * t, "no 1/t"),
    ("S2 field", 0, lambda x, t, mu, s: S.marginal_field(x, t, mu, 0.9 * s + 0.01), "width of the data"),
    ("S2 posterior", 0, lambda x, t, mu, s: (x - (1 - t) * S.posterior(x, t, mu, s)[0], 0), "E[x_1|x_t] t for E[x_0|x_t]"),
    ("S2 Jacobian", 0, lambda x, t, mu, s: (np.eye(x.shape[1]) - (1 - t) / t * S.posterior(x, t, mu, s)[1]) / t, "1/t for 1/t^2"),
    ("S2 Jacobian", 0, lambda x, t, mu, s: (np.eye(x.shape[1]) + (1 - t) / t ** 2 * S.posterior(x, t, mu, s)[1]) / t, "sign of Cov"),
    ("S2 Jacobian", 0, lambda x, t, mu, s: (np.eye(x.shape[1]) - S.posterior(x, t, mu, s)[1] / t ** 2) / t, "no 1-t"),
    ("S2 slope", 0, lambda t, s, rho: 2 * S.slope(t, s, rho), "derivative of log variance, not of log sigma"),
    ("S2 slope", 0, lambda t, s, rho: S.slope(t, s, -rho), "OT for WT"),
    ("S2 peak", 0, lambda s, rho: (S.peak(s, rho)[0], A(s, rho) / (2 * s)), "peak without sqrt(1-rho^2)"),
    ("S2 peak", 0, lambda s, rho: (S.peak(s, rho)[0], A(s, rho) / (2 * s * (1 - rho ** 2))), "peak without the root"),
    ("S2 peak", 0, lambda s, rho: ((s ** 2 + rho * s) / A(s, rho), S.peak(s, rho)[1]), "peak at tc"),
    ("S2 exponents", 0, (-1, -2), "t^-2 between atoms"),
    ("S2 exponents", 0, (-2, -3), "t^-2 off the data"),
    ("S3 growth", 0, lambda t, s: 1 / S.variance(t, s), "variance for standard deviation"),
    ("S3 growth", 0, lambda t, s: 1 / t, "1/t_0 for data with a density"),
    ("S3 loss", 0, summed_loss, "missing 1/d"),
    ("S3 loss", 0, reversed_time_loss, "swapped time in the loss"),
    ("S3 uniform time", 0, squared_time_loss, "t not uniform"),
    ("S3 Euler", 0, full_steps, "step of 1 instead of 1/K"),
    ("S3 Euler", 0, late_steps, "off-by-one in t"),
    ("C1 radius", 0, lambda d: (1 / (2 * d)) ** 0.5, "the limit for the value"),
    ("C1 cosine", 0, lambda d: C.cosine_law(d + 1), "degrees of freedom off by one"),
    ("C1 cosine", 1, scaled_noise, "noise 5 % too long"),
    ("C2 centripetal", 0, lambda x: x, "centrifugal"),
    ("C2 centripetal", 0, lambda x: -2 * x, "factor"),
    ("C3 radial", 0, lambda t, m2, d: t * d + (1 - t) * m2, "sign"),
    ("C3 radial", 0, lambda t, m2, d: (1 - t) * d - t * m2, "swapped time"),
    ("C3 radial", 0, lambda t, m2, d: t - (1 - t) * m2, "missing d"),
    ("C3 dip", 0, lambda m2, d: (d / (m2 + d), m2 * d / (m2 + d)), "t* of noise for that of data"),
    ("C3 sign", 0, lambda t, m2, d: 1 - C.inward_probability(t, m2, d), "outward for inward"),
    ("C3 sign", 0, lambda t, m2, d: C.inward_probability(t, m2, d + 1), "degrees of freedom off by one"),
    ("C4 energy", 0, lambda s, rho: C.kinetic_energy(s, -rho), "OT for WT"),
    ("C4 energy", 0, lambda s, rho: A(s, rho) - s * (1 - rho ** 2) ** 0.5 * np.pi / 2, "arccos(0) for arccos(-rho)"),
    ("C4 pairs", 0, lambda s, rho: A(s, rho), "coupling cost for the energy of the marginal field"),
    ("C5 final", 0, lambda x, mean: x + mean, "sign"),
    ("C5 final", 0, lambda x, mean: mean - x, "FM's field for rFM's"),
    ("W1 worst plan", 0, wtflow.optimal, "OT for WT"),
    ("W1 worst plan", 0, wtflow.independent, "no plan at all"),
    ("W1 optimal plan", 0, W.minibatch_worst, "WT for OT"),
    ("W1 images, worst", 0, wtflow.optimal, "OT for WT, on images"),
    ("W1 blocks", 0, partial(wtflow.optimal, block=128), "half the block"),
    ("W2 worst map", 0, lambda e: e.sum() + len(e), "independent cost"),
    ("W2 worst map", 0, lambda e: (1 + e) @ (1 + e), "S for S^(1/2)"),
    ("W2 variance", 0, lambda t, s, rho: S.variance(t, s, -rho), "sign of the correlation"),
    ("W2 slope", 0, lambda t, s, rho: S.slope(t, s, 0.0), "rFM for WT"),
    ("W3 minimum", 0, lambda m, n: W.minimum_cdf(m, n + 1), "off-by-one in n"),
    ("W3 minimum", 0, lambda m, n: 1 - W.minimum_cdf(-m, n), "maximum for minimum"),
    ("W3 a_n", 0, lambda n: W.a_n(n + 1), "off-by-one in a_n"),
    ("W3 a_n", 0, lambda n: (2 * np.log(n)) ** 0.5, "the asymptote for a_n"),
    ("W3 a_n", 1, lambda n: W.minimum_variance(n) + W.a_n(n) ** 2, "second moment for variance"),
    ("W3 local worst", 0, best, "maximum for minimum: locally optimal"),
    ("W3 local worst", 0, antipode, "antipode for the local worst"),
    ("W3 local worst", 0, all_components, "minimum in every coordinate"),
    ("W3 local worst", 0, raw_projection, "projection on x_0 instead of x_0/|x_0|"),
    ("W3 local worst", 0, lambda x, g, n: wtflow.worst(x, g, n + 1), "off-by-one in n"),
    ("W3 images", 0, lambda x, g, n: wtflow.independent(x, g), "rFM for WT, on images"),
    ("W3 potential", 0, lambda x, n: -(1 + W.a_n(n)) * x, "a_n |x|^2 / 2 for a_n |x|"),
    ("W3 potential", 0, lambda x, n: -(1 - W.a_n(n) / np.linalg.norm(x, axis=-1, keepdims=True)) * x, "sign of a_n"),
    ("W3 initial field", 0, lambda x, n: -x, "rFM's field for WT's"),
    ("W3 local field", 0, lambda x, t, atoms, n: W.local_field(x, t, atoms, n + 1), "off-by-one in n"),
    ("W3 gain", 0, lambda n, d, m2: 1 + W.a_n(n) / m2 ** 0.5, "missing square"),
    ("W4 one step", 0, lambda x: -x.square().sum(1) / 2, "missing 1/d"),
    ("W4 one step", 0, lambda x: x.square().mean(1) / 2, "sign of log p"),
    ("W4 one step", 0, lambda x: -x.square().mean(1), "factor 1/2"),
    ("learnt circle", 0, lambda x, t: L.circle_field(x, t) * 0.999, "factor"),
    ("learnt AUROC", 0, lambda a, b: L.auroc(b, a), "anomalous for normal"),
]


@pytest.mark.parametrize("name, which, wrong, what", WRONG, ids=[f"{name}: {what}" for name, _, _, what in WRONG])
def test_wrong_formula_is_rejected(name, which, wrong, what):
    check, formulas, strategies, examples = PROPERTIES[name]
    formulas = [wrong if k == which else f for k, f in enumerate(formulas)]

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), phases=[Phase.generate], report_multiple_bugs=False)
    @given(**strategies)
    def run(**case):
        check(*formulas, **case)

    with pytest.raises(AssertionError):
        run()
