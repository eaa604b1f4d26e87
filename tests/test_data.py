"""Every layout on a tiny folder with known counts; every kind of image file."""

import itertools
import json
import os
import shutil
import struct
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_mvtec, picture, run, save, succeeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import evaluate
import train
import wtflow
from evaluate import InputError, read_dataset, read_image, read_mask


def counts(category):
    kinds = [i.kind for i in category.test]
    return category.layout, len(category.train), {k: kinds.count(k) for k in sorted(set(kinds))}


def test_mvtec_root_and_one_category(tmp_path):
    make_mvtec(tmp_path / "set", ("bolt", "nut"))
    name, found = read_dataset(tmp_path / "set")
    assert name == "set" and [c.name for c in found] == ["bolt", "nut"]
    assert counts(found[0]) == ("MVTec AD", 6, {"good": 3, "dent": 3})
    name, (one,) = read_dataset(tmp_path / "set/nut")
    assert name == "set" and counts(one) == counts(found[1])
    assert [c.name for c in read_dataset(tmp_path / "set", ["nut"])[1]] == ["nut"]


def test_mvtec_without_masks_has_none(tmp_path):
    make_mvtec(tmp_path / "set")
    for p in (tmp_path / "set/bolt/ground_truth").rglob("*.png"):
        p.unlink()
    with pytest.raises(InputError, match="mask of 000.png is missing"):
        read_dataset(tmp_path / "set")
    os.removedirs(tmp_path / "set/bolt/ground_truth/dent")
    (category,) = read_dataset(tmp_path / "set")[1]
    assert all(i.masks is None for i in category.test if i.kind == "dent")


def test_visa(tmp_path):
    root, rows = tmp_path / "VisA", ["object,split,label,image,mask"]
    for k in range(5):
        name, part = f"candle/Data/Images/Normal/{k:04d}.JPG", "train" if k < 3 else "test"
        save(root / name, picture(k)[0])
        rows.append(f"candle,{part},normal,{name},")
    for k in range(2):
        image, mask = picture(9 + k, defect=True)
        name, truth = f"candle/Data/Images/Anomaly/{k}.JPG", f"candle/Data/Masks/Anomaly/{k}.png"
        save(root / name, image)
        save(root / truth, mask * (k + 1))
        rows.append(f"candle,test,anomaly,{name},{truth}")
    save(root / "split_csv/unused.png", picture(0)[0])
    (root / "split_csv/1cls.csv").write_text("\n".join(rows))
    name, (c,) = read_dataset(root)
    assert name == "VisA" and counts(c) == ("VisA", 3, {"good": 2, "anomaly": 2})
    _, union = evaluate.masks_of(c.test[-1], (40, 48))
    assert union.sum() == 12 * 14  # masks hold 1 and 2, not 255
    by_hand = "\r\n".join(rows).replace("/", "\\").replace("normal", "Normal")
    (root / "split_csv/1cls.csv").write_bytes(b"\xef\xbb\xbf" + by_hand.encode())
    assert read_dataset(root)[1] == [c]
    mixed = by_hand.replace("test,anomaly", "train,anomaly")
    (root / "split_csv/1cls.csv").write_text(mixed)
    assert counts(read_dataset(root)[1][0]) == ("VisA", 3, {"good": 2})
    (root / "split_csv/1cls.csv").write_text("\n".join(rows).replace(",", ";"))
    with pytest.raises(InputError, match="1cls.csv"):
        read_dataset(root)
    (root / "split_csv/1cls.csv").unlink()
    with pytest.raises(InputError, match="1cls.csv"):
        read_dataset(root)


def test_loco(tmp_path):
    root = tmp_path / "loco/juice"
    make_mvtec(tmp_path / "loco", ("juice",))
    for kind, n in (("logical_anomalies", 2), ("structural_anomalies", 1)):
        for k in range(n):
            image, mask = picture(70 + k, defect=True)
            save(root / f"test/{kind}/{k:03d}.png", image)
            for r in range(2):
                save(root / f"ground_truth/{kind}/{k:03d}/{r:03d}.png", mask * (255 - r))
    for folder in ("test/dent", "ground_truth/dent"):
        for p in (root / folder).iterdir():
            p.unlink()
        (root / folder).rmdir()
    save(root / "validation/good/000.png", picture(1)[0])
    with pytest.raises(InputError, match="defects_config.json"):
        read_dataset(tmp_path / "loco")
    keys = ("defect_name", "pixel_value", "saturation_threshold", "relative_saturation")
    defects = [("d255", 255, 0.5, True), ("d254", 254, 20, False)]
    config = json.dumps([dict(zip(keys, defect, strict=True)) for defect in defects])
    (root / "defects_config.json").write_text(config)
    (c,) = read_dataset(tmp_path / "loco")[1]
    kinds = {"good": 3, "logical_anomalies": 2, "structural_anomalies": 1}
    assert counts(c) == ("MVTec LOCO AD", 6, kinds)
    regions, _ = evaluate.masks_of(c.test[-1], (40, 48), c.saturation)
    assert [saturates_at for *_, saturates_at in regions] == [84, 20]


