"""What a user of a trained model sees: threshold, verdicts, tables, pictures; from Python too."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, fails, picture, run, save, shell, succeeds
from PIL import Image
from test_cli import TINY

import evaluate
import train
import wtflow
from evaluate import InputError


def read_table(path):
    with open(path, newline="") as f:
        return list(csv.DictReader(f))


@pytest.fixture(scope="module")
def model(trained):
    return trained[0] / "bolt/model.pt"


# ---- threshold, p-value, verdict -----------------------------------------------------------------
def gumbel_in_log(n, location=0.3, scale=0.06):
    """n scores at the quantiles (i - 1/2) / n of the tail that fit_tail fits."""
    p = (np.arange(n) + 0.5) / n
    return np.exp(location - scale * np.log(-np.log(p)))


def test_threshold_by_rank_by_hand():
    known = np.arange(1.0, 201)  # 200 good images
    by_rank = partial(evaluate.threshold_of, how="rank")
    assert by_rank(known, 1) == 199  # two are not below it, one is above
    assert by_rank(known, 5) == 191
    assert by_rank(known[:50], 1) == by_rank(known[:50], 0) == 50
    assert by_rank(known[:150], 1) == 150  # ceil(151 * 0.99); its second would not do
    assert by_rank(known[:199], 1) == 198  # exactly 2 of 200 are allowed above
    assert by_rank(np.arange(1.0, 250), 16.4) == 209  # whatever rounding does
    found = evaluate.classify([199.0, 199.5, 500.0, 0.0], evaluate.calibrate(known, how="rank"))
    assert [p.verdict for p in found] == ["good", "defect", "defect", "good"]


def test_threshold_by_the_tail_is_its_quantile():
    """Of exact quantiles the line is exact; a verdict is a p-value below the rate."""
    known = evaluate.calibrate(gumbel_in_log(200))
    assert known.tail[:2] == pytest.approx((0.3, 0.06)) and known.tail.suspects == 0
    assert known.threshold == pytest.approx(np.exp(0.3 - 0.06 * np.log(-np.log(0.99))))
    scores = known.threshold + np.array([-1e-6, 1e-6, 5, -1.5])
    found = evaluate.classify(scores, known)
    assert [p.verdict for p in found] == ["good", "defect", "defect", "good"]
    assert [p.p_value < 0.01 for p in found] == [False, True, True, False]
    assert evaluate.classify([0.0], known)[0].p_value == 1
    assert evaluate.classify([np.nan], known)[0].verdict == "defect"
    assert np.isfinite(evaluate.threshold_of([0, 0, 1])) and evaluate.threshold_of([0, 0, 0]) >= 0
    assert evaluate.threshold_of(known.good_scores, 0) == known.good_scores[-1]
    assert evaluate.threshold_of(known.good_scores, 1, 1.5) == 1.5


def test_defects_among_the_good_scores_stand_out_and_do_not_move_the_threshold():
    """6 of 200, 1.5 to 3 times as high; the rank follows them."""
    clean = gumbel_in_log(194)
    spoiled = np.r_[clean, clean[-1] * np.linspace(1.5, 3, 6)]
    known = evaluate.calibrate(spoiled)
    assert known.tail.suspects in (6, 7, 8)  # as many as are together rare: at most two too many
    assert known.threshold == pytest.approx(evaluate.threshold_of(clean), rel=0.02)
    higher = np.r_[clean, 10 * spoiled[-6:]]
    assert evaluate.threshold_of(higher) == known.threshold  # however high they are
    assert evaluate.threshold_of(spoiled, how="rank") > 1.4 * clean[-1]


@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_good_images_have_no_threshold(n):
    known = evaluate.calibrate(np.ones(n))
    assert known.text() == f"no threshold and no verdict: good images: {n}, give 3 or more"
    found = evaluate.classify([0.5, 9.0], known)
    assert {p.verdict for p in found} == {"none"} and np.isnan([p.p_value for p in found]).all()
    assert evaluate.rates(["good", "dent"], found) == {"fpr": None, "recall": None}
    row = evaluate.score_row("a", "b", found[0])
    assert row["p_value"] == "" and row["score"] == "0.5"
    given = evaluate.classify([0.5, 9.0], evaluate.calibrate(np.ones(n), how=2.0))
    assert [p.verdict for p in given] == ["good", "defect"]


def test_equal_good_scores_have_a_threshold_just_above():
    known = evaluate.calibrate(np.ones(5))
    assert 1 < known.threshold < 1.001 and known.tail.suspects == 0


def test_equal_pixels_are_copies_and_nothing_else_is(tmp_path, capsys):
    """In another file format, too. A part that differs by a grey level in one pixel is no copy."""
    evaluate.SAID.clear()
    image = picture(0, size=(64, 64))[0].astype(np.uint8)
    other = image.copy()
    other[5, 5, 0] += 1
    paths = [tmp_path / f"{k}.{suffix}" for k, suffix in enumerate(("png", "png", "bmp", "png"))]
    for path, array in zip(paths, (image, other, image, image[:, ::-1]), strict=True):
        save(path, array)
    detector = evaluate.new_detector(paths, wtflow.Recipe(image_size=64))
    features, first = evaluate.extract_good(detector, paths, paths)
    assert first.tolist() == [0, 1, 0, 3] and len(features) == 3
    note = "4 training images, 3 different: of equal ones, like 0.png, 2.bmp, the first is used"
    assert note in capsys.readouterr().err
    assert evaluate.copies_of([b"a", b"b"], ["a", "b"]).tolist() == [0, 1]
    assert not capsys.readouterr().err


def test_copies_do_not_lower_the_threshold(capsys):
    """Each of 12 images four times: the detector is that of the 12, and this is said."""
    images = [picture(k)[0].astype(np.uint8) for k in range(12)]
    settings = dict(steps=30, image_size=64, width=16, batch=64)
    detector = train.fit(images, **settings)
    assert not capsys.readouterr().err
    copied = train.fit([image for image in images for _ in range(4)], **settings)
    assert "48 training images, 12 different" in capsys.readouterr().err
    assert torch.equal(copied.normal_scores, detector.normal_scores)


def test_what_stands_out_is_named_drawn_marked_and_can_be_left_out(data, tmp_path):
    """Two of 20 training images are defective; without them nothing stands out."""
    rng = np.random.default_rng(0)
    for k in range(20):
        image = rng.normal(120, 2, (64, 64, 3))
        if k in (4, 11):
            image[20:44, 20:44] = rng.uniform(0, 255, (24, 24, 3))
        save(tmp_path / f"d/part/train/good/{k:02d}.png", image)
    command = ("train.py", "--data", tmp_path / "d/part", *TINY, "--folds", 0)
    result = succeeds(run(*command, "--out", tmp_path / "a"))
    folder = tmp_path / "a/d/part"
    assert "2 of 20 good training images stand out (" in result.stderr
    assert Image.open(folder / "suspects.png").size[1] > 700  # two rows
    rows = read_table(folder / "train-scores.csv")
    assert len(rows) == 20 and {row["image"] for row in rows[:2]} == {"04.png", "11.png"}
    assert [row["leave_out"] for row in rows] == ["x", "x"] + [""] * 18
    first = np.r_[np.arange(20), 4, 5]  # two more that are copies of 04 and 05: marked as these are
    paths = [tmp_path / f"{k:02d}.png" for k in range(22)]
    scores = torch.tensor([float(row["score"]) for row in sorted(rows, key=lambda r: r["image"])])
    known = evaluate.calibrate(scores)
    for path in paths:
        save(path, picture(0)[0])
    found = torch.ones(20, 8, 8), scores
    evaluate.write_suspects(tmp_path / "c", paths, first, found, known, evaluate.Reading())
    *_, one, other = read_table(tmp_path / "c/train-scores.csv")
    assert (one["image"], one["copy_of"], one["leave_out"]) == ("20.png", "04.png", "x")
    assert (other["image"], other["copy_of"], other["leave_out"]) == ("21.png", "05.png", "")
    scores = [float(row["score"]) for row in rows]
    assert scores == sorted(scores, reverse=True)
    result = succeeds(
        run(*command, "--out", tmp_path / "b", "--leave-out", folder / "train-scores.csv")
    )
    assert "stand out" not in result.stderr and not (tmp_path / "b/d/part/suspects.png").exists()
    about = evaluate.read_json(tmp_path / "b/d/part/recipe.json")
    assert sorted(about["left_out"]) == ["04.png", "11.png"]
    _, [category] = evaluate.read_dataset(tmp_path / "d/part")
    twins = [category, category._replace(name="other")]
    [kept, _], _ = evaluate.leave_out(twins, folder / "train-scores.csv")  # in a folder "part"
    assert len(kept.train) == 18
    (tmp_path / "names.txt").write_text("04.png\n")
    with pytest.raises(InputError, match="is that of 2: write more"):
        evaluate.leave_out(twins, tmp_path / "names.txt")
    fails(run(*command, "--leave-out", tmp_path / "none.txt"), "none.txt: cannot be read")


def test_every_score_has_a_prediction(data, trained, model, tmp_path):
    detector = evaluate.load_model(model)
    threshold = evaluate.threshold_of(detector.normal_scores.cpu().numpy())
    assert f"bolt: threshold {threshold:.4f} at a false positive rate of 1 %" in trained[1].stdout
    rows = read_table(trained[0] / "bolt/scores.csv")
    assert [row["kind"] for row in rows] == ["dent"] * 3 + ["good"] * 3
    for row in rows:
        assert row["verdict"] == ("defect" if float(row["score"]) > threshold else "good")
        assert (float(row["p_value"]) < 0.01) == (row["verdict"] == "defect")
    metrics = read_table(trained[0] / "metrics.csv")[0]
    for name, kind in (("fpr", "good"), ("recall", "dent")):
        flagged = [row["verdict"] == "defect" for row in rows if row["kind"] == kind]
        assert metrics[name] == f"{100 * np.mean(flagged):.2f}"
    image = data / "bolt/test/dent/000.png"
    command = ("--model", model, "--image", image, "--out", tmp_path / "a")
    out = succeeds(run("evaluate.py", *command)).stdout
    for word in ("threshold", "score", " p ", rows[0]["verdict"]):
        assert word in out
    with_none = succeeds(run("evaluate.py", *command[:4], "--fpr", 50)).stdout
    assert "at a false positive rate of 50 %" in with_none and with_none != out


def test_too_few_good_images_for_a_rate_say_which_is_attainable():
    for n, fpr in ((99, 1), (6, 20)):
        assert "attainable" not in evaluate.calibrate(np.ones(n), fpr, "rank").text()
    text = evaluate.calibrate(np.ones(49), how="rank").text()
    assert text.endswith(
        "the highest of 49 good images: a false positive rate of 2 %, for 1 % give 99"
    )
    assert (
        evaluate.calibrate(np.arange(1, 25)).text().endswith("1 % (of 24 images: 1.9 % on average)")
    )


def test_thresholds_are_chosen_and_tabled(data, model, tmp_path):
    """By tail, rank or number; the table says what each rate flags."""
    image = ("--image", data / "bolt/test/dent", "--maps", "none", "--out")
    for how, words in (
        ("tail", "of 1 %"),
        ("rank", "the highest of 6 good images"),
        (0.01, "0.0100, as given"),
    ):
        command = ("--model", model, *image, tmp_path / str(how), "--threshold", how)
        assert words in succeeds(run("evaluate.py", *command)).stdout.splitlines()[0]
    assert {row["verdict"] for row in read_table(tmp_path / "0.01/scores.csv")} == {"defect"}
    image = ("--image", data / "bolt/test")
    result = succeeds(run("evaluate.py", "--model", model, *image, "--threshold", 0.01))
    assert "6 of 6 images are defective: or are light, camera or compression" in result.stderr
    lines = succeeds(run("evaluate.py", "--model", model)).stdout.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["0.1", "0.5", "1", "5"]
    known = evaluate.calibration_of(evaluate.load_model(model), 1, "tail")
    assert lines[4].split()[:3] == ["1", f"{known.threshold:.4f}", "10"]
    detector = evaluate.load_model(model)
    path = data / "bolt/test/dent/000.png"
    assert evaluate.score(detector, path, threshold=1e-3).verdict == "defect"
    with pytest.raises(InputError, match="--threshold best: give tail, rank or a score"):
        evaluate.score(detector, path, threshold="best")


def test_the_table_of_thresholds_counts_test_images(capsys):
    known = evaluate.calibrate(gumbel_in_log(200))
    scores = known.tail.threshold(0.01) + np.array([-0.01, 0.01, -0.01, 0.01, 0.01, 0.01])
    evaluate.print_thresholds(known, scores, ["good"] * 2 + ["dent"] * 4)
    row = capsys.readouterr().out.splitlines()[3].split()
    assert row == ["1", f"{known.threshold:.4f}", "10", "50.00", "75.00"]


# ---- folders -------------------------------------------------------------------------------------
def test_a_folder_is_walked_and_a_damaged_image_stops_no_other(model, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", 2)
    for k, name in enumerate(("a.png", "b/a.png", "b/c/x.jpg", "a.jpg", "last.png")):
        save(tmp_path / "line" / name, picture(k)[0])
    broken = tmp_path / "line/b/broken.png"
    broken.write_bytes((tmp_path / "line/a.png").read_bytes()[:90])
    np.save(tmp_path / "line/b/a.npy", picture(0)[0])
    command = ("--model", model, "--image", tmp_path / "line", "--out", tmp_path / "o")
    result = run("evaluate.py", *command)
    assert result.returncode == 2 and "1 of 6 images" in result.stderr
    assert result.stderr.count("broken.png") == 1
    assert "line: 1 files are not read: b/a.npy (.npy)" in result.stderr
    rows = {row["image"]: row for row in read_table(tmp_path / "o/scores.csv")}
    assert {*rows} == {"a.png", "a.jpg", "last.png", "b/a.png", "b/c/x.jpg", "b/broken.png"}
    assert rows["b/broken.png"]["score"] == "" and "cannot be read" in rows["b/broken.png"]["error"]
    pictures = {p.relative_to(tmp_path / "o").as_posix() for p in (tmp_path / "o").rglob("*.png")}
    assert pictures == {"a_png.png", "a_jpg.png", "last_png.png", "b/a_png.png", "b/c/x_jpg.png"}
    alone = run("evaluate.py", "--model", model, "--image", tmp_path / "line/last.png", "--out",
                tmp_path / "x")  # fmt: skip
    assert f"score {float(rows['last.png']['score']):.4f}" in alone.stdout
    assert [row["image"] for row in read_table(tmp_path / "x/scores.csv")] == ["last.png"]
    assert (tmp_path / "x/last_png.png").is_file()


def test_a_score_that_is_not_finite_is_the_error_of_its_image(model, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", 2)
    paths = [tmp_path / f"{k}.png" for k in range(5)]
    for k, path in enumerate(paths):
        save(path, picture(k)[0])
    paths[2].write_bytes(b"")
    detector = evaluate.load_model(model)
    features, done = detector.features, []

    def broken(batch):
        done.append(len(batch))
        x = features(batch)
        return x * float("nan") if len(done) == 2 else x  # of the second batch, 3.png is left

    monkeypatch.setattr(detector, "features", broken)
    known = evaluate.calibration_of(detector, 1.0, "tail")
    found = [found for found, _, _ in evaluate.predictions_of(detector, paths, known)]
    errors = {k: str(e) for k, e in enumerate(found) if isinstance(e, InputError)}
    assert done == [2, 1, 1] and [*errors] == [2, 3]
    assert "2.png: cannot be read" in errors[2] and "3.png: its score is not finite" in errors[3]


def test_what_is_scored_goes_to_out_but_not_among_the_images(model, tmp_path, monkeypatch):
    """Without --out it is lines alone; a table of the same folder and model is made anew."""
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(("line/a.png", "line/day\n2/b.png")):
        save(tmp_path / name, picture(k)[0])
    command = ("evaluate.py", "--model", model, "--image")
    for out in ("line/a.png", "b.png", "b.csv"):
        fails(run(*command, "line/a.png", "--out", out), out, "give a folder")
    for out in ("line", "line/o"):
        fails(run(*command, "line", "--out", out), "--out", "lies in the folder of the images")
    for out in ((), ("--out", "."), ("--out", ".")):
        result = succeeds(run(*command, "line", *out))
        assert len(result.stdout.splitlines()) == 3 and "day\\n2/b.png  score " in result.stdout
        assert not result.stderr and (tmp_path / "scores.csv").exists() == bool(out)
    assert [row["image"] for row in read_table("scores.csv")] == ["a.png", "day\n2/b.png"]
    assert (tmp_path / "a_png.png").is_file()


def items(*names):
    return [evaluate.Item(Path("/d/test") / name, name.split("/")[0], ()) for name in names]


def test_names_of_test_images_keep_what_tells_them_apart(tmp_path):
    names = evaluate.names_of(items("dent/0.png", "dent/0.jpg", "good/a/0.png", "good/b/0.png"))
    assert [str(name) for name in names] == ["dent/0.png", "dent/0.jpg", "good/a/0.png",
                                             "good/b/0.png"]  # fmt: skip
    assert [str(name) for name in evaluate.names_of(items("good/rgb/0.png"))] == ["good/0.png"]
    category = SimpleNamespace(test=items("dent/0.png", "good/a/0.png", "good/b/0.png"))
    maps = torch.arange(3.0)[:, None, None].expand(3, 4, 4)
    evaluate.write_maps(tmp_path / "x", category, maps, [(8, 9)] * 3)
    for k, name in enumerate(("dent/0", "good/a/0", "good/b/0")):
        tiff = np.asarray(Image.open(tmp_path / f"anomaly_maps/x/test/{name}.tiff"))
        assert tiff.shape == (8, 9) and (tiff == k).all()


def test_names_of_pictures_come_from_the_path_alone_and_are_short(tmp_path):
    """100 of more than 255 bytes that share the most of it, and such as a simple rule mixes up."""
    long = [Path(f"{'零' * 80}{k}.png") for k in range(100)]
    others = [Path(name) for name in ("a.png", "a.jpg", "c/b.png", "c_b.png", "a_png.png")]
    names = [evaluate.picture_name(name, "false_positive10_") for name in [*long, *others]]
    assert len({*names}) == 105
    assert all(len(f".{name.name}.tmp".encode()) < 255 for name in names)
    assert evaluate.picture_name(Path("c/b.png"), "hit1_") == Path("c/hit1_b_png.png")


KNOWN = evaluate.calibrate(gumbel_in_log(9), how=1.5)


# ---- tables that others read ----
def test_a_table_opens_in_a_spreadsheet_and_runs_nothing(tmp_path):
    """Plain UTF-8; what would be run is a path; numbers stay numbers, and other text as it is."""
    names = ["=cmd|A0.png", "+a", "-5mm", "@x", "\tx", "\rx", "＝x", "＋x"]
    for name in [*names, "-5", "größer", "a;=b", 'a"b', "a,b", "x\ny", "'a"]:
        evaluate.write_csv(tmp_path / "a.csv", ("image", "n"), [{"image": name, "n": -1.0}])
        assert (tmp_path / "a.csv").read_bytes().startswith(b"image,n\r\n")
        with open(tmp_path / "a.csv", newline="", encoding="utf-8") as f:
            [row] = csv.DictReader(f)
        assert row["image"] == (f"./{name}" if name in names else name) and row["n"] == "-1.00"
        [line] = csv.reader(io.StringIO(evaluate.csv_text(("image",), [row])), delimiter=";")
        assert line == [row["image"]]  # of countries with other separators
    (tmp_path / "a.csv").unlink()


def test_a_part_of_the_categories_has_its_own_table(data, trained, tmp_path):
    folder = trained[0]
    before = (folder / "results.csv").read_bytes()
    succeeds(run("evaluate.py", "--run", folder, "--data", data, "--category", "bolt"))
    assert (folder / "results.csv").read_bytes() == before
    assert [row["category"] for row in read_table(folder / "results-bolt.csv")] == ["bolt", "mean"]
    assert (folder / "metrics-bolt.csv").is_file()
    recipe = json.loads((folder / "bolt/recipe.json").read_text())
    assert recipe["image_size"] == 64 and recipe["seed"] == 0 and recipe["left_out"] == []


def test_a_scoring_that_was_stopped_goes_on(data, model, tmp_path):
    """A half-written last row and a row with an error are made again, the others stay."""
    folder, table = tmp_path / "line", tmp_path / "s/scores.csv"
    shutil.copytree(data / "bolt/test", folder)
    command = ("evaluate.py", "--model", model, "--image", folder, "--out", table.parent)
    command += ("--maps", "none")
    succeeds(run(*command))
    whole = table.read_bytes()
    lines = whole.splitlines(keepends=True)
    first, second, third = [line.split(b",")[0].decode() for line in lines[1:4]]
    cells = lines[3].split(b",")
    broken = b",".join([cells[0], b"", b"", b"", *cells[4:-1], b"broken\r\n"])
    table.write_bytes(b"".join(lines[:3]) + broken + lines[4][:9])
    result = succeeds(run(*command, "--resume"))
    assert table.read_bytes() == whole
    assert len(result.stdout.splitlines()) == 1 + len(lines) - 3
    for threshold in (1e-3, 99):
        words = "rows of another folder, model or threshold"
        fails(run(*command, "--resume", "--threshold", threshold), words)
    (folder / first).unlink()  # an image that is gone keeps its row
    succeeds(run(*command, "--resume"))
    assert table.read_bytes() == whole
    save(folder / second, picture(9)[0])  # another one of its name does not
    result = succeeds(run(*command, "--resume"))
    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == [second]
    assert table.read_bytes() != whole


HEAD = ",".join(evaluate.FOLDER_SCORES)


@pytest.mark.parametrize(
    "rows",
    [
        "a.png,1,0.1,good,1,/x,1,\n",
        '"a.png",1,0.1,good,1,/x,1,\r\n',
        f"{'a' * 131_073},1,0.1,good,1,/x,1,\r\n",
        "a.png,1\r\nb.png,1,0.1,good,1,/x,1,\r\n",
        "a.png,1,0.1,good,1,/x,1,,,\r\n",
    ],
)
def test_a_table_that_was_changed_is_refused_in_one_line(data, model, tmp_path, rows):
    table = tmp_path / "scores.csv"
    table.write_text(f"{HEAD}\r\n{rows}", newline="")
    before = table.read_bytes()
    command = ("--model", model, "--image", data / "bolt/test", "--out", tmp_path, "--resume")
    fails(run("evaluate.py", *command), "scores.csv: cannot be read as the table it was")
    assert table.read_bytes() == before


def test_images_of_another_aspect_are_named_once(model, tmp_path, capsys):
    evaluate.SAID.clear()
    detector, image = evaluate.load_model(model), picture(0)[0].astype(np.uint8)
    evaluate.score(detector, [image, np.kron(image, np.ones((3, 3, 1), np.uint8))])
    assert "may not compare" not in capsys.readouterr().err
    save(tmp_path / "wide.png", image[:20])
    evaluate.score(detector, [tmp_path / "wide.png"] * 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "wide.png: its height is 0.417 times its width, of training images 0.833 to" in line


def test_one_pil_image_may_be_in_a_list_several_times(model, tmp_path):
    """It is decoded once, though images are read in parallel."""
    Image.fromarray(np.kron(picture(0)[0], np.ones((20, 20, 1))).astype(np.uint8)).save(
        tmp_path / "a.png"
    )
    detector = evaluate.load_model(model)
    scores = {p.score for p in evaluate.score(detector, [Image.open(tmp_path / "a.png")] * 20)}
    assert len(scores) == 1


def test_ignored_pixels_count_nowhere(tmp_path):
    """A clock in a corner: painted over in training and scoring, in no metric; in the model."""
    rng = np.random.default_rng(0)

    def part(k, defect=False):
        image = np.full((64, 64), 120.0) + rng.normal(0, 2, (64, 64))
        image[:16, :24] = rng.choice([0, 255], (16, 24))
        image[40:56, 40:56] += 80 * defect
        return image

    for k in range(12):
        save(tmp_path / f"d/part/train/good/{k}.png", part(k))
    for k in range(4):
        save(tmp_path / f"d/part/test/good/{k}.png", part(k))
        save(tmp_path / f"d/part/test/hole/{k}.png", part(k, True))
        mask = np.zeros((64, 64))
        mask[40:56, 40:56] = mask[:8, :8] = 255
        save(tmp_path / f"d/part/ground_truth/hole/{k}_mask.png", mask)
    ignore = np.zeros((64, 64))
    ignore[:16, :24] = 255
    save(tmp_path / "ignore.png", ignore)
    command = ("train.py", "--data", tmp_path / "d", "--out", tmp_path / "o")
    command += (*TINY, "--folds", 0)
    succeeds(run(*command, "--ignore", tmp_path / "ignore.png"))
    row = read_table(tmp_path / "o/d/metrics.csv")[0]
    assert float(row["image_auroc"]) == 100 and float(row["pixel_auroc"]) > 95
    model = tmp_path / "o/d/part/model.pt"
    detector = evaluate.load_model(model)
    assert detector.reading.ignore.sum() == 16 * 24
    image = part(9).clip(0, 255).astype(np.uint8)
    other = image.copy()
    other[:16, :24] = 255 - other[:16, :24]
    assert evaluate.score(detector, image).score == evaluate.score(detector, other).score
    with pytest.raises(InputError, match="is 32 x 32, the mask of --ignore 64 x 64"):
        evaluate.score(detector, image[:32, :32])
    fails(run(*command, "--resume"), "ignored_pixels")
    save(tmp_path / "white.png", np.full((64, 64), 255))
    fails(run(*command, "--ignore", tmp_path / "white.png"), "white.png", "all of one value")


def test_a_forked_process_scores_the_same(model, tmp_path):
    """As gunicorn and multiprocessing do: the child has none of the parent's threads."""
    script = (
        "import evaluate, numpy as np, os, sys, signal; signal.alarm(60);"
        "d = evaluate.load_model(sys.argv[1]); a = np.full((64, 64, 3), 99, np.uint8);"
        "s = evaluate.score(d, [a, a])[0].score; pid = os.fork();"
        "exit(evaluate.score(d, [a, a])[0].score != s) if pid == 0 else None;"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    succeeds(shell("-c", script, model))


def test_map_above_the_threshold_is_where_the_defect_is(data, model):
    result = evaluate.score(evaluate.load_model(model), data / "bolt/test/dent/000.png")
    assert result.verdict == "defect" and (result.map > result.threshold).any()


# ---- pictures ------------------------------------------------------------------------------------
TITLES = ("a$x_y$ {b} \\frac", "零件 A", "x\ny", "long " * 100)


@pytest.mark.parametrize("size", [(48, 40), (9000, 1)])
def test_any_title_and_a_strip_of_one_row_can_be_drawn(tmp_path, size):
    """With the outline of a mask and without one."""
    save(tmp_path / "a.bmp", np.zeros((*size[::-1], 3)))
    union = np.zeros(size[::-1], bool)
    union[:, 5:9] = True
    rows = [
        (tmp_path / "a.bmp", (None, union)[k % 2], torch.ones(8, 8), TITLES[k])
        for k in (0, 1, 2, 3)
    ]
    evaluate.draw(tmp_path / "a.png", evaluate.draw_rows, rows, KNOWN, 255.0)
    scores = "".join(TITLES), np.ones(3), np.array([True] * 3), KNOWN
    evaluate.draw(tmp_path / "b.png", evaluate.draw_scores, *scores)
    assert Image.open(tmp_path / "a.png").size[1] > 1400 and (tmp_path / "b.png").is_file()


def test_the_backend_of_the_caller_stays(tmp_path):
    """A notebook goes on showing what it draws itself."""
    script = (
        "import matplotlib; matplotlib.use('svg'); import evaluate, numpy, pathlib, sys;"
        "a = numpy.ones(3); known = evaluate.calibrate(a);"
        "evaluate.draw(pathlib.Path(sys.argv[1]), evaluate.draw_scores, 'a', a, a > 0, known);"
        "assert 'matplotlib.pyplot' not in sys.modules and matplotlib.get_backend() == 'svg'"
    )
    succeeds(shell("-c", script, tmp_path / "a.png"))
    assert (tmp_path / "a.png").is_file()


def test_telling_images_are_named_by_what_happened():
    found = evaluate.classify([5, 1, 2, 7, 6], evaluate.calibrate(np.ones(3), how=4.0))
    names = evaluate.telling_images(found, [True, True, False, False, True])
    assert names == {3: "false_positive1_", 1: "miss1_", 4: "hit1_", 0: "hit2_", 2: "good1_"}


def test_a_picture_that_fails_costs_no_model(data, tmp_path, monkeypatch):
    """Whatever fails; each is named."""
    import matplotlib.figure

    def broken(*args, **options):
        raise RuntimeError("no font")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", broken)
    options = ("--data", data / "bolt", "--out", tmp_path, *TINY, "--maps", "all")
    result = succeeds(run("train.py", *options))
    assert result.stderr.count("(no font)") == 7 and "dent/hit3_000_png.png (no" in result.stderr
    assert (tmp_path / "tiny/results.csv").is_file()


# ---- from Python ---------------------------------------------------------------------------------
def test_python_and_the_command_agree(data, trained, model, tmp_path):
    detector, path = evaluate.load_model(model), data / "bolt/test/dent/000.png"
    array = np.asarray(Image.open(path))
    results = evaluate.score(detector, [path, array, array[..., 0], Image.open(path), str(path)])
    row = read_table(trained[0] / "bolt/scores.csv")[0]
    for result in (*results, evaluate.score(detector, array)):
        assert f"{result.score:.6g}" == row["score"] and result.verdict == row["verdict"]
        assert result.map.shape == array.shape[:2]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(tmp_path / "a.png", exif=exif)  # a PIL image is turned as its file is
    path = tmp_path / "a.png"
    one, other = evaluate.score(detector, [path, Image.open(path)])
    assert one.score == other.score and one.map.shape == other.map.shape == (48, 40)


@pytest.mark.parametrize(
    "image, word",
    [
        (np.full((8, 8, 3), 0.5), "(255 * image).round().astype(np.uint8)"),
        (np.full((8, 8), True), "255 * image"),
        (np.full((8, 8, 3), 4000, np.uint16), "255 / white_level"),
        (np.zeros((8, 8, 3), object), "uint8"),
        (np.zeros((3, 8, 9), np.uint8), "transpose"),
        (np.zeros((8, 8, 4), np.uint8), "(H, W, 3) in RGB, without transparency"),
        (np.zeros((2, 8, 8, 3), np.uint8), "list(images)"),
        (np.zeros((0, 8, 3), np.uint8), "shape"),
        (Image.fromarray(np.zeros((8, 8), np.uint16)), "I;16"),
        (torch.zeros(3, 8, 8), "Tensor"),
        ([], "at least one"),
        ("none.png", "none.png"),
    ],
)
def test_images_that_are_none_are_refused_by_name(model, image, word):
    with pytest.raises(InputError) as refused:
        evaluate.score(evaluate.load_model(model), image)
    assert word in str(refused.value) and "\n" not in str(refused.value)


def test_fitting_from_python(tmp_path):
    """Which leaves the caller's random numbers as they are, as loading does."""
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    images = [picture(k)[0].astype(np.uint8) for k in range(6)]
    detector = train.fit(images, steps=4, image_size=64, width=16, batch=64, rho=0)
    evaluate.save_model(str(tmp_path / "m.pt"), detector)
    loaded = evaluate.load_model(tmp_path / "m.pt")
    assert evaluate.score(loaded, images[0]).score == evaluate.score(detector, images[0]).score
    assert torch.equal(torch.random.get_rng_state(), before)
    for given, settings, words in (
        ([], {}, "at least one"),
        ("folder", {}, "a list"),
        (images, {"steps": 2.5}, "steps=2.5: give a value like 0"),
    ):
        with pytest.raises(InputError, match=words):
            train.fit(given, **settings)
    with pytest.raises(TypeError, match="depth"):
        train.fit(images, depth=3)
    with pytest.raises(InputError, match="evaluate.load"):
        evaluate.score("m.pt", images[0])


# ---- export, options -----------------------------------------------------------------------------
def test_without_its_packages_onnx_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None)
    result = run("evaluate.py", "--model", model, "--export", tmp_path / "m.onnx")
    fails(result, "m.onnx", "pip install onnx onnxscript onnxruntime")
    assert not [*tmp_path.iterdir()]


