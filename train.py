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
from dataclasses import asdict, replace
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
from evaluate import Category
from wtflow import Detector, InputError, Recipe

WEIGHT_DECAY = 0.01  # [ours] of AdamW
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

    Call it after fit_whitening. report(step, steps, loss) is called every REPORT_STEPS, save(state)
    about every SAVE_SECONDS and at the end; from such a state the training goes on, the same to the
    last bit. Raises InputError if the loss is not finite.
    """
    recipe, device = detector.recipe, detector.device
    steps = count_steps(recipe, features)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.default_generator.manual_seed(seed)
        v_theta = wtflow.new_field(recipe, features.shape[1]).to(device).train()
    optimizer = torch.optim.AdamW(
        v_theta.parameters(), recipe.lr, weight_decay=WEIGHT_DECAY, fused=True
    )
    generator = torch.Generator(device).manual_seed(seed)
    couple, first, saved = wtflow.coupling_of(recipe), 0, time.monotonic()
    if state is not None:
        first = state["step"]
        v_theta.load_state_dict(state["field"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])

    for step in range(first + 1, steps + 1):
        # A batch of x_0, its noise x_1 and the error of the velocity between them
        x_0 = detector.normalise(draw(features, recipe, generator))
        with wtflow.autocast(device):
            loss = wtflow.flow_matching_loss(v_theta, x_0, couple, generator).mean()

        # One step of AdamW
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * warm_up_cosine((step - 1) / steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

        # Report and save
        last = step == steps
        if last or step % REPORT_STEPS == 0:
            if not torch.isfinite(loss):
                raise InputError(
                    f"loss is not finite at step {step}: "
                    "lower the learning rate, or look for damaged training images"
                )
            if report is not None:
                report(step, steps, loss.item())
        if save is not None and (last or time.monotonic() - saved > SAVE_SECONDS):
            state = {"step": step, "field": v_theta.state_dict()}
            state |= {"optimizer": optimizer.state_dict(), "generator": generator.get_state()}
            save(state)
            saved = time.monotonic()
    detector.field = wtflow.freeze(v_theta)


def draw(features: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """A random batch of features (n, d, h, w): positions (batch, d), or maps (batch, d, h, w)."""

    def below(limit):
        return torch.randint(limit, (recipe.batch,), generator=generator, device=features.device)

    image = below(len(features))
    if recipe.field == "unet":
        return features[image]
    return features.movedim(1, -1).flatten(1, 2)[image, below(features[0, 0].numel())]


def count_steps(recipe: Recipe, features: Tensor) -> int:
    """Training steps for features of n images: those of the recipe, if it gives a number.

    By default STEPS_PER_IMAGE n, at most MOST_STEPS: about two passes over the positions, fewer of
    more than 200 images. The released U-Net makes EPOCHS passes over the maps.
    """
    n = len(features)
    if recipe.steps:
        return recipe.steps
    if recipe.field == "unet":
        return EPOCHS * -(-n // recipe.batch)
    return min(MOST_STEPS, STEPS_PER_IMAGE * n)


def warm_up_cosine(done: float) -> float:
    """Share of the peak learning rate at a share of the steps: 0 at first, linear rise, cosine."""
    if done < WARM_UP:
        return done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def fit_gaussians(detector: Detector, features: Tensor) -> tuple[Tensor, Tensor]:
    """Fit detector.gaussian to good features (n, d, h, w); their leave-one-out maps and scores.

    Of a single image, and under a recipe without Gaussians, they are in-sample, so too low.
    """
    if detector.recipe.score == "gaussian":
        r = torch.empty_like(features, device=detector.device)  # float16: half the memory
        largest = torch.finfo(r.dtype).max

        def fill(part):
            r[part] = detector.residual(features[part]).clamp(-largest, largest).half()

        parts = torch.arange(len(features)).split(wtflow.SCORED)
        wtflow.parallel_map(fill, parts, detector.device)
        detector.gaussian.fit(r)
        if len(r) > 1:
            return wtflow.map_and_score(detector.gaussian.leave_one_out(r))
    return detector.score(features)


def fit_detector(
    detector: Detector, features: Tensor, seed: int = 0, report=None, save=None, state=None
) -> tuple[Tensor, Tensor]:
    """Fit whitening, field and Gaussians to good features (n, d, h, w); their maps and scores.

    These scores of good images, detector.normal_scores (n,), set the threshold, so no image may be
    scored by what has seen it. With CROSS_FIT_BELOW images or more only the Gaussians overfit, and
    leave_one_out corrects that. With fewer the field overfits as well: for each fold all is fitted
    to the other images (cross-conformal prediction, Vovk 2015). The detector that is kept is fitted
    to all images. Without Gaussians and folds, as in PAPER, the scores are in-sample and the
    threshold is too low.

    report(k, fits, step, steps, loss) and save(k, held_out, field) for fit k of several; state has
    such k, held_out and field, by name.
    """
    n = len(features)
    folds = min(detector.recipe.folds, n) if 1 < n < CROSS_FIT_BELOW else 0
    fold = torch.arange(n) % max(folds, 1)
    begun = state or {"k": 0, "held_out": [], "field": None}
    held_out = list(begun["held_out"])  # (maps, scores) of each fold
    for k in range(begun["k"], folds + 1):
        others = features if k == folds else features[fold != k]
        detector.fit_whitening(others)
        field = begun["field"] if k == begun["k"] else None
        report_k = report and partial(report, k, folds + 1)
        train_field(detector, others, seed, report_k, save and partial(save, k, held_out), field)
        found = fit_gaussians(detector, others)
        if k < folds:
            held_out.append(detector.score(features[fold == k]))
    if folds:
        place = fold.argsort(stable=True).argsort()
        found = tuple(torch.cat(part)[place] for part in zip(*held_out, strict=True))
    maps, scores = found
    detector.normal_scores = scores.to(detector.device)
    return maps.cpu(), scores.cpu()


def fit(
    images: list, seed: int = 0, weights: str | None = None, device: str = "auto", **settings
) -> Detector:
    """A detector fitted to good images from Python, for evaluate.score and evaluate.save_model.

    images: a list of what evaluate.as_image takes; weights: a file of the backbone's, if it is not
    in a package; device: as --device; settings: of wtflow.Recipe. detector.normal_scores (n,) are
    held-out scores of the images, in order, without copies. Raises InputError.

        detector = train.fit(images, steps=200)
        evaluate.save_model("model.pt", detector)
    """
    if not isinstance(images, (list, tuple)):
        raise InputError(f"images of type {type(images).__name__}: give a list of paths or arrays")
    if not images:
        raise InputError("no images: give at least one")
    detector = evaluate.new_detector(images, Recipe(**settings), weights, device)
    names = [f"images[{k}]" for k in range(len(images))]
    fit_detector(detector, evaluate.extract_good(detector, images, names)[0], seed)
    return detector


# ---- 2. One category, from images to a model for each seed ---------------------------------------
def run_category(
    category: Category, recipe: Recipe, folders: dict[int, Path], args: Namespace, prefix: str
) -> None:
    """Train, evaluate and save one category in the folder of each seed; with --resume go on."""
    began, progress, paths = time.monotonic(), Progress(prefix), category.train
    settings = settings_of(category, recipe, args)
    states = [State(folders[seed], settings | {"seed": seed}) for seed in folders]
    todo = [state for state in states if not state.finished(args.resume)]
    if not todo:
        return

    # Features, once for all seeds. What is tested comes first: a broken file stops the run at once.
    detector = evaluate.new_detector(paths, recipe, args.weights, args.device, args.ignored)
    evaluate.say(f"{prefix}: {resolution(detector.recipe, paths)}", sys.stderr)
    tests = [item.path for item in category.test]
    test = evaluate.extract(detector, tests, partial(progress, "test image", len(tests)))
    for item, size in zip(category.test, test[1], strict=True):
        for mask in item.masks or ():
            evaluate.read_mask(mask, size)
    report = partial(progress, "training image", len(paths))
    features, first = evaluate.extract_good(detector, paths, paths, report)
    spent = time.monotonic() - began

    def report_step(k, fits, step, steps, loss):
        progress(f"field {k + 1}/{fits}, loss {loss:.4f}, step", steps, step)

    for state in todo:
        began, seed = time.monotonic() - spent, state.settings["seed"]
        trained = fit_detector(detector, features, seed, report_step, state.save, state.training)
        known = evaluate.calibration_of(detector, args.fpr, args.threshold)
        evaluate.write_suspects(state.folder, paths, first, trained, known)
        evaluate.save_model(state.folder / "model.pt", detector)
        evaluate.remove_results(evaluate.maps_folder(state.folder).rglob("*.tiff"))  # of another
        row = evaluate.report(state.folder, category, detector, test, args, began)
        evaluate.write_json(state.json, state.settings | {"row": row, "left_out": args.left_out})
        evaluate.remove_results([state.file])


class State:
    """What is there of a category and a seed, and where a run that was killed goes on.

    state.pt holds a training that has begun. recipe.json, written last, holds the settings and the
    row of the table: with it, and no state.pt, a category is finished.
    """

    def __init__(self, folder: Path, settings: dict):
        self.folder, self.settings, self.training = folder, settings, None
        self.file, self.json = folder / "state.pt", folder / evaluate.FINISHED

    def finished(self, resume: bool) -> bool:
        """Whether all is there. What has begun is loaded with resume, and removed without.

        Raises InputError for files that are not from here, to resume with other settings, and to
        train again where there is a model of another folder's images.
        """
        evaluate.refuse_foreign_results(self.folder)
        begun = self.file.exists()
        file = self.file if begun else self.json
        if not file.exists():
            return False
        try:
            had = evaluate.load_checkpoint(file) if begun else evaluate.read_json(file)
        except InputError:
            if resume:
                raise
            had = self.settings  # damaged, so nothing to keep
        compared = self.settings.keys() - {"source"} if resume else {"source"}
        differ = [
            f"{name} {had.get(name)} there, {value} here"
            for name, value in self.settings.items()
            if name in compared and had.get(name) != value
        ]
        if differ and resume:
            text = f"of another run ({'; '.join(differ)}): give its settings, another --out, or no"
            raise InputError(f"{file}: {text} --resume")
        if differ:
            text = "a model of images in another folder: give another --out, or remove it"
            raise InputError(f"{self.folder}: {text}")
        if begun and resume:
            self.training = had["training"]
        elif begun:
            evaluate.remove_results([self.file, self.json])  # the model may be newer than its json
        elif resume:
            text = "evaluate.py --run draws them again, with the same --fpr and --threshold"
            evaluate.say_once(f"pictures of finished categories stay: {text}")
        return resume and not begun

    def save(self, k: int, held_out: list, field: dict) -> None:
        training = {"k": k, "held_out": held_out, "field": field}
        evaluate.save_checkpoint(self.file, Recipe(), training=training, **self.settings)


def settings_of(category: Category, recipe: Recipe, args: Namespace) -> dict:
    """What two runs must share for one to go on where the other was; lists for tuples, as JSON.

    source: a digest of the folder of the training images, which does not tell its path.
    """
    source = os.path.realpath(os.path.commonpath([path.parent for path in category.train]))
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(recipe).items()} | {
        "weights": args.weights_digest,
        "ignored_pixels": 0 if args.ignored is None else zlib.crc32(args.ignored.tobytes()),
        "images": len(category.train),
        "files": evaluate.digest_of_files(category.train),
        "test": evaluate.digest_of_files(category.test),
        "source": hashlib.sha256(os.fsencode(source)).hexdigest()[:16],
        "fpr": args.fpr,
        "threshold": args.threshold,
        "device": args.device.type,  # generators of two devices differ
    }


def resolution(recipe: Recipe, images: list[Path]) -> str:
    """One line: what the network sees of the median image, and how large a defect must be."""
    height, width = wtflow.image_shape(recipe)
    h, w = sorted(evaluate.image_sizes(images), key=math.prod)[len(images) // 2]
    shrunk = math.sqrt(h * w / (height * width))
    side = round(recipe.spacing * shrunk)
    larger = ": for smaller ones give a larger --image-size" if shrunk > 2.5 else ""
    return (
        f"images of {w} x {h} are read at {width} x {height}; a position of the map covers "
        f"{side} x {side} of their pixels, and a defect needs about as much{larger}"
    )


class Progress:
    """A line on stderr every ten seconds and at the end of each stage."""

    def __init__(self, prefix: str):
        self.prefix, self.total, self.done, self.shown = prefix, 0, 0, 0.0

    def __call__(self, what: str, total: int, done: int) -> None:
        now = time.monotonic()
        if total != self.total or done <= self.done:  # a new stage
            self.total, self.start = total, (done, now)
        self.done, (first, start) = done, self.start
        left = (now - start) / max(done - first, 1) * (total - done)
        if done == total or now - self.shown > 10:
            text = f"{what} {done}/{total}, {left:.0f} s left"
            evaluate.say(f"{self.prefix}: {text}", sys.stderr)
            self.shown = now


# ---- 3. A data set, all seeds --------------------------------------------------------------------
def run(args: Namespace, recipe: Recipe, data: Path) -> None:
    """All categories of a data set; the process of rank 0 writes the tables."""
    name, categories = evaluate.read_dataset(data, args.category)
    categories, args.left_out = evaluate.leave_out(categories, args.leave_out)
    several, out = len(args.seeds) > 1, evaluate.inside(Path(args.out), name)
    own = {seed: out.parent / f"seed{seed}" / name if several else out for seed in args.seeds}
    with contextlib.ExitStack() as locks:
        for folder in {out, *own.values()} if args.rank == 0 else ():
            locks.enter_context(evaluate.locked(folder))
            evaluate.refuse_foreign_results(folder)
        for k, category in enumerate(categories):
            folders = {seed: evaluate.inside(own[seed], category.name) for seed in own}
            good = Path(os.path.realpath(category.train[0].parent))
            if any(good.is_relative_to(os.path.realpath(f)) for f in folders.values()):
                raise InputError(f"--out {args.out}: holds the data set: give another --out")
            if k % args.world == args.rank:
                prefix = f"[{k + 1} of {len(categories)}] {category.name}"
                run_category(category, recipe, folders, args, prefix)
        if args.world > 1:
            torch.distributed.barrier()
        if args.rank == 0:
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
    metal = metal + 0.025 * rng.standard_normal((n, n))
    grey = background * (1 - inside) + metal * inside
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


DEMO = "WT-Flow demo"  # in its images: they alone are written over


def make_demo(root: Path, train: int = 48, good: int = 16, each: int = 12, n: int = 256) -> Path:
    """Write the demo data set under `root`, the same at every call; returns root."""
    mark = PngInfo()
    mark.add_text("Software", DEMO)

    def save(path, values):
        image = Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))
        evaluate.write_whole(path, partial(image.save, format="PNG", pnginfo=mark), DEMO)

    for seed, draw_part in enumerate((weave, washer)):
        rng, folder = np.random.default_rng(seed), root / draw_part.__name__
        for k in range(train + good):
            part = "train" if k < train else "test"
            save(folder / part / f"good/{k:03d}.png", draw_part(rng, n))
        for kind in ("scratch", "stain"):
            for k in range(each):
                image, mask = damage(rng, draw_part(rng, n), kind)
                save(folder / f"test/{kind}/{k:03d}.png", image)
                save(folder / f"ground_truth/{kind}/{k:03d}_mask.png", mask.astype(float))
    return root


# ---- 5. The command ------------------------------------------------------------------------------
def parse(argv: list[str] | None) -> Namespace:
    parser = evaluate.OneLineParser(description=__doc__.split("\n")[0])
    evaluate.add_common_options(parser)
    add = parser.add_argument
    add("--out", default="runs", help="where results go (default: runs)")
    add("--paper", action="store_true", help="the released recipe, wtflow.PAPER (default: ours)")
    for name, default in asdict(Recipe()).items():
        text = f"setting of wtflow.Recipe (default: {default})"
        add(f"--{name.replace('_', '-')}", type=evaluate.literal, metavar="VALUE", help=text)
    text = "of weights and noise; of several, mean and spread, each run in OUT/seedN (default: 0)"
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help=text)
    text = "names of training images, one a line, or a train-scores.csv (default: none)"
    add("--leave-out", metavar="FILE", help=text)
    text = "mask of the images' size; what is white in it is painted over (default: none)"
    add("--ignore", metavar="FILE", help=text)
    text = "go on from the last whole state in --out (default: anew)"
    add("--resume", action="store_true", help=text)
    args = parser.parse_args(argv)
    evaluate.check_options(args)
    right = len({*args.seeds}) == len(args.seeds) and all(0 <= n < 2**32 for n in args.seeds)
    if not right:
        seeds = " ".join(map(str, args.seeds))
        raise InputError(f"--seeds {seeds}: give whole numbers from 0 to 2^32 - 1, each once")
    return args


def recipe_of(args: Namespace) -> Recipe:
    """Recipe() or PAPER with the settings that the command line gives. Raises InputError."""
    recipe = Recipe(**wtflow.PAPER) if args.paper else Recipe()
    settings = {name: getattr(args, name) for name in asdict(recipe)}
    settings = {name: value for name, value in settings.items() if value is not None}
    try:
        return replace(recipe, **settings)
    except InputError as e:  # "setting=value: remedy"
        name, _, rest = str(e).partition("=")
        raise InputError(f"--{name.replace('_', '-')}={rest}") from None


def processes() -> tuple[int, int]:
    """(rank of this process, number of processes), as torchrun says. Raises InputError."""
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    try:
        return (0, 1) if rank is world is None else (int(rank or ""), int(world or ""))
    except ValueError:
        text = f"RANK={rank}, WORLD_SIZE={world}: not those of torchrun: unset them"
        raise InputError(text) from None


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    recipe, args.device = recipe_of(args), evaluate.pick_device(args.device)
    args.rank, args.world = processes()
    # First, so that a missing file stops the run at once
    args.weights_digest = wtflow.load_extractor(recipe.backbone, args.weights).digest
    args.ignored = evaluate.read_ignored(args.ignore)
    data = args.data or Path(args.out) / "demo-data/demo"
    if not args.data and args.rank == 0:
        make_demo(data)
    if args.world > 1:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
        torch.distributed.barrier()
    run(args, recipe, data)


if __name__ == "__main__":
    evaluate.exit_cleanly(main)
