"""What a user of a trained model sees: threshold, verdicts, tables, pictures; from Python too."""

import csv
import io
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
    assert 0 <= evaluate.threshold_of(np.zeros(3)) < 1 < evaluate.threshold_of(np.ones(5)) < 1.001
    assert np.isfinite(evaluate.threshold_of([0, 0, 1]))
    assert evaluate.threshold_of(known.good_scores, 0) == known.good_scores[-1]
    assert evaluate.threshold_of(known.good_scores, 1, 1.5) == 1.5


def test_defects_among_the_good_scores_stand_out_and_do_not_move_the_threshold():
    """6 of 200, 1.5 to 3 times as high; the rank follows them. One of which 0.01 are expected."""
    clean = gumbel_in_log(194)
    for expected, suspects in ((0.012, 0), (0.008, 1)):
        highest = evaluate.fit_tail(clean).threshold(expected / 194)
        assert evaluate.fit_tail([*clean[:-1], highest]).suspects == suspects
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
    assert f"no verdict: good images: {n}, give 3 or more" in known.text
    found = evaluate.classify([0.5, 9.0], known)
    assert {p.verdict for p in found} == {"none"} and np.isnan([p.p_value for p in found]).all()
    assert evaluate.rates(["good", "dent"], found) == {"fpr": None, "recall": None}
    row = evaluate.score_row("a", "b", found[0])
    assert row["p_value"] == "" and row["score"] == "0.5"
    given = evaluate.classify([0.5, 9.0], evaluate.calibrate(np.ones(n), how=2.0))
    assert [p.verdict for p in given] == ["good", "defect"]


def test_equal_pixels_are_copies_and_nothing_else_is(tmp_path, capsys):
    """In another file format, too. A part that differs by a grey level in one pixel is no copy."""
    evaluate.SAID.clear()
    image = picture(0, size=(64, 64))[0].astype(np.uint8)
    other = image.copy()
    other[5, 5, 0] += 1
    paths = [tmp_path / name for name in ("0.png", "1.png", "2.bmp", "3.png")]
    for path, array in zip(paths, (image, other, image, image[:, ::-1]), strict=True):
        save(path, array)
    detector = evaluate.new_detector(paths, wtflow.Recipe(image_size=64))
    features, first = evaluate.extract_good(detector, paths)
    assert first.tolist() == [0, 1, 0, 3]
    assert torch.equal(features, evaluate.extract(detector, paths)[0][[0, 1, 3]])
    note = "4 training images, 3 different: of equal ones, like 0.png, 2.bmp, the first is used"
    assert note in capsys.readouterr().err


def test_copies_do_not_lower_the_threshold():
    """Each of 6 images four times: the detector is that of the 6."""
    images = [picture(k)[0].astype(np.uint8) for k in range(6)]
    settings = dict(steps=4, image_size=64, width=16, batch=64)
    copied = train.fit([image for image in images for _ in range(4)], **settings)
    assert torch.equal(copied.normal_scores, train.fit(images, **settings).normal_scores)


def test_what_stands_out_is_named_drawn_marked_and_can_be_left_out(tmp_path):
    """Two of 20 training images are defective, one has a copy, as a good one has."""
    rng = np.random.default_rng(0)
    good, out = tmp_path / "d/part/train/good", tmp_path / "a/d/part"
    for k in range(20):
        image = rng.normal(120, 2, (64, 64, 3))
        if k in (4, 11):
            image[20:44, 20:44] = rng.uniform(0, 255, (24, 24, 3))
        save(good / f"{k:02d}.png", image)
    shutil.copy(good / "04.png", good / "20.png")
    shutil.copy(good / "05.png", good / "21.png")
    command = ("train.py", "--data", tmp_path / "d/part", *TINY, "--folds", 0)
    result = succeeds(run(*command, "--out", tmp_path / "a"))
    assert "2 of 20 good training images stand out (" in result.stderr
    assert (out / "suspects.png").is_file()
    rows = read_table(out / "train-scores.csv")
    scores = [float(row["score"]) for row in rows[:20]]
    assert scores == sorted(scores, reverse=True)
    of_copies = [(row["image"], row["copy_of"], row["score"]) for row in rows[20:]]
    assert of_copies == [("20.png", "04.png", ""), ("21.png", "05.png", "")]
    marked = ["04.png", "11.png", "20.png"]
    assert sorted(row["image"] for row in rows if row["leave_out"]) == marked
    leave_out = ("--leave-out", out / "train-scores.csv")
    result = succeeds(run(*command, "--out", tmp_path / "b", *leave_out))
    assert "stand out" not in result.stderr and not (tmp_path / "b/d/part/suspects.png").exists()
    assert sorted(evaluate.read_json(tmp_path / "b/d/part/recipe.json")["left_out"]) == marked
    _, [category] = evaluate.read_dataset(tmp_path / "d/part")
    twins = [category, category._replace(name="other")]
    kept, _ = evaluate.leave_out(twins, out / "train-scores.csv")  # in a folder "part"
    assert len(kept.train) == 19
    (tmp_path / "names.csv").write_text("image,leave_out\n04.png,x\n")
    with pytest.raises(InputError, match="is that of 2: write more"):
        evaluate.leave_out(twins, tmp_path / "names.csv")
    fails(run(*command, "--leave-out", tmp_path / "none.csv"), "none.csv: cannot be read")
    for more in ((), ("--resume",)):  # in place: what is left out stays marked
        succeeds(run(*command, "--out", tmp_path / "a", *leave_out, *more))
        rows = read_table(out / "train-scores.csv")
        assert sorted(row["image"] for row in rows if row["leave_out"]) == marked


