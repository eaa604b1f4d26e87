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
import hashlib
import io
import json
import math
import os
import re
import signal
import struct
import sys
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

# Read as torch loads: a thread that waits for another spins briefly and then leaves its core to
# others. Longer costs a shared machine far more than its share, no spin at all makes training alone
# take half as long again (python -m tests.benchmark speed, with GOMP_SPINCOUNT=300000 or 0).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

import wtflow
from wtflow import InputError

# ---- 1. Data sets: folders -> categories, files -> arrays. Reads the data set, writes nothing ----
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".tif", ".tiff"),
    *(".webp", ".gif", ".ppm", ".pgm"),
)
# Names of folders, in the form of plain_name.
GOOD = (
    *("good", "ok", "okay", "io", "normal", "nominal", "pass", "passed", "healthy", "intact"),
    *("defectfree", "nodefect", "nondefective", "anomalyfree", "noanomaly"),
)
BAD = (
    *("bad", "ko", "ng", "nok", "nio", "notok", "fail", "failed", "reject", "faulty", "broken"),
    *("defect", "defective", "anomaly", "anomalies", "anomalous", "abnormal"),
)
TRUTH = ("groundtruth", "mask", "gt")  # of folders of masks
MASK_ENDS = (  # of their files, after the image's stem
    *("_mask", "_gt", "-mask", "-gt", ".mask", "_label", "_labels", "_seg"),
    *("_groundtruth", "_ground_truth", ""),
)
NO_IMAGES = ("thumbs.db", "desktop.ini", "scores.csv")  # left in folders by systems and by us
BATCH = 16  # images that are read and turned into features together
ORIENTATION = 0x0112  # EXIF; from 5 on the picture is shown turned by a quarter

Image.MAX_IMAGE_PIXELS = 1 << 28  # a strip of 2048 x 131072; open_image refuses what has more
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


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


SAID = set()  # what say_once has spoken of


def say_once(text, about=None):
    """A line on stderr about what was seen and how it is read, once in a run.

    about: of many lines about the same, only the first is said.
    """
    if (about or text) not in SAID:
        SAID.add(about or text)
        print(f"note: {text}", file=sys.stderr)


def images_in(folder):
    """Image files of a folder, sorted. A dangling link is kept, so that reading it names it."""
    if not folder.is_dir():
        return []
    return sorted(
        p
        for p in folder.iterdir()
        if p.suffix.lower() in SUFFIXES and not p.is_dir() and p.name[0] != "."
    )


def all_files(folder, above=()):
    """Files of a folder and of the folders in it, at any depth; hidden ones are left out.

    above: folders that lead here; a link back to one of them is not followed.
    """
    here = folder.resolve()
    if here in above or not folder.is_dir():
        return []
    found = sorted(p for p in folder.iterdir() if p.name[0] != "." and not p.is_dir())
    for inner in folders_in(folder):
        found += all_files(inner, (*above, here))
    return found


def images_under(folder):
    """Image files at any depth in a folder, but for those in folders of masks."""
    images = [path for path in all_files(folder) if path.suffix.lower() in SUFFIXES]
    inside = [path.parent.relative_to(folder).parts for path in images]
    masks = [any(plain_name(name) in TRUTH for name in names) for names in inside]
    return [path for path, mask in zip(images, masks, strict=True) if not mask]


def folders_in(folder):
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")


def plain_name(name):
    """A name without its case, "_", "-" and spaces, in the singular."""
    plain = re.sub(r"[\s_-]", "", name.casefold())
    return plain if plain in GOOD + BAD else plain.removesuffix("s")


def is_truth(folder):
    return plain_name(folder.name) in TRUTH


def is_good(folder):
    """Whether a folder's name says that its images are good. Raises InputError if it may."""
    if plain_name(folder.name) in GOOD:
        return True
    words = re.findall(r"[^\W\d_]+", folder.name.casefold())
    maybe = [word for word in words if word in GOOD]
    if maybe and words[0] not in ("not", "no", "non"):
        raise InputError(
            f"{folder}: good images, or a defect? Put good ones under {maybe[0]}/, or let the name "
            f"of a defect not hold {maybe[0]}"
        )
    return False


def listed(items):
    """Names, or those of paths, in a line, at most four."""
    names = [item if isinstance(item, str) else item.name for item in items[:4]]
    return ", ".join(names + ["..."] * (len(items) > 4))


def good_folders(part):
    """Folders of good images in train or test, by their names; of train else its only one, or
    train itself. Raises InputError if train holds several and none is named good.
    """
    inside = folders_in(part)
    found = [folder for folder in inside if is_good(folder)]
    if found or part.name.casefold() != "train":
        return found
    filled = [folder for folder in inside if images_under(folder)]
    if len(filled) > 1 and part_of(part.parent, "test").is_dir():
        raise InputError(f"{part}: which of {listed(filled)} holds the good images? Call it good")
    if images_in(part) and not filled:
        return [part]
    return [] if len(filled) != 1 or plain_name(filled[0].name) in BAD else filled


def good_images(folders):
    """Images of folders of good ones, and of all folders in these."""
    images = []
    for folder in folders:
        if folder.name != "good":
            say_once(f"{folder}: taken as good images")
        images += images_apart_from_masks(images_under(folder))[0]
    return images


def child(folder, name):
    """The file or folder of this name in any case, or None."""
    if not folder.is_dir():
        return None
    return next((p for p in sorted(folder.iterdir()) if p.name.casefold() == name.casefold()), None)


def part_of(root, name):
    """The folder "train" or "test" of a root, in any case; where there is none, as it is usual."""
    return child(root, name) or root / name


def mask_owner(path):
    """The stem of the image that a file name like 003_GT.png is the mask of, or None."""
    stem = path.stem.casefold()
    ends = [end for end in MASK_ENDS if end and stem.endswith(end)]
    return stem.removesuffix(ends[0]) if ends else None


def mask_owners(paths):
    """What mask_owner may say of the masks of images: {(folder, stem, with the suffix or not)}."""
    names = [(path, name) for path in paths for name in (path.stem, stem_and_suffix(path))]
    return {(path.parent, name.casefold()) for path, name in names}


def images_apart_from_masks(paths):
    """(images, masks) of image files: a mask is named after an image beside it, like 003_GT.png."""
    owners = mask_owners(paths)
    masks = {path for path in paths if (path.parent, mask_owner(path)) in owners}
    if masks:
        first = min(masks)
        say_once(f"{first.parent}: {len(masks)} files like {first.name} are read as masks")
    return [path for path in paths if path not in masks], masks


def by_stem(folder):
    """Image files of a folder by their stems, in lower case: {stem: [path]}."""
    found = {}
    for path in images_in(folder):
        found.setdefault(path.stem.casefold(), []).append(path)
    return found


def find_mask(image, places, files_of):
    """The mask of an image in the first of the folders `places` that has one, or None.

    A name with the image's suffix, 003_jpg_mask.png or 003_mask.jpg, goes before 003_mask.png.
    files_of: by_stem, cached by a caller with many images.
    """
    stem, suffix = image.stem.casefold(), image.suffix.casefold()
    wanted = [f"{stem}{joint}{suffix[1:]}{end}" for joint in "_." for end in MASK_ENDS]
    wanted += [stem + end for end in MASK_ENDS] + [f"mask_{stem}"]
    for place in places:
        for name in wanted:
            found = [path for path in files_of(place).get(name, ()) if path != image]
            if place == image.parent:  # a photograph of the same name in another format is no mask
                found = [path for path in found if mask_owner(path)]
            if found:
                return min(found, key=lambda path: path.suffix.casefold() != suffix)
    return None


def read_mvtec(root):
    """MVTec AD, MPDD, BTAD: train/good, test/<defect>, ground_truth/<defect>/<id>_mask.png.

    Good folders may have any name of GOOD, masks any of TRUTH and MASK_ENDS, images may lie deeper.
    """
    train, test_folder = part_of(root, "train"), part_of(root, "test")
    good, kinds = good_folders(train), [f for f in folders_in(test_folder) if not is_truth(f)]
    as_in_train = [plain_name(folder.name) for folder in good]
    good_kinds = good_folders(test_folder)
    good_kinds = good_kinds or [f for f in kinds if plain_name(f.name) in as_in_train]
    kinds = [folder for folder in kinds if folder not in good_kinds]
    truth = truth_in(root) or truth_in(test_folder)
    test = [Item(path, "good", ()) for path in good_images(good_kinds)]
    if kinds and not test:
        say_once(
            f"{root.name}: no good images in test (a folder good, ok, normal, ...): all of "
            f"{listed(kinds)} are taken as defects"
        )
    for folder in kinds:
        test += defective_items(folder, truth)
    owners = {}
    for item in test:
        for mask in item.masks or ():
            check_owners(mask, owners.setdefault(mask, item.path), item.path)
    test.sort(key=lambda item: item.path)
    category = Category(root.name, "MVTec AD", good_images(good), test, None)
    others = [folder for folder in folders_in(root) if folder not in (train, test_folder, truth)]
    if others := [folder for folder in others if images_under(folder)]:
        say_once(f"{root.name}: folders that are not read: {listed(others)}")
    name_skipped(category, (train, test_folder))
    return category


