"""The commands as a user types them, on a tiny data set. What stops them: tests/test_safety.py."""

import csv
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, fails, make_mvtec, picture, run, save, shell, succeeds

import evaluate

# Drawing is most of a tiny run
TINY = ("--steps", 4, "--batch", 64, "--image-size", 64, "--maps", "none")
COLUMNS = "category,image_auroc,pixel_auroc,aupro,train_images,test_images,seconds"


def rows(folder, name="results.csv"):
    with open(folder / name, newline="") as f:
        return list(csv.DictReader(f))


def without_seconds(folder):
    table = rows(folder, "metrics.csv")
    return [{k: v for k, v in row.items() if k != "seconds"} for row in table]


def model_of(folder, category="bolt"):
    """The tensors of a saved model by name."""
    return torch.load(folder / category / "model.pt", weights_only=True)["model"]


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_train_writes_models_maps_and_the_table(trained):
    folder, result = trained
    table = rows(folder)
    assert list(table[0]) == COLUMNS.split(",")
    assert [row["category"] for row in table] == ["bolt", "nut", "mean"]
    assert table[0]["train_images"] == "6" and table[0]["test_images"] == "6"
    for row in table:
        assert all(0 <= float(row[name]) <= 100 for name in COLUMNS.split(",")[1:4])
        assert row["category"] in result.stdout and row["aupro"] in result.stdout
    for name in ("bolt", "nut"):
        assert 4 <= len(list((folder / name / "maps").rglob("*.png"))) <= 7


def test_the_released_recipe_at_a_small_width(data, tmp_path):
    """--paper as it runs on a GPU, with the backbone that is in a package.

    The U-Net on images, the released score.
    """
    small = ("--backbone", "efficientnet_lite0", "--image-size", 128, "--width", 8, "--steps", 2)
    result = run("train.py", "--data", data / "bolt", "--out", tmp_path, "--paper", *small)
    assert "step 2/2" in succeeds(result).stderr
    state = torch.load(tmp_path / "tiny/bolt/model.pt", weights_only=True)
    assert state["recipe"]["score"] == "released" and state["recipe"]["width"] == 8
    assert "feature_mean" not in state["model"]
    assert any("time" in name for name in state["model"])
    succeeds(run("evaluate.py", "--run", tmp_path, "--data", data / "bolt"))


def test_checkpoints_hold_tensors_and_plain_values_and_no_path(trained):
    blob = (trained[0] / "bolt/model.pt").read_bytes()
    torch.load(trained[0] / "bolt/model.pt", weights_only=True)
    for secret in (str(trained[0].parent), str(ROOT), os.path.expanduser("~") + "/"):
        assert secret.encode() not in blob
        assert secret not in (trained[0] / "metrics.csv").read_text()


def test_other_test_images_have_a_table_of_their_own(data, trained, tmp_path):
    """Of which test/ is enough; that of the run's own images is made again, the same."""
    shutil.copytree(trained[0], tmp_path / "tiny")
    for where in (tmp_path, tmp_path / "tiny"):
        succeeds(run("evaluate.py", "--run", where, "--data", data, "--maps", "none"))
        assert without_seconds(tmp_path / "tiny") == without_seconds(trained[0])
    shutil.copytree(data, tmp_path / "new/tiny")
    for name in ("bolt", "nut"):
        shutil.rmtree(tmp_path / f"new/tiny/{name}/train")
    (tmp_path / "new/tiny/bolt/test/good/006.png").unlink()
    own = rows(tmp_path / "tiny")
    for _ in range(2):
        succeeds(run("evaluate.py", "--run", tmp_path, "--data", tmp_path / "new/tiny"))
    assert rows(tmp_path / "tiny") == own
    [other] = (tmp_path / "tiny").glob("on-tiny-*")
    table = rows(other)
    assert [row["test_images"] for row in table] == ["5", "6", "11"]
    assert table[1] | {"seconds": ""} == own[1] | {"seconds": "", "train_images": "0"}
    assert (other / "bolt/scores.csv").is_file() and [*other.rglob("bolt/maps/**/*.png")]