def test_mvtec_3d(tmp_path, capsys):
    root = tmp_path / "3d/bagel"
    images = {"train/good": 4, "validation/good": 2, "test/good": 2, "test/hole": 3}
    for part, n in images.items():
        for k in range(n):
            image, mask = picture(k, defect=part == "test/hole")
            save(root / part / f"rgb/{k:03d}.png", image)
            save(root / part / f"gt/{k:03d}.png", mask * 255)
            (root / part / "xyz").mkdir(exist_ok=True)
    (c,) = read_dataset(tmp_path / "3d")[1]
    assert counts(c) == ("MVTec 3D-AD", 4, {"good": 2, "hole": 3})
    assert all(i.masks for i in c.test if i.kind == "hole")
    assert not capsys.readouterr().err
    (root / "test/hole/rgb/notes.txt").write_text("")
    save(root / "test/crack/000.png", picture(0)[0])
    assert read_dataset(tmp_path / "3d")[1] == [c]
    said = capsys.readouterr().err
    assert "not read: rgb/notes.txt" in said and "folders without rgb are not read: crack" in said


def test_folder_of_good_images(tmp_path):
    for k in range(3):
        save(tmp_path / f"parts/mine/{k}.jpg", picture(k)[0])
    name, (c,) = read_dataset(tmp_path / "parts/mine")
    assert (name, c.name) == ("parts", "mine") and counts(c) == ("folder of good images", 3, {})


def test_folders_that_fit_no_layout(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_dataset(tmp_path / "absent")
    with pytest.raises(InputError, match="looked for train/good"):
        read_dataset(tmp_path)
    (tmp_path / "x/train/good").mkdir(parents=True)
    with pytest.raises(InputError, match="no training images"):
        read_dataset(tmp_path)


RGB = picture(0, size=(12, 20), defect=False)[0].astype(np.uint8)


MODES = "L.png RGB.bmp RGBA.png LA.png P.png 1.png CMYK.jpg CMYK.tif L.tiff"


@pytest.mark.parametrize("name", MODES.split())
def test_colour_modes_become_rgb(tmp_path, name):
    mode = name.split(".")[0]
    converted = Image.fromarray(RGB).convert(mode)
    converted.save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB" and image.size == (20, 12)
    if mode not in ("1", "CMYK"):
        expected = np.asarray(converted.convert("RGB"), int)
        assert np.abs(np.asarray(image, int) - expected).max() <= 1


def test_alpha_is_dropped_not_blended(tmp_path):
    save(tmp_path / "a.png", np.dstack([RGB, np.zeros(RGB.shape[:2])]))
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), RGB)


