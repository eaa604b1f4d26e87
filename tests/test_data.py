"""Every layout with known counts; every kind of image file and of mask."""

import json
import os
import re
import shutil
import struct
import zlib

import numpy as np
import pytest
from conftest import make_mvtec, picture, save, shell, succeeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import evaluate
import train
import wtflow
from evaluate import InputError, Item, Reading, as_image, read_dataset, read_mask

RGB = picture(0, size=(12, 20))[0].astype(np.uint8)
SLOW = [HealthCheck.function_scoped_fixture]


def put(root, names):
    """Empty files; a folder where a name ends with /."""
    for name in names.split():
        (root / f"{name}x").parent.mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            (root / name).touch()


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


def refuses(words, read, *args):
    with pytest.raises(InputError, match=words):
        read(*args)


def read_or_refused(path, read, *args):
    """What it gives; None where it is refused by one line that names the path."""
    try:
        return read(*args)
    except InputError as e:
        assert str(path) in str(e) and "\n" not in str(e)


# ---- layouts -------------------------------------------------------------------------------------
LAYOUTS = {  # files of a category, its counts and its first mask
    "BTAD": (
        "train/ok/0.bmp test/ok/1.bmp test/ko/2.bmp ground_truth/ko/2.png",
        (1, {"good": 1, "ko": 1}, "ground_truth/ko/2.png"),
    ),
    "AD 2": (
        "train/good/0.png test_public/good/0.png test_public/bad/0.png test_private/0.png "
        "test_public/ground_truth/bad/0_mask.png",
        (1, {"good": 1, "bad": 1}, "test_public/ground_truth/bad/0_mask.png"),
    ),
    "3D-AD": (
        "train/good/rgb/0.png train/good/gt/0.png train/good/xyz/0.tiff validation/good/rgb/0.png "
        "test/good/rgb/0.png test/good/gt/0.png test/hole/rgb/0.png test/hole/gt/0.png "
        "test/crack/0.png calibration/camera.json",
        (1, {"good": 1, "hole": 1}, "test/hole/gt/0.png"),
    ),
    "in any case and depth": (
        "Train/Good/day2/x.WEBP Train/OK/y.gif TEST/Normal/1.jfif TEST/KO/day/2.ppm "
        "Masks/ko/day/2_GT.TIF Masks/ko/day/.hidden.png",
        (2, {"good": 1, "KO": 1}, "Masks/ko/day/2_GT.TIF"),
    ),
    "without masks": ("train/good/0.png test/x/0.png test/x/readme.txt", (1, {"x": 1}, None)),
    "test images alone": ("test/good/0.png test/x/1.png", (0, {"good": 1, "x": 1}, None)),
}


@pytest.mark.parametrize("files, found", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tmp_path, files, found):
    put(tmp_path / "set/part", files)
    (name, (c,)), n = read_dataset(tmp_path / "set"), found[0]
    assert (name, c.name) == ("set", "part") and read_dataset(tmp_path / "set/part") == (name, [c])
    masks = [None if i.masks is None else i.masks[0] for i in c.test if i.kind != "good"]
    assert (*counts(c), masks[0]) == (*found[:2], found[2] and tmp_path / "set/part" / found[2])
    if not n:
        refuses("part: no training images", evaluate.leave_out, [c], None)


@pytest.mark.parametrize("truth", ["Ground_Truth", "masks", "GT"])
@pytest.mark.parametrize("end", ".PNG _mask.PNG .tif _gt.png _GT.bmp _Mask.pgm _mask_2.png".split())
def test_masks_are_found_by_the_names_that_count(tmp_path, truth, end):
    put(tmp_path / "x", f"train/good/0.png test/dent/000.png {truth}/dent/000{end}")
    assert only(tmp_path).test[0].masks == (tmp_path / f"x/{truth}/dent/000{end}",)


