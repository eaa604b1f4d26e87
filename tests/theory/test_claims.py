"""Every claim of theory/, and the functions of wtflow.py that rely on it, by the properties of properties.py."""
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from properties import PROPERTIES, Z, within

import theory
from theory import concentration, learned_field, singularity, worst_transport


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
    for figure in (singularity.figure(), concentration.figure(), worst_transport.figure(), worst_transport.figure_fields()):
        assert all(axis.has_data() for axis in figure.axes)


def test_helpers():
    values = np.array([1.0, 2.0, 4.0])
    assert theory.mean_se(values) == pytest.approx((7 / 3, values.std(ddof=1) / 3 ** 0.5))
    assert theory.exponent(values, values ** -3)[0] == pytest.approx(-3)
    with pytest.raises(ValueError):
        theory.exponent([1.0, -1.0], [1.0, 1.0])


def test_learned_field():
    """Training lowers the loss of the field towards the exact one, and the exact one has no error by time."""
    generator = torch.Generator().manual_seed(0)
    exact = lambda x, t: singularity.slope(t, 1.0)[:, None] * x
    v_theta = learned_field.train(learned_field.gaussian, worst_transport.wtflow.independent, 0, steps=150)
    assert learned_field.error_by_time(v_theta, learned_field.gaussian, exact, generator)[:, 0].max() < 0.35
    perfect = lambda x, t: torch.as_tensor(exact(x.numpy(), t.numpy()))
    errors = learned_field.error_by_time(perfect, learned_field.gaussian, exact, generator)
    assert errors.shape == (len(learned_field.EDGES) - 1, 2) and errors.max() < 1e-9
    x = torch.ones(2, learned_field.D)
    assert learned_field.landing(lambda x, t: x, x) == pytest.approx(2 * learned_field.D ** 0.5)
