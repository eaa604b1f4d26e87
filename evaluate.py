"""Data sets, metrics and pictures for WT-Flow, and the commands that read saved models.

    python evaluate.py --run DIR --data DIR          the table again, from saved models
    python evaluate.py --model FILE --image FILE     one image: score, verdict, picture
    python evaluate.py --model FILE --image DIR      a folder: scores.csv
    python evaluate.py --model FILE --export M.pt2   a program that needs torch alone

From Python: evaluate.load, evaluate.score, train.fit.

An anomaly map is compared with its mask at the mask's own size: the map is resampled, the mask
never. Figures are in percent.
"""

import argparse
import contextlib
import csv
import ctypes
import hashlib
import io
import json
import os
import signal
import sys
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

# Read as torch loads: a thread that waits leaves its core to others. Beside another busy process
# training is several times slower without it (python -m tests.benchmark speed).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy import ndimage

import wtflow
from wtflow import InputError

# ---- 1. Data sets: folders -> categories, files -> arrays. Reads the data set, writes nothing ----
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
BATCH = 16  # images that are read and turned into features together
ORIENTATION = 0x0112  # EXIF; from 5 on the picture is shown turned by a quarter

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # open_image refuses these itself


class Item(NamedTuple):
    """One test image."""

    path: Path
    kind: str  # "good" or the name of the defect
    masks: tuple | None  # files, each a set of defective pixels; None: the set has no masks


class Category(NamedTuple):
    """One product: good images to train on, test images with what is known of them."""

    name: str
    layout: str
    train: list  # of paths
    test: list  # of Items
    saturation: dict | None  # LOCO: {pixel value: (threshold, whether it is a share of the area)}


def first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]


def images_in(folder):
    """Image files of a folder, sorted. A dangling link is kept, so that reading it names it."""
    if not folder.is_dir():
        return []
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in SUFFIXES and not p.is_dir() and p.name[0] != "."
    )


def folders_in(folder):
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")


def read_mvtec(root):
    """MVTec AD, MPDD: train/good, test/<defect>, ground_truth/<defect>/<id>_mask.png."""
    truth, test = root / "ground_truth", []
    for folder in folders_in(root / "test"):
        for path in images_in(folder):
            named = [truth / folder.name / (path.stem + end) for end in ("_mask.png", ".png")]
            mask = next((m for m in named if m.is_file()), named[0])
            masks = (mask,) if truth.is_dir() else None
            test.append(Item(path, folder.name, () if folder.name == "good" else masks))
    return Category(root.name, "MVTec AD", images_in(root / "train/good"), test, None)


def read_mvtec_loco(root):
    """MVTec LOCO AD: several masks per image, saturation thresholds; validation is not used."""
    config, test = root / "defects_config.json", []
    for folder in folders_in(root / "test"):
        for path in images_in(folder):
            truth = root / "ground_truth" / folder.name / path.stem
            masks = tuple(images_in(truth))
            if folder.name != "good" and not masks:
                raise InputError(f"{truth}: no masks for {path.name}: restore them")
            test.append(Item(path, folder.name, masks))
    try:
        saturation = {
            d["pixel_value"]: (d["saturation_threshold"], d["relative_saturation"])
            for d in json.loads(config.read_text())
        }
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{config}: cannot be read as saturation thresholds ({e}): restore it from the download"
        ) from None
    train = images_in(root / "train/good")
    return Category(root.name, "MVTec LOCO AD", train, test, saturation)


def read_mvtec_3d(root):
    """MVTec 3D-AD, its RGB images: {train,test}/<label>/{rgb,gt}; validation, xyz are not used."""
    test = []
    for folder in folders_in(root / "test"):
        for path in images_in(folder / "rgb"):
            mask = folder / "gt" / (path.stem + ".png")
            test.append(Item(path, folder.name, () if folder.name == "good" else (mask,)))
    return Category(root.name, "MVTec 3D-AD", images_in(root / "train/good/rgb"), test, None)


def read_visa(root):
    """VisA: Data/Images/{Normal,Anomaly}, split by split_csv/1cls.csv beside the categories."""
    split, train, test = root.parent / "split_csv/1cls.csv", [], []
    try:
        with open(split, newline="") as f:
            rows = [row for row in csv.DictReader(f) if row["object"] == root.name]
        for row in rows:
            path = root.parent / row["image"]
            if row["split"] == "train":
                train.append(path)
            elif row["label"] == "normal":
                test.append(Item(path, "good", ()))
            else:
                test.append(Item(path, "anomaly", (root.parent / row["mask"],)))
    except (OSError, KeyError, UnicodeDecodeError, csv.Error) as e:
        raise InputError(
            f"{split}: not the split file of VisA ({e}): "
            "restore split_csv/1cls.csv from the download"
        ) from None
    return Category(root.name, "VisA", train, test, None)


def read_category(root):
    """The category in a folder, or None if no layout fits. The first sign that fits decides."""
    if (root / "Data/Images/Normal").is_dir():
        return read_visa(root)
    if (root / "train/good/rgb").is_dir():
        return read_mvtec_3d(root)
    if not (root / "train/good").is_dir():
        return None
    if (root / "test/logical_anomalies").is_dir() or (root / "defects_config.json").is_file():
        return read_mvtec_loco(root)
    return read_mvtec(root)


def read_dataset(data, wanted=()):
    """(name, [Category]) of a data set's root, or of one category's folder.

    wanted: names of categories, all by default. Raises InputError naming what was looked for.
    """
    data = Path(data)
    if not data.is_dir():
        raise InputError(f"{data}: no such folder: give --data a data set or one category of it")
    data = data.resolve()
    one = read_category(data)
    if one is None and images_in(data):
        one = Category(data.name, "folder of good images", images_in(data), [], None)
    if one is not None:
        name, found = data.parent.name, [one]
    else:
        name, found = data.name, [c for c in map(read_category, folders_in(data)) if c]
    if not found:
        raise InputError(
            f"{data}: no category here: looked for train/good (MVTec AD, MPDD, LOCO), "
            "train/good/rgb (MVTec 3D-AD), Data/Images/Normal (VisA), or images (a folder of good "
            "ones) in it and in its sub-folders"
        )
    names = [c.name for c in found]
    for asked in wanted:
        if asked not in names:
            raise InputError(f"{data}: no category '{asked}': choose from {', '.join(names)}")
    found = [c for c in found if not wanted or c.name in wanted]
    for category in found:
        check_category(category, data if one else data / category.name)
    return name or "data", found


def check_category(category, folder):
    """Raises InputError if there is nothing to train on or a mask is missing."""
    if not category.train:
        suffixes = ", ".join(SUFFIXES)
        raise InputError(f"{folder}: no training images ({suffixes}) in train/good: add some")
    for item in category.test:
        for mask in item.masks or ():
            if not mask.is_file():
                raise InputError(
                    f"{mask}: mask of {item.path.name} is missing: "
                    "restore it, or remove ground_truth to go without pixel figures"
                )


@contextlib.contextmanager
def unreadable(path):
    """Turn what Pillow's decoders raise on damaged files into InputError naming the file."""
    try:
        yield
    except (
        *(OSError, SyntaxError, ValueError, Image.DecompressionBombError, EOFError, MemoryError),
        *(OverflowError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError),
    ) as e:
        raise InputError(
            f"{path}: cannot be read as an image ({first_line(e)}): replace or remove it"
        ) from None


def open_image(path):
    """PIL image, decoded. Raises InputError naming the file."""
    with unreadable(path):
        image = Image.open(path)
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            size = f"{image.width} x {image.height}"
            raise ValueError(f"{size} pixels, more than {Image.MAX_IMAGE_PIXELS}")
        image.load()
        return image