def test_mvtec_root_and_what_is_not_read(tmp_path, capsys):
    """What lies beside is named, and never trained on; links are followed once."""
    put(tmp_path / "set", "overview.png washer/1.png bolt/train/good/folder.png/")
    root = make_mvtec(tmp_path / "set", ("bolt", "nut")) / "bolt"
    put(root, "test/dent/readme.txt train/good/b.heic train/good/.x.png train/new/0.png")
    put(root, f"ground_truth/dent/999.png train/good/größe部品(1){'n' * 150}.jfif")
    (root / "train/good/loop").symlink_to(root / "train/good", target_is_directory=True)
    name, found = read_dataset(tmp_path / "set")
    assert name == "set" and [c.name for c in found] == ["bolt", "nut"]
    assert counts(found[0]) == (7, {"good": 3, "dent": 3})
    assert all(len(i.masks) == (i.kind == "dent") for i in found[0].test)
    said = capsys.readouterr().err
    assert "set: 2 files are not read: set/overview.png, washer/1" in said
    assert "bolt: 4 files are not read: dent/999.png, dent/readme.txt, good/b.heic, new/0" in said
    assert read_dataset(tmp_path / "set", ["nut"]) == ("set", [found[1]])
    refuses("no category 'x': choose from bolt, nut", read_dataset, tmp_path / "set", ["x"])


def test_visa(tmp_path):
    root, rows = tmp_path / "VisA", "object,split,label,image,mask"
    for k in range(5):
        name = f"candle/Data/Images/Normal/{k}.JPG"
        rows += f"\ncandle,{'train' if k < 3 else 'test'},normal,{name},"
        put(root, name)
    for k in range(2):
        name, truth = f"candle/Data/Images/Anomaly/{k}.JPG", f"candle/Data/Masks/Anomaly/{k}.png"
        rows += f"\ncandle,test,anomaly,{name},{truth}"
        put(root, f"{name} {truth} split_csv/unused.png")
    split = root / "split_csv/1cls.csv"
    split.write_text(rows)
    name, (c,) = read_dataset(root)
    assert name == "VisA" and counts(c) == (3, {"good": 2, "anomaly": 2})
    assert c.test[-1].masks == (root / "candle/Data/Masks/Anomaly/1.png",)
    by_hand = rows.replace("/", "\\").replace("normal", "Normal").replace("\n", "\r\n")
    by_hand = by_hand.replace("test,Normal", "val,Normal", 1)  # what is not train is test
    split.write_bytes(b"\xef\xbb\xbf" + by_hand.encode())
    assert only(root) == c
    split.write_text(by_hand.replace("test,anomaly", "train,anomaly"))
    assert counts(only(root)) == (3, {"good": 2})
    for image in ("candle/../../x.png", "nut/0.png", "/x.png"):
        split.write_text(f"{rows}\ncandle,test,normal,{image},")
        refuses("lies outside of .*candle: mend the split file", read_dataset, root)
    for content in (rows.replace(",", ";").encode(), rows.encode("utf-16")):
        split.write_bytes(content)
        refuses("1cls.csv: cannot be read", read_dataset, root)


def test_loco(tmp_path):
    root, mask = tmp_path / "juice", picture(0, defect=True)[1]
    put(root, "train/good/0.png test/good/0.png validation/good/0.png")
    for name in ("logical_anomalies/000", "logical_anomalies/001", "structural_anomalies/000"):
        put(root, f"test/{name}.png")
        for r in range(2):
            save(root / f"ground_truth/{name}/{r:03d}.png", mask * (255 - r))
    refuses("defects_config.json: cannot be read as LOCO's", read_dataset, root)
    keys = ("defect_name", "pixel_value", "saturation_threshold", "relative_saturation")
    defects = [("d255", 255, 0.5, True), ("d254", 254, 20, False)]
    config = json.dumps([dict(zip(keys, defect, strict=True)) for defect in defects])
    (root / "defects_config.json").write_text(config)
    c = only(root)
    assert counts(c) == (1, {"good": 1, "logical_anomalies": 2, "structural_anomalies": 1})
    regions, _ = evaluate.masks_of(c.test[-1], (40, 48), c.saturation)
    assert [saturates_at for *_, saturates_at in regions] == [84, 20]
    words = "001.png: cannot be read as a value of defects_config.json .254"
    refuses(words, evaluate.masks_of, c.test[-1], (40, 48), {255: (0.5, True)})
    shutil.rmtree(root / "ground_truth/logical_anomalies/001")
    refuses("001/000.png: this mask is missing", read_dataset, root)
    (root / "defects_config.json").write_text(config.replace("20", '"x"'))
    refuses("defects_config.json: cannot be read as LOCO's", read_dataset, root)


