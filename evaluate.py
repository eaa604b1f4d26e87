"""Data sets, metrics and pictures for WT-Flow, and the commands that read saved models.

    python evaluate.py --run DIR --data DIR                 the table again, from saved models
    python evaluate.py --model FILE --image FILE            one image (or a folder): its score and its picture
    python evaluate.py --run DIR --data DIR --compare       beside rFM, OT-CFM, nearest neighbour and Mahalanobis
    python evaluate.py --benchmark                          milliseconds per stage on this machine

An anomaly map is compared with its mask at the mask's own size: the map is resampled, the mask never.
"""
import argparse
import csv
import ctypes
import json
import os
import signal
import sys
import time
import warnings
import zipfile
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy import ndimage

import wtflow
from wtflow import InputError

warnings.simplefilter("ignore", Image.DecompressionBombWarning)       # open_image refuses these itself
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
COLUMNS = ("category", "image_auroc", "image_auroc_max", "pixel_auroc", "aupro", "train_images", "test_images", "seconds")
MORE = ("image_ap", "pixel_ap", "image_auroc_logical", "image_auroc_structural", "spro_logical", "spro_structural", "spro")


# ---- 1. Data sets. A category is a name, training images and test items; the layout is read off the folders. ---------
# kind: "good" or the defect's name. masks: paths, each a set of defective pixels; () = none, None = the set has no masks.
Item = namedtuple("Item", "path kind masks")
Category = namedtuple("Category", "name layout train test saturation")


def images_in(folder):
    """Image files of a folder, sorted. A link that leads nowhere is kept, so that reading it names it."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.is_dir() and p.name[0] != ".")


def folders_in(folder):
    return sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".") if folder.is_dir() else []


def mvtec(root):
    """MVTec AD, MPDD: train/good, test/<defect>, ground_truth/<defect>/<id>_mask.png."""
    truth, test = root / "ground_truth", []
    for folder in folders_in(root / "test"):
        for p in images_in(folder):
            named = [truth / folder.name / (p.stem + end) for end in ("_mask.png", ".png")]
            mask = next((m for m in named if m.is_file()), named[0])
            test.append(Item(p, folder.name, () if folder.name == "good" else (mask,) if truth.is_dir() else None))
    return Category(root.name, "MVTec AD", images_in(root / "train/good"), test, None)


def mvtec_loco(root):
    """MVTec LOCO AD: several masks per image, saturation thresholds in defects_config.json; validation is not used."""
    config, test = root / "defects_config.json", []
    for folder in folders_in(root / "test"):
        for p in images_in(folder):
            masks = tuple(images_in(root / "ground_truth" / folder.name / p.stem))
            if folder.name != "good" and not masks:
                raise InputError(f"{root / 'ground_truth' / folder.name / p.stem}: no masks for {p.name}: restore them from the download")
            test.append(Item(p, folder.name, masks))
    try:
        saturation = {d["pixel_value"]: (d["saturation_threshold"], d["relative_saturation"]) for d in json.loads(config.read_text())}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{config}: cannot be read as saturation thresholds ({e}): restore it from the download") from None
    return Category(root.name, "MVTec LOCO AD", images_in(root / "train/good"), test, saturation)


def mvtec_3d(root):
    """MVTec 3D-AD, its RGB images: {train,test}/<label>/{rgb,gt}; validation and xyz are not used."""
    test = [Item(p, folder.name, () if folder.name == "good" else (folder / "gt" / (p.stem + ".png"),))
            for folder in folders_in(root / "test") for p in images_in(folder / "rgb")]
    return Category(root.name, "MVTec 3D-AD", images_in(root / "train/good/rgb"), test, None)


def visa(root):
    """VisA: Data/Images/{Normal,Anomaly}, split by split_csv/1cls.csv beside the categories."""
    split, train, test = root.parent / "split_csv/1cls.csv", [], []
    try:
        with open(split, newline="") as f:
            rows = [r for r in csv.DictReader(f) if r["object"] == root.name]
        for r in rows:
            path, normal = root.parent / r["image"], r["label"] == "normal"
            if r["split"] == "train":
                train.append(path)
            else:
                test.append(Item(path, "good" if normal else "anomaly", () if normal else (root.parent / r["mask"],)))
    except (OSError, KeyError, UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"{split}: not the split file of VisA ({e}): restore split_csv/1cls.csv from the download") from None
    return Category(root.name, "VisA", train, test, None)


def read_category(root):
    """The category in a folder, or None if no layout fits. The first sign that fits decides."""
    if (root / "Data/Images/Normal").is_dir():
        return visa(root)
    if (root / "train/good/rgb").is_dir():
        return mvtec_3d(root)
    if (root / "train/good").is_dir():
        return (mvtec_loco if (root / "test/logical_anomalies").is_dir() or (root / "defects_config.json").is_file() else mvtec)(root)
    return None


def read_dataset(data, wanted=()):
    """(data set name, [Category]) of a root or of one category's folder. Raises InputError naming what was looked for."""
    data = Path(data)
    if not data.is_dir():
        raise InputError(f"{data}: no such folder: give --data a data set or one category of it")
    data = data.resolve()
    one = read_category(data)
    if one is None and images_in(data):
        one = Category(data.name, "folder of good images", images_in(data), [], None)
    found = [one] if one else [c for c in map(read_category, folders_in(data)) if c]
    if not found:
        raise InputError(f"{data}: no category here: looked for train/good (MVTec AD, MPDD, LOCO), train/good/rgb (MVTec 3D-AD), "
                         "Data/Images/Normal (VisA), or images (a folder of good ones) in it and in its sub-folders")
    names = [c.name for c in found]
    for name in wanted or ():
        if name not in names:
            raise InputError(f"{data}: no category '{name}': choose from {', '.join(names)}")
    found = [c for c in found if not wanted or c.name in wanted]
    for c in found:
        if not c.train:
            raise InputError(f"{data if one else data / c.name}: no training images ({', '.join(SUFFIXES)}) in train/good: add some good ones")
        for item in c.test:
            for m in item.masks or ():
                if not m.is_file():
                    raise InputError(f"{m}: mask of {item.path.name} is missing: restore it, or remove ground_truth to go without pixel figures")
    return (data.parent.name if one else data.name) or "data", found


