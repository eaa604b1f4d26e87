"""Data sets, metrics, files and pictures for WT-Flow, and the commands that read saved models.

    python evaluate.py --run DIR --data DIR          the table again, from saved models
    python evaluate.py --model FILE --image PATH     one image (or a folder): score and picture

1. Data sets   read_dataset   a folder -> [Category] of the layouts of the field; leave_out
   Images      as_image       a file, PIL image or array -> RGB; more than 8 bits; masks_of: masks
2. Scoring     score          from Python: a Prediction of each image; predictions_of, one by one
   Threshold   calibrate      good scores -> their tail and a threshold; classify: the verdicts
   Metrics     measure        maps, scores and masks of a category -> rows of its table, in percent
3. Files       write_whole    whole or not there; locks, tables, models, CUDA graphs
4. Pictures    draw           of images and maps, suspects, scores; names of what is written
5. Export      export_model   a model as an ONNX program
6. Commands    main           --run: evaluate_run, report; --image: score_files
"""

import argparse
import ast
import contextlib
import csv
import ctypes
import hashlib
import io
import json
import logging
import math
import os
import re
import signal
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakMethod

if __name__ == "__main__":
    # As torch loads: a thread that waits for another spins briefly, then leaves its core to others;
    # no spin makes training half as long again, a longer one costs a shared machine far more
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while it loads Ctrl-C ends it without a word

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

import wtflow
from wtflow import InputError

Array = np.ndarray

# ---- 1. Data sets: folders -> categories, files -> arrays. Reads, writes nothing -----------------
SUFFIXES = tuple(".png .jpg .jpeg .jfif .bmp .tif .tiff .webp .gif .ppm .pgm".split())
# Names of folders and ends of names, in any case
GOOD = ("good", "ok", "normal")
TRUTH = ("ground_truth", "masks", "mask", "gt")  # folders of masks
LABELS = {*TRUTH, *"labels annotations segmentationclass segmentationobject".split()}  # of tools
MASK_END = re.compile(r"_(mask|gt)(_?\d+)?$")  # of a mask, after the stem of its image
# Words in the name of a folder of test that may mean good images: such a folder is refused
MAYBE_GOOD = {*GOOD, *"normals okay io pass passed fine free healthy intact image images".split()}


class Item(NamedTuple):
    """One test image."""

    path: Path
    kind: str  # "good" or the name of the defect
    masks: tuple | None  # files, each a set of defective pixels; None: the set has no masks


class Category(NamedTuple):
    """One product: good images to train on, test images with what is known of them."""

    name: str
    train: list[Path]
    test: list[Item]
    saturation: dict | None  # LOCO: {pixel value: (threshold, whether it is a share of the area)}
    left_out: tuple = ()  # training images that --leave-out names


def read_dataset(data: str | Path, wanted: tuple | list = ()) -> tuple[str, list[Category]]:
    """(name, [Category]) of a data set's root, one category's folder, or a folder of good images.

    wanted: names of categories, else all. Raises InputError.
    """
    data = Path(data)
    if not data.is_dir():
        raise InputError(f"{data}: no such folder: give --data a data set or one category of it")
    data = data.resolve()
    name, roots = data.parent.name, {data}
    if not is_category(data):
        name, roots = data.name, set(filter(is_category, folders_in(data)))
    readers = {root.name: partial(read_category, root) for root in sorted(roots)}
    images = [path for path in images_under(data) if roots.isdisjoint(path.parents)]
    if roots:
        say_unread(name, images)
    elif images and (data.name.casefold() in GOOD or all(p.parent == data for p in images)):
        above = (data, *data.parents)
        product = next(p for p in above if p.name.casefold() not in (*GOOD, "train"))
        labels = [child(p, n) for p in data.parents[:2] for n in ("labels", "annotations")]
        category, name = Category(product.name, images, [], None), product.parent.name
        readers = {product.name: partial(checked, category, data.parent, [data, *labels])}
    else:
        text = "put good images into train/good (VisA: Data/Images/Normal), or give --data a folder"
        raise InputError(f"{data}: no category here: {text} of good images and nothing else")
    for asked in wanted:
        if asked not in readers:
            raise InputError(f"{data}: no category '{asked}': choose from {', '.join(readers)}")
    return name or "data", [read() for key, read in readers.items() if key in (wanted or readers)]


def leave_out(categories: list[Category], file: str | None) -> list[Category]:
    """Categories without the training images that a train-scores.csv marks.

    It is of the category in whose folder it lies; elsewhere names have as much of their path as is
    needed. Raises InputError, too, if a category has no training images.
    """
    rows, dropped = rows_of(Path(file)) if file else [], set()
    names = [row.get("image") or "" for row in rows if row.get("leave_out")]
    if others := {row["leave_out"] for row in rows if row.get("leave_out")} - {"x"}:
        raise InputError(f"--leave-out {file}: leave_out is {min(others)!r}: write x, or nothing")
    own = Path(file or "").resolve().parent.name
    own = [category for category in categories if category.name == own] or categories
    for name in names:
        end = Path(name).parts
        found = [p for category in own for p in category.train if p.parts[-len(end) :] == end]
        if len(found) != 1:
            text = f"of the training images {name} is that of {len(found)}: write more of its path"
            raise InputError(f"--leave-out {file}: {text}")
        dropped.update(found)
    if file and not names:
        raise InputError(f"--leave-out {file}: no row with an image and a mark in leave_out")
    if file:
        say_once(f"--leave-out: {len(dropped)} training images are left out")
    kept = []
    for category in categories:
        left_out = tuple(path for path in category.train if path in dropped)
        train = [path for path in category.train if path not in dropped]
        kept.append(category._replace(train=train, left_out=left_out))
        if not train:
            text = f"no training images ({', '.join(SUFFIXES)}) in train/good: add some"
            raise InputError(f"{category.name}: {text}")
    return kept


def is_category(root: Path) -> bool:
    parts = child(root, "train"), child(root, "test_public", "test"), root / "Data/Images/Normal"
    return any(part.is_dir() for part in parts)


def read_category(root: Path) -> Category:
    """MVTec AD, MPDD, BTAD: {train,test}/<kind>/, ground_truth/<kind>/<id>_mask.png; or VisA.

    Three others differ in names. MVTec AD 2: test_public, which holds ground_truth. MVTec LOCO AD:
    ground_truth/<kind>/<id>/*.png, and saturation thresholds. MVTec 3D-AD, of which RGB images are
    read: test/<kind>/rgb, test/<kind>/gt.
    """
    if (root / "Data/Images/Normal").is_dir():
        return read_visa(root)
    train, test = child(root, "train"), child(root, "test_public", "test")
    good = [folder for folder in folders_in(train) if folder.name.casefold() in GOOD]
    if not good and train.is_dir():
        text = "put good images into train/good, defects into test/<defect>, their masks into"
        raise InputError(f"{train}: no folder good, ok or normal: {text} ground_truth/<defect>")
    truth = next((t for p in (root, test) if (t := child(p, *TRUTH)).is_dir()), None)
    inner = "rgb" if any((p / "rgb").is_dir() for p in good or folders_in(test)) else ""
    config, items = root / "defects_config.json", []
    loco = config.is_file() or (test / "logical_anomalies").is_dir()
    for folder in folders_in(test):
        images = images_under(folder / inner)
        own = folder / "gt" if inner else truth and child(truth, folder.name)
        if folder.name.casefold() in GOOD:
            items += [Item(path, "good", ()) for path in images]
        elif folder != truth:
            masks = masks_of_images(images, folder / inner, own, loco) if own else {}
            items += [Item(path, folder.name, masks.get(path)) for path in images]
    images = [path for folder in good for path in images_under(folder / inner)]
    saturation = saturation_of(config) if loco else None
    return checked(Category(root.name, images, items, saturation), root, folders_in(root))


def masks_of_images(images: list[Path], folder: Path, own: Path, loco: bool) -> dict[Path, tuple]:
    """{image: its masks in `own`}, of the same name, with an end like _mask or _GT or without.

    Those of LOCO lie in a folder of this name. Of a missing one it is the path it should have.
    """
    found, masks = {}, {}
    for mask in images_under(own):
        place = (mask.parent if loco else mask.with_suffix("")).relative_to(own)
        found.setdefault(MASK_END.sub("", str(place).casefold()), []).append(mask)
    for path in images:
        place = str(path.relative_to(folder).with_suffix(""))
        missing = own / (place + ("/000.png" if loco else "_mask.png"))
        masks[path] = tuple(found.get(place.casefold(), [missing]))
        if len(masks[path]) > 1 and not loco:
            text = f"{masks[path][0].name} is a mask of the same image: remove one, or join them"
            raise InputError(f"{masks[path][1]}: {text}")
    return masks


def saturation_of(config: Path) -> dict:
    """LOCO's {pixel value of a mask: (threshold, whether it is a share of the area)}."""
    keys = ("pixel_value", "saturation_threshold", "relative_saturation")
    with unreadable(config, "LOCO's thresholds", "restore it from the download"):
        rows = [[defect[key] for key in keys] for defect in json.loads(config.read_bytes())]
        return {int(value): (float(most), bool(relative)) for value, most, relative in rows}


def read_visa(root: Path) -> Category:
    """VisA: Data/Images/{Normal,Anomaly}, split by split_csv/1cls.csv beside the categories."""
    split, train, test = root.parent / "split_csv/1cls.csv", [], []
    with unreadable(split, "VisA's split", "restore it from the download"):
        for row in [row for row in rows_of(split) if row["object"] == root.name]:
            image, mask = (root.parent / row[key].replace("\\", "/") for key in ("image", "mask"))
            good = row["label"].casefold() in GOOD
            if row["split"] != "train":
                test.append(Item(image, "good", ()) if good else Item(image, "anomaly", (mask,)))
            elif good:
                train.append(image)
    return checked(Category(root.name, train, test, None), root, folders_in(root))