@pytest.mark.parametrize("folder", ["", "good/day1", "train/good", "Normal"])
def test_a_folder_of_good_images_is_named_after_the_product(tmp_path, folder):
    for name in ("screw", "nut"):
        put(tmp_path / "parts" / name / folder, "0.jpg")
        place = tmp_path / "parts" / name / folder.removesuffix("/day1")
        dataset, (c,) = read_dataset(place)
        assert (dataset, c.name, counts(c)) == ("parts", name, (1, {}))


BOLT = (
    "train/good/000.png test/good/006.png test/dent/000.png test/dent/000.json "
    "ground_truth/dent/000_mask.png "
)
MAY_BE_GOOD = "good_monday ok-2 normal.1 all_ok io Pass Defect-Free images not_ok".split()
AMONG = "test/dent/Masks train/good/gt test/SegmentationClass test/dent/SegmentationObject".split()
NAMED = "train/good/000_GT test/good/x_mask test/dent/007_GT test/dent/001_mask_2".split()
OF_BOXES = (
    *("train/good/000.json", "train/good/day/_annotations.coco.json", "train/labels/000.txt"),
    *("test/good/006.xml", "labels/000.txt"),
)
REFUSED = {  # a file that is added to a category: what the refusal says
    **{f"test/{kind}/0.png": f"{kind}/0.png: good, or a def.* test/good" for kind in MAY_BE_GOOD},
    **{f"{name}/9.png": f"{name}/9.png: a mask by.*put masks into ground_truth" for name in AMONG},
    **{f"{name}.bmp": f"{name}.bmp: a mask by its name" for name in NAMED},
    **{
        f"{name}.jpg": r"00[06].* has the same name.*_mask.png"
        for name in ("train/good/000", "test/good/006", "test/dent/000")
    },
    **{name: f"{name}: an annotation.* good ones into train/good" for name in OF_BOXES},
    "ground_truth/dent/000.png": "000_mask.png: 000.png is a mask of the same image: remove one",
    "ground_truth/dent/000_mask_2.png": "000_mask_2.png: 000_mask.png is a mask of the same image",
    "test/dent/007.png": "ground_truth/dent/007_mask.png: this mask is missing",
    "test/dent/007.png ground_truth/dent/mask_007.png": "007_mask.png: this mask is missing",
    "test/dent/day2/000.png": "dent/day2/000_mask.png: this mask is missing",
    "test/hole/000.png": "ground_truth/hole/000_mask.png: this mask is missing",
}
NOT_GOOD = "train: no folder good, ok or normal: put good images into train/good"
FOLDERS = [  # files, the folder that is given, what the refusal says
    ("", "absent", "absent: no such folder"),
    ("x/a.txt", ".", "no category here: put good images into train/good"),
    ("mean/train/good/0.png", ".", "mean: a category cannot be called mean"),
    ("-5mm/train/good/0.png", ".", "cannot be called -5mm"),
    ("=x/train/good/0.png", ".", "cannot be called =x"),
    ("x/train/Cam1/0.png x/test/Cam1/0.png", ".", NOT_GOOD),  # neither says it is good
    ("x/train/0.png x/train/0_GT.png", "x", NOT_GOOD),  # KolektorSDD2
    ("nut/good/0.png nut/bad/0.png", ".", "no category here"),  # products, or classes
    ("nut/good/0.png nut/bad/0.png nut/1.png", "nut", "a folder of good images and nothing else"),
    ("nut/good/0.png nut/good/0_GT.bmp", "nut/good", "0_GT.bmp: a mask by its name"),
    ("masks/0.png", "masks", "masks/0.png: a mask by its name or folder"),
    ("x/images/train/0.png x/labels/train/0.txt", "x/images", NOT_GOOD),
    ("x/images/train/0.png x/labels/train/0.txt", "x/images/train", "0.txt: an annotation"),
    ("x/train2017/0.png x/annotations/train2017.json", "x/train2017", "json: an annotation"),
    ("x/train2017/0.png x/annotations/train2017.json", "x", "no category here"),
    (BOLT, ".", None),
    *((BOLT + added, ".", words) for added, words in REFUSED.items()),
]


