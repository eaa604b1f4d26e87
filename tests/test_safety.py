"""Nothing lost, nothing trusted: broken files, foreign checkpoints, kills, full disks, locks."""

import contextlib
import errno
import io
import itertools
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import fails, make_mvtec, picture, run, save, succeeds
from PIL import Image
from test_cli import TINY, model_of, same_tensors, without_seconds

import evaluate
import train
import wtflow
from evaluate import InputError

DRAWN = (*TINY, "--maps", "worst")
ROOT_USER = hasattr(os, "geteuid") and os.geteuid() == 0


def apart(module, log, *options, before=lambda: None):
    """A command in a fork of this process, after before(), with a state saved after every step.

    Its output goes to the file `log`.
    """

    def child():
        with open(log, "w") as f:
            os.dup2(f.fileno(), 1)
            os.dup2(f.fileno(), 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        train.SAVE_SECONDS, train.REPORT_STEPS = 0, 1
        before()
        evaluate.exit_cleanly(lambda: module.main([str(option) for option in options]))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def at_call(module, name, n, act):
    """Let the n-th call of a module's function begin with act()."""
    f, calls = getattr(module, name), itertools.count(1)

    def counted(*args, **options):
        if next(calls) == n:
            act()
        return f(*args, **options)

    setattr(module, name, counted)


def killed_at(name, n, command, log, *options):
    """A command that is killed at the n-th call of a function of os or evaluate."""
    module = os if hasattr(os, name) else evaluate
    die = partial(at_call, module, name, n, lambda: os.kill(os.getpid(), signal.SIGKILL))
    process = apart(command, log, *options, before=die)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, log.read_text()


def no_table(folder):
    return not list(folder.rglob("results.csv"))


# ---- broken input --------------------------------------------------------------------------------
BROKEN = ("train/good/001.png", "test/good/007.png", "ground_truth/dent/001_mask.png")


@pytest.mark.parametrize("where", BROKEN)
def test_broken_images_stop_the_run_by_name(tmp_path, where):
    path = make_mvtec(tmp_path / "d") / "bolt" / where
    path.write_bytes(path.read_bytes()[:50])
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
@pytest.mark.parametrize("what", ["train/good/001.png", "ground_truth/dent/001_mask.png", "test"])
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
        fails(result, Path(what).name)
        assert no_table(root)
    finally:
        os.seteuid(0)
        shutil.rmtree(root)


# ---- checkpoints ---------------------------------------------------------------------------------
class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def torch_bytes(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def changed_model(state, **changes):
    return {**state, "model": {**state["model"], **changes}}


FOREIGN = {  # functions of a good checkpoint's state, or bytes
    "truncated": lambda s: torch_bytes(s)[:3000],
    "empty": lambda s: b"",
    "evil": lambda s: {**s, "evil": Evil()},
    "foreign": lambda s: {"a": torch.ones(2)},
    "older": lambda s: {"recipe": s["recipe"], "field": s["model"]},
    "newer": lambda s: {**s, "format": evaluate.FORMAT + 1},
    "setting": lambda s: {**s, "recipe": {**s["recipe"], "told_t": True}},
    "shape": lambda s: changed_model(s, feature_mean=torch.ones(3)),
    "tensor": lambda s: {**s, "model": dict(list(s["model"].items())[1:])},
    "type": lambda s: changed_model(s, feature_mean="x"),
    "unfitted": lambda s: changed_model(s, normal_scores=torch.zeros(0)),
    "nan": lambda s: changed_model(s, feature_mean=s["model"]["feature_mean"] * float("nan")),
    "weights": lambda s: {**s, "weights": "0"},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_checkpoints_that_are_not_ours(data, trained, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path, state = tmp_path / f"{name}.pt", torch.load(trained[0] / "bolt/model.pt")
    found = FOREIGN[name](state)
    path.write_bytes(found if isinstance(found, bytes) else torch_bytes(found))
    image = ("--image", data / "bolt/test/good/006.png", "--out", tmp_path / "o")
    fails(run("evaluate.py", "--model", path, *image), f"{name}.pt")
    assert not (tmp_path / "o").exists() and not (tmp_path / "evil-was-here").exists()


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
        except InputError as e:
            assert "x.pt" in str(e)
            continue
        assert state["recipe"] == whole["recipe"]
        assert same_tensors(state["model"], whole["model"])


def test_resume_refuses_other_settings_another_backbone_and_other_images(data, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "tiny")
    more, resume = tmp_path / "more/tiny", ("--out", tmp_path, "--resume", *TINY)
    shutil.copytree(data, more)
    for name, value in (("seeds", 5), ("coupling", "optimal"), ("rho", 0.7), ("fpr", 20)):
        result = run("train.py", "--data", data, *resume, f"--{name}", value)
        fails(result, "recipe.json", name.rstrip("s"))
    for name, word in (("train/good/000.png", "files"), ("ground_truth/dent/000_mask.png", "test")):
        path = more / "bolt" / name  # another file of the same name, size in bytes and time
        before, whole = path.stat(), path.read_bytes()
        path.write_bytes(whole[:-20] + bytes([whole[-20] ^ 1]) + whole[-19:])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        fails(run("train.py", "--data", more, *resume), f"({word} ")
        path.write_bytes(whole)
    save(more / "bolt/train/good/999.png", picture(5)[0])
    fails(run("train.py", "--data", more, *resume), "images")
    file = tmp_path / "tiny/bolt/recipe.json"
    file.write_text(file.read_text().replace("efficientnet_lite0", "efficientnet_lite2"))
    fails(run("train.py", "--data", data, *resume), "backbone", "efficientnet_lite2")


def test_a_retraining_that_was_interrupted_is_resumed(data, trained, tmp_path):
    """With other settings, into the folder of a finished run: its state goes before the model."""
    options = ("--data", data / "bolt", *TINY, "--seeds", 3)
    succeeds(run("train.py", *options, "--out", tmp_path / "whole"))
    cut = tmp_path / "cut"
    shutil.copytree(trained[0], cut / "tiny")
    killed_at("report", 1, train, tmp_path / "log", *options, "--out", cut)
    fails(run("train.py", "--data", data / "bolt", *TINY, "--out", cut, "--resume"), "state.pt")
    succeeds(run("train.py", *options, "--out", cut, "--resume"))
    assert same_tensors(model_of(cut / "tiny", "bolt"), model_of(tmp_path / "whole/tiny", "bolt"))


def test_pictures_of_another_model_go(data, trained, tmp_path):
    """Those that are asked for later are drawn by evaluate.py; a new training removes them."""
    shutil.copytree(trained[0], tmp_path / "tiny")
    more = ("--maps", "all", "--save-maps")
    succeeds(run("evaluate.py", "--data", data, "--run", tmp_path, *more))
    assert len([*(tmp_path / "tiny/bolt/maps").rglob("*.png")]) == 6
    tiff = Image.open(tmp_path / "tiny/anomaly_maps/bolt/test/dent/000.tiff")
    assert tiff.mode == "F" and tiff.size == (48, 40) and len([*tmp_path.rglob("*.tiff")]) == 12
    succeeds(run("train.py", "--data", data, "--out", tmp_path, *TINY, "--seeds", 3))
    assert not [*tmp_path.rglob("maps/**/*.png"), *tmp_path.rglob("*.tiff")]


# ---- locks, links, files of others ---------------------------------------------------------------
def test_a_second_run_into_a_folder_is_refused(data, trained, tmp_path):
    """By train.py, evaluate.py --run and --image; the lock of a killed run is none."""
    pytest.importorskip("fcntl")
    folder = tmp_path / "tiny"
    shutil.copytree(trained[0], folder)
    image = ("--image", data / "bolt/test/dent", "--out", folder)
    commands = [
        ("evaluate.py", "--model", folder / "bolt/model.pt", *image),
        ("evaluate.py", "--run", folder, "--data", data, "--maps", "none"),
        ("train.py", "--data", data, "--out", tmp_path, *TINY),
    ]
    for command in commands:
        with evaluate.locked(folder):
            fails(run(*command), "another process is writing here", "--out")
        assert not [*tmp_path.rglob("*.lock")] and not [*folder.glob("scores.csv")]
    (folder / ".wtflow.lock").touch()
    succeeds(run(*commands[0]))


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path, monkeypatch):
    """Its last holder has removed it, after it was opened: who comes next makes a new one."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", lambda *_: (tmp_path / ".wtflow.lock").unlink())
    with pytest.raises(InputError, match="another process"), evaluate.locked(tmp_path):
        pass


def test_a_file_system_without_locks_is_a_note(tmp_path, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "No locks")))
    evaluate.SAID.clear()
    with evaluate.locked(tmp_path):
        assert "No locks" in capsys.readouterr().err


def test_links_in_place_of_our_files_are_not_followed(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("mine")
    for name in (".wtflow.lock", ".a.csv.tmp", "b.csv"):
        (tmp_path / name).symlink_to(own)
    with evaluate.locked(tmp_path):
        evaluate.write_csv(tmp_path / "a.csv", ("image",), [])
        with pytest.raises(InputError, match=r"b\.csv: not a file"):
            evaluate.write_csv(tmp_path / "b.csv", ("image",), [])
    assert own.read_text() == "mine" and not (tmp_path / "a.csv").is_symlink()
    (tmp_path / ".a.csv.tmp").mkdir()
    with pytest.raises(InputError, match=r"a\.csv: cannot be written"):
        evaluate.write_csv(tmp_path / "a.csv", ("image",), [])
    assert (tmp_path / "a.csv").read_bytes() == b"image\r\n"


OURS = ("scores.csv", "train-scores.csv", "recipe.json", "model.pt", "state.pt")


@pytest.mark.parametrize("name", ["results.csv", *(f"bolt/{name}" for name in OURS)])
def test_a_file_that_is_not_ours_stops_the_run_before_any_work(data, tmp_path, monkeypatch, name):
    path = tmp_path / "tiny" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine, 1, 2")
    monkeypatch.setattr(evaluate, "extract", None)
    fails(run("train.py", "--data", data, "--out", tmp_path, *TINY), name, "move it")
    assert path.read_text() == "mine, 1, 2"


def test_pictures_that_are_not_ours_stay(data, trained, tmp_path):
    """Whether they have the name of one that is to be drawn or not; that one costs itself."""
    shutil.copytree(trained[0], tmp_path / "tiny")
    folder, mine = tmp_path / "tiny/bolt", {}
    drawn, *others = (folder / "maps").rglob("*.png")
    for path in (folder / "maps/mine.png", folder / "scores.png", drawn):
        save(path, picture(7)[0])
        mine[path] = path.read_bytes()
    result = succeeds(run("evaluate.py", "--run", tmp_path, "--data", data, "--category", "bolt"))
    assert {path: path.read_bytes() for path in mine} == mine
    assert result.stderr.count("move it") == 2 and "scores.png (" in result.stderr
    assert others and all(path.is_file() for path in others)


def test_tables_and_pictures_of_others_are_not_written_over(data, trained, tmp_path):
    """By --image: the scores of a run, those of another folder, a photograph."""
    command = ("evaluate.py", "--model", trained[0] / "bolt/model.pt", "--image")
    shutil.copytree(trained[0] / "bolt", tmp_path / "run")
    succeeds(run(*command, data / "nut/test", "--out", tmp_path / "nut"))
    save(tmp_path / "photo/000.png.png", picture(1)[0])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*")}
    fails(run(*command, data / "bolt/test", "--out", tmp_path / "run"), "scores.csv", "move it")
    for more in ((), ("--resume",)):
        result = run(*command, data / "bolt/test", "--out", tmp_path / "nut", *more)
        fails(result, "scores.csv: rows of another folder", "--out")
    result = run(*command, data / "bolt/test/dent/000.png", "--out", tmp_path / "photo")
    assert "no picture" in succeeds(result).stderr
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", ["..", "../x", "/x", "a/../..", ""])
def test_a_name_that_leads_out_of_a_folder_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="leads out of"):
        evaluate.inside(tmp_path / "out", name)


def test_maps_of_test_images_from_anywhere_stay_in_their_folder(tmp_path):
    """Of paths like candle/../../x.png, which tables of VisA may have."""
    root, truth = tmp_path / "d/candle/Data", []
    for name in ("a.png", "../../x.png", "../../../y.png"):
        truth.append(evaluate.Item(root / name, "good", ()))
    category = evaluate.Category("candle", [], truth, None)
    evaluate.write_maps(tmp_path / "out/candle", category, torch.zeros(3, 4, 4), [(4, 4)] * 3)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) == 3
    assert all(tmp_path / "out/anomaly_maps/candle/test/good" in path.parents for path in written)


def test_what_the_program_wrote_is_never_an_input(data, trained, tmp_path):
    """Of train.py, --run and --image; the demo's own images are."""
    folder, out = tmp_path / "line", ("--out", tmp_path / "p")
    shutil.copytree(data / "bolt/train/good", folder)
    shutil.copy(trained[0] / "bolt/scores.png", folder)
    fails(run("train.py", "--data", folder, *out, *TINY), "scores.png", "of this program")
    model = ("--model", trained[0] / "bolt/model.pt")
    fails(run("evaluate.py", *model, "--image", folder, *out), "scores.png", "of this program")
    assert not [*(tmp_path / "p").rglob("scores.png.png")]
    for _ in range(2):
        demo = train.make_demo(tmp_path / "demo", train=2, good=1, each=1, n=32)
    assert evaluate.image_sizes(sorted(demo.rglob("*.png")))


def test_escapes_and_line_breaks_in_names_do_not_reach_the_terminal(data, tmp_path):
    bad = "\x1b]0;owned\x07\u202e\nx"
    root = tmp_path / f"d{bad}/bolt{bad}"
    shutil.copytree(data / "bolt", root)
    for part in ("test", "ground_truth"):
        (root / part / "dent").rename(root / part / f"de{bad}")
    (root / f"notes{bad}.txt").write_text("")
    train = ("train.py", "--data", root.parent, "--out", tmp_path / f"o{bad}", *TINY)
    results = [run(*train), run(*train, "--resume")]
    model = next(tmp_path.rglob("model.pt"))
    images = ("--image", root / "test", "--out", tmp_path / f"s{bad}")
    results.append(run("evaluate.py", "--model", model, *images))
    for result in results:
        for line in (succeeds(result).stdout + result.stderr).splitlines():
            assert line.isprintable() and not line.startswith("x")
    assert len([*(tmp_path / f"s{bad}").rglob("*.png")]) == 6


# ---- kills ---------------------------------------------------------------------------------------
def resumed_is_whole(folder, whole):
    """The table and both models are those of an uninterrupted run, and nothing is left over."""
    assert without_seconds(folder) == without_seconds(whole)
    for name in ("bolt", "nut"):
        assert same_tensors(model_of(folder, name), model_of(whole, name))
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("state.pt"))


def test_killed_anywhere_and_resumed_ends_the_same(data, tmp_path):
    """Killed at 6 moments (or KILLS), resumed each time: bit-identical to an uninterrupted run."""
    options = ("--data", data, *TINY, "--steps", 30, "--resume")
    succeeds(run("train.py", *options, "--out", tmp_path / "whole"))
    cut, log = tmp_path / "cut", tmp_path / "log"
    rng, kills = np.random.default_rng(0), 0
    while kills < int(os.environ.get("KILLS", 6)):
        process = apart(train, log, *options, "--out", cut)
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
    succeeds(run("train.py", *options, "--out", cut))
    resumed_is_whole(cut / "tiny", tmp_path / "whole/tiny")


@pytest.mark.parametrize("when, call", [("fsync", 1), ("replace", 1), ("csv_text", 4)])
def test_a_scoring_that_is_killed_anywhere_keeps_its_rows(data, trained, tmp_path, when, call):
    """While --resume writes its table again, and while it adds a row."""
    table = tmp_path / "s/scores.csv"
    command = ("--model", trained[0] / "bolt/model.pt", "--image", data / "bolt/test", "--out",
               tmp_path / "s", "--resume", "--maps", "none")  # fmt: skip
    succeeds(run("evaluate.py", *command))
    whole = table.read_bytes()
    half = b"".join(whole.splitlines(keepends=True)[:4])
    table.write_bytes(half)
    killed_at(when, call, evaluate, tmp_path / "log", *command)
    assert table.read_bytes().startswith(half)
    succeeds(run("evaluate.py", *command))
    assert table.read_bytes() == whole and [*(tmp_path / "s").iterdir()] == [table]


KILLS = (("fsync", 1), ("replace", 5), ("replace", 18), ("draw_rows", 1), ("write_json", 1),
         ("write_csv", 2))  # fmt: skip


@pytest.mark.parametrize("when, call", KILLS)
def test_killed_while_saving_or_evaluating(data, trained, tmp_path, when, call):
    """SIGKILL at the n-th flush, rename, picture or table: what stands is whole.

    Sixteen renames are of states, four for each of four fits; then train-scores.csv, the model.
    """
    options = ("--data", data, "--out", tmp_path, *(DRAWN if when == "draw_rows" else TINY))
    killed_at(when, call, train, tmp_path / "log", *options)
    for path in tmp_path.rglob("[!.]*.pt"):
        torch.load(path, weights_only=True)
    assert no_table(tmp_path)
    succeeds(run("train.py", *options, "--resume", "--maps", "none"))
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


@pytest.mark.parametrize("share", [0.0004, 0.5, 0.98, 1.2, 1.47])
def test_full_disk(data, trained, tmp_path, share):
    """Full at the first byte, a state, a model, the second category's state, its model.

    share: of what a finished run holds; a state is as large as a model and beside it.
    """
    held = sum(path.stat().st_size for path in trained[0].rglob("*.*"))
    with small_disk(tmp_path / "small", int(share * held)) as small:
        result = run("train.py", "--data", data, "--out", small, *DRAWN)
        fails(result, "cannot be written", "free some space")
        assert no_table(small) and not list(small.rglob("*.tmp"))


def test_a_full_disk_loses_no_row_of_a_table(data, trained, tmp_path):
    """Of --image FOLDER; with space again it goes on."""
    command = ("evaluate.py", "--model", trained[0] / "bolt/model.pt", "--image", data / "bolt")
    command += ("--maps", "none", "--resume", "--out")
    with small_disk(tmp_path / "small", 1 << 16) as small:
        table, filler = small / "scores.csv", small / "filler"
        succeeds(run(*command, small))
        whole = table.read_bytes()
        half = b"".join(whole.splitlines(keepends=True)[:5])
        for begun in (b"", half):
            table.write_bytes(begun) if begun else table.unlink()
            with contextlib.suppress(OSError), open(filler, "wb", 0) as f:
                while True:
                    f.write(bytes(4096))
            fails(run(*command, small), "cannot be written", "free some space")
            assert not begun or table.read_bytes() == begun
            filler.unlink()
            succeeds(run(*command, small))
            assert table.read_bytes() == whole


def test_a_row_that_only_a_part_has_room_of_is_an_error(tmp_path):
    resource = pytest.importorskip("resource")
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    about = {"folder": "/x", "threshold": "1"}
    with evaluate.growing_table(tmp_path, {"a.png": tmp_path}, about, False) as (_, add):
        size = (tmp_path / "scores.csv").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, most))
        try:
            with pytest.raises(InputError, match="scores.csv: cannot be written"):
                add({"image": "a.png", "score": "1"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert evaluate.read_csv(tmp_path / "scores.csv", evaluate.FOLDER_SCORES) == []


STAGES = ((wtflow, "extract_features", 15), (wtflow, "flow_matching_loss", 18), (torch, "save", 3),
          (evaluate, "draw_rows", 6))  # fmt: skip


@pytest.mark.parametrize("module, name, call", STAGES)
def test_memory_that_ends_at_a_stage(data, trained, tmp_path, monkeypatch, module, name, call):
    """The allocator fails for the second category; --resume ends the same."""
    options = ("--data", data, "--out", tmp_path, *(DRAWN if name == "draw_rows" else TINY))
    monkeypatch.setattr(module, name, getattr(module, name))  # as it is again after undo
    at_call(module, name, call, lambda: torch.empty(1 << 50))
    fails(run("train.py", *options), "out of memory", "--resume")
    monkeypatch.undo()
    assert no_table(tmp_path) and not list(tmp_path.rglob("*.tmp"))
    succeeds(run("train.py", *options, "--resume", "--maps", "none"))
    assert without_seconds(tmp_path / "tiny") == without_seconds(trained[0])
