"""The commands as a user types them, good and bad, on a tiny data set."""
import csv
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, fails, make_mvtec, picture, run, save, shell
from PIL import Image

TINY = ("--steps", 4, "--image-size", 64)


def rows(folder, name="results.csv"):
    with open(folder / name, newline="") as f:
        return list(csv.DictReader(f))


def without_seconds(folder):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in rows(folder, "metrics.csv")]


# ------------------------------------------------------------------------------------------------------------ good input
def test_train_writes_models_maps_and_the_table(trained):
    folder, result = trained
    table = rows(folder)
    assert list(table[0]) == "category,image_auroc,image_auroc_max,pixel_auroc,aupro,train_images,test_images,seconds".split(",")
    assert [r["category"] for r in table] == ["bolt", "nut", "mean"] and table[0]["train_images"] == "6" and table[0]["test_images"] == "6"
    for r in table:
        assert all(0 <= float(r[k]) <= 100 for k in ("image_auroc", "image_auroc_max", "pixel_auroc", "aupro"))
        assert r["category"] in result.stdout and r["aupro"] in result.stdout
    for name in ("bolt", "nut"):
        assert (folder / name / "model.pt").is_file() and len(list((folder / name / "maps").glob("*.png"))) == 5
    assert (folder / "contact-sheet.png").is_file()
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("state.pt"))


def test_the_released_recipe_at_a_small_width(data, tmp_path):
    """--paper as it runs on a GPU, with the backbone that is in a package: the U-Net on images, epochs, released score."""
    result = run("train.py", "--data", data / "bolt", "--out", tmp_path, "--paper", "--backbone", "efficientnet_lite0", "--image-size", 96, "--set", "base=8", "epochs=2")
    assert result.returncode == 0 and "step 2/2" in result.stderr, result.stderr
    state = torch.load(tmp_path / "tiny/bolt/model.pt", weights_only=True)
    assert state["whitening"] == () and state["recipe"]["score"] == "released" and any("time" in k for k in state["field"])
    assert run("evaluate.py", "--run", tmp_path, "--data", data / "bolt").returncode == 0


def test_same_seed_same_result_and_other_seed_another(data, trained, tmp_path):
    for seed, same in ((0, True), (1, False)):
        assert run("train.py", "--data", data / "bolt", "--out", tmp_path, *TINY, "--seed", seed).returncode == 0
        a, b = (torch.load(f / "bolt/model.pt", weights_only=True)["field"] for f in (trained[0], tmp_path / "tiny"))
        assert all(torch.equal(a[k], b[k]) for k in a) == same
        assert (without_seconds(tmp_path / "tiny")[0] == without_seconds(trained[0])[0]) or not same


def test_checkpoints_hold_tensors_and_plain_values_and_no_path(trained):
    blob = (trained[0] / "bolt/model.pt").read_bytes()
    torch.load(trained[0] / "bolt/model.pt", weights_only=True)
    for secret in (str(trained[0].parent), str(ROOT), os.path.expanduser("~") + "/"):
        assert secret.encode() not in blob and secret not in (trained[0] / "metrics.csv").read_text()


def test_evaluate_gives_the_table_again(data, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "tiny")
    before = without_seconds(tmp_path / "tiny")
    for where in (tmp_path, tmp_path / "tiny"):
        result = run("evaluate.py", "--run", where, "--data", data, "--save-maps")
        assert result.returncode == 0, result.stderr
        assert without_seconds(tmp_path / "tiny") == before
    tiff = Image.open(tmp_path / "tiny/anomaly_maps/bolt/test/dent/000.tiff")
    assert tiff.mode == "F" and tiff.size == (48, 40)
    assert run("evaluate.py", "--run", tmp_path, "--data", data, "--euler-steps", 2).returncode == 0


def test_one_image_and_a_folder_of_images(data, trained, tmp_path):
    model, image = trained[0] / "bolt/model.pt", data / "bolt/test/dent/000.png"
    result = run("evaluate.py", "--model", model, "--image", image, "--out", tmp_path / "a.png")
    assert result.returncode == 0 and "score" in result.stdout and Image.open(tmp_path / "a.png").size[0] > 600
    result = run("evaluate.py", "--model", model, "--image", image.parent)
    assert result.returncode == 0 and result.stdout.count("score") == 3


def test_compare_has_every_method_on_every_category(data, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "tiny")
    assert run("evaluate.py", "--run", tmp_path, "--data", data / "bolt", "--compare").returncode == 0
    methods = [r["method"] for r in rows(tmp_path / "tiny", "compare.csv")]
    assert methods[:3] == ["WT-Flow", "rFM", "OT-CFM"] and len(methods) == 5