@pytest.mark.parametrize("files, place, words", FOLDERS)
def test_folders_that_could_be_misread_are_refused(tmp_path, files, place, words):
    put(tmp_path / "part" if files.startswith(BOLT) else tmp_path, files)
    if words is None:
        assert counts(only(tmp_path)) == (1, {"good": 1, "dent": 1})
    else:
        refuses(words, read_dataset, tmp_path / place)


def test_links_are_followed_once_and_no_image_counts_twice(tmp_path):
    """Two links in each of 30 folders would lead to 2^30 images."""
    put(tmp_path / "part", BOLT)
    link = tmp_path / "part/test/dent2"
    link.symlink_to(tmp_path / "part/test/dent", target_is_directory=True)
    refuses("test/dent2/000.png: .*is the same file by a link", read_dataset, tmp_path)
    link.unlink()
    place = tmp_path / "part/train/good"
    for _ in range(30):
        place = place / "x"
        place.mkdir()
        for name in ("a", "b"):
            (place / name).symlink_to(place / "x", target_is_directory=True)
    put(place, "deep.png")
    assert counts(only(tmp_path))[0] == 2


PIECES = [  # of the layouts, and of what else may lie in folders
    *"train/ train/good/0.png train/good/0.jpg test/good/0.png test/dent/0.png test/dent/".split(),
    *"ground_truth/ ground_truth/dent/0_mask.png ground_truth/dent/0_mask.png/".split(),
    *"defects_config.json test/logical_anomalies/0.png 0.png".split(),
    *"Data/Images/Normal/0.JPG ../split_csv/1cls.csv".split(),
    *"train/good/rgb/0.png test/good/rgb/0.png".split(),
    *"train/good/dir.png/ train/good/link.png train/good/.hidden.png train/good/a.txt".split(),
    *("train/good/größe部品.PNG", "train/good/" + "n" * 200 + ".png"),
]


@settings(max_examples=150, suppress_health_check=SLOW)
@given(pieces=st.sets(st.sampled_from(PIECES), max_size=9), whole=st.booleans())
def test_hostile_folders_are_read_or_refused_by_name(tmp_path, pieces, whole):
    """Any mixture of layouts, links, empty files and folders with the names of images.

    Categories, or one line that names a path.
    """
    shutil.rmtree(tmp_path / "set", ignore_errors=True)
    root = tmp_path / "set/part"
    root.mkdir(parents=True)
    for piece in sorted(pieces):
        if any(p.is_file() for p in (root / piece).parents) or (root / piece).exists():
            continue
        put(root, piece)
        if piece.endswith("link.png"):
            (root / piece).unlink()
            (root / piece).symlink_to("nowhere.png")
    found = read_or_refused(tmp_path, read_dataset, root.parent if whole else root)
    for c in found[1] if found else ():
        for p in [*c.train, *(i.path for i in c.test)]:  # all are empty or dangling links
            refuses(f"{re.escape(str(p))}: cannot be read", as_image, p)