def test_16_bit_and_float_images_are_scaled(tmp_path):
    grey = np.minimum(RGB[..., 0], 254)
    deep = grey.astype(np.uint16) * 257 + 40  # 40 of 65535 is below rounding, not modulo 256
    Image.fromarray(deep).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png"))[..., 0], grey)
    for name, scale in (("b.tiff", 1.0), ("c.tiff", 255.0)):
        Image.fromarray((RGB[..., 0] / scale).astype(np.float32)).save(tmp_path / name)
        assert np.array_equal(np.asarray(read_image(tmp_path / name))[..., 0], RGB[..., 0])


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_smaller_and_looks_the_same(tmp_path, orientation):
    """Of 1300 x 900 for 160 x 112 pixels a half is enough, a quarter is less than twice 160 high.

    Within four grey levels of what all pixels give, a third on average; its size is as it is shown.
    """
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (45, 65, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    coarse.resize((1300, 900), Image.BICUBIC).save(path, quality=92, exif=exif)
    size = (900, 1300) if orientation == 1 else (1300, 900)
    shape = (112, 160) if orientation == 1 else (160, 112)
    assert evaluate.open_image(path, 320).size == (650, 450)
    assert evaluate.open_image(path, 110).size == (163, 113)
    assert evaluate.open_image(path).size == (1300, 900)
    pixels, full_size = evaluate.read_resized(path, shape)
    assert full_size == size and pixels.shape == (*shape, 3)
    whole = np.asarray(read_image(path).resize(shape[::-1], Image.BILINEAR), int)
    assert 0 < abs(pixels - whole).max() <= 4
    assert abs(pixels - whole).mean() < 0.33


def test_exif_orientation_is_applied_to_the_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, shown upright: the mask is drawn on what is shown
    Image.fromarray(RGB).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (12, 20)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.tif")), RGB)


def test_masks_of_three_channels_and_odd_values(tmp_path):
    mask = np.zeros((12, 20), np.uint8)
    mask[3:5, 4:9] = 7
    Image.fromarray(mask).save(tmp_path / "grey.png")
    save(tmp_path / "rgb.png", np.dstack([0 * mask, mask, 0 * mask]))
    save(tmp_path / "rgba.png", np.dstack([mask, mask, mask, 0 * mask + 255]))
    for name in ("grey", "rgb", "rgba"):
        assert np.array_equal(read_mask(tmp_path / f"{name}.png", (12, 20)) != 0, mask > 0)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(["png", "jpg", "bmp", "tif"]),
    cut=st.floats(0, 1),
    flips=st.lists(st.floats(0, 1), max_size=4),
)
def test_damaged_files_are_read_or_refused_by_name(tmp_path, suffix, cut, flips):
    """Truncated at any offset, flipped bytes: an RGB image, or one InputError with the name."""
    path = tmp_path / f"x.{suffix}"
    save(path, RGB)
    blob = bytearray(path.read_bytes())
    for f in flips:
        blob[int(f * (len(blob) - 1))] ^= 0x5A
    path.write_bytes(bytes(blob[: int(cut * len(blob)) if cut < 0.9 else None]))
    try:
        assert read_image(path).mode == "RGB"
    except InputError as e:
        assert str(path) in str(e) and "\n" not in str(e)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mode=st.sampled_from(["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16", "F"]),
    suffix=st.sampled_from(["png", "tif", "bmp", "txt"]),
    fill=st.sampled_from([0, 1, 7, 255]),
    size=st.sampled_from([(12, 20), (20, 12), (1, 1), (12, 21)]),
    cut=st.sampled_from([None, None, 0, 30, 0.5, 0.95]),
)
def test_hostile_masks_are_read_as_regions_or_refused_by_name(
    tmp_path, mode, suffix, fill, size, cut
):
    a = np.zeros(size, np.uint8)
    a[: size[0] // 2] = fill
    path = tmp_path / f"mask.{suffix}"
    try:
        if mode == "I;16":
            image = Image.fromarray(a.astype(np.uint16))
        elif mode == "P":
            image = Image.fromarray(a, "P")
        else:
            image = Image.fromarray(a).convert(mode)
        image.save(path, format={"txt": "PNG", "tif": "TIFF"}.get(suffix, suffix.upper()))
    except OSError:  # a format without this mode: a file of another kind under the name
        path.write_text("mask")
    blob = path.read_bytes()
    kept = int(cut * len(blob)) if isinstance(cut, float) else cut
    path.write_bytes(blob[:kept])
    try:
        regions, union = evaluate.masks_of(evaluate.Item(path, "dent", (path,)), (12, 20))
    except InputError as e:
        assert str(path) in str(e) and "\n" not in str(e)
    else:
        assert size == (12, 20) and union.dtype == bool and len(regions) == bool(union.any())
        if mode not in ("CMYK", "1"):
            assert np.array_equal(union, a > 0)


PIECES = [
    "train/good/0.png",
    "train/good/dir.png/",
    "train/good/link.png",
    "train/good/größe 部品.PNG",
    "train/good/.hidden.png",
    "train/good/a.txt",
    "train/good/" + "n" * 200 + ".png",
    "train/",
    "test/good/0.png",
    "test/dent/0.png",
    "test/dent/",
    "ground_truth/dent/0_mask.png",
    "ground_truth/dent/0_mask.png/",
    "ground_truth/",
    "defects_config.json",
    "test/logical_anomalies/0.png",
    "Data/Images/Normal/0.JPG",
    "../split_csv/1cls.csv",
    "train/good/rgb/0.png",
    "test/good/rgb/0.png",
    "0.png",
    "train/good/0.jpg",
]


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.sets(st.sampled_from(PIECES), max_size=9), whole=st.booleans())
def test_hostile_folders_are_read_or_refused_by_name(tmp_path, pieces, whole):
    """Any mixture of layouts, links, empty files and folders with the names of images.

    Categories, or one line that names a path.
    """
    shutil.rmtree(tmp_path / "set", ignore_errors=True)
    root = tmp_path / "set/part"
    root.mkdir(parents=True)
    for piece in sorted(pieces):
        path = root / piece
        if any(p.is_file() for p in path.parents) or path.exists():
            continue
        folder = path if piece.endswith("/") else path.parent
        folder.mkdir(parents=True, exist_ok=True)
        if piece.endswith("link.png"):
            path.symlink_to("nowhere.png")
        elif folder != path:
            path.write_bytes(b"")
    try:
        _, categories = read_dataset(root.parent if whole else root)
        assert categories and all(c.train for c in categories)
        for c in categories:
            for p in [*c.train, *(i.path for i in c.test)]:  # all are empty or dangling links
                with pytest.raises(InputError, match="cannot be read") as e:
                    read_image(p)
                assert str(p) in str(e.value)
    except InputError as e:
        assert str(tmp_path) in str(e) and "\n" not in str(e)


def test_truncation_is_always_refused(tmp_path):
    for suffix in ("png", "jpg", "bmp"):
        path = tmp_path / f"x.{suffix}"
        save(path, np.random.default_rng(0).integers(0, 255, (40, 40, 3)))
        blob = path.read_bytes()
        for cut in (0, 1, 10, len(blob) // 2, len(blob) * 9 // 10):
            path.write_bytes(blob[:cut])
            with pytest.raises(InputError, match=f"x.{suffix}"):
                read_image(path)


def test_links_folders_and_names(tmp_path):
    save(tmp_path / "d/größe 部品 (1).PNG", RGB)
    save(tmp_path / f"d/{'n' * 200}.png", RGB)
    (tmp_path / "d/folder.png").mkdir()
    (tmp_path / "d/.hidden.png").write_bytes(b"")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "d/link.png")
    found = evaluate.images_in(tmp_path / "d")
    assert len(found) == 3
    with pytest.raises(InputError, match="link.png"):
        [read_image(p) for p in found]


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    save(tmp_path / "x.png", RGB)
    for limit in (200, 100):  # Pillow warns above its limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match="x.png"):
            read_image(tmp_path / "x.png")


def test_extreme_shapes_reach_the_network_size(tmp_path):
    save(tmp_path / "a.png", np.zeros((1, 1, 3)))
    save(tmp_path / "b.png", np.zeros((1, 20000, 3)))
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    ((images, sizes),) = evaluate.batches_of(paths, (64, 128))
    assert images.shape == (2, 3, 64, 128) and sizes == [(1, 1), (1, 20000)]
    assert evaluate.image_sizes(paths) == sizes


