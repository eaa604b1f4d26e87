"""Every layout on a tiny folder with known counts; every kind of image file."""

import json
import os
import re
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_mvtec, picture, save, shell, succeeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import evaluate
import train
import wtflow
from evaluate import InputError, Reading, read_dataset, read_image, read_mask

RGB = picture(0, size=(12, 20))[0].astype(np.uint8)


def counts(category):
    kinds = [i.kind for i in category.test]
    return len(category.train), {k: kinds.count(k) for k in sorted(set(kinds))}


def only(folder):
    (category,) = read_dataset(folder)[1]
    return category


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def read_or_refused(path, read, *args):
    """What it gives; None where it is refused by one line that names the path."""
    try:
        return read(*args)
    except InputError as e:
        assert str(path) in str(e) and "\n" not in str(e)


# ---- layouts -------------------------------------------------------------------------------------
def test_mvtec_root_and_one_category(tmp_path, capsys):
    """What lies beside the categories is named, and never trained on."""
    make_mvtec(tmp_path / "set", ("bolt", "nut"))
    save(tmp_path / "set/overview.png", RGB)
    save(tmp_path / "set/washer/1.png", RGB)
    name, found = read_dataset(tmp_path / "set")
    assert name == "set" and [c.name for c in found] == ["bolt", "nut"]
    assert counts(found[0]) == (6, {"good": 3, "dent": 3})
    assert "set: 2 files are not read: set/overview.png, washer/1" in capsys.readouterr().err
    name, (one,) = read_dataset(tmp_path / "set/nut")
    assert name == "set" and counts(one) == counts(found[1])
    assert [c.name for c in read_dataset(tmp_path / "set", ["nut"])[1]] == ["nut"]
    assert all(len(i.masks) == (i.kind == "dent") for i in one.test)
    shutil.rmtree(tmp_path / "set/nut/ground_truth")
    assert all(i.masks is None for i in only(tmp_path / "set/nut").test if i.kind == "dent")


@pytest.fixture
def visa(tmp_path):
    """VisA with one category; the lines of its split file."""
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
    save(root / "split_csv/unused.png", RGB)
    (root / "split_csv/1cls.csv").write_text("\n".join(rows))
    return root, "\n".join(rows)


def test_visa(visa):
    root, rows = visa
    name, (c,) = read_dataset(root)
    assert name == "VisA" and counts(c) == (3, {"good": 2, "anomaly": 2})
    assert evaluate.masks_of(c.test[-1], (40, 48))[1].sum() == 12 * 14  # of 2, not 255
    by_hand = rows.replace("/", "\\").replace("normal", "Normal").replace("\n", "\r\n")
    by_hand = by_hand.replace("test,Normal", "val,Normal", 1)  # what is not train is test
    (root / "split_csv/1cls.csv").write_bytes(b"\xef\xbb\xbf" + by_hand.encode())
    assert only(root) == c
    (root / "split_csv/1cls.csv").write_text(by_hand.replace("test,anomaly", "train,anomaly"))
    assert counts(only(root)) == (3, {"good": 2})
    (root / "split_csv/1cls.csv").write_text(rows.replace(",", ";"))
    with pytest.raises(InputError, match="1cls.csv: not VisA's split"):
        read_dataset(root)
    (root / "split_csv/1cls.csv").unlink()
    with pytest.raises(InputError, match="1cls.csv: cannot be read"):
        read_dataset(root)


@pytest.mark.parametrize("image", ["candle/../../x.png", "nut/0.png", "/x.png"])
def test_an_image_outside_of_its_category_is_refused(visa, image):
    root, rows = visa
    (root / "split_csv/1cls.csv").write_text(f"{rows}\ncandle,test,normal,{image},")
    with pytest.raises(InputError, match="lies outside of .*candle: mend the split file"):
        read_dataset(root)