HEAD = "image,score,leave_out\n"
LEFT_OUT = [  # a train-scores.csv, the images that it leaves out or what the refusal says
    (HEAD + "004.png,9,x\n005.png,8,\n", {"004.png"}),
    ('"image","leave_out"\r\n"good/004.png","x"\r\n./005.png,x\r\n', {"004.png", "005.png"}),
    ("", "a mark in leave_out"),
    (HEAD + "004.png,9,\n", "a mark in leave_out"),
    ("004.png\n", "a mark in leave_out"),
    (HEAD.replace(",", ";") + "004.png;9;x\n", "a mark in leave_out"),
    (HEAD.encode("utf-16"), "UTF-8"),
    ((HEAD + "größe.png,9,x").encode("cp1252"), "UTF-8"),
    (HEAD + "99.png,9,x\n", "99.png is that of 0"),
    (HEAD + ",9,x\n", "is that of 0"),
    (HEAD + "004.png,9,x\n005.png,9,no\n", "leave_out is 'no': write x, or nothing"),
    (HEAD + "".join(f"{k:03d}.png,9,x\n" for k in range(6)), "bolt: no training images"),
    (HEAD + "a" * (1 << 18) + ",9,x\n", "cannot be read as a table"),
]


@pytest.mark.parametrize("content, found", LEFT_OUT)
def test_what_is_left_out_is_counted_and_nothing_is_an_error(tmp_path, content, found):
    put(tmp_path / "bolt/train/good", " ".join(f"{k:03d}.png" for k in range(6)))
    categories, file = [only(tmp_path)], tmp_path / "names.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    if isinstance(found, str):
        return refuses(found, evaluate.leave_out, categories, file)
    (kept,) = evaluate.leave_out(categories, file)
    assert {path.name for path in kept.left_out} == found
    assert {*kept.train} == {*categories[0].train} - {*kept.left_out}


# ---- images --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", "L.png RGB.bmp RGBA.png LA.png P.png 1.png C.jpg C.tif".split())
def test_colour_modes_become_rgb(tmp_path, name):
    mode = name.split(".")[0].replace("C", "CMYK")
    converted = Image.fromarray(RGB).convert(mode)
    if mode in ("RGBA", "LA"):  # alpha is dropped, not blended
        converted.putalpha(0)
    converted.save(tmp_path / name)
    image = as_image(tmp_path / name)
    assert image.mode == "RGB" and image.size == (20, 12)
    if mode not in ("1", "CMYK"):
        expected = np.asarray(converted.convert("RGB"), int)
        assert np.abs(np.asarray(image, int) - expected).max() <= 1