def test_the_next_batch_is_read_while_one_is_worked_on(monkeypatch):
    images = [np.full((4, 6, 3), k, np.uint8) for k in range(2 * evaluate.BATCH + 3)]
    as_image, last_of_second = evaluate.as_image, threading.Event()

    def noted(image, *options, **named):
        if image.max() == 2 * evaluate.BATCH - 1:
            last_of_second.set()
        return as_image(image, *options, **named)

    monkeypatch.setattr(evaluate, "as_image", noted)
    batches = evaluate.batches_of(images, (4, 6))
    first, sizes = next(batches)
    assert last_of_second.wait(timeout=60) and sizes == [(4, 6)] * evaluate.BATCH
    read = torch.cat([first, *(part for part, _ in batches)])
    assert read[:, 0, 0, 0].tolist() == [*range(len(images))]


def test_sizes_from_the_header_are_those_of_the_picture_as_shown(tmp_path):
    for orientation, suffix in itertools.product((1, 3, 6, 8), ("jpg", "png", "tif")):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        Image.fromarray(RGB).save(path, exif=exif)
        assert read_image(path).size == ((12, 20) if orientation >= 5 else (20, 12))
        assert evaluate.image_sizes([path]) == [read_image(path).size[::-1]]
    (tmp_path / "x.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match="x.png"):
        evaluate.image_sizes([tmp_path / "x.png"])


# ---- folders, masks and grey levels as people have them ------------------------------------------
def renamed(root, old, new):
    (root / new).parent.mkdir(parents=True, exist_ok=True)
    (root / old).rename(root / new)
    return root


@pytest.mark.parametrize("name", ["ok", "OK", "Good", "normals", "io", "Defect-Free"])
def test_good_images_under_another_name_are_good(tmp_path, capsys, name):
    root = make_mvtec(tmp_path / "d") / "bolt"
    renamed(renamed(root, "train/good", f"train/{name}"), "test/good", f"test/{name}")
    (c,) = read_dataset(tmp_path / "d")[1]
    assert counts(c)[1:] == (6, {"good": 3, "dent": 3})
    assert f"{name}: taken as good images" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["good_monday", "ok-2", "normal.1", "all ok"])
def test_folders_that_may_be_good_or_not_are_refused(tmp_path, name):
    root = make_mvtec(tmp_path / "d") / "bolt"
    save(root / "test" / name / "000.png", picture(9)[0])
    with pytest.raises(InputError, match=f"{name}: good images, or a defect"):
        read_dataset(tmp_path / "d")


def test_what_is_called_as_in_train_is_good(tmp_path):
    root = renamed(make_mvtec(tmp_path / "d") / "bolt", "test/good", "test/fine")
    (c,) = read_dataset(renamed(root, "train/good", "train/fine"))[1]
    assert counts(c)[1:] == (6, {"dent": 3, "good": 3})
    shutil.copytree(root / "train/fine", root / "train/new")
    with pytest.raises(InputError, match="which of fine, new holds the good images"):
        read_dataset(root)
    renamed(renamed(root, "train", "x"), "x/fine", "train")
    renamed(root, "test/fine", "test/ok")
    (c,) = read_dataset(root)[1]  # images right in train
    assert counts(c)[1:] == (6, {"dent": 3, "good": 3})


def test_defects_are_never_taken_for_good_images(tmp_path):
    for kind in ("good", "bad"):
        save(tmp_path / f"d/nut/{kind}/0.png", picture(1)[0])
    for data in (tmp_path / "d", tmp_path / "d/nut"):
        with pytest.raises(InputError, match="good images beside bad"):
            read_dataset(data)
    save(tmp_path / "e/masks/0.png", picture(1)[0])
    save(tmp_path / "e/nut/0.png", picture(1)[0])
    with pytest.raises(InputError, match="no category here"):
        read_dataset(tmp_path / "e")
    shutil.rmtree(tmp_path / "d/nut/bad")
    assert counts(read_dataset(tmp_path / "d/nut")[1][0])[1] == 1
    save(tmp_path / "d/nut/good/0_label.bmp", picture(1)[0])  # KolektorSDD
    with pytest.raises(InputError, match="0_label.bmp is the mask of an image"):
        read_dataset(tmp_path / "d")


@pytest.mark.parametrize("place", ["test/ground_truth/dent", "test/dent/Masks"])
def test_folders_of_masks_in_test_are_no_defects(tmp_path, place):
    root = renamed(make_mvtec(tmp_path / "d") / "bolt", "ground_truth/dent", place)
    renamed(root, "ground_truth", "labels/x")
    (c,) = read_dataset(root)[1]
    found = [item.masks[0].parent for item in c.test if item.kind == "dent"]
    assert counts(c)[2] == {"good": 3, "dent": 3} and found == [root / place] * 3


def test_folders_of_a_category_that_are_not_read_are_named(tmp_path, capsys):
    root = renamed(make_mvtec(tmp_path / "d") / "bolt", "ground_truth", "labels")
    assert all(item.masks is None for item in read_dataset(root)[1][0].test if item.kind == "dent")
    assert "bolt: folders that are not read: labels" in capsys.readouterr().err


