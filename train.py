"""Train WT-Flow on a data set of good images, evaluate it, write models, table and pictures.

    python train.py                              a small demo data set, made here, trained and evaluated
    python train.py --data path/to/mvtec         every category of a data set, or one category's folder
    torchrun --nproc-per-node N train.py ...     the categories shared out among N processes
"""
import argparse
import ast
import contextlib
import datetime
import hashlib
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import evaluate
import wtflow
from wtflow import InputError

DEMO_STEPS = 300           # the demo's categories are small; everything else is the recipe of wtflow.RECIPE
SAVE_SECONDS = 20          # a killed run loses at most this much training
CHOICES = dict(norm=("zca", "layer"), field=("point", "unet"), coupling=("worst", "independent", "optimal"), schedule=("cycle", "step"),
               score=("max", "released"))


# ---- 1. Training one field -------------------------------------------------------------------------------------------
def learning_rate(step, recipe):
    """AdamW's rate at a step. "cycle": linear rise over the first tenth, cosine to zero [ours]; "step": a tenth after two
    thirds [released: StepLR; its constants are not known to us]."""
    s = step / recipe["steps"]
    if recipe["schedule"] == "step":
        return recipe["lr"] * (1.0 if s < 2 / 3 else 0.1)
    return recipe["lr"] * (s / 0.1 if s < 0.1 else 0.5 * (1 + math.cos(math.pi * (s - 0.1) / 0.9)))