@pytest.fixture
def exported(model, tmp_path):
    """An ONNX Runtime session of an exported model, and what was printed."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out = succeeds(run("evaluate.py", "--model", model, "--export", tmp_path / "bolt-1.ONNX"))
    return runtime.InferenceSession(tmp_path / "bolt-1.ONNX"), out.stdout


def test_onnx_program_gives_every_verdict_of_images_of_any_size(data, model, tmp_path, exported):
    """As they are in their files, one by one and in a batch: it resizes them as the model does."""
    paths = sorted((data / "bolt/test").rglob("*.png"))
    large = tmp_path / "large.png"  # enlarged, wider, darker at the right
    Image.open(paths[0]).resize((500, 333)).save(large)
    expected = evaluate.score(evaluate.load_model(model, "cpu"), [*paths, large])
    arrays = [np.asarray(Image.open(p).convert("RGB")).transpose(2, 0, 1) for p in [*paths, large]]
    found = [exported[0].run(None, {"images": array[None]}) for array in arrays]
    assert [bool(v[3][0]) for v in found] == [p.verdict == "defect" for p in expected]
    assert len({bool(v[3][0]) for v in found}) == 2
    scores = [float(v[1][0]) for v in found]
    assert scores == pytest.approx([p.score for p in expected], rel=0.03)  # a grey level
    # p is exp(-z) and z = log(score) / scale + ..., so an error of the score grows by 1 / scale
    p_values = [p.p_value for p in expected]  # the least of which float32 takes from 1 as 0
    assert [float(v[2][0]) for v in found] == pytest.approx(p_values, rel=0.2, abs=1e-6)
    maps, together, *_ = exported[0].run(None, {"images": np.stack(arrays[:-1])})
    assert together == pytest.approx(scores[:-1], rel=1e-3) and maps.shape[0] == len(paths)


def test_onnx_program_says_how_it_wants_images_and_refuses_others(exported):
    session, out = exported
    about = session.get_modelmeta().custom_metadata_map
    assert "RGB" in about["images"] and int(about["opset"]) >= 18 and int(about["ir_version"])
    assert f"{float(about['threshold']):.4f}" in out and about["resized_to"].startswith("64 x 64")
    for shape, kind in (((1, 40, 48, 3), "u1"), ((1, 1, 40, 48), "u1"), ((1, 3, 40, 48), "f4")):
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            session.run(None, {"images": np.zeros(shape, kind)})


def test_a_program_that_differs_from_its_model_is_not_written(model, tmp_path, monkeypatch):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    off = SimpleNamespace(run=lambda *_: [np.full((2, 1, 1), np.nan, np.float32)] * 2)
    monkeypatch.setattr(runtime, "InferenceSession", lambda _: off)
    command = ("--model", model, "--export", tmp_path / "wrong.onnx")
    fails(run("evaluate.py", *command), "differs from the model")
    fails(run("evaluate.py", *command[:3], tmp_path / "m.pt2"), "m.pt2", ".onnx")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "command, options, words",
    [
        ("train.py", ("--batch", 1), ("--batch=1", "at least 2")),
        ("train.py", ("--depth", 3), ("--depth", "--help")),
        ("train.py", ("--strides", "32,"), ("--strides=(32,)", "4, 8, 16")),
        ("train.py", ("--coupling", "best"), ("--coupling=best", "worst")),
        ("train.py", ("--category", "screw"), ("screw", "bolt")),
        ("train.py", ("--steps", "x"), ("--steps=x", "give a value like 0")),
        ("train.py", ("--seeds", 1, 1), ("--seeds 1 1", "once")),
        ("train.py", ("--seeds", -1), ("seeds -1",)),
        ("train.py", ("--image", "x.png"), ("--image",)),
        ("train.py", ("--batch", "99999999999999999999"), ("--batch=99999999999999999999",)),
        ("train.py", ("--strides", "8.0,16"), ("--strides=(8.0, 16)",)),
        ("train.py", ("--aspect", "1e-9"), ("--aspect=1e-09",)),
        ("train.py", ("--weights", ""), ("--weights is empty",)),
        ("train.py", ("--weights", "/etc/passwd"), ("/etc/passwd", "--weights")),
        ("train.py", ("--fpr", 5, "--threshold", 2), ("--fpr", "no effect")),
        ("train.py", ("--fpr", "1e-323"), ("--fpr 1e-323",)),
        ("train.py", ("--weights", __file__), ("not a state dict", "--weights", "!arbitrary")),
        ("evaluate.py", ("--model", "x.pt", "--image", ".", "--category", "a"), ("--category",)),
        ("evaluate.py", ("--model", "x.pt", "--image", ".", "--data", "x"), ("give --run",)),
        ("evaluate.py", ("--run", ".", "--resume"), ("--resume", "no effect")),
        ("train.py", ("--fpr", 100), ("--fpr 100",)),
        ("train.py", ("--threshold", "best"), ("--threshold best", "tail, rank")),
        ("evaluate.py", ("--model", "none.pt", "--image", "x.png"), ("x.png", "no such file")),
        ("evaluate.py", ("--model", "x.pt", "--image", ".", "--resume"), ("--resume", "no effect")),
        ("evaluate.py", ("--model", "none.pt", "--image", "."), ("none.pt", "No such file")),
        ("evaluate.py", ("--model", ".", "--image", "."), ("directory", "model.pt")),
        ("evaluate.py", ("--run", "."), ("bolt/recipe.json", "No such file")),
    ],
)
def test_slips_end_in_one_true_line(tmp_path, monkeypatch, data, command, options, words):
    monkeypatch.chdir(tmp_path)
    more = ("--data", data) if not {"--image", "--export"} & {*options} else ()
    result = run(command, *more, *options)
    fails(result, *(word for word in words if word[0] != "!"))
    assert not any(word[1:] in result.stderr for word in words if word[0] == "!")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused(data, tmp_path):
    fails(run("train.py", "--data", data, "--out", tmp_path, "--device", "cuda"), "--device cuda")


def test_out_that_cannot_be_is_refused(data, model, tmp_path, monkeypatch):
    """In the data set, where there is a file, a link to itself."""
    before = sorted(data.rglob("*"))
    for where in (data, data / "bolt"):
        fails(run("train.py", "--data", where, "--out", data.parent, *TINY), "--out", "data set")
    assert sorted(data.rglob("*")) == before
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    image = ("--model", model, "--image", data / "bolt/test/dent/000.png")
    for name in ("file", "loop"):
        fails(run("train.py", "--data", data, "--out", tmp_path / name, *TINY), name, "--out")
        fails(run("evaluate.py", *image, "--out", tmp_path / name), name, "--out")
        out = ("--image", data / "bolt/test", "--out", tmp_path / name)
        fails(run("evaluate.py", *image[:2], *out), name, "--out")
    monkeypatch.setenv("RANK", "1")
    fails(run("train.py", "--data", data, "--out", tmp_path / "o", *TINY), "RANK=1", "torchrun")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device")
def test_stdout_that_is_full_ends_in_one_line(model):
    with open("/dev/full", "w") as full:
        result = shell(ROOT / "evaluate.py", "--model", model, stdout=full)
    fails(result, "standard output", "No space left")
    assert len(result.stderr.splitlines()) == 1


def test_interrupted_while_importing_there_is_no_traceback(tmp_path):
    """A module that does not end loading stands in for numpy."""
    (tmp_path / "numpy.py").write_text("import time\nprint(1, flush=True)\ntime.sleep(60)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "train.py"]
    process = subprocess.Popen(command, stderr=-1, stdout=-1, env=environment)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert not error and process.returncode == -signal.SIGINT


def test_a_model_of_another_folder_is_never_replaced(data, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "o/tiny")
    shutil.copytree(data, tmp_path / "tiny")
    before = (tmp_path / "o/tiny/bolt/model.pt").read_bytes()
    command = ("train.py", "--data", tmp_path / "tiny", "--out", tmp_path / "o", *TINY)
    fails(run(*command), "tiny/bolt", "images in another folder")
    assert (tmp_path / "o/tiny/bolt/model.pt").read_bytes() == before


def test_other_weights_than_in_training_are_refused(data, model, tmp_path):
    """Their features would be others, and so would the scores."""
    state = torch.load(wtflow.package_weights("efficientnet_lite0"), weights_only=True)
    state["_blocks.0._bn1.weight"] *= 1.01
    torch.save(state, tmp_path / "w.pth")
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "half.pth")
    half = ("--weights", tmp_path / "half.pth")
    fails(
        run("train.py", "--data", data, "--out", tmp_path, *half, *TINY), "half.pth", "in float32"
    )
    options, own = ("--data", data / "bolt", "--out", tmp_path), ("--weights", tmp_path / "w.pth")
    succeeds(run("train.py", *options, *own, *TINY))
    fails(run("train.py", *options, *TINY, "--resume"), "weights", "recipe.json")
    save(tmp_path / "a.png", picture(0)[0])
    command = ("evaluate.py", "--image", tmp_path / "a.png", "--out", tmp_path / "p")
    mine = ("--model", tmp_path / "tiny/bolt/model.pt")
    fails(run(*command, *mine), "other weights", "--weights")
    fails(run(*command, "--model", model, *own), "other weights")
    succeeds(run(*command, *mine, *own))
