"""Metrics against brute force, and the known traps."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import label

import evaluate
from evaluate import Item, image_metrics

scores = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=2, max_size=30)


@given(scores)
def test_image_auroc_is_the_share_of_ordered_pairs(rows):
    s, d = np.array([r[0] for r in rows], float), np.array([r[1] for r in rows])
    auroc, ap = image_metrics(s, d)
    if d.all() or not d.any():
        assert auroc is None and ap is None
        return
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(s[d], s[~d])]
    assert auroc == pytest.approx(100 * np.mean(pairs), abs=1e-9)
    thresholds = np.unique(s)[::-1]
    recall = [(d & (s >= h)).sum() / d.sum() for h in thresholds]
    precision = [(d & (s >= h)).sum() / (s >= h).sum() for h in thresholds]
    assert ap == pytest.approx(100 * np.sum(np.diff([0, *recall]) * precision), abs=1e-9)


def make_set(tmp_path, rng, n=5, size=(23, 31), regions=2):
    """Random maps at mask size, items, sizes and random masks."""
    items, masks = [], []
    for k in range(n):
        mask = np.zeros(size, bool)
        for _ in range(regions if k else 0):
            y, x = rng.integers(0, size[0] - 6), rng.integers(0, size[1] - 8)
            mask[y : y + rng.integers(2, 6), x : x + rng.integers(2, 8)] = True
        path = tmp_path / f"{k}.png"
        Image.fromarray(np.uint8(mask) * 255).save(path)
        masks.append(mask)
        items.append(Item(path, "dent" if mask.any() else "good", (path,)))
    maps = torch.from_numpy(rng.normal(size=(n, *size)).astype(np.float32) + 0.8 * np.array(masks))
    return maps.float(), items, [size] * n, masks


def pixel_metrics(maps, items, sizes, saturation=None, limit=evaluate.PRO_LIMIT, ignore=None):
    counts = evaluate.pixel_counts(maps, items, sizes, saturation, ignore)
    return evaluate.pixel_metrics(counts, ["dent"], limit)


def brute_pro(maps, masks, limit, saturate=lambda area: area):
    """Every threshold, every region, straight from the definition."""
    good, regions = [], []
    for y, m in zip(maps, masks, strict=True):
        labels, n = label(m, np.ones((3, 3)))
        regions += [y[labels == k] for k in range(1, n + 1)]
        good.append(y[~m])
    good = np.concatenate(good)
    x, o = [0.0], [0.0]
    for h in np.unique(maps)[::-1]:
        x.append((good >= h).mean())
        o.append(np.mean([min((r >= h).sum() / saturate(len(r)), 1) for r in regions]))
    k = max(i for i in range(len(x)) if x[i] <= limit)
    at_limit = o[k] + (o[k + 1] - o[k]) * (limit - x[k]) / (x[k + 1] - x[k])
    return 100 * np.trapezoid(o[: k + 1] + [at_limit], x[: k + 1] + [limit]) / limit


@pytest.mark.parametrize("seed", range(5))
def test_binned_metrics_agree_with_exact_ones_to_1e_4(tmp_path, seed):
    """Over the whole set: with even seeds one image reads high everywhere, which its own range, or
    false positive rate, would hide. With the last two, 10 columns are ignored.
    """
    maps, items, sizes, masks = make_set(tmp_path, np.random.default_rng(seed))
    maps[0] += 10 * (seed % 2 == 0)
    ignore = np.arange(sizes[0][1]) < (10 if seed > 2 else 0)
    y, m = maps.numpy()[..., ~ignore], np.array(masks)[..., ~ignore]
    exact = *image_metrics(y.ravel().astype(float), m.ravel()), brute_pro(y, m, 0.3)
    ignore = np.broadcast_to(ignore, sizes[0])
    assert pixel_metrics(maps, items, sizes, ignore=ignore) == pytest.approx(exact, abs=0.01)


def test_saturated_overlap(tmp_path):
    maps, items, sizes, masks = make_set(tmp_path, np.random.default_rng(7), regions=1)
    half = pixel_metrics(maps, items, sizes, {255: (0.5, True)}, 0.05)[2]
    exact = brute_pro(maps.numpy(), masks, 0.05, lambda area: int(0.5 * area))
    assert half == pytest.approx(exact, abs=0.01)
    never = pixel_metrics(maps, items, sizes, {255: (10**6, False)}, 0.3)[2]
    assert never == pytest.approx(brute_pro(maps.numpy(), masks, 0.3), abs=0.01)


def test_rows_of_kinds_and_of_loco_are_those_of_their_images_alone(tmp_path):
    """From histograms that are summed by kind; of LOCO's two kinds the means as well."""
    maps, items, sizes, masks = make_set(tmp_path, np.random.default_rng(3), n=9, regions=1)
    kinds = ("good", "logical_anomalies", "structural_anomalies")
    items = [i._replace(kind=kinds[k % 3 and k % 2 + 1]) for k, i in enumerate(items)]
    for k in range(0, 9, 3):
        masks[k] = np.zeros(sizes[0], bool)
        items[k] = items[k]._replace(masks=())
    scores = maps.flatten(1).amax(1).numpy()
    known = evaluate.calibrate([1.0], how=3.0)
    category = evaluate.Category("c", [tmp_path], items, {255: (0.5, True)})
    row = evaluate.measure(category, (maps, evaluate.classify(scores, known), sizes))
    for kind, of_kind in zip(kinds[1:], row["kinds"], strict=True):
        chosen = [k for k, item in enumerate(items) if item.kind in ("good", kind)]
        y, m = maps[chosen].numpy(), [masks[k] for k in chosen]
        bad = np.array([items[k].kind == kind for k in chosen])
        part = kind.split("_")[0]
        assert of_kind["category"] == f"c/{kind}" and of_kind["test_images"] == bad.sum()
        assert of_kind["image_auroc"] == image_metrics(scores[chosen], bad)[0]
        assert row[f"image_auroc_{part}"] == of_kind["image_auroc"]
        exact = image_metrics(y.ravel(), np.array(m).ravel())
        assert abs(of_kind["pixel_auroc"] - exact[0]) < 0.01
        assert abs(of_kind["aupro"] - brute_pro(y, m, 0.3)) < 0.01
        spro = brute_pro(y, m, 0.05, lambda area: int(0.5 * area))
        assert abs(row[f"spro_{part}"] - spro) < 0.01
        assert of_kind["recall"] == pytest.approx(100 * np.mean(scores[chosen][bad] > 3))
    for name in ("image_auroc", "spro"):
        assert row[name] == np.mean([row[f"{name}_logical"], row[f"{name}_structural"]])