def checked(category: Category, root: Path, looked_in: list[Path]) -> Category:
    """The category of a folder, if nothing in it may be misread, else InputError: the one gate.

    Says which files of the folders looked_in are not read.
    """
    name, bad = category.name, [item for item in category.test if item.kind != "good"]
    images = [*category.train, *(item.path for item in category.test)]
    masks = [mask for item in bad for mask in item.masks or ()]
    good, used = {p.parent for p in images} - {i.path.parent for i in bad}, {*images, *masks}
    unread = [path for top in looked_in for path in all_files(top) if path not in used]
    depth, place, seen = len(root.parts), cache(os.path.realpath), {}
    text = f"lies outside of {root}: mend the split file"
    faults = [(p, text) for p in used if root not in p.parents or ".." in p.parts]
    if name == "mean" or name[:1] in ("-", "+", "=", "@"):
        faults.append((root, f"a category cannot be called {name}: rename its folder"))
    for path in images:
        stem, above = path.stem.casefold(), {*map(str.casefold, path.parts[depth:-1])}
        if MASK_END.search(stem) or LABELS & above:
            text = "a mask by its name or folder? Rename it, or put masks into ground_truth/<kind>"
            faults.append((path, text))
        if (other := seen.setdefault((place(path.parent), stem), path)) is not path:
            text = f"{other} has the same name, or is the same file by a link: rename or remove one"
            faults.append((path, f"{text}; a mask is called {stem}_mask.png"))
    for item in bad:
        if MAYBE_GOOD.intersection(re.findall(r"[^\W\d_]+", item.kind.casefold())):
            text = "good, or a defect? Put good ones into test/good, or name the folder as it is"
            faults.append((item.path, text))
    text = "this mask is missing: restore it, or remove ground_truth to go without pixel metrics"
    faults += [(mask, text) for mask in masks if not mask.is_file()]
    for path in unread:
        labels = LABELS & {*map(str.casefold, path.parts[depth - 1 : -1])} or good & {*path.parents}
        if labels and path.suffix.lower() in (".json", ".txt", ".xml"):
            text = "an annotation, so not all images may be good? Put good ones into train/good, "
            faults.append((path, f"{text}defects into test/<defect>, and remove it"))
    if faults:
        raise InputError("{}: {}".format(*faults[0]))
    say_unread(name, unread)
    return category


def folders_in(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and path.name[0] != ".")


def child(folder: Path, *names: str) -> Path:
    """The folder of the first of these names, in any case, in a folder; else where it would be."""
    inner = {path.name.casefold(): path for path in folders_in(folder)}
    return next((inner[n] for n in map(str.casefold, names) if n in inner), folder / names[-1])


def all_files(folder: Path) -> list[Path]:
    """Files at any depth but hidden ones, dangling links too; a folder with two links once."""
    seen, found, todo = set(), [], [folder] if folder.is_dir() else []
    while todo:
        here = todo.pop()
        if (real := os.path.realpath(here)) not in seen:
            seen.add(real)
            found += sorted(p for p in here.iterdir() if p.name[0] != "." and not p.is_dir())
            todo += reversed(folders_in(here))
    return found


def images_under(folder: Path) -> list[Path]:
    return [path for path in all_files(folder) if path.suffix.lower() in SUFFIXES]


def rows_of(path: Path) -> list[dict]:
    """Rows of a table, by the names in its first line. Raises InputError if it is none."""
    with unreadable(path, "a table in UTF-8", "mend or restore it"):
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))


def say_unread(name: str, files: list[Path]) -> None:
    """Say that files are not read: none is dropped silently."""
    if files:
        names = listed([f"{path.parent.name}/{path.name}" for path in files])
        suffixes = ", ".join(sorted({path.suffix or "no suffix" for path in files}))
        say_once(f"{name}: {len(files)} files are not read: {names} ({suffixes})")


SAID = set()  # what say_once has spoken of


def say_once(text: str, about: Any = None) -> None:
    """A note on stderr about how something is read; of several about the same the first alone."""
    if (about or text) not in SAID:
        SAID.add(about or text)
        say(f"note: {text}", sys.stderr)


def say(text: Any, file: Any = None) -> None:
    print(one_line(text), file=file, flush=True)