def test_every_score_has_a_prediction(trained, model):
    threshold = evaluate.threshold_of(evaluate.load_model(model).normal_scores.cpu().numpy())
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


def test_thresholds_are_chosen_by_rank_or_given(data, model, tmp_path):
    image = ("--model", model, "--image", data / "bolt/test", "--maps", "none", "--out")
    for how, words in (("rank", "the highest of 6 good images"), (0.01, "0.0100, as given")):
        result = succeeds(run("evaluate.py", *image, tmp_path / str(how), "--threshold", how))
        assert words in result.stdout.splitlines()[0]
    assert {row["verdict"] for row in read_table(tmp_path / "0.01/scores.csv")} == {"defect"}
    assert "6 of 6 images are defective: or are light, camera or compression" in result.stderr


def test_the_table_of_thresholds_counts_test_images(capsys):
    """Without any it has no columns of them."""
    known = evaluate.calibrate(gumbel_in_log(200))
    scores = known.tail.threshold(0.01) + np.array([-0.01, 0.01, -0.01, 0.01, 0.01, 0.01])
    evaluate.print_thresholds(known, scores, ["good"] * 2 + ["dent"] * 4)
    evaluate.print_thresholds(known, [], [])
    *_, row, _, head, _, _, alone, _ = map(str.split, capsys.readouterr().out.splitlines())
    assert row == [*alone, "50.00", "75.00"] and alone == ["1", f"{known.threshold:.4f}"]
    assert head == ["fpr_by_tail", "threshold"]


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
    assert pictures == {f"{name}.png" for name in rows} - {"b/broken.png.png"}
    alone = run("evaluate.py", "--model", model, "--image", tmp_path / "line/last.png", "--out",
                tmp_path / "x")  # fmt: skip
    assert f"score {float(rows['last.png']['score']):.4f}" in alone.stdout
    assert [row["image"] for row in read_table(tmp_path / "x/scores.csv")] == ["last.png"]
    assert (tmp_path / "x/last.png.png").is_file()