def truth_in(folder):
    """The folder of masks in a folder, or None."""
    return next((inner for inner in folders_in(folder) if is_truth(inner)), None)


def defective_items(folder, truth):
    """Items of a folder of defective images. truth: the folder of the set's masks, or None."""
    images, beside = images_apart_from_masks(images_under(folder))
    own = child(truth, folder.name) if truth else None  # the masks of this kind
    direct = {path.stem.casefold() for path in images if path.parent == folder}
    truth_near, files_of, items = cache(truth_in), cache(by_stem), []  # each folder is read once
    for path in images:
        inside = path.parent.relative_to(folder)
        near = truth_near(path.parent)
        places = [near] if near else []
        if beside:
            places.append(path.parent)
        if own:
            places.append(own / inside)
        if own and path.stem.casefold() not in direct:  # else the mask there is that of another
            places.append(own)
        if truth and not own:
            places.append(truth)
        mask = find_mask(path, places, files_of)
        usual = truth / folder.name / inside if truth else path.parent
        expected = usual / f"{path.stem}_mask.png"
        items.append(Item(path, folder.name, (mask or expected,) if truth or places else None))
    return items


def check_owners(mask, one, other):
    """Say that two images have one mask. Raises InputError if they lie in different folders."""
    if one.parent != other.parent:
        raise InputError(
            f"{mask}: the mask of {one} or of {other}? "
            "Let the folders of the masks be as those of the images"
        )
    if one != other:
        say_once(
            f"{mask}: taken as the mask of {one.name} and of {other.name}; masks of their own "
            f"are {stem_and_suffix(one)}_mask.png and {stem_and_suffix(other)}_mask.png",
            about=(mask.parent, "shared"),
        )


def stem_and_suffix(path):
    return f"{path.stem}_{path.suffix[1:]}"


def name_skipped(category, folders):
    """Say which files of folders are not read, with their number: none is dropped silently."""
    used = {*category.train, *(item.path for item in category.test)}
    used |= {mask for item in category.test for mask in item.masks or ()}
    owners = mask_owners(used)
    files = [path for folder in folders for path in all_files(folder)]
    files = [path for path in files if (path.parent, mask_owner(path)) not in owners]
    say_skipped(category.name, files, used)


def say_skipped(name, files, used):
    """Say which of the files are not among those used, and of which kinds they are."""
    skipped = [path for path in files if path not in used]
    skipped = [path for path in skipped if path.name.casefold() not in NO_IMAGES]
    if skipped:
        names = listed([f"{path.parent.name}/{path.name}" for path in skipped])
        suffixes = ", ".join(sorted({path.suffix or "no suffix" for path in skipped}))
        say_once(f"{name}: {len(skipped)} files are not read: {names} ({suffixes})")


def read_flat(root):
    """KolektorSDD2: train/, test/ hold images and <id>_GT masks; an empty mask is a good image."""
    parts, files_of = {"train": [], "test": []}, cache(by_stem)
    for part, items in parts.items():
        for path in images_apart_from_masks(images_in(part_of(root, part)))[0]:
            mask = find_mask(path, [path.parent], files_of)
            if mask is None and mask_owner(path):
                continue  # a mask of no image: name_skipped says so
            if mask is None:
                raise InputError(f"{path}: has no mask {path.stem}_GT beside it: add it, or use "
                                 "train/good, test/<defect>, ground_truth/<defect>")  # fmt: skip
            good = not mask_values(mask).any()
            items.append(Item(path, "good" if good else "defect", () if good else (mask,)))
    train = [item.path for item in parts["train"] if item.kind == "good"]
    left_out = len(parts["train"]) - len(train)
    if left_out:
        say_once(f"{root.name}: {left_out} defective images in train are left out")
    category = Category(root.name, "KolektorSDD2", train, parts["test"], None)
    named = category._replace(train=[item.path for item in parts["train"]])
    name_skipped(named, [part_of(root, part) for part in parts])
    return category


def read_mvtec_loco(root):
    """MVTec LOCO AD: several masks per image, saturation thresholds; validation is not used."""
    config, test = root / "defects_config.json", []
    train_folder, test_folder = part_of(root, "train"), part_of(root, "test")
    for folder in folders_in(test_folder):
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
    train = images_in(train_folder / "good")
    category = Category(root.name, "MVTec LOCO AD", train, test, saturation)
    name_skipped(category, (train_folder, test_folder))
    return category


def read_mvtec_3d(root):
    """MVTec 3D-AD, its RGB images: {train,test}/<label>/{rgb,gt}; validation, xyz are not used."""
    test = []
    for folder in folders_in(root / "test"):
        for path in images_in(folder / "rgb"):
            mask = folder / "gt" / (path.stem + ".png")
            test.append(Item(path, folder.name, () if folder.name == "good" else (mask,)))
    train = images_in(root / "train/good/rgb")
    category = Category(root.name, "MVTec 3D-AD", train, test, None)
    labels = [label for part in ("train", "test") for label in folders_in(root / part)]
    name_skipped(category, [label / "rgb" for label in labels])
    without = [label for label in labels if not (label / "rgb").is_dir()]
    if without:
        say_once(f"{root.name}: folders without rgb are not read: {listed(without)}")
    return category


def read_visa(root):
    """VisA: Data/Images/{Normal,Anomaly}, split by split_csv/1cls.csv beside the categories."""
    split, train, test, left_out = root.parent / "split_csv/1cls.csv", [], [], []
    try:
        with open(split, newline="", encoding="utf-8-sig") as f:
            rows = [row for row in csv.DictReader(f) if row["object"] == root.name]
        for row in rows:
            row |= {name: (row[name] or "").replace("\\", "/") for name in ("image", "mask")}
            path = root.parent / row["image"]
            if row["split"] == "train" and row["label"].casefold() in GOOD:
                train.append(path)
            elif row["split"] == "train":
                left_out.append(path)
            elif row["label"].casefold() in GOOD:
                test.append(Item(path, "good", ()))
            else:
                test.append(Item(path, "anomaly", (root.parent / row["mask"],)))
    except (OSError, KeyError, AttributeError, UnicodeDecodeError, csv.Error) as e:
        raise InputError(
            f"{split}: not the split file of VisA ({e}): "
            "restore split_csv/1cls.csv from the download"
        ) from None
    if left_out:
        say_once(f"{root.name}: {len(left_out)} defective images in train are left out")
    category = Category(root.name, "VisA", train, test, None)
    name_skipped(category, (root / "Data/Images",))
    return category


def read_category(root):
    """The category in a folder, or None if no layout fits. The first sign that fits decides."""
    if (root / "Data/Images/Normal").is_dir():
        return read_visa(root)
    if (root / "train/good/rgb").is_dir():
        return read_mvtec_3d(root)
    train, test = (images_in(part_of(root, name)) for name in ("train", "test"))
    if train and any(mask_owner(path) for path in train + test):
        return read_flat(root)
    if not good_folders(part_of(root, "train")):
        return None
    logical = part_of(root, "test") / "logical_anomalies"
    if logical.is_dir() or (root / "defects_config.json").is_file():
        return read_mvtec_loco(root)
    return read_mvtec(root)


def product_folder(folder):
    """The folder of the product that a folder of images is of: of screw/train/good/day1, screw."""
    for inner in (folder, *folder.parents):
        if plain_name(inner.name) in GOOD and inner.parent.name.casefold() == "train":
            return inner.parent.parent
    while plain_name(folder.name) in (*GOOD, "train", "rgb", "image") and folder.parent != folder:
        folder = folder.parent
    return folder


def read_images_only(folder):
    """A folder of good images: a category named after the product. Its data set's name goes first.

    Raises InputError if some of the images may be those of defects.
    """
    inside = [inner for inner in folders_in(folder) if images_under(inner)]
    good = [inner for inner in inside if is_good(inner)]
    unclear = [inner for inner in inside if plain_name(inner.name) in (*BAD, "train", "test")]
    if good:
        unclear = [inner for inner in inside if inner not in good] or images_in(folder)
    unclear += [inner for inner in folders_in(folder) if is_truth(inner)]
    if unclear:
        raise InputError(
            f"{folder}: good images beside {listed(unclear)}: put the good ones under train/good, "
            "defects under test/<defect>"
        )
    images, masks = images_apart_from_masks(images_under(folder))
    if masks:
        raise InputError(
            f"{folder}: {min(masks).name} is the mask of an image, so not all are good: put the "
            "good ones under train/good, defects under test/<defect>"
        )
    if inside:
        say_once(f"{folder}: images of {listed(inside)} are taken as good images too")
    product = product_folder(folder)
    category = Category(product.name, "folder of good images", images, [], None)
    name_skipped(category, (folder,))
    return product.parent.name, category


def read_products(data):
    """Categories of a root whose sub-folders hold nothing but images, each a product."""
    folders = [folder for folder in folders_in(data) if images_under(folder)]
    if any(f.name.casefold() in ("train", "test") or is_truth(f) for f in (data, *folders)):
        return []
    if folders:
        names = ", ".join(folder.name for folder in folders)
        say_once(f"{data}: taken as {len(folders)} products with good images only: {names}")
    return [read_images_only(folder)[1] for folder in folders]


