"""Every layout on a tiny folder with known counts; every kind of image file."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import make_mvtec, picture, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import evaluate
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
    assert [saturates_at for _, saturates_at in regions] == [84, 20]


def test_mvtec_3d(tmp_path):
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
    with ThreadPoolExecutor(2) as pool:
        paths = [tmp_path / "a.png", tmp_path / "b.png"]
        images, sizes = evaluate.load_batch(paths, (64, 128), pool)
    assert images.shape == (2, 3, 64, 128) and sizes == [(1, 1), (1, 20000)]
    assert evaluate.image_sizes(paths) == sizes


def test_sizes_from_the_header_are_those_of_the_picture_as_shown(tmp_path):
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.jpg"
        Image.fromarray(RGB).save(path, exif=exif)
        assert evaluate.image_sizes([path]) == [read_image(path).size[::-1]]
    (tmp_path / "x.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match="x.png"):
        evaluate.image_sizes([tmp_path / "x.png"])