def test_images_lie_deeper_and_what_is_not_read_is_named(tmp_path, capsys):
    root = make_mvtec(tmp_path / "d") / "bolt"
    for k, suffix in enumerate((".webp", ".gif", ".PNG", ".ppm")):
        save(root / f"train/good/day2/x{k}{suffix}", picture(k)[0])
    save(root / "train/good/j.jfif", picture(7)[0], format="JPEG")
    image, mask = picture(8, defect=True)
    save(root / "test/dent/day2/a.png", image)
    save(root / "ground_truth/dent/day2/a_mask.png", mask * 255)
    (root / "test/dent/readme.txt").write_text("x")
    (root / "train/good/b.heic").write_text("x")
    (root / "train/good/Thumbs.db").write_text("x")
    (c,) = read_dataset(tmp_path / "d")[1]
    assert counts(c)[1:] == (11, {"good": 3, "dent": 4})
    assert evaluate.masks_of(c.test[3], (40, 48))[1].sum() == mask.sum()
    said = capsys.readouterr().err
    assert "bolt: 2 files are not read: good/b.heic, dent/readme.txt (.heic, .txt)" in said


def test_a_link_back_to_a_folder_above_ends(tmp_path):
    root = make_mvtec(tmp_path / "d") / "bolt"
    (root / "train/good/loop").symlink_to(root / "train", target_is_directory=True)
    assert len(read_dataset(root)[1][0].train) == 6


def test_a_mask_is_not_that_of_an_image_of_the_same_number_in_another_folder(tmp_path):
    root = make_mvtec(tmp_path / "d") / "bolt"
    save(root / "test/dent/day2/000.png", picture(3)[0])
    with pytest.raises(InputError, match="day2/000_mask.png: mask of 000.png is missing"):
        read_dataset(root)
    save(root / "test/dent/day2/070.png", picture(3)[0])
    (root / "test/dent/day2/000.png").unlink()
    truth = root / "ground_truth/dent"
    (truth / "002_mask.png").rename(truth / "070_mask.png")
    (root / "test/dent/002.png").unlink()
    (one,) = [i for i in read_dataset(root)[1][0].test if i.path.name == "070.png"]
    assert one.masks == (truth / "070_mask.png",)  # flat masks for deeper images of other names
    save(root / "test/dent/day1/070.png", picture(3)[0])
    with pytest.raises(InputError, match="day1/070.png or of .*day2/070.png"):
        read_dataset(root)


def test_what_lies_beside_the_categories_is_named_and_never_trained_on(tmp_path, capsys):
    make_mvtec(tmp_path / "d", ("bolt", "nut"))
    save(tmp_path / "d/overview.png", picture(1)[0])
    save(tmp_path / "d/washer/1.png", picture(1)[0])
    name, found = read_dataset(tmp_path / "d")
    assert name == "d" and [counts(c)[:2] for c in found] == [("MVTec AD", 6)] * 2
    said = capsys.readouterr().err
    assert "2 are not read: washer/ (no train/good), overview.png" in said
    save(tmp_path / "x/test/dent/1.png", picture(1)[0])
    save(tmp_path / "x/1.png", picture(1)[0])
    with pytest.raises(InputError, match="images beside test: put the good ones under train/good"):
        read_dataset(tmp_path / "x")


def test_train_and_test_in_capitals_and_no_folder_that_says_good(tmp_path, capsys):
    root = make_mvtec(tmp_path / "d") / "bolt"
    renamed(renamed(root, "train", "Train"), "test", "TEST")
    shutil.rmtree(root / "ground_truth")
    assert counts(read_dataset(root)[1][0])[1:] == (6, {"good": 3, "dent": 3})
    renamed(root, "TEST/good", "TEST/gut")
    assert counts(read_dataset(root)[1][0])[2] == {"gut": 3, "dent": 3}
    assert "all of dent, gut are taken as defects" in capsys.readouterr().err


MASKS = "0.PNG 0_mask.PNG 0.tif 0_gt.png 0_GT.bmp 0_Mask.jpg 0_seg.gif mask_0.png"


@pytest.mark.parametrize("name", MASKS.split())
@pytest.mark.parametrize("truth", ["Ground Truth", "masks", "GT"])
def test_masks_are_found_under_any_usual_name(tmp_path, name, truth):
    root = make_mvtec(tmp_path / "d", bad=1) / "bolt"
    old = root / "ground_truth/dent/000_mask.png"
    mask = np.asarray(Image.open(old))
    old.unlink()
    save(root / "ground_truth/dent" / name.replace("0", "000"), mask)
    renamed(renamed(root, "ground_truth", "x"), "x", truth)
    (c,) = read_dataset(tmp_path / "d")[1]
    assert evaluate.masks_of(c.test[0], (40, 48))[1].sum() == (mask > 0).sum()


def test_masks_beside_their_images_are_no_images(tmp_path):
    root = make_mvtec(tmp_path / "d") / "bolt"
    for path in sorted((root / "ground_truth/dent").iterdir()):
        path.rename(root / "test/dent" / path.name.replace("_mask", "_GT"))
    (root / "ground_truth/dent").rmdir()
    (root / "ground_truth").rmdir()
    (c,) = read_dataset(tmp_path / "d")[1]
    assert counts(c)[2] == {"good": 3, "dent": 3}
    assert [m.name for item in c.test[:3] for m in item.masks] == [f"00{k}_GT.png" for k in "012"]


