"""Data sets, metrics and pictures for WT-Flow, and the commands that read saved models.

    python evaluate.py --run DIR --data DIR          the table again, from saved models
    python evaluate.py --model FILE --image FILE     one image (or a folder): score and picture

An anomaly map is compared with its mask at the mask's own size: the map is resampled, the mask
never. Figures are in percent.
"""

import argparse
import contextlib
import csv
import ctypes
import json
import os
import signal
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
)
SUMMED = ("train_images", "test_images", "seconds")
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
    """The last row of a table: means of the figures, sums of the counts and seconds."""
    row = {"category": "mean"}
    for name in COLUMNS[1:] + MORE:
        values = [r[name] for r in rows]
        row[name] = sum(values) if name in SUMMED else mean_of(values)
    return row


def cell_text(value):
    if value is None or value != value:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def print_table(columns, rows):
    """Rows (dicts) as an aligned table on stdout."""
    lines = [columns] + [[cell_text(row[c]) for c in columns] for row in rows]
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
        raise InputError(
            f"{path}: cannot be written ({e}): free some space or give another --out"
        ) from None


def write_csv(path, columns, rows):
    lines = [columns] + [[cell_text(row[c]) for c in columns] for row in rows]

    def write(to):
        with open(to, "w", newline="") as f:
            csv.writer(f).writerows(lines)

    write_whole(path, write)


def write_tables(folder, rows):
    """results.csv and metrics.csv (all figures), each with a last row `mean`; prints the table."""
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
    save_checkpoint(path, detector.recipe, model=detector.state_dict(), **content)


def load_model(path, device="cpu", weights=None):
    """The detector of save_model. Raises InputError if it does not fit the recipe it carries."""
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


def new_figure(*args, **options):
    """pyplot, a figure and its axes, without a window."""
    import matplotlib  # here, because it takes longer to import than to score an image

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt, *plt.subplots(*args, layout="constrained", **options)


def save_figure(plt, fig, path):
    write_whole(path, partial(fig.savefig, format="png", dpi=100))
    plt.close(fig)


def best_f1(scores, defective):
    """Threshold with the best F1 on these scores (for display only: it looks at the labels)."""
    order = np.argsort(-scores, kind="stable")
    tp = np.cumsum(defective[order])
    f1 = 2 * tp / (np.arange(1, len(tp) + 1) + max(defective.sum(), 1))
    return float(scores[order][f1.argmax()])


def draw_map(path, image, union, y, low, high, title):
    """Picture of one image: itself, the outline of its mask, its anomaly map from low to high."""
    plt, fig, axes = new_figure(1, 3, figsize=(11, 3.9))
    aspect = "auto" if max(image.size) > 4 * min(image.size) else "equal"
    titles = ("image", "image and mask outline", "anomaly map, -log p")
    for axis, name in zip(axes, titles, strict=True):
        axis.imshow(np.asarray(image), aspect=aspect)
        axis.set(title=name, xticks=[], yticks=[])
    if union is not None and union.any():
        axes[1].contour(union, [0.5], colors="black", linewidths=3)
        axes[1].contour(union, [0.5], colors="yellow", linewidths=1.4)
    # viridis reads the same to a colour-blind person
    at_image = at_size(y, image.size[::-1])
    shown = axes[2].imshow(at_image, cmap="viridis", vmin=low, vmax=high, aspect=aspect)
    fig.colorbar(shown, ax=axes[2], fraction=0.046)
    fig.suptitle(title, fontsize=12)
    save_figure(plt, fig, path)