def read_image(path):
    """RGB PIL image as a person sees it. Raises InputError naming the file.

    The first frame; EXIF orientation applied, as masks are drawn on the turned picture; palette and
    CMYK converted; alpha dropped; 16 bits scaled to 8; floating point taken as 0..1 or 0..255.
    """
    image = open_image(path)
    if image.mode.startswith("I") or image.mode == "F":
        image = to_8_bits(path, image)
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, TypeError) as e:
        raise InputError(
            f"{path}: cannot be converted to RGB ({e}): save it again as PNG"
        ) from None


def to_8_bits(path, image):
    """A 16-bit, 32-bit or floating-point PIL image in 8 bits, with its EXIF."""
    values = np.asarray(image, dtype=np.float64)
    real = image.mode == "F"
    known = np.isfinite(values).all() and values.min() >= 0
    if not known or values.max() > (255 if real else 65535):
        raise InputError(f"{path}: values outside 0..1, 0..255 and 16 bits: rescale it")
    scale = 255 / 65535
    if real:
        scale = 255 if values.max() <= 1 else 1
    small = Image.fromarray(np.round(values * scale).astype(np.uint8))
    small.getexif().update(image.getexif())
    return small


def read_mask(path, size):
    """Values (H, W), non-zero = defect. Any non-zero channel counts; alpha does not.

    Raises InputError if the mask is not of `size`, (H, W).
    """
    image = open_image(path)
    values = np.asarray(image)
    if values.ndim == 3:
        colours = values.shape[2] - (image.mode in ("LA", "RGBA", "PA"))
        values = values[..., :colours].max(2)
    if values.shape != tuple(size):
        raise InputError(
            f"{path}: mask is {values.shape[1]} x {values.shape[0]}, its image "
            f"{size[1]} x {size[0]}: masks must have the image's size"
        )
    return values


def masks_of(item, size, saturation=None):
    """Regions [(bool (H, W), pixels that saturate it)] and union (H, W) of an item's masks.

    Without saturation a region is an 8-connected component, as in the official MVTec AD evaluation;
    with it (LOCO) a mask is one region, saturated at its threshold.
    """
    union, regions = np.zeros(size, bool), []
    for path in item.masks or ():
        values = read_mask(path, size)
        mask = values != 0
        union |= mask
        if saturation is None:
            labels, n = ndimage.label(mask, np.ones((3, 3)))
            areas = np.bincount(labels.ravel())
            regions += [(labels == k, areas[k]) for k in range(1, n + 1)]
        elif mask.any():
            threshold, relative = saturation.get(int(values.max()), (1.0, True))
            area = mask.sum()
            regions.append((mask, min(area, int(threshold * area) if relative else threshold)))
    return regions, union


def image_sizes(paths):
    """(H, W) of image files as they are shown, from their headers. Raises InputError by name."""
    sizes = []
    for path in paths:
        with unreadable(path), Image.open(path) as image:
            turned = image.getexif().get(ORIENTATION, 1) >= 5
            sizes.append(image.size if turned else image.size[::-1])
    return sizes


def load_batch(paths, shape, pool):
    """uint8 (B, 3, *shape), antialiased bilinear, and the original sizes [(H, W)]."""
    images = list(pool.map(read_image, paths))
    resized = pool.map(lambda image: image.resize(shape[::-1], Image.BILINEAR), images)
    pixels = np.stack([np.asarray(image) for image in resized])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), [image.size[::-1] for image in images]


def extract(detector, paths, report=None):
    """Features of image files (n, d, h, w) float16, None if there are none; original sizes.

    One pass; report(done) after each batch. Raises InputError naming the image that cannot be read
    or whose features are not finite.
    """
    out, sizes = None, []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), BATCH):
            names = paths[start : start + BATCH]
            images, batch_sizes = load_batch(names, wtflow.image_shape(detector.recipe), pool)
            x = detector.features(images)
            bad = ~(x.abs().flatten(1).amax(1) <= torch.finfo(torch.float16).max)
            if bad.any():
                name = names[int(bad.nonzero()[0])]
                raise InputError(
                    f"{name}: features are not finite: check the weights and this image"
                )
            if out is None:
                out = torch.empty(
                    (len(paths), *x.shape[1:]),
                    dtype=torch.float16,
                    memory_format=torch.channels_last,  # a location's features side by side
                )
            out[start : start + len(x)] = x
            sizes += batch_sizes
            if report is not None:
                report(start + len(x))
    return out, sizes


# ---- 2. Metrics and tables: maps, scores, masks -> figures. Touches no file but the masks --------
# What results.csv holds, and what metrics.csv holds beside it. None where it is not defined.
COLUMNS = (
    *("category", "image_auroc", "image_auroc_max", "pixel_auroc", "aupro"),
    *("train_images", "test_images", "seconds"),
)
MORE = (
    *("image_ap", "pixel_ap", "image_auroc_logical", "image_auroc_structural"),
    *("spro_logical", "spro_structural", "spro"),
    *("threshold", "false_alarm_rate", "detection_rate"),
)
SUMMED = ("train_images", "test_images", "seconds")
DIGITS = {"threshold": 4}  # decimals in tables, where they are not two
FALSE_ALARMS = 1.0  # percent of good images that a threshold may flag, by default
PRO_LIMIT, SPRO_LIMIT = 0.3, 0.05  # largest rate of false positives: MVTec AD, MVTec LOCO AD
BINS = 1 << 15
SAMPLE = 2_000_000  # pixels whose quantiles place the bins


def at_size(y, size):
    """Anomaly map (h, w) resampled to an image's (H, W), float32 array."""
    return F.interpolate(y[None, None].float(), size, mode="bilinear")[0, 0].numpy()


def auroc_ap(positive, negative):
    """AUROC and average precision from histograms of scores, in rising order of score.

    Ties count one half in the AUROC.
    """
    P, N = positive.sum(), negative.sum()
    if not P or not N:
        return None, None
    tp, fp = np.cumsum(positive[::-1]), np.cumsum(negative[::-1])
    auroc = np.trapezoid(np.r_[0, tp] / P, np.r_[0, fp] / N)
    precision = tp / np.maximum(tp + fp, 1)
    return 100 * auroc, 100 * np.sum(np.diff(np.r_[0, tp]) / P * precision)


def image_metrics(scores, defective):
    """AUROC and average precision of image scores, exact."""
    _, rank = np.unique(scores, return_inverse=True)
    defective = np.asarray(defective, bool)
    levels = rank.max(initial=0) + 1
    positive = np.bincount(rank[defective], minlength=levels)
    return auroc_ap(positive, np.bincount(rank[~defective], minlength=levels))


def area_to(x, y, limit):
    """Area under a curve from (0, 0), x rising, up to x = limit, divided by limit.

    The value at the limit is interpolated.
    """
    x, y = np.r_[0.0, x], np.r_[0.0, y]
    k = np.searchsorted(x, limit, side="right")
    if k < len(x):
        at = y[k - 1] + (y[k] - y[k - 1]) * (limit - x[k - 1]) / (x[k] - x[k - 1])
        x, y = np.r_[x[:k], limit], np.r_[y[:k], at]
    return np.trapezoid(y, x) / limit