def test_images_of_one_stem_are_two_with_a_mask_each(tmp_path, capsys):
    root = make_mvtec(tmp_path / "d", bad=1) / "bolt"
    save(root / "test/dent/000.jpg", picture(3)[0])
    (c,) = read_dataset(tmp_path / "d")[1]
    assert counts(c)[2] == {"good": 3, "dent": 2}
    assert "000_mask.png: taken as the mask of 000.jpg and of 000.png" in capsys.readouterr().err
    for other in ("000_mask.jpg", "000.jpg.png", "000_jpg_mask.png"):  # each goes before the last
        save(root / "ground_truth/dent" / other, picture(3, defect=True)[1] * 255)
        (c,) = read_dataset(tmp_path / "d")[1]
        found = {i.path.name: i.masks[0].name for i in c.test if i.masks}
        assert found == {"000.jpg": other, "000.png": "000_mask.png"}
    evaluate.save_maps(tmp_path, c, torch.arange(5.0)[:, None, None].expand(5, 4, 4), [(4, 4)] * 5)
    for k, item in enumerate(c.test[:2]):
        written = tmp_path / f"anomaly_maps/bolt/test/dent/{item.path.name}.tiff"
        assert (np.asarray(Image.open(written)) == k).all()


def test_masks_that_are_no_plain_masks_are_read_and_named(tmp_path, capsys):
    mask = picture(0, defect=True)[1]
    rng = np.random.default_rng(0)
    noisy = np.where(mask, 249, 0) + rng.integers(0, 7, mask.shape)
    save(tmp_path / "noisy.png", noisy)
    few = np.where(mask, 254, 0) + (noisy % 2)  # values 0, 1, 254, 255
    save(tmp_path / "b/few.png", few)
    save(tmp_path / "b/more.png", few)
    (tmp_path / "c").mkdir()
    Image.fromarray((noisy / 255).astype(np.float32)).save(tmp_path / "c/float.tif")
    save(tmp_path / "labels.png", mask * np.where(np.arange(48) > 18, 255, 90))
    save(tmp_path / "inverted.png", 255 * ~mask)
    palette = Image.fromarray((~mask).astype(np.uint8), "P")
    palette.putpalette([255, 255, 255, 0, 0, 0])  # defective white is index 0
    palette.save(tmp_path / "palette.png")
    save(tmp_path / "visa.png", mask * 4)
    plain = ("noisy.png", "b/few.png", "b/more.png", "c/float.tif", "labels.png")
    plain += ("palette.png", "visa.png")
    read = {n: read_mask(tmp_path / n, mask.shape) != 0 for n in plain}
    assert all((values == mask).all() for values in read.values())
    assert (read_mask(tmp_path / "inverted.png", mask.shape) != 0).sum() == (~mask).sum()
    said = capsys.readouterr().err
    names = ("noisy.png", "few.png", "float.tif", "inverted.png", "palette.png")
    words = ("grey values", "grey values", "grey values", "inverted?", "a palette")
    for name, word in zip(names, words, strict=True):
        assert sum(name in line and word in line for line in said.splitlines()) == 1
    assert not any(name in said for name in ("visa", "labels", "more"))  # once in a folder


@pytest.mark.parametrize(
    "dtype, top, white",
    [
        (np.uint16, 1023, 1023),
        (np.uint16, 4000, 4095),
        (np.uint16, 16383, 16383),
        (np.uint16, 60000, 65535),
        (np.int32, 255, 255),
        (np.float32, 1.003, 1),
        (np.float32, 1.25, 1.25),
        (np.float32, 0.125, 0.125),
        (np.float32, 4095, 4095),
    ],
)
def test_grey_levels_fill_the_range_by_one_rule_for_a_data_set(tmp_path, dtype, top, white):
    ramp = np.linspace(0, top, 240).reshape(12, 20)
    paths = [tmp_path / f"{k}.tif" for k in range(2)]
    for path, scale in zip(paths, (1, 0.1), strict=True):
        Image.fromarray((ramp * scale).astype(dtype)).save(path)
    assert evaluate.grey_level(paths) == white
    dark = np.asarray(read_image(paths[1], white))[..., 0]
    expected = np.round(255.0 * (ramp * 0.1).astype(dtype) / white)
    assert np.abs(dark - expected).max() <= 1  # as dark beside the first as it was
    assert np.asarray(read_image(paths[0]))[..., 0].max() >= 230  # and alone never near black


def test_grey_levels_above_white_below_zero_and_turned_round(tmp_path, capsys):
    ramp = np.linspace(0, 4095, 240).reshape(12, 20)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "a.tif")
    cut = np.asarray(read_image(tmp_path / "a.tif", 1023))[..., 0]
    assert cut.max() == 255 and "cut at 1023" in capsys.readouterr().err
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "w.tif", tiffinfo={262: 0})
    turned = np.asarray(read_image(tmp_path / "w.tif"))[..., 0]
    assert turned[0, 0] == 255 and turned[-1, -1] == 0
    Image.fromarray((ramp - 2000).astype(np.int32)).save(tmp_path / "n.tif")
    with pytest.raises(InputError, match="down to -2000"):
        read_image(tmp_path / "n.tif")
    assert evaluate.grey_level([]) is None


