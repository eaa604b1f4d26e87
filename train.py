"""Train WT-Flow on a data set of good images, evaluate it, write models, table and pictures.

python train.py                              a small demo, made here, trained and evaluated
python train.py --data path/to/mvtec         every category of a data set, or one's folder
torchrun --nproc-per-node N train.py ...     the categories shared out among N processes
"""

import ast
import contextlib
import datetime
import hashlib
import io
import math
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in evaluate.py

import numpy as np
import torch
from PIL import Image

import evaluate
import wtflow
from wtflow import InputError

DEMO_STEPS = 200  # the demo's categories are small; all else is the default of wtflow.Recipe
OWN_OPTIONS = ("backbone", "image_size", "steps", "coupling", "strength")  # the rest: --set


# ---- 1. One category, from images to a model -----------------------------------------------------
def run_category(category, recipe, seed, folder, args, device, prefix):
    """Train, evaluate and save one category; its row. With --resume a finished one is only read."""
    began, progress = time.monotonic(), Progress(prefix)
    model_file, state_file = folder / "model.pt", folder / "state.pt"
    train_sizes = evaluate.image_sizes(category.train)
    recipe = wtflow.recipe_for(recipe, train_sizes)
    print(f"{prefix}: {resolution(recipe, train_sizes)}", file=sys.stderr)
    mine, state = signature(category, recipe, seed, args.weights_digest), None
    begun = {**mine, "device": device.type}  # generators of two devices differ
    finished = {**mine, "false_alarms": args.false_alarms}  # training does not depend on them
    source = source_of(category)
    if args.resume and model_file.exists() and not state_file.exists():
        row = continued(model_file, finished)["row"]
        evaluate.draw_missing(folder, category, args, device)
        return row
    refuse_another_source(model_file, source)
    if args.resume and state_file.exists():
        state = continued(state_file, begun)
        began -= state["seconds"]
    else:
        state_file.unlink(missing_ok=True)  # of an earlier run

    # Features. The test images come first: a broken one stops the run before training.
    detector = wtflow.Detector(recipe, args.weights).to(device)
    detector.white = evaluate.grey_level(category.train)
    test_paths = [item.path for item in category.test]
    test, sizes = evaluate.extract(
        detector, test_paths, progress.of("features, test images", test_paths)
    )
    train, _ = evaluate.extract(
        detector, category.train, progress.of("features, training images", category.train)
    )

    # Whitening. x_0 takes the place of the features, which are not needed any more.
    detector.fit_whitening(train)
    x_0 = detector.normalise(train, out=train)

    # Training.
    def report(step, steps, loss):
        progress(f"step {step}/{steps}, loss {loss:.4f}", step, steps)

    def save(state):
        seconds = time.monotonic() - began
        evaluate.save_checkpoint(state_file, recipe, signature=begun, seconds=seconds, **state)

    wtflow.train_fields(detector, x_0, seed, report, save, state)

    # Calibration. What the fields leave takes the place of x_0.
    detector.calibrate(x_0)

    # Evaluation.
    test_x_0 = detector.normalise(test, out=test) if category.test else None
    judged = evaluate.judge_category(detector, category, test_x_0, args)
    row = evaluate.measure_category(category, judged, sizes)
    row["seconds"] = round(time.monotonic() - began, 1)

    # Saving. Pictures last: one that fails costs no training.
    evaluate.write_scores(folder, category, judged)
    evaluate.remove_pictures(folder)
    for old in evaluate.maps_of(folder):
        old.unlink()
    evaluate.save_model(model_file, detector, signature=finished, row=row, source=source)
    state_file.unlink(missing_ok=True)
    evaluate.write_pictures(folder, category, judged, sizes, args)
    return row


def source_of(category):
    """A digest of the folder that the training images are in: it does not tell the path."""
    folder = Path(os.path.commonpath([path.parent for path in category.train])).resolve()
    return hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]