def one_line(text: Any) -> str:
    """Text in which what would break a line or cannot be printed is an escape, like \\n."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def listed(items: list) -> str:
    """Names, or those of paths, in a line, at most four."""
    names = [getattr(item, "name", item) for item in items[:4]]
    return ", ".join(names + ["..."] * (len(items) > 4))


# Images
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM")  # of SUFFIXES
MAX_PIXELS = 1 << 27  # of an image: a strip of 2048 x 65536
BATCH = 16  # images that are read and turned into features together
FEW_LEVELS = 16  # of 256: an image that has no more is named
WHITE_LEVELS = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16, 20, 24, 31))
PROCESS, LOADING = os.getpid(), Lock()


class Reading(NamedTuple):
    """How the image files of a category become what the network sees; kept with its model."""

    white_level: float = 255.0  # the pixel value that is 255 for the network (white_level_of)
    ignore: Array | None = None  # pixels (H, W) that are painted over
    make: dict = {}  # of the training images: "aspect", the lowest and the highest height / width


def batches_of(images: list, shape: tuple, reading: Reading) -> Iterator[list]:
    """[read_resized of an image, or its InputError] of each BATCH; the next one is read ahead."""
    if os.getpid() != PROCESS:  # a forked child has none of the threads that torch counts on
        torch.set_num_threads(1)

    def read(image):
        try:
            return read_resized(image, shape, reading)
        except InputError as e:
            return e

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead = pool.map(read, images[:BATCH])
        for start in range(BATCH, len(images) + BATCH, BATCH):
            found, ahead = list(ahead), pool.map(read, images[start : start + BATCH])
            yield found


def stacked(read: list) -> tuple[Tensor, list]:
    """Pixels uint8 (B, 3, *shape) and original sizes [(H, W)] of a batch; raises its InputError."""
    for found in read:
        if isinstance(found, InputError):
            raise found
    pixels, sizes = zip(*read, strict=True)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), list(sizes)


def read_resized(value: Any, shape: tuple, reading: Reading) -> tuple:
    """Pixels uint8 (*shape, 3) of what as_image takes, antialiased, and its size (H, W)."""
    name, ignore, white = name_of(value), reading.ignore, reading.white_level
    with unreadable(name):
        image = as_image(value, white)
        if ignore is not None:
            if image.size != ignore.shape[::-1]:
                size = "{} x {}, the mask of --ignore {} x {}".format(*image.size, *ignore.T.shape)
                raise InputError(f"{name}: is {size}: give images of its size")
            image.paste((127, 127, 127), mask=Image.fromarray(ignore))
        pixels = np.asarray(image.resize(shape[::-1], Image.BILINEAR))
    if (high := pixels.max()) - (low := pixels.min()) <= FEW_LEVELS:
        text = f"{name}: has grey values {low} to {high} of 0 to 255, the white level {white:g}: "
        say_once(f"{text}blank, or a training image too bright?", (Path(name).parent, "levels"))
    return pixels, image.size[::-1]


def name_of(image: Any) -> str:
    return str(image) if isinstance(image, (str, os.PathLike)) else "an image"


def as_image(value: Any, white_level: float = 255.0) -> Image.Image:
    """RGB PIL image of a path, a PIL image, or a numpy array uint8 (H, W) or (H, W, 3) in RGB.

    Palette and CMYK are converted, alpha is dropped; more than 8 bits of a file are those of
    in_8_bits. Raises InputError with the remedy.
    """
    if isinstance(value, (str, os.PathLike)):
        with unreadable(value):
            return in_8_bits(value, open_image(value), white_level).convert("RGB")
    if isinstance(value, Image.Image) and value.mode[0] not in "IF":
        with unreadable("a PIL image"), LOADING:  # it may be in the list twice
            return ImageOps.exif_transpose(value).convert("RGB")
    if not isinstance(value, np.ndarray):
        kind = f"{type(value).__name__} {getattr(value, 'mode', '')}"
        raise InputError(f"an image of type {kind}: give a path, a numpy array, or PIL's of 8 bits")
    right = value.ndim == 2 or value.shape[2:] == (3,)
    if not right or 0 in value.shape or value.dtype != np.uint8:
        how = "uint8 (H, W) or (H, W, 3) in RGB; if channels come first transpose(1, 2, 0), several"
        how += " as list(images), others (image * (255 / white_level)).round().astype(np.uint8)"
        raise InputError(f"an image of shape {value.shape} and {value.dtype}: give {how}")
    return Image.fromarray(np.ascontiguousarray(value)).convert("RGB")


def open_image(path: str | Path) -> Image.Image:
    """PIL image of a file, a picture or a mask, decoded and turned as its EXIF says."""
    with unreadable(path):
        image, size = head_of(path)
        corner = image.width - 1, image.height - 1
        if image.format == "JPEG" and image.getpixel(corner) in (128, (128, 128, 128)):
            # Where its data end early libjpeg makes the rest grey, without a word: then more data
            # before its end change the picture; after all pixels nothing is read
            data = Path(path).read_bytes()
            end = data.rfind(b"\xff\xd9")
            longer = Image.open(io.BytesIO(data[:end] + bytes(range(255)) * 99 + data[end:]))
            if longer.tobytes() != image.tobytes():
                raise ValueError("it ends early, and the rest is grey")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # a copy would cost as much as resizing
        if image.size != size[::-1]:
            raise ValueError("EXIF that turns it comes after its pixels: save it anew")
        return image


@contextlib.contextmanager
def unreadable(path: Any, what: str = "an image", remedy: str = "replace or remove it") -> Iterator:
    """The one place that catches what decoders and parsers raise: InputError naming the file."""
    try:
        if Path(path).is_fifo():
            raise ValueError("a pipe")
        yield
    except InputError:
        raise
    except Exception as e:  # damaged files raise a dozen types; none of them is ours
        text = f"cannot be read as {what} ({first_line(e)}): {remedy}"
        if no_memory(e):
            text = "out of memory: give a smaller image, or more memory"
        raise InputError(f"{path}: {text}") from None


def head_of(path: str | Path) -> tuple[Image.Image, tuple[int, int]]:
    """PIL image of a file, not decoded yet, and its size (H, W) as shown. Raises InputError."""
    with unreadable(path):
        image = Image.open(path, formats=FORMATS)  # not PostScript: that starts a program
        if image.info.get("Software") == RESULT:
            raise ValueError("a picture of this program's")
        if image.format == "TIFF":
            image.filename = ""  # not mapped into memory: Pillow scrambles what it turns so
        frames, pixels = getattr(image, "n_frames", 1), image.width * image.height
        if frames > 1 and image.format != "MPO":  # of a telephone: the others are previews
            raise ValueError(f"it has {frames} frames: save each as an image of its own")
        deep = image.format in ("PNG", "TIFF") and ";16" in str(image.tile)
        if image.mode == "F" or (deep and image.mode[0] != "I"):
            raise ValueError("floating-point values or 16-bit colours: save grey of 16 bits, or 8")
        if pixels > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        # Pillow turns a TIFF itself, and would decode a PNG to look for EXIF behind its pixels
        plain = image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info)
        turned = not plain and image.getexif().get(0x0112, 1) >= 5  # orientation: a quarter
        return image, image.size if turned else image.size[::-1]


def image_sizes(images: list) -> list[tuple[int, int]]:
    """(H, W), as shown, of what as_image takes; of files from their heads. Raises InputError."""
    paths = (str, os.PathLike)
    return [head_of(i)[1] if isinstance(i, paths) else as_image(i).size[::-1] for i in images]


def white_level_of(paths: list) -> float:
    """The smallest of WHITE_LEVELS that holds the values of all training images of > 8 bits.

    So a value is the same grey in every image; it is kept with the model.
    """
    deep = [path for path in paths if head_of(path)[0].mode[0] == "I"]
    highest = max((int(np.asarray(open_image(path)).max()) for path in deep), default=0)
    return float(next(level for level in WHITE_LEVELS if highest <= level))


def in_8_bits(path: str | Path, image: Image.Image, white_level: float) -> Image.Image:
    """An image of more than 8 bits with 0..white_level as 0..255, another as it is."""
    if image.mode[0] != "I":
        return image
    values, white = np.asarray(image), np.float32(white_level)
    low, high = values.min(), values.max()
    negative = getattr(image, "tag_v2", {}).get(262) == 0  # TIFF: 0 is white
    if low < 0 or negative or np.median(values) > white:
        text = f"values {low} to {high}, {'0 is white' if negative else f'white level {white:g}'}"
        raise InputError(f"{path}: {text}: save it like the training images, 0 as black")
    if high > white:
        say_once(f"{path}: values up to {high} are cut at {white:g}, the white level")
    values = np.minimum(values, white) * np.float32(255 / white_level)
    return Image.fromarray(np.rint(values).astype(np.uint8))


# Masks
def masks_of(
    item: Item, size: tuple, saturation: dict | None = None, ignore: Array | None = None
) -> tuple[list, Array]:
    """Regions [(box, bool (h, w) in it, pixels that saturate it)] and union (H, W) of the masks.

    box: the slices of a region's bounding box. A region is an 8-connected component, as in the
    official MVTec AD evaluation; with saturation (LOCO) a mask is one. Raises InputError.
    """
    from scipy import ndimage  # here: 0.3 s, which an image alone need not wait for

    union, regions = np.zeros(size, bool), []
    for path in item.masks or ():
        values = read_mask(path, size)
        mask = values != 0 if ignore is None else (values != 0) & ~ignore
        union |= mask
        loco = saturation is not None
        labels = mask.astype(int) if loco else ndimage.label(mask, np.ones((3, 3)))[0]
        for k, box in enumerate(ndimage.find_objects(labels), 1):
            region = labels[box] == k
            most = area = region.sum()
            if loco:
                with unreadable(path, "a value of defects_config.json", "restore one of them"):
                    threshold, relative = saturation[int(values.max())]
                most = min(area, max(1, int(threshold * area) if relative else threshold))
            regions.append((box, region, most))
    return regions, union


def read_mask(path: Path, size: tuple | None = None) -> Array:
    """Values (H, W) of a mask, not zero where it is defective; of colours the largest channel.

    Raises InputError if they may have been changed, and if its image has another size, (H, W).
    """
    image = open_image(path)
    if image.format not in ("PNG", "BMP", "TIFF", "PPM") or image.mode == "P":
        what = f"{image.format}, {image.mode}"
        raise InputError(f"{path}: a mask as {what}, whose values may be others: save a grey PNG")
    if size and image.size != size[::-1]:
        text = "mask is {} x {}, its image {} x {}".format(*image.size, *size[::-1])
        raise InputError(f"{path}: {text}: masks must have the image's size")
    grey = image.mode == "L" or image.mode[0] == "I"
    values = np.asarray(image) if grey else np.asarray(image.convert("RGB")).max(2)
    top = values.max()
    if top >= 128 and ((values > 0) & (values < top / 8)).any():
        text = "faint values beside bright ones, as JPEG and resizing leave them"
        raise InputError(f"{path}: {text}: save it with 0 and 255 alone")
    share = (values != 0).mean()
    if share == 0 or share > 0.5:
        text = f"{100 * share:.0f} % of this mask is defective: is it empty, or inverted?"
        say_once(f"{path}: {text}", about=(path.parent, share == 0))
    return values


def read_ignored(path: str | None) -> Array | None:
    """Pixels bool (H, W) to ignore, the white ones of a mask file. Raises InputError."""
    if path is None:
        return None
    ignore = read_mask(Path(path)) != 0
    if ignore.all() or not ignore.any():
        raise InputError(f"--ignore {path}: is all of one value: paint white what is ignored")
    return ignore


# ---- 2. Scoring and metrics: images -> maps, scores, predictions -> metrics. Writes nothing ------
class Prediction(NamedTuple):
    """What is predicted of one image; without a threshold no verdict, and the p-value is nan."""

    score: float
    p_value: float  # how rarely a good image scores as high, by the fitted tail
    verdict: str  # "defect", "good" or "none"
    threshold: float = math.nan  # map > threshold is where the image is called defective
    map: Array | None = None  # (H, W) at the image's own size, in the units of the score


def score(
    detector: wtflow.Detector, images: Any, fpr: float = 1.0, threshold: str | float = "tail"
) -> Prediction | list:
    """Score images from Python: a Prediction of one image, or a list of them for a list.

    images: what as_image takes (paths, PIL images, uint8 arrays in RGB, image[..., ::-1] if OpenCV
    has read it), of any size. fpr, threshold: see calibrate. Raises InputError.
    """
    check_threshold(fpr, threshold)
    alone, out = not isinstance(images, (list, tuple)), []
    images = [images] if alone else images
    if not images:
        raise InputError("no images: give at least one")
    known = calibration_of(detector, fpr, threshold)
    for found, y, size in predictions_of(detector, images, known):
        if isinstance(found, InputError):
            raise found
        out.append(found._replace(map=at_size(y, size)))
    return out[0] if alone else out


def predictions_of(
    detector: wtflow.Detector, images: list, known: "Calibration"
) -> Iterator[tuple]:
    """(Prediction or InputError, map (h, w), size (H, W)) of each image; BATCH of them in memory.

    Names the first image that is squeezed otherwise than those of training.
    """
    low, high = detector.reading.make.get("aspect", (0, math.inf))
    names = map(name_of, images)
    for read in batches_of(images, wtflow.image_shape(detector.recipe), detector.reading):
        maps, scores, sizes = [], [], []
        if readable := [found for found in read if not isinstance(found, InputError)]:
            batch, sizes = stacked(readable)
            maps, scores = detector.score(detector.features(batch))
        scored = zip(classify(scores, known), maps, sizes, strict=True)
        for found in read:
            name, y, size = next(names), None, None
            if not isinstance(found, InputError):
                found, y, size = next(scored)
                if not low / 1.1 <= (ratio := size[0] / size[1]) <= 1.1 * high:
                    text = f"height / width {ratio:.3g}, of training images {low:.3g} to {high:.3g}"
                    say_once(f"{name}: {text}: scores may not compare", about=("aspect", low, high))
                if not math.isfinite(found.score):
                    found = InputError(f"{name}: its score is not finite: check image and weights")
            yield found, y, size


def at_size(y: Tensor, size: tuple) -> Array:
    """Anomaly map (h, w) of any resolution resampled to an image's (H, W), float32."""
    return F.interpolate(y[None, None].float(), size, mode="bilinear")[0, 0].numpy()


# Images -> features
def new_detector(
    images: list, recipe: wtflow.Recipe, weights: Any = None, device: Any = "auto", ignore=None
) -> wtflow.Detector:
    """A detector, not fitted, for the aspect, size and white level of images as as_image takes."""
    sizes = image_sizes(images)
    files = [image for image in images if isinstance(image, (str, os.PathLike))]
    detector = wtflow.Detector(wtflow.recipe_for(recipe, sizes), weights).to(pick_device(device))
    aspects = [h / w for h, w in sizes]
    make = {"aspect": (min(aspects), max(aspects))}
    detector.reading = Reading(white_level_of(files), ignore, make)
    return detector