def grey_files(folder, *arrays, **options):
    """Files 0.tif, 1.tif, ... of arrays; their paths."""
    paths = [folder / f"{k}.tif" for k in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(array).save(path, **options)
    return paths


def test_min_is_white_is_turned_about_the_white_level_of_the_data_set(tmp_path):
    ramp = np.linspace(0, 4095, 240).reshape(12, 20)
    arrays = [ramp.astype(np.uint16), (ramp / 5).astype(np.uint16)]  # the second below 1023
    paths = grey_files(tmp_path, *arrays, tiffinfo={262: 0})
    white = evaluate.grey_level(paths)
    first, second = (np.asarray(read_image(path, white), float)[..., 0] for path in paths)
    assert white == 4095 and np.abs((255 - second) - (255 - first) / 5).max() <= 1


def test_training_images_that_would_be_nearly_black_are_named(tmp_path, capsys):
    values = np.linspace(0, 4095, 30 * 40).reshape(30, 40).astype(np.uint16)
    hot = values.copy()
    hot[0, 0] = 65535
    assert evaluate.grey_level(grey_files(tmp_path, values, values, hot)) == 65535
    assert "to 4090, of 0 to the white level 65535" in capsys.readouterr().err
    assert evaluate.grey_level(grey_files(tmp_path, values, values)) == 4095
    radiance = (30000 + values / 8).astype(np.uint16)  # an offset, as of thermal cameras
    assert evaluate.grey_level(grey_files(tmp_path, radiance)) == 65535
    assert "2 of 256 grey levels" in capsys.readouterr().err


def test_later_images_far_from_the_white_level_are_named(tmp_path, capsys):
    values = np.linspace(0, 255, 240).reshape(12, 20)
    dim, over = grey_files(tmp_path, values.astype(np.uint16), (values + 4000).astype(np.uint16))
    assert np.asarray(read_image(dim, 4095.0)).max() == 16 and capsys.readouterr().err
    dim, over = grey_files(tmp_path, (values / 3).astype(np.uint16), (values * 17).astype("uint16"))
    read_image(dim, 4095.0), read_image(over, 4095.0)
    said = capsys.readouterr().err
    assert "0.tif: nearly black: values up to 85, white in training is 4095" in said
    assert "1.tif: values up to 4335 are cut at 4095, white in training" in said
    png = tmp_path / "8.png"
    save(png, RGB)
    assert evaluate.grey_level([png]) == 255


def test_colours_of_16_bits_that_are_read_nearly_black_are_named(tmp_path, capsys):
    deep = np.random.default_rng(0).integers(0, 4096, (12, 20, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", 20, 12, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    blob = b"\x89PNG\r\n\x1a\n"
    for name, part in chunks:
        blob += (
            struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        )
    (tmp_path / "rgb.png").write_bytes(blob)
    assert np.asarray(read_image(tmp_path / "rgb.png")).max() == 15
    assert "rgb.png: nearly black" in capsys.readouterr().err


def test_of_a_tiff_the_largest_page(tmp_path):
    large = Image.fromarray(np.full((30, 40), 4000, np.uint16))
    small = Image.fromarray(np.full((3, 4), 9, np.uint8))
    small.save(tmp_path / "a.tif", save_all=True, append_images=[large])
    assert read_image(tmp_path / "a.tif").size == (40, 30)
    assert evaluate.image_sizes([tmp_path / "a.tif"]) == [(30, 40)]
    assert evaluate.grey_level([tmp_path / "a.tif"]) == 4095


def test_the_white_level_is_kept_with_the_model(tmp_path):
    values = np.linspace(0, 4000, 64 * 64).reshape(64, 64)
    paths = grey_files(tmp_path, *[(values / k).astype(np.uint16) for k in (1, 2, 5)])
    detector = train.fit(paths, image_size=64, steps=2, base=8, folds=0)
    evaluate.save_model(tmp_path / "m.pt", detector)
    loaded = evaluate.load_model(tmp_path / "m.pt")
    assert detector.white == loaded.white == 4095.0
    by_level = evaluate.as_image(paths[2], 4095.0)
    one, other = (evaluate.score(loaded, image).score for image in (paths[2], by_level))
    assert one == other != evaluate.score(loaded, evaluate.as_image(paths[2])).score


def test_kolektor_sdd2_has_its_masks_beside_flat_images(tmp_path, capsys):
    for part, n in (("train", 5), ("test", 4)):
        for k in range(n):
            image, mask = picture(k, defect=k == 0)
            save(tmp_path / f"k/{part}/{k}.png", image)
            save(tmp_path / f"k/{part}/{k}_GT.png", mask * 255)
    (c,) = read_dataset(tmp_path / "k")[1]
    assert counts(c) == ("KolektorSDD2", 4, {"good": 3, "defect": 1})
    assert "1 defective images in train are left out" in capsys.readouterr().err
    save(tmp_path / "k/test/9_GT.png", mask * 255)
    assert counts(read_dataset(tmp_path / "k")[1][0])[2] == {"good": 3, "defect": 1}
    assert "k: 1 files are not read: test/9_GT.png" in capsys.readouterr().err
    with_alpha = np.dstack([np.zeros((40, 48, 3)), np.full((40, 48), 255)])
    save(tmp_path / "k/test/1_GT.png", with_alpha)  # opaque and black: defect-free
    assert counts(read_dataset(tmp_path / "k")[1][0])[2] == {"good": 3, "defect": 1}


def test_a_photograph_of_the_same_name_is_no_mask(tmp_path):
    make_mvtec(tmp_path)
    dent, truth = tmp_path / "bolt/test/dent", tmp_path / "bolt/ground_truth/dent"
    for k in range(3):
        (truth / f"{k:03d}_mask.png").rename(dent / f"{k:03d}_mask.png")
    save(dent / "001.bmp", picture(7, defect=True)[0])
    save(dent / "001_bmp_mask.png", picture(7, defect=True)[1] * 255)
    for path in (truth, truth.parent):
        path.rmdir()
    (c,) = read_dataset(tmp_path)[1]
    masks = {item.path.name: item.masks[0].name for item in c.test if item.kind == "dent"}
    assert masks["001.png"] == "001_mask.png" and masks["001.bmp"] == "001_bmp_mask.png"
    (dent / "001_mask.png").unlink()
    with pytest.raises(InputError, match="001_mask.png"):
        read_dataset(tmp_path)


def test_damaged_exif_is_named(tmp_path):
    """What Pillow raises when it writes the entries again without the orientation."""
    exif, path, refused = Image.Exif(), tmp_path / "a.jpg", 0
    exif[274], exif[282], exif[305] = 6, 2.5, "x"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path, exif=exif)
    whole = path.read_bytes()
    start = whole.index(b"Exif")
    for k, value in itertools.product(range(24, 40), (0, 1, 13)):  # of the second entry's head
        path.write_bytes(whole[: start + k] + bytes([value]) + whole[start + k + 1 :])
        try:
            evaluate.read_image(path)
        except InputError as e:
            refused += str(path) in str(e)
    assert refused > 1


def test_reasons_for_missing_figures_are_kept_apart():
    items = [evaluate.Item(Path("a.png"), "dent", None), evaluate.Item(Path("b.png"), "hole", ())]
    category = evaluate.Category("c", "MVTec AD", [], items, None)
    row = evaluate.measure(category, torch.zeros(2, 4, 4), np.zeros(2), [(4, 4)] * 2)
    assert row["why"] == (
        "no good test images: AUROC is not defined; "
        "1 defective images have no folder of masks: no pixel figures"
    )


def test_products_given_by_their_good_images_are_told_apart(tmp_path, capsys):
    for name in ("screw", "nut"):
        save(tmp_path / f"parts/{name}/train/good/0.png", picture(1)[0])
        save(tmp_path / f"only/{name}/0.png", picture(1)[0])
    for name in ("screw", "nut"):
        dataset, (c,) = read_dataset(tmp_path / f"parts/{name}/train/good")
        assert (dataset, c.name) == ("parts", name)
    save(tmp_path / "parts/bolt/train/good/day1/0.png", picture(1)[0])
    for deeper in ("train", "train/good", "train/good/day1"):
        dataset, (c,) = read_dataset(tmp_path / "parts/bolt" / deeper)
        assert (dataset, c.name) == ("parts", "bolt")
    assert [c.name for c in read_dataset(tmp_path / "only")[1]] == ["nut", "screw"]
    assert "taken as 2 products" in capsys.readouterr().err
    save(tmp_path / "half/test/dent/0.png", picture(1)[0])
    with pytest.raises(InputError, match="no category here"):
        read_dataset(tmp_path / "half")


def test_many_regions_take_their_own_boxes_alone(tmp_path):
    mask = np.zeros((600, 600), bool)
    mask[::20, ::20] = True
    mask[2:19, [2, 18]] = mask[18, 2:19] = True  # around nothing
    mask[10, 10] = True  # in its box
    Image.fromarray(np.uint8(mask) * 255).save(tmp_path / "m.png")
    regions, _ = evaluate.masks_of(evaluate.Item(None, "pore", (tmp_path / "m.png",)), mask.shape)
    assert sum(region.size for _, region, _ in regions) == 901 + 17 * 17
    assert sum(region.sum() for _, region, _ in regions) == mask.sum() and len(regions) == 902


def test_a_tall_strip_is_read(tmp_path):
    path = tmp_path / "strip.png"
    Image.new("1", (2048, 48000), 1).save(path)
    assert read_image(path).size == (2048, 48000)


def test_resolution_says_what_a_defect_needs():
    small = train.resolution(wtflow.Recipe(), [(384, 384)])
    assert "a cell of the map covers 8 x 8" in small and "--image-size" not in small
    large = train.resolution(wtflow.Recipe(aspect=0.75), [(1500, 2000)] * 3)
    assert "covers 36 x 36" in large and "--image-size, up to 864" in large


def test_files_of_a_folder_that_are_no_images_are_named_when_it_is_scored(trained, tmp_path):
    save(tmp_path / "in/day1/a.webp", picture(1)[0])
    np.save(tmp_path / "in/b.npy", picture(1)[0])
    table = ("--out", tmp_path / "in/scores.csv")
    command = ("evaluate.py", "--model", trained[0] / "bolt/model.pt", "--image", tmp_path / "in")
    result = succeeds(run(*command, *table))
    assert "in: 1 files are not read: in/b.npy (.npy)" in result.stderr
    assert "day1/a.webp" in result.stdout
    again = succeeds(run(*command, *table))  # the table of the first is no file that was left out
    assert "files are not read" not in again.stderr


def test_without_file_locks_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with train.locked(tmp_path / "a"):
        assert (tmp_path / "a").is_dir()
