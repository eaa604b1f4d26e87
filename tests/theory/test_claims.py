"""Every claim of theory/, and the functions of wtflow.py that rely on it, by the properties of properties.py."""
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from properties import PROPERTIES, Z, within

import theory
import wtflow
from theory import concentration, draw, learned_field, singularity, worst_transport


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name):
    check, formulas, strategies, examples = PROPERTIES[name]

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(**strategies)
    def run(**case):
        check(*formulas, **case)

    run()


@pytest.mark.parametrize("module", [singularity, concentration, worst_transport])
def test_table(module):
    """The printed table: each measured value within Z standard errors of the predicted one, or 0.1 % where it is exact."""
    for row in module.table(seed=1):
        within((row.measured, row.se), row.predicted, slack=1e-3 * abs(row.predicted))


def test_figures():
    for figure in (draw.singularity_figure(), draw.concentration_figure(), draw.worst_transport_figure(), draw.fields_figure()):
        assert all(axis.has_data() for axis in figure.axes)


def test_helpers():
    values = np.array([1.0, 2.0, 4.0])
    assert theory.mean_se(values) == pytest.approx((7 / 3, values.std(ddof=1) / 3 ** 0.5))
    assert theory.exponent(values, values ** -3)[0] == pytest.approx(-3)
    with pytest.raises(ValueError):
        theory.exponent([1.0, -1.0], [1.0, 1.0])


def test_standard_errors():
    """What the table prints as standard error is the spread over repetitions, to 30 % (5 of its own standard errors at 120)."""
    slopes, energies = [], []
    for seed in range(120):
        g = torch.Generator().manual_seed(seed)
        x_0 = 0.7 * torch.randn(300, 4, generator=g, dtype=torch.float64)
        slopes.append(singularity.fitted_slope(*singularity.pairs(x_0, wtflow.independent, 0.2, g)))
        energies.append(concentration.energy_from_pairs(x_0, wtflow.independent, g, nodes=1))
    for values, se in (np.transpose(slopes), np.transpose(energies)):
        assert 0.7 < values.std() / se.mean() < 1.3
    x = np.arange(1, 30.0)
    noise = np.random.default_rng(0).normal(size=(400, 29)) * 0.1
    fits = np.array([theory.exponent(x, x * np.exp(z)) for z in noise])
    assert 0.8 < fits[:, 0].std() / fits[:, 1].mean() < 1.2


def test_kernel_field():
    """Two points at distances 0 and h: weights 1 and exp(-1/2)."""
    x_t, u = np.array([[0.0, 0.0], [0.3, 0.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    field, mass = worst_transport.kernel_field(np.zeros((1, 2)), x_t, u, 0.3)
    k = np.exp(-0.5)
    assert field[0] == pytest.approx(np.array([1, k]) / (1 + k)) and mass[0] == pytest.approx(np.log(1 + k))


def test_defaults():
    """Data without width unless it is asked for; normal points unless they are moved off."""
    x, mu = np.ones((1, 2)), np.array([[1.0, 0.0], [0.0, 2.0]])
    for f in (singularity.jacobian, singularity.marginal_field):
        assert (f(x, 0.4, mu) == f(x, 0.4, mu, 0.0)).all()
    one, two = (learned_field.thick_circle(5, torch.Generator().manual_seed(0), *off) for off in ((), (0.0,)))
    assert torch.equal(one, two)
    points = learned_field.thick_circle(20_000, torch.Generator().manual_seed(0))
    assert points[:, 2:].std().item() == pytest.approx(learned_field.THICKNESS, rel=0.02)
    assert points[:, :2].norm(dim=1).mean().item() == pytest.approx(learned_field.RADIUS, rel=0.01)


def test_times_of_the_bins():
    """error_by_time draws t inside each bin of EDGES."""
    seen = []
    learned_field.error_by_time(lambda x, t: seen.append(t) or x, learned_field.gaussian, lambda x, t: x, torch.Generator().manual_seed(0), 200)
    for t, low, high in zip(seen, learned_field.EDGES, learned_field.EDGES[1:]):
        assert low <= t.min() < low + 0.1 * (high - low) and high - 0.1 * (high - low) < t.max() <= high + 1e-6


def test_learned_field():
    """Training lowers the loss of the field towards the exact one, and the exact one has no error by time."""
    generator = torch.Generator().manual_seed(0)
    exact = lambda x, t: singularity.slope(t, 1.0)[:, None] * x
    v_theta = learned_field.train(learned_field.gaussian, wtflow.independent, 0, steps=150)
    assert learned_field.error_by_time(v_theta, learned_field.gaussian, exact, generator)[:, 0].max() < 0.35
    perfect = lambda x, t: torch.as_tensor(exact(x.numpy(), t.numpy()))
    errors = learned_field.error_by_time(perfect, learned_field.gaussian, exact, generator)
    assert errors.shape == (len(learned_field.EDGES) - 1, 2) and errors.max() < 1e-9
    x = torch.ones(2, learned_field.D)
    assert learned_field.landing(lambda x, t: x, x) == pytest.approx(2 * learned_field.D ** 0.5)