def name_unread(data, read):
    """Say which images of a root lie in none of its categories, those named in `read`."""
    others = [folder for folder in folders_in(data) if folder.name not in read]
    unread = [f"{folder.name}/ (no train/good)" for folder in others if images_under(folder)]
    unread += [path.name for path in images_in(data)]
    if unread:
        say_once(f"{data}: {len(unread)} are not read: {listed(unread)}")


def read_dataset(data, wanted=()):
    """(name, [Category]) of a data set's root, or of one category's folder.

    wanted: names of categories, all by default. Raises InputError naming what was looked for.
    """
    data = Path(data)
    if not data.is_dir():
        raise InputError(f"{data}: no such folder: give --data a data set or one category of it")
    data = data.resolve()
    one, name = read_category(data), data.parent.name
    found = [one] if one else [c for c in map(read_category, folders_in(data)) if c]
    if found and not one:
        name = data.name
        name_unread(data, [c.name for c in found])
    named_good = any(plain_name(folder.name) in GOOD for folder in (data, *folders_in(data)))
    if not found and (images_in(data) or named_good):
        name, one = read_images_only(data)
        found = [one]
    if not found:
        name, found = data.name, read_products(data)
    if not found:
        raise InputError(
            f"{data}: no category here: looked for train/good (MVTec AD, MPDD, BTAD, LOCO), "
            "train/good/rgb (MVTec 3D-AD), Data/Images/Normal (VisA), train/<id>_GT (KolektorSDD2) "
            "or images (a folder of good ones) in it and in its sub-folders"
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
        struct.error,
    ) as e:
        raise InputError(
            f"{path}: cannot be read as an image ({first_line(e)}): replace or remove it"
        ) from None


def to_largest_page(image):
    """Turn an opened TIFF to its largest page, as the first may be a preview; the first of many."""
    if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
        areas = []
        for page in range(image.n_frames):
            image.seek(page)
            areas.append(image.width * image.height)
        image.seek(areas.index(max(areas)))


FULL_SIZE = "full_size"  # in image.info: width and height of a JPEG that was decoded smaller


def open_image(path, enough=None):
    """PIL image, decoded: of a TIFF its largest page. Raises InputError naming the file.

    enough: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size, where that leaves as many pixels a
    side: of 4000 x 4000 in a fifth of the time.
    """
    with unreadable(path):
        image = Image.open(path)
        to_largest_page(image)
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            size = f"{image.width} x {image.height}"
            raise ValueError(f"{size} pixels, more than {Image.MAX_IMAGE_PIXELS}")
        halved = not has_levels(image) and any(";16" in str(tile.args) for tile in image.tile)
        full_size = image.size
        if enough and image.format == "JPEG":
            image.draft(None, (enough, enough))
        image.load()
        if image.size != full_size:
            image.info[FULL_SIZE] = full_size
        if halved and max(high for _, high in image.convert("RGB").getextrema()) < NEARLY_BLACK:
            say_once(
                f"{path}: nearly black, as of 16 bits a colour the upper 8 are read: "
                "save it in 8 bits, or in 16 as a grey image",
                about=(path.parent, "halved"),
            )
        return image


def read_image(path, white=None, enough=None):
    """RGB PIL image as a person sees it. Raises InputError naming the file.

    The first frame, or the largest page; EXIF orientation applied, as masks are drawn on the turned
    picture; palette and CMYK converted; alpha dropped; more than 8 bits scaled to 8, from 0 to
    `white` (grey_level), by default that of this file alone. enough: see open_image.
    """
    image = open_image(path, enough)
    if has_levels(image):
        image = to_8_bits(path, image, white)
    with unreadable(path):
        if FULL_SIZE in image.info and image.getexif().get(ORIENTATION, 1) >= 5:
            image.info[FULL_SIZE] = image.info[FULL_SIZE][::-1]
        ImageOps.exif_transpose(image, in_place=True)  # a copy would cost as much as resizing
        return image if image.mode == "RGB" else image.convert("RGB")


def has_levels(image):
    """Whether a PIL image has more than 8 bits, or is floating-point."""
    return image.mode.startswith("I") or image.mode == "F"


WHITES = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16, 20, 24, 31))
OVERSHOOT = 0.05  # of white, of floating-point values beyond both ends: clipped without a word
NEARLY_BLACK = 16  # of 256 grey levels: an image that has no more is named
FEW_COUNTS = 64  # below it a floating-point value is no count of 0..255
PHOTOMETRIC, MIN_IS_WHITE = 262, 0  # a TIFF tag


def levels_of(path, image):
    """Values (H, W) float64 of an image that has_levels, as they are in the file."""
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"{path}: has values that are not finite: mend or remove it")
    return values


def white_above(largest, real):
    """The smallest usual white level that holds a value: 2^bits - 1, or 1 for floating point.

    A floating-point value below 1/4, or between 1 and FEW_COUNTS, is of no usual level: it is white
    itself, as it would be near black below 1 or 255.
    """
    if real and largest < FEW_COUNTS:
        usual = largest <= 0 or 0.25 <= largest <= 1 + OVERSHOOT
        return 1.0 if usual else float(largest)
    return float(next((w for w in WHITES if largest <= w * (1 + OVERSHOOT * real)), largest))


def grey_level(paths):
    """The white level of a data set, from its training images; None if there are none.

    The smallest of 255, 1023, 4095, 16383, 65535, ... (floating point: see white_above) that holds
    all of them, so that the same value is the same grey in every image. It is kept with the model.
    An image of 8 bits is read as it is. Says so where most images use few of the grey levels.
    """
    highest, ranges, real = 0.0, [], False
    for path in paths:
        with unreadable(path), Image.open(path) as image:
            to_largest_page(image)
            deep = has_levels(image)
        if deep:
            image = open_image(path)
            real = real or image.mode == "F"
            values = levels_of(path, image)
            highest = max(highest, float(values.max()))
            ranges.append(np.quantile(values, (0.001, 0.999)))  # without hot and dead pixels
    if not ranges:
        return 255.0 if paths else None
    white = white_above(highest, real)
    low, high = np.median(ranges, 0)
    if high - low < NEARLY_BLACK / 256 * white:
        levels = 256 * (high - low) / white
        say_once(
            f"{paths[0].parent}: most training images have values {low:.4g} to {high:.4g}, of 0 to "
            f"the white level {white:g}: {levels:.0f} of 256 grey levels; mend images that reach "
            "higher, or rescale all of them"
        )
    return white


def to_8_bits(path, image, white=None):
    """A 16-bit, 32-bit or floating-point PIL image in 8 bits, 0..white -> 0..255, with its EXIF.

    Of a TIFF whose least value is white, 0..white -> 255..0.
    """
    values, real = levels_of(path, image), image.mode == "F"
    lowest, highest = values.min(), values.max()
    in_training = white is not None
    if not in_training:
        white = white_above(highest, real)
    if lowest < -OVERSHOOT * white:
        raise InputError(f"{path}: has values down to {lowest:g}: rescale it to 0 and more")
    if highest > white * (1 + OVERSHOOT * real):
        say_once(f"{path}: values up to {highest:g} are cut at {white:g}, white in training")
    turned = getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == MIN_IS_WHITE
    if in_training and highest < NEARLY_BLACK / 256 * white and not turned:
        say_once(f"{path}: nearly black: values up to {highest:g}, white in training is {white:g}")
    values = np.clip(values / white, 0, 1)
    if turned:
        values = 1 - values
    small = Image.fromarray(np.round(255 * values).astype(np.uint8))
    small.getexif().update(image.getexif())
    return small


GREYS, BRIGHT, FAINT = 8, 128, 1 / 8  # what tells a mask that JPEG or resizing blurred: more
# values than labels have, or some below a share FAINT of one as high as BRIGHT


def mask_values(path):
    """Values (H, W) as they are in the file: of the channels the largest, but for alpha.

    A palette is read by its colours.
    """
    image = open_image(path)
    if image.mode == "P":
        indices = np.asarray(image) != 0
        image = image.convert("RGB")
        if (indices != (np.asarray(image).max(2) != 0)).any():
            say_once(
                f"{path}: a mask with a palette, read by its colours: black is defect-free",
                about=(path.parent, "palette"),
            )
    values = np.asarray(image)
    if values.ndim == 3:
        colours = values.shape[2] - (image.mode in ("LA", "RGBA", "PA"))
        values = values[..., :colours].max(2)
    return values


