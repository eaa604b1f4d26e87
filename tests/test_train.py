"""train.py: the training loop, cross-fitting, resuming to the last bit, the Python API."""

import copy

import pytest
import torch
from test_wtflow import RELEASED, Detector, gaussian, tiny

import evaluate
import train
import wtflow
from wtflow import InputError


def test_the_learning_rate_rises_and_falls_to_zero():
    assert [train.warm_up_cosine(k / 100) for k in (0, 5, 10, 55, 100)] == pytest.approx(
        [0, 0.5, 1, 0.5, 0]
    )


def test_steps_grow_with_the_images_to_a_limit_unless_a_number_is_given():
    features = torch.zeros(9, 152, 8, 8)
    assert train.count_steps(tiny(steps=0), features) == 36
    assert train.count_steps(tiny(steps=0), features.repeat(30, 1, 1, 1)) == 800
    assert train.count_steps(tiny(steps=7), features) == 7
    assert train.count_steps(tiny(**RELEASED | {"steps": 0, "batch": 8}), features) == 200


def test_each_step_has_the_learning_rate_of_its_place(monkeypatch):
    """The first has that of 0; at a rate of zero the field is the one that was drawn."""
    detector, features, places = Detector(tiny(steps=4)), gaussian((4, 152, 4, 4)), []
    monkeypatch.setattr(train, "warm_up_cosine", lambda done: places.append(done) or 0.0)
    torch.manual_seed(0)
    drawn = wtflow.new_field(detector.recipe, 152)
    train.train_field(detector, features, 0)
    assert places == [0, 0.25, 0.5, 0.75]
    assert torch.equal(detector.field.out.weight, drawn.out.weight)


@pytest.mark.parametrize("settings", [{}, RELEASED])
def test_a_batch_is_drawn_from_all_positions_or_maps(settings):
    recipe = tiny(**{**settings, "batch": 4096})
    features = torch.arange(3 * 4 * 4.0).view(3, 1, 4, 4)
    x = train.draw(features, recipe, torch.Generator().manual_seed(0))
    if recipe.field == "unet":
        assert x.shape == (4096, 1, 4, 4) and torch.equal(x.unique(dim=0), features)
    else:
        assert x.shape == (4096, 1) and torch.equal(x.unique(), features.flatten())


@pytest.mark.parametrize("n, folds", [(5, 2), (7, 3), (120, 0)])
def test_fitting_goes_on_from_any_saved_state_to_the_same_detector(monkeypatch, n, folds):
    monkeypatch.setattr(train, "SAVE_SECONDS", 0)
    monkeypatch.setattr(train, "REPORT_STEPS", 1)
    features = gaussian((n, 152, 8, 8)).half()
    states, steps, detector = [], [], Detector(tiny(folds=folds))
    random_state = torch.get_rng_state()
    train.fit_detector(
        detector,
        features,
        3,
        report=lambda what, total, step, text: steps.append((what, total, step)),
        save=lambda training: states.append(copy.deepcopy(training)),
    )
    of = [f"field {k + 1}/{folds + 1}, step" for k in range(folds + 1)]
    assert steps == [(what, 4, step) for what in of for step in (1, 2, 3, 4)]
    assert len(states) == len(steps)
    assert torch.equal(torch.get_rng_state(), random_state)  # the caller's stay as they are
    whole = detector.state_dict()
    for state in states:
        again = Detector(tiny(folds=folds))
        train.fit_detector(again, features, 3, state=copy.deepcopy(state))
        assert all(torch.equal(v, whole[name]) for name, v in again.state_dict().items())


def test_what_has_begun_goes_with_the_results_whose_model_it_may_have_replaced(tmp_path):
    state, finished = tmp_path / evaluate.STATE, tmp_path / evaluate.FINISHED
    evaluate.write_json(finished, {"source": 1, "row": 2, "test": 3})
    assert train.what_is_there(tmp_path, {"source": 1}, resume=False) == {} and finished.exists()
    evaluate.save_checkpoint(state, tiny(), source=1, training=3)
    assert train.what_is_there(tmp_path, {"source": 1}, resume=True)["training"] == 3
    assert train.what_is_there(tmp_path, {"source": 1}, resume=False) == {}
    assert not state.exists() and not finished.exists()


def test_no_image_is_scored_by_what_has_seen_it(monkeypatch):
    """Whitening, field and Gaussian of each fold are fitted to the images of the others."""
    seen = []
    monkeypatch.setattr(Detector, "fit_whitening", lambda self, x: seen.append(images_of(x)))
    monkeypatch.setattr(train, "train_field", lambda detector, x, *args: seen.append(images_of(x)))
    monkeypatch.setattr(
        train, "fit_gaussians", lambda _, x: seen.append(images_of(x)) or found(x, 100)
    )
    monkeypatch.setattr(Detector, "score", lambda self, x: found(x, len(seen)))

    def images_of(x):
        return {*x[:, 0, 0, 0].tolist()}

    def found(x, more):
        return x[:, 0], x[:, 0, 0, 0] + more

    detector = Detector(tiny(folds=2))
    few = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 152, 2, 2)
    maps, scores = train.fit_detector(detector, few)
    assert seen == [{1, 3}] * 3 + [{0, 2, 4}] * 3 + [{0, 1, 2, 3, 4}] * 3
    assert detector.normal_scores.tolist() == [3, 7, 5, 9, 7]  # 3 calls of fold 0, 6 of fold 1
    assert scores.tolist() == [3, 7, 5, 9, 7] and maps[:, 0, 0].tolist() == [0, 1, 2, 3, 4]
    seen.clear()
    many = torch.arange(100.0).view(100, 1, 1, 1).expand(100, 152, 2, 2)
    train.fit_detector(detector, many)
    assert len(seen) == 3 and detector.normal_scores.tolist() == [100.0 + k for k in range(100)]


def test_few_images_have_scores_no_lower_than_new_ones_have():
    """12 images of few positions: whitening, field and Gaussian overfit them.

    By these they score less than nine tenths of what 60 new ones do; cross-fitted, no less than
    these.
    """
    features = gaussian((72, 152, 8, 8)).half()
    detector = Detector(tiny(steps=40))
    train.fit_detector(detector, features[:12])
    new = detector.score(features[12:])[1].mean()
    assert detector.score(features[:12])[1].mean() < 0.9 * new
    assert detector.normal_scores.mean() > 0.97 * new


def test_a_loss_that_is_not_finite_stops_the_training():
    features = gaussian((4, 152, 2, 2))
    features[1, 2, 0, 1] = float("inf")
    detector = Detector(tiny(steps=30, batch=1024))
    detector.feature_whitening += torch.eye(152)
    with pytest.raises(InputError, match="loss is not finite at step 20.*rate"):
        train.train_field(detector, features, 0)