def train_field(detector, x_0, seed, show=lambda step, loss: None, state=None, save=lambda state: None):
    """Fit detector.field to the velocity of normal features x_0 (n, d, h, w); the last step is the model.

    state: where an earlier run stopped, as given to save(state) about every SAVE_SECONDS and after the last step; the
    result is the same to the last bit. Raises InputError if the loss is not finite.
    """
    recipe, device = detector.recipe, detector.device
    torch.manual_seed(seed)                        # the field's initial weights
    field = detector.new_field(x_0.shape[1]).train()
    if recipe["field"] == "point":                 # every location is a sample with its own t; a batch is drawn from all images [ours]
        x_0 = x_0.movedim(1, -1).reshape(-1, x_0.shape[1])
    optimizer = torch.optim.AdamW(field.parameters(), recipe["lr"])
    generator = torch.Generator(device).manual_seed(seed)
    couple, start = wtflow.coupling(recipe["coupling"], recipe["candidates"]), 0
    if state:
        start = state["step"]
        field.load_state_dict(state["field"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
    saved = time.monotonic()
    for step in range(start, recipe["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        batch = torch.randint(len(x_0), (recipe["batch"],), generator=generator, device=device).to(x_0.device)
        with wtflow.autocast(device):
            loss = wtflow.flow_matching_loss(field, x_0[batch].to(device).float(), couple, generator).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        last = step + 1 == recipe["steps"]
        if step % 20 == 0 or last:                 # reading the loss waits for the device
            if not torch.isfinite(loss):
                raise InputError(f"loss is not finite at step {step}: lower the rate, or look for damaged training images")
            show(step + 1, loss.item())
        if last or time.monotonic() - saved > SAVE_SECONDS:
            save(dict(step=step + 1, field=field.state_dict(), optimizer=optimizer.state_dict(), generator=generator.get_state()))
            saved = time.monotonic()
    field.eval()
    return detector


# ---- 2. One category, one run ----------------------------------------------------------------------------------------
class Progress:
    """One line that updates on a terminal; a plain line every ten seconds otherwise. Seconds left count from the first call of each stage."""

    def __init__(self, prefix):
        self.prefix, self.total, self.shown = prefix, None, 0.0

    def __call__(self, text, done, total):
        now, last = time.monotonic(), done == total
        if total != self.total or done <= self.first:
            self.total, self.first, self.start = total, done, now
        left = f", {(now - self.start) / (done - self.first) * (total - done):.0f} s left" if self.first < done < total else ""
        if sys.stderr.isatty():
            print(f"\r\x1b[K{self.prefix}: {text}{left}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif last or now - self.shown > 10:
            print(f"{self.prefix}: {text}{left}", file=sys.stderr, flush=True)
            self.shown = now


def signature(category, recipe, seed):
    """What a saved state must share with this run to be continued: recipe, seed, and the files (folders, names and sizes)."""
    paths = [*category.train, *(p for item in category.test for p in (item.path, *(item.masks or ())))]
    files = [f"{p.parent.name}/{p.name}:{p.stat().st_size}" for p in paths]
    return dict(recipe, seed=seed, images=len(category.train), test_images=len(category.test), files=hashlib.sha256("\n".join(files).encode()).hexdigest()[:16])


def check_fits(path, state, wanted):
    """Raises InputError naming what differs between a saved run and this one."""
    had = state.get("signature") or {}
    differ = [f"{k} {had.get(k)} there, {wanted[k]} here" for k in wanted if had.get(k) != wanted[k]]
    if differ:
        raise InputError(f"{path}: of another run ({'; '.join(differ)}): give its settings, another --out, or no --resume")


def run_category(category, recipe, seed, folder, args, device, prefix):
    """Train, evaluate and save one category; returns its row. With --resume a finished one is only read."""
    began, progress, model, part = time.monotonic(), Progress(prefix), folder / "model.pt", folder / "state.pt"
    recipe = dict(recipe, steps=recipe["steps"] or recipe["epochs"] * -(-len(category.train) // recipe["batch"]))
    wanted, state = signature(category, recipe, seed), None
    if args.resume:
        for path in (model, part):
            if path.exists():
                saved = evaluate.load_state(path)
                check_fits(path, saved, wanted)
                if path == model:
                    return saved["row"]
                state, began = saved, began - saved["seconds"]
    detector = wtflow.Detector(recipe, args.weights, device)

    def extract(paths, what):
        return evaluate.extract(detector, paths, lambda done: progress(f"features of {what} images {done}/{len(paths)}", done, len(paths)))

    t_0, sizes = extract([i.path for i in category.test], "test")           # first: a broken image stops the run before training
    x_0, _ = extract(category.train, "training")
    detector.fit_normalisation(x_0)
    evaluate.normalise_all(detector, x_0)

    def show(step, loss):
        progress(f"step {step}/{recipe['steps']}, loss {loss:.4f}", step, recipe["steps"])

    def save(state):
        seconds = time.monotonic() - began
        evaluate.write_whole(part, lambda to: torch.save(dict(state, recipe=recipe, signature=wanted, seconds=seconds), to))

    train_field(detector, x_0, seed, show, state, save)
    detector.calibrate(x_0)
    evaluate.normalise_all(detector, t_0)
    row = evaluate.evaluate_category(detector, category, t_0, sizes, folder, args.maps, args.save_maps)
    row["seconds"] = round(time.monotonic() - began, 1)
    evaluate.write_whole(model, lambda to: torch.save(dict(evaluate.state_of(detector), signature=wanted, row=row), to))
    part.unlink(missing_ok=True)
    return row


@contextlib.contextmanager
def locked(folder):
    """Hold `folder`/.lock; a second run into the same folder is refused with the first one's process id."""
    import fcntl                                   # here: not on every platform
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")
    except OSError as e:
        raise InputError(f"{folder}: cannot be written ({e.strerror}): give another --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise InputError(f"{folder}: process {lock.read().strip()} is writing here: wait for it, or give another --out") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
        (folder / ".lock").unlink(missing_ok=True)


def run(args, recipe, seed, out, data, device):
    """All categories of a data set for one seed; rank 0 writes the table. Returns the rows on rank 0."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name, categories = evaluate.read_dataset(data, args.category)
    folder = out / name
    with locked(folder) if rank == 0 else contextlib.nullcontext():
        for k, category in enumerate(categories):
            if k % world == rank:
                run_category(category, recipe, seed, folder / category.name, args, device, f"[{k + 1} of {len(categories)}] {category.name}")
        if world > 1:
            torch.distributed.barrier()
        if rank == 0:
            rows = [evaluate.load_state(folder / c.name / "model.pt")["row"] for c in categories]
            evaluate.write_tables(folder, rows)
            evaluate.draw_contact_sheet(folder, [c.name for c in categories])
            print(f"models, maps and tables: {folder}")
            return rows


# ---- 3. The demo: two categories in MVTec layout ---------------------------------------------------------------------
def weave(rng, n):
    """An oriented texture: two crossing thread systems with random phase, uneven spacing and grain."""
    y, x = np.mgrid[:n, :n] / n
    a = rng.normal(0.35, 0.02)
    u, v = x * np.cos(a) + y * np.sin(a), y * np.cos(a) - x * np.sin(a)
    u, v = u + 0.004 * np.sin(9 * v + rng.uniform(0, 6)), v + 0.004 * np.sin(7 * u + rng.uniform(0, 6))
    g = 0.5 + 0.2 * np.sin(2 * np.pi * 22 * u + rng.uniform(0, 6)) + 0.12 * np.sin(2 * np.pi * 13 * v + rng.uniform(0, 6))
    return (g + 0.04 * rng.standard_normal((n, n)))[..., None] * np.array([0.9, 0.8, 0.65])


def washer(rng, n):
    """An object: a ring with five teeth at a random angle and place, lit from one side, on a grainy background."""
    y, x = (np.mgrid[:n, :n] / n - 0.5) * 2
    x, y, turn = x - rng.uniform(-0.1, 0.1), y - rng.uniform(-0.1, 0.1), rng.uniform(0, 6.3)
    r, phi = np.hypot(x, y), np.arctan2(y, x)
    edge = 0.66 + 0.06 * np.tanh(6 * np.cos(5 * (phi - turn)))
    inside = 1 / (1 + np.exp(-90 * (edge - r))) / (1 + np.exp(-90 * (r - 0.28)))
    metal = 0.62 + 0.1 * np.cos(phi - 0.7) + 0.03 * np.sin(60 * r)
    g = (0.18 + 0.04 * rng.standard_normal((n, n))) * (1 - inside) + (metal + 0.025 * rng.standard_normal((n, n))) * inside
    return g[..., None] * np.array([0.85, 0.9, 1.0])


def damage(rng, image, kind):
    """(image with a defect, its mask): scratch = a thin dull line; stain = a faint soft spot; patch = a piece put in turned by 90 degrees."""
    n = len(image)
    y, x = np.mgrid[:n, :n]
    r, phi = rng.uniform(0.2, 0.3) * n, rng.uniform(0, 6.3)        # a place on the washer's ring as well
    cy, cx, a = n / 2 + r * np.sin(phi), n / 2 + r * np.cos(phi), rng.uniform(0, 3.2)
    along, across = (x - cx) * np.cos(a) + (y - cy) * np.sin(a), (y - cy) * np.cos(a) - (x - cx) * np.sin(a)
    if kind == "scratch":
        mask = (abs(across + 4 * np.sin(along / 9)) < 1.6) & (abs(along) < rng.uniform(14, 26))
        return np.where(mask[..., None], image * 0.65 + 0.05, image), mask
    if kind == "stain":
        d = np.hypot(along / rng.uniform(1, 1.8), across) / rng.uniform(7, 12)
        return image * (1 - 0.3 * np.exp(-d ** 4)[..., None] * np.array([0.4, 0.8, 1.0])), d < 1
    h, cy, cx = int(rng.integers(9, 15)), int(cy), int(cx)
    out, mask = image.copy(), np.zeros((n, n), bool)
    out[cy - h:cy + h, cx - h:cx + h] = np.rot90(image[cy - h:cy + h, cx - h:cx + h])
    mask[cy - h:cy + h, cx - h:cx + h] = True
    return out, mask


def make_demo(root, train=48, good=16, each=8, n=256):
    """Write the demo data set under `root`, the same at every call."""
    def save(path, a):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((np.clip(a, 0, 1) * 255).astype(np.uint8)).save(path)

    for seed, draw in enumerate((weave, washer)):
        rng, folder = np.random.default_rng(seed), root / draw.__name__
        for k in range(train + good):
            save(folder / ("train" if k < train else "test") / f"good/{k:03d}.png", draw(rng, n))
        for kind in ("scratch", "stain", "patch"):
            for k in range(each):
                image, mask = damage(rng, draw(rng, n), kind)
                save(folder / f"test/{kind}/{k:03d}.png", image)
                save(folder / f"ground_truth/{kind}/{k:03d}_mask.png", mask.astype(float))
    return root


# ---- 4. The command --------------------------------------------------------------------------------------------------
def parse(argv):
    p = evaluate.OneLineParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", help="data set root or one category's folder; without it, a demo data set is made")
    p.add_argument("--out", default="runs", help="where results go (default: runs)")
    p.add_argument("--category", nargs="+", action="extend", default=[], metavar="NAME", help="only these")
    p.add_argument("--paper", action="store_true", help="the released recipe: wtflow.PAPER")
    p.add_argument("--backbone", metavar="NAME", help=", ".join(wtflow.BACKBONES))
    p.add_argument("--weights", metavar="FILE", help="the backbone's state dict, where it is not in a package")
    p.add_argument("--image-size", type=int, metavar="N")
    p.add_argument("--steps", type=int, metavar="N")
    p.add_argument("--coupling", choices=CHOICES["coupling"])
    p.add_argument("--candidates", type=int, metavar="N", help="n of local worst transport")
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="any other default of wtflow.RECIPE, as in the README's ablation")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--seeds", type=int, nargs="+", help="several: mean and spread in the table, each run in OUT/seedN")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--resume", action="store_true", help="go on from the last whole state in --out")
    p.add_argument("--maps", choices=("all", "worst", "none"), default="worst", help="pictures: all, or worst misses and best hits")
    p.add_argument("--save-maps", action="store_true", help="float32 TIFF maps in the layout of MVTec's evaluation script")
    return p.parse_args(argv)


def recipe_of(args):
    """wtflow.RECIPE or PAPER with what the command line changes. Raises InputError."""
    recipe = dict(wtflow.PAPER if args.paper else wtflow.RECIPE)
    if not args.paper and not args.data:
        recipe["steps"] = DEMO_STEPS
    own = ("backbone", "image_size", "steps", "coupling", "candidates")
    changes = {k: v for k in own if (v := getattr(args, k)) is not None}
    for text in args.set:
        key, _, value = text.partition("=")
        if key not in recipe:
            raise InputError(f"--set {text}: no such default: choose from {', '.join(recipe)}")
        try:
            default = recipe[key]
            changes[key] = value if isinstance(default, str) else type(default)(ast.literal_eval(value))
        except (ValueError, TypeError, SyntaxError):
            raise InputError(f"--set {text}: give a value like {recipe[key]!r}") from None
    for key, value in changes.items():
        option = f"--{key.replace('_', '-')} {value}" if key in own else f"--set {key}={value}"
        if value not in CHOICES.get(key, (value,)):
            raise InputError(f"{option}: choose from {', '.join(CHOICES[key])}")
        if key in ("steps", "candidates", "base", "batch", "cell") and value < 1 or key in ("lr", "shrinkage", "smooth") and not 0 <= value < 1e6:
            raise InputError(f"{option}: give at least {int(key not in ('lr', 'shrinkage', 'smooth'))}")
    recipe.update(changes)
    if recipe["image_size"] % recipe["cell"] or not 64 <= recipe["image_size"] <= 2048:
        raise InputError(f"--image-size {recipe['image_size']}: give a multiple of {recipe['cell']} from 64 to 2048")
    if not recipe["strides"] or not {*recipe["strides"]} <= {4, 8, 16}:
        raise InputError(f"--set strides={recipe['strides']}: choose from 4, 8, 16, like (8, 16)")
    return recipe


def main(argv=None):
    args = parse(argv)
    recipe, device = recipe_of(args), evaluate.pick_device(args.device)
    wtflow.Detector(recipe, args.weights, device)                  # unknown backbone or weights: say so before anything is written
    out = Path(args.out)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    data = args.data or make_demo(out / "demo-data/demo")
    if not args.seeds:
        run(args, recipe, args.seed, out, data, device)
        return
    runs = [run(args, recipe, seed, out / f"seed{seed}", data, device) for seed in args.seeds]
    if runs[0]:
        evaluate.write_spread(out / evaluate.read_dataset(data)[0], args.seeds, runs)


if __name__ == "__main__":
    evaluate.exit_cleanly(main)