def test_seeds_give_models_of_their_own_the_same_each_time(data, trained, tmp_path):
    options = ("--data", data / "bolt", "--out", tmp_path, *TINY, "--seeds", 0, 1)
    assert "+-" in succeeds(run("train.py", *options)).stdout
    models = [model_of(tmp_path / f"seed{seed}/tiny") for seed in (0, 1)]
    assert same_tensors(models[0], model_of(trained[0])) and not same_tensors(*models)
    assert without_seconds(tmp_path / "seed0/tiny")[0] == without_seconds(trained[0])[0]
    assert (tmp_path / "tiny/spread.csv").is_file()


def test_mean_and_spread_of_seeds_by_hand(tmp_path, capsys):
    row = dict.fromkeys(evaluate.COLUMNS + evaluate.MORE) | dict.fromkeys(evaluate.SUMMED, 1)
    runs = [[row | {"category": name, "aupro": aupro} for name in "ab"] for aupro in (80.0, 90.0)]
    for some in (runs, [each[:1] for each in runs]):  # of a part: in tables of its own
        evaluate.write_spread(tmp_path, [0, 1], some)
    assert "85.00 +- 7.07" in capsys.readouterr().out  # 10 / sqrt(2)
    for name, value in (("results", "85.00"), ("metrics", "85.00"), ("spread", "7.07")):
        assert [row["aupro"] for row in rows(tmp_path, f"{name}.csv")] == 3 * [value]
        assert [row["category"] for row in rows(tmp_path, f"{name}-a.csv")] == ["a", "mean"]


def test_processes_share_the_categories(data, trained, tmp_path):
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 29611)
    options = ("--data", data, "--out", tmp_path / "o", *TINY)
    succeeds(shell(*launch, ROOT / "train.py", *options))
    assert without_seconds(tmp_path / "o/tiny") == without_seconds(trained[0])


def test_a_folder_of_good_images_trains_and_scores(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = data / "bolt/train/good"
    succeeds(run("train.py", "--data", good, "--out", tmp_path, *TINY))
    assert rows(tmp_path / "tiny")[0]["image_auroc"] == ""
    model = tmp_path / "tiny/bolt/model.pt"  # named by the product, not train/good
    succeeds(run("evaluate.py", "--model", model, "--image", data / "bolt/test/good"))
    succeeds(run("evaluate.py", "--run", tmp_path, "--data", good))


@pytest.mark.parametrize(
    "gone, empty",
    [("test/good", "image_auroc"), ("test/dent", "image_auroc"), ("ground_truth", "pixel_auroc")],
)
def test_a_metric_without_its_images_or_masks_is_empty(tmp_path, gone, empty):
    """And says why, but of a data set without masks, which is as it should be."""
    data = make_mvtec(tmp_path / "d")
    shutil.rmtree(data / "bolt" / gone)
    result = succeeds(run("train.py", "--data", data, "--out", tmp_path / "o", *TINY))
    row = rows(tmp_path / "o/d")[0]
    assert ("AUROC is not defined" in result.stderr) == (gone != "ground_truth")
    assert row[empty] == "" and (empty == "image_auroc" or row["aupro"] == "" < row["image_auroc"])


@pytest.mark.parametrize("kind", ["constant", "one", "copies"])
def test_degenerate_training_sets_train(tmp_path, kind):
    constant = np.full((40, 48, 3), 128)
    for k in range(1 if kind == "one" else 4):
        image = constant if kind == "constant" else picture(0)[0]
        save(tmp_path / f"d/x/train/good/{k}.png", image)
    save(tmp_path / "d/x/test/good/0.png", picture(1)[0])
    succeeds(run("train.py", "--data", tmp_path / "d", "--out", tmp_path / "o", *TINY))


def test_a_bad_command_is_named_by_a_process_of_its_own():
    fails(shell(ROOT / "evaluate.py"), "--run")


def test_a_mask_of_another_size_stops_the_run_before_training(tmp_path):
    data = make_mvtec(tmp_path / "d")
    save(data / "bolt/ground_truth/dent/001_mask.png", np.zeros((20, 24)))
    result = run("train.py", "--data", data, "--out", tmp_path / "out", *TINY)
    fails(result, "001_mask.png: mask is 24 x 20, its image 48 x 40")
    assert "field" not in result.stderr