def first_line(e):
    return (str(e) or type(e).__name__).splitlines()[0]


def open_image(path):
    """PIL image, decoded. Raises InputError naming the file."""
    try:
        image = Image.open(path)
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {Image.MAX_IMAGE_PIXELS}")
        image.load()
        return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, EOFError, MemoryError,
            OverflowError, TypeError, IndexError, KeyError, AttributeError, NotImplementedError) as e:
        raise InputError(f"{path}: cannot be read as an image ({first_line(e)}): "
                         "replace or remove it") from None


def read_image(path):
    """RGB PIL image as a person sees it: first frame, EXIF orientation applied (masks are drawn on the turned picture), palette and
    CMYK converted, alpha dropped, 16 bits scaled to 8, floating point taken as 0..1 or 0..255."""
    image = open_image(path)
    if image.mode.startswith("I") or image.mode == "F":
        a = np.asarray(image, dtype=np.float64)
        if not np.isfinite(a).all() or a.min() < 0 or a.max() > 65535 or (image.mode == "F" and a.max() > 255):
            raise InputError(f"{path}: values outside 0..1, 0..255 and 16 bits: rescale it")
        scale = (255 if a.max() <= 1 else 1) if image.mode == "F" else 255 / 65535
        exif, image = image.getexif(), Image.fromarray(np.round(a * scale).astype(np.uint8))
        image.getexif().update(exif)
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, TypeError) as e:
        raise InputError(f"{path}: cannot be converted to RGB ({e}): save it again as PNG") from None


def read_mask(path, size):
    """(values (H, W), non-zero = defect). Any non-zero channel counts; alpha does not. Raises InputError if not of `size`."""
    image = open_image(path)
    a = np.asarray(image)
    if a.ndim == 3:
        a = a[..., : a.shape[2] - (image.mode in ("LA", "RGBA", "PA"))].max(2)
    if a.shape != tuple(size):
        raise InputError(f"{path}: mask is {a.shape[1]} x {a.shape[0]}, its image {size[1]} x {size[0]}: masks must have the image's size")
    return a


def at_size(y, size):
    """Anomaly map (N, N) resampled to an image's (H, W), float32 array."""
    return F.interpolate(y[None, None].float(), size, mode="bilinear")[0, 0].numpy()


def masks_of(item, size, saturation=None):
    """Regions of an item: [(bool (H, W), pixels that saturate it)], the union of the masks, at the image's own size."""
    union, regions = np.zeros(size, bool), []
    for path in item.masks or ():
        values = read_mask(path, size)
        mask = values != 0
        union |= mask
        if saturation is None:                     # 8-connected components, as the official MVTec AD evaluation
            labels, n = ndimage.label(mask, np.ones((3, 3)))
            areas = np.bincount(labels.ravel())
            regions += [(labels == k, areas[k]) for k in range(1, n + 1)]
        elif mask.any():                           # one mask is one region (LOCO), saturated at its threshold
            threshold, relative = saturation.get(int(values.max()), (1.0, True))
            area = mask.sum()
            regions.append((mask, min(area, int(threshold * area) if relative else threshold)))
    return regions, union


def load_batch(paths, size, pool):
    """uint8 (B, 3, size, size) and the original sizes [(H, W)]; antialiased bilinear."""
    images = list(pool.map(read_image, paths))
    small = pool.map(lambda im: np.asarray(im.resize((size, size), Image.BILINEAR)), images)
    return torch.from_numpy(np.stack(list(small))).permute(0, 3, 1, 2), [im.size[::-1] for im in images]