def test_a_score_that_is_not_finite_is_the_error_of_its_image(model, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", 2)
    paths = [tmp_path / f"{k}.png" for k in range(5)]
    for k, path in enumerate(paths):
        save(path, picture(k)[0])
    paths[2].write_bytes(b"")
    detector = evaluate.load_model(model)
    features, factors = detector.features, iter((1, np.nan, 1))  # of 0 and 1, 3 alone, 4
    monkeypatch.setattr(detector, "features", lambda batch: features(batch) * next(factors))
    known = evaluate.calibration_of(detector, 1.0, "tail")
    found = [str(found) for found, _, _ in evaluate.predictions_of(detector, paths, known)]
    assert "2.png: cannot be read" in found[2] and "3.png: its score is not finite" in found[3]
    assert all(text.startswith("Prediction(") for text in (*found[:2], found[4]))


def test_what_is_scored_goes_to_out_but_not_among_the_images(model, tmp_path, monkeypatch):
    """Without --out it is lines alone; a table that is there is gone on with or stays."""
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate(("line/a.png", "line/day\n2/b.png")):
        save(tmp_path / name, picture(k)[0])
    command = ("evaluate.py", "--model", model, "--image")
    for out in ("line/a.png", "b.png", "b.csv"):
        fails(run(*command, "line/a.png", "--out", out), out, "give a folder")
    for out in ("line", "line/o"):
        fails(run(*command, "line", "--out", out), "--out", "lies in the folder of the images")
    for out in ((), ("--out", ".")):
        result = succeeds(run(*command, "line", *out))
        assert len(result.stdout.splitlines()) == 3 and "day\\n2/b.png  score " in result.stdout
        assert not result.stderr and (tmp_path / "scores.csv").exists() == bool(out)
    assert [row["image"] for row in read_table("scores.csv")] == ["a.png", "day\n2/b.png"]
    assert (tmp_path / "a.png.png").is_file()
    fails(run(*command, "line/a.png", "--out", "."), "scores.csv: is there: give --resume")


def items(*names):
    return [evaluate.Item(Path("/d/test") / name, name.split("/")[0], ()) for name in names]


def test_names_of_test_images_keep_what_tells_them_apart(tmp_path):
    names = ["dent/0.png", "dent/0.jpg", "good/a/0.png", "good/b/0.png"]
    assert [str(name) for name in evaluate.names_of(items(*names))] == names
    assert [str(name) for name in evaluate.names_of(items("good/rgb/0.png"))] == ["good/0.png"]
    maps = torch.arange(3.0)[:, None, None].expand(3, 4, 4)
    evaluate.write_maps(tmp_path / "x", SimpleNamespace(test=items(*names[1:])), maps, [(8, 9)] * 3)
    for k, name in enumerate(names[1:]):
        path = tmp_path / "anomaly_maps/x/test" / name
        tiff = np.asarray(Image.open(path.with_suffix(".tiff")))
        assert tiff.shape == (8, 9) and (tiff == k).all()


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
    for name in ("results-bolt.csv", "metrics-bolt.csv"):
        assert [row["category"] for row in read_table(folder / name)][:2] == ["bolt", "mean"]
    parts = [[{"category": 50 * "a" + end}] for end in "bc"]  # as long as a name of a file may be
    assert len({evaluate.part_of(folder, part) for part in parts}) == 2


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
    given = tmp_path / "given"
    for bolt, resume in ((model, ()), (model.parents[1] / "nut/model.pt", ("--resume",))):
        result = run(*command[:2], bolt, *command[3:6], given, "--threshold", 2, *resume)
    fails(result, words)  # another model with the same threshold
    (folder / first).unlink()  # an image that is gone keeps its row
    succeeds(run(*command, "--resume"))
    assert table.read_bytes() == whole
    save(folder / second, picture(9)[0])  # another one of its name does not
    result = succeeds(run(*command, "--resume"))
    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == [second]
    assert table.read_bytes() != whole


@pytest.mark.parametrize(
    "rows",
    [
        "a.png,1,0.1,good,1,m,/x,1,\n",
        '"a.png",1,0.1,good,1,m,/x,1,\r\n',
        f"{'a' * 131_073},1,0.1,good,1,m,/x,1,\r\n",
        "a.png,1\r\nb.png,1,0.1,good,1,m,/x,1,\r\n",
        "a.png,1,0.1,good,1,m,/x,1,,,\r\n",
    ],
)
def test_a_table_that_was_changed_is_refused_in_one_line(data, model, tmp_path, rows):
    table = tmp_path / "scores.csv"
    table.write_text(f"{','.join(evaluate.FOLDER_SCORES)}\r\n{rows}", newline="")
    before = table.read_bytes()
    command = ("--model", model, "--image", data / "bolt/test", "--out", tmp_path, "--resume")
    fails(run("evaluate.py", *command), "scores.csv: cannot be read as the table it was")
    assert table.read_bytes() == before


def test_images_of_another_aspect_are_named_once(model, tmp_path, capsys):
    evaluate.SAID.clear()
    detector, image = evaluate.load_model(model), picture(0)[0].astype(np.uint8)
    evaluate.score(detector, [image, np.kron(image, np.ones((3, 3, 1), np.uint8))])
    assert "may not compare" not in capsys.readouterr().err
    evaluate.score(detector, [image[:20]] * 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "height / width 0.417, of training images 0.833 to 0.833: scores may not" in line


def test_ignored_pixels_count_nowhere(tmp_path):
    """A clock in a corner: painted over in training and scoring, in no metric; in the model."""
    rng, root = np.random.default_rng(0), tmp_path / "d/part"
    ignore, mask = np.zeros((2, 64, 64), bool)
    ignore[:16, :24] = mask[40:56, 40:56] = mask[:8, :8] = True

    def part(defect=False):
        image = np.full((64, 64), 120.0) + rng.normal(0, 2, (64, 64))
        image[ignore] = rng.choice([0, 255], ignore.sum())
        image[40:56, 40:56] += 80 * defect
        return image.clip(0, 255).astype(np.uint8)

    for k in range(12):
        save(root / f"train/good/{k}.png", part())
    for k in range(4):
        save(root / f"test/good/{k}.png", part())
        save(root / f"test/hole/{k}.png", part(True))
        save(root / f"ground_truth/hole/{k}_mask.png", 255 * mask)
    save(tmp_path / "ignore.png", 255 * ignore)
    save(tmp_path / "white.png", np.full((64, 64), 255))
    command = ("train.py", "--data", tmp_path / "d", "--out", tmp_path / "o", *TINY, "--folds", 0)
    succeeds(run(*command, "--ignore", tmp_path / "ignore.png"))
    row = read_table(tmp_path / "o/d/metrics.csv")[0]
    assert float(row["image_auroc"]) == 100 and float(row["pixel_auroc"]) > 95
    detector, image = evaluate.load_model(tmp_path / "o/d/part/model.pt"), part()
    other = np.where(ignore, 255 - image, image)
    assert evaluate.score(detector, image).score == evaluate.score(detector, other).score
    with pytest.raises(InputError, match="is 32 x 32, the mask of --ignore 64 x 64"):
        evaluate.score(detector, image[:32, :32])
    fails(run(*command, "--resume"), "ignored_pixels")
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


# ---- pictures ------------------------------------------------------------------------------------
@pytest.mark.parametrize("known", [KNOWN, evaluate.calibrate([1.0])])
def test_any_title_and_size_can_be_drawn(tmp_path, capsys, known):
    rows, titles = [], ("a$x_y$ {b} \\frac", "零件 A", "x\ny", "long " * 100)
    for k, size in enumerate(((48, 40), (9000, 40), (2, 2), (40, 1))):
        save(tmp_path / f"{k}.bmp", np.zeros((*size[::-1], 3)))
        union = np.ones(size[::-1], bool) if k < 2 else None
        rows.append((tmp_path / f"{k}.bmp", union, torch.ones(8, 8), titles[k]))
    evaluate.draw(tmp_path / "a.png", evaluate.draw_rows, rows, known)
    scores = "".join(titles), np.ones(3), np.array([True] * 3), known
    evaluate.draw(tmp_path / "b.png", evaluate.draw_scores, *scores)
    assert len([*tmp_path.glob("*.png")]) == 2 and not capsys.readouterr().err


def test_drawn_are_the_highest_good_and_the_lowest_defective_images(tmp_path, monkeypatch):
    drawn, scores = [], np.arange(14) * 5 % 14
    names = [f"{'good' if k < 7 else 'dent'}/{score}.png" for k, score in enumerate(scores)]
    category = SimpleNamespace(name="c", test=items(*names))
    monkeypatch.setattr(evaluate, "draw", lambda path, *_: drawn.append(path.stem))
    scored = torch.ones(14, 1, 1), evaluate.classify(scores, KNOWN), [(1, 1)] * 14
    evaluate.write_pictures(tmp_path, category, scored, KNOWN, 255, "worst")
    shown = *sorted(scores[:7])[2:], *sorted(scores[7:])[:5]
    assert {*drawn} == {"scores", *[f"{score}.png" for score in shown]}


def test_a_picture_that_fails_costs_no_model(data, tmp_path, monkeypatch):
    """Whatever fails; each is named."""
    monkeypatch.setattr(evaluate, "draw_rows", None)
    options = ("--data", data / "bolt", "--out", tmp_path, *TINY, "--maps", "all")
    result = succeeds(run("train.py", *options))
    assert result.stderr.count("note: no picture") == 6 and "dent/000.png.png (" in result.stderr
    assert (tmp_path / "tiny/results.csv").is_file()


# ---- from Python ---------------------------------------------------------------------------------
def test_python_and_the_command_agree(data, trained, model, tmp_path):
    """A PIL image that is in a list several times is decoded once, and turned as its file is."""
    detector, path = evaluate.load_model(model), data / "bolt/test/dent/000.png"
    array = np.asarray(Image.open(path))
    images = [path, str(path), array, array[..., 0], *[Image.open(path)] * 20]
    row = read_table(trained[0] / "bolt/scores.csv")[0]
    for result in (*evaluate.score(detector, images), evaluate.score(detector, array)):
        assert f"{result.score:.6g}" == row["score"]
        assert result.verdict == row["verdict"] == "defect"
        assert result.map.shape == array.shape[:2] and (result.map > result.threshold).any()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(tmp_path / "a.png", exif=exif)
    one, other = evaluate.score(detector, [tmp_path / "a.png", Image.open(tmp_path / "a.png")])
    assert one.score == other.score and one.map.shape == other.map.shape == (48, 40)


@pytest.mark.parametrize(
    "image, word",
    [
        (np.full((8, 8, 3), 0.5), "round().astype(np.uint8)"),
        (np.full((8, 8, 3), 4000, np.uint16), "255 / white_level"),
        (np.zeros((3, 8, 9), np.uint8), "transpose"),
        (np.zeros((8, 8, 4), np.uint8), "(H, W, 3) in RGB"),
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
    before = torch.random.get_rng_state()
    images = [picture(k)[0].astype(np.uint8) for k in range(6)]
    detector = train.fit(images, steps=4, image_size=64, width=16, batch=64, rho=0)
    evaluate.save_model(str(tmp_path / "m.pt"), detector)
    loaded = evaluate.load_model(tmp_path / "m.pt")
    assert evaluate.score(loaded, images[0]).score == evaluate.score(detector, images[0]).score
    assert torch.equal(torch.random.get_rng_state(), before)
    for words, f, *given in (
        ("at least one", train.fit, []),
        ("a list", train.fit, "folder"),
        ("--fpr 100", evaluate.score, loaded, images[0], 100),
        ("--threshold best: give tail, rank", evaluate.score, loaded, images[0], 1, "best"),
    ):
        with pytest.raises(InputError, match=words):
            f(*given)
    with pytest.raises(InputError, match="steps=2.5: give a value like 0"):
        train.fit(images, steps=2.5)


# ---- export, options -----------------------------------------------------------------------------
def test_onnx_program_gives_every_verdict_of_images_of_any_size(data, model, tmp_path):
    """One by one and in a batch: it resizes them as the model does. Others than uint8 RGB it
    refuses, and its metadata say so.
    """
    runtime, path = pytest.importorskip("onnxruntime"), tmp_path / "bolt-1.ONNX"
    pytest.importorskip("onnxscript")
    succeeds(run("evaluate.py", "--model", model, "--export", path))
    session = runtime.InferenceSession(path)
    about = session.get_modelmeta().custom_metadata_map
    assert "RGB" in about["images"]
    assert int(about["opset"]) >= 18 and int(about["ir_version"])
    paths = sorted((data / "bolt/test").rglob("*.png"))
    large = tmp_path / "large.png"
    Image.open(paths[0]).resize((500, 333)).save(large)
    expected = evaluate.score(evaluate.load_model(model, "cpu"), [*paths, large])
    assert float(about["threshold"]) == expected[0].threshold
    arrays = [np.asarray(Image.open(p).convert("RGB")).transpose(2, 0, 1) for p in [*paths, large]]
    found = [session.run(None, {"images": array[None]}) for array in arrays]
    assert [bool(v[3][0]) for v in found] == [p.verdict == "defect" for p in expected]
    assert len({bool(v[3][0]) for v in found}) == 2
    scores = [float(v[1][0]) for v in found]
    assert scores == pytest.approx([p.score for p in expected], rel=0.03)  # a grey level
    # p is exp(-z) and z = log(score) / scale + ..., so an error of the score grows by 1 / scale
    p_values = [p.p_value for p in expected]  # the least of which float32 takes from 1 as 0
    assert [float(v[2][0]) for v in found] == pytest.approx(p_values, rel=0.2, abs=1e-6)
    assert not any(np.signbit(v[2][0]) for v in found)
    maps, together, *_ = session.run(None, {"images": np.stack(arrays[:-1])})
    assert together == pytest.approx(scores[:-1], rel=1e-3) and maps.shape[0] == len(paths)
    for shape, kind in (((1, 40, 48, 3), "u1"), ((1, 1, 40, 48), "u1"), ((1, 3, 40, 48), "f4")):
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            session.run(None, {"images": np.zeros(shape, kind)})


def test_a_program_that_would_not_be_its_model_is_not_written(model, tmp_path, monkeypatch):
    """Another format, a model of more than 8 bits, a program that differs; without its packages."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path, detector = tmp_path / "wrong.onnx", evaluate.load_model(model)
    command = ("evaluate.py", "--model", model, "--export")
    fails(run(*command, tmp_path / "m.pt2"), "m.pt2", ".onnx")
    detector.reading = detector.reading._replace(white_level=4095.0)
    with pytest.raises(InputError, match="over 8 bits"):
        evaluate.export_model(path, detector, KNOWN)
    off = SimpleNamespace(run=lambda *_: [np.full((2, 1, 1), np.nan, np.float32)] * 2)
    monkeypatch.setattr(runtime, "InferenceSession", lambda _: off)
    fails(run(*command, path), "differs from the model")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    fails(run(*command, path), "wrong.onnx", "pip install onnx onnxscript onnxruntime")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "command, options, words",
    [
        ("train.py", ("--depth", 3), ("--depth", "--help")),
        ("train.py", ("--strides", "32,"), ("--strides=(32,)", "4, 8, 16")),
        ("train.py", ("--category", "screw"), ("screw", "bolt")),
        ("train.py", ("--seeds", 1, 1), ("--seeds 1 1", "once")),
        ("train.py", ("--image", "x.png"), ("--image",)),
        ("train.py", ("--batch", "99999999999999999999"), ("--batch=99999999999999999999",)),
        ("train.py", ("--weights", ""), ("--weights is empty",)),
        ("train.py", ("--weights", "/etc/passwd"), ("/etc/passwd", "--weights")),
        ("train.py", ("--fpr", 5, "--threshold", 2), ("--fpr", "no effect")),
        ("train.py", ("--fpr", "1e-323"), ("--fpr 1e-323",)),
        ("train.py", ("--weights", __file__), ("not a state dict", "--weights", "!arbitrary")),
        ("evaluate.py", ("--model", "x.pt", "--image", ".", "--category", "a"), ("--category",)),
        ("evaluate.py", ("--model", "x.pt", "--image", ".", "--data", "x"), ("give --run",)),
        ("evaluate.py", ("--run", ".", "--resume"), ("--resume", "no effect")),
        ("evaluate.py", ("--model", "none.pt", "--image", "x.png"), ("x.png", "no such file")),
        ("evaluate.py", ("--model", "x.pt", "--image", ".", "--resume"), ("--resume", "no effect")),
        ("evaluate.py", ("--model", "none.pt", "--image", "."), ("none.pt", "No such file")),
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
    train_it, score = ("train.py", "--data", data, *TINY), ("evaluate.py", "--model", model)
    one, several = ("--image", data / "bolt/test/dent/000.png"), ("--image", data / "bolt/test")
    for name in ("file", "loop"):
        for command in (train_it, (*score, *one), (*score, *several)):
            fails(run(*command, "--out", tmp_path / name), name, "--out")
    monkeypatch.setenv("RANK", "1")
    fails(run(*train_it, "--out", tmp_path / "o"), "RANK=1", "torchrun")


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
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "half.pth")
    state["_blocks.0._bn1.weight"] *= 1.01
    torch.save(state, tmp_path / "w.pth")
    options = ("train.py", "--data", data / "bolt", "--out", tmp_path, *TINY)
    half, own = (("--weights", tmp_path / name) for name in ("half.pth", "w.pth"))
    fails(run(*options, *half), "half.pth", "in float32")
    succeeds(run(*options, *own))
    fails(run(*options, "--resume"), "weights", "recipe.json")
    command = ("evaluate.py", "--image", data / "bolt/test/dent/000.png", "--out", tmp_path / "p")
    mine = ("--model", tmp_path / "tiny/bolt/model.pt")
    fails(run(*command, *mine), "other weights", "--weights")
    fails(run(*command, "--model", model, *own), "other weights")
    succeeds(run(*command, *mine, *own))