def refuse_another_source(model_file, source):
    """Raises InputError if a model of another folder's images would be replaced."""
    try:
        had = evaluate.load_checkpoint(model_file).get("source")
    except InputError:  # none, or one that is damaged or of another version
        return
    if had not in (None, source):
        raise InputError(
            f"{model_file}: a model of images in another folder: give another --out, or remove it"
        )


SHRUNK = 2.5  # times, from which a larger --image-size is named


def resolution(recipe, sizes):
    """One line: what the network sees of images of sizes (H, W), and how large a defect must be."""
    height, width = wtflow.image_shape(recipe)
    areas = sorted((h * w, h, w) for h, w in sizes)
    _, h, w = areas[len(areas) // 2]
    shrunk = math.sqrt(h * w / (height * width))
    cell = recipe.cell * shrunk
    line = (
        f"images of {w} x {h} are read at {width} x {height}; a cell of the map covers "
        f"{cell:.0f} x {cell:.0f} of their pixels, and a defect needs about as much"
    )
    if shrunk > SHRUNK:
        unit = math.lcm(recipe.cell, max(recipe.strides))
        larger = min(2048 // unit, round(math.sqrt(h * w) / 2 / unit)) * unit
        line += f": for smaller ones give --image-size, up to {larger}"
    return line


def signature(category, recipe, seed, weights_digest):
    """What a saved state must share with this run to be continued.

    Recipe, seed, the extractor's weights, and the files: their folders, names and sizes.
    """
    paths = list(category.train)
    for item in category.test:
        paths += [item.path, *(item.masks or ())]
    files = "\n".join(f"{p.parent.name}/{p.name}:{p.stat().st_size}" for p in paths)
    digest = hashlib.sha256(files.encode()).hexdigest()[:16]
    counts = {"images": len(category.train), "test_images": len(category.test)}
    return {**asdict(recipe), "seed": seed, "weights": weights_digest, **counts, "files": digest}


def continued(path, mine):
    """The checkpoint of an interrupted run. Raises InputError naming what differs from this one."""
    state = evaluate.load_checkpoint(path)
    had = {"weights": mine["weights"], **(state.get("signature") or {})}  # once not named
    differ = [f"{k} {had.get(k)} there, {mine[k]} here" for k in mine if had.get(k) != mine[k]]
    if differ:
        raise InputError(
            f"{path}: of another run ({'; '.join(differ)}): "
            "give its settings, another --out, or no --resume"
        )
    return state


class Progress:
    """One line that updates on a terminal; a plain line every ten seconds otherwise.

    The seconds left are counted from the first call of each stage.
    """

    def __init__(self, prefix):
        self.prefix, self.stage, self.shown = prefix, None, 0.0

    def of(self, what, items):
        """A function of the number of items that are done."""
        n = len(items)
        return lambda done: self(f"{what} {done}/{n}", done, n)

    def __call__(self, text, done, total):
        now, last = time.monotonic(), done == total
        if self.stage is None or total != self.stage[0] or done <= self.stage[1]:
            self.stage = total, done, now
        _, first, start = self.stage
        left = ""
        if first < done < total:
            left = f", {(now - start) / (done - first) * (total - done):.0f} s left"
        if sys.stderr.isatty():
            end = "\n" if last else ""
            print(f"\r\x1b[K{self.prefix}: {text}{left}", end=end, file=sys.stderr, flush=True)
        elif last or now - self.shown > 10:
            print(f"{self.prefix}: {text}{left}", file=sys.stderr, flush=True)
            self.shown = now


# ---- 2. A data set, a seed -----------------------------------------------------------------------
def rank_and_world():
    """The number of this process and how many there are, as torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def run(args, recipe, seed, out, data, device):
    """All categories of a data set for one seed; rank 0 writes the table. Its rows, on rank 0."""
    rank, world = rank_and_world()
    name, categories = evaluate.read_dataset(data, args.category)
    folder = out / name
    for category in categories:
        place = folder / category.name
        if category.train[0].parent.resolve().is_relative_to(place.resolve()):
            raise InputError(f"--out {out}: {place} holds the data set: give another --out")
    with locked(folder) if rank == 0 else contextlib.nullcontext():
        for k, category in enumerate(categories):
            if k % world == rank:
                prefix = f"[{k + 1} of {len(categories)}] {category.name}"
                place = folder / category.name
                run_category(category, recipe, seed, place, args, device, prefix)
        if world > 1:
            torch.distributed.barrier()
        if rank > 0:
            return None
        models = [folder / category.name / "model.pt" for category in categories]
        rows = [evaluate.load_checkpoint(model)["row"] for model in models]
        evaluate.write_tables(folder, rows)
        evaluate.draw_contact_sheet(folder, [category.name for category in categories])
        print(f"models, maps and tables: {folder}")
        return rows


@contextlib.contextmanager
def locked(folder):
    """Hold `folder`/.lock; a second run into the folder is refused with the first's process id."""
    try:
        import fcntl
    except ImportError:  # not on this platform: two runs are told apart by the user
        folder.mkdir(parents=True, exist_ok=True)
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")
    except OSError as e:
        raise InputError(
            f"{folder}: cannot be written ({e.strerror}): give another --out"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise InputError(
                f"{folder}: process {lock.read().strip()} is writing here: "
                "wait for it, or give another --out"
            ) from None
        except OSError as e:  # a file system that has no locks
            raise InputError(
                f"{folder}: cannot be locked ({e.strerror}): give another --out"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield  # the file stays: another process may have opened it, and not locked it yet


def fit(images, seed=0, weights=None, device="auto", **settings):
    """A detector fitted to good images from Python, for evaluate.score and evaluate.save_model.

    images: a list of what evaluate.as_image takes; weights: a file of the backbone's, if it is not
    in a package; device: as --device; settings: of wtflow.Recipe. Raises InputError.

        detector = train.fit(images, steps=200)
        evaluate.save_model("model.pt", detector)
    """
    if not isinstance(images, (list, tuple)):
        raise InputError(f"images of type {type(images).__name__}: give a list of at least one")
    if not images:
        raise InputError("no images: give at least one")
    recipe = changed(wtflow.Recipe(), settings)
    files = [Path(image) for image in images if isinstance(image, (str, os.PathLike))]
    white = evaluate.grey_level(files)
    images = [evaluate.as_image(image, white) for image in images]
    recipe = wtflow.recipe_for(recipe, [image.size[::-1] for image in images])
    detector = wtflow.Detector(recipe, weights).to(evaluate.pick_device(device))
    detector.white = white
    features, _ = evaluate.extract(detector, images)
    detector.fit_whitening(features)
    x_0 = detector.normalise(features, out=features)
    wtflow.train_fields(detector, x_0, seed)
    detector.calibrate(x_0)
    return detector


def changed(recipe, settings):
    """A recipe with other settings, {name: value}. Raises InputError, "setting=value: remedy"."""
    for name, value in settings.items():
        if name not in asdict(recipe):
            known = ", ".join(asdict(recipe))
            raise InputError(f"{name}={value}: no such setting: choose from {known}")
        default = getattr(recipe, name)
        whole_number = isinstance(default, float) and type(value) is int
        if type(value) is not type(default) and not whole_number:
            raise InputError(f"{name}={value}: give a value like {default!r}")
    return replace(recipe, **settings)


# ---- 3. The demo: two categories in the layout of MVTec AD ---------------------------------------
def weave(rng, n):
    """An oriented texture: two crossing thread systems with random phase, spacing and grain."""
    y, x = np.mgrid[:n, :n] / n
    turn = rng.normal(0.35, 0.02)
    u = x * np.cos(turn) + y * np.sin(turn)
    v = y * np.cos(turn) - x * np.sin(turn)
    bend_u = 0.004 * np.sin(9 * v + rng.uniform(0, 6))
    bend_v = 0.004 * np.sin(7 * u + rng.uniform(0, 6))
    u, v = u + bend_u, v + bend_v
    warp = 0.2 * np.sin(2 * np.pi * 22 * u + rng.uniform(0, 6))
    weft = 0.12 * np.sin(2 * np.pi * 13 * v + rng.uniform(0, 6))
    grey = 0.5 + warp + weft + 0.04 * rng.standard_normal((n, n))
    return grey[..., None] * np.array([0.9, 0.8, 0.65])


def washer(rng, n):
    """An object: a ring with five teeth at a random angle and place, lit from one side."""
    y, x = (np.mgrid[:n, :n] / n - 0.5) * 2
    x, y = x - rng.uniform(-0.1, 0.1), y - rng.uniform(-0.1, 0.1)
    turn = rng.uniform(0, 6.3)
    r, phi = np.hypot(x, y), np.arctan2(y, x)
    edge = 0.66 + 0.06 * np.tanh(6 * np.cos(5 * (phi - turn)))
    inside = 1 / (1 + np.exp(-90 * (edge - r))) / (1 + np.exp(-90 * (r - 0.28)))
    background = 0.18 + 0.04 * rng.standard_normal((n, n))
    metal = 0.62 + 0.1 * np.cos(phi - 0.7) + 0.03 * np.sin(60 * r)
    metal = metal + 0.025 * rng.standard_normal((n, n))
    grey = background * (1 - inside) + metal * inside
    return grey[..., None] * np.array([0.85, 0.9, 1.0])


def damage(rng, image, kind):
    """(image with a defect, its mask).

    scratch: a thin dull line; stain: a faint soft spot; patch: a piece turned by 90 degrees.
    """
    n = len(image)
    y, x = np.mgrid[:n, :n]
    r, phi = rng.uniform(0.2, 0.3) * n, rng.uniform(0, 6.3)  # a place on the washer's ring as well
    cy, cx = n / 2 + r * np.sin(phi), n / 2 + r * np.cos(phi)
    turn = rng.uniform(0, 3.2)
    along = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
    across = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
    if kind == "scratch":
        line = abs(across + 4 * np.sin(along / 9)) < 1.6
        mask = line & (abs(along) < rng.uniform(14, 26))
        return np.where(mask[..., None], image * 0.65 + 0.05, image), mask
    if kind == "stain":
        distance = np.hypot(along / rng.uniform(1, 1.8), across) / rng.uniform(7, 12)
        dark = 0.3 * np.exp(-(distance**4))[..., None] * np.array([0.4, 0.8, 1.0])
        return image * (1 - dark), distance < 1
    half, cy, cx = int(rng.integers(9, 15)), int(cy), int(cx)
    piece = np.s_[cy - half : cy + half, cx - half : cx + half]
    out, mask = image.copy(), np.zeros((n, n), bool)
    out[piece] = np.rot90(image[piece])
    mask[piece] = True
    return out, mask


def save_grey_levels(path, values):
    """Write a PNG, unless it is there already, the same: another run may be reading it."""
    file = io.BytesIO()
    Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8)).save(file, format="PNG")
    if not path.is_file() or path.read_bytes() != file.getvalue():
        evaluate.write_whole(path, lambda to: to.write_bytes(file.getvalue()))


def make_demo(root, train=48, good=16, each=8, n=256):
    """Write the demo data set under `root`, the same at every call; returns root."""
    for seed, draw in enumerate((weave, washer)):
        rng, folder = np.random.default_rng(seed), root / draw.__name__
        for k in range(train + good):
            part = "train" if k < train else "test"
            save_grey_levels(folder / part / f"good/{k:03d}.png", draw(rng, n))
        for kind in ("scratch", "stain", "patch"):
            for k in range(each):
                image, mask = damage(rng, draw(rng, n), kind)
                truth = folder / f"ground_truth/{kind}/{k:03d}_mask.png"
                save_grey_levels(folder / f"test/{kind}/{k:03d}.png", image)
                save_grey_levels(truth, mask.astype(float))
    return root


# ---- 4. The command ------------------------------------------------------------------------------
def parse(argv):
    parser = evaluate.OneLineParser(description=__doc__.split("\n")[0])
    evaluate.add_common_options(parser)
    add = parser.add_argument
    add("--out", default="runs", help="where results go (default: runs)")
    default = wtflow.Recipe()
    add("--paper", action="store_true", help="the released recipe, wtflow.PAPER (default: ours)")
    names = ", ".join(wtflow.CHOICES["backbone"])
    add("--backbone", metavar="NAME", help=f"{names} (default: {default.backbone})")
    add(
        "--image-size",
        type=int,
        metavar="N",
        help="an image gets at most N x N pixels, at its aspect "
        f"(default: {default.image_size}, enlarged {wtflow.ENLARGED} times at most)",
    )
    add(
        "--steps",
        type=int,
        metavar="N",
        help=f"training steps of each field (default: {default.steps}, the demo {DEMO_STEPS})",
    )
    names = ", ".join(wtflow.CHOICES["coupling"])
    add("--coupling", metavar="NAME", help=f"{names} (default: {default.coupling})")
    add(
        "--strength",
        type=float,
        metavar="R",
        help=f"of worst transport, 0 (rFM) to 1 (default: {default.strength})",
    )
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="any other setting of wtflow.Recipe (default: its own)",
    )
    add("--seed", type=int, metavar="N", help="of weights and noise (default: 0)")
    add(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="several: mean and spread, each run in OUT/seedN (default: one)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on from the last whole state in --out (default: anew)",
    )
    args = parser.parse_args(argv)
    evaluate.check_options(args)
    if args.seeds and len({*args.seeds}) < len(args.seeds):
        raise InputError(f"--seeds {' '.join(map(str, args.seeds))}: give each once")
    if args.seeds and args.seed is not None:
        raise InputError("--seed and --seeds: give one of them")
    args.seed = args.seed or 0
    for seed in (*(args.seeds or ()), args.seed):
        if not 0 <= seed < 2**32:
            raise InputError(f"seed {seed}: give a whole number from 0 to 2^32 - 1")
    return args


def recipe_of(args):
    """wtflow.Recipe() or PAPER with what the command line changes. Raises InputError."""
    recipe = wtflow.PAPER if args.paper else wtflow.Recipe()
    if not args.paper and not args.data:
        recipe = replace(recipe, steps=DEMO_STEPS)
    changes = {name: getattr(args, name) for name in OWN_OPTIONS}
    changes = {name: value for name, value in changes.items() if value is not None}
    for text in args.set:
        name, _, value = text.partition("=")
        changes[name] = value
        default = getattr(recipe, name) if name in asdict(recipe) else ""
        if not isinstance(default, str):
            try:
                literal = ast.literal_eval(value)
                changes[name] = type(default)(literal)
                if changes[name] != literal:  # 2.5 images, 7 for true
                    raise ValueError
            except (ValueError, TypeError, SyntaxError, OverflowError):
                raise InputError(f"--set {text}: give a value like {default!r}") from None
    try:
        return changed(recipe, changes)
    except InputError as e:  # "setting=value: remedy"
        setting, _, remedy = str(e).partition(": ")
        name, _, value = setting.partition("=")
        option = f"--set {setting}"
        if name in OWN_OPTIONS:
            option = f"--{name.replace('_', '-')} {value}"
        raise InputError(f"{option}: {remedy}") from None


def main(argv=None):
    args = parse(argv)
    recipe, device = recipe_of(args), evaluate.pick_device(args.device)
    # The network first: what is missing is said before all else.
    args.weights_digest = wtflow.load_extractor(recipe.backbone, args.weights).digest
    out = Path(args.out)
    rank, world = rank_and_world()
    data = args.data or out / "demo-data/demo"
    if not args.data and rank == 0:
        make_demo(data)
    if world > 1:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        torch.distributed.barrier()
    if not args.seeds:
        run(args, recipe, args.seed, out, data, device)
        return
    runs = [run(args, recipe, seed, out / f"seed{seed}", data, device) for seed in args.seeds]
    if runs[0]:
        name, _ = evaluate.read_dataset(data, args.category)
        evaluate.write_spread(out / name, args.seeds, runs)


if __name__ == "__main__":
    evaluate.exit_cleanly(main)