def extract(detector, paths, show=lambda done: None, batch=16):
    """Features of image files, (n, d, h, w) float16, and the original sizes. One pass; a broken image raises InputError."""
    out, sizes = None, []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i in range(0, len(paths), batch):
            images, s = load_batch(paths[i:i + batch], detector.recipe["image_size"], pool)
            x = detector.features(images)
            bad = ~torch.isfinite(x).flatten(1).all(1) | (x.abs().flatten(1).amax(1) > 65504)
            if bad.any():
                raise InputError(f"{paths[i + int(bad.nonzero()[0])]}: features are not finite: check the weights and this image")
            out = torch.empty((len(paths), *x.shape[1:]), dtype=torch.float16) if out is None else out
            out[i:i + len(x)] = x
            sizes += s
            show(i + len(x))
    return out, sizes


# ---- 2. Metrics, in percent; None where they are not defined. --------------------------------------------------------
def auroc_ap(positive, negative):
    """AUROC and average precision from histograms of scores, in rising order of score. Ties count one half (AUROC)."""
    P, N = positive.sum(), negative.sum()
    if not P or not N:
        return None, None
    tp, fp = np.cumsum(positive[::-1]), np.cumsum(negative[::-1])
    auroc = np.trapezoid(np.r_[0, tp] / P, np.r_[0, fp] / N)
    return 100 * auroc, 100 * np.sum(np.diff(np.r_[0, tp]) / P * tp / np.maximum(tp + fp, 1))


def image_metrics(scores, defective):
    """AUROC and average precision of image scores, exact."""
    _, rank = np.unique(scores, return_inverse=True)
    d = np.asarray(defective, bool)
    return auroc_ap(np.bincount(rank[d], minlength=rank.max(initial=0) + 1), np.bincount(rank[~d], minlength=rank.max(initial=0) + 1))


def area_to(x, y, limit):
    """Area under a curve from (0, 0), x rising, up to x = limit, divided by limit; the value at the limit is interpolated."""
    x, y = np.r_[0.0, x], np.r_[0.0, y]
    k = np.searchsorted(x, limit, side="right")
    if k < len(x):
        at = y[k - 1] + (y[k] - y[k - 1]) * (limit - x[k - 1]) / (x[k] - x[k - 1])
        x, y = np.r_[x[:k], limit], np.r_[y[:k], at]
    return np.trapezoid(y, x) / limit


