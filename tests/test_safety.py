"""Nothing lost, nothing trusted: broken files, foreign checkpoints, kills, full disks, locks."""

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import fails, make_mvtec, picture, run, save, succeeds
from PIL import Image
from test_cli import TINY, model_of, same_tensors, without_seconds

import evaluate
import train
import wtflow

DRAWN = (*TINY, "--maps", "worst")
ROOT_USER = hasattr(os, "geteuid") and os.geteuid() == 0


def train_apart(log, *options, prepare=None):
    """train.py in a process of its own, started, with a state saved after every step.

    A fork of this one, so that nothing is imported again. Its output goes to the file `log`;
    prepare(): called in it before.
    """

    def child():
        with open(log, "w") as f:
            os.dup2(f.fileno(), 1)
            os.dup2(f.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        train.SAVE_SECONDS = 0
        train.REPORT_STEPS = 1
        if prepare is not None:
            prepare()
        evaluate.exit_cleanly(lambda: train.main([str(option) for option in options]))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def no_table(folder):
    return not list(folder.rglob("results.csv"))


# ---- broken input --------------------------------------------------------------------------------
WHERE = "train/good/001 test/good/007 test/dent/001 ground_truth/dent/001_mask"


@pytest.mark.parametrize("where", [f"{name}.png" for name in WHERE.split()])
@pytest.mark.parametrize("blob", [b"", b"not an image", None])
def test_broken_images_stop_the_run_by_name(tmp_path, where, blob):
    path = make_mvtec(tmp_path / "d") / "bolt" / where
    path.write_bytes(path.read_bytes()[:50] if blob is None else blob)
    fails(run("train.py", "--data", tmp_path / "d", "--out", tmp_path / "o", *TINY), path.name)
    assert no_table(tmp_path)


def test_features_that_are_not_finite_stop_the_run(data, tmp_path):
    weights = torch.load(wtflow.package_weights("efficientnet_lite0"), weights_only=True)
    weights["_blocks.5._bn2.weight"] *= float("nan")
    torch.save(weights, tmp_path / "nan.pth")
    options = (*TINY, "--weights", tmp_path / "nan.pth")
    result = run("train.py", "--data", data, "--out", tmp_path / "o", *options)
    fails(result, "features are not finite", ".png")
    assert no_table(tmp_path)


@pytest.mark.skipif(not ROOT_USER, reason="only root can become a user without permission")
@pytest.mark.parametrize(
    "what",
    ["train/good/001.png", "ground_truth/dent/001_mask.png", "train/good", "test", "."],
)
def test_without_permission(what):
    Image.init()  # the other user may not read the environment either: read all of it before
    root = Path(tempfile.mkdtemp())  # pytest's folders are closed to other users as a whole
    try:
        make_mvtec(root / "d")
        shutil.copy(wtflow.package_weights("efficientnet_lite0"), root / "weights.pth")
        for path in (root, *root.rglob("*")):
            path.chmod(0o777)
        (root / "d/bolt" / what).chmod(0)
        os.seteuid(65534)
        options = (*TINY, "--weights", root / "weights.pth")
        result = run("train.py", "--data", root / "d/bolt", "--out", root / "o", *options)
        fails(result, Path(what).name or "bolt")
        assert no_table(root)
    finally:
        os.seteuid(0)
        shutil.rmtree(root)


# ---- checkpoints ---------------------------------------------------------------------------------
class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def changed_model(state, **changes):
    return {**state, "model": {**state["model"], **changes}}


# name: a function of a good checkpoint's state
FOREIGN = {
    "foreign": lambda s: {"a": torch.ones(2)},
    "list": lambda s: [1],
    "older": lambda s: {"recipe": s["recipe"], "field": s["model"]},
    "newer": lambda s: {**s, "format": evaluate.FORMAT + 1},
    "setting": lambda s: {**s, "recipe": {**s["recipe"], "told_t": True}},
    "value": lambda s: {**s, "recipe": {**s["recipe"], "norm": "none"}},
    "shape": lambda s: changed_model(s, feature_mean=torch.ones(3)),
    "missing": lambda s: {k: v for k, v in s.items() if k != "model"},
    "tensor": lambda s: {**s, "model": dict(list(s["model"].items())[1:])},
    "type": lambda s: changed_model(s, feature_mean="x"),
    "blocks": lambda s: changed_model(s, **{"gaussian.factor": s["model"]["gaussian.factor"][:1]}),
    "nan": lambda s: changed_model(s, feature_mean=s["model"]["feature_mean"] * float("nan")),
    "backbone": lambda s: {**s, "recipe": {**s["recipe"], "backbone": "efficientnet_lite2"}},
}


@pytest.mark.parametrize("name", ["truncated", "empty", "evil", *FOREIGN])
def test_checkpoints_that_are_not_ours(data, trained, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path, good = tmp_path / f"{name}.pt", trained[0] / "bolt/model.pt"
    blob = good.read_bytes()
    if name in FOREIGN:
        torch.save(FOREIGN[name](torch.load(good, weights_only=True)), path)
    else:
        kinds = {"truncated": blob[: len(blob) // 2], "empty": b"", "evil": pickle.dumps(Evil())}
        path.write_bytes(kinds[name])
    image = ("--image", data / "bolt/test/good/006.png", "--out", tmp_path / "o.png")
    fails(run("evaluate.py", "--model", path, *image), f"{name}.pt")
    assert not (tmp_path / "o.png").exists() and not (tmp_path / "evil-was-here").exists()


def test_flipped_bits_in_a_checkpoint_never_change_a_model(trained, tmp_path):
    """At 100 offsets: refused with one InputError, or the very same values (padding)."""
    good, bad = trained[0] / "bolt/model.pt", tmp_path / "x.pt"
    blob, rng = good.read_bytes(), np.random.default_rng(0)
    whole = evaluate.load_checkpoint(good)
    for offset in rng.integers(0, len(blob), 100):
        flipped = bytearray(blob)
        flipped[offset] ^= 1 << int(rng.integers(8))
        bad.write_bytes(bytes(flipped))
        try:
            state = evaluate.load_checkpoint(bad)
        except evaluate.InputError as e:
            assert "x.pt" in str(e)
            continue
        assert state["recipe"] == whole["recipe"]
        assert same_tensors(state["model"], whole["model"])


def test_resume_refuses_other_settings_another_backbone_and_other_images(data, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "tiny")
    resume = ("--out", tmp_path, "--resume", *TINY)
    for changes, word in (
        (("--seeds", 5), "seed"),
        (("--coupling", "optimal"), "coupling"),
        (("--rho", 0.7), "rho"),
    ):
        fails(run("train.py", "--data", data, *resume, *changes), word, "model.pt")
    more = tmp_path / "more/tiny"
    shutil.copytree(data, more)
    save(more / "bolt/train/good/000.png", picture(5)[0])
    fails(run("train.py", "--data", more, *resume), "(files ")  # as many images, another one
    save(more / "bolt/train/good/999.png", picture(5)[0])
    fails(run("train.py", "--data", more, *resume), "images")
    state = torch.load(tmp_path / "tiny/bolt/model.pt", weights_only=True)
    state["signature"]["backbone"] = "efficientnet_lite2"
    torch.save(state, tmp_path / "tiny/bolt/model.pt")
    result = run("train.py", "--data", data, *resume)
    fails(result, "backbone efficientnet_lite2 there, efficientnet_lite0 here")


def test_a_retraining_that_was_interrupted_is_resumed(data, trained, tmp_path):
    """With other settings, into the folder of a finished run: its state goes before the model."""
    options = ("--data", data / "bolt", *TINY, "--seeds", 3)
    succeeds(run("train.py", *options, "--out", tmp_path / "whole"))
    cut = tmp_path / "cut"
    shutil.copytree(trained[0], cut / "tiny")
    process = train_apart(
        tmp_path / "log", *options, "--out", cut, prepare=lambda: dies_at("score_category", 1)
    )
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and (cut / "tiny/bolt/state.pt").exists()
    fails(run("train.py", "--data", data / "bolt", *TINY, "--out", cut, "--resume"), "state.pt")
    succeeds(run("train.py", *options, "--out", cut, "--resume"))
    assert same_tensors(model_of(cut / "tiny", "bolt"), model_of(tmp_path / "whole/tiny", "bolt"))


def test_the_state_of_an_earlier_run_is_gone_once_another_has_begun(data, tmp_path):
    options = ("--data", data / "bolt", *TINY, "--out", tmp_path)
    for seed, dies in ((3, "score_category"), (4, "extract")):  # after the last state, before any
        process = train_apart(
            tmp_path / "log", *options, "--seeds", seed, prepare=lambda dies=dies: dies_at(dies, 1)
        )
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    succeeds(run("train.py", *options, "--seeds", 4, "--resume"))


def test_pictures_that_are_asked_for_later_are_drawn_by_evaluate(data, trained, tmp_path):
    evaluate.SAID.clear()
    shutil.copytree(trained[0], tmp_path / "tiny")
    options = ("--data", data, "--maps", "all", "--save-maps")
    result = succeeds(run("train.py", *options, "--out", tmp_path, *TINY, "--resume"))
    assert "finished categories stay: evaluate.py --run draws them again" in result.stderr
    succeeds(run("evaluate.py", *options, "--run", tmp_path))
    assert len([*(tmp_path / "tiny/bolt/maps").iterdir()]) == 6
    assert len([*tmp_path.rglob("bolt/**/*.tiff")]) == 6
    again = ("--data", data, "--out", tmp_path, *TINY, "--seeds", 3, "--maps", "none")
    succeeds(run("train.py", *again))  # another model: the pictures are not its own
    left = [*tmp_path.rglob("maps/*.png"), *tmp_path.rglob("*.tiff")]
    assert not left and not [*tmp_path.rglob("contact-sheet.png")]


def test_two_runs_into_one_folder(data, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "tiny").mkdir()
    with open(tmp_path / "tiny/.lock", "w") as lock:
        lock.write("4242")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        fails(run("train.py", "--data", data, "--out", tmp_path, *TINY), "4242", "--out")


# ---- kills ---------------------------------------------------------------------------------------
def resumed_is_whole(folder, whole):
    """The table and both models are those of an uninterrupted run, and nothing is left over."""
    assert without_seconds(folder) == without_seconds(whole)
    for name in ("bolt", "nut"):
        assert same_tensors(model_of(folder, name), model_of(whole, name))
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("state.pt"))


def test_killed_anywhere_and_resumed_ends_the_same(data, tmp_path):
    """Killed at 12 moments (or KILLS), resumed each time: bit-identical to an uninterrupted run."""
    options = ("--data", data, *TINY, "--steps", 30, "--resume")
    succeeds(run("train.py", *options, "--out", tmp_path / "whole"))
    cut, log = tmp_path / "cut", tmp_path / "log"
    rng, kills, finished = np.random.default_rng(0), 0, 0
    while kills < int(os.environ.get("KILLS", 12)):
        process = train_apart(log, *options, "--out", cut)
        process.join(rng.uniform(0.2, 2.5))
        if process.is_alive():
            os.kill(process.pid, (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[kills % 3])
            kills += 1
        process.join(60)
        error = log.read_text()
        assert "Traceback" not in error, error
        if process.exitcode == 0:  # done before the kill: compared, and begun again
            resumed_is_whole(cut / "tiny", tmp_path / "whole/tiny")
            shutil.rmtree(cut)
            finished += 1
    succeeds(run("train.py", *options, "--out", cut))
    resumed_is_whole(cut / "tiny", tmp_path / "whole/tiny")
    print(f"{kills} kills, {finished + 1} runs finished")


def dies_at(name, call):
    """Let the n-th call of a function of os or evaluate kill this process."""
    module, calls = os if hasattr(os, name) else evaluate, []
    f = getattr(module, name)

    def dying(*args, **options):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return f(*args, **options)

    setattr(module, name, dying)


@pytest.mark.parametrize(
    "when, call, maps",
    [
        ("fsync", 1, "none"),
        ("replace", 5, "none"),
        ("pixel_counts", 1, "none"),
        ("replace", 17, "none"),
        ("replace", 18, "worst"),
        ("draw_map", 1, "worst"),
        ("draw_contact_sheet", 1, "worst"),
        ("write_csv", 1, "none"),
        ("write_csv", 2, "none"),
    ],
)
def test_killed_while_saving_or_evaluating(data, trained, tmp_path, when, call, maps):
    """SIGKILL at the n-th flush, rename, metric, picture or table: what stands is whole.

    Sixteen renames are of states, four for each of four fits; then scores.csv, the model.
    """
    options = ("--data", data, "--out", tmp_path, *TINY, "--maps", maps)
    process = train_apart(tmp_path / "log", *options, prepare=lambda: dies_at(when, call))
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    for path in tmp_path.rglob("*.pt"):
        if not path.name.startswith("."):
            torch.load(path, weights_only=True)
    table_was_next = when == "draw_contact_sheet" or (when, call) == ("write_csv", 2)
    assert table_was_next or no_table(tmp_path)
    succeeds(run("train.py", *options, "--resume"))
    resumed_is_whole(tmp_path / "tiny", trained[0])


# ---- no space, no memory -------------------------------------------------------------------------
@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of `size` bytes in `folder`."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)])


def held_by(folder):
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


needs_root = pytest.mark.skipif(not ROOT_USER, reason="mounting a small file system needs root")


@needs_root
@pytest.mark.parametrize("share", [0.0004, 0.5, 0.98, 1.2, 1.47])
def test_full_disk(data, trained, tmp_path, share):
    """Full at the first byte, a state, a model, the second category's state, its model.

    share: of what a finished run holds; a state is as large as a model and beside it.
    """
    with small_disk(tmp_path / "small", int(share * held_by(trained[0]))) as small:
        result = run("train.py", "--data", data, "--out", small, *DRAWN)
        fails(result, "cannot be written", "--out")
        assert no_table(small) and not list(small.rglob("*.tmp"))


@needs_root
def test_full_disk_at_a_picture(data, trained, tmp_path):
    with small_disk(tmp_path / "small", 2 * held_by(trained[0])) as small:
        run_of = small / "tiny"
        shutil.copytree(trained[0], run_of)
        for picture in run_of.rglob("*.png"):
            picture.unlink()
        models = {path: path.read_bytes() for path in run_of.rglob("*.pt")}
        size = f"remount,size={held_by(small) + 2**16}"  # room for the table of scores
        subprocess.run(["mount", "-o", size, str(small)], check=True)
        result = run("evaluate.py", "--run", run_of, "--data", data, "--maps", "worst")
        fails(result, ".png: cannot be written", "free some space")
        assert not list(small.rglob("*.tmp"))
        assert all(path.read_bytes() == model for path, model in models.items())


def test_a_machine_without_memory_left(data, tmp_path):
    resource = pytest.importorskip("resource")

    def little_memory():
        """What this process has, and 1 GiB."""
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + (1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    options = ("--data", data, "--out", tmp_path, *TINY, "--width", 1 << 15)
    process = train_apart(tmp_path / "log", *options, prepare=little_memory)
    process.join(60)
    result = SimpleNamespace(returncode=process.exitcode, stderr=(tmp_path / "log").read_text())
    fails(result, "out of memory")
    assert no_table(tmp_path)


@pytest.mark.parametrize(
    "module, name, call",
    [
        (wtflow, "extract_features", 15),
        (wtflow, "flow_matching_loss", 18),
        (wtflow.PositionGaussian, "fit", 5),
        (torch, "save", 3),
        (evaluate, "pixel_counts", 2),
        (evaluate, "draw_map", 6),
    ],
)
def test_memory_that_ends_at_a_stage(data, trained, tmp_path, monkeypatch, module, name, call):
    """The allocator fails for the second category; --resume ends the same.

    While extracting, training, calibrating, saving, measuring or drawing.
    """
    f, calls = getattr(module, name), []

    def greedy(*args, **options):
        calls.append(name)
        if len(calls) == call:
            torch.empty(1 << 50)
        return f(*args, **options)

    options = ("--data", data, "--out", tmp_path, *(DRAWN if name == "draw_map" else TINY))
    monkeypatch.setattr(module, name, greedy)
    fails(run("train.py", *options), "out of memory", "--resume")
    monkeypatch.undo()
    assert no_table(tmp_path) and not list(tmp_path.rglob("*.tmp"))
    succeeds(run("train.py", *options, "--resume", "--maps", "none"))
    assert without_seconds(tmp_path / "tiny") == without_seconds(trained[0])