def test_loco(tmp_path):
    root = make_mvtec(tmp_path / "loco", ("juice",)) / "juice"
    shutil.rmtree(root / "test/dent")
    shutil.rmtree(root / "ground_truth/dent")
    for name in ("logical_anomalies/000", "logical_anomalies/001", "structural_anomalies/000"):
        image, mask = picture(70, defect=True)
        save(root / f"test/{name}.png", image)
        for r in range(2):
            save(root / f"ground_truth/{name}/{r:03d}.png", mask * (255 - r))
    save(root / "validation/good/000.png", RGB)
    with pytest.raises(InputError, match="defects_config.json"):
        read_dataset(tmp_path / "loco")
    keys = ("defect_name", "pixel_value", "saturation_threshold", "relative_saturation")
    defects = [("d255", 255, 0.5, True), ("d254", 254, 20, False)]
    config = json.dumps([dict(zip(keys, defect, strict=True)) for defect in defects])
    (root / "defects_config.json").write_text(config)
    c = only(tmp_path / "loco")
    assert counts(c) == (6, {"good": 3, "logical_anomalies": 2, "structural_anomalies": 1})
    regions, _ = evaluate.masks_of(c.test[-1], (40, 48), c.saturation)
    assert [saturates_at for *_, saturates_at in regions] == [84, 20]
    with pytest.raises(InputError, match="001.png: value 254 is not in defects_config.json"):
        evaluate.masks_of(c.test[-1], (40, 48), {255: (0.5, True)})
    shutil.rmtree(root / "ground_truth/logical_anomalies/001")
    with pytest.raises(InputError, match="mask of 001.png is missing"):
        read_dataset(root)
    (root / "defects_config.json").write_text(config.replace("20", '"x"'))
    with pytest.raises(InputError, match="defects_config.json: not LOCO's thresholds"):
        read_dataset(root)


def test_mvtec_3d(tmp_path, capsys):
    root = tmp_path / "3d/bagel"
    images = {"train/good": 4, "validation/good": 2, "test/good": 2, "test/hole": 3}
    for part, n in images.items():
        for k in range(n):
            save(root / part / f"rgb/{k:03d}.png", RGB)
            save(root / part / f"gt/{k:03d}.png", RGB)
            (root / part / "xyz").mkdir(exist_ok=True)
    c = only(tmp_path / "3d")
    assert counts(c) == (4, {"good": 2, "hole": 3})
    assert [i.masks for i in c.test[2:]] == [(root / f"test/hole/gt/00{k}.png",) for k in range(3)]
    assert "10 files are not read: gt/000.png" in capsys.readouterr().err
    save(root / "test/crack/000.png", RGB)
    assert only(tmp_path / "3d") == c
    assert "11 files are not read: crack/000.png" in capsys.readouterr().err


def test_mvtec_ad_2_is_read(tmp_path):
    """test_public, with its masks in it; the private parts are said not to be read."""
    for part in ("train/good", "test_public/good", "test_private", "test_public/bad"):
        save(tmp_path / f"can/{part}/000_regular.png", RGB)
    save(tmp_path / "can/test_public/ground_truth/bad/000_regular_mask.png", RGB)
    c = only(tmp_path)
    assert counts(c) == (1, {"bad": 1, "good": 1})
    kinds = {item.kind: item.masks for item in c.test}
    assert kinds["good"] == () and kinds["bad"][0].name == "000_regular_mask.png"


@pytest.mark.parametrize("folder", ["", "good/day1", "train/good", "Normal"])
def test_a_folder_of_good_images_is_named_after_the_product(tmp_path, folder):
    for name in ("screw", "nut"):
        save(tmp_path / "parts" / name / folder / "0.jpg", RGB)
        given = tmp_path / "parts" / name / folder.removesuffix("/day1")
        dataset, (c,) = read_dataset(given)
        assert (dataset, c.name, counts(c)) == ("parts", name, (1, {}))


def test_a_trained_model_needs_test_images_alone(tmp_path):
    root = make_mvtec(tmp_path / "d") / "bolt"
    shutil.rmtree(root / "train")
    with pytest.raises(InputError, match="no category here"):
        read_dataset(tmp_path / "d")
    for place in (root, root.parent):
        (c,) = read_dataset(place, trained=True)[1]
        assert counts(c) == (0, {"good": 3, "dent": 3})


@pytest.mark.parametrize("name", ["ok", "OK", "Good", "Normal"])
@pytest.mark.parametrize("defect", ["not ok", "no_good", "non-pass", "broken"])
@pytest.mark.parametrize("train, test", [("train", "test"), ("Train", "TEST")])
def test_folders_called_good_are_good_and_those_called_defective_are_defects(
    tmp_path, name, defect, train, test
):
    root = make_mvtec(tmp_path / "d", train=2, good=2, bad=1) / "bolt"
    for old, new in (
        ("train/good", f"train/{name}"),
        ("test/good", f"test/{name}"),
        ("test/dent", f"test/{defect}"),
        ("ground_truth/dent", f"ground_truth/{defect}"),
        ("train", train),
        ("test", test),
    ):
        (root / old).rename(root / "x")
        (root / "x").rename(root / new)
    assert counts(only(tmp_path / "d")) == (2, {"good": 2, defect: 1})