@pytest.mark.parametrize("suffix", ["jpg", "tif", "png", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_images_masks_and_sizes_are_turned_as_exif_says(tmp_path, orientation, suffix):
    """White at the top left as shown; the mask of --ignore is a copy of the image."""
    shown, path = np.zeros((12, 20), np.uint8), tmp_path / f"a.{suffix}"
    shown[:4, :6] = 255
    raw = np.rot90(shown, {1: 0, 3: 2, 6: 1, 8: 3}[orientation])
    options = {"quality": 95} if suffix == "jpg" else {"lossless": True} if suffix == "webp" else {}
    save(path, raw, exif=turned(orientation), **options)
    assert np.abs(np.asarray(as_image(path), int)[..., 0] - shown).max() < 40
    assert evaluate.image_sizes([path]) == [(12, 20)]
    assert evaluate.read_resized(path, (8, 8), Reading())[1] == (12, 20)
    if suffix in ("tif", "png"):
        union = evaluate.masks_of(Item(path, "dent", (path,)), (12, 20))[1]
        assert np.array_equal(union, shown > 0)
        assert np.array_equal(evaluate.read_ignored(path), shown > 0)


def test_a_png_that_exif_turns_after_its_pixels_is_refused(tmp_path):
    """Its size, which is read from the head, would be another."""
    path, data = tmp_path / "a.png", b"eXIf" + turned(6).tobytes()[6:]
    save(path, RGB)
    blob = path.read_bytes()
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    path.write_bytes(blob[:-12] + chunk + blob[-12:])
    refuses("EXIF that turns it comes after its pixels", as_image, path)


@pytest.mark.parametrize("suffix", ["tif", "gif", "png", "webp", "mpo"])
def test_a_file_of_several_frames_is_refused(tmp_path, suffix):
    """By its first frame alone a defect in the second would be called good; not a telephone's."""
    frames, path = [Image.fromarray(RGB), Image.fromarray(255 - RGB)], tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    if suffix == "mpo":
        assert as_image(path).size == (20, 12)
    else:
        refuses("2 frames: save each as an image of its own", as_image, path)


@pytest.mark.parametrize("kind, channels", [(2, 3), (4, 2), (6, 4)])
def test_colours_of_16_bits_are_refused(tmp_path, kind, channels):
    """Pillow keeps their upper byte alone: of 12 bits 16 levels would be left, without a word."""
    head = struct.pack(">IIBBBBB", 4, 4, 16, kind, 0, 0, 0)
    rows = zlib.compress(4 * (b"\0" + bytes(8 * channels)))
    with open(tmp_path / "a.png", "wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for name, chunk in ((b"IHDR", head), (b"IDAT", rows), (b"IEND", b"")):
            size, checksum = len(chunk), zlib.crc32(name + chunk)
            file.write(struct.pack(">I", size) + name + chunk + struct.pack(">I", checksum))
    refuses("16-bit colours", as_image, tmp_path / "a.png")


def test_a_bitmap_of_16_bits_a_pixel_is_read(tmp_path):
    """Of 5, 6 and 5 bits a colour: no colour of 16 bits."""
    head = b"BM" + struct.pack("<IIIIiiHHIIiiII", 74, 0, 66, 40, 2, 2, 1, 16, 3, 8, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    (tmp_path / "a.bmp").write_bytes(head + masks + struct.pack("<HHHH", 0xFFFF, 0xF800, 0, 0))
    assert np.asarray(as_image(tmp_path / "a.bmp")).max((0, 1)).tolist() == [255, 255, 255]


def test_damaged_files_are_read_or_refused_by_name(tmp_path):
    """600 of them, or FUZZ: cut, bytes changed, put in, taken out. One InputError with the name."""
    rng, blobs, exif = np.random.default_rng(0), [], turned(6)
    exif[0x011A], exif[0x0131] = 2.5, "x"
    deep = np.arange(240, dtype=np.uint16).reshape(12, 20)
    for name in "a.png a.jpg a.bmp a.tif a.webp a.gif a.ppm deep.png deep.tif deep.pgm".split():
        path = tmp_path / name
        options = {"exif": exif} if path.suffix in (".png", ".jpg", ".tif", ".webp") else {}
        Image.fromarray(deep if path.stem == "deep" else RGB).save(path, **options)
        blobs.append((path, path.read_bytes()))
    for _ in range(int(os.environ.get("FUZZ", 600))):
        path, blob = blobs[rng.integers(len(blobs))]
        head = min(len(blob), 400)  # where most of what parsers read is
        blob = bytearray(blob)
        for _ in range(rng.integers(1, 6)):
            k, n = rng.integers(rng.choice([head, len(blob)])), int(rng.integers(0, 5))
            blob[k : k + n] = rng.bytes(rng.choice([n, n, n, int(rng.integers(0, 9))]))
        path.write_bytes(blob[: rng.integers(1, len(blob))] if rng.random() < 0.2 else blob)
        for read in (as_image, read_mask, lambda p: evaluate.image_sizes([p])):
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
            refuses(f"x.{suffix}: cannot be read", as_image, path)
    grey = np.full((40, 40, 3), 128)  # as libjpeg makes it, and whole
    save(path, grey)
    assert np.array_equal(as_image(path), grey)


def test_a_strip_is_read_and_too_many_pixels_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as the commands do
    for height in (48000, 65537):
        Image.new("1", (2048, height), 1).save(tmp_path / f"{height}.png")
    assert as_image(tmp_path / "48000.png").size == (2048, 48000)
    refuses("65537.png: .*2048 x 65537 pixels, more than", as_image, tmp_path / "65537.png")


def test_what_is_no_image_is_refused(tmp_path, monkeypatch):
    """PostScript would start a program; a pipe would not end; memory that ends is named."""
    path = tmp_path / "x.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    refuses("x.png: cannot be read as an image .cannot identify", as_image, path)
    path.unlink()
    os.mkfifo(path)
    for read in (as_image, lambda path: evaluate.leave_out([], path)):
        refuses("x.png: cannot be read as .*a pipe", read, path)

    def greedy(*args):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", greedy)
    save(tmp_path / "a.png", RGB)
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


LEVELS = [("uint8", 200, 255), ("uint16", 1023, 1023), ("uint16", 4000, 4095)]
LEVELS += [("uint16", 60000, 65535), ("int32", 255, 255), ("int32", 1 << 20, (1 << 24) - 1)]


@pytest.mark.parametrize("dtype, top, white_level", LEVELS)
def test_grey_levels_fill_the_range_by_one_rule_for_a_data_set(tmp_path, dtype, top, white_level):
    ramp = np.linspace(0, top, 240).reshape(12, 20)
    paths = grey_files(tmp_path, ramp.astype(dtype), (ramp * 0.1).astype(dtype))
    assert evaluate.white_level_of(paths) == white_level
    for path, share in zip(paths, (1, 0.1), strict=True):  # as dark beside the first as it was
        expected = np.round(255.0 * (ramp * share).astype(dtype) / white_level)
        assert np.abs(np.asarray(as_image(path, white_level))[..., 0] - expected).max() <= 1


def test_grey_levels_above_white_below_zero_and_negatives(tmp_path, capsys):
    ramp = np.linspace(0, 4095, 240).reshape(12, 20)
    deep, below = ramp.astype(np.uint16), (ramp - 2000).astype(np.int32)
    deep, below, real = grey_files(tmp_path, deep, below, ramp.astype(np.float32))
    assert np.asarray(as_image(deep, 2500))[-1].min() == 255
    assert "0.tif: values up to 4095 are cut at 2500" in capsys.readouterr().err
    (negative,) = grey_files(tmp_path / "w", ramp.astype(np.uint16), tiffinfo={262: 0})
    refuses("values -2000 to 2095", as_image, below, 4095)
    refuses("floating", as_image, real, 4095)
    refuses("0 is white: save it like", as_image, negative, 4095)
    refuses("values 0 to 4095, white level 1023: save it like", as_image, deep, 1023)


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
    assert loaded.reading.white_level == 4095.0
    by_hand = [as_image(paths[2], white_level) for white_level in (4095, 65535)]
    one, same, other = evaluate.score(loaded, [paths[2], *by_hand])
    assert one.score == same.score != other.score


# ---- masks ---------------------------------------------------------------------------------------
@settings(max_examples=100, suppress_health_check=SLOW)
@given(
    mode=st.sampled_from(["1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16"]),
    suffix=st.sampled_from(["png", "tif", "bmp", "txt"]),
    fill=st.sampled_from([0, 1, 7, 255]),
    size=st.sampled_from([(12, 20), (20, 12), (1, 1), (12, 21)]),
    cut=st.sampled_from([None, None, 0, 30, 0.5, 0.95]),
)
def test_hostile_masks_are_regions_or_refused_by_name(tmp_path, mode, suffix, fill, size, cut):
    a = np.zeros(size, np.uint8)
    a[: size[0] // 2] = fill
    path = tmp_path / f"mask.{suffix}"
    try:
        image = Image.fromarray(a.astype(np.uint16) if mode == "I;16" else a)
        if mode != "I;16":
            image = image.convert(mode)
        image.save(path, format={"txt": "PNG", "tif": "TIFF"}.get(suffix, suffix.upper()))
    except OSError:  # a format without this mode: a file of another kind under the name
        path.write_text("mask")
    blob = path.read_bytes()
    path.write_bytes(blob[: int(cut * len(blob)) if isinstance(cut, float) else cut])
    item = Item(path, "dent", (path,))
    if found := read_or_refused(path, evaluate.masks_of, item, (12, 20)):
        regions, union = found
        assert size == (12, 20) and union.dtype == bool and len(regions) == bool(union.any())
        if mode != "1":
            assert np.array_equal(union, a > 0)


MASK = picture(0, defect=True)[1].astype(np.uint8)
NONE, SPECKS = 0 * MASK, np.random.default_rng(0).integers(0, 7, MASK.shape).astype(np.uint8)
FAINT = "faint values beside bright ones.*save it with 0 and 255"
KINDS = [  # files of masks of what is defective in MASK, and the note on them or the refusal
    ("labels.png", MASK * np.where(np.arange(48) > 18, 255, 90).astype(np.uint8), ""),
    ("visa.png", MASK * 4, ""),
    ("deep.tif", MASK.astype(np.uint16) * 400, ""),
    ("green.png", np.dstack([NONE, MASK * 7, NONE]), ""),
    ("alpha.png", np.dstack([MASK, MASK, MASK, NONE + 255]), ""),
    ("grey-alpha.png", np.dstack([MASK, NONE + 255]), ""),
    ("ink.tif", Image.fromarray(255 * MASK).convert("RGB").convert("CMYK"), ""),
    ("inverted.png", 255 * (1 - MASK), "91 % of this mask is defective"),
    ("empty.png", NONE, "0 % of this mask is defective"),
    ("a.jpg", 255 * MASK, "refused: a mask as JPEG"),
    ("a.webp", 255 * MASK, "refused: a mask as WEBP"),
    ("palette.png", Image.fromarray(255 * MASK).convert("P"), "refused: a mask as PNG, P"),
    ("as-jpeg.png", 249 * MASK + SPECKS, f"refused: {FAINT}"),
    ("a.gif", 255 * MASK, "refused: a mask as GIF"),
    ("nan.tif", np.full(MASK.shape, np.nan, np.float32), "refused: .*floating-point"),
]


@pytest.mark.parametrize("name, array, words", KINDS)
def test_masks_of_many_kinds_are_read_or_refused(tmp_path, capsys, name, array, words):
    """Of several in a folder that look wrong the first is named."""
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    paths = [tmp_path / name, tmp_path / f"again-{name}"]
    for path in paths:
        image.save(path)
    if words.startswith("refused: "):
        words = f"{name}: .*{words[9:]}"
        refuses(words, evaluate.read_ignored, paths[0])
        return refuses(words, read_mask, paths[0], MASK.shape)
    expected = {"inverted.png": MASK == 0, "empty.png": NONE > 0}.get(name, MASK > 0)
    for path in paths:
        assert np.array_equal(read_mask(path, MASK.shape) != 0, expected)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == bool(words) and all(f"/{name}: {words}" in line for line in said)


def test_many_regions_take_their_own_boxes_alone(tmp_path):
    mask = np.zeros((600, 600), bool)
    mask[::20, ::20] = True
    mask[2:19, [2, 18]] = mask[18, 2:19] = True  # around nothing
    mask[10, 10] = True  # in its box
    save(tmp_path / "m.png", mask * 255)
    regions, _ = evaluate.masks_of(Item(None, "pore", (tmp_path / "m.png",)), mask.shape)
    assert sum(region.size for _, region, _ in regions) == 901 + 17 * 17
    assert sum(region.sum() for _, region, _ in regions) == mask.sum() and len(regions) == 902


# ---- the process ---------------------------------------------------------------------------------
def test_resolution_says_what_a_defect_needs():
    small = train.resolution(wtflow.Recipe(), [np.zeros((384, 384), np.uint8)])
    assert "8 x 8" in small and "--image-size" not in small
    large = train.resolution(wtflow.Recipe(aspect=0.75), [np.zeros((1500, 2000), np.uint8)])
    assert "36 x 36" in large and "--image-size" in large


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
