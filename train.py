"""Train WT-Flow on a data set of good images, evaluate it, write models, tables and pictures.

python train.py                              a small demo, made here, trained and evaluated
python train.py --data path/to/mvtec         every category of a data set, or one's folder
torchrun --nproc-per-node N train.py ...     the categories shared out among N processes
"""

import contextlib
import datetime
import hashlib
import math
import os
import signal
import sys
import time
import zlib
from argparse import Namespace
from dataclasses import asdict
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # before torch loads; the reasons are in evaluate.py
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import evaluate
import wtflow
from wtflow import Detector, InputError, Recipe

STEPS_PER_IMAGE = 4  # [ours] of the field of one position
MOST_STEPS = 800  # [ours] of it
EPOCHS = 100  # [released] of the U-Net
WARM_UP = 0.1  # [ours] share of the steps in which the learning rate rises
CROSS_FIT_BELOW = 100  # images; of 100, a false positive rate of 1 % is one image
REPORT_STEPS = 20
SAVE_SECONDS = 20  # a killed run loses at most this much training


# ---- 1. Fitting a detector to the features of good images ----------------------------------------
def train_field(
    detector: Detector, features: Tensor, seed: int = 0, report=None, save=None, state=None
) -> None:
    """Fit detector.field to the velocity of good features (n, d, h, w); the last step is the model.

    Call it after fit_whitening. report(steps, step, text) is called every REPORT_STEPS, and
    save(training=state) about every SAVE_SECONDS and at the end: with such a state the training
    goes on, the same to the last bit. Raises InputError if the loss is not finite.
    """
    state = state or {}
    recipe, device, steps = detector.recipe, detector.device, count_steps(detector.recipe, features)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.default_generator.manual_seed(seed)
        v_theta = wtflow.new_field(recipe, features.shape[1]).to(device).train()
    optimizer = torch.optim.AdamW(v_theta.parameters(), recipe.lr, fused=True)  # weight decay 0.01
    generator = torch.Generator(device).manual_seed(seed)
    couple, first, saved = wtflow.coupling_of(recipe), 0, time.monotonic()
    if begun := state.get("field"):
        first = begun["step"]
        v_theta.load_state_dict(begun["field"])
        optimizer.load_state_dict(begun["optimizer"])
        generator.set_state(begun["generator"])

    for step in range(first + 1, steps + 1):
        # A batch of x_0, its noise x_1 and the error of the velocity between them
        x_0 = detector.normalise(draw(features, recipe, generator))
        with wtflow.autocast(device):
            loss = wtflow.flow_matching_loss(v_theta, x_0, couple, generator).mean()

        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * warm_up_cosine((step - 1) / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        if step % REPORT_STEPS == 0 or step == steps:
            if not torch.isfinite(loss):
                raise InputError(f"loss is not finite at step {step}: lower the rate, --lr")
            if report:
                report(steps, step, f", loss {loss.item():.4f}")
        if save and (step == steps or time.monotonic() - saved > SAVE_SECONDS):
            now = {"step": step, "field": v_theta.state_dict(), "generator": generator.get_state()}
            state["field"] = now | {"optimizer": optimizer.state_dict()}
            save(training=state)
            saved = time.monotonic()
    detector.field = wtflow.freeze(v_theta)


def draw(features: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """A random batch of features (n, d, h, w): positions (batch, d), or maps (batch, d, h, w)."""
    size, how = (recipe.batch,), {"generator": generator, "device": features.device}
    image = torch.randint(len(features), size, **how)
    if recipe.field == "unet":
        return features[image]
    position = torch.randint(features[0, 0].numel(), size, **how)
    return features.movedim(1, -1).flatten(1, 2)[image, position]


def count_steps(recipe: Recipe, features: Tensor) -> int:
    """The recipe's steps; else about two passes over at most 200 images, EPOCHS of the U-Net."""
    if recipe.steps:
        return recipe.steps
    if recipe.field == "unet":
        return EPOCHS * math.ceil(len(features) / recipe.batch)
    return min(MOST_STEPS, STEPS_PER_IMAGE * len(features))


def warm_up_cosine(done: float) -> float:
    """Share of the peak learning rate at a share of the steps: 0 at first, linear rise, cosine."""
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def fit_gaussians(detector: Detector, features: Tensor) -> tuple[Tensor, Tensor]:
    """Fit detector.gaussian to good features (n, d, h, w); their leave-one-out maps and scores."""
    if detector.recipe.score == "gaussian":
        r = torch.empty_like(features, device=detector.device)

        def fill(part):  # float16, up to its largest number: half the memory
            r[part] = detector.residual(features[part]).clamp(-65504, 65504).half()

        parts = torch.arange(len(features)).split(wtflow.SCORED)
        wtflow.parallel_map(fill, parts, detector.device)
        detector.gaussian.fit(r)
        if len(r) > 1:
            return wtflow.map_and_score(detector.gaussian.leave_one_out(r))
    return detector.score(features)  # in-sample, so too low: of one image, or without Gaussians


def fit_detector(
    detector: Detector, features: Tensor, seed: int = 0, report=None, save=None, state=None
) -> tuple[Tensor, Tensor]:
    """Fit whitening, field and Gaussians to good features (n, d, h, w); their maps and scores.

    These scores of good images, detector.normal_scores (n,), set the threshold, so no image may be
    scored by what has seen it. With CROSS_FIT_BELOW images or more only the Gaussians overfit, and
    leave_one_out corrects that. With fewer the field does as well: then each fold is scored by what
    is fitted to the others (cross-conformal prediction, Vovk 2015); the detector that is kept is
    fitted to all. Without Gaussians and folds, as in PAPER, scores are in-sample, and too low.
    report(what, steps, step, text), save, state: of train_field; state changes.
    """
    n, recipe = len(features), detector.recipe
    folds = min(recipe.folds, n) if 1 < n < CROSS_FIT_BELOW else 0
    fold = torch.arange(n) % max(folds, 1)
    state = state or {"held_out": [], "field": None}  # (maps, scores) of the folds; of the field
    held_out = state["held_out"]
    for k in range(len(held_out), folds + 1):  # the last is of all images
        others = features if k == folds else features[fold != k]
        report_k = report and partial(report, f"field {k + 1}/{folds + 1}, step")
        detector.fit_whitening(others)
        train_field(detector, others, seed, report_k, save, state)
        found = fit_gaussians(detector, others)
        if k < folds:
            held_out.append(detector.score(features[fold == k]))
            state["field"] = None
    if folds:
        place = fold.argsort(stable=True).argsort()
        found = [torch.cat(part)[place] for part in zip(*held_out, strict=True)]
    maps, scores = found
    detector.normal_scores = scores.to(detector.device)
    return maps.cpu(), scores.cpu()


def fit(
    images: list, seed: int = 0, weights: str | None = None, device: str = "auto", **settings
) -> Detector:
    """A detector fitted to good images from Python, for evaluate.score and evaluate.save_model.

    images: a list of what evaluate.as_image takes; weights, device: as the options of train.py;
    settings: of wtflow.Recipe. detector.normal_scores are of the images, in order, without copies.
    """
    if not isinstance(images, (list, tuple)) or not images:
        raise InputError("images: give a list of paths or arrays, with at least one in it")
    detector = evaluate.new_detector(images, Recipe(**settings), weights, device)
    fit_detector(detector, evaluate.extract_good(detector, images)[0], seed)
    return detector


# ---- 2. One category, from images to a model for each seed ---------------------------------------
def run_category(category: evaluate.Category, folders: dict, args: Namespace, prefix: str) -> None:
    """Train, evaluate and save one category in {seed: folder}; with --resume go on."""
    began, shown, settings = time.monotonic(), 0.0, settings_of(category, args)
    own = {seed: settings | {"seed": seed} for seed in folders}
    had = {seed: what_is_there(folders[seed], own[seed], args.resume) for seed in folders}
    todo = [seed for seed in folders if "row" not in had[seed]]
    if not todo:
        return evaluate.say(f"{prefix}: is finished", sys.stderr)

    def progress(what, total, done, text=""):
        nonlocal shown
        if done == total or time.monotonic() - shown > 10:
            evaluate.say(f"{prefix}: {what} {done}/{total}{text}", sys.stderr)
            shown = time.monotonic()

    # Features, once for all seeds. What is tested comes first: a broken file stops the run at once.
    good, tested = category.train, [item.path for item in category.test]
    detector = evaluate.new_detector(good, args.recipe, args.weights, args.device, args.ignored)
    evaluate.say(f"{prefix}: {resolution(detector.recipe, good)}", sys.stderr)
    test = evaluate.extract(detector, tested, partial(progress, "test image", len(tested)))
    for item, size in zip(category.test, test[1], strict=True):
        for mask in item.masks or ():
            evaluate.read_mask(mask, size)
    report = partial(progress, "training image", len(good))
    features, first = evaluate.extract_good(detector, good, report)
    spent = time.monotonic() - began

    for seed in todo:
        began, folder = time.monotonic() - spent, folders[seed]
        save = partial(evaluate.save_checkpoint, folder / evaluate.STATE, args.recipe, **own[seed])
        scored = fit_detector(detector, features, seed, progress, save, had[seed].get("training"))
        known = evaluate.calibration_of(detector, args.fpr, args.threshold)
        white = detector.reading.white_level
        evaluate.write_suspects(folder, category, first, scored, known, white)
        evaluate.save_model(folder / "model.pt", detector)
        evaluate.remove_results(evaluate.maps_folder(folder).rglob("*.tiff"))  # of another model
        row = evaluate.report(folder, category, detector, test, args, began)
        left_out = [path.name for path in category.left_out]
        done = own[seed] | {"row": row, "left_out": left_out}
        evaluate.write_json(folder / evaluate.FINISHED, done)
        evaluate.remove_results([folder / evaluate.STATE])


def what_is_there(folder: Path, settings: dict, resume: bool) -> dict:
    """What there is of a category and a seed: with resume its "training" or its "row"; else {}.

    Raises InputError for files not from here; with resume for other settings; without it for a
    finished run on images in another folder.
    """
    evaluate.refuse_foreign_results(folder)
    state, file, had = folder / evaluate.STATE, folder / evaluate.FINISHED, settings
    if resume and state.exists():
        file, had = state, evaluate.load_checkpoint(state)
    elif file.exists():
        had = evaluate.read_json(file)
    compared = [name for name in settings if name != "source"] if resume else ["source"]
    if differ := [name for name in compared if had.get(name) != settings[name]]:
        both = "; ".join(f"{name} {had.get(name)} there, {settings[name]} here" for name in differ)
        text = f"of another run ({both if resume else 'images in another folder'})"
        raise InputError(f"{file}: {text}: give its settings, another --out, or remove it")
    if resume:
        return had
    if state.exists():
        evaluate.say_once(f"{state}: this training is given up, as there is no --resume")
        evaluate.remove_results([state, file])  # the model may be newer than its json
    return {}


def settings_of(category: evaluate.Category, args: Namespace) -> dict:
    """What two runs must share for one to go on where the other was, as JSON has it."""
    source = os.path.realpath(os.path.commonpath([path.parent for path in category.train]))
    return asdict(args.recipe) | {
        "strides": [*args.recipe.strides],
        "weights": args.weights_digest,
        "ignored_pixels": 0 if args.ignored is None else zlib.crc32(args.ignored.tobytes()),
        "images": len(category.train),
        "files": evaluate.digest_of_files(category.train),
        "test": evaluate.digest_of_files(category.test),
        "source": hashlib.sha256(os.fsencode(source)).hexdigest()[:16],  # which tells no path
        "fpr": args.fpr,
        "threshold": args.threshold,
        "device": args.device.type,  # generators of two devices differ
    }


def resolution(recipe: Recipe, images: list[Path]) -> str:
    """One line: what the network sees of the median image, and how large a defect must be."""
    h, w = sorted(evaluate.image_sizes(images), key=math.prod)[len(images) // 2]
    height, width = wtflow.image_shape(recipe)
    shrunk = math.sqrt(h * w / (height * width))
    side = round(recipe.spacing * shrunk)
    larger = ": for smaller ones give a larger --image-size" if shrunk > 2.5 else ""
    text = f"images of {w} x {h} are read at {width} x {height}; a position of the map covers"
    return f"{text} {side} x {side} of their pixels, and a defect needs about as much{larger}"


# ---- 3. A data set, all seeds --------------------------------------------------------------------
def run(args: Namespace, data: Path) -> None:
    """All categories of a data set; the process of rank 0 writes the tables."""
    name, categories = evaluate.read_dataset(data, args.category)
    categories = evaluate.leave_out(categories, args.leave_out)
    several, out = len(args.seeds) > 1, evaluate.inside(Path(args.out), name)
    own = {seed: out.parent / f"seed{seed}" / name if several else out for seed in args.seeds}
    with contextlib.ExitStack() as locks:
        for folder in {out, *own.values()} if args.rank == 0 else ():
            locks.enter_context(evaluate.locked(folder))
            evaluate.refuse_foreign_results(folder)
        if args.world > 1:
            torch.distributed.barrier()  # until rank 0 has the locks
        for k, category in enumerate(categories):
            folders = {seed: evaluate.inside(own[seed], category.name) for seed in own}
            good = Path(os.path.realpath(category.train[0].parent))
            if any(good.is_relative_to(os.path.realpath(f)) for f in folders.values()):
                raise InputError(f"--out {args.out}: holds the data set: give another --out")
            if k % args.world == args.rank:
                prefix = f"[{k + 1} of {len(categories)}] {category.name}"
                run_category(category, folders, args, prefix)
        if args.world > 1:
            torch.distributed.barrier()
        if args.rank > 0:
            return
        runs = []
        for folder in own.values():
            files = [folder / category.name / evaluate.FINISHED for category in categories]
            runs.append([evaluate.read_json(file)["row"] for file in files])
            evaluate.write_tables(folder, runs[-1])
            evaluate.say(f"models, maps and tables: {folder}")
        if several:
            evaluate.write_spread(out, args.seeds, runs)


# ---- 4. The demo: two categories in the layout of MVTec AD ---------------------------------------
def weave(rng, n):
    """A texture: two crossing thread systems with random phase, angle and grain."""
    y, x = np.mgrid[:n, :n] / n
    turn = rng.normal(0.35, 0.02)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    warp = 0.2 * np.sin(138 * u + 0.5 * np.sin(9 * v) + rng.uniform(0, 6))
    weft = 0.12 * np.sin(82 * v + 0.5 * np.sin(7 * u) + rng.uniform(0, 6))
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
    grey = background * (1 - inside) + (metal + 0.025 * rng.standard_normal((n, n))) * inside
    return grey[..., None] * np.array([0.85, 0.9, 1.0])


def damage(rng, image, kind):
    """(image with a defect, its mask). scratch: a thin dull line; stain: a faint soft spot."""
    n = len(image)
    y, x = np.mgrid[:n, :n]
    r, phi, turn = rng.uniform(0.2, 0.3) * n, rng.uniform(0, 6.3), rng.uniform(0, 3.2)
    cy, cx = n / 2 + r * np.sin(phi), n / 2 + r * np.cos(phi)  # on the washer's ring as well
    along = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
    across = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
    if kind == "scratch":
        line = abs(across + 4 * np.sin(along / 9)) < 1.6
        mask = line & (abs(along) < rng.uniform(14, 26))
        return np.where(mask[..., None], image * 0.65 + 0.05, image), mask
    distance = np.hypot(along / rng.uniform(1, 1.8), across) / rng.uniform(7, 12)
    dark = 0.3 * np.exp(-(distance**4))[..., None] * np.array([0.4, 0.8, 1.0])
    return image * (1 - dark), distance < 1


def make_demo(root: Path, train: int = 48, good: int = 16, each: int = 12, n: int = 256) -> Path:
    """Write the demo under `root`, the same at each call; what has its mark is written over."""
    name, mark = "WT-Flow demo", PngInfo()
    mark.add_text("Software", name)

    def save(path, values):
        image = Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))
        evaluate.write_whole(path, partial(image.save, format="PNG", pnginfo=mark), name)

    for seed, draw_part in enumerate((weave, washer)):
        rng, folder = np.random.default_rng(seed), root / draw_part.__name__
        for k in range(train + good):
            where = f"{'train' if k < train else 'test'}/good/{k:03d}.png"
            save(folder / where, draw_part(rng, n))
        for kind in ("scratch", "stain"):
            for k in range(each):
                image, mask = damage(rng, draw_part(rng, n), kind)
                save(folder / f"test/{kind}/{k:03d}.png", image)
                save(folder / f"ground_truth/{kind}/{k:03d}_mask.png", mask.astype(float))
    return root


# ---- 5. The command ------------------------------------------------------------------------------
def parse(argv: list[str] | None) -> Namespace:
    """Options; args.recipe is Recipe() or PAPER with the settings among them. Raises InputError."""
    parser = evaluate.OneLineParser(description=__doc__.split("\n")[0])
    evaluate.add_common_options(parser)
    add, names = parser.add_argument, asdict(Recipe())
    add("--out", default="runs", help="where results go (default: runs)")
    add("--paper", action="store_true", help="the released recipe, wtflow.PAPER (default: ours)")
    for name, default in names.items():
        text = f"of wtflow.Recipe (default: {default})"
        add(f"--{name.replace('_', '-')}", type=evaluate.literal, metavar="VALUE", help=text)
    text = "of weights and noise; of several, mean and spread (default: 0)"
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help=text)
    add("--leave-out", metavar="FILE", help="a train-scores.csv: what it marks is left out")
    add("--ignore", metavar="FILE", help="mask of the images' size: its white is painted over")
    add("--resume", action="store_true", help="go on from the last whole state in --out")
    args = parser.parse_args(argv)
    evaluate.check_options(args)
    if len({*args.seeds}) < len(args.seeds) or not all(0 <= n < 2**32 for n in args.seeds):
        seeds = " ".join(map(str, args.seeds))
        raise InputError(f"--seeds {seeds}: give whole numbers from 0 to 2^32 - 1, each once")
    settings = dict(wtflow.PAPER) if args.paper else {}
    settings |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    try:
        args.recipe = Recipe(**settings)
    except InputError as e:  # "setting=value: remedy"
        name, _, rest = str(e).partition("=")
        raise InputError(f"--{name.replace('_', '-')}={rest}") from None
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.device = evaluate.pick_device(args.device)
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise InputError(f"RANK={rank}, WORLD_SIZE={world}: not those of torchrun: unset them")
    args.rank, args.world = int(rank), int(world)
    # First, so that a missing file stops the run at once
    args.weights_digest = wtflow.load_extractor(args.recipe.backbone, args.weights).digest
    args.ignored = evaluate.read_ignored(args.ignore)
    data = args.data or Path(args.out) / "demo-data/demo"
    if not args.data and args.rank == 0:
        make_demo(data)
    if args.world > 1:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        torch.distributed.barrier()
    run(args, data)


if __name__ == "__main__":
    evaluate.exit_cleanly(main)