def test_images_lie_deeper_and_what_is_not_read_is_named(tmp_path, capsys):
    root = make_mvtec(tmp_path / "d") / "bolt"
    for k, suffix in enumerate((".webp", ".gif", ".PNG", ".ppm")):
        save(root / f"train/good/day2/x{k}{suffix}", RGB)
    save(root / f"train/good/größe 部品 (1) {'n' * 150}.jfif", RGB, format="JPEG")
    image, mask = picture(8, defect=True)
    save(root / "test/dent/day2/a.png", image)
    save(root / "ground_truth/dent/day2/a_mask.png", mask * 255)
    for name in ("test/dent/readme.txt", *("train/good/" + n for n in ("b.heic", "Thumbs.db"))):
        (root / name).write_text("x")
    (root / "train/good/.hidden.png").write_text("x")
    (root / "train/good/folder.png").mkdir()
    (root / "train/good/day2/loop").symlink_to(root / "train/good", target_is_directory=True)
    c = only(tmp_path / "d")
    assert counts(c) == (11, {"good": 3, "dent": 4})
    assert evaluate.masks_of(c.test[3], (40, 48))[1].sum() == mask.sum()
    save(root / "train/new/0.png", RGB)
    save(root / "ground_truth/dent/999.png", mask * 255)
    assert only(tmp_path / "d") == c
    two, four = capsys.readouterr().err.splitlines()
    assert "bolt: 2 files are not read: dent/readme.txt, good/b.heic (.heic, .txt)" in two
    assert "bolt: 4 files are not read: dent/999.png, dent/readme.txt, good/b.heic, new/0" in four


MAY_BE_GOOD = "good_monday ok-2 normal.1 all_ok io Pass Defect-Free images".split()
AMONG = "test/dent/Masks train/good/gt test/SegmentationClass test/dent/SegmentationObject".split()
NAMED = "train/good/000_GT test/good/006_mask test/dent/007_GT test/dent/001_mask_2".split()
OF_BOXES = (
    *("train/good/000.json", "train/good/day/_annotations.coco.json", "train/labels/000.txt"),
    *("test/good/006.xml", "labels/000.txt"),
)
REFUSED = {  # a file that is added to a category: what the refusal says
    **{f"test/{kind}/0.png": f"{kind}: good images, or a def.* test/good" for kind in MAY_BE_GOOD},
    **{f"{name}/000.png": "masks among images.* into ground_truth/<defect>" for name in AMONG},
    **{
        f"{name}.jpg": r"000|006.* has the same name.*_mask.png"
        for name in ("train/good/000", "test/good/006", "test/dent/000")
    },
    **{name: f"{name}: an annotation.* good ones into train/good" for name in OF_BOXES},
    **{f"{name}.bmp": f"{name}.bmp: is named as a mask.* into ground_truth/<" for name in NAMED},
    "ground_truth/dent/000.png": "000_mask.png: 000.png is a mask of the same image: remove one",
    "ground_truth/dent/000_mask_2.png": "000_mask_2.png: 000_mask.png is a mask of the same image",
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
    ("mean/train/good/0.png", ".", "cannot be called mean"),
    ("-5mm/train/good/0.png", ".", "cannot be called -5mm"),
    ("=x/train/good/0.png", ".", "cannot be called =x"),
    ("x/train/Cam1/0.png x/test/Cam1/0.png", ".", f"train: {NOT_GOOD}"),  # neither says it is good
    ("x/train/Cam1/0.png x/test/Cam1/0.png", "x", f"train: {NOT_GOOD}"),
    ("x/train/0.png x/train/0_GT.png", "x", f"train: {NOT_GOOD}"),  # KolektorSDD2
    ("nut/good/0.png nut/bad/0.png", ".", "no category here"),  # products, or classes
    ("nut/good/0.png nut/bad/0.png", "nut", "no category here"),
    ("nut/good/0.png nut/bad/0.png nut/1.png", "nut", "good images beside bad, good: put the good"),
    ("nut/good/0.png nut/good/0_GT.bmp", "nut/good", "0_GT.bmp: is named as a mask"),
    ("masks/0.png", "masks", "masks: masks among images"),
    ("x/test/dent/1.png x/1.png", "x", "images beside test: put the good ones into train/good"),
    ("x/images/train/0.png x/labels/train/0.txt", "x/images", NOT_GOOD),
    ("x/images/train/0.png x/labels/train/0.txt", "x/images/train", "0.txt: an annotation"),
    ("x/train2017/0.png x/annotations/train2017.json", "x/train2017", "an annotation"),
    ("x/train2017/0.png x/annotations/train2017.json", "x", "no category here"),
]


