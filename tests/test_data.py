"""Every layout on a tiny folder with known counts; every kind of image file."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_mvtec, picture, save
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
    assert all(len(i.masks) == (i.kind == "dent") for i in one.test)
    shutil.rmtree(tmp_path / "set/nut/ground_truth")
    (one,) = read_dataset(tmp_path / "set/nut")[1]
    assert all(i.masks is None for i in one.test if i.kind == "dent")


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
    by_hand = by_hand.replace("test,Normal", "val,Normal", 1)  # what is not train is test
    (root / "split_csv/1cls.csv").write_bytes(b"\xef\xbb\xbf" + by_hand.encode())
    assert read_dataset(root)[1] == [c]
    mixed = by_hand.replace("test,anomaly", "train,anomaly")
    (root / "split_csv/1cls.csv").write_text(mixed)
    assert counts(read_dataset(root)[1][0]) == ("VisA", 3, {"good": 2})
    (root / "split_csv/1cls.csv").write_text("\n".join(rows).replace(",", ";"))
    for _ in range(2):
        with pytest.raises(InputError, match="1cls.csv"):
            read_dataset(root)
        (root / "split_csv/1cls.csv").unlink(missing_ok=True)


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
    assert "2 files are not read: crack/000.png, rgb/notes.txt" in capsys.readouterr().err


RGB = picture(0, size=(12, 20), defect=False)[0].astype(np.uint8)


MODES = "L.png RGB.bmp RGBA.png LA.png P.png 1.png CMYK.jpg CMYK.tif L.tiff"


@pytest.mark.parametrize("name", MODES.split())
def test_colour_modes_become_rgb(tmp_path, name):
    mode = name.split(".")[0]
    converted = Image.fromarray(RGB).convert(mode)
    if mode in ("RGBA", "LA"):  # alpha is dropped, not blended
        converted.putalpha(0)
    converted.save(tmp_path / name)
    image = read_image(tmp_path / name)
    assert image.mode == "RGB" and image.size == (20, 12)
    if mode not in ("1", "CMYK"):
        expected = np.asarray(converted.convert("RGB"), int)
        assert np.abs(np.asarray(image, int) - expected).max() <= 1


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


@pytest.mark.parametrize("suffix", ["tif", "gif", "png", "webp"])
def test_a_file_of_several_frames_is_refused(tmp_path, suffix):
    """By its first frame alone a defect in the second would be called good."""
    frames = [Image.fromarray(RGB), Image.fromarray(255 - RGB)]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match="2 frames: save each as an image of its own"):
        read_image(path)
    frames[0].save(tmp_path / "a.mpo", save_all=True, append_images=frames[1:])  # of a telephone
    assert read_image(tmp_path / "a.mpo").size == (20, 12)


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


PIECES = [  # of the layouts, and of what else may lie in folders
    *"train/ train/good/0.png train/good/0.jpg test/good/0.png test/dent/0.png test/dent/".split(),
    *"ground_truth/ ground_truth/dent/0_mask.png ground_truth/dent/0_mask.png/".split(),
    *"defects_config.json test/logical_anomalies/0.png 0.png".split(),
    *"Data/Images/Normal/0.JPG ../split_csv/1cls.csv".split(),
    *"train/good/rgb/0.png test/good/rgb/0.png".split(),
    *"train/good/dir.png/ train/good/link.png train/good/.hidden.png train/good/a.txt".split(),
    *("train/good/größe 部品.PNG", "train/good/" + "n" * 200 + ".png"),
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


def test_a_tall_strip_is_read_and_a_decompression_bomb_refused(tmp_path, monkeypatch):
    Image.new("1", (2048, 48000), 1).save(tmp_path / "strip.png")
    assert read_image(tmp_path / "strip.png").size == (2048, 48000)
    save(tmp_path / "x.png", RGB)
    for limit in (200, 100):  # Pillow warns above its limit and raises above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(InputError, match="x.png"):
            read_image(tmp_path / "x.png")


def test_extreme_shapes_reach_the_network_size(tmp_path):
    save(tmp_path / "a.png", np.zeros((1, 1, 3)))
    save(tmp_path / "b.png", np.zeros((1, 20000, 3)))
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    (read,) = evaluate.batches_of(paths, (64, 128))
    images, sizes = evaluate.stacked(read)
    assert images.shape == (2, 3, 64, 128) and sizes == [(1, 1), (1, 20000)]
    assert evaluate.image_sizes(paths) == sizes


def test_batches_keep_the_order_of_the_images():
    images = [np.full((4, 6, 3), k, np.uint8) for k in range(2 * evaluate.BATCH + 3)]
    read = [*evaluate.batches_of(images, (4, 6))]
    assert [len(part) for part in read] == [evaluate.BATCH, evaluate.BATCH, 3]
    assert [pixels[0, 0, 0] for part in read for pixels, _ in part] == [*range(len(images))]


def test_sizes_from_the_header_are_those_of_the_picture_as_shown(tmp_path):
    for orientation, suffix in itertools.product((1, 3, 6, 8), ("jpg", "tif")):
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


@pytest.mark.parametrize("name", ["ok", "OK", "Good", "Normal"])
@pytest.mark.parametrize("defect", ["not ok", "no_good", "non-pass", "broken"])
def test_folders_called_good_are_good_and_those_called_defective_are_defects(
    tmp_path, name, defect
):
    root = make_mvtec(tmp_path / "d") / "bolt"
    renamed(renamed(root, "train/good", f"train/{name}"), "test/good", f"test/{name}")
    renamed(root, "test/dent", f"test/{defect}")
    renamed(root, "ground_truth/dent", f"ground_truth/{defect}")
    (c,) = read_dataset(tmp_path / "d")[1]
    assert counts(c)[1:] == (6, {"good": 3, defect: 3})


MAY_BE_GOOD = "good_monday ok-2 normal.1 all_ok io Pass Defect-Free images".split()
MASKS_AMONG = "test/ground_truth/000 test/dent/Masks/000 train/good/gt/000".split()
SAME_STEM = "train/good/000 test/good/006 test/dent/000".split()
OF_BOXES = (
    *("train/good/000.json", "train/good/day/_annotations.coco.json", "train/labels/000.txt"),
    *("test/good/006.xml", "labels/train/000.txt"),
)
REFUSED = {  # a file that is added to a category: what the refusal says
    **{
        f"test/{kind}/0.png": f"{kind}: good images, or a defect.* into .*test/good"
        for kind in MAY_BE_GOOD
    },
    **{f"{name}.png": "masks among images.* into ground_truth/<defect>" for name in MASKS_AMONG},
    **{f"{name}.jpg": r"000|006.* has the same name.*_mask.png" for name in SAME_STEM},
    **{name: f"{name}: an annotation.* good ones into train/good" for name in OF_BOXES},
    "train/good/000_GT.png": "000_GT.png: a mask among good images",
    "test/good/006_mask.bmp": "006_mask.bmp: a mask among good images",
    "test/dent/007_GT.png": "007_GT.png: is named as a mask, but no image 007 is beside it",
    "ground_truth/dent/000.png": "000_mask.png: 000.png is a mask of the same image: remove one",
    "test/dent/007.png": "ground_truth/dent/007_mask.png: mask of 007.png is missing",
    "test/dent/day2/000.png": "dent/day2/000_mask.png: mask of 000.png is missing",
    "test/hole/000.png": "ground_truth/hole/000_mask.png: mask of 000.png is missing",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_be_misread_is_refused(tmp_path, name):
    root = make_mvtec(tmp_path / "d") / "bolt"
    (root / "test/dent/000.json").write_text("")  # of a defect it says nothing new
    read_dataset(root)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(root / "train/good/000.png", root / name)
    with pytest.raises(InputError, match=REFUSED[name]):
        read_dataset(root)


NOT_GOOD = "no folder good, ok or normal in it: put the good images into train/good"
NO_DATASETS = [  # files, the folder that is given, what the refusal says
    ("", "absent", "absent: no such folder"),
    ("x/a.txt", ".", "no category here: put good images into train/good"),
    ("x/train/good/a.txt", ".", "no training images"),
    ("x/train/Cam1/0.png x/test/Cam1/0.png", ".", f"train: {NOT_GOOD}"),  # neither says it is good
    ("x/train/Cam1/0.png x/test/Cam1/0.png", "x", f"train: {NOT_GOOD}"),
    ("x/train/0.png", "x", "0.png: has no mask 0_GT beside it: add it, or use train/good"),
    ("nut/good/0.png nut/bad/0.png", ".", "no category here"),  # products, or classes
    ("nut/good/0.png nut/bad/0.png", "nut", "no category here"),
    ("nut/good/0.png nut/bad/0.png nut/1.png", "nut", "good images beside bad, good: put the good"),
    ("nut/good/0.png nut/good/0_GT.bmp", "nut/good", "0_GT.bmp: a mask among good images"),
    ("masks/0.png", "masks", "masks: masks among images"),
    ("x/test/dent/1.png x/1.png", "x", "images beside test: put the good ones into train/good"),
    ("x/images/train/0.png x/labels/train/0.txt", "x/images", "has no mask 0_GT"),
    ("x/images/train/0.png x/labels/train/0.txt", "x/images/train", "0.txt: an annotation"),
    ("x/train2017/0.png x/annotations/train2017.json", "x/train2017", "an annotation"),
    ("x/train2017/0.png x/annotations/train2017.json", "x", "no category here"),
]


@pytest.mark.parametrize("files, given, words", NO_DATASETS)
def test_folders_that_do_not_say_what_is_good_are_refused(tmp_path, files, given, words):
    for name in files.split():
        save(tmp_path / name, picture(1)[0], format="PNG")
    with pytest.raises(InputError, match=words):
        read_dataset(tmp_path / given)


def test_images_lie_deeper_and_what_is_not_read_is_named(tmp_path, capsys):
    root = make_mvtec(tmp_path / "d") / "bolt"
    for k, suffix in enumerate((".webp", ".gif", ".PNG", ".ppm")):
        save(root / f"train/good/day2/x{k}{suffix}", picture(k)[0])
    save(root / f"train/good/größe 部品 (1) {'n' * 150}.jfif", picture(7)[0], format="JPEG")
    image, mask = picture(8, defect=True)
    save(root / "test/dent/day2/a.png", image)
    save(root / "ground_truth/dent/day2/a_mask.png", mask * 255)
    (root / "test/dent/readme.txt").write_text("x")
    (root / "train/good/b.heic").write_text("x")
    (root / "train/good/Thumbs.db").write_text("x")
    (root / "train/good/.hidden.png").write_text("x")
    (root / "train/good/folder.png").mkdir()
    (root / "train/good/day2/loop").symlink_to(root / "train/good", target_is_directory=True)
    (c,) = read_dataset(tmp_path / "d")[1]
    assert counts(c)[1:] == (11, {"good": 3, "dent": 4})
    assert evaluate.masks_of(c.test[3], (40, 48))[1].sum() == mask.sum()
    save(root / "train/new/0.png", picture(1)[0])
    save(root / "ground_truth/dent/999.png", mask * 255)
    assert read_dataset(tmp_path / "d")[1] == [c]
    two, four = capsys.readouterr().err.splitlines()
    assert "bolt: 2 files are not read: dent/readme.txt, good/b.heic (.heic, .txt)" in two
    assert "bolt: 4 files are not read: dent/999.png, dent/readme.txt, good/b.heic, new/0" in four


def test_what_lies_beside_the_categories_is_named_and_never_trained_on(tmp_path, capsys):
    make_mvtec(tmp_path / "d", ("bolt", "nut"))
    save(tmp_path / "d/overview.png", picture(1)[0])
    save(tmp_path / "d/washer/1.png", picture(1)[0])
    name, found = read_dataset(tmp_path / "d")
    assert name == "d" and [counts(c)[:2] for c in found] == [("MVTec AD", 6)] * 2
    assert "d: 2 files are not read: d/overview.png, washer/1.png" in capsys.readouterr().err


def test_train_and_test_in_capitals_and_no_folder_that_says_good(tmp_path, capsys):
    root = make_mvtec(tmp_path / "d") / "bolt"
    renamed(renamed(root, "train", "Train"), "test", "TEST")
    shutil.rmtree(root / "ground_truth")
    assert counts(read_dataset(root)[1][0])[1:] == (6, {"good": 3, "dent": 3})
    renamed(root, "TEST/good", "TEST/gut")
    assert counts(read_dataset(root)[1][0])[2] == {"gut": 3, "dent": 3}
    assert "no good images in test: dent, gut are defects" in capsys.readouterr().err


MASKS = "0.PNG 0_mask.PNG 0.tif 0_gt.png 0_GT.bmp 0_Mask.jpg"


@pytest.mark.parametrize("truth", ["Ground_Truth", "masks", "GT"])
def test_masks_are_found_by_the_names_that_count(tmp_path, truth):
    root = make_mvtec(tmp_path / "d", bad=1) / "bolt"
    old = root / "ground_truth/dent/000_mask.png"
    mask = np.asarray(Image.open(old))
    renamed(renamed(root, "ground_truth", "x"), "x", truth)
    old = root / truth / "dent/000_mask.png"
    for name in MASKS.split():
        old.unlink()
        old = root / truth / "dent" / name.replace("0", "000")
        save(old, mask)
        (c,) = read_dataset(tmp_path / "d")[1]
        assert evaluate.masks_of(c.test[0], (40, 48))[1].sum() == (mask > 0).sum()
    old.rename(root / truth / "dent/mask_000.bmp")
    with pytest.raises(InputError, match="dent/000_mask.png: mask of 000.png is missing"):
        read_dataset(root)


def test_masks_beside_their_images_are_no_images(tmp_path):
    root = make_mvtec(tmp_path / "d") / "bolt"
    for path in sorted((root / "ground_truth/dent").iterdir()):
        path.rename(root / "test/dent" / path.name.replace("_mask", "_GT"))
    (root / "ground_truth/dent").rmdir()
    (root / "ground_truth").rmdir()
    (c,) = read_dataset(tmp_path / "d")[1]
    assert counts(c)[2] == {"good": 3, "dent": 3}
    assert [m.name for item in c.test[:3] for m in item.masks] == [f"00{k}_GT.png" for k in "012"]
    (root / "test/dent/001_GT.png").unlink()
    with pytest.raises(InputError, match="001_mask.png: mask of 001.png is missing"):
        read_dataset(tmp_path / "d")


def test_masks_that_are_no_plain_masks_are_read_and_named(tmp_path, capsys):
    """Of several in a folder that are read alike the first alone is named."""
    mask = picture(0, defect=True)[1]
    none, rng = 0 * mask, np.random.default_rng(0)
    noisy = np.where(mask, 249, 0) + rng.integers(0, 7, mask.shape)  # as after JPEG
    few = np.where(mask, 254, 0) + (noisy % 2)  # values 0, 1, 254, 255
    palette = Image.fromarray((~mask).astype(np.uint8), "P")
    palette.putpalette([255, 255, 255, 0, 0, 0])  # defective white is index 0
    faint = "a mask with faint values, read as defective from"
    for name, array, expected, note in (
        ("a/labels.png", mask * np.where(np.arange(48) > 18, 255, 90), mask, ""),
        ("a/visa.png", mask * 4, mask, ""),
        ("a/palette.png", palette, mask, ""),
        ("a/green.png", np.dstack([none, mask * 7, none]), mask, ""),
        ("a/alpha.png", np.dstack([mask, mask, mask, none + 255]), mask, ""),
        ("a/noisy.png", noisy, mask, faint),
        ("b/few.png", few, mask, faint),
        ("b/more.png", few, mask, ""),
        ("c/float.tif", (noisy / 255).astype(np.float32), mask, faint),
        ("c/inverted.png", 255 * ~mask, ~mask, "91 % of this mask is defective"),
        ("c/empty.png", none, none, "0 % of this mask is defective"),
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if not isinstance(array, Image.Image):
            array = Image.fromarray(array if "float" in name else array.astype(np.uint8))
        array.save(path)
        assert np.array_equal(read_mask(path, mask.shape) != 0, expected), name
        said = capsys.readouterr().err
        assert (f"{name}: {note}" in said) if note else not said, name


@pytest.mark.parametrize(
    "dtype, top, white_level",
    [
        (np.uint16, 1023, 1023),
        (np.uint16, 4000, 4095),
        (np.uint16, 16383, 16383),
        (np.uint16, 60000, 65535),
        (np.int32, 255, 255),
        (np.float32, 1.003, 1),
        (np.float32, 0.125, 1),
        (np.float32, 9.5, 255),
        (np.float32, 4095, 4095),
    ],
)
def test_grey_levels_fill_the_range_by_one_rule_for_a_data_set(tmp_path, dtype, top, white_level):
    ramp = np.linspace(0, top, 240).reshape(12, 20)
    paths = grey_files(tmp_path, ramp.astype(dtype), (ramp * 0.1).astype(dtype))
    assert evaluate.white_level_of(paths) == white_level
    dark = np.asarray(read_image(paths[1], white_level))[..., 0]
    expected = np.round(255.0 * (ramp * 0.1).astype(dtype) / white_level)
    assert np.abs(dark - expected).max() <= 1  # as dark beside the first as it was
    assert np.array_equal(read_image(paths[0]), read_image(paths[0], white_level))


def grey_files(folder, *arrays, **options):
    """Files 0.tif, 1.tif, ... of arrays; their paths."""
    paths = [folder / f"{k}.tif" for k in range(len(arrays))]
    folder.mkdir(exist_ok=True)
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(array).save(path, **options)
    return paths


def test_grey_levels_above_white_below_zero_and_negatives(tmp_path, capsys):
    ramp = np.linspace(0, 4095, 240).reshape(12, 20)
    deep, below = ramp.astype(np.uint16), (ramp - 2000).astype(np.int32)
    deep, below, infinite = grey_files(tmp_path, deep, below, np.full((9, 9), np.inf, np.float32))
    cut = np.asarray(read_image(deep, 2500))[..., 0]
    assert cut.max() == 255
    assert "0.tif: values up to 4095 are cut at 2500" in capsys.readouterr().err
    with pytest.raises(InputError, match="half of its values are above 255, the white level"):
        read_image(deep, 255)
    (negative,) = grey_files(tmp_path / "w", ramp.astype(np.uint16), tiffinfo={262: 0})
    for path, word in ((below, "down to -2000"), (infinite, "not finite"), (negative, "negative")):
        with pytest.raises(InputError, match=word):
            read_image(path)
    assert evaluate.white_level_of([]) == 255
    save(tmp_path / "8.png", RGB)
    assert evaluate.white_level_of([tmp_path / "8.png"]) == 255


def test_images_of_few_grey_levels_are_named(tmp_path, capsys):
    """Of another range than the training images, or blank: by what the network would see."""
    values = np.linspace(0, 4095, 30 * 40).reshape(30, 40).astype(np.uint16)
    hot, radiance = values.copy(), (30000 + values / 8).astype(np.uint16)  # an offset: thermal
    hot[0, 0] = 65535
    colours = (values // 16)[..., None].repeat(3, 2)
    for k, (arrays, words) in enumerate((
        ((values, values), ()),
        ((values, hot), ("white level 65535", "0 to 16 of")),
        ((radiance,), ("white level 65535",)),
        ((colours.astype(np.uint8),), ()),
        ((0 * colours.astype(np.uint8),), ("0 to 0 of",)),
    )):  # fmt: skip
        paths = grey_files(tmp_path / str(k), *arrays)
        white_level = evaluate.white_level_of(paths)
        list(evaluate.batches_of(paths, (30, 40), white_level))
        notes = capsys.readouterr().err
        assert bool(notes) == bool(words) and all(word in notes for word in words)


def test_the_white_level_is_kept_with_the_model(tmp_path):
    values = np.linspace(0, 4000, 64 * 64).reshape(64, 64)
    paths = grey_files(tmp_path, *[(values / k).astype(np.uint16) for k in (1, 2, 5)])
    detector = train.fit(paths, image_size=64, steps=2, width=8, folds=0)
    evaluate.save_model(tmp_path / "m.pt", detector)
    loaded = evaluate.load_model(tmp_path / "m.pt")
    assert detector.reading.white_level == loaded.reading.white_level == 4095.0
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
    (tmp_path / "k/test/notes.txt").write_text("")
    with_alpha = np.dstack([np.zeros((40, 48, 3)), np.full((40, 48), 255)])
    save(tmp_path / "k/test/1_GT.png", with_alpha)  # opaque and black: defect-free
    assert counts(read_dataset(tmp_path / "k")[1][0])[2] == {"good": 3, "defect": 1}
    assert "k: 1 files are not read: test/notes.txt" in capsys.readouterr().err


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


def test_mvtec_ad_2_is_read(tmp_path):
    """test_public, with its masks in it; the private parts are said not to be read."""
    for name in (
        "train/good/000_regular",
        "test_public/good/000_regular",
        "test_private/000_regular",
    ):
        save(tmp_path / f"can/{name}.png", picture(0)[0])
    save(tmp_path / "can/test_public/bad/000_regular.png", picture(1)[0])
    mask = np.zeros((40, 48), np.uint8)
    save(tmp_path / "can/test_public/ground_truth/bad/000_regular_mask.png", mask)
    _, [category] = evaluate.read_dataset(tmp_path)
    kinds = {item.kind: item.masks for item in category.test}
    assert kinds["good"] == () and kinds["bad"][0].name == "000_regular_mask.png"
    assert len(category.test) == 2 and len(category.train) == 1


def test_reasons_for_missing_metrics_are_kept_apart(capsys):
    items = [evaluate.Item(Path("a.png"), "dent", None), evaluate.Item(Path("b.png"), "hole", ())]
    category = evaluate.Category("c", "MVTec AD", [], items, None)
    known = evaluate.calibrate([1], how=1)
    scored = evaluate.Scored(torch.zeros(2, 4, 4), evaluate.classify([0, 0], known), known)
    evaluate.measure(category, scored, [(4, 4)] * 2)
    assert capsys.readouterr().err.splitlines() == [
        "note: c: no good test images: AUROC is not defined",
        "note: c: 1 defective images have no folder of masks: no pixel metrics",
    ]


@pytest.mark.parametrize("folder", ["", "good/day1", "train/good", "Normal"])
def test_a_folder_of_good_images_is_named_after_the_product(tmp_path, folder):
    for name in ("screw", "nut"):
        save(tmp_path / "parts" / name / folder / "0.jpg", picture(1)[0])
    for name in ("screw", "nut"):
        dataset, (c,) = read_dataset(tmp_path / "parts" / name / folder.removesuffix("/day1"))
        assert (dataset, c.name) == ("parts", name)
        assert counts(c) == ("folder of good images", 1, {})


def test_many_regions_take_their_own_boxes_alone(tmp_path):
    mask = np.zeros((600, 600), bool)
    mask[::20, ::20] = True
    mask[2:19, [2, 18]] = mask[18, 2:19] = True  # around nothing
    mask[10, 10] = True  # in its box
    Image.fromarray(np.uint8(mask) * 255).save(tmp_path / "m.png")
    regions, _ = evaluate.masks_of(evaluate.Item(None, "pore", (tmp_path / "m.png",)), mask.shape)
    assert sum(region.size for _, region, _ in regions) == 901 + 17 * 17
    assert sum(region.sum() for _, region, _ in regions) == mask.sum() and len(regions) == 902


def test_resolution_says_what_a_defect_needs():
    small = train.resolution(wtflow.Recipe(), [(384, 384)])
    assert "a position of the map covers 8 x 8" in small and "--image-size" not in small
    large = train.resolution(wtflow.Recipe(aspect=0.75), [(1500, 2000)] * 3)
    assert "covers 36 x 36" in large and "give a larger --image-size" in large


def test_without_file_locks_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with evaluate.locked(tmp_path / "a"):
        assert (tmp_path / "a").is_dir()