@pytest.mark.parametrize(
    "outside, overlap, area",
    [
        ([1], [1], 0.15),
        ([0, 1], [1, 1], 1.0),
        ([2, 2, 6], [0.5, 0.7, 1], (0.05 + 0.055) / 0.3),
    ],
)
def test_area_is_divided_by_the_limit_and_interpolated_at_it(outside, overlap, area):
    pixels = {"dent": np.array([np.ones(len(outside)), outside, overlap])}
    assert evaluate.pixel_metrics(pixels, ["dent"], 0.3)[2] == pytest.approx(100 * area)


@pytest.mark.parametrize("saturation, limit", [(None, 0.3), ({255: (0.5, True)}, 0.05)])
def test_perfect_maps_give_100_and_constant_ones_chance(tmp_path, saturation, limit):
    _, items, sizes, masks = make_set(tmp_path, np.random.default_rng(1))
    perfect = torch.from_numpy(np.array(masks)).float()
    assert pixel_metrics(perfect, items, sizes, saturation, limit) == pytest.approx((100,) * 3)
    auroc, _, aupro = pixel_metrics(torch.full_like(perfect, 3.0), items, sizes)
    assert auroc == pytest.approx(50) and aupro == pytest.approx(15)


def test_empty_masks_of_defective_images_count_as_defect_free(tmp_path):
    maps, items, sizes, _ = make_set(tmp_path, np.random.default_rng(4))
    empty = [items[0]._replace(kind="dent"), *items[1:]]
    assert pixel_metrics(maps, empty, sizes) == pixel_metrics(maps, items, sizes)


def test_maps_are_resampled_to_the_mask_and_masks_never(tmp_path):
    """Of a defect of one pixel and its neighbour at a corner, which is one region."""
    mask = np.zeros((200, 100), bool)
    mask[77, 33] = mask[78, 34] = True  # any resizing of the mask would lose or spread it
    Image.fromarray(np.uint8(mask) * 255).save(tmp_path / "m.png")
    item = Item(tmp_path / "a.png", "dent", (tmp_path / "m.png",))
    y = torch.zeros(1, 20, 10)
    y[0, 7, 3] = 1.0
    [(_, _, saturates_at)], union = evaluate.masks_of(item, (200, 100))
    assert union.sum() == saturates_at == 2
    assert pixel_metrics(y, [item], [(200, 100)])[0] > 99
    with pytest.raises(evaluate.InputError, match="m.png: mask is 100 x 200, its image 10 x 20"):
        evaluate.masks_of(item, (20, 10))