@pytest.mark.parametrize("files, given, words", NO_DATASETS)
def test_folders_that_do_not_say_what_is_good_are_refused(tmp_path, files, given, words):
    for name in files.split():
        save(tmp_path / name, RGB, format="PNG")
    with pytest.raises(InputError, match=words):
        read_dataset(tmp_path / given)


@pytest.mark.parametrize("truth", ["Ground_Truth", "masks", "GT"])
def test_masks_are_found_by_the_names_that_count(tmp_path, truth):
    root = make_mvtec(tmp_path / "d", bad=1) / "bolt"
    mask = np.asarray(Image.open(root / "ground_truth/dent/000_mask.png"))
    shutil.rmtree(root / "ground_truth")
    for end in ".PNG _mask.PNG .tif _gt.png _GT.bmp _Mask.gif _mask_2.png".split():
        path = root / truth / f"dent/000{end}"
        save(path, mask)
        assert evaluate.masks_of(only(root).test[0], (40, 48))[1].sum() == (mask > 0).sum()
        path.unlink()
    save(root / truth / "dent/mask_000.bmp", mask)
    with pytest.raises(InputError, match="dent/000_mask.png: mask of 000.png is missing"):
        read_dataset(root)


def test_links_are_followed_once_and_no_image_counts_twice(tmp_path):
    """Two links in each of 30 folders would lead to 2^30 images."""
    root = make_mvtec(tmp_path / "d") / "bolt"
    (root / "test/dent2").symlink_to(root / "test/dent", target_is_directory=True)
    with pytest.raises(InputError, match="test/dent2/000.png: .*is the same file by a link"):
        read_dataset(root)
    (root / "test/dent2").unlink()
    place = root / "train/good"
    for _ in range(30):
        place = place / "x"
        place.mkdir()
        for link in ("a", "b"):
            (place / link).symlink_to(place / "x", target_is_directory=True)
    save(place / "deep.png", RGB)
    assert counts(only(root))[0] == 7


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
    found = read_or_refused(tmp_path, read_dataset, root.parent if whole else root)
    for c in found[1] if found else ():
        assert c.train
        for p in [*c.train, *(i.path for i in c.test)]:  # all are empty or dangling links
            with pytest.raises(InputError, match=f"{re.escape(str(p))}: cannot be read"):
                read_image(p)


LEFT_OUT = [  # a file, how many images it leaves out or what the refusal says
    ("good/004.png\n\n005.png\n", 2),
    ('"C:\\parts\\bolt\\train\\good\\004.png"\r\n', "is that of 0"),
    ('"train\\good\\004.png"\r\n./005.png', 2),
    ("image,score,leave_out\n004.png,9,x\n005.png,8,\n", 1),
    ('"image","score","leave_out"\n"004.png","9","x"\n', 1),
    ("", "leaves nothing out: put a mark"),
    ("image,score,leave_out\n004.png,9,\n", "leaves nothing out"),
    ("image,kind,score,p_value,verdict\n004.png,,9,0.1,good\n", "its column leave_out"),
    ("image;score;leave_out\n004.png;9;x\n", "its column leave_out"),
    ("004.png\n".encode("utf-16"), "UTF-8"),
    ("größe.png\n".encode("cp1252"), "UTF-8"),
    ("99.png\n", "99.png is that of 0"),
    ("".join(f"{k:03d}.png\n" for k in range(6)), "leaves no training image"),
    ("image,leave_out\n" + "a" * (1 << 18) + ",x\n", "cannot be read as a table"),
]