def pixel_metrics(maps, items, sizes, saturation=None, limit=PRO_LIMIT):
    """(pixel AUROC, pixel AP, AUPRO or sPRO) of maps (n, h, w), each at its mask's size.

    PRO: overlap of each region at each threshold, averaged over the regions of the whole set,
    against the rate of false positives over all defect-free pixels of the set, integrated to
    `limit` and divided by it (Bergmann et al. 2021; with saturation: Bergmann et al. 2022). Scores
    are binned, half the edges at quantiles and half evenly spaced: memory does not grow with the
    set, and the figures, as shares of 1, move by less than 1e-4 (tests/test_metrics.py).
    """
    values = maps.reshape(-1)[:: max(1, maps.numel() // SAMPLE)].numpy()
    quantiles = np.quantile(values, np.linspace(0, 1, BINS // 2))
    even = np.linspace(values.min(), values.max(), BINS // 2)
    edges = np.unique(np.r_[quantiles, even]).astype(np.float32)
    positive, negative, overlap = np.zeros((3, len(edges) + 1))
    n_regions = 0
    for y, item, size in zip(maps, items, sizes, strict=True):
        regions, union = masks_of(item, size, saturation)
        index = np.searchsorted(edges, at_size(y, size), side="right")
        inside = np.bincount(index[union], minlength=len(edges) + 1)
        positive += inside
        negative += np.bincount(index.ravel(), minlength=len(edges) + 1) - inside
        for region, saturates_at in regions:
            hits = np.cumsum(np.bincount(index[region], minlength=len(edges) + 1)[::-1])
            overlap += np.minimum(hits / saturates_at, 1)
            n_regions += 1
    auroc, ap = auroc_ap(positive, negative)
    if not n_regions or not negative.sum():
        return auroc, ap, None
    false_positives = np.cumsum(negative[::-1]) / negative.sum()
    return auroc, ap, 100 * area_to(false_positives, overlap / n_regions, limit)


def judge(normal, scores, false_alarms=FALSE_ALARMS):
    """Threshold, p-values (n,) and whether flagged (n,) of image scores (n,).

    normal: (m,) scores of good images that were left out (Detector.normal_scores). The threshold is
    their (1 - a) quantile, a = false_alarms / 100, rounded up to one of them: the largest where
    a < 1 / (m - 1), so that m good images cannot promise less than 1 in m + 1 false alarms. Flagged
    is what lies above it. The p-value of a score s is (1 + #{normal >= s}) / (m + 1): how often a
    good image scores as high. Where hardware has bfloat16, single scores move by some percent
    against float32: train and score on the same kind.
    """
    normal = np.sort(np.asarray(normal, np.float64))
    scores = np.asarray(scores, np.float64)
    threshold = float(np.quantile(normal, 1 - false_alarms / 100, method="higher"))
    as_high = len(normal) - np.searchsorted(normal, scores, side="left")
    return threshold, (1 + as_high) / (len(normal) + 1), scores > threshold


def threshold_text(normal, false_alarms):
    """The threshold and what it promises, for a person.

    Few good images cannot promise a small rate: then it is said which rate they can.
    """
    threshold, _, _ = judge(normal, [], false_alarms)
    text = f"threshold {threshold:.4f} at {false_alarms:g} % false alarms"
    n, needed = len(normal), int(np.ceil(100 / false_alarms - 1 - 1e-9))
    if n >= needed:
        return text
    images = "of one good image" if n == 1 else f"the highest of {n} good images"
    return f"{text} ({images}: expect {100 / (n + 1):.2g} %, {needed} are needed)"


def measure_verdicts(category, normal, scores, false_alarms):
    """Figures of the threshold, which has seen no label: rates in percent, and a line in words."""
    bad = np.array([item.kind != "good" for item in category.test], bool)
    threshold, _, flagged = judge(normal, scores, false_alarms)
    row = {"threshold": threshold, "false_alarm_rate": None, "detection_rate": None}
    counts = []
    parts = (("false_alarm_rate", ~bad, "good"), ("detection_rate", bad, "defective"))
    for name, part, word in parts:
        if part.any():
            row[name] = 100 * float(flagged[part].mean())
            counts.append(f"{flagged[part].sum()} of {part.sum()} {word}")
    row["verdicts"] = f"{category.name}: {threshold_text(normal, false_alarms)}"
    if counts:
        row["verdicts"] += f": {', '.join(counts)} flagged"
    return row


def measure(category, maps, scores, sizes):
    """Row of figures of one category: a dict over COLUMNS and MORE.

    row["why"] says why a figure is None, or which defective images have an empty mask.
    """
    kinds = np.array([item.kind for item in category.test])
    bad, row = kinds != "good", dict.fromkeys(COLUMNS + MORE)
    row.update(category=category.name, train_images=len(category.train), why="")
    row["test_images"] = len(kinds)
    if not len(kinds):
        row["why"] = "no test images"
    elif bad.all():
        row["why"] = "no good test images: AUROC is not defined"
    elif not bad.any():
        row["why"] = "no defective test images: AUROC is not defined"
    else:
        row["image_auroc"], row["image_ap"] = image_metrics(scores, bad)
        row["image_auroc_max"], _ = image_metrics(maps.flatten(1).amax(1).numpy(), bad)
    if len(kinds) and not any(item.masks is None for item in category.test):
        figures = pixel_metrics(maps, category.test, sizes)
        row["pixel_auroc"], row["pixel_ap"], row["aupro"] = figures
        empty = [
            item.path.name
            for item, size in zip(category.test, sizes, strict=True)
            if item.masks and not any(read_mask(p, size).any() for p in item.masks)
        ]
        if empty:
            row["why"] += (
                f"{len(empty)} defective images have an empty mask (defect-free in the pixel "
                f"figures): {', '.join(empty[:4])}"
            )
    if category.layout == "MVTec LOCO AD" and row["image_auroc"] is not None:
        row |= measure_loco(category, maps, scores, sizes)
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()}


def measure_loco(category, maps, scores, sizes):
    """MVTec LOCO AD's own figures: each kind of anomaly beside the good images, and their means."""
    row = {}
    for part in ("logical", "structural"):
        kinds = ("good", part + "_anomalies")
        chosen = [j for j, item in enumerate(category.test) if item.kind in kinds]
        items = [category.test[j] for j in chosen]
        bad = [item.kind != "good" for item in items]
        row["image_auroc_" + part], _ = image_metrics(scores[chosen], bad)
        part_sizes = [sizes[j] for j in chosen]
        figures = pixel_metrics(maps[chosen], items, part_sizes, category.saturation, SPRO_LIMIT)
        row["spro_" + part] = figures[2]
    row["image_auroc"] = mean_of([row["image_auroc_logical"], row["image_auroc_structural"]])
    row["spro"] = mean_of([row["spro_logical"], row["spro_structural"]])
    return row


def mean_of(values):
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None


def mean_row(rows):
    """The last row of a table: means of the figures, sums of the counts and seconds.

    Thresholds are of one category each: they have no mean.
    """
    row = {"category": "mean"}
    for name in COLUMNS[1:] + MORE:
        values = [r[name] for r in rows]
        row[name] = sum(values) if name in SUMMED else mean_of(values)
    row["threshold"] = None
    return row


def cell_text(value, digits=2):
    if value is None or value != value:
        return ""
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def table_lines(columns, rows):
    """The names of the columns, and the rows (dicts), as texts."""
    return [columns] + [[cell_text(row[c], DIGITS.get(c, 2)) for c in columns] for row in rows]


def print_table(columns, rows):
    """Rows (dicts) as an aligned table on stdout."""
    lines = table_lines(columns, rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        numbers = [v.rjust(w) for v, w in zip(rest, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *numbers]), flush=True)


# ---- 3. Pictures and files: the only room that writes. Files are whole or not there --------------
FORMAT = 2  # of checkpoints; another one is refused


def no_memory(e):
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(e)


def write_whole(path, write):
    """write(temporary path beside `path`), flush to disk, rename: the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        if no_memory(e):
            raise
        raise cannot_write(path, e) from None


def write_csv(path, columns, rows):
    def write(to):
        with open(to, "w", newline="", encoding="utf-8") as f:
            csv.writer(f).writerows(table_lines(columns, rows))

    write_whole(path, write)


@contextlib.contextmanager
def writable(path):
    """Turn what the system says when it cannot write into InputError naming the file."""
    try:
        yield
    except OSError as e:
        raise cannot_write(path, e) from None


def cannot_write(path, e):
    return InputError(f"{path}: cannot be written ({e}): free some space or give another --out")


@contextlib.contextmanager
def growing_csv(path, columns):
    """A function that writes one row (a sequence); `path` is there once all rows are.

    Rows go to a temporary file as they come: memory does not grow with the table.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # surrogateescape: a name that is not UTF-8 is written as it is on the disk
        f = open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape")

    def write(values):
        with writable(path):
            csv.writer(f).writerow(values)

    try:
        write(columns)
        yield write
        with writable(path):
            f.flush()
            os.fsync(f.fileno())
            f.close()
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # a full disk, which has been named
            f.close()
        temporary.unlink(missing_ok=True)


def write_tables(folder, rows):
    """results.csv and metrics.csv (all figures), each with a last row `mean`; prints the table.

    And before it, for each category, what its threshold flagged.
    """
    for row in rows:
        print(row["verdicts"])
    rows = rows + [mean_row(rows)]
    write_csv(folder / "results.csv", COLUMNS, rows)
    write_csv(folder / "metrics.csv", COLUMNS + MORE, rows)
    defined = tuple(c for c in MORE if any(row[c] is not None for row in rows))
    print_table(COLUMNS + defined, rows)


def write_spread(folder, seeds, runs):
    """Tables over several seeds; prints mean +- spread.

    results.csv and metrics.csv: means over the seeds; spread.csv: standard deviations.
    """
    means, spreads = [], []
    for rows in zip(*[run + [mean_row(run)] for run in runs], strict=True):
        mean, spread = dict(rows[0]), dict(rows[0])
        for name, value in rows[0].items():
            if not isinstance(value, (str, type(None))):
                values = [row[name] for row in rows]
                mean[name] = float(np.mean(values))
                spread[name] = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
        means.append(mean)
        spreads.append(spread)
    write_csv(folder / "results.csv", COLUMNS, means)
    write_csv(folder / "metrics.csv", COLUMNS + MORE, means)
    write_csv(folder / "spread.csv", COLUMNS + MORE, spreads)
    printed = []
    for mean, spread in zip(means, spreads, strict=True):
        row = dict(mean)
        for name in COLUMNS:
            if isinstance(mean[name], float):
                row[name] = f"{cell_text(mean[name])} +- {cell_text(spread[name])}"
        printed.append(row)
    print(f"mean +- standard deviation over seeds {', '.join(map(str, seeds))}")
    print_table(COLUMNS, printed)


def save_checkpoint(path, recipe, **content):
    """Tensors and plain values, and the recipe that they belong to."""
    state = {"format": FORMAT, "recipe": asdict(recipe), **content}
    write_whole(path, partial(torch.save, state))


def load_checkpoint(path):
    """What save_checkpoint wrote, its recipe a Recipe. Raises InputError for anything else."""
    path = Path(path)
    if path.is_dir():
        inside = sorted(path.rglob("model.pt"))
        example = f": give a file, like {inside[0]}" if inside else ", without any model.pt in it"
        raise InputError(f"{path}: a folder{example}")
    if not path.exists():
        raise InputError(f"{path}: no such file: give a model.pt that train.py wrote")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # damaged archives raise a dozen types; none of them is ours
        raise InputError(
            f"{path}: not a WT-Flow model ({first_line(e)[:80]}): train it again"
        ) from None
    if not isinstance(state, dict) or "recipe" not in state:
        raise InputError(f"{path}: not a WT-Flow model: train it again")
    if state.get("format") != FORMAT:
        found = state.get("format", 1)
        raise InputError(
            f"{path}: a model of format {found}, this version reads {FORMAT}: train it again"
        )
    try:
        state["recipe"] = wtflow.Recipe(**state["recipe"])
    except (TypeError, InputError) as e:
        raise InputError(f"{path}: its recipe is not valid ({e}): train it again") from None
    return state


def save_model(path, detector, **content):
    """A fitted detector; the frozen extractor is named by its recipe, not stored."""
    save_checkpoint(Path(path), detector.recipe, model=detector.state_dict(), **content)


def load_model(path, device="cpu", weights=None):
    """The detector of save_model. Raises InputError if it does not fit the recipe it carries.

    weights: the backbone's state dict, if it is not in a package.

        model = evaluate.load("runs/parts/screw/model.pt")
        result = evaluate.score(model, "part.png")
    """
    state = load_checkpoint(path)
    try:
        detector = wtflow.Detector(state["recipe"], weights)
        detector.load_state_dict(state["model"])
        if not all(torch.isfinite(v).all() for v in state["model"].values()):
            raise ValueError("its weights are not finite")
        return detector.to(device)
    except (KeyError, TypeError, RuntimeError, AttributeError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise InputError(
            f"{path}: does not fit its own recipe ({reason}): mend that, or train it again"
        ) from None


load = load_model  # as a notebook calls it


# -- Pictures: functions that return the bytes of a PNG, and what writes them
DRAWN = 1024  # pixels of the longer side of an image in a picture, at most
TOP_OF_SCALE = 2.0  # thresholds; 0 is the bottom, so the threshold lies in the middle
FAR = 4.0  # thresholds; scores beyond make the histogram's axis logarithmic
TITLE = 80  # characters of a name in a title
FILE_NAME = 150  # bytes of a name in a picture's name: file systems allow 255


def new_figure(*args, **options):
    """pyplot, a figure and its axes, without a window."""
    import matplotlib  # here, because it takes longer to import than to score an image

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt, *plt.subplots(*args, layout="constrained", **options)


def png_of(plt, fig):
    """The figure as the bytes of a PNG; it is closed."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a character that the font does not have
        fig.savefig(file, format="png", dpi=100)
    plt.close(fig)
    return file.getvalue()


def one_line(text):
    """Text with what would break a line, or cannot be printed, as an escape like \\n."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def shortened(text, most=TITLE):
    """one_line of a text, its middle left out where it is long."""
    text = one_line(text)
    half = (most - 3) // 2
    return text if len(text) <= most else f"{text[:half]}...{text[-half:]}"


def without_suffixes(names):
    """Relative names of images without their suffixes, where they then still differ."""
    stems = [str(PurePosixPath(name).with_suffix("")) for name in names]
    count = Counter(stem.casefold() for stem in stems)
    return [
        stem if count[stem.casefold()] == 1 else name
        for name, stem in zip(names, stems, strict=True)
    ]


def file_names(names):
    """A file name, without a suffix, for each relative name of an image: flat, short, all unlike.

    Case does not tell two names apart: not every file system sees it.
    """
    taken, flat = set(), []
    for name in without_suffixes(names):
        base = name.replace("/", "_")
        encoded = os.fsencode(base)
        if len(encoded) > FILE_NAME:
            digest = hashlib.sha256(encoded).hexdigest()[:8]
            base = f"{encoded[:FILE_NAME].decode(errors='ignore')}-{digest}"
        unlike, k = base, 2
        while unlike.casefold() in taken:
            unlike, k = f"{base}-{k}", k + 1
        taken.add(unlike.casefold())
        flat.append(unlike)
    return flat


def item_names(items):
    """Names of test images, kind/file: below the folder that all images of a kind share."""
    names = {}
    for kind in dict.fromkeys(item.kind for item in items):
        paths = [item.path for item in items if item.kind == kind]
        shared = os.path.commonpath([path.parent for path in paths])
        names |= {path: f"{kind}/{path.relative_to(shared).as_posix()}" for path in paths}
    return [names[item.path] for item in items]


def best_f1(scores, defective):
    """Threshold with the best F1 on these scores (for display only: it looks at the labels)."""
    order = np.argsort(-scores, kind="stable")
    tp = np.cumsum(defective[order])
    f1 = 2 * tp / (np.arange(1, len(tp) + 1) + max(defective.sum(), 1))
    return float(scores[order][f1.argmax()])


def within_drawn(size):
    """(width, height) of a picture of an image of that size: DRAWN pixels at most."""
    scale = min(1, DRAWN / max(size))
    return tuple(max(1, round(side * scale)) for side in size)


def draw_map(image, union, y, threshold, title):
    """Two panels: the image with the outline of its mask, and its anomaly map (h, w).

    union: bool (H, W), None without a mask. The map's colours mean the same in every picture of a
    model: from 0 over the threshold, in the middle, to twice the threshold.
    """
    plt, fig, axes = new_figure(1, 2, figsize=(9.6, 4.6))
    aspect = "auto" if max(image.size) > 4 * min(image.size) else "equal"
    size = within_drawn(image.size)
    axes[0].imshow(np.asarray(image.resize(size, Image.BILINEAR)), aspect=aspect)
    if union is not None and union.any():
        # BOX and > 0: what is thinner than a pixel here stays
        outlined = np.asarray(Image.fromarray(union).convert("L").resize(size, Image.BOX)) > 0
        for axis, colour, width in ((axes[0], "black", 3), (axes[0], "yellow", 1.4)):
            axis.contour(outlined, [0.5], colors=colour, linewidths=width)
    at_image = at_size(y, size[::-1])
    top = TOP_OF_SCALE * max(threshold, 1e-6)
    # viridis reads the same to a colour-blind person
    shown = axes[1].imshow(at_image, cmap="viridis", vmin=0, vmax=top, aspect=aspect)
    if at_image.min() <= threshold < at_image.max():
        axes[1].contour(at_image, [threshold], colors="white", linewidths=1)
    outlined_too = "image" if union is None else "image and mask outline"
    for axis, name in zip(axes, (outlined_too, "anomaly map"), strict=True):
        axis.set(title=name, xticks=[], yticks=[])
    bar = fig.colorbar(shown, ax=axes[1], fraction=0.046, extend="max", ticks=[0, threshold, top])
    bar.ax.axhline(threshold, color="white", linewidth=2)
    bar.ax.set_yticklabels(["0", f"threshold\n{threshold:.3g}", f"{top:.3g}"])
    fig.suptitle(title, fontsize=11, parse_math=False)
    return png_of(plt, fig)


def draw_scores(title, scores, bad, threshold):
    """Histogram of the image scores, good and defective, with the threshold.

    With defects also the threshold of the best F1 on these scores, which looks at the labels.
    """
    plt, fig, axis = new_figure(figsize=(6.4, 3.6))
    low, high = min(scores.min(), threshold), max(scores.max(), threshold)
    logarithmic = low > 0 and high > FAR * threshold
    edges = np.linspace(low, high + 1e-6, 41)
    if logarithmic:
        edges = np.geomspace(low, high * (1 + 1e-6), 41)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(plt.NullFormatter())
    for part, colour, name in ((~bad, "#0072B2", "good"), (bad, "#E69F00", "defective")):
        if part.any():
            label = f"{name} ({part.sum()})"
            axis.hist(scores[part], edges, color=colour, alpha=0.65, label=label)
    axis.axvline(threshold, color="black", label=f"threshold {threshold:.3g}")
    if bad.any():
        best = best_f1(scores, bad)
        label = f"best F1, knowing the labels: {best:.3g}"
        axis.axvline(best, color="black", linestyle=":", label=label)
    unit = ", logarithmic" if logarithmic else ""
    axis.set(xlabel=f"image score{unit}", ylabel="test images")
    axis.set_title(shortened(title, 60), fontsize=11, parse_math=False)
    axis.legend(fontsize=9)
    return png_of(plt, fig)


def outcomes(bad, flagged):
    """What the threshold made of each image: good, false_alarm, miss or hit."""
    words = (("good", "false_alarm"), ("miss", "hit"))
    return [words[int(b)][int(f)] for b, f in zip(bad, flagged, strict=True)]


def prefixes_of(scores, bad, flagged, which="worst", each=3):
    """{index: prefix} of the images to show, like "miss1_": its outcome, the most telling first.

    which: "all", or "worst": the two highest good scores, the lowest and the highest defective.
    """
    order = np.argsort(scores, kind="stable")
    good, defective = [j for j in order[::-1] if not bad[j]], [j for j in order if bad[j]]
    half = len(defective) // 2
    lowest, highest = defective[:half], defective[half:][::-1]
    if which == "worst":
        good, lowest, highest = good[:2], lowest[:each], highest[:each]
    words, count, prefixes = outcomes(bad, flagged), Counter(), {}
    missed = [j for j in lowest if words[j] == "miss"]
    hit = [j for j in reversed(lowest) if words[j] == "hit"]
    # From the clearest on: hits from the highest score down, misses from the lowest up.
    highest_hits = [j for j in highest if words[j] == "hit"]
    more_missed = [j for j in reversed(highest) if words[j] == "miss"]
    for j in (*good, *missed, *more_missed, *highest_hits, *hit):
        count[words[j]] += 1
        prefixes[j] = f"{words[j]}{count[words[j]]}_"
    return prefixes


def write_picture(path, draw, failed):
    """draw() -> bytes of a PNG -> path. Whether it is drawn; if not, why is added to `failed`.

    A picture costs no model and no score. What cannot be written, and memory that ends, stop the
    run as everywhere.
    """
    try:
        png = draw()
    except Exception as e:  # a font, a name, a backend: matplotlib raises what it likes
        if no_memory(e):
            raise
        failed.append(f"{type(e).__name__}: {one_line(first_line(e))}")
        return False
    write_whole(path, lambda to: to.write_bytes(png))
    return True


def warn_of(failed, what):
    """One line on stderr if something was not drawn."""
    if failed:
        many = "a picture was" if len(failed) == 1 else f"{len(failed)} pictures were"
        print(f"warning: {one_line(what)}: {many} not drawn ({failed[0]})", file=sys.stderr)


def draw_category(folder, category, maps, scores, sizes, normal, args):
    """maps/*.png and scores.png of a category, as --maps says."""
    for old in (folder / "maps").glob("*.png"):  # pictures of an earlier run
        old.unlink()
    bad = np.array([item.kind != "good" for item in category.test])
    threshold, p_values, flagged = judge(normal, scores, args.false_alarms)
    prefixes = prefixes_of(scores, bad, flagged, args.maps)
    words, names = outcomes(bad, flagged), item_names(category.test)
    files, failed = file_names(names), []
    for j, prefix in prefixes.items():

        def draw(j=j):
            item = category.test[j]
            union = masks_of(item, sizes[j])[1] if item.masks else None
            title = (
                f"{shortened(f'{category.name} / {names[j]}')}\n"
                f"score {scores[j]:.4f}, threshold {threshold:.4f}, p {p_values[j]:.2g}: "
                f"{words[j].replace('_', ' ')}"
            )
            return draw_map(read_image(item.path), union, maps[j], threshold, title)

        write_picture(folder / "maps" / f"{prefix}{files[j]}.png", draw, failed)
    histogram = partial(draw_scores, category.name, scores, bad, threshold)
    write_picture(folder / "scores.png", histogram, failed)
    warn_of(failed, category.name)


def draw_contact_sheet(folder, names):
    """contact-sheet.png of a data set: best hit and worst miss of each category, from maps/.

    Without a miss, or defects, a false alarm or a good image takes the place.
    """

    def draw():
        rows = []
        for name in names:
            maps = folder / name / "maps"
            found = [
                path
                for word in ("hit", "miss", "false_alarm", "good")
                for path in maps.glob(f"{word}1_*.png")
            ]
            rows.append([Image.open(path) for path in found[:2]])
        rows = [row for row in rows if row]
        w, h = rows[0][0].size
        sheet = Image.new("RGB", (2 * w, h * len(rows)), "white")
        for i, row in enumerate(rows):
            for j, picture in enumerate(row):
                sheet.paste(picture, (j * w, i * h))
        file = io.BytesIO()
        sheet.save(file, format="PNG")
        return file.getvalue()

    if not any((folder / name / "maps").glob("*1_*.png") for name in names):
        return
    failed = []
    write_picture(folder / "contact-sheet.png", draw, failed)
    warn_of(failed, "contact-sheet.png")


# -- Scores and maps in files
SCORE_COLUMNS = ("image", "kind", "score", "p_value", "verdict", "error")
VERDICTS = ("good", "defect")


def score_row(name, kind, score, p_value, flagged):
    """A row of SCORE_COLUMNS, for an image that could be read."""
    return name, kind, f"{score:.6f}", f"{p_value:.6g}", VERDICTS[int(flagged)], ""


def save_scores(path, category, scores, normal, false_alarms):
    """scores.csv of a category: one line for each test image."""
    _, p_values, flagged = judge(normal, scores, false_alarms)
    names = item_names(category.test)
    with growing_csv(path, SCORE_COLUMNS) as write:
        for name, item, *verdict in zip(
            names, category.test, scores, p_values, flagged, strict=True
        ):
            write(score_row(name, item.kind, *verdict))


def save_maps(folder, category, maps, sizes):
    """float32 TIFF maps in the layout that MVTec's evaluation script reads."""
    place = folder / "anomaly_maps" / category.name / "test"
    names = without_suffixes(item_names(category.test))
    for y, name, size in zip(maps, names, sizes, strict=True):
        save_map(place / f"{name}.tiff", y, size)


def save_map(path, y, size):
    """An anomaly map (h, w) at an image's size (H, W) as a float32 TIFF."""
    write_whole(path, partial(Image.fromarray(at_size(y, size)).save, format="TIFF"))


# ---- 4. From Python: images in memory or on disk -> score, verdict, map --------------------------
class Result(NamedTuple):
    """What a model says of one image."""

    score: float
    p_value: float  # how often a good image scores as high
    verdict: str  # "good" or "defect": above the threshold
    threshold: float
    map: np.ndarray  # float32 (H, W), the image's own size; larger = less normal


def score(model, images, false_alarms=FALSE_ALARMS):
    """Result of one image, or a list of Results of a list of images.

    An image is a path, a PIL image, or a uint8 array (H, W, 3) RGB or (H, W) grey, of any size.
    false_alarms: percent of good images that the threshold may flag. Raises InputError for any
    other kind of image, saying how to convert it. The scores are those of the commands.

        import evaluate
        model = evaluate.load("runs/parts/screw/model.pt")
        result = evaluate.score(model, image)       # image[..., ::-1] if OpenCV has read it
        print(result.score, result.p_value, result.verdict, result.map.max())
    """
    if not isinstance(model, wtflow.Detector):
        raise InputError(f"{type(model).__name__} is no model: give evaluate.load('model.pt')")
    check_false_alarms(false_alarms)
    if not isinstance(images, (list, tuple)):
        return score(model, [images], false_alarms)[0]
    normal, results = model.normal_scores.cpu(), []
    for first, pixels, sizes in in_batches(model.recipe, images):
        maps, scores = score_pixels(model, pixels)
        threshold, p_values, flagged = judge(normal, scores, false_alarms)
        for k, (y, size) in enumerate(zip(maps, sizes, strict=True)):
            if np.isnan(scores[k]):
                raise InputError(f"{name_of(images[first + k], first + k)}: {NOT_FINITE}")
            verdict = VERDICTS[int(flagged[k])]
            found = float(scores[k]), float(p_values[k]), verdict, threshold, at_size(y, size)
            results.append(Result(*found))
    return results


NOT_FINITE = "features are not finite: check the weights and this image"


def check_false_alarms(percent):
    """Raises InputError unless it is a share of the good images, in percent."""
    real = isinstance(percent, (int, float)) and not isinstance(percent, bool)
    if not real or not 0 < percent < 100:
        raise InputError(
            f"false alarms of {percent!r}: give a percentage above 0 and below 100, like 1"
        )


def name_of(image, k):
    return one_line(image) if isinstance(image, (str, os.PathLike)) else f"image {k}"


def as_rgb(image, name):
    """RGB PIL image of a path, a PIL image or a uint8 array. Raises InputError with the remedy."""
    if isinstance(image, (str, os.PathLike)):
        check_exists(Path(image))
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        if image.mode.startswith("I") or image.mode == "F":
            raise InputError(
                f"{name}: PIL image of mode {image.mode}, of unknown range: "
                "convert it to 8 bits, or give its path"
            )
        return ImageOps.exif_transpose(image).convert("RGB")
    if isinstance(image, torch.Tensor):
        raise InputError(
            f"{name}: a tensor: give a uint8 array (H, W, 3), of (3, H, W) "
            "tensor.permute(1, 2, 0).cpu().numpy()"
        )
    if not isinstance(image, np.ndarray):
        raise InputError(
            f"{name}: {type(image).__name__} is no image: "
            "give a path, a PIL image or a uint8 array (H, W, 3)"
        )
    if fault := fault_of(image):
        raise InputError(f"{name}: {image.dtype} array {image.shape}: {fault}")
    return Image.fromarray(np.ascontiguousarray(image)).convert("RGB")


def fault_of(array):
    """Why an array is no uint8 image (H, W, 3) or (H, W), and what to do. "" if it is one."""
    shape = array.shape
    if array.size == 0:
        return "it is empty"
    if array.ndim == 4:
        return "several images: give list(array)"
    if array.ndim not in (2, 3):
        return "give (H, W, 3) or (H, W)"
    if array.ndim == 3 and shape[2] != 3:
        if shape[2] == 4:
            return "four channels: give array[..., :3]"
        if shape[2] == 1:
            return "one channel: give array[..., 0]"
        if shape[0] in (1, 3, 4):
            return "channels come first: give array.transpose(1, 2, 0)"
        return f"{shape[2]} channels: give three, RGB, or (H, W)"
    if array.dtype == np.uint8:
        return ""
    if array.dtype == bool:
        return "give array.astype(np.uint8) * 255"
    if array.dtype.kind not in "iuf":
        return "give uint8"
    if not np.isfinite(array).all():
        return "it holds NaN or infinity: replace them, and give uint8"
    return range_fault(array.min(), array.max(), array.dtype.kind == "f")


def range_fault(low, high, real):
    """How to make uint8 of numbers from low to high; real: they are floating-point."""
    spread = f"values from {low:g} to {high:g}"
    if low < 0:
        return f"{spread}: scale them to 0..255 as in training, and give uint8"
    if real and high <= 1:
        return f"{spread}: give (array * 255).round().astype(np.uint8)"
    if high <= 255:
        return f"{spread}: give array.{'round().' if real else ''}astype(np.uint8)"
    if high <= 65535:
        return (
            f"{spread}: scale them to 0..255 as in training, "
            "16 full bits by (array / 257).round().astype(np.uint8)"
        )
    return f"{spread}: scale them to 0..255 as in training, and give uint8"


def to_pixels(images, shape):
    """RGB PIL images -> uint8 (B, 3, *shape), antialiased bilinear: what a detector sees."""
    resized = [np.asarray(image.resize(shape[::-1], Image.BILINEAR)) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def in_batches(recipe, images):
    """(number of the first, pixels (B, 3, h, w), sizes [(H, W)]) of BATCH images at a time."""
    if not len(images):
        raise InputError("no images: the list is empty")
    shape = wtflow.image_shape(recipe)
    for first in range(0, len(images), BATCH):
        batch = enumerate(images[first : first + BATCH], first)
        pictures = [as_rgb(image, name_of(image, k)) for k, image in batch]
        yield first, to_pixels(pictures, shape), [picture.size[::-1] for picture in pictures]


def size_of(image, k):
    """(H, W) of image k of a list; of a file from its header alone."""
    if isinstance(image, (str, os.PathLike)):
        return image_sizes([Path(image)])[0]
    return as_rgb(image, name_of(image, k)).size[::-1]


def features_of(detector, images):
    """`extract` of a list of images in memory or on disk: (n, d, h, w) float16."""
    out = None
    for first, pixels, _ in in_batches(detector.recipe, images):
        x = detector.features(pixels).to(torch.float16)
        for k in (~x.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
            raise InputError(f"{name_of(images[first + k], first + k)}: {NOT_FINITE}")
        if out is None:
            layout = torch.channels_last  # a location's features side by side
            size = (len(images), *x.shape[1:])
            out = torch.empty(size, dtype=torch.float16, memory_format=layout)
        out[first : first + len(x)] = x
    return out


def score_pixels(detector, pixels, euler_steps=1):
    """Maps (B, h, w) and scores (B,) float64 of pixels (B, 3, h, w), by the way of `extract`.

    So the same image has the same score in a table, in a folder and alone. The score is NaN where
    the features are not finite.
    """
    x = detector.features(pixels).to(torch.float16)
    bad = ~x.isfinite().flatten(1).all(1)
    x[bad] = 0
    maps, scores = detector.score(detector.normalise(x, out=x), euler_steps)
    scores = scores.double().numpy()
    scores[bad.cpu().numpy()] = np.nan
    return maps, scores


def export(model, path, false_alarms=FALSE_ALARMS):
    """Write image -> (map, score) as a torch.export program; the largest difference to the model.

    The program takes uint8 (1, 3, h, w), RGB at the model's size: resizing is outside. It needs
    torch, and nothing of this repository. The file "wtflow.json" inside holds h, w, the threshold
    and the false alarms in percent that it is made for. No ONNX, no other batch. Checked here: it
    is loaded again and agrees with the model on a random image, else InputError.

        files = {"wtflow.json": ""}
        program = torch.export.load("screw.pt2", extra_files=files).module()
        map, score = program(pixels)
        defect = score.item() > json.loads(files["wtflow.json"])["threshold"]
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise InputError(f"{path}: give a name that ends in .pt2")
    check_false_alarms(false_alarms)
    h, w = wtflow.image_shape(model.recipe)
    threshold, _, _ = judge(model.normal_scores.cpu(), [], false_alarms)
    about = {"height": h, "width": w, "threshold": threshold, "false_alarms": false_alarms}
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, h, w), dtype=torch.uint8, generator=generator)
    file = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its own way of saving
        program = torch.export.export(model, (image.to(model.device),))
        torch.export.save(program, file, extra_files={"wtflow.json": json.dumps(about)})
        file.seek(0)
        again = torch.export.load(file).module()
        pairs = zip(model(image), again(image.to(model.device)), strict=True)
        difference = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    if not difference <= 0.01 * max(threshold, 1e-3):  # NaN too
        raise InputError(f"{path}: the exported program differs from the model by {difference:g}")
    write_whole(path, lambda to: to.write_bytes(file.getbuffer()))
    return difference


# ---- 5. Commands: what a user types. Each calls the rooms above ----------------------------------
class OneLineParser(argparse.ArgumentParser):
    def __init__(self, **options):
        # A name cut short is refused: --image would be --image-size in train.py.
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def keep_memory():
    """Let glibc keep up to 1 GiB of freed memory.

    By default each layer's large block goes back to the system and is paged in anew.
    """
    m_mmap_max, m_trim_threshold = -4, -1
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**30)
    except (AttributeError, OSError, TypeError):  # another C library: nothing to set
        pass


def exit_cleanly(main):
    """Run main; what the user can mend ends as one line on stderr and exit code 2.

    An interruption exits with 130.
    """
    keep_memory()
    if hasattr(sys.stdout, "reconfigure"):  # a name that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
        return
    except InputError as e:
        message = str(e)
    except KeyboardInterrupt:
        print("interrupted: run the same command with --resume to go on", file=sys.stderr)
        sys.exit(130)
    except OSError as e:  # what reading and writing do not name themselves, like a closed folder
        if e.filename is None:
            raise
        message = f"{e.filename}: {e.strerror}: check the path and its permissions"
    except (MemoryError, RuntimeError) as e:
        if not no_memory(e):
            raise
        message = "out of memory: give a smaller --image-size, or go on elsewhere with --resume"
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def pick_device(name):
    """The torch device of --device auto, cpu or cuda; under torchrun each process has its own."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no GPU that torch can use: give --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")


def evaluate_category(detector, category, x_0, sizes, args):
    """Score a category's test x_0 and measure: its row, maps and scores."""
    maps, scores = torch.zeros(0, 1, 1), np.zeros(0)
    if category.test:
        maps, scores = detector.score(x_0, getattr(args, "euler_steps", 1))
        scores = scores.double().numpy()
    row = measure(category, maps, scores, sizes)
    normal = detector.normal_scores.cpu()
    row |= measure_verdicts(category, normal, scores, args.false_alarms)
    if row["why"]:
        print(f"{category.name}: {row['why']}", file=sys.stderr)
    return row, maps, scores


def write_category(folder, detector, category, maps, scores, sizes, args):
    """Pictures and maps of a category as they are asked for, and then scores.csv: all is there."""
    if not category.test:
        return
    normal = detector.normal_scores.cpu()
    if args.maps != "none":
        draw_category(folder, category, maps, scores, sizes, normal, args)
    if args.save_maps:
        save_maps(folder.parent, category, maps, sizes)
    save_scores(folder / "scores.csv", category, scores, normal, args.false_alarms)


def extract_and_evaluate(detector, category, args):
    """Row, maps, scores and sizes of a category's test images."""
    x_0, sizes = None, []
    if category.test:
        features, sizes = extract(detector, [item.path for item in category.test])
        x_0 = detector.normalise(features, out=features)
    return *evaluate_category(detector, category, x_0, sizes, args), sizes


def model_in(run, name, category):
    """model.pt of a category under --run: the data set's folder, or the --out above it."""
    places = [run / name / category / "model.pt", run / category / "model.pt"]
    for place in places:
        if place.is_file():
            return place
    if not run.is_dir():
        raise InputError(f"{run}: no such folder: give --run the --out of train.py")
    looked = f"{run}: no model of {category} (looked for {places[0]} and {places[1]})"
    below = sorted(run.rglob("model.pt"))
    if below:
        raise InputError(f"{looked}: there is {below[0]}: give its data set, or --category")
    raise InputError(f"{looked}: give --run the --out of train.py")


def evaluate_run(args, device):
    """The table again from the models under --run: the data set's folder or the --out above it."""
    name, categories = read_dataset(args.data, args.category)
    models = [model_in(Path(args.run), name, category.name) for category in categories]
    rows = []
    for category, model in zip(categories, models, strict=True):
        began = time.monotonic()
        detector = load_model(model, device, args.weights)
        row, maps, scores, sizes = extract_and_evaluate(detector, category, args)
        write_category(model.parent, detector, category, maps, scores, sizes, args)
        row["seconds"] = round(time.monotonic() - began, 1)
        rows.append(row)
    write_tables(models[0].parent.parent, rows)


def check_exists(path):
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")


def images_under(folder):
    """Image files of a folder and of all folders in it, sorted; hidden ones are left out."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and not path.is_dir()
        and not any(part[0] == "." for part in path.relative_to(folder).parts)
    )


def table_place(out):
    """Where the table of a folder's scores goes: --out if it is a .csv, else scores.csv in it.

    Raises InputError if a file is there that is no such table.
    """
    out = Path(out or ".")
    table = out if out.suffix.lower() == ".csv" else out / "scores.csv"
    if table.exists():
        with open(table, "rb") as f:
            ours = f.readline().strip() == ",".join(SCORE_COLUMNS).encode()
        if not ours:
            raise InputError(f"{table}: is no table of scores: give another --out")
    return table


def picture_place(image, out):
    """Where the picture of one image goes: --out, a .png or a folder; else the current folder."""
    name = f"{file_names([image.name])[0]}_map.png"
    if out is None:
        return Path(name)
    out = Path(out)
    if out.is_dir() or not out.suffix:
        return out / name
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: a picture is a PNG: give a name in .png, or a folder")
    if out.exists() and out.samefile(image):
        raise InputError(f"--out {out}: is the image itself: give another")
    return out


def small_and_size(path, shape):
    """(pixels (1, 3, *shape), (H, W)) of an image file, or the InputError that says why not."""
    try:
        image = read_image(path)
        return to_pixels([image], shape), image.size[::-1]
    except InputError as e:
        return e


def score_images(args, device):
    """Print score, threshold, p-value and verdict of --image, a file or a folder; write pictures.

    One image has a picture unless --maps none. A folder is walked into; its scores go to scores.csv
    too, and its pictures are written if --out names a folder. An image that cannot be read costs
    one line on stderr, and exit code 2 at the end. Memory does not grow with the folder.
    """
    image = Path(args.image)
    check_exists(image)
    detector = load_model(args.model, device, args.weights)
    if args.euler_steps > 1:
        print(
            f"note: --euler-steps {args.euler_steps}: threshold and p are those of one step",
            file=sys.stderr,
        )
    if not image.is_dir():
        place = picture_place(image, args.out)
        if score_paths(args, detector, [image], [image.name], [place]):
            sys.exit(2)
        return
    table, paths = table_place(args.out), images_under(image)
    folder = None if args.out is None or table == Path(args.out) else Path(args.out)
    if folder is None and args.save_maps:
        raise InputError("--save-maps: give --out, a folder for the maps")
    if folder is not None:
        paths = not_below(folder, image, paths)
    if not paths:
        raise InputError(f"{image}: no images ({', '.join(SUFFIXES)}) in this folder")
    names = [path.relative_to(image).as_posix() for path in paths]
    places = [None] * len(paths)
    if folder is not None:
        places = [folder / f"{name}_map.png" for name in file_names(names)]
    with growing_csv(table, SCORE_COLUMNS) as write:
        failed = score_paths(args, detector, paths, names, places, write)
    print(f"scores: {one_line(table)}", file=sys.stderr)  # stdout: one line an image
    if failed:
        sys.exit(2)


def not_below(out, image, paths):
    """The paths that do not lie below --out: what is there are pictures of an earlier run."""
    if out.resolve() == image.resolve():
        raise InputError(f"--out {out}: is the folder of the images: give another")
    kept = [path for path in paths if out.resolve() not in path.resolve().parents]
    if len(kept) < len(paths):
        print(f"note: {len(paths) - len(kept)} images in --out {out} left out", file=sys.stderr)
    return kept


def scored_files(detector, paths, euler_steps=1):
    """(map, score, size) of each image file in order, or the InputError that says why not.

    BATCH images are in memory at a time, resized.
    """
    read_small = partial(small_and_size, shape=wtflow.image_shape(detector.recipe))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            read = list(pool.map(read_small, batch))
            pixels = [found[0] for found in read if not isinstance(found, InputError)]
            scored = iter(())
            if pixels:
                scored = zip(*score_pixels(detector, torch.cat(pixels), euler_steps), strict=True)
            for path, found in zip(batch, read, strict=True):
                if isinstance(found, InputError):
                    yield found
                    continue
                y, score_of_one = next(scored)
                if np.isnan(score_of_one):
                    yield InputError(f"{path}: {NOT_FINITE}")
                else:
                    yield y, score_of_one, found[1]


def score_paths(args, detector, paths, names, places, write=None):
    """Score, print and draw image files, with a row of the table for each: how many failed.

    places: a picture's path, or None, for each; write: see growing_csv.
    """
    normal = detector.normal_scores.cpu()
    failed, not_drawn = 0, []
    everything = zip(
        paths, names, places, scored_files(detector, paths, args.euler_steps), strict=True
    )
    for path, name, place, found in everything:
        kind = str(PurePosixPath(name).parent).lstrip(".")
        if isinstance(found, InputError):
            failed += 1
            print(f"error: {one_line(found)}", file=sys.stderr)
            if write is not None:
                write((name, kind, "", "", "", str(found)))
            continue
        y, s, size = found
        threshold, (p,), (flagged,) = judge(normal, [s], args.false_alarms)
        figures = f"score {s:.4f}  threshold {threshold:.4f}  p {p:.4f}  {VERDICTS[int(flagged)]}"
        line = f"{one_line(name)}  {figures}"
        if place is not None and args.maps != "none":
            title = f"{shortened(name)}\n{figures}"
            if write_picture(place, partial(draw_file, path, y, threshold, title), not_drawn):
                line += f"  {one_line(place)}"
        if place is not None and args.save_maps:
            save_map(place.with_suffix(".tiff"), y, size)
        print(line)
        if write is not None:
            write(score_row(name, kind, s, p, flagged))
    warn_of(not_drawn, args.image)
    return failed


def draw_file(path, y, threshold, title):
    """draw_map of an image file without a mask."""
    return draw_map(read_image(path), None, y, threshold, title)


def percentage(text):
    """--false-alarms as a number."""
    try:
        percent = float(text)
        check_false_alarms(percent)
    except ValueError:  # InputError is one too
        raise argparse.ArgumentTypeError(
            f"{text}: give a percentage above 0 and below 100, like 1"
        ) from None
    return percent


def add_common_options(parser):
    """What train.py and evaluate.py share."""
    add = parser.add_argument
    add(
        "--category",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="only these categories of --data (default: all)",
    )
    add(
        "--weights",
        metavar="FILE",
        help="the backbone's state dict (default: that of its package)",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute; auto: a GPU if torch finds one (default: auto)",
    )
    add(
        "--false-alarms",
        type=percentage,
        default=FALSE_ALARMS,
        metavar="PERCENT",
        help="good images that the threshold may flag, in percent "
        f"(default: {FALSE_ALARMS:g}; n training images cannot give less than 100 / (n + 1))",
    )
    add(
        "--maps",
        choices=("all", "worst", "none"),
        default="worst",
        help="pictures: of all test images, of the most telling, none (default: worst)",
    )
    add(
        "--save-maps",
        action="store_true",
        help="float32 TIFF maps too, as MVTec's script reads them (default: no)",
    )


def parser_of_commands():
    parser = OneLineParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", help="with --run: data set root or one category's folder (default: none)")
    add("--run", help="folder that train.py wrote: its table again (default: none)")
    add("--model", help="a model.pt, for --image or --export (default: none)")
    add("--image", help="an image, or a folder of images to walk into (default: none)")
    add(
        "--out",
        help="with --image FILE: the picture, or its folder (default: the current folder). With "
        "--image FOLDER: folder of scores.csv and of the pictures, or a .csv alone "
        "(default: scores.csv in the current folder, without pictures)",
    )
    add(
        "--export",
        metavar="FILE.pt2",
        help="write the model as a torch.export program, uint8 (1, 3, H, W) -> (map, score); "
        "no ONNX, no resizing (default: none)",
    )
    add(
        "--euler-steps",
        type=int,
        default=1,
        metavar="K",
        help="steps from t = 0 to 1; thresholds are those of one (default: 1)",
    )
    add_common_options(parser)
    return parser


def export_model(args, device):
    """Write --export and print what the program takes, its threshold and the check."""
    model = load_model(args.model, device, args.weights)
    difference = export(model, args.export, args.false_alarms)
    h, w = wtflow.image_shape(model.recipe)
    limit = threshold_text(model.normal_scores.cpu(), args.false_alarms)
    print(
        f"{one_line(args.export)}: uint8 (1, 3, {h}, {w}) RGB -> map, score; {limit}; "
        f"largest difference to the model {difference:.2g}"
    )


# The options of each command, and what it does
COMMANDS = {
    ("run", "data"): evaluate_run,
    ("model", "image"): score_images,
    ("model", "export"): export_model,
}


def main(argv=None):
    args = parser_of_commands().parse_args(argv)
    device = pick_device(args.device)
    if args.euler_steps < 1:
        raise InputError(f"--euler-steps {args.euler_steps}: give at least 1")
    given = {name for name in ("run", "data", "model", "image", "export") if getattr(args, name)}
    for names, command in COMMANDS.items():
        if given == set(names):
            if args.out is not None and "image" not in given:
                raise InputError("--out: goes with --image")
            command(args, device)
            return
    raise InputError(
        "give --run and --data, or --model and --image, or --model and --export, and no other of "
        "these (see --help)"
    )


if __name__ == "__main__":
    exit_cleanly(main)