def pick_device(name: str | torch.device) -> torch.device:
    """The torch device of --device; torchrun's processes take GPUs in turn. Raises InputError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"--device {name}: no GPU that torch can use: give --device cpu")
        torch.backends.cudnn.allow_tf32 = False  # the networks have 16 bits, all else 32
        if device.index is None:
            mine = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
            return torch.device(f"cuda:{mine}")
    return device


def extract(detector: wtflow.Detector, images: list, report: Callable | None = None) -> tuple:
    """Features (n, d, h, w) float16 of images, None of no images; original sizes; digests.

    Features are on the detector's device; digests are of the pixels that the network sees;
    report(done) is called after each batch. Raises InputError.
    """
    out, sizes, digests = None, [], []
    for read in batches_of(images, wtflow.image_shape(detector.recipe), detector.reading):
        batch, batch_sizes = stacked(read)
        x = detector.features(batch)
        bad = ~x.isfinite().flatten(1).all(1)
        if bad.any():
            name = name_of(images[len(sizes) + int(bad.nonzero()[0])])
            raise InputError(f"{name}: features are not finite: check the weights and this image")
        if out is None:  # a position's features side by side
            how = {"dtype": x.dtype, "device": x.device, "memory_format": torch.channels_last}
            out = torch.empty((len(images), *x.shape[1:]), **how)
        out[len(sizes) : len(sizes) + len(x)] = x
        sizes += batch_sizes
        digests += [hashlib.sha256(pixels).digest() for pixels, _ in read]
        if report is not None:
            report(len(sizes))
    return out, sizes, digests


def extract_good(
    detector: wtflow.Detector, images: list, report: Callable | None = None
) -> tuple[Tensor, Array]:
    """Features of n good images without copies, and of each image the first with its pixels (n,).

    Held-out scores of what has a copy that was seen are too low.
    """
    (features, _, digests), where = extract(detector, images, report), {}
    first = np.array([where.setdefault(digest, k) for k, digest in enumerate(digests)])
    if len(where) == len(first):
        return features, first
    copies = np.flatnonzero(first == np.bincount(first).argmax())
    copies = listed([getattr(images[k], "name", f"image {k}") for k in copies])
    text = f"{len(first)} training images, {len(where)} different"
    say_once(f"{text}: of equal ones, like {copies}, the first is used")
    return features[np.unique(first)], first


# Threshold and verdict
CENTRAL = (0.5, 0.9)  # [ours] quantiles of the good scores that their tail is fitted to
STANDS_OUT = 0.01  # [ours] suspects: for their number as many scores as high are rarer than this
FEW = 50  # good images: of fewer the mean rate is said
EXCESS = 21.5  # [derived] of n good images a threshold for a has a (1 + EXCESS / n) on average (E3)
FEWEST = 3  # good images that a threshold needs: a line takes two of them between CENTRAL
RATES = (0.1, 0.5, 1.0, 5.0)  # false positive rates in percent of the table of thresholds


class Tail(NamedTuple):
    """P(score <= s) = exp(-exp(-z)), z = (log s - location) / scale, of a good image (E1, E2)."""

    location: float
    scale: float
    suspects: int  # of the scores it was fitted to: the highest, which stand out

    def p_value(self, scores: Array) -> Array:
        """P(a good image scores higher) of scores of any shape."""
        with np.errstate(over="ignore", divide="ignore"):  # of 0, and of scores near it, p is 1
            return -np.expm1(-np.exp((self.location - np.log(scores)) / self.scale))

    def threshold(self, rate: float) -> float:
        """The score that a share `rate` of good images exceeds, 0 < rate < 1."""
        return math.exp(self.location - self.scale * math.log(-math.log1p(-rate)))


class Calibration(NamedTuple):
    good_scores: Array  # rising
    tail: Tail
    threshold: float  # nan of fewer than FEWEST, unless it is given
    text: str  # the threshold in words


def calibrate(good_scores: Array, fpr: float = 1.0, how: str | float = "tail") -> Calibration:
    """The threshold that `fpr` percent of new good images exceed, from the good scores (n,).

    how: "tail", "rank" or the threshold itself. Both hold for new images that are like these. The
    tail needs its form; it extrapolates, and up to a tenth of defects among the good images do not
    spoil it (E3). The rank (conformal prediction, Vovk et al. 2005) needs nothing else: the
    ceil((n + 1) (1 - a))-th smallest of them is exceeded with a probability of a = fpr / 100 at
    most (E4), but there is none of too few, nor for fpr = 0: then it is the largest.
    """
    good = np.sort(np.asarray(good_scores, float))
    n = len(good)
    if not n:
        raise InputError("this detector is not fitted: train it, or load a trained one")
    tail, text = fit_tail(good), f" at a false positive rate of {fpr:g} %"
    if not isinstance(how, str):
        threshold, text = float(how), ", as given"
    elif n < FEWEST:
        threshold, text = math.nan, f", no verdict: good images: {n}, give {FEWEST} or more"
    elif how == "tail" and fpr > 0:
        threshold = tail.threshold(fpr / 100)
        if n < FEW:
            text += f" (of {n} images: {fpr * (1 + EXCESS / n):.2g} % on average)"
    else:
        rank = max(1, math.ceil((n + 1) * (1 - fpr / 100) - 1e-9))  # 250 * 0.836 exceeds 209
        threshold = float(good[min(rank, n) - 1])
        if rank > n:
            text = f", the highest of {n} good images (--fpr {fpr:g})"
    return Calibration(good, tail, threshold, f"threshold {threshold:.4f}{text}")


def calibration_of(detector: wtflow.Detector, fpr: float, how: str | float) -> Calibration:
    return calibrate(detector.normal_scores.cpu().numpy(), fpr, how)


def threshold_of(good_scores: Array, fpr: float = 1.0, how: str | float = "tail") -> float:
    return calibrate(good_scores, fpr, how).threshold


def check_threshold(percent: float, how: str | float) -> None:
    """Raises InputError for what is no false positive rate and no way to a threshold."""
    if not (percent == 0 or 1e-6 <= percent < 100):
        raise InputError(f"--fpr {percent}: give a percentage, 0 or 0.000001 to below 100")
    number = isinstance(how, (int, float)) and 0 < how < math.inf
    if not number and how not in ("tail", "rank"):
        raise InputError(f"--threshold {how}: give tail, rank or a score above 0")


def classify(scores: Array, known: Calibration) -> list[Prediction]:
    """A Prediction of each score (m,); one that is nan is no good image."""
    scores, threshold = np.asarray(scores, float), known.threshold
    above = "none" if math.isnan(threshold) else "defect"
    verdicts = np.where(scores <= threshold, "good", above)
    rows = zip(scores.tolist(), known.tail.p_value(scores).tolist(), verdicts.tolist(), strict=True)
    return [Prediction(*row, threshold) for row in rows]


def fit_tail(good_scores: Array) -> Tail:
    """The tail of scores (n,), fitted to their order statistics in CENTRAL; nan of under FEWEST.

    What the highest tenth is does not move the fit, how many they are does. So scores that stand
    out are left out, and the line is fitted again: the k highest, for the largest k such that k or
    more good images score as high with a probability below STANDS_OUT (Poisson of mean
    n P(score > s_k)). In 5 to 8 % of good sets of 100 to 1,000 images something stands out (E3).
    """
    from scipy.special import gammainc  # here: an image alone need not wait for it

    scores, n = np.sort(np.asarray(good_scores, float)), len(good_scores)
    if n < FEWEST:
        return Tail(math.nan, math.nan, 0)
    x = np.log(np.maximum(scores, 1e-3 * max(np.median(scores), 1e-30)))  # 0 has no logarithm
    most = n - math.floor(CENTRAL[1] * n + 0.5)  # more of them would have moved the line
    expected = n * Tail(*central_line(x), 0).p_value(np.exp(x[::-1][:most]))
    as_many = gammainc(np.arange(1, most + 1), expected)  # P(Poisson(expected) >= k)
    suspects = 1 + max(np.flatnonzero(as_many < STANDS_OUT).tolist(), default=-1)
    return Tail(*central_line(x[: n - suspects]), suspects)


def central_line(x: Array) -> tuple[float, float]:
    """Intercept and slope of sorted x (n,) on the Gumbel quantiles of (i - 1/2) / n in CENTRAL."""
    p = (np.arange(len(x)) + 0.5) / len(x)
    chosen = (p >= CENTRAL[0]) & (p <= CENTRAL[1])
    y, x = -np.log(-np.log(p[chosen])), x[chosen]
    slope = (y - y.mean()) @ x / ((y - y.mean()) @ y)
    slope = max(float(slope), 1e-6)  # of equal images
    return float(x.mean() - slope * y.mean()), slope


# Metrics. What results.csv holds, and what metrics.csv holds beside it; None where not defined
METRICS = ("image_auroc", "pixel_auroc", "aupro")
SUMMED = ("train_images", "test_images", "seconds")
COLUMNS = ("category", *METRICS, *SUMMED)
LOCO = ("image_auroc_logical", "image_auroc_structural", "spro_logical", "spro_structural", "spro")
MORE = ("image_ap", "pixel_ap", *LOCO, "fpr", "recall")  # the last two at --fpr
PRO_LIMIT, SPRO_LIMIT = 0.3, 0.05  # largest false positive rate: MVTec AD, MVTec LOCO AD
BINS = 1 << 15
SAMPLE = 2_000_000  # pixels whose quantiles place the bins


def measure(category: Category, scored: tuple, ignore: Array | None = None) -> dict:
    """Metrics of one category, a dict over COLUMNS and MORE, and "kinds": a row of each defect.

    scored: of the test images maps (n, h, w), predictions and sizes [(H, W)]; ignore: pixels (H, W)
    without a metric. Says so where AUROC is not defined.
    """
    test, name, (maps, found, sizes), pixels = category.test, category.name, scored, {}
    kinds = [item.kind for item in test]
    defects, good = sorted({*kinds} - {"good"}), kinds.count("good")

    def row_of(name, *defects):  # of some kinds of defects beside the good images
        chosen = [k for k, kind in enumerate(kinds) if kind in ("good", *defects)]
        bad = np.array([kinds[k] != "good" for k in chosen], bool)
        row = dict.fromkeys(COLUMNS + MORE) | {"category": name, "test_images": int(bad.sum())}
        row["image_auroc"], row["image_ap"] = image_metrics([found[k].score for k in chosen], bad)
        if pixels:
            row["pixel_auroc"], row["pixel_ap"], row["aupro"] = pixel_metrics(pixels, defects)
        return row | rates([kinds[k] for k in chosen], [found[k] for k in chosen])

    if test and good in (0, len(test)):
        say_once(f"{name}: no {'defective' if good else 'good'} test images: AUROC is not defined")
    if test and all(item.masks is not None for item in test):
        pixels = pixel_counts(maps, test, sizes, ignore=ignore)
    row = row_of(name, *defects)
    row |= {"train_images": len(category.train), "test_images": len(test)}
    row["kinds"] = [row_of(f"{name}/{kind}", kind) for kind in defects]
    if category.saturation is not None and pixels:
        saturated = pixel_counts(maps, test, sizes, category.saturation, ignore)
        for part in ("logical", "structural"):
            kind = f"{part}_anomalies"
            row[f"image_auroc_{part}"] = row_of(part, kind)["image_auroc"]
            row[f"spro_{part}"] = pixel_metrics(saturated, [kind], SPRO_LIMIT)[2]
        for metric in ("image_auroc", "spro"):
            row[metric] = mean_of([row[f"{metric}_logical"], row[f"{metric}_structural"]])
    return row


def pixel_counts(
    maps: Tensor, items: list, sizes: list, saturation: dict | None = None, ignore: Any = None
) -> dict[str, Array]:
    """{kind: counts (3, bins)} of maps (n, h, w), each at its mask's size, by falling map value.

    Counts are of pixels in masks, of pixels outside, and of regions the overlap with what is above
    the bin. Values are binned, half the edges at quantiles and half evenly spaced: memory does not
    grow with the set, and metrics, as shares of 1, move by less than 1e-4 (tests/test_metrics.py).
    """
    values = maps.reshape(-1)[:: max(1, maps.numel() // SAMPLE)].numpy()
    quantiles = np.quantile(values, np.linspace(0, 1, BINS // 2))
    even = np.linspace(values.min(), values.max(), BINS // 2)
    edges = np.unique(np.r_[quantiles, even]).astype(np.float32)
    bins = len(edges) + 1

    def counts(k):
        regions, union = masks_of(items[k], sizes[k], saturation, ignore)
        y = at_size(maps[k], sizes[k])
        index = bins - 1 - np.searchsorted(edges, y, side="right")
        inside, overlap = np.bincount(index[union], minlength=bins), np.zeros(bins)
        for box, region, saturates_at in regions:
            hits = np.cumsum(np.bincount(index[box][region], minlength=bins))
            overlap += np.minimum(hits / saturates_at, 1)
        rest = ~union if ignore is None else ~(union | ignore)
        return np.stack([inside, np.bincount(index[rest], minlength=bins), overlap])

    totals = {item.kind: np.zeros((3, bins)) for item in items}
    for batch in torch.arange(len(items)).split(BATCH):
        for k, found in zip(batch, wtflow.parallel_map(counts, batch, maps.device), strict=True):
            totals[items[k].kind] += found
    return totals


def pixel_metrics(pixels: dict, defects: list, limit: float = PRO_LIMIT) -> tuple:
    """(pixel AUROC, pixel AP, AUPRO or sPRO) of pixel_counts, some kinds of defects beside good.

    PRO: overlap of each region at each threshold, averaged over the regions of the whole set,
    against the false positive rate over all its defect-free pixels, integrated to `limit`, where it
    is interpolated, and divided by it (Bergmann et al. 2021; with saturation: 2022).
    """
    inside, outside, overlap = sum(pixels.get(k, np.zeros((3, 1))) for k in ("good", *defects))
    auroc, ap = auroc_ap(inside, outside)
    regions = overlap[-1]  # each is covered as a whole at last
    if not regions or not outside.any():
        return auroc, ap, None
    x, y = np.r_[0, np.cumsum(outside) / outside.sum()], np.r_[0, overlap / regions]
    below = x <= limit
    y = np.r_[y[below], np.interp(limit, x, y)]
    return auroc, ap, 100 * float(np.trapezoid(y, np.r_[x[below], limit])) / limit


def image_metrics(scores: Array, defective: Array) -> tuple:
    """AUROC and average precision of image scores, exact."""
    falling, rank = np.unique(-np.asarray(scores, float), return_inverse=True)
    bad = np.asarray(defective, bool)
    return auroc_ap(*(np.bincount(rank[part], minlength=len(falling)) for part in (bad, ~bad)))


def auroc_ap(positive: Array, negative: Array) -> tuple:
    """AUROC (ties count one half) and average precision of histograms by falling score, or None."""
    P, N = positive.sum(), negative.sum()
    if not P or not N:
        return None, None
    tp, fp = np.cumsum(positive), np.cumsum(negative)
    auroc = np.trapezoid(np.r_[0, tp] / P, np.r_[0, fp] / N)
    precision = tp / np.maximum(tp + fp, 1)
    return 100 * float(auroc), 100 * float(np.sum(np.diff(np.r_[0, tp]) / P * precision))


def rates(kinds: list[str], predictions: list[Prediction]) -> dict[str, float | None]:
    """False positive rate and recall in percent, None without an image or without a verdict."""
    flagged = {"fpr": [], "recall": []}
    for kind, p in zip(kinds, predictions, strict=True):
        if p.verdict != "none":
            flagged["fpr" if kind == "good" else "recall"].append(100 * (p.verdict == "defect"))
    return {name: mean_of(values) for name, values in flagged.items()}


def mean_of(values: list) -> float | None:
    values = [v for v in values if v is not None]
    return float(np.mean(values)) if values else None


# Tables
def mean_row(rows: list[dict]) -> dict:
    """The last row of a table: means of the metrics, sums of the counts and seconds."""
    values = {name: [row[name] for row in rows] for name in COLUMNS[1:] + MORE}
    means = {name: sum(v) if name in SUMMED else mean_of(v) for name, v in values.items()}
    return {"category": "mean"} | means


def cell_text(value: Any) -> str:
    if value is None or value != value:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def print_table(columns: tuple | list, rows: list[dict]) -> None:
    """Rows as an aligned table on stdout."""
    lines = [columns] + [[one_line(cell_text(row[c])) for c in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *rest in lines:
        numbers = [v.rjust(w) for v, w in zip(rest, widths[1:], strict=True)]
        say("  ".join([first.ljust(widths[0]), *numbers]))


def print_thresholds(known: Calibration, scores: Array, kinds: list[str]) -> None:
    """The threshold at each of RATES, and what it flags of test images with these scores."""
    rows = []
    for rate in () if math.isnan(known.tail.scale) else RATES:
        threshold = known.tail.threshold(rate / 100)
        found = rates(kinds, classify(scores, known._replace(threshold=threshold)))
        row = {"fpr_by_tail": f"{rate:g}", "threshold": f"{threshold:.4f}"}
        rows.append(row | {f"test_{k}": v for k, v in found.items() if v is not None})
    if rows:
        print_table([*rows[0]], rows)


# ---- 3. Files: whole or not there; what others have written stays as it is -----------------------
FORMAT = 8  # of checkpoints; another one is refused
RESULT = "WT-Flow result"  # in the first bytes of every file from here; a table has its head


def write_whole(path: Path, write: Callable, mark: str = RESULT) -> None:
    """write(open file), flush to disk, rename: the old file or the new one.

    Raises InputError if that cannot be, or if the old file is not from here.
    """
    refuse_foreign(path, mark)
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # of a killed run, or a link
        try:
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what stands against writing into an InputError that names the path."""
    try:
        yield
    except OSError as e:
        text = f"cannot be written ({e.strerror or e}): free some space, or give another --out"
        raise InputError(f"{path}: {text}") from None