@pytest.mark.parametrize("content, found", LEFT_OUT)
def test_what_is_left_out_is_counted_and_nothing_is_an_error(tmp_path, capsys, content, found):
    evaluate.SAID.clear()
    _, categories = read_dataset(make_mvtec(tmp_path / "d"))
    file = tmp_path / "names.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(found, str):
        with pytest.raises(InputError, match=f"names.csv.*{found}"):
            evaluate.leave_out(categories, file)
        return
    (kept,), names = evaluate.leave_out(categories, file)
    assert len(kept.train) == 6 - found and len(names) == found
    assert f"{found} of 6 training images are left out" in capsys.readouterr().err


# ---- images --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", "L.png RGB.bmp RGBA.png LA.png P.png 1.png C.jpg C.tif".split())
def test_colour_modes_become_rgb(tmp_path, name):
    mode = name.split(".")[0].replace("C", "CMYK")
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
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (45, 65, 3), np.uint8))
    path, way = tmp_path / "a.jpg", 1 if orientation == 1 else -1
    coarse.resize((1300, 900), Image.BICUBIC).save(path, quality=92, exif=turned(orientation))
    for enough, shown in ((320, (650, 450)), (110, (163, 113)), (0, (1300, 900))):
        assert evaluate.open_image(path, enough).size == shown[::way]
    shape = (112, 160)[::way]
    pixels, full_size = evaluate.read_resized(path, shape, Reading())
    assert full_size == (900, 1300)[::way] and pixels.shape == (*shape, 3)
    whole = np.asarray(read_image(path).resize(shape[::-1], Image.BILINEAR), int)
    assert 0 < abs(pixels - whole).max() <= 4 and abs(pixels - whole).mean() < 0.33