def read_mask(path, size):
    """Values (H, W), non-zero = defect. Any non-zero channel counts; alpha does not.

    What JPEG or resizing left is defective from half of the largest value on; small numbers are
    labels, all of them defective. Says what it saw where that is no plain mask, once for each
    folder. Raises InputError if the mask is not of `size`, (H, W).
    """
    values = mask_values(path)
    if values.shape != tuple(size):
        raise InputError(
            f"{path}: mask is {values.shape[1]} x {values.shape[0]}, its image "
            f"{size[1]} x {size[0]}: masks must have the image's size"
        )
    seen = np.unique(values)
    bright = seen[-1] >= BRIGHT or seen.dtype.kind == "f"
    faint = ((seen > 0) & (seen < FAINT * seen[-1])).any()
    if bright and (len(seen) > GREYS or faint):
        half = float(seen[-1]) / 2
        say_once(
            f"{path}: a mask with {len(seen)} grey values, read as defective from {half:g} on",
            about=(path.parent, "grey"),
        )
        values = np.where(values >= half, values, 0)
    share = (values != 0).mean()
    if share > 0.5:
        say_once(
            f"{path}: {100 * share:.0f} % of this mask is defective: is it inverted?",
            about=(path.parent, "inverted"),
        )
    return values


def masks_of(item, size, saturation=None):
    """Regions [(place, bool (h, w) there, pixels that saturate it)] and union (H, W) of the masks.

    place: the slices of a region's bounding box, so that many small regions take little memory.
    Without saturation a region is an 8-connected component, as in the official MVTec AD evaluation;
    with it (LOCO) a mask is one region, saturated at its threshold.
    """
    from scipy import ndimage  # here: 0.3 s, which an image alone need not wait for

    union, regions = np.zeros(size, bool), []
    for path in item.masks or ():
        values = read_mask(path, size)
        mask = values != 0
        union |= mask
        if saturation is None:
            labels, _ = ndimage.label(mask, np.ones((3, 3)))
            for k, place in enumerate(ndimage.find_objects(labels), 1):
                region = labels[place] == k
                regions.append((place, region, region.sum()))
        elif mask.any():
            threshold, relative = saturation.get(int(values.max()), (1.0, True))
            area, everywhere = mask.sum(), np.s_[:, :]
            most = min(area, int(threshold * area) if relative else threshold)
            regions.append((everywhere, mask, most))
    return regions, union


def image_sizes(paths):
    """(H, W) of image files as they are shown, from their headers. Raises InputError by name."""
    sizes = []
    for path in paths:
        with unreadable(path), Image.open(path) as image:
            to_largest_page(image)
            turned = may_be_turned(path, image) and image.getexif().get(ORIENTATION, 1) >= 5
            sizes.append(image.size if turned else image.size[::-1])
    return sizes


def may_be_turned(path, image):
    """Whether image.size may be that before the picture is turned as its orientation says.

    Pillow decodes a whole PNG to look for one; of a TIFF it gives the size after it.
    """
    if image.format != "PNG":
        return image.format != "TIFF"
    content = Path(path).read_bytes()
    return any(name in content for name in (b"eXIf", b"Raw profile", b"adobe.xmp"))


def read_resized(path, shape, white=None):
    """Pixels uint8 (*shape, 3), antialiased bilinear, and the original size (H, W).

    Twice the pixels a side are enough: within a few grey levels of what all of them give.
    """
    image = as_image(path, white, enough=2 * max(shape))
    pixels = np.asarray(image.resize(shape[::-1], Image.BILINEAR))
    return pixels, image.info.get(FULL_SIZE, image.size)[::-1]


def batches_of(paths, shape, white=None):
    """uint8 (B, 3, *shape) and the original sizes [(H, W)] of each BATCH of paths, in turn.

    The next batch is read while the caller works on one. paths: or what else as_image takes;
    white: see grey_level.
    """
    read = partial(read_resized, shape=shape, white=white)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead = pool.map(read, paths[:BATCH])
        for start in range(BATCH, len(paths) + BATCH, BATCH):
            pixels, sizes = zip(*ahead, strict=True)
            ahead = pool.map(read, paths[start : start + BATCH])
            yield torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), list(sizes)


def white_of(detector):
    """The white level that a detector was trained with; None: each image has its own."""
    return getattr(detector, "white", None)


def extract(detector, paths, report=None):
    """Features of image files (n, d, h, w) float16, None if there are none; original sizes.

    They are on the detector's device. One pass; report(done) after each batch. Raises InputError
    naming the image that cannot be read or whose features are not finite.
    """
    out, sizes = None, []
    shape = wtflow.image_shape(detector.recipe)
    for images, batch_sizes in batches_of(paths, shape, white_of(detector)):
        x = detector.features(images)
        bad = ~(x.abs().flatten(1).amax(1) <= torch.finfo(torch.float16).max)
        if bad.any():
            name = paths[len(sizes) + int(bad.nonzero()[0])]
            raise InputError(f"{name}: features are not finite: check the weights and this image")
        if out is None:
            out = torch.empty(
                (len(paths), *x.shape[1:]),
                dtype=torch.float16,
                device=x.device,
                memory_format=torch.channels_last,  # a location's features side by side
            )
        out[len(sizes) : len(sizes) + len(x)] = x
        sizes += batch_sizes
        if report is not None:
            report(len(sizes))
    return out, sizes


def x_0_of(detector, paths):
    """x_0 (n, d, h, w) float16 of image files, or of what else as_image takes; original sizes."""
    features, sizes = extract(detector, paths)
    return detector.normalise(features, out=features), sizes


# ---- 2. Metrics and tables: maps, scores, masks -> figures. Touches no file but the masks --------
# What results.csv holds, and what metrics.csv holds beside it. None where it is not defined.
COLUMNS = (
    *("category", "image_auroc", "image_auroc_max", "pixel_auroc", "aupro"),
    *("train_images", "test_images", "seconds"),
)
MORE = (
    *("image_ap", "pixel_ap", "image_auroc_logical", "image_auroc_structural"),
    *("spro_logical", "spro_structural", "spro"),
    *("false_alarms", "found"),  # at the threshold of the command's --false-alarms
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


class Verdict(NamedTuple):
    """What is said of one image."""

    score: float
    p_value: float  # how rarely a good image scores as high
    verdict: str  # "defect" or "good"
    map: np.ndarray | None = None  # (H, W) at the image's own size, in the units of the score


def threshold_of(normal_scores, false_alarms):
    """Score that at most `false_alarms` percent of new good images exceed, on average.

    normal_scores (n,): Detector.normal_scores, of training images, each under a law that has not
    seen it, and if they are few by such a field. The ceil((n + 1) (1 - a))-th smallest: a new score
    that is exchangeable with them exceeds it with a probability of a = false_alarms / 100 at most.
    Of fewer than 99 images it is the largest, for 1 %, and that promises less: few_images.
    """
    n = len(normal_scores)
    rank = math.ceil((n + 1) * (1 - false_alarms / 100) - 1e-9)  # 200 * 0.99 may exceed 198
    return float(np.sort(normal_scores)[min(max(rank, 1), n) - 1])


def few_images(normal_scores, false_alarms):
    """In words, if there are too few good images for so few false alarms, else ""."""
    n = len(normal_scores)
    if false_alarms * (n + 1) >= 100:
        return ""
    return f" ({n} good images can promise {100 / (n + 1):.2g} % at best)"


def judge(scores, normal_scores, threshold):
    """A Verdict of each score (m,). p = (1 + number of good images that score as high) / (n + 1).

    So the smallest p that n good images can give is 1 / (n + 1).
    """
    known = np.sort(np.asarray(normal_scores))
    as_high = len(known) - np.searchsorted(known, scores, side="left")
    verdicts = []
    for score, count in zip(scores, as_high, strict=True):
        verdict = "defect" if score > threshold else "good"
        verdicts.append(Verdict(float(score), (1 + int(count)) / (len(known) + 1), verdict))
    return verdicts


def alarm_rates(kinds, verdicts):
    """Percent of good and of defective test images that are called defective, None for none."""
    flagged = np.array([v.verdict == "defect" for v in verdicts], bool)
    good = np.array([kind == "good" for kind in kinds], bool)
    parts = (flagged[good], flagged[~good])
    rates = [100 * float(part.mean()) if len(part) else None for part in parts]
    return dict(zip(("false_alarms", "found"), rates, strict=True))


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
    bins = len(edges) + 1

    def counts(judged):
        """Of one image: in each bin, pixels in its mask, others, overlap (3, bins); regions."""
        y, item, size = judged
        regions, union = masks_of(item, size, saturation)
        index = np.searchsorted(edges, at_size(y, size), side="right")
        inside, overlap = np.bincount(index[union], minlength=bins), np.zeros(bins)
        for place, region, saturates_at in regions:
            hits = np.cumsum(np.bincount(index[place][region], minlength=bins)[::-1])
            overlap += np.minimum(hits / saturates_at, 1)
        outside = np.bincount(index.ravel(), minlength=bins) - inside
        return np.stack([inside, outside, overlap]), len(regions)

    totals, n_regions = np.zeros((3, bins)), 0
    judged = list(zip(maps, items, sizes, strict=True))
    for start in range(0, len(judged), BATCH):
        for of_one, regions in wtflow.side_by_side(
            counts, judged[start : start + BATCH], maps.device
        ):
            totals += of_one
            n_regions += regions
    positive, negative, overlap = totals
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
    bad, row, why = kinds != "good", dict.fromkeys(COLUMNS + MORE), []
    row.update(category=category.name, train_images=len(category.train))
    row["test_images"] = len(kinds)
    if not len(kinds):
        why.append("no test images")
    elif bad.all():
        why.append("no good test images: AUROC is not defined")
    elif not bad.any():
        why.append("no defective test images: AUROC is not defined")
    else:
        row["image_auroc"], row["image_ap"] = image_metrics(scores, bad)
        row["image_auroc_max"], _ = image_metrics(maps.flatten(1).amax(1).numpy(), bad)
    without = sum(item.masks is None for item in category.test)
    if 0 < without < bad.sum():
        why.append(f"{without} defective images have no folder of masks: no pixel figures")
    if len(kinds) and not without:
        figures = pixel_metrics(maps, category.test, sizes)
        row["pixel_auroc"], row["pixel_ap"], row["aupro"] = figures
        empty = [
            item.path.name
            for item, size in zip(category.test, sizes, strict=True)
            if item.masks and not any(read_mask(p, size).any() for p in item.masks)
        ]
        if empty:
            why.append(
                f"{len(empty)} defective images have an empty mask (defect-free in the pixel "
                f"figures): {', '.join(empty[:4])}"
            )
    row["why"] = "; ".join(why)
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
FORMAT = 4  # of checkpoints; another one is refused


def no_memory(e):
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(e)


def temporary_beside(path):
    return path.with_name(f".{path.name}.tmp")


def put_in_place(temporary, path):
    """Flush to disk, rename: the old file or the new one, never a part."""
    with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)