def is_ours(path: Path, mark: str = RESULT) -> bool:
    """Whether a file begins as those from here do; not if it cannot be read."""
    with contextlib.suppress(OSError):
        if path.is_file():
            with open(path, "rb") as file:
                return mark.encode() in file.read(2048)
    return False


def refuse_foreign(path: Path, mark: str = RESULT) -> None:
    if os.path.lexists(path) and not is_ours(path, mark):
        raise InputError(f"{path}: not a file of this version's: move it, or write elsewhere")


def refuse_foreign_results(folder: Path) -> None:
    """refuse_foreign, before the work, for what will be written into a folder of results."""
    for name in ("model.pt", STATE, FINISHED):
        refuse_foreign(folder / name)
    tables = {"scores": SCORES, "train-scores": TRAIN_SCORES, "results": COLUMNS}
    tables |= dict.fromkeys(("metrics", "spread"), COLUMNS + MORE)
    for name, columns in tables.items():
        refuse_foreign(folder / f"{name}.csv", head_line(columns))


def remove_results(paths: Iterable[Path]) -> None:
    """Remove those of the files that were written here."""
    for path in filter(is_ours, paths):
        with writing(path):
            path.unlink()


def inside(folder: Path, name: str | Path) -> Path:
    """folder / name. Raises InputError for a name that leads out of the folder."""
    path = Path(os.path.normpath(folder / name))
    if Path(os.path.normpath(folder)) not in path.parents:
        raise InputError(f"{name}: a name that leads out of {folder}: give it another")
    return path


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock in a folder. Raises InputError if another process does."""
    path = folder / ".wtflow.lock"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "ab")
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(file.fileno()).st_nlink:
                raise BlockingIOError  # removed by its last holder: who comes next makes a new one
        except BlockingIOError:
            text = "another process is writing here: wait for it, or give another --out"
            raise InputError(f"{folder}: {text}") from None
        except (ImportError, OSError) as e:  # Windows, or a file system without locks
            say_once(f"no lock here ({first_line(e)}): see to it that no second run writes here")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


# Tables
TOLD = tuple("=+-@\t\r＝＋－＠")  # a spreadsheet may run what begins so, if it is no number
NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?")


def write_csv(path: Path, columns: tuple, rows: list[dict]) -> None:
    """A table in UTF-8, which a table of other columns is not replaced by."""
    data = encoded(head_line(columns) + csv_text(columns, rows))
    write_whole(path, lambda file: file.write(data), head_line(columns))


def head_line(columns: tuple) -> str:
    return ",".join(columns) + "\r\n"


def encoded(text: str) -> bytes:
    """UTF-8; a name that is not is written as it is on the disk."""
    return text.encode("utf-8", "surrogateescape")


def csv_text(columns: tuple, rows: list[dict]) -> str:
    """Rows as lines of a CSV file, for separators of any country; what a row lacks is empty."""

    def cell(value):
        text = harmless(value) if isinstance(value, str) else cell_text(value)
        quoted = any(c in text for c in ',;\t\r\n"')
        return '"' + text.replace('"', '""') + '"' if quoted else text

    return "".join(",".join(cell(row.get(c, "")) for c in columns) + "\r\n" for row in rows)


def harmless(text: str) -> str:
    """A name as the path ./name where a spreadsheet would run it."""
    return f"./{text}" if text.startswith(TOLD) and not NUMBER.fullmatch(text) else text


def table_in(path: Path, columns: tuple) -> tuple[str, list[dict]]:
    """Text and rows of a table, "" and [] of none. Raises InputError for one of other columns."""
    refuse_foreign(path, head_line(columns))
    with unreadable(path, "the table it was", "move it"):
        text = path.read_bytes().decode("utf-8", "surrogateescape") if path.exists() else ""
        return text, list(csv.DictReader(io.StringIO(text, newline="")))


def read_csv(path: Path, columns: tuple) -> list[dict]:
    """Rows of table_in but a last one that is half written. InputError if it was changed since."""
    text, rows = table_in(path, columns)
    rows = rows if text.endswith("\n") else rows[:-1]
    if text and not text.startswith(head_line(columns) + csv_text(columns, rows)):
        text = "cannot be read as the table it was (changed since): move it"
        raise InputError(f"{path}: {text}")
    return rows


SCORES = ("image", "kind", "score", "p_value", "verdict")  # columns of a category's scores.csv
TRAIN_SCORES = ("image", "score", "p_value", "copy_of", "leave_out")  # of train-scores.csv
# And of that of --image: what a row is of, to the image's time in nanoseconds
FOLDER_SCORES = ("image", *SCORES[2:], "threshold", "model", "folder", "modified", "error")


def score_row(name: str, kind: str, found: Prediction | InputError) -> dict:
    """A row of scores: of a prediction, or of the error that left the image without one."""
    if isinstance(found, InputError):
        return {"image": name, "kind": kind, "error": str(found)}
    score, p = ("" if math.isnan(v) else f"{v:.6g}" for v in (found.score, found.p_value))
    return {"image": name, "kind": kind, "score": score, "p_value": p, "verdict": found.verdict}


@contextlib.contextmanager
def growing_table(folder: Path, images: dict, about: dict, resume: bool) -> Iterator[tuple]:
    """(names to score, add(row)): folder/scores.csv, to which each row is written as it comes.

    images: {name: file}; about: columns that all rows share, others are an InputError, as is a
    table without resume. With it rows that have a score stay, but of an image that has changed.
    """
    table = folder / "scores.csv"
    # Another image of a name has another time; that of a missing one its reader names
    times = {n: str(p.stat().st_mtime_ns) if p.exists() else "" for n, p in images.items()}
    with locked(folder):
        rows = read_csv(table, FOLDER_SCORES)
        if any(row[column] != about[column] for row in rows for column in about):
            text = "rows of another folder, model or threshold: remove it or give another --out"
            raise InputError(f"{table}: {text}")
        if rows and not resume:
            raise InputError(f"{table}: is there: give --resume to go on, or another --out")
        kept = [row for row in rows if times.get(row["image"], row["modified"]) == row["modified"]]
        rows = [row for row in kept if row["score"]]
        done = {row["image"] for row in rows}
        write_csv(table, FOLDER_SCORES, rows)
        with writing(table):
            file = open(table, "ab", buffering=0)  # closing it writes nothing more

        def add(row):
            row = row | about | {"modified": times[row["image"]]}
            data = encoded(csv_text(FOLDER_SCORES, [row]))
            with writing(table):
                while data:
                    data = data[file.write(data) :]

        with file:
            yield [name for name in images if name not in done], add


def part_of(folder: Path, rows: list[dict]) -> str:
    """What the tables of a part of the categories have in their names."""
    names = [harmless(row["category"]) for row in rows]
    had = {row["category"] for row in table_in(folder / "results.csv", COLUMNS)[1]}
    text = "".join(f"-{name}" for name in names if not had <= {*names, "mean"})
    return text if len(text) <= 50 else f"{text[:40]}-{zlib.crc32(encoded(text)):08x}"


def write_tables(folder: Path, rows: list[dict]) -> None:
    """results.csv and metrics.csv, each with a last row `mean`; prints the table.

    metrics.csv has all metrics, and after them those of each kind of defect, "category/kind".
    Of a part of the categories both have their names in theirs.
    """
    part = part_of(folder, rows)
    kinds = [kind for row in rows for kind in row["kinds"]]
    rows = rows + [mean_row(rows)]
    write_csv(folder / f"results{part}.csv", COLUMNS, rows)
    write_csv(folder / f"metrics{part}.csv", COLUMNS + MORE, rows + kinds)
    print_table(COLUMNS + tuple(c for c in MORE if any(row[c] is not None for row in rows)), rows)


def write_spread(folder: Path, seeds: list[int], runs: list[list[dict]]) -> None:
    """Means over seeds in results.csv and metrics.csv, deviations in spread.csv; prints both."""
    means, spreads, printed = [], [], []
    for rows in zip(*[run + [mean_row(run)] for run in runs], strict=True):
        names = [name for name, value in rows[0].items() if isinstance(value, (int, float))]
        values = {name: np.array([row[name] for row in rows], float) for name in names}
        means.append(rows[0] | {name: v.mean() for name, v in values.items()})
        spreads.append(rows[0] | {name: v.std(ddof=1) for name, v in values.items()})
        text = {name: f"{means[-1][name]:.2f} +- {spreads[-1][name]:.2f}" for name in names}
        printed.append(rows[0] | text)
    part = part_of(folder, means[:-1])
    write_csv(folder / f"results{part}.csv", COLUMNS, means)
    write_csv(folder / f"metrics{part}.csv", COLUMNS + MORE, means)
    write_csv(folder / f"spread{part}.csv", COLUMNS + MORE, spreads)
    say(f"mean +- standard deviation over seeds {', '.join(map(str, seeds))}")
    print_table(COLUMNS, printed)


# Checkpoints
TRAINED = "what train.py wrote", "give OUT/DATA/CATEGORY/model.pt, or remove this and train again"


def save_model(path: str | Path, detector: wtflow.Detector) -> None:
    """A fitted detector; the frozen extractor is named by its recipe, not stored."""
    reading = detector.reading._asdict()
    if reading["ignore"] is not None:
        reading["ignore"] = torch.from_numpy(reading["ignore"])
    about = {"weights": detector.extractor.digest, "reading": reading}
    save_checkpoint(Path(path), detector.recipe, model=detector.state_dict(), **about)


def load_model(path: str | Path, device: Any = "auto", weights: Any = None) -> wtflow.Detector:
    """The detector of save_model on a device (pick_device). Raises InputError if it is damaged."""
    state, device = load_checkpoint(path), pick_device(device)
    with unreadable(path, *TRAINED):
        detector = wtflow.Detector(state["recipe"], weights=weights)
        detector.normal_scores = torch.empty_like(state["model"]["normal_scores"])
        detector.load_state_dict(state["model"])
        reading = Reading(**state["reading"])
        ignore = None if reading.ignore is None else reading.ignore.numpy()
        detector.reading = reading._replace(ignore=ignore)
        finite = all(v.isfinite().all() for v in state["model"].values())
        if not finite or not len(detector.normal_scores):
            raise ValueError("not fitted, or not finite")
        if state["weights"] != detector.extractor.digest:
            raise InputError(f"{path}: trained on other weights: pass those with --weights")
    detector = detector.to(device)
    if device.type == "cuda":  # in place of the two methods, on this detector alone
        detector._extract = CudaGraphs(detector._extract)
        detector._score = CudaGraphs(detector._score)
    return detector


def save_checkpoint(path: Path, recipe: wtflow.Recipe, **content: Any) -> None:
    """Tensors and plain values, and the recipe that they belong to."""
    state = {"written_by": RESULT, "format": FORMAT, "recipe": asdict(recipe), **content}
    buffer = io.BytesIO()  # of a disk that is full torch does not tell the reason
    torch.save(state, buffer)
    write_whole(path, lambda file: file.write(buffer.getbuffer()))


def load_checkpoint(path: str | Path) -> dict:
    """What save_checkpoint wrote, its recipe a Recipe. Raises InputError for anything else."""
    with unreadable(path, *TRAINED):
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise ValueError(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']}, this version reads {FORMAT}")
        return state | {"recipe": wtflow.Recipe(**state["recipe"])}


def write_json(path: Path, values: dict) -> None:
    """Plain values, a line each."""
    text = json.dumps({"written_by": RESULT} | values, indent=4)
    write_whole(path, lambda file: file.write(encoded(text)))


def read_json(path: Path) -> dict:
    """What write_json wrote. Raises InputError for anything else."""
    with unreadable(path, *TRAINED):
        values = json.loads(path.read_bytes().decode("utf-8", "surrogateescape"))
        if values["written_by"] != RESULT or not {"row", "test"} <= values.keys():
            raise ValueError("not of this version")
        return values


class CudaGraphs:
    """A method of a detector as CUDA graphs: one launch in place of one for each of its kernels.

    A shape of x has a graph from its second call on: a last batch comes only once. A fit, or a move
    to another device, gives the detector other tensors, and ends the graphs. Until then they keep
    what they read. Where none can be captured the method runs as it is.
    """

    lock = Lock()  # of all detectors: a process can capture one graph at a time

    def __init__(self, method: Callable):
        self.method = WeakMethod(method)  # the detector holds this object
        self.fitted, self.read, self.graphs, self.place = [], [], {}, ()

    def __reduce__(self):  # a copy of the detector captures its own
        return CudaGraphs, (self.method(),)

    def __call__(self, x: Tensor) -> Tensor | tuple:
        method = self.method()
        if x.device.type != "cuda" or torch.is_autocast_enabled("cuda"):
            return method(x)
        with CudaGraphs.lock, torch.cuda.device(x.device):
            if torch.cuda.current_stream() != torch.cuda.default_stream():
                return method(x)  # inside a graph of the caller's, say
            detector = method.__self__
            gaussian = getattr(detector, "gaussian", detector)
            buffers = (*detector.buffers(recurse=False), *gaussian.buffers(recurse=False))
            fitted = [detector.field, *buffers]
            if [*map(id, fitted)] != [*map(id, self.fitted)]:
                self.fitted, self.graphs = fitted, {}
                self.read = [v.detach() for v in (*detector.parameters(), *detector.buffers())]
                # One memory and stream for all, as no two run at a time
                self.place = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            key = x.shape, x.stride(), x.dtype
            if key not in self.graphs:
                self.graphs[key] = None
                return method(x)
            if self.graphs[key] is None:
                self.graphs[key] = captured(method, x, *self.place)
            return self.graphs[key](x)


@torch.inference_mode(False)
def captured(f: Callable, x: Tensor, pool: Any = None, stream: Any = None) -> Callable:
    """f for tensors like x as a CUDA graph, or f itself where that fails, which is said."""
    graph, stream, x = torch.cuda.CUDAGraph(), stream or torch.cuda.Stream(x.device), x.clone()
    how = {"pool": pool, "stream": stream, "capture_error_mode": "thread_local"}
    try:
        with torch.cuda.stream(stream), torch.cuda.graph(graph, **how):  # the first ends the stream
            y = f(x)
    except RuntimeError as e:
        say_once(f"no CUDA graph, so slower ({first_line(e)})", about="graph")
        return f

    def replay(other):
        x.copy_(other)
        graph.replay()
        return y.clone() if isinstance(y, Tensor) else tuple(v.clone() for v in y)

    return replay


# ---- 4. Pictures: one that cannot be drawn or written costs itself -------------------------------
DRAWN = 1200  # pixels of an image's longer side in a picture, at most
WORST = 5  # pictures of good test images of the highest scores, and of defective ones of the lowest


def write_pictures(
    folder: Path, category: Category, scored: tuple, known: Calibration, white: float, which: str
) -> None:
    """scores.png and maps/KIND/*.png of the test images of measure; which: all, worst or none."""
    remove_results([folder / "scores.png", *(folder / "maps").rglob("*.png")])
    if which == "none":
        return
    test, names, (maps, found, sizes) = category.test, names_of(category.test), scored
    bad = np.array([item.kind != "good" for item in test], bool)
    scores = np.array([p.score for p in found])
    draw(folder / "scores.png", draw_scores, category.name, scores, bad, known)
    rising = np.argsort(scores, kind="stable")
    worst = [*rising[~bad[rising]][-WORST:], *rising[bad[rising]][:WORST]]
    for j in worst if which == "worst" else rising:
        union = masks_of(test[j], sizes[j])[1] if test[j].masks else None
        title = f"{category.name}:  {in_words(found[j])}:  {names[j].as_posix()}"
        row = test[j].path, union, maps[j], title
        draw(inside(folder / "maps", f"{names[j]}.png"), draw_rows, [row], known, white)


def draw(path: Path, f: Callable, *args: Any) -> None:
    """Save a figure that f(figure, *args) fills; where that fails, say so and go on."""
    from matplotlib.figure import Figure  # here: it takes longer to import than an image to score

    try:
        figure, file = Figure(layout="constrained"), io.BytesIO()  # no window, no backend
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a letter that the font lacks, a mask without edges
            f(figure, *args)
            figure.savefig(file, format="png", dpi=100, metadata={"Software": RESULT})
        write_whole(path, lambda to: to.write(file.getbuffer()))
    except Exception as e:
        if no_memory(e):
            raise
        say(f"note: no picture {path} ({first_line(e)[:200]})", sys.stderr)


def draw_rows(figure: Any, rows: list[tuple], known: Calibration, white: float = 255.0) -> None:
    """Draw rows (image file, mask (H, W) or None, map (h, w), title): image with outline, and map.

    Colours mean the same in all pictures of a model: the threshold is in the middle.
    """
    middle = np.nan_to_num(known.threshold, nan=known.good_scores[-1])
    figure.set_size_inches(8.2, 4 * len(rows))
    all_axes = figure.subplots(len(rows), 2, squeeze=False)
    for (left, right), (path, union, y, title) in zip(all_axes, rows, strict=True):
        image = as_image(path, white)
        image.thumbnail((DRAWN, DRAWN))
        left.imshow(image)
        left.set_title(one_line(title)[:110], loc="left", fontsize=9, parse_math=False)
        if union is not None:
            # BOX and > 0: a scratch that is thinner than a pixel of the picture stays
            union = Image.fromarray(union).convert("L").resize(image.size, Image.BOX)
            left.contour(np.asarray(union) > 0, [0.5], colors="magenta", linewidths=0.8)
        y = at_size(y, image.size[::-1])
        if y.max() > known.threshold:
            right.contour(y, [known.threshold], colors="white", linewidths=0.8)
        shown = right.imshow(y, cmap="viridis", vmin=middle / 2, vmax=1.5 * middle)
        bar = figure.colorbar(shown, ax=right, fraction=0.046, extend="both")
        bar.set_label("anomaly map; white: the threshold")
        bar.ax.axhline(known.threshold, color="white", linewidth=2)
        for axis in (left, right):
            axis.set(xticks=[], yticks=[])


def draw_scores(figure: Any, title: str, scores: Array, bad: Array, known: Calibration) -> None:
    """Draw histograms of the scores of training and test images, the tail and the threshold."""
    axis, good = figure.subplots(), known.good_scores
    every = np.r_[scores, good]
    end = np.fmin(every.max(), 2 * known.threshold)  # where there is a threshold
    edges = np.linspace(min(every.min(), end / 2), end, 61)
    groups = {"good training": good, "good test": scores[~bad], "defective test": scores[bad]}
    for name, values in groups.items() if len(scores) else [("good training", good)]:
        label = f"{len(values)} {name} images"
        axis.hist(np.minimum(values, end), edges, alpha=0.6, label=label)
    expected = -len(good) * np.diff(known.tail.p_value(edges))
    axis.plot((edges[1:] + edges[:-1]) / 2, expected, "k", label="tail of good training images")
    axis.axvline(known.threshold, color="k", linestyle="--", label="threshold")
    axis.set(xlabel="image score (the last bar: and above)", ylabel="images")
    axis.set_title(one_line(title)[:60], parse_math=False)
    axis.legend(fontsize=8)


def write_suspects(
    folder: Path, category: Category, first: Array, found: tuple, known: Calibration, white: float
) -> None:
    """train-scores.csv of the training images, the highest first, and what stands out among them.

    first: of extract_good; found: held-out maps (k, h, w) and scores (k,) of what are no copies.
    What stands out is marked in the table, for --leave-out, and so are its copies and what has been
    left out; it is named on stderr, and the first 12 are drawn in suspects.png.
    """
    images = [*category.train, *category.left_out]
    names = [name.as_posix() for name in names_of([Item(path, "", None) for path in images])]
    kept = np.unique(first).tolist()
    maps, scored = (dict(zip(kept, v, strict=True)) for v in (found[0], classify(found[1], known)))
    falling = sorted(kept, key=lambda j: -scored[j].score)
    suspects = falling[: known.tail.suspects]
    rows = {j: score_row(names[j], "", scored[j]) | {"copy_of": ""} for j in falling}
    for j in np.setdiff1d(range(len(first)), kept).tolist():
        rows[j] = dict.fromkeys(TRAIN_SCORES, "") | {"image": names[j], "copy_of": names[first[j]]}
    for j in rows:
        rows[j]["leave_out"] = "x" if first[j] in suspects else ""
    left_out = [{"image": name, "leave_out": "x"} for name in names[len(first) :]]
    table, picture = folder / "train-scores.csv", folder / "suspects.png"
    write_csv(table, TRAIN_SCORES, [*rows.values(), *left_out])
    remove_results([picture])
    if suspects:
        text = f"{len(suspects)} of {len(kept)} good training images stand out"
        text += f" ({listed([names[j] for j in suspects])}): look at {picture}"
        say(f"{folder.name}: {text}; to train without them: --leave-out {table}", sys.stderr)
        shown = suspects[:12]
        rows = [(images[j], None, maps[j], f"{in_words(scored[j])}:  {names[j]}") for j in shown]
        draw(picture, draw_rows, rows, known, white)


def in_words(prediction: Prediction) -> str:
    p = max(prediction.p_value, 1e-4)  # so far out nobody has seen the tail
    p = f"p {'<' if p > prediction.p_value else '='} {p:.2g}"
    return f"score {prediction.score:.4f}, {p}, {prediction.verdict}"


def names_of(items: list[Item]) -> list[Path]:
    """[kind/file] of images; the folders between are kept where those of a kind are in several."""
    paths, shared = [(item.kind, Path(os.path.normpath(item.path))) for item in items], {}
    for kind, path in paths:
        shared[kind] = os.path.commonpath([shared.get(kind, path.parent), path.parent])
    return [kind / path.relative_to(shared[kind]) for kind, path in paths]


def write_maps(folder: Path, category: Category, maps: Tensor, sizes: list[tuple]) -> None:
    """Maps as MVTec's evaluation script reads them: float32 TIFF beside the category's folder."""
    for y, name, size in zip(maps, names_of(category.test), sizes, strict=True):
        save = partial(Image.fromarray(at_size(y, size)).save, format="TIFF")
        path = inside(maps_folder(folder), name.with_suffix(".tiff"))
        write_whole(path, partial(save, tiffinfo={305: RESULT}))  # the tag of software


def maps_folder(folder: Path) -> Path:
    return folder.parent / "anomaly_maps" / folder.name / "test"


# ---- 5. Export -----------------------------------------------------------------------------------
AGREES = 1e-3  # of the largest value: how far an exported program may be from its model


class Program(torch.nn.Module):
    """RGB uint8 (B, 3, H, W) of any H, W -> maps (B, h, w), scores, p-values (B,), defect (B,)."""

    def __init__(self, detector: wtflow.Detector, known: Calibration):
        super().__init__()
        self.detector, self.known = detector, known

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        detector, tail = self.detector, self.known.tail
        height, width = wtflow.image_shape(detector.recipe)
        x = images.float()
        for size in ((x.shape[2], width), (height, width)):  # as Pillow, which rounds in between
            x = F.interpolate(x, size, mode="bilinear", antialias=True)
            x = (x + 0.5).floor().clamp(0, 255)
        x = wtflow.extract_features(detector.extractor, x, detector.recipe)
        maps, scores = detector._score(x)
        z = (scores.log() - tail.location) / tail.scale
        return maps, scores, torch.expm1(-torch.exp(-z)).abs(), scores > self.known.threshold


def export_model(path: Path, detector: wtflow.Detector, known: Calibration) -> None:
    """Write a detector as an ONNX program that resizes images itself, if it gives the same.

    Its metadata say how it wants images. Raises InputError for what a program could not keep to.
    """
    if path.suffix.lower() != ".onnx":
        raise InputError(f"--export {path}: give a file that ends in .onnx")
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError:
        text = "needs packages: pip install onnx onnxscript onnxruntime"
        raise InputError(f"--export {path}: {text}") from None
    of_files = detector.reading.ignore is not None or detector.reading.white_level != 255
    if of_files or len(known.good_scores) < FEWEST:
        text = f"a model of over 8 bits, of --ignore or of under {FEWEST} images works here alone"
        raise InputError(f"--export {path}: {text}: train another")
    shape, generator = wtflow.image_shape(detector.recipe), torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8, generator=generator)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of torchvision, which is not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own way of saving: not for the caller
        program = torch.onnx.export(
            Program(detector, known).eval(),
            (noise.repeat_interleave(2, 3),),
            input_names=["images"],
            output_names=["maps", "scores", "p_values", "defect"],
            dynamic_shapes={"images": {0: "batch", 2: "height", 3: "width"}},
            dynamo=True,
            verbose=False,
        )
    model = program.model_proto
    model.producer_name = RESULT
    about = {"images": "uint8 (batch, 3, height, width), RGB, any height and width"}
    about |= {"opset": model.opset_import[0].version, "ir_version": model.ir_version}
    about |= {"threshold": known.threshold}
    for name, value in about.items():
        model.metadata_props.add(key=name, value=str(value))
    data = model.SerializeToString()
    found = onnxruntime.InferenceSession(data).run(None, {"images": noise.numpy()})
    pairs = zip(map(torch.from_numpy, found[:2]), detector(noise), strict=True)
    difference = max(float(((there - here).abs() / here.max()).max()) for there, here in pairs)
    if not difference <= AGREES:  # nor where it is NaN
        raise InputError(f"--export {path}: the program differs from the model by {difference:g}")
    write_whole(path, lambda file: file.write(data))
    say(f"{path}: uint8 RGB of any size, {known.text}, differs by {difference:.1e} on noise")


# ---- 6. Commands: what a user types. Each calls the rooms above ----------------------------------
EFFECTIVE = {  # each command, and the options that have an effect on it
    ("run", "data"): ("category", "weights", "device", "fpr", "threshold", "maps", "save_maps"),
    ("model",): ("weights", "fpr", "threshold"),
    ("model", "export"): ("weights", "fpr", "threshold"),
    ("model", "image"): ("weights", "fpr", "threshold", "device"),
    ("model", "image", "out"): ("weights", "fpr", "threshold", "device", "maps", "resume"),
}


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    add_common_options(parser)
    add = parser.add_argument
    add("--run", metavar="DIR", help="what train.py wrote: its table again")
    add("--model", metavar="FILE", help="a model.pt, for --image or --export")
    add("--image", metavar="PATH", help="an image, or a folder of images")
    add("--out", metavar="DIR", help="of --image: a folder for scores.csv and pictures")
    add("--resume", action="store_true", help="of --image with --out: go on with what is there")
    add("--export", metavar="FILE", help="the model as a program: FILE.onnx")
    args = parser.parse_args(argv)
    check_options(args)
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    command = tuple(c for c in ("run", "data", "model", "export", "image", "out") if c in given)
    if command not in EFFECTIVE:
        raise InputError("give --run and --data, or --model, alone or with --image or --export")
    for name in sorted(given - {*command, *EFFECTIVE[command]}):
        raise InputError(f"--{name.replace('_', '-')}: has no effect with --{command[-1]}")
    if args.run:
        return evaluate_run(args)
    if args.image:
        return score_files(args)
    detector = load_model(args.model, "cpu", args.weights)
    known = calibration_of(detector, args.fpr, args.threshold)
    if args.export:
        return export_model(Path(args.export), detector, known)
    say(known.text)
    print_thresholds(known, np.zeros(0), [])


def evaluate_run(args: argparse.Namespace) -> None:
    """The table again from the models under --run: the data set's folder or the --out above it.

    Of other test images than the run's own it goes into a folder of its own, below that.
    """
    device, rows = pick_device(args.device), []
    name, categories = read_dataset(args.data, args.category)
    folder = Path(args.run)
    folder = out = folder / name if (folder / name).is_dir() else folder
    had = [read_json(inside(folder, category.name) / FINISHED)["test"] for category in categories]
    digests = [digest_of_files(category.test) for category in categories]
    if digests != had:
        out = folder / f"on-{name}-{zlib.crc32(encoded(''.join(digests))):08x}"
        say(f"note: other test images than those of the run: into {out}", sys.stderr)
    with locked(out):
        for category in categories:
            began, place = time.monotonic(), inside(out, category.name)
            detector = load_model(folder / category.name / "model.pt", device, args.weights)
            test = extract(detector, [item.path for item in category.test])
            rows.append(report(place, category, detector, test, args, began))
        write_tables(out, rows)
    say(f"tables and pictures: {out}")


STATE = "state.pt"  # of a training that has begun
FINISHED = "recipe.json"  # of a category: settings and results; written last


def digest_of_files(items: list) -> str:
    """Of paths, or of items and their masks: their folders, names and checksums."""
    paths = []
    for item in items:
        paths += [item.path, *(item.masks or ())] if isinstance(item, Item) else [item]
    digest = hashlib.sha256()
    for path in paths:
        with unreadable(path):
            checksum = zlib.crc32(path.read_bytes())
        digest.update(encoded(f"{path.parent.name}/{path.name}:{checksum}\n"))
    return digest.hexdigest()[:16]


def report(folder: Path, category: Category, detector, test: tuple, args, began: float) -> dict:
    """Score a category's test images, print and write what comes of it; the row of metrics.

    test: what extract gives of them.
    """
    (features, sizes, _), items = test, category.test
    known = calibration_of(detector, args.fpr, args.threshold)
    maps, scores = torch.zeros(0, 1, 1), torch.zeros(0)
    if features is not None:
        maps, scores = detector.score(features)
    found = classify(scores.numpy(), known)
    say(f"{category.name}: {known.text}")
    print_thresholds(known, scores.numpy(), [item.kind for item in items])
    scored = maps, found, sizes
    row = measure(category, scored, detector.reading.ignore)
    row["seconds"] = round(time.monotonic() - began, 1)
    names = [name.as_posix() for name in names_of(items)]
    rows = [score_row(n, i.kind, p) for n, i, p in zip(names, items, found, strict=True)]
    write_csv(folder / "scores.csv", SCORES, rows)
    if args.save_maps:
        write_maps(folder, category, maps, sizes)
    write_pictures(folder, category, scored, known, detector.reading.white_level, args.maps)
    return row


def score_files(args: argparse.Namespace) -> None:
    """Print score, p-value and verdict of one image, or of each under a folder; --out keeps them.

    A damaged image costs one line and, at the end, exit code 2.
    """
    image, out = Path(args.image), args.out and Path(args.out)
    if not image.exists():
        raise InputError(f"{image}: no such file or folder: give --image an image or a folder")
    if out and out.suffix.lower() in (".csv", *SUFFIXES):
        raise InputError(f"--out {out}: give a folder, for scores.csv and the pictures")
    if out and Path(os.path.realpath(out)).is_relative_to(os.path.realpath(image)):
        raise InputError(f"--out {out}: lies in the folder of the images: give another")
    detector = load_model(args.model, pick_device(args.device), args.weights)
    known = calibration_of(detector, args.fpr, args.threshold)
    root, paths = (image, images_under(image)) if image.is_dir() else (image.parent, [image])
    others = [path for path in all_files(image) if path.suffix.lower() not in SUFFIXES]
    say_unread(image.resolve().name, others)
    if not paths:
        raise InputError(f"{image}: no images in this folder ({', '.join(SUFFIXES)})")
    say(known.text)
    images = {harmless(path.relative_to(root).as_posix()): path for path in paths}
    about = {"threshold": f"{known.threshold:.9g}", "folder": os.path.realpath(root)}
    about["model"] = f"{zlib.crc32(Path(args.model).read_bytes()):08x}"
    table = growing_table(out, images, about, args.resume) if out else None
    failed, flagged = 0, 0
    with table or contextlib.nullcontext(([*images], None)) as (names, add):
        found = predictions_of(detector, [images[name] for name in names], known)
        for name, (prediction, y, _) in zip(names, found, strict=True):
            if isinstance(prediction, InputError):
                failed += 1
                say(f"error: {prediction}", sys.stderr)
            else:
                flagged += prediction.verdict == "defect"
                words = in_words(prediction)
                say(f"{name}  {words}")
                if out and args.maps != "none":
                    row = images[name], None, y, f"{words}:  {name}"
                    white = detector.reading.white_level
                    draw(inside(out, f"{name}.png"), draw_rows, [row], known, white)
            if out:  # last: --resume has both
                add(score_row(name, "", prediction))
    if flagged > max(len(names) / 2, 5):  # fewer may well all be defective
        text = "or are light, camera or compression not those of training?"
        say(f"note: {flagged} of {len(names)} images are defective: {text}", sys.stderr)
    if failed:
        say(f"{failed} of {len(names)} images have no score", sys.stderr)
        sys.exit(2)


class OneLineParser(argparse.ArgumentParser):
    def __init__(self, **options):
        # No option cut short: --image would be --image-size in train.py.
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise InputError(f"{message} (see --help)")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """What train.py and evaluate.py share."""
    add = parser.add_argument
    add("--data", metavar="DIR", help="data set or one category of it (train.py: else a demo)")
    add("--category", nargs="+", action="extend", default=[], metavar="NAME", help="only these")
    add("--weights", metavar="FILE", help="of the backbone (default: its own)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    text = "false positive rate of the threshold; 0: the highest good training score (default: 1)"
    add("--fpr", type=float, default=1.0, metavar="PERCENT", help=text)
    text = "tail or rank of the good scores, or a score (default: tail)"
    add("--threshold", type=literal, default="tail", metavar="HOW", help=text)
    text = "pictures of test images: all, or those that tell most (default: worst)"
    add("--maps", choices=("all", "worst", "none"), default="worst", help=text)
    add("--save-maps", action="store_true", help="float32 TIFF maps as MVTec's script reads them")


def literal(text: str) -> Any:
    """The Python value that a text is, or the text itself."""
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return text


def check_options(args: argparse.Namespace) -> None:
    """Raises InputError for what argparse lets pass."""
    check_threshold(args.fpr, args.threshold)
    if args.fpr != 1 and not isinstance(args.threshold, str):
        raise InputError("--fpr: has no effect with --threshold NUMBER")
    for name, value in vars(args).items():
        if value == "":
            raise InputError(f"--{name.replace('_', '-')} is empty: give a path")


def exit_cleanly(main: Callable) -> None:
    """Run main as a command; what the user can mend ends as one line on stderr and exit code 2."""
    keep_memory()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):  # a name that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
        sys.stdout.flush()
        return
    except InputError as e:
        message = str(e)
    except KeyboardInterrupt:
        say("interrupted: with --resume train.py and --image go on", sys.stderr)
        sys.exit(130)
    except OSError as e:  # what reading and writing do not name themselves, like a closed folder
        name = e.filename or "standard output"
        message = f"{name}: {e.strerror or e}: check the path, its space and its permissions"
        if e.filename is None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):  # the reader of stdout, like head, has had enough
            sys.exit(141)
    except (MemoryError, RuntimeError) as e:
        if not no_memory(e):
            raise
        message = "out of memory: give train.py a smaller --image-size, or more memory and --resume"
    say(f"error: {message}", sys.stderr)
    sys.exit(2)


def no_memory(e: Exception) -> bool:
    return isinstance(e, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(e)


def keep_memory() -> None:
    """Let glibc keep up to 1 GiB of freed memory, else each layer's block is paged in anew."""
    m_mmap_max, m_trim_threshold = -4, -1
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**30)


if __name__ == "__main__":
    exit_cleanly(main)