def worst_and_best(scores, bad, each=3):
    """{index: prefix} of the images to show: false alarms, misses, hits, the most telling first."""
    order = np.argsort(scores, kind="stable")
    good, defective = [j for j in order if not bad[j]], [j for j in order if bad[j]]
    misses = min(each, len(defective) // 2)
    hits = min(each, len(defective) - len(defective) // 2)
    chosen = {
        "false_alarm": good[:-3:-1],
        "miss": defective[:misses],
        "hit": defective[: -hits - 1 : -1],
    }
    return {j: f"{kind}{k + 1}_" for kind, js in chosen.items() for k, j in enumerate(js)}


def draw_category(folder, category, maps, scores, sizes, which="worst"):
    """maps/*.png and scores.png of a category. which: "all", "worst" (worst_and_best), "none"."""
    if which == "none" or not len(scores):
        return
    bad = np.array([item.kind != "good" for item in category.test])
    threshold = best_f1(scores, bad) if bad.any() else float(scores.max())
    low, high = np.quantile(maps.flatten()[::97].numpy(), (0.5, 0.999))
    prefixes = worst_and_best(scores, bad)
    for old in (folder / "maps").glob("*.png"):  # pictures of an earlier run
        old.unlink()
    for j in range(len(scores)) if which == "all" else prefixes:
        item = category.test[j]
        union = masks_of(item, sizes[j])[1] if item.masks else None
        title = (
            f"{category.name} / {item.kind} / {item.path.name}:  "
            f"score {scores[j]:.3f}, threshold at best F1 {threshold:.3f}"
        )
        path = folder / "maps" / f"{prefixes.get(j, '')}{item.kind}_{item.path.stem}.png"
        draw_map(path, read_image(item.path), union, maps[j], low, high, title)
    draw_scores(folder / "scores.png", category.name, scores, bad, threshold)


def draw_scores(path, title, scores, bad, threshold):
    """Histogram of the image scores, good and defective."""
    plt, fig, axis = new_figure(figsize=(6, 3.4))
    edges = np.linspace(scores.min(), max(scores.max(), scores.min() + 1e-6), 41)
    parts = ((~bad, "#0072B2", "good"), (bad, "#E69F00", "defective"))
    for part, colour, name in parts:
        label = f"{name} ({part.sum()})"
        axis.hist(scores[part], edges, color=colour, alpha=0.65, label=label)
    axis.axvline(threshold, color="black", linestyle="--", label="threshold at best F1")
    axis.set(xlabel="image score", ylabel="test images", title=title)
    axis.legend()
    save_figure(plt, fig, path)


def draw_contact_sheet(folder, names):
    """contact-sheet.png of a data set: best hit and worst miss of each category, from maps/."""
    rows = []
    for name in names:
        found = [
            sorted((folder / name / "maps").glob(f"{kind}1_*.png")) for kind in ("hit", "miss")
        ]
        rows.append([Image.open(paths[0]) for paths in found if paths])
    rows = [row for row in rows if row]
    if not rows:
        return
    w, h = rows[0][0].size
    sheet = Image.new("RGB", (2 * w, h * len(rows)), "white")
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            sheet.paste(picture, (j * w, i * h))
    write_whole(folder / "contact-sheet.png", partial(sheet.save, format="PNG"))


def save_maps(folder, category, maps, sizes):
    """float32 TIFF maps in the layout that MVTec's evaluation script reads."""
    for y, item, size in zip(maps, category.test, sizes, strict=True):
        image = Image.fromarray(at_size(y, size))
        place = folder / "anomaly_maps" / category.name / "test" / item.kind
        write_whole(place / f"{item.path.stem}.tiff", partial(image.save, format="TIFF"))


# ---- 4. Commands: what a user types. Each calls the rooms above ----------------------------------
class OneLineParser(argparse.ArgumentParser):
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
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def pick_device(name):
    """The torch device of --device auto, cpu or cuda; under torchrun each process has its own."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no GPU that torch can use: give --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")


def evaluate_category(detector, category, x_0, sizes, folder, args):
    """Score a category's test x_0, measure, draw, write maps; its row."""
    if not category.test:
        return measure(category, torch.zeros(0, 1, 1), np.zeros(0), [])
    maps, scores = detector.score(x_0, getattr(args, "euler_steps", 1))
    scores = scores.double().numpy()
    row = measure(category, maps, scores, sizes)
    draw_category(folder, category, maps, scores, sizes, args.maps)
    if args.save_maps:
        save_maps(folder.parent, category, maps, sizes)
    if row["why"]:
        print(f"{category.name}: {row['why']}", file=sys.stderr)
    return row


def evaluate_run(args, device):
    """The table again from the models under --run: the data set's folder or the --out above it."""
    name, categories = read_dataset(args.data, args.category)
    folder = Path(args.run)
    if (folder / name).is_dir():
        folder = folder / name
    rows = []
    for category in categories:
        began = time.monotonic()
        detector = load_model(folder / category.name / "model.pt", device, args.weights)
        x_0, sizes = None, []
        if category.test:
            features, sizes = extract(detector, [item.path for item in category.test])
            x_0 = detector.normalise(features, out=features)
        row = evaluate_category(detector, category, x_0, sizes, folder / category.name, args)
        row["seconds"] = round(time.monotonic() - began, 1)
        rows.append(row)
    write_tables(folder, rows)


def score_images(args, device):
    """Print the score of one image, or of each image of a folder, and write the pictures.

    One image always has a picture; a folder's images have theirs under --out, if it is given.
    """
    detector, path = load_model(args.model, device, args.weights), Path(args.image)
    paths = images_in(path) if path.is_dir() else [path]
    if not paths:
        raise InputError(f"{path}: no images in this folder")
    features, _ = extract(detector, paths)
    x_0 = detector.normalise(features, out=features)
    maps, scores = detector.score(x_0, args.euler_steps)
    low, high = float(maps.min()), float(maps.max())
    for p, y, s in zip(paths, maps, scores.tolist(), strict=True):
        picture = None
        if path.is_dir() and args.out:
            picture = Path(args.out) / f"{p.stem}_map.png"
        elif not path.is_dir():
            picture = Path(args.out or f"{p.stem}_map.png")
        if picture is None:
            print(f"{p.name}  score {s:.4f}")
            continue
        print(f"{p.name}  score {s:.4f}  {picture}")
        draw_map(picture, read_image(p), None, y, low, high, f"{p.name}:  score {s:.3f}")


def add_common_options(parser):
    """What train.py and evaluate.py share."""
    add = parser.add_argument
    add("--data", help="data set root or one category's folder")
    add("--category", nargs="+", action="extend", default=[], metavar="NAME", help="only these")
    add("--weights", metavar="FILE", help="the backbone's state dict, if it is not in a package")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--maps",
        choices=("all", "worst", "none"),
        default="worst",
        help="pictures: all, or worst misses and best hits (default: worst)",
    )
    add("--save-maps", action="store_true", help="float32 TIFF maps as MVTec's script reads them")


def main(argv=None):
    parser = OneLineParser(description=__doc__.split("\n")[0])
    add_common_options(parser)
    add = parser.add_argument
    add("--run", help="folder that train.py wrote")
    add("--model", help="a model.pt")
    add("--image", help="an image, or a folder of images")
    add("--out", help="picture (with --image FILE) or folder of pictures (with --image FOLDER)")
    add("--euler-steps", type=int, default=1, metavar="K", help="steps from t = 0 to 1")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    if args.euler_steps < 1:
        raise InputError(f"--euler-steps {args.euler_steps}: give at least 1")
    if args.model and args.image:
        score_images(args, device)
    elif args.run and args.data:
        evaluate_run(args, device)
    else:
        raise InputError("give --run and --data, or --model and --image (see --help)")


if __name__ == "__main__":
    exit_cleanly(main)