@pytest.mark.parametrize("suffix", ["jpg", "tif", "png", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_images_masks_and_sizes_are_turned_as_exif_says(tmp_path, orientation, suffix):
    """White at the top left as shown; the mask of --ignore is a copy of the image."""
    shown, path = np.zeros((12, 20), np.uint8), tmp_path / f"a.{suffix}"
    shown[:4, :6] = 255
    raw = np.rot90(shown, {1: 0, 3: 2, 6: 1, 8: 3}[orientation])
    options = {"quality": 95} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    save(path, raw, exif=turned(orientation), **options)
    assert np.abs(np.asarray(read_image(path), int)[..., 0] - shown).max() < 40
    assert evaluate.image_sizes([path]) == [(12, 20)]
    assert evaluate.read_resized(path, (8, 8), Reading())[1] == (12, 20)
    if suffix in ("tif", "png"):
        item = evaluate.Item(path, "dent", (path,))
        assert np.array_equal(evaluate.masks_of(item, (12, 20))[1], shown > 0)
        assert np.array_equal(evaluate.read_ignored(path), shown > 0)


def test_a_png_that_exif_turns_after_its_pixels_is_refused(tmp_path):
    """Its size, which is read from the head, would be another."""
    path, data = tmp_path / "a.png", b"eXIf" + turned(6).tobytes()[6:]
    save(path, RGB)
    blob = path.read_bytes()
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    path.write_bytes(blob[:-12] + chunk + blob[-12:])
    with pytest.raises(InputError, match="EXIF that turns it comes after its pixels"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["tif", "gif", "png", "webp"])
def test_a_file_of_several_frames_is_refused(tmp_path, suffix):
    """By its first frame alone a defect in the second would be called good."""
    frames, path = [Image.fromarray(RGB), Image.fromarray(255 - RGB)], tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(InputError, match="2 frames: save each as an image of its own"):
        read_image(path)
    frames[0].save(tmp_path / "a.mpo", save_all=True, append_images=frames[1:])  # of a telephone
    assert read_image(tmp_path / "a.mpo").size == (20, 12)


def test_damaged_files_are_read_or_refused_by_name(tmp_path):
    """600 of them, or FUZZ: cut, bytes changed, put in, taken out. One InputError with the name."""
    rng, blobs, exif = np.random.default_rng(0), [], turned(6)
    exif[0x011A], exif[0x0131] = 2.5, "x"
    deep = np.arange(240, dtype=np.uint16).reshape(12, 20)
    for suffix, array in (
        *((suffix, RGB) for suffix in ("png", "jpg", "bmp", "tif", "webp", "gif", "ppm")),
        *((suffix, deep) for suffix in ("png", "tif", "pgm")),
    ):
        path = tmp_path / f"x.{suffix}"
        options = {"exif": exif} if suffix in ("png", "jpg", "tif", "webp") else {}
        Image.fromarray(array).save(path, **options)
        blobs.append((path, path.read_bytes()))
    for _ in range(int(os.environ.get("FUZZ", 600))):
        path, blob = blobs[rng.integers(len(blobs))]
        head = min(len(blob), 400)  # where most of what parsers read is
        blob = bytearray(blob)
        for _ in range(rng.integers(1, 6)):
            k, n = rng.integers(rng.choice([head, len(blob)])), int(rng.integers(0, 5))
            blob[k : k + n] = rng.bytes(rng.choice([n, n, n, int(rng.integers(0, 9))]))
        path.write_bytes(blob[: rng.integers(1, len(blob))] if rng.random() < 0.2 else blob)
        for read in (read_image, read_mask, lambda p: evaluate.image_sizes([p])):
            read_or_refused(path, read, path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_truncation_is_always_refused(tmp_path, suffix):
    """Of a JPEG whose end was put behind what is left, too: libjpeg makes the rest grey."""
    path = tmp_path / f"x.{suffix}"
    save(path, np.random.default_rng(0).integers(0, 255, (40, 40, 3)))
    blob = path.read_bytes()
    for cut in (0, 1, 10, len(blob) // 2, len(blob) * 9 // 10):
        for end in (b"", b"\xff\xd9"):
            path.write_bytes(blob[:cut] + end)
            with pytest.raises(InputError, match=f"x.{suffix}: cannot be read"):
                read_image(path)
    grey = np.full((40, 40, 3), 128)  # as libjpeg makes it, and whole
    save(path, grey)
    assert np.array_equal(read_image(path), grey)


STRIP = ((2048, 48000), (1 << 15, (1 << 13) + 1), (1 << 13, (1 << 13) + 1))
SIZES = [
    (Image.new("1", STRIP[0], 1), None),
    (Image.new("1", STRIP[1]), "32768 x 8193 pixels, more than 268435456 of 4"),
    (Image.new("I;16", STRIP[2]), "8192 x 8193 pixels, more than 67108864 of 16"),
]


@pytest.mark.parametrize("image, words", SIZES)
def test_a_strip_is_read_and_what_decodes_to_too_many_bytes_is_refused(
    tmp_path, monkeypatch, image, words
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as the commands do
    image.save(tmp_path / "x.tif", compression="tiff_deflate")
    if words is None:
        assert read_image(tmp_path / "x.tif").size == image.size
        return
    with pytest.raises(InputError, match=f"x.tif: cannot be read as an image .{words}"):
        read_image(tmp_path / "x.tif")


def test_what_is_no_image_is_refused(tmp_path):
    """PostScript would start a program; a pipe would not end."""
    path = tmp_path / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(InputError, match="x.png: cannot be read as an image .cannot identify"):
        read_image(path)
    path.unlink()
    os.mkfifo(path)
    for read in (read_image, lambda path: evaluate.leave_out([], path)):
        with pytest.raises(InputError, match="x.png: cannot be read as .*a.* pipe"):
            read(path)


def test_memory_that_ends_is_named(tmp_path, monkeypatch):
    def greedy(*args):
        raise MemoryError

    save(tmp_path / "a.png", RGB)
    monkeypatch.setattr(Image.Image, "resize", greedy)
    ((found,),) = evaluate.batches_of([tmp_path / "a.png"], (8, 8), Reading())
    assert str(found).startswith(f"{tmp_path}/a.png: out of memory")


def test_batches_keep_the_order_and_extreme_shapes_reach_the_network_size(tmp_path):
    images = [np.full((4, 6, 3), k, np.uint8) for k in range(2 * evaluate.BATCH + 3)]
    read = [*evaluate.batches_of(images, (4, 6), Reading())]
    assert [len(part) for part in read] == [evaluate.BATCH, evaluate.BATCH, 3]
    assert [pixels[0, 0, 0] for part in read for pixels, _ in part] == [*range(len(images))]
    shapes, paths = [(1, 1), (1, 20000)], [tmp_path / "a.png", tmp_path / "b.png"]
    for path, shape in zip(paths, shapes, strict=True):
        save(path, np.zeros((*shape, 3)))
    (read,) = evaluate.batches_of(paths, (64, 128), Reading())
    images, sizes = evaluate.stacked(read)
    assert images.shape == (2, 3, 64, 128) and sizes == evaluate.image_sizes(paths) == shapes


# ---- more than 8 bits ----------------------------------------------------------------------------
def grey_files(folder, *arrays, **options):
    """Files 0.tif, 1.tif, ... of arrays; their paths."""
    paths = [folder / f"{k}.tif" for k in range(len(arrays))]
    folder.mkdir(exist_ok=True)
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(array).save(path, **options)
    return paths


@pytest.mark.parametrize(
    "dtype, top, white_level",
    [
        (np.uint8, 200, 255),
        (np.uint16, 1023, 1023),
        (np.uint16, 4000, 4095),
        (np.uint16, 60000, 65535),
        (np.int32, 255, 255),
        (np.int32, 1 << 20, (1 << 24) - 1),
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


def test_grey_levels_above_white_below_zero_and_negatives(tmp_path, capsys):
    ramp = np.linspace(0, 4095, 240).reshape(12, 20)
    deep, below = ramp.astype(np.uint16), (ramp - 2000).astype(np.int32)
    deep, below, real = grey_files(tmp_path, deep, below, ramp.astype(np.float32))
    assert np.asarray(read_image(deep, 2500)).max() == 255
    assert "0.tif: values up to 4095 are cut at 2500" in capsys.readouterr().err
    with pytest.raises(InputError, match="half of its values are above 255, the white level"):
        read_image(deep, 255)
    (negative,) = grey_files(tmp_path / "w", ramp.astype(np.uint16), tiffinfo={262: 0})
    for path, word in ((below, "down to -2000"), (real, "floating"), (negative, "negative")):
        with pytest.raises(InputError, match=word):
            read_image(path)


def test_images_of_few_grey_levels_are_named(tmp_path, capsys):
    """Of another range than the training images, or blank: by what the network would see."""
    values = np.linspace(0, 4095, 30 * 40).reshape(30, 40).astype(np.uint16)
    hot = values.copy()
    hot[0, 0] = 65535
    for k, (images, words) in enumerate((
        ([values], ""),
        ([values, hot], "grey values 0 to 16 of 0 to 255, the white level 65535"),
        ([(values // 16).astype(np.uint8)], ""),
        ([(0 * values).astype(np.uint8)], "grey values 0 to 0 of 0 to 255"),
    )):  # fmt: skip
        paths = grey_files(tmp_path / str(k), *images)
        list(evaluate.batches_of(paths, (30, 40), Reading(evaluate.white_level_of(paths))))
        notes = capsys.readouterr().err
        assert words in notes and bool(notes) == bool(words)


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


# ---- masks ---------------------------------------------------------------------------------------
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    mode=st.sampled_from(["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16"]),
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
            image.putpalette(np.arange(256).repeat(3).tolist())
        else:
            image = Image.fromarray(a).convert(mode)
        image.save(path, format={"txt": "PNG", "tif": "TIFF"}.get(suffix, suffix.upper()))
    except OSError:  # a format without this mode: a file of another kind under the name
        path.write_text("mask")
    blob = path.read_bytes()
    kept = int(cut * len(blob)) if isinstance(cut, float) else cut
    path.write_bytes(blob[:kept])
    item = evaluate.Item(path, "dent", (path,))
    if found := read_or_refused(path, evaluate.masks_of, item, (12, 20)):
        regions, union = found
        assert size == (12, 20) and union.dtype == bool and len(regions) == bool(union.any())
        if mode not in ("CMYK", "1"):
            assert np.array_equal(union, a > 0)


MASK = picture(0, defect=True)[1].astype(np.uint8)
NONE, SPECKS = 0 * MASK, np.random.default_rng(0).integers(0, 7, MASK.shape).astype(np.uint8)
PALETTE, VOC = Image.fromarray(1 - MASK, "P"), Image.fromarray(np.where(MASK, 255, SPECKS), "P")
PALETTE.putpalette([255, 255, 255, 0, 0, 0])  # defective white is index 0
VOC.putpalette([0, 0, 0, 128, 0, 0, *[0] * 759, 224, 224, 192])
KINDS = [  # masks of what is defective in MASK, and the note on them
    ("labels.png", MASK * np.where(np.arange(48) > 18, 255, 90).astype(np.uint8), ""),
    ("visa.png", MASK * 4, ""),
    ("deep.tif", MASK.astype(np.uint16) * 400, ""),
    ("palette.png", PALETTE, ""),
    ("green.png", np.dstack([NONE, MASK * 7, NONE]), ""),
    ("alpha.png", np.dstack([MASK, MASK, MASK, NONE + 255]), ""),
    ("jpeg.png", 249 * MASK + SPECKS, "faint values beside bright ones.*: defective from 127.5 on"),
    ("inverted.png", 255 * (1 - MASK), "91 % of this mask is defective"),
    ("empty.png", NONE, "0 % of this mask is defective"),
]


@pytest.mark.parametrize("name, array, note", KINDS)
def test_masks_of_many_kinds_are_read(tmp_path, capsys, name, array, note):
    """Of several in a folder that look wrong the first is named."""
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(tmp_path / name)
    image.save(tmp_path / f"again-{name}")
    expected = {"inverted.png": MASK == 0, "empty.png": NONE > 0}.get(name, MASK > 0)
    for path in (tmp_path / name, tmp_path / f"again-{name}"):
        assert np.array_equal(read_mask(path, MASK.shape) != 0, expected)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == bool(note)
    for line in said:
        assert re.search(f"/{name}: {note}", line)


@pytest.mark.parametrize(
    "name, image, words",
    [
        ("a.jpg", Image.fromarray(255 * MASK), "a mask as JPEG"),
        ("b.webp", Image.fromarray(255 * MASK), "a mask as WEBP"),
        ("c.png", VOC, "label 6 beside a border 255"),
        ("d.png", Image.fromarray(MASK, "P"), "1 is none of its 1 colours"),
        ("e.tif", Image.fromarray(np.full(MASK.shape, np.nan, np.float32)), "floating-point"),
    ],
)
def test_masks_that_may_be_misread_are_refused(tmp_path, name, image, words):
    """JPEG by format; VOC's labels and border; a value without a colour; NaN, which is not zero."""
    image.save(tmp_path / name)
    for read in (evaluate.read_ignored, lambda path: read_mask(path, MASK.shape)):
        with pytest.raises(InputError, match=f"{name}: .*{words}"):
            read(tmp_path / name)


def test_many_regions_take_their_own_boxes_alone(tmp_path):
    mask = np.zeros((600, 600), bool)
    mask[::20, ::20] = True
    mask[2:19, [2, 18]] = mask[18, 2:19] = True  # around nothing
    mask[10, 10] = True  # in its box
    save(tmp_path / "m.png", mask * 255)
    regions, _ = evaluate.masks_of(evaluate.Item(None, "pore", (tmp_path / "m.png",)), mask.shape)
    assert sum(region.size for _, region, _ in regions) == 901 + 17 * 17
    assert sum(region.sum() for _, region, _ in regions) == mask.sum() and len(regions) == 902


def test_reasons_for_missing_metrics_are_kept_apart(capsys):
    items = [evaluate.Item(Path("a.png"), "dent", None), evaluate.Item(Path("b.png"), "hole", ())]
    category = evaluate.Category("c", [], items, None)
    known = evaluate.calibrate([1], how=1)
    scored = torch.zeros(2, 4, 4), evaluate.classify([0, 0], known), [(4, 4)] * 2
    evaluate.measure(category, scored)
    assert capsys.readouterr().err.splitlines() == [
        "note: c: no good test images: AUROC is not defined",
        "note: c: 1 defective images have no folder of masks: no pixel metrics",
    ]


# ---- the process ---------------------------------------------------------------------------------
def test_resolution_says_what_a_defect_needs():
    small = train.resolution(wtflow.Recipe(), [np.zeros((384, 384), np.uint8)])
    assert "a position of the map covers 8 x 8" in small and "--image-size" not in small
    large = train.resolution(wtflow.Recipe(aspect=0.75), [np.zeros((1500, 2000), np.uint8)])
    assert "covers 36 x 36" in large and "give a larger --image-size" in large


def test_importing_changes_no_setting_of_the_process():
    """Environment, hooks of fork, warnings, signals, Pillow's limit: commands set them."""
    script = (
        "import os, signal, warnings, matplotlib, scipy.ndimage, torch, PIL.Image as image\n"
        "import wtflow; os.register_at_fork = None\n"
        "state = lambda: (dict(os.environ), image.MAX_IMAGE_PIXELS, list(warnings.filters),"
        " signal.getsignal(signal.SIGTERM))\n"
        "before = state(); import evaluate, train; assert state() == before"
    )
    succeeds(shell("-c", script))


def test_without_file_locks_a_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with evaluate.locked(tmp_path / "a"):
        assert (tmp_path / "a").is_dir()