def write_whole(path, write):
    """write(temporary path beside `path`), then put_in_place."""
    temporary = temporary_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        put_in_place(temporary, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):  # where the folder is a file
            temporary.unlink(missing_ok=True)
        if no_memory(e):
            raise
        raise cannot_write(path, e) from None


def cannot_write(path, e):
    remedy = "free some space or change --out, --run, --export"
    return InputError(f"{path}: cannot be written ({e}): {remedy}")


@contextlib.contextmanager
def writable(path):
    """Turn what the system says when it cannot write into InputError naming the file."""
    try:
        yield
    except OSError as e:
        raise cannot_write(path, e) from None


def write_csv(path, columns, rows):
    with growing_csv(path, columns) as write:
        for row in rows:
            write(row)


@contextlib.contextmanager
def growing_csv(path, columns):
    """A function that writes one row (a dict); `path` is there once all rows are.

    Rows go to a temporary file as they come: memory does not grow with the table.
    """
    temporary = temporary_beside(path)
    with writable(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # surrogateescape: a name that is not UTF-8 is written as it is on the disk
        f = open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape")
        table = csv.writer(f)

    def write(row):
        with writable(path):
            table.writerow([cell_text(row[c]) for c in columns])

    try:
        with writable(path):
            table.writerow(columns)
        yield write
        with writable(path):
            f.close()
            put_in_place(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # of a full disk, which has been named
            f.close()
        temporary.unlink(missing_ok=True)


def said(verdict):
    """A Verdict in words."""
    return f"score {verdict.score:.4f}, p {verdict.p_value:.4f}, {verdict.verdict}"


SCORES = ("image", "kind", "score", "p_value", "verdict", "error")  # columns of scores.csv


def score_row(name, kind, verdict=None, error=""):
    """A row of scores.csv; without a verdict, the error that left the image without one."""
    row = {"image": name, "kind": kind, "score": "", "p_value": "", "verdict": "", "error": error}
    if verdict is not None:
        row |= {"score": f"{verdict.score:.6g}", "p_value": f"{verdict.p_value:.6g}"}
        row["verdict"] = verdict.verdict
    return row


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
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path}: a folder: give the model.pt of a category")
    if not path.exists():
        raise InputError(f"{path}: no such file: train.py writes OUT/DATA/CATEGORY/model.pt")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
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
    content = {"white": white_of(detector), "weights": detector.extractor.digest, **content}
    save_checkpoint(Path(path), detector.recipe, model=detector.state_dict(), **content)


def load_model(path, device="auto", weights=None):
    """The detector of save_model on a device (pick_device).

    Raises InputError if it does not fit the recipe it carries.
    """
    state, device = load_checkpoint(path), pick_device(device)
    try:
        detector = wtflow.Detector(state["recipe"], weights)
        detector.load_state_dict(state["model"])
        if not all(torch.isfinite(v).all() for v in state["model"].values()):
            raise ValueError("its weights are not finite")
        if state.get("weights", detector.extractor.digest) != detector.extractor.digest:
            raise InputError(
                f"trained on other weights of {detector.recipe.backbone}: pass those with --weights"
            )
        detector.white = None if state.get("white") is None else float(state["white"])
    except InputError as e:  # its extractor has no weights here, or others
        raise InputError(f"{path}: {e}") from None
    except (KeyError, TypeError, RuntimeError, AttributeError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise InputError(
            f"{path}: does not fit its own recipe ({reason}): mend that, or train it again"
        ) from None
    return detector.to(device)


DRAWN = 1200  # pixels of an image's longer side in a picture, at most
FILE_NAME = 150  # bytes of a name in the name of a picture: file systems take 255


def new_figure(*args, **options):
    """pyplot, a figure and its axes, without a window."""
    import matplotlib  # here, because it takes longer to import than to score an image

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt, *plt.subplots(*args, layout="constrained", **options)


def save_figure(plt, fig, path):
    """Drawn in memory first: a figure that cannot be drawn is no disk that cannot be written."""
    file = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a name in a script that the font lacks
            fig.savefig(file, format="png", dpi=100)
    finally:
        plt.close(fig)
    write_whole(path, lambda to: to.write_bytes(file.getbuffer()))


def best_f1(scores, defective):
    """Threshold with the best F1 on these scores (for display only: it looks at the labels)."""
    order = np.argsort(-scores, kind="stable")
    tp = np.cumsum(defective[order])
    f1 = 2 * tp / (np.arange(1, len(tp) + 1) + max(defective.sum(), 1))
    return float(scores[order][f1.argmax()])


def one_line(text):
    """Text in which what would break a line or cannot be printed is an escape, like \\n."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def plain(text, length=90):
    """A title of one line: line breaks become spaces, a long middle dots."""
    text = one_line(" ".join(text.split()))
    if len(text) <= length:
        return text
    return f"{text[: length // 2]} ... {text[-length // 2 :]}"


def draw_map(path, image, union, y, threshold, title):
    """Picture of one image: itself with the outline of its mask, and its anomaly map (h, w).

    The colours mean the same in all pictures of a model: from 0 over the threshold, which is the
    middle, to twice the threshold and more.
    """
    plt, fig, axes = new_figure(1, 2, figsize=(8.2, 4))
    aspect = "auto" if max(image.size) > 4 * min(image.size) else "equal"
    shrunk = min(1, DRAWN / max(image.size))
    size = tuple(max(1, round(shrunk * side)) for side in image.size)
    image = image.resize(size, Image.BILINEAR)
    for axis, name in zip(axes, ("image", "anomaly map"), strict=True):
        axis.imshow(np.asarray(image), aspect=aspect)
        axis.set(title=name, xticks=[], yticks=[])
    if union is not None and union.any():
        axes[0].set_title("image, outline of its mask")
        # BOX and > 0: a scratch that is thinner than a pixel of the picture stays
        union = np.asarray(Image.fromarray(union).convert("L").resize(size, Image.BOX)) > 0
        axes[0].contour(union, [0.5], colors="black", linewidths=3)
        axes[0].contour(union, [0.5], colors="yellow", linewidths=1.4)
    # viridis reads the same to a colour-blind person
    at_image = at_size(y, size[::-1])
    colours = {"cmap": "viridis", "vmin": 0, "vmax": 2 * threshold}
    shown = axes[1].imshow(at_image, aspect=aspect, **colours)
    bar = fig.colorbar(shown, ax=axes[1], fraction=0.046, extend="max")
    bar.set_ticks([0, threshold, 2 * threshold])
    bar.ax.axhline(threshold, color="white", linewidth=2)
    bar.set_ticklabels(["0", f"{threshold:.3g}\nthreshold", f"{2 * threshold:.3g}"])
    fig.suptitle(plain(title), fontsize=11, parse_math=False)
    save_figure(plt, fig, path)


def telling_images(verdicts, bad, each=3):
    """{index: prefix} of the images to show, the most telling first.

    Good images that were called defective, defects that were not, defects that were, and the good
    image that is nearest to the threshold.
    """
    scores = np.array([v.score for v in verdicts])
    flagged = np.array([v.verdict == "defect" for v in verdicts])
    rising = np.argsort(scores, kind="stable")
    chosen = {
        "false_alarm": [j for j in rising[::-1] if flagged[j] and not bad[j]][:each],
        "miss": [j for j in rising if bad[j] and not flagged[j]][:each],
        "hit": [j for j in rising[::-1] if bad[j] and flagged[j]][:each],
        "good": [j for j in rising[::-1] if not bad[j] and not flagged[j]][:1],
    }
    return {j: f"{kind}{k + 1}_" for kind, js in chosen.items() for k, j in enumerate(js)}


def distinct_names(paths, root):
    """A name for the picture of each path under root: its folders and stem, joined by "_".

    The suffix as well where two would be the same, a number where they still are, or differ in case
    alone, which not every file system sees. A very long name ends in a digest of itself.
    """
    names = []
    for path in paths:
        inside = path.relative_to(root) if path.is_relative_to(root) else Path(path.name)
        names.append("_".join(inside.with_suffix("").parts))
    known, taken, out = Counter(name.casefold() for name in names), set(), []
    for path, name in zip(paths, names, strict=True):
        if known[name.casefold()] > 1:
            name = f"{name}_{path.suffix[1:]}"
        encoded = os.fsencode(name)
        if len(encoded) > FILE_NAME:
            digest = hashlib.sha256(encoded).hexdigest()[:8]
            name = f"{encoded[:FILE_NAME].decode(errors='ignore')}_{digest}"
        while name.casefold() in taken:
            name += "_2"
        taken.add(name.casefold())
        out.append(name)
    return out


def names_of(items):
    """[kind/file] of test images; the folders between are kept where a kind has several."""
    names = {}
    for kind in {item.kind for item in items}:
        paths = [item.path for item in items if item.kind == kind]
        shared = os.path.commonpath([path.parent for path in paths])
        names |= {(kind, path): Path(kind) / path.relative_to(shared) for path in paths}
    return [names[item.kind, item.path] for item in items]


def draw_category(folder, category, judged, sizes, which="worst"):
    """maps/*.png and scores.png of a category. which: "all", "worst" (telling_images), "none"."""
    maps, verdicts, threshold, white = judged
    if which == "none" or not len(verdicts):
        return
    bad = np.array([item.kind != "good" for item in category.test])
    prefixes = telling_images(verdicts, bad)
    remove_pictures(folder)
    inside, failed = names_of(category.test), []
    names = distinct_names(inside, Path("."))
    for j in range(len(verdicts)) if which == "all" else prefixes:
        item = category.test[j]
        title = f"{category.name} / {inside[j].as_posix()}:  {said(verdicts[j])}"
        path = folder / "maps" / f"{prefixes.get(j, '')}{names[j]}.png"
        with drawing_may_fail(failed):
            union = masks_of(item, sizes[j])[1] if item.masks else None
            draw_map(path, read_image(item.path, white), union, maps[j], threshold, title)
    scores = np.array([v.score for v in verdicts])
    with drawing_may_fail(failed):
        draw_scores(folder / "scores.png", category.name, scores, bad, threshold)
    warn_of(failed)


def pictures_of(folder):
    """The pictures of a category's test images."""
    return [*(folder / "maps").glob("*.png")]


def maps_of(folder):
    """The float maps of a category, written by save_maps."""
    return [*(folder.parent / "anomaly_maps" / folder.name).rglob("*.tiff")]


def remove_pictures(folder):
    """Those of a category's earlier model."""
    for old in (folder / "scores.png", *pictures_of(folder)):
        old.unlink(missing_ok=True)


def draw_scores(path, title, scores, bad, threshold):
    """Histogram of the image scores, good and defective; the last bar is of all that are higher."""
    plt, fig, axis = new_figure(figsize=(6, 3.4))
    end = min(max(scores.max(), 1.1 * threshold), 3 * threshold)
    edges = np.linspace(min(scores.min(), threshold), end, 41)
    parts = ((~bad, "#0072B2", "good"), (bad, "#E69F00", "defective"))
    for part, colour, name in parts:
        label = f"{name} ({part.sum()})"
        shown = np.minimum(scores[part], end)
        axis.hist(shown, edges, color=colour, alpha=0.65, label=label)
    axis.axvline(threshold, color="black", linestyle="--", label="threshold")
    if bad.any() and not bad.all():
        label = "best F1 (knows the labels)"
        axis.axvline(min(best_f1(scores, bad), end), color="grey", linestyle=":", label=label)
    above = ", the last bar: and above" if scores.max() > end else ""
    axis.set(xlabel=f"image score{above}", ylabel="test images")
    axis.set_title(plain(title), parse_math=False)
    axis.legend()
    save_figure(plt, fig, path)


@contextlib.contextmanager
def drawing_may_fail(failed):
    """A picture that cannot be drawn is added to the list `failed`: what it shows is saved already.

    What concerns the whole run, like a full disk, goes on as an error.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as e:
        if no_memory(e):
            raise
        failed.append(one_line(first_line(e))[:150])


def warn_of(failed):
    """One line on stderr for the pictures that could not be drawn, if there are any."""
    if failed:
        others = f", nor could {len(failed) - 1} others" if len(failed) > 1 else ""
        print(f"warning: a picture could not be drawn ({failed[0]}){others}", file=sys.stderr)


def draw_contact_sheet(folder, names):
    """contact-sheet.png of a data set: two pictures of each category, from maps/."""
    rows = []
    for name in names:
        found = [
            sorted((folder / name / "maps").glob(f"{kind}1_*.png"))
            for kind in ("hit", "miss", "false_alarm", "good")
        ]
        rows.append([Image.open(paths[0]) for paths in found if paths][:2])
    rows = [row for row in rows if row]
    if not rows:
        (folder / "contact-sheet.png").unlink(missing_ok=True)
        return
    failed = []
    with drawing_may_fail(failed):
        w, h = rows[0][0].size
        sheet = Image.new("RGB", (2 * w, h * len(rows)), "white")
        for i, row in enumerate(rows):
            for j, picture in enumerate(row):
                sheet.paste(picture, (j * w, i * h))
        write_whole(folder / "contact-sheet.png", partial(sheet.save, format="PNG"))
    warn_of(failed)


def save_maps(folder, category, maps, sizes):
    """float32 TIFF maps in the layout that MVTec's evaluation script reads."""
    place, names = folder / "anomaly_maps" / category.name / "test", names_of(category.test)
    stems = Counter(name.with_suffix("") for name in names)
    for y, name, size in zip(maps, names, sizes, strict=True):
        if stems[name.with_suffix("")] == 1:  # else 000.png and 000.jpg would be one map
            name = name.with_suffix("")
        save_map(place / f"{name}.tiff", y, size)


def save_map(path, y, size):
    """An anomaly map (h, w) at the size (H, W) of its image, float32."""
    write_whole(path, partial(Image.fromarray(at_size(y, size)).save, format="TIFF"))


def as_image(value, white=None, enough=None):
    """RGB PIL image of a path, a PIL image, or a numpy uint8 array (H, W) or (H, W, 3) in RGB.

    white: see grey_level; enough: see open_image. Raises InputError that says how to convert
    anything else.
    """
    if isinstance(value, (str, os.PathLike)):
        return read_image(Path(value), white, enough)
    if isinstance(value, Image.Image):
        if has_levels(value):
            raise InputError(
                f"a PIL image of mode {value.mode}: its white is not known: "
                "give its path, or convert it to 8 bits"
            )
        with unreadable("a PIL image"):
            return ImageOps.exif_transpose(value).convert("RGB")  # as read_image does
    if not isinstance(value, np.ndarray):
        kind = type(value).__name__
        raise InputError(f"an image of type {kind}: give a path, a PIL image or a numpy array")
    if value.ndim == 3 and value.shape[2] == 1:
        value = value[..., 0]
    fault = fault_of_shape(value.shape) or fault_of_values(value)
    if fault:
        raise InputError(f"an image of shape {value.shape} and {value.dtype}: {fault}")
    return Image.fromarray(np.ascontiguousarray(value)).convert("RGB")


def fault_of_shape(shape):
    """What to do with an array that has not the shape of an image, "" if it has."""
    if len(shape) == 4:
        return "several images: give list(images)"
    if 0 in shape or len(shape) not in (2, 3):
        return "give (H, W) or (H, W, 3) in RGB"
    if len(shape) == 2 or shape[2] == 3:
        return ""
    if shape[2] == 4:
        return "give (H, W, 3): image[..., :3] without transparency"
    if shape[0] in (1, 3, 4):
        return "channels come first: give image.transpose(1, 2, 0)"
    return "give (H, W) or (H, W, 3) in RGB"


def fault_of_values(array):
    """How to make uint8 of an array of another type, "" if it is of uint8."""
    if array.dtype == np.uint8:
        return ""
    if array.dtype == bool:
        return "give 255 * image.astype(np.uint8)"
    if array.dtype.kind not in "iuf":
        return "give uint8 in 0..255"
    if not np.isfinite(array).all():
        return "holds NaN or infinity: replace them, and give uint8 in 0..255"
    low, high, rounded = array.min(), array.max(), ""
    if array.dtype.kind == "f":
        rounded = ".round()"
        if 0 <= low and high <= 1:
            return "give uint8: (255 * image).round().astype(np.uint8)"
    if 0 <= low and high <= 255:
        return f"give uint8: image{rounded}.astype(np.uint8)"
    return (
        f"values from {low:g} to {high:g}: give uint8 in 0..255, scaled as in training: "
        "(image * (255 / white)).round().astype(np.uint8), white the same for all"
    )


def score(detector, images, false_alarms=1.0):
    """Score images from Python: a Verdict of one image, or a list of them for a list.

    images: what as_image takes (paths, PIL images, uint8 arrays in RGB, of any size), or a list of
    it. false_alarms: percent of good images that may be called defective. Raises InputError.

        detector = evaluate.load_model("runs/parts/screw/model.pt")
        result = evaluate.score(detector, image)    # image[..., ::-1] if OpenCV has read it
        result.score, result.p_value, result.verdict, result.map
    """
    if not isinstance(detector, wtflow.Detector):
        kind = type(detector).__name__
        raise InputError(f"a detector of type {kind}: give evaluate.load_model('model.pt')")
    check_false_alarms(false_alarms)
    alone = not isinstance(images, (list, tuple))
    images = [images] if alone else images
    if not images:
        raise InputError("no images: give at least one")
    normal_scores = detector.normal_scores.cpu().numpy()
    threshold, out = threshold_of(normal_scores, false_alarms), []
    for start in range(0, len(images), BATCH):  # what memory holds of a long list is its maps
        x_0, sizes = x_0_of(detector, images[start : start + BATCH])
        maps, scores = detector.score(x_0)
        verdicts = judge(scores.double().numpy(), normal_scores, threshold)
        for verdict, y, size in zip(verdicts, maps, sizes, strict=True):
            out.append(verdict._replace(map=at_size(y, size)))
    return out[0] if alone else out


CONSTANTS = "wtflow.json"  # file of an exported program: its threshold and size
AGREES = 1e-3  # of the threshold: how far an exported program may be from its model


def export_model(args):
    """Write the model as a program of torch.export, if it gives what the model gives on noise.

    Read without this repository, which the program does not need:

        files = {"wtflow.json": ""}
        program = torch.export.load("screw.pt2", extra_files=files).module()
        y, score = program(image)                   # uint8 (1, 3, H, W)
        defect = score > json.loads(files["wtflow.json"])["threshold"]
    """
    path = Path(args.export)
    if path.suffix != ".pt2":
        raise InputError(f"--export {path}: give a file that ends in .pt2")
    detector = load_model(args.model, "cpu", args.weights)
    height, width = wtflow.image_shape(detector.recipe)
    threshold = threshold_of(detector.normal_scores.numpy(), args.false_alarms)
    constants = {"height": height, "width": width, "white": white_of(detector)}
    constants |= {"threshold": threshold, "false_alarms": args.false_alarms}
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8, generator=generator)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own way of saving: not for the caller
        program = torch.export.export(detector, (image,))
        torch.export.save(program, file, extra_files={CONSTANTS: json.dumps(constants)})
        file.seek(0)
        again = torch.export.load(file).module()
    pairs = zip(again(image), detector(image), strict=True)
    difference = max(float((there - here).abs().max()) for there, here in pairs)
    if not difference <= AGREES * threshold:  # nor where it is NaN
        raise InputError(f"--export {path}: the program differs from the model by {difference:g}")
    write_whole(path, lambda to: to.write_bytes(file.getbuffer()))
    print(
        f"{one_line(path)}: (1, 3, {height}, {width}) uint8 RGB -> maps (1, {height}, {width}), "
        f"scores (1,); threshold {threshold:.4f} at {args.false_alarms:g} % false alarms\n"
        f"largest difference from the model on noise: {difference:.1e}\n"
        f"torch.export.load reads it without this repository, the threshold as {CONSTANTS}. "
        "Resizing an image to that size (antialiased, bilinear) is left to the caller; ONNX is not "
        "written."
    )


# ---- 4. Commands: what a user types. Each calls the rooms above ----------------------------------
class OneLineParser(argparse.ArgumentParser):
    def __init__(self, **options):
        # No option cut short: --image would be --image-size in train.py.
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
        print("interrupted: train.py goes on with --resume", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout, like head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as e:  # what reading and writing do not name themselves, like a closed folder
        if e.filename is None:
            raise
        message = f"{e.filename}: {e.strerror}: check the path and its permissions"
    except (MemoryError, RuntimeError) as e:
        if not no_memory(e):
            raise
        message = (
            "out of memory: give train.py a smaller --image-size, or --resume on a machine of the "
            "same kind with more"
        )
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def pick_device(name):
    """The torch device of --device auto, cpu or cuda; torchrun's processes take GPUs in turn.

    name may also be a torch.device. On a GPU the networks have 16 bits; all else, whitening and
    blur too, has float32: TF32 is switched off. Raises InputError.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise InputError(f"--device {name}: give auto, cpu or cuda") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"--device {name}: no GPU that torch can use: give --device cpu")
        torch.backends.cudnn.allow_tf32 = False
        if device.index is None:
            mine = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
            return torch.device(f"cuda:{mine}")
    return device


class Judged(NamedTuple):
    """The test images of a category, as a detector sees them."""

    maps: torch.Tensor  # (n, h, w)
    verdicts: list
    threshold: float
    white: float | None  # grey_level


def judge_category(detector, category, x_0, args):
    """Score a category's test x_0 (n, d, h, w), or None; says how many are above the threshold."""
    normal_scores = detector.normal_scores.cpu().double().numpy()
    threshold = threshold_of(normal_scores, args.false_alarms)
    maps, scores = torch.zeros(0, 1, 1), np.zeros(0)
    if x_0 is not None:
        maps, scores = detector.score(x_0, getattr(args, "euler_steps", 1))
        scores = scores.double().numpy()
    verdicts = judge(scores, normal_scores, threshold)
    counts = {"good": [], "defective": []}
    for item, verdict in zip(category.test, verdicts, strict=True):
        kind = "good" if item.kind == "good" else "defective"
        counts[kind].append(verdict.verdict == "defect")
    counts = [f"{sum(v)} of {len(v)} {kind}" for kind, v in counts.items() if v]
    of_test = f", exceeded by {' and '.join(counts)} test images" if counts else ""
    allowed = f"{args.false_alarms:g} % false alarms"
    allowed += few_images(normal_scores, args.false_alarms)
    print(f"{category.name}: threshold {threshold:.4f} at {allowed}{of_test}", flush=True)
    return Judged(maps, verdicts, threshold, white_of(detector))


def measure_category(category, judged, sizes):
    """The row of figures of a category; says why one is missing."""
    scores = np.array([v.score for v in judged.verdicts])
    row = measure(category, judged.maps, scores, sizes)
    row |= alarm_rates([item.kind for item in category.test], judged.verdicts)
    if row["why"] and category.test:
        print(f"{category.name}: {row['why']}", file=sys.stderr)
    return row


def write_scores(folder, category, judged):
    """scores.csv of a category's test images."""
    rows = [
        score_row(name.as_posix(), item.kind, verdict)
        for name, item, verdict in zip(
            names_of(category.test), category.test, judged.verdicts, strict=True
        )
    ]
    if rows:
        write_csv(folder / "scores.csv", SCORES, rows)


def write_pictures(folder, category, judged, sizes, args):
    """Pictures of a category's test images, and float maps if they are asked for."""
    if args.save_maps:
        save_maps(folder.parent, category, judged.maps, sizes)
    draw_category(folder, category, judged, sizes, args.maps)


def check_run(folder, categories):
    """Raises InputError if a category has no model in the folder of a run."""
    for category in categories:
        model = folder / category.name / "model.pt"
        if not model.exists():
            other = next(iter(sorted(folder.rglob("model.pt"))), None)
            hint = f", but {other}: give --category, or its --run" if other else ""
            raise InputError(f"{model}: no such file{hint or ': give --run what train.py wrote'}")


def judged_by_model(folder, category, args, device):
    """The test images of a category, Judged by the model in a folder, and their sizes."""
    detector = load_model(folder / "model.pt", device, args.weights)
    x_0, sizes = None, []
    if category.test:
        x_0, sizes = x_0_of(detector, [item.path for item in category.test])
    return judge_category(detector, category, x_0, args), sizes


def draw_missing(folder, category, args, device):
    """Of the pictures and maps that are asked for, those that a finished category does not have."""
    n, there = len(category.test), (folder / "scores.png").exists()  # drawn last
    if args.maps == "all":
        there = there and len(pictures_of(folder)) == n
    pictures = n and args.maps != "none" and not there
    maps = n and args.save_maps and not maps_of(folder)
    if pictures or maps:
        judged, sizes = judged_by_model(folder, category, args, device)
        if maps:
            save_maps(folder.parent, category, judged.maps, sizes)
        if pictures:
            draw_category(folder, category, judged, sizes, args.maps)


def evaluate_run(args, device):
    """The table again from the models under --run: the data set's folder or the --out above it."""
    name, categories = read_dataset(args.data, args.category)
    folder = Path(args.run)
    if (folder / name).is_dir():
        folder = folder / name
    check_run(folder, categories)
    rows = []
    for category in categories:
        began, place = time.monotonic(), folder / category.name
        judged, sizes = judged_by_model(place, category, args, device)
        row = measure_category(category, judged, sizes)
        row["seconds"] = round(time.monotonic() - began, 1)
        rows.append(row)
        write_scores(place, category, judged)
        write_pictures(place, category, judged, sizes, args)
    write_tables(folder, rows)
    if args.maps != "none":
        draw_contact_sheet(folder, [category.name for category in categories])


def images_outside(folder, out):
    """images_under, but for those below --out: what lies there are pictures of an earlier run."""
    paths = images_under(folder)
    if not paths:
        raise InputError(f"{folder}: no images in this folder ({', '.join(SUFFIXES)})")
    inside = out is not None and folder.resolve() in out.resolve().parents
    written = all_files(out) if inside else []
    say_skipped(folder.resolve().name, all_files(folder), {*paths, *written})
    if out is None or out.suffix.lower() == ".csv":
        return paths
    if out.resolve() == folder.resolve():
        raise InputError(f"--out {out}: is the folder of the images: give another")
    if not inside:
        return paths
    kept = [path for path in paths if out.resolve() not in path.resolve().parents]
    if not kept:
        raise InputError(f"--out {out}: all images of {folder} lie in it: give another")
    if len(kept) < len(paths):
        print(f"{len(paths) - len(kept)} images in --out {out} are left out", file=sys.stderr)
    return kept


def check_table(path):
    """Raises InputError if a file is there that is not a table of scores, which may be replaced."""
    if path.is_file():
        with open(path, "rb") as f:
            if f.readline().strip() == ",".join(SCORES).encode():
                return
    if path.exists():
        raise InputError(f"{path}: is there, and not a table of scores: give another --out")


def picture_place(image, out):
    """Where the picture of one image goes: --out FILE.png or folder, else the current folder."""
    name = f"{distinct_names([Path(image.name)], Path('.'))[0]}_map.png"
    if out is None:
        return Path(name)
    if out.is_dir() or not out.suffix:
        return out / name
    if out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: a picture is a PNG: give FILE.png or a folder")
    if out.exists() and out.samefile(image):
        raise InputError(f"--out {out}: is the image itself: give another")
    return out


def scored_files(detector, paths, euler_steps):
    """(map, score) of each image file in its order, or the InputError that says why not.

    BATCH images are in memory at a time; if one is damaged, each of them is read alone.
    """

    def score_of(part):
        maps, scores = detector.score(x_0_of(detector, part)[0], euler_steps)
        return list(zip(maps, scores.double().tolist(), strict=True))

    for start in range(0, len(paths), BATCH):
        part = paths[start : start + BATCH]
        try:
            found = score_of(part)
        except InputError:
            found = []
        if found:
            yield from found
            continue
        for path in part:
            try:
                alone = score_of([path])[0]
            except InputError as e:
                alone = e
            yield alone


def score_images(args, device):
    """Print score, threshold, p-value and verdict of one image, or of each under a folder.

    One image has a picture. The scores of a folder are written to scores.csv too, under --out or in
    the current folder; with --out FOLDER its images have pictures. --out FILE.csv: the table alone.
    A damaged image costs one line and, at the end, exit code 2.
    """
    image, out = Path(args.image), Path(args.out) if args.out else None
    if not image.exists():
        raise InputError(f"{image}: no such file or folder: give --image an image or a folder")
    detector = load_model(args.model, device, args.weights)
    table_alone = out is not None and out.suffix.lower() == ".csv"
    table, paths, places = out if table_alone else None, [image], [None]
    if image.is_dir():
        table, paths = table or (out or Path(".")) / "scores.csv", images_outside(image, out)
        places = [None] * len(paths)
        if out is not None and not table_alone:
            places = [out / f"{name}_map.png" for name in distinct_names(paths, image)]
    elif not table_alone:
        places = [picture_place(image, out)]
    if args.maps == "none":
        places = [None] * len(paths)
    if args.save_maps and places[0] is None:
        raise InputError("--save-maps: goes with pictures: give --out FOLDER, and not --maps none")
    if table is not None:
        check_table(table)
    normal_scores = detector.normal_scores.cpu().numpy()
    threshold = threshold_of(normal_scores, args.false_alarms)
    few = few_images(normal_scores, args.false_alarms)
    print(f"threshold {threshold:.4f} at {args.false_alarms:g} % false alarms{few}")
    root = image if image.is_dir() else image.parent
    failed = 0
    with contextlib.nullcontext() if table is None else growing_csv(table, SCORES) as write:
        for row in judged_files(args, detector, threshold, root, paths, places):
            failed += bool(row["error"])
            if write is not None:
                write(row)
    if table is not None:  # on stderr: stdout has one line an image
        without = f", {failed} of {len(paths)} images have none" if failed else ""
        print(f"scores: {one_line(table)}{without}", file=sys.stderr)
    if failed:
        sys.exit(2)


def judged_files(args, detector, threshold, root, paths, places):
    """Score, print and draw image files: a row of scores.csv for each.

    places: of its picture, or None, for each.
    """
    normal_scores, not_drawn = detector.normal_scores.cpu().numpy(), []
    scored = scored_files(detector, paths, args.euler_steps)
    for path, place, found in zip(paths, places, scored, strict=True):
        name = path.relative_to(root)
        kind = "" if name.parent == Path(".") else name.parent.as_posix()
        if isinstance(found, InputError):
            print(f"error: {one_line(found)}", file=sys.stderr)
            yield score_row(name.as_posix(), kind, error=str(found))
            continue
        y, score_of_file = found
        (verdict,) = judge([score_of_file], normal_scores, threshold)
        line = (
            f"{one_line(name.as_posix())}  score {verdict.score:.4f}  threshold {threshold:.4f}  "
            f"p {verdict.p_value:.4f}  {verdict.verdict}"
        )
        if place is not None:
            line += f"  {one_line(place)}"
            with drawing_may_fail(not_drawn):
                picture = read_image(path, white_of(detector))
                title = f"{name.as_posix()}:  {said(verdict)}"
                draw_map(place, picture, None, y, threshold, title)
                if args.save_maps:
                    save_map(place.with_suffix(".tiff"), y, picture.size[::-1])
        print(line)
        yield score_row(name.as_posix(), kind, verdict)
    warn_of(not_drawn)


def add_common_options(parser):
    """What train.py and evaluate.py share."""
    add = parser.add_argument
    add(
        "--data",
        metavar="DIR",
        help="data set root or one category's folder (default: train.py makes a demo)",
    )
    add(
        "--category",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="only these (default: all)",
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
        help="auto: a GPU if there is one (default: auto)",
    )
    add(
        "--false-alarms",
        type=float,
        default=1.0,
        metavar="PERCENT",
        help="of good images that the threshold may call defective (default: 1)",
    )
    add(
        "--maps",
        choices=("all", "worst", "none"),
        default="worst",
        help="pictures of test images: all, or those that tell most (default: worst)",
    )
    add(
        "--save-maps",
        action="store_true",
        help="float32 TIFF maps as MVTec's script reads them (default: none)",
    )


def check_false_alarms(percent):
    """Raises InputError for a share of false alarms that is none."""
    number = isinstance(percent, (int, float)) and not isinstance(percent, bool)
    if not number or not 0 <= percent < 100:
        raise InputError(f"--false-alarms {percent}: give a percentage, 0 or more, below 100")


def check_options(args):
    """Raises InputError for what argparse lets pass."""
    check_false_alarms(args.false_alarms)
    for name in ("data", "out"):
        if getattr(args, name, None) == "":
            raise InputError(f"--{name} is empty: give a path")


def main(argv=None):
    parser = OneLineParser(description=__doc__.split("\n")[0])
    add_common_options(parser)
    add = parser.add_argument
    add(
        "--run",
        metavar="DIR",
        help="folder that train.py wrote: its table again, with --data (default: none)",
    )
    add("--model", metavar="FILE", help="a model.pt, for --image or --export (default: none)")
    add(
        "--image",
        metavar="PATH",
        help="an image, or a folder of images at any depth (default: none)",
    )
    add(
        "--out",
        metavar="PATH",
        help="picture of --image FILE, or its folder (default: NAME_map.png); folder of pictures "
        "and scores.csv, or a FILE.csv, of --image FOLDER (default: scores.csv, no pictures)",
    )
    add(
        "--export",
        metavar="FILE.pt2",
        help="write the model as a program of torch.export (default: none)",
    )
    add(
        "--euler-steps",
        type=int,
        default=1,
        metavar="K",
        help="steps from t = 0 to 1 (default: 1)",
    )
    args = parser.parse_args(argv)
    check_options(args)
    device = pick_device(args.device)
    if args.euler_steps < 1:
        raise InputError(f"--euler-steps {args.euler_steps}: give at least 1")
    given = {name for name in ("run", "data", "model", "image", "export") if getattr(args, name)}
    if args.out and "image" not in given:
        raise InputError("--out: goes with --image: models and tables stay in --run")
    if args.category and "data" not in given:
        raise InputError("--category: goes with --run and --data")
    if "export" in given and (args.euler_steps > 1 or args.save_maps):
        raise InputError("--export: goes without --euler-steps and --save-maps")
    if args.euler_steps > 1:
        print("threshold and p-values are those of one Euler step", file=sys.stderr)
    if given == {"model", "export"}:
        export_model(args)
    elif given == {"model", "image"}:
        score_images(args, device)
    elif given == {"run", "data"}:
        evaluate_run(args, device)
    else:
        raise InputError(
            "give --run and --data, --model and --image, or --model and --export, no other two "
            "(see --help)"
        )


if __name__ == "__main__":
    exit_cleanly(main)