def test_several_seeds_give_mean_and_spread(data, tmp_path):
    result = run("train.py", "--data", data / "bolt", "--out", tmp_path, *TINY, "--seeds", 0, 1, "--maps", "none")
    assert result.returncode == 0 and "+-" in result.stdout
    each = [float(rows(tmp_path / f"seed{s}/tiny")[0]["aupro"]) for s in (0, 1)]
    assert float(rows(tmp_path / "tiny")[0]["aupro"]) == pytest.approx(np.mean(each), abs=0.01)
    assert float(rows(tmp_path / "tiny", "spread.csv")[0]["aupro"]) == pytest.approx(np.std(each, ddof=1), abs=0.01)


def test_one_seed_has_no_spread(data, tmp_path):
    assert run("train.py", "--data", data / "bolt", "--out", tmp_path, *TINY, "--seeds", 3, "--maps", "none", "--set", "calibrate=False", "base=64").returncode == 0
    assert rows(tmp_path / "tiny", "spread.csv")[0]["aupro"] == "" and rows(tmp_path / "tiny")[0]["aupro"]
    state = torch.load(tmp_path / "seed3/tiny/bolt/model.pt", weights_only=True)
    assert state["recipe"]["base"] == 64 and state["calibration"] == ()


def test_processes_share_the_categories(data, trained, tmp_path):
    result = shell("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 29611, ROOT / "train.py", "--data", data, "--out", tmp_path, *TINY)
    assert result.returncode == 0, result.stderr
    assert without_seconds(tmp_path / "tiny") == without_seconds(trained[0])


def test_a_folder_of_good_images_trains_and_scores(data, tmp_path):
    result = run("train.py", "--data", data / "bolt/train/good", "--out", tmp_path, *TINY)
    assert result.returncode == 0 and rows(tmp_path / "train")[0]["image_auroc"] == "", result.stderr
    assert run("evaluate.py", "--model", tmp_path / "train/good/model.pt", "--image", data / "bolt/test/good").returncode == 0
    for more in ((), ("--compare",)):
        assert run("evaluate.py", "--run", tmp_path, "--data", data / "bolt/train/good", *more).returncode == 0


@pytest.mark.parametrize("gone", ["test/good", "test/dent"])
def test_a_test_folder_of_one_kind_leaves_auroc_empty_and_says_why(tmp_path, gone):
    data = make_mvtec(tmp_path / "d")
    shutil.rmtree(data / "bolt" / gone)
    result = run("train.py", "--data", data, "--out", tmp_path, *TINY)
    assert result.returncode == 0 and "AUROC is not defined" in result.stderr
    assert rows(tmp_path / "d")[0]["image_auroc"] == ""


def test_without_masks_the_pixel_columns_are_empty(tmp_path):
    data = make_mvtec(tmp_path / "d")
    shutil.rmtree(data / "bolt/ground_truth")
    assert run("train.py", "--data", data, "--out", tmp_path, *TINY).returncode == 0
    row = rows(tmp_path / "d")[0]
    assert row["pixel_auroc"] == row["aupro"] == "" and row["image_auroc"]


@pytest.mark.parametrize("make", ["constant", "one", "copies"])
def test_degenerate_training_sets_train(tmp_path, make):
    for k in range(1 if make == "one" else 4):
        save(tmp_path / f"d/x/train/good/{k}.png", np.full((40, 48, 3), 128) if make == "constant" else picture(0)[0])
    save(tmp_path / "d/x/test/good/0.png", picture(1)[0])
    result = run("train.py", "--data", tmp_path / "d", "--out", tmp_path, *TINY)
    assert result.returncode == 0, result.stderr


# ------------------------------------------------------------------------------------------------------------- bad input
def test_bad_options(data, tmp_path):
    for args, words in [(("--steps", 0), ["--steps"]), (("--backbone", "vgg"), ["vgg", "efficientnet_lite0"]), (("--category", "screw"), ["screw", "bolt"]),
                        (("--device", "cuda"), ["--device cuda"]), (("--image-size", 65), ["--image-size"]), (("--coupling", "best"), ["worst"]),
                        (("--set", "width=3"), ["width", "base"]), (("--set", "base=wide"), ["base=wide"]), (("--set", "norm=none"), ["norm", "zca"]),
                        (("--set", "strides=32,"), ["strides"]), (("--backbone", "wide_resnet50_2", "--weights", data / "none.pth"), ["none.pth", "--weights"])]:
        if args == ("--device", "cuda") and torch.cuda.is_available():
            continue
        fails(run("train.py", "--data", data, "--out", tmp_path / "o", *TINY, *args), *words)
    assert not (tmp_path / "o").exists()
    fails(shell(ROOT / "train.py", "--data", tmp_path / "absent"), "absent")
    fails(shell(ROOT / "evaluate.py"), "--run")


def test_out_that_cannot_be_written(data, tmp_path):
    (tmp_path / "file").write_text("")
    fails(run("train.py", "--data", data, "--out", tmp_path / "file", *TINY), "file", "--out")


@pytest.mark.parametrize("where", ["train/good/001.png", "test/good/007.png", "test/dent/001.png", "ground_truth/dent/001_mask.png"])
@pytest.mark.parametrize("blob", [b"", b"not an image", None])
def test_broken_images_stop_the_run_by_name(tmp_path, where, blob):
    path = make_mvtec(tmp_path / "d") / "bolt" / where
    path.write_bytes(path.read_bytes()[:50] if blob is None else blob)
    fails(run("train.py", "--data", tmp_path / "d", "--out", tmp_path, *TINY), path.name)
    assert not list((tmp_path / "d").rglob("results.csv"))


def test_mask_of_another_size(tmp_path):
    data = make_mvtec(tmp_path / "d")
    save(data / "bolt/ground_truth/dent/001_mask.png", np.ones((5, 5)))
    fails(run("train.py", "--data", data, "--out", tmp_path / "o", *TINY), "001_mask.png", "5 x 5")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def test_checkpoints_that_are_not_ours(data, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = (trained[0] / "bolt/model.pt").read_bytes()
    state = torch.load(trained[0] / "bolt/model.pt", weights_only=True)
    bad = {"truncated": good[: len(good) // 2], "empty": b"", "evil": pickle.dumps(Evil())}
    for name, change in {"foreign": lambda s: {"a": torch.ones(2)}, "list": lambda s: [1], "shape": lambda s: {**s, "whitening": (torch.ones(3), torch.ones(3, 3))},
                         "missing": lambda s: {k: v for k, v in s.items() if k != "field"}, "type": lambda s: {**s, "whitening": "x"},
                         "nan": lambda s: {**s, "field": {k: v * float("nan") if v.is_floating_point() else v for k, v in s["field"].items()}},
                         "backbone": lambda s: {**s, "recipe": {**s["recipe"], "backbone": "efficientnet_lite2"}}}.items():
        torch.save(change(state), tmp_path / "x")
        bad[name] = (tmp_path / "x").read_bytes()
    for name, blob in bad.items():
        path = tmp_path / f"{name}.pt"
        path.write_bytes(blob)
        fails(run("evaluate.py", "--model", path, "--image", data / "bolt/test/good/006.png", "--out", tmp_path / "o.png"), f"{name}.pt")
    assert not (tmp_path / "o.png").exists() and not (tmp_path / "evil-was-here").exists()


def test_flipped_bits_in_a_checkpoint_never_change_a_model(trained, tmp_path):
    """At 100 offsets: refused with one InputError, or the very same values (the bit was padding)."""
    import evaluate
    blob, rng = (trained[0] / "bolt/model.pt").read_bytes(), np.random.default_rng(0)
    whole = evaluate.load_state(trained[0] / "bolt/model.pt")
    for offset in rng.integers(0, len(blob), 100):
        bad = bytearray(blob)
        bad[offset] ^= 1 << int(rng.integers(8))
        (tmp_path / "x.pt").write_bytes(bytes(bad))
        try:
            state = evaluate.load_state(tmp_path / "x.pt")
        except evaluate.InputError as e:
            assert "x.pt" in str(e)
            continue
        assert all(torch.equal(state["field"][k], whole["field"][k]) for k in whole["field"]) and state["recipe"] == whole["recipe"]
        assert all(torch.equal(a, b) for part in ("whitening", "calibration") for a, b in zip(state[part], whole[part]))


# -------------------------------------------------------------------------------------------------- interruptions, locks
def test_killed_anywhere_and_resumed_ends_the_same(data, tmp_path):
    """A run killed at 25 moments (or KILLS), resumed each time, ends bit-identical to an uninterrupted one."""
    args = ("--data", data, *map(str, TINY), "--steps", "30", "--maps", "none", "--resume")
    code = "import sys, train, evaluate; train.SAVE_SECONDS = 0; evaluate.exit_cleanly(train.main)"      # a state after every step
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    assert run("train.py", *args, "--out", tmp_path / "whole").returncode == 0

    def same():
        assert without_seconds(tmp_path / "cut/tiny") == without_seconds(tmp_path / "whole/tiny")
        for name in ("bolt", "nut"):
            a, b = (torch.load(tmp_path / f / "tiny" / name / "model.pt", weights_only=True)["field"] for f in ("cut", "whole"))
            assert all(torch.equal(a[k], b[k]) for k in a)

    rng, kills, finished = np.random.default_rng(0), 0, 0
    while kills < int(os.environ.get("KILLS", 25)):
        p = subprocess.Popen([sys.executable, "-c", code, *map(str, args), "--out", str(tmp_path / "cut")], env=env,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            p.wait(timeout=rng.uniform(1.5, 4.0))
        except subprocess.TimeoutExpired:
            p.send_signal([signal.SIGKILL, signal.SIGTERM, signal.SIGINT][kills % 3])
            kills += 1
        error = p.communicate(timeout=60)[1].decode()
        assert "Traceback" not in error or "KeyboardInterrupt" in error, error      # a signal may fall into the imports
        if p.returncode == 0:                          # done before the kill: compared, and begun again
            same()
            shutil.rmtree(tmp_path / "cut")
            finished += 1
    result = run("train.py", *args, "--out", tmp_path / "cut")
    assert result.returncode == 0, result.stderr
    same()
    print(f"{kills} kills, {finished + 1} runs finished")


@pytest.mark.parametrize("when, call", [("fsync", 1), ("replace", 1), ("fsync", 4), ("replace", 5), ("pixel_metrics", 1), ("draw_map", 1), ("replace", 9),
                                        ("draw_contact_sheet", 1), ("write_csv", 1), ("write_csv", 2)])
def test_killed_while_saving_or_evaluating(data, trained, tmp_path, when, call):
    """SIGKILL at the n-th flush, rename, metric, picture or table: what stands is whole, and the resumed run ends the same."""
    code = "import os, signal, sys, train, evaluate; train.SAVE_SECONDS = 0\nwhen, call = sys.argv[1], int(sys.argv[2]); del sys.argv[1:3]; n = 0\n" \
           "where = os if hasattr(os, when) else evaluate; f = getattr(where, when)\n" \
           "def dying(*a, **k):\n    global n; n += 1\n    if n == call: os.kill(os.getpid(), signal.SIGKILL)\n    return f(*a, **k)\n" \
           "setattr(where, when, dying); evaluate.exit_cleanly(train.main)"
    args = [str(a) for a in ("--data", data, "--out", tmp_path, *TINY)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code, when, str(call), *args], env=env, capture_output=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    for path in tmp_path.rglob("*.pt"):
        if not path.name.startswith("."):
            torch.load(path, weights_only=True)
    if when != "draw_contact_sheet" and (when, call) != ("write_csv", 2):          # the table comes before the sheet
        assert not list(tmp_path.rglob("results.csv"))
    result = run("train.py", *args, "--resume")
    assert result.returncode == 0, result.stderr
    assert without_seconds(tmp_path / "tiny") == without_seconds(trained[0])
    for name in ("bolt", "nut"):
        a, b = (torch.load(f / name / "model.pt", weights_only=True)["field"] for f in (tmp_path / "tiny", trained[0]))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.rglob("state.pt"))


def test_features_or_loss_that_are_not_finite_stop_the_run(data, tmp_path):
    import train
    import wtflow
    weights = torch.load(wtflow.package_weights("efficientnet_lite0"), weights_only=True)
    weights["_blocks.5._bn2.weight"] *= float("nan")
    torch.save(weights, tmp_path / "nan.pth")
    fails(run("train.py", "--data", data, "--out", tmp_path / "o", *TINY, "--weights", tmp_path / "nan.pth"), "features are not finite", ".png")
    x_0 = torch.randn(4, 6, 2, 2)
    x_0[1, 2, 0, 1] = float("inf")
    with pytest.raises(wtflow.InputError, match="loss is not finite at step 0.*rate"):
        train.train_field(wtflow.Detector(dict(wtflow.RECIPE, base=8)), x_0, 0)
    assert not list(tmp_path.rglob("results.csv"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become a user without permission")
@pytest.mark.parametrize("what", ["train/good/001.png", "ground_truth/dent/001_mask.png", "train/good", "test", "."])
def test_without_permission(what):
    import tempfile

    import wtflow
    Image.init()                                   # the environment too may be closed to the other user: read all of it before
    root = Path(tempfile.mkdtemp())                # pytest's folders are closed to other users as a whole
    try:
        make_mvtec(root / "d")
        shutil.copy(wtflow.package_weights("efficientnet_lite0"), root / "weights.pth")
        for path in (root, *root.rglob("*")):
            path.chmod(0o777)
        (root / "d/bolt" / what).chmod(0)
        os.seteuid(65534)
        fails(run("train.py", "--data", root / "d/bolt", "--out", root / "o", *TINY, "--weights", root / "weights.pth"), Path(what).name or "bolt")
        assert not list(root.rglob("results.csv"))
    finally:
        os.seteuid(0)
        shutil.rmtree(root)


def test_resume_refuses_what_does_not_fit(data, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "tiny")
    base = ("--data", data, "--out", tmp_path, "--resume")
    for args, word in [((*TINY, "--seed", 5), "seed"), ((*TINY, "--coupling", "optimal"), "coupling"), (("--steps", 4, "--image-size", 96), "image_size")]:
        fails(run("train.py", *base, *args), word, "model.pt")
    state = torch.load(tmp_path / "tiny/bolt/model.pt", weights_only=True)
    state["signature"]["backbone"] = "efficientnet_lite2"
    torch.save(state, tmp_path / "tiny/bolt/model.pt")
    fails(run("train.py", *base, *TINY), "backbone efficientnet_lite2 there, efficientnet_lite0 here")
    more = tmp_path / "more/tiny"
    shutil.copytree(data, more)
    save(more / "bolt/train/good/999.png", picture(5)[0])
    fails(run("train.py", "--data", more, "--out", tmp_path, "--resume", *TINY), "images")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("share", [0.0004, 0.5, 0.98, 1.2, 1.47, 1.7])             # of what a finished run holds; state.pt is written beside it
def test_full_disk(data, trained, tmp_path, share):
    """Full at the first byte, a state, a picture, a model, and the second category's picture and model (a state is as large as two models)."""
    size = int(share * sum(p.stat().st_size for p in trained[0].rglob("*") if p.is_file()))
    (tmp_path / "small").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path / "small")], capture_output=True).returncode:
        pytest.skip("no permission to mount")
    try:
        fails(run("train.py", "--data", data, "--out", tmp_path / "small", *TINY), "cannot be written", "--out")
        assert not list((tmp_path / "small").rglob("results.csv")) and not list((tmp_path / "small").rglob("*.tmp"))
    finally:
        subprocess.run(["umount", str(tmp_path / "small")])


def test_a_machine_without_memory_left(data, tmp_path):
    code = "import resource, sys, torch, train, evaluate, wtflow; wtflow.RECIPE['base'] = 1 << 15; m = 6 << 30; resource.setrlimit(resource.RLIMIT_AS, (m, m)); " \
           "evaluate.exit_cleanly(train.main)"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code, "--data", str(data), "--out", str(tmp_path), *map(str, TINY)], capture_output=True, text=True, env=env)
    fails(result, "out of memory")
    assert not list(tmp_path.rglob("results.csv"))


@pytest.mark.parametrize("where, name", [("wtflow", "features"), ("wtflow", "flow_matching_loss"), ("wtflow", "fit_cells"), ("torch", "save"),
                                         ("evaluate", "pixel_metrics"), ("evaluate", "draw_map")])
def test_memory_that_ends_at_a_stage(data, trained, tmp_path, monkeypatch, where, name):
    """The allocator fails for the second category while extracting, training, calibrating, saving, measuring or drawing; --resume ends the same."""
    module, calls = __import__(where), []
    f, sizes = getattr(module, name), {"features": 3, "flow_matching_loss": 6, "fit_cells": 2, "save": 3, "pixel_metrics": 2, "draw_map": 6}

    def greedy(*args, **kwargs):
        calls.append(name)
        if len(calls) == sizes[name]:
            torch.empty(1 << 50)
        return f(*args, **kwargs)
    monkeypatch.setattr(module, name, greedy)
    fails(run("train.py", "--data", data, "--out", tmp_path, *TINY), "out of memory", "--resume")
    monkeypatch.undo()
    assert not list(tmp_path.rglob("results.csv")) and not list(tmp_path.rglob("*.tmp"))
    assert run("train.py", "--data", data, "--out", tmp_path, *TINY, "--resume").returncode == 0
    assert without_seconds(tmp_path / "tiny") == without_seconds(trained[0])


def test_two_runs_into_one_folder(data, tmp_path):
    import fcntl
    (tmp_path / "tiny").mkdir()
    with open(tmp_path / "tiny/.lock", "w") as lock:
        lock.write("4242")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        fails(run("train.py", "--data", data, "--out", tmp_path, *TINY), "4242", "--out")