def pixel_metrics(maps, items, sizes, saturation=None, limit=0.3, bins=1 << 15):
    """(pixel AUROC, pixel AP, AUPRO or sPRO) of maps (n, N, N), each resampled to its mask's size.

    PRO: overlap of each region at each threshold, averaged over the regions of the whole set, against the rate of false
    positives over all defect-free pixels of the set, integrated to `limit` and divided by it (Bergmann et al. 2021;
    with saturation: Bergmann et al. 2022). Scores are binned, half the edges at quantiles and half evenly spaced: memory
    does not grow with the set, and the figures, as shares of 1, move by less than 1e-4 (tests/test_metrics.py).
    """
    values = maps.reshape(-1)[:: max(1, maps.numel() // 2_000_000)].numpy()
    edges = np.unique(np.r_[np.quantile(values, np.linspace(0, 1, bins // 2)), np.linspace(values.min(), values.max(), bins // 2)])
    edges = edges.astype(np.float32)
    positive, negative, overlap = np.zeros((3, len(edges) + 1))
    n_regions = 0
    for y, item, size in zip(maps, items, sizes):
        regions, union = masks_of(item, size, saturation)
        index = np.searchsorted(edges, at_size(y, size), side="right")
        count = np.bincount(index.ravel(), minlength=len(edges) + 1)
        inside = np.bincount(index[union], minlength=len(edges) + 1)
        positive += inside
        negative += count - inside
        for region, saturates_at in regions:
            hits = np.cumsum(np.bincount(index[region], minlength=len(edges) + 1)[::-1])
            overlap += np.minimum(hits / saturates_at, 1)
            n_regions += 1
    auroc, ap = auroc_ap(positive, negative)
    if not n_regions or not negative.sum():
        return auroc, ap, None
    return auroc, ap, 100 * area_to(np.cumsum(negative[::-1]) / negative.sum(), overlap / n_regions, limit)


def measure(category, maps, scores, sizes):
    """Row of figures for one category: a dict over COLUMNS and MORE. Undefined figures are None, with the reason in row["why"]."""
    kinds = np.array([i.kind for i in category.test])
    bad, row = kinds != "good", dict.fromkeys(COLUMNS + MORE)
    row.update(category=category.name, train_images=len(category.train), test_images=len(kinds), why="")
    if not len(kinds) or bad.all() or not bad.any():
        row["why"] = "no test images" if not len(kinds) else f"no {'good' if bad.all() else 'defective'} test images: AUROC is not defined"
    else:
        row["image_auroc"], row["image_ap"] = image_metrics(scores, bad)
        row["image_auroc_max"], _ = image_metrics(maps.flatten(1).amax(1).numpy(), bad)
    if len(kinds) and not any(i.masks is None for i in category.test):
        row["pixel_auroc"], row["pixel_ap"], row["aupro"] = pixel_metrics(maps, category.test, sizes)
        empty = [i.path.name for i, s in zip(category.test, sizes) if i.masks and not any(read_mask(p, s).any() for p in i.masks)]
        if empty:
            row["why"] += f"{len(empty)} defective images have an empty mask (defect-free in the pixel figures): {', '.join(empty[:4])}"
    if category.layout == "MVTec LOCO AD" and row["image_auroc"] is not None:
        for part in ("logical", "structural"):
            k = [j for j, kind in enumerate(kinds) if kind in ("good", part + "_anomalies")]
            row["image_auroc_" + part], _ = image_metrics(scores[k], bad[k])
            row["spro_" + part] = pixel_metrics(maps[k], [category.test[j] for j in k], [sizes[j] for j in k], category.saturation, 0.05)[2]
        row["image_auroc"], row["spro"] = (mean_of([row[a + "_logical"], row[a + "_structural"]]) for a in ("image_auroc", "spro"))
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()}


def mean_of(values):
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None


def mean_row(rows):
    """The last row: means of the figures, sums of the counts and seconds."""
    total = {k: sum(r[k] for r in rows) for k in ("train_images", "test_images", "seconds")}
    return {k: mean_of([r[k] for r in rows]) for k in COLUMNS + MORE if k not in total and k != "category"} | total | {"category": "mean"}


def cell(value):
    return "" if value is None or value != value else f"{value:.2f}" if isinstance(value, float) else str(value)


# ---- 3. Files: whole or not at all. ----------------------------------------------------------------------------------
def no_memory(e):
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(e)


def write_whole(path, write):
    """write(temporary path beside `path`), flush to disk, rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as e:           # torch.save reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        if no_memory(e):
            raise
        raise InputError(f"{path}: cannot be written ({e}): free some space or give another --out") from None


def write_csv(path, columns, rows):
    def write(to):
        with open(to, "w", newline="") as f:
            csv.writer(f).writerows([columns] + [[cell(r[c]) for c in columns] for r in rows])
    write_whole(path, write)


def write_tables(folder, rows):
    """results.csv (the contract's columns) and metrics.csv (all figures), each with a last row `mean`; prints the table."""
    rows = rows + [mean_row(rows)]
    write_csv(folder / "results.csv", COLUMNS, rows)
    write_csv(folder / "metrics.csv", COLUMNS + MORE, rows)
    print_table(COLUMNS + tuple(c for c in MORE if any(r[c] is not None for r in rows)), rows)


def print_table(columns, rows):
    lines = [columns] + [[cell(r[c]) for c in columns] for r in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print("\n".join("  ".join(v.ljust(w) if j == 0 else v.rjust(w) for j, (v, w) in enumerate(zip(line, widths))) for line in lines), flush=True)


def print_markdown(folder):
    """The tables of a folder of results, for a README. Raises InputError if there is none."""
    found = [folder / f"{name}.csv" for name in ("results", "spread", "compare") if (folder / f"{name}.csv").is_file()]
    if not found:
        raise InputError(f"{folder}: no results.csv here: give --run the data set's folder under --out")
    for path in found:
        with open(path, newline="") as f:
            lines = [f"| {' | '.join(row)} |" for row in csv.reader(f)]
        print(f"{path.name}\n\n" + "\n".join([lines[0], "|---" * lines[0].count(" |") + "|", *lines[1:]]) + "\n")


def write_spread(folder, seeds, runs):
    """results.csv and metrics.csv of several seeds: means over the seeds; spread.csv: standard deviations. Prints mean +- spread."""
    means, spreads = [], []
    for rows in zip(*[r + [mean_row(r)] for r in runs]):
        for out, f in ((means, np.mean), (spreads, lambda v: np.std(v, ddof=1) if len(v) > 1 else np.nan)):
            out.append({k: v if isinstance(v, (str, type(None))) else float(f([r[k] for r in rows])) for k, v in rows[0].items()})
    for name, columns, rows in (("results", COLUMNS, means), ("metrics", COLUMNS + MORE, means), ("spread", COLUMNS + MORE, spreads)):
        write_csv(folder / f"{name}.csv", columns, rows)
    print(f"mean +- standard deviation over seeds {', '.join(map(str, seeds))}")
    print_table(COLUMNS, [{k: f"{cell(m[k])} +- {cell(s[k])}" if isinstance(m[k], float) else m[k] for k in COLUMNS} for m, s in zip(means, spreads)])


def load_state(path):
    """Checkpoint as a dict. Tensors and plain values only (weights_only); raises InputError for anything else."""
    try:
        with zipfile.ZipFile(path) as archive:     # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                         # damaged archives raise a dozen types; none of them is ours
        raise InputError(f"{path}: not a WT-Flow model ({first_line(e)[:80]}): train it again") from None
    if not isinstance(state, dict) or set(state.get("recipe") or ()) != set(wtflow.RECIPE):
        raise InputError(f"{path}: not a WT-Flow model of this version: train it again")
    return state


def state_of(detector):
    """Tensors and plain values only; the frozen extractor is named, not stored."""
    return dict(recipe=detector.recipe, whitening=detector.whitening, calibration=detector.calibration, field=detector.field.state_dict())


def load_detector(path, device="cpu", weights=None):
    """Detector of a checkpoint. Raises InputError if a shape or a value does not fit the recipe it carries."""
    state = load_state(path)
    recipe = state["recipe"]
    try:
        detector = wtflow.Detector(recipe, weights, device)
        d, cells = state["field"]["out.weight"].shape[0], (recipe["image_size"] // recipe["cell"]) ** 2
        shapes = [(d,), (d, d)] * (recipe["norm"] == "zca"), [(cells, d), (cells, d, d)] * recipe["calibrate"]
        if not all(torch.isfinite(v).all() for part in ("whitening", "calibration") for v in state[part]):
            raise ValueError("its normalisation is not finite")
        if not all(torch.isfinite(v).all() for v in state["field"].values()):
            raise ValueError("its weights are not finite")
        if tuple([tuple(v.shape) for v in state[part]] for part in ("whitening", "calibration")) != shapes:
            raise ValueError("its normalisation has another shape")
        detector.whitening, detector.calibration = (tuple(v.to(device) for v in state[part]) for part in ("whitening", "calibration"))
        detector.new_field(d).load_state_dict(state["field"])
        with torch.inference_mode():                # a recipe of another backbone gives features of another width
            if detector.features(torch.zeros(1, 3, recipe["image_size"], recipe["image_size"], dtype=torch.uint8)).shape[1] != d:
                raise ValueError(f"not a model of {recipe['backbone']}")
    except (KeyError, TypeError, RuntimeError, AttributeError, IndexError, ValueError) as e:
        raise InputError(f"{path}: does not fit its own recipe ({first_line(e)[:200]}): mend that, or train it again") from None
    detector.field.eval()
    return detector


def normalise_all(detector, x):
    """x_0 of features x (n, d, h, w) float16, in the same memory; None stays None."""
    for part in () if x is None else x.split(64):
        part.copy_(detector.normalise(part.to(detector.device).float()).clamp(-65504, 65504))
    return x


def score_all(detector, log_p, x_0, batch=16):
    """Maps (n, N, N) and image scores (n,) of x_0 (n, d, h, w), on the CPU; log_p: (B, d, h, w) -> (B, h, w), a method's normality."""
    out = [detector.read_map(log_p(b.to(detector.device).float())) for b in x_0.split(batch)]
    return torch.cat([m.cpu() for m, _ in out]), torch.cat([s.cpu() for _, s in out]).double().numpy()


# ---- 4. Pictures. viridis reads the same to a colour-blind person. ---------------------------------------------------
def figure(*args, **kwargs):
    import matplotlib                              # here, because it takes longer to import than to score an image
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt, *plt.subplots(*args, **kwargs)


def save_figure(plt, fig, path):
    write_whole(path, lambda to: fig.savefig(to, format="png", dpi=100))
    plt.close(fig)


def best_f1(scores, defective):
    """Threshold with the best F1 on these scores (for display only: it looks at the labels)."""
    order = np.argsort(-scores, kind="stable")
    tp = np.cumsum(defective[order])
    f1 = 2 * tp / (np.arange(1, len(tp) + 1) + max(defective.sum(), 1))
    return float(scores[order][f1.argmax()])


def draw_map(path, image, union, y, low, high, title):
    """Picture of one image: itself, the outline of its mask, its anomaly map from `low` to `high` with a colour bar."""
    plt, fig, axes = figure(1, 3, figsize=(11, 3.9), layout="constrained")
    for ax, name in zip(axes, ("image", "image and mask outline", "anomaly map, -log p")):
        ax.imshow(np.asarray(image), aspect="auto" if max(image.size) > 4 * min(image.size) else "equal")
        ax.set_title(name, fontsize=11), ax.set_xticks([]), ax.set_yticks([])
    if union is not None and union.any():
        axes[1].contour(union, [0.5], colors="black", linewidths=3)
        axes[1].contour(union, [0.5], colors="yellow", linewidths=1.4)
    shown = axes[2].imshow(at_size(y, image.size[::-1]), cmap="viridis", vmin=low, vmax=high, aspect=axes[2].get_aspect())
    fig.colorbar(shown, ax=axes[2], fraction=0.046)
    fig.suptitle(title, fontsize=12)
    save_figure(plt, fig, path)


def draw_category(folder, category, maps, scores, sizes, which="worst"):
    """maps/*.png and scores.png of a category. which: all, worst (worst misses and best hits, 3 each), none."""
    if which == "none" or not len(scores):
        return
    bad = np.array([i.kind != "good" for i in category.test])
    threshold = best_f1(scores, bad) if bad.any() else float(scores.max())
    order, (low, high) = np.argsort(scores, kind="stable"), np.quantile(maps.flatten()[::97].numpy(), (0.5, 0.999))
    good, defective, named = [j for j in order if not bad[j]], [j for j in order if bad[j]], {}
    for kind, chosen in (("false_alarm", good[:-3:-1]), ("miss", defective[:min(3, len(defective) // 2)]),
                         ("hit", defective[:-min(3, len(defective) - len(defective) // 2) - 1:-1])):
        named |= {j: f"{kind}{k + 1}_" for k, j in enumerate(chosen)}
    for old in (folder / "maps").glob("*.png"):    # pictures of an earlier run
        old.unlink()
    for j in order if which == "all" else named:
        item = category.test[j]
        union = masks_of(item, sizes[j])[1] if item.masks else None
        title = f"{category.name} / {item.kind} / {item.path.name}:  score {scores[j]:.3f}, threshold at best F1 {threshold:.3f}"
        draw_map(folder / "maps" / f"{named.get(j, '')}{item.kind}_{item.path.stem}.png", read_image(item.path), union, maps[j], low, high, title)
    plt, fig, ax = figure(figsize=(6, 3.4), layout="constrained")
    edges = np.linspace(scores.min(), max(scores.max(), scores.min() + 1e-6), 41)
    for part, colour, label in ((~bad, "#0072B2", "good"), (bad, "#E69F00", "defective")):
        ax.hist(scores[part], edges, color=colour, alpha=0.65, label=f"{label} ({part.sum()})")
    ax.axvline(threshold, color="black", linestyle="--", label="threshold at best F1")
    ax.set(xlabel="image score", ylabel="test images", title=category.name), ax.legend()
    save_figure(plt, fig, folder / "scores.png")


def draw_contact_sheet(folder, names):
    """contact-sheet.png of a data set: for every category its best hit and its worst miss, from the pictures in maps/."""
    rows = [[next(iter(sorted((folder / name / "maps").glob(f"{kind}1_*.png"))), None) for kind in ("hit", "miss")] for name in names]
    rows = [[Image.open(p) for p in row if p] for row in rows if any(row)]
    if rows:
        w, h = rows[0][0].size
        sheet = Image.new("RGB", (2 * w, h * len(rows)), "white")
        for i, row in enumerate(rows):
            for j, picture in enumerate(row):
                sheet.paste(picture, (j * w, i * h))
        write_whole(folder / "contact-sheet.png", lambda to: sheet.save(to, format="PNG"))


def evaluate_category(detector, category, x_0, sizes, folder, which="worst", tiff=False, euler_steps=1):
    """Score the normalised test features x_0 of a category, measure, draw; its row."""
    if not category.test:
        return measure(category, torch.zeros(0, 1, 1), np.zeros(0), [])
    maps, scores = score_all(detector, lambda b: detector.log_density(b, euler_steps), x_0)
    row = measure(category, maps, scores, sizes)
    draw_category(folder, category, maps, scores, sizes, which)
    if tiff:
        for y, item, size in zip(maps, category.test, sizes):
            image = Image.fromarray(at_size(y, size))
            path = folder.parent / "anomaly_maps" / category.name / "test" / item.kind / f"{item.path.stem}.tiff"
            write_whole(path, lambda to: image.save(to, format="TIFF"))
    if row["why"]:
        print(f"{category.name}: {row['why']}", file=sys.stderr)
    return row


# ---- 5. Side by side on the same features ----------------------------------------------------------------------------
class Neighbour:
    """Distance to the nearest of m normal features (PatchCore-like: Roth et al. 2022, random memory instead of a coreset)."""

    def __init__(self, x_0, m=6000, seed=0):
        rows = x_0.movedim(1, -1).reshape(-1, x_0.shape[1])
        self.memory = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:m].to(rows.device)].float()

    def __call__(self, x_0):
        """log p = -(squared distance)/(2d), so that the flow's scorer applies unchanged."""
        rows = x_0.movedim(1, -1).reshape(-1, x_0.shape[1])
        return -torch.cdist(rows, self.memory).amin(1).square().view(x_0[:, 0].shape) / (2 * x_0.shape[1])


class Mahalanobis:
    """|W_l (x_0 - mu_l)|^2 with mean and covariance of each cell (PaDiM: Defard et al. 2021)."""

    def __init__(self, x_0):
        self.mu, self.memory = wtflow.fit_cells(x_0)

    def __call__(self, x_0):
        return wtflow.log_density(wtflow.whiten(x_0, self.mu, self.memory))


def compare(detector, category, x_0, t_0, sizes, seed):
    """Rows of every method on one category's x_0 (training) and t_0 (test): figures, milliseconds per image from x_0 to map, size in MiB."""
    from train import train_field
    rows = []

    def add(name, log_p, tensors):
        score_all(detector, log_p, t_0[:8], 8)     # warm-up
        began = time.perf_counter()
        maps, scores = score_all(detector, log_p, t_0, 8)
        took = 1000 * (time.perf_counter() - began) / len(t_0)
        row = measure(category, maps, scores, sizes)
        row.update(method=name, ms_per_image=took, model_mib=sum(v.numel() for v in tensors) * 4 / 2 ** 20)
        rows.append(row)

    coupling = detector.recipe["coupling"]
    for name, kind in (("WT-Flow", "worst"), ("rFM", "independent"), ("OT-CFM", "optimal")):
        detector.recipe["coupling"] = kind
        train_field(detector, x_0, seed)
        detector.calibrate(x_0)
        add(name, detector.log_density, [*detector.whitening, *detector.calibration, *detector.field.parameters()])
    detector.recipe["coupling"] = coupling
    for name, make in (("nearest neighbour, 6000", Neighbour), ("Mahalanobis per patch", Mahalanobis)):
        method = make(x_0.to(detector.device))
        add(name, method, [*detector.whitening, method.memory])
    return rows


# ---- 6. Benchmark ----------------------------------------------------------------------------------------------------
def milliseconds(f, device, repeats=15):
    """Median and interquartile range of f() in ms, after three warm-up calls, the device synchronised."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for k in range(repeats + 3):
        wait()
        began = time.perf_counter()
        f()
        wait()
        times.append(1000 * (time.perf_counter() - began))
    low, median, high = np.percentile(times[3:], (25, 50, 75))
    return median, high - low


def benchmark(device):
    """Print milliseconds per stage at batch 1 and 16, beside the bound: FLOPs over the matrix rate measured in this run."""
    import resource                                # here: not on every platform
    from torch.utils.flop_counter import FlopCounterMode
    size, rows = wtflow.RECIPE["image_size"], []
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20            # GiB
    a = torch.randn(2048, 2048, device=device)
    with torch.inference_mode(), wtflow.autocast(device):
        rate = 2 * 2048 ** 3 / milliseconds(lambda: a @ a, device)[0]                      # FLOPs per ms

        def add(name, f, parameters, batch):
            with FlopCounterMode(display=False) as counter:
                f()
            median, spread = milliseconds(f, device)
            rows.append({"stage": name, "batch": batch, "ms": median, "spread": spread, "images_per_s": 1000 * batch / median,
                         "parameters_M": parameters / 1e6, "x_bound": median * rate / max(counter.get_total_flops(), 1)})

        count = lambda net: sum(p.numel() for p in net.parameters())
        for n in (size, 2 * size):
            detector = wtflow.Detector(dict(wtflow.RECIPE, image_size=n), None, device)
            for batch in (1, 16):
                images = torch.randint(0, 255, (batch, 3, n, n), dtype=torch.uint8)
                x = detector.features(images)
                if batch == 1:
                    detector.fit_normalisation(x), detector.new_field(x.shape[1]).eval(), detector.calibrate(torch.randn_like(x))
                x_0, log_p = detector.normalise(x), detector.log_density(x)
                stages = [(f"image to map, end to end, {n} px", lambda: detector.read_map(detector.log_density(detector.normalise(detector.features(images)))),
                           count(detector.net) + count(detector.field))]
                if n == size:
                    stages += [("  extractor", lambda: detector.features(images), count(detector.net)), ("  normalisation", lambda: detector.normalise(x), 0),
                               ("  flow, one step", lambda: detector.transport(x_0), count(detector.field)),
                               ("  calibration, log p", lambda: detector.log_density(x_0), 0), ("  map and score", lambda: detector.read_map(log_p), 0)]
                for name, f, parameters in stages:
                    add(name, f, parameters, batch)
        ours = peak()
        unet = wtflow.VectorField(1024, wtflow.PAPER["base"]).to(device).eval()
        for batch in (1, 16):
            x_0 = torch.randn(batch, 1024, 8, 8, device=device)
            add("flow of the released U-Net", lambda: wtflow.euler(unet, x_0), count(unet), batch)
    print_table(("stage", "batch", "ms", "spread", "images_per_s", "parameters_M", "x_bound"), rows)
    print(f"matrix rate {rate / 1e9:.2f} TFLOP/s, {torch.get_num_threads()} threads, peak memory {ours:.1f} GiB ({peak():.1f} GiB with the U-Net); "
          "'calibration, log p' includes the flow")


# ---- 7. Commands -----------------------------------------------------------------------------------------------------
class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        raise InputError(f"{message} (see --help)")


def keep_memory():
    """Let glibc keep up to 1 GiB of freed memory: by default each layer's large block goes back to the system and is paged in anew."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0), libc.mallopt(-1, 2 ** 30)     # M_MMAP_MAX, M_TRIM_THRESHOLD
    except (AttributeError, OSError, TypeError):           # another C library: nothing to set
        pass


def exit_cleanly(main):
    """Run main; what the user can mend ends as one line on stderr and exit code 2, an interruption as 130."""
    keep_memory()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: run the same command with --resume to go on", file=sys.stderr)
        sys.exit(130)
    except OSError as e:                           # what reading and writing do not name themselves: a folder without permission
        if e.filename is None:
            raise
        print(f"error: {e.filename}: {e.strerror}: check the path and its permissions", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as e:
        if not no_memory(e):
            raise
        print("error: out of memory: give a smaller --image-size, or go on elsewhere with --resume", file=sys.stderr)
        sys.exit(2)


def pick_device(name):
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no GPU that torch can use: give --device cpu")
    gpu = name == "cuda" or name == "auto" and torch.cuda.is_available()
    return torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu")


def evaluate_run(args, device):
    """The table again (or --compare) from the models under --run, which is the data set's folder or the --out above it."""
    name, categories = read_dataset(args.data, args.category)
    folder = Path(args.run) / name if (Path(args.run) / name).is_dir() else Path(args.run)
    rows = []
    for category in categories:
        model = folder / category.name / "model.pt"
        began, detector = time.monotonic(), load_detector(model, device, args.weights)
        t_0, sizes = extract(detector, [i.path for i in category.test])
        normalise_all(detector, t_0)
        if args.compare and category.test:
            x_0 = normalise_all(detector, extract(detector, category.train)[0])
            rows += compare(detector, category, x_0, t_0, sizes, load_state(model)["signature"]["seed"])
        elif not args.compare:
            rows.append(evaluate_category(detector, category, t_0, sizes, folder / category.name, args.maps, args.save_maps, args.euler_steps))
            rows[-1]["seconds"] = round(time.monotonic() - began, 1)
    if args.compare:
        columns = ("category", "method", "image_auroc", "pixel_auroc", "aupro", "ms_per_image", "model_mib")
        write_csv(folder / "compare.csv", columns, rows)
        print_table(columns, rows)
    else:
        write_tables(folder, rows)


def score_images(args, device):
    """Print the score of one image or of each image of a folder; write the picture of one image, or of each under --out."""
    detector, path = load_detector(args.model, device, args.weights), Path(args.image)
    paths = images_in(path) if path.is_dir() else [path]
    if not paths:
        raise InputError(f"{path}: no images in this folder")
    x, _ = extract(detector, paths)
    maps, scores = score_all(detector, lambda b: detector.log_density(b, args.euler_steps), normalise_all(detector, x))
    for p, y, s in zip(paths, maps, scores):
        out = Path(args.out or f"{p.stem}_map.png") if not path.is_dir() else Path(args.out) / f"{p.stem}_map.png" if args.out else None
        print(f"{p.name}  score {s:.4f}" + (f"  {out}" if out else ""))
        if out:
            draw_map(out, read_image(p), None, y, float(maps.min()), float(maps.max()), f"{p.name}:  score {s:.3f}")


def main(argv=None):
    p = OneLineParser(description=__doc__.split("\n")[0])
    p.add_argument("--run", help="folder that train.py wrote")
    p.add_argument("--data", help="data set root or one category's folder")
    p.add_argument("--category", nargs="+", action="extend", default=[], metavar="NAME")
    p.add_argument("--euler-steps", type=int, default=1, metavar="K")
    p.add_argument("--compare", action="store_true", help="WT-Flow, rFM, OT-CFM, nearest neighbour, Mahalanobis on the same features")
    p.add_argument("--maps", choices=("all", "worst", "none"), default="worst")
    p.add_argument("--save-maps", action="store_true", help="float32 TIFF maps in the layout of MVTec's evaluation script")
    p.add_argument("--model", help="a model.pt"), p.add_argument("--image", help="an image, or a folder of images")
    p.add_argument("--out", help="picture (with --image FILE) or folder of pictures (with --image FOLDER)")
    p.add_argument("--weights", metavar="FILE"), p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--benchmark", action="store_true", help="milliseconds per stage on this machine")
    p.add_argument("--markdown", action="store_true", help="with --run: results.csv and compare.csv of that folder as Markdown tables")
    args = p.parse_args(argv)
    device = pick_device(args.device)
    if args.benchmark:
        return benchmark(device)
    if args.run and args.markdown:
        return print_markdown(Path(args.run))
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
