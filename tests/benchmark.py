"""The figures that the READMEs quote, each from one command.

    python -m tests.benchmark speed                    milliseconds of each stage, beside a bound
    python -m tests.benchmark compare --data D [D ..]  couplings and other detectors, side by side
    python -m tests.benchmark ablation --data D [D ..] what each setting of the recipe is worth

Figures are image AUROC / pixel AUROC / AUPRO in percent, mean +- standard deviation over --seeds.
Features are extracted once; every method has the same ones, but for PatchCore and PaDiM, which have
their own grid and no whitening.
"""

import resource
import time
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import wtflow
from wtflow import PAPER, Detector, InputError, Recipe

FIGURES = ("image_auroc", "pixel_auroc", "aupro")
MIB = 2**20


# ---- 1. One category, its features, and the figures of a method ----------------------------------
class Sample(NamedTuple):
    """A category and its features (n, d, h, w) float16, as the extractor of `recipe` gives them."""

    category: evaluate.Category
    recipe: Recipe
    train: torch.Tensor
    test: torch.Tensor
    sizes: list


def read_samples(roots, recipe):
    """A Sample of each category of the data sets under `roots`, one at a time."""
    detector = Detector(recipe)
    for root in roots:
        for category in evaluate.read_dataset(root)[1]:
            if not category.test:
                raise InputError(f"{root}: {category.name} has no test images: nothing to measure")
            train, _ = evaluate.extract(detector, category.train)
            test, sizes = evaluate.extract(detector, [item.path for item in category.test])
            yield Sample(category, recipe, train, test, sizes)


def figures(sample, maps, scores):
    """The row of a method's maps (n, N, N) and image scores (n,)."""
    row = evaluate.measure(sample.category, maps, scores.double().numpy(), sample.sizes)
    return {name: row[name] for name in FIGURES}


def train_flow(sample, recipe, seed):
    """A detector fitted to a sample's training features."""
    detector = Detector(recipe)
    detector.fit_whitening(sample.train)
    x_0 = detector.normalise(sample.train)
    wtflow.train_field(detector, x_0, seed)
    detector.calibrate(x_0)
    return detector


def flow(sample, recipe, seed):
    """Figures, training seconds, milliseconds per test image and MiB of WT-Flow under a recipe."""
    began = time.perf_counter()
    detector = train_flow(sample, wtflow.steps_for(recipe, len(sample.train)), seed)
    trained = time.perf_counter()
    maps, scores = detector.score(detector.normalise(sample.test))
    done = time.perf_counter()
    kept = sum(v.numel() * v.element_size() for v in detector.state_dict().values())
    return {
        **figures(sample, maps, scores),
        "train_s": trained - began,
        "ms_per_image": 1000 * (done - trained) / len(sample.test),
        "mib": kept / MIB,
    }


def mean_and_spread(rows):
    """One row of text, "mean +- standard deviation", from a row for each seed."""
    merged = {}
    for name in rows[0]:
        values = [row[name] for row in rows if row[name] is not None]  # no masks, no pixel figures
        merged[name] = f"{np.mean(values):.2f}" if values else ""
        if len(values) > 1 and name in FIGURES:
            merged[name] += f" +- {np.std(values, ddof=1):.2f}"
    return merged


# ---- 2. Other detectors on the same frozen network -----------------------------------------------
OTHER_GRID = 8  # pixels of the image per location for PatchCore and PaDiM: 32 x 32 at 256 px
OTHER_BLUR = 4.0  # pixels at 256 px; a setting of anomalib 2.7


def mahalanobis(sample, seed):
    """Mean and covariance of whitened features in each cell (Defard et al. 2021), our scorer."""
    detector = Detector(sample.recipe)
    detector.fit_whitening(sample.train)
    x_0 = detector.normalise(sample.train)
    mean, W = wtflow.fit_cells(x_0)

    def score():
        test = detector.normalise(sample.test)
        read = [
            detector.read(wtflow.log_density(wtflow.whiten(x.float(), mean, W)))
            for x in test.split(wtflow.SCORED)
        ]
        maps, scores = zip(*read, strict=True)
        return torch.cat(maps), torch.cat(scores)

    return score, (mean, W)


def timed(sample, fit, seed):
    """The row of another detector: fit(sample, seed) -> (function without arguments, tensors)."""
    began = time.perf_counter()
    score, kept = fit(sample, seed)
    trained = time.perf_counter()
    maps, scores = score()
    done = time.perf_counter()
    return {
        **figures(sample, maps, scores),
        "train_s": trained - began,
        "ms_per_image": 1000 * (done - trained) / len(sample.test),
        "mib": sum(v.numel() * v.element_size() for v in kept) / MIB,
    }


# ---- 3. Side by side, and one setting at a time --------------------------------------------------
COLUMNS = ("category", "method", *FIGURES, "train_s", "ms_per_image", "mib")


def compare(args):
    """Print the couplings and the other detectors on each category."""
    recipe = Recipe()
    flows = {
        "WT-Flow": recipe,
        "rFM": replace(recipe, coupling="independent"),
        "OT-CFM": replace(recipe, coupling="optimal"),
    }
    others = {"Mahalanobis per cell": mahalanobis}
    table = []
    for sample in read_samples(args.data, recipe):
        for name, changed in flows.items():
            rows = [flow(sample, changed, seed) for seed in args.seeds]
            table.append({"method": name, "category": sample.category.name})
            table[-1] |= mean_and_spread(rows)
        for name, fit in others.items():
            row = mean_and_spread([timed(sample, fit, args.seeds[0])])
            table.append({"method": name, "category": sample.category.name, **row})
    evaluate.print_table(COLUMNS, table)


# A change of the default in each row; `train.py --set NAME=VALUE` makes the same change.
ABLATION = (
    {},
    {"calibrate": False},
    {"norm": "layer"},
    {"strides": (16,)},
    {"cell": 8, "smooth": 0.8},
    {"steps": 1500},
    {"candidates": 1},
    {"candidates": 4},
    {"candidates": 16},
    {"candidates": 256},
    {"base": 256},
    {"image_size": 384},
)


def ablation(args):
    """Print what each change of the default does on each category."""
    table = []
    for changes in ABLATION:
        recipe = replace(Recipe(), **changes)
        name = " ".join(f"{k}={v}" for k, v in changes.items()) or "the default"
        for sample in read_samples(args.data, recipe):
            rows = [flow(sample, recipe, seed) for seed in args.seeds]
            table.append({"method": name, "category": sample.category.name})
            table[-1] |= mean_and_spread(rows)
    evaluate.print_table(COLUMNS, sorted(table, key=lambda row: row["category"]))


# ---- 4. Speed ------------------------------------------------------------------------------------
def milliseconds(f, device, repeats=15):
    """Median and interquartile range of f() in ms, after three warm-up calls."""
    times = []
    for _ in range(repeats + 3):
        began = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    low, median, high = np.percentile(times[3:], (25, 50, 75))
    return median, high - low


def count(module):
    return sum(p.numel() for p in module.parameters())


def peak_gib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def random_detector(recipe, device):
    """A fitted detector whose features are noise: for timing alone."""
    detector = Detector(recipe).to(device)
    size = recipe.image_size
    features = detector.features(torch.randint(0, 255, (1, 3, size, size), dtype=torch.uint8))
    detector.fit_whitening(features)
    detector.calibrate(torch.randn_like(features))
    return detector


def stages(detector, images):
    """(name, function without arguments, parameters) of each stage of the arrow."""
    features = detector.features(images)
    x_0 = detector.normalise(features)
    log_p = detector.log_p(x_0)
    size = detector.recipe.image_size
    total = count(detector.extractor) + count(detector.field)
    return (
        (f"images to maps, {size} px", lambda: detector(images), total),
        ("  extractor", lambda: detector.features(images), count(detector.extractor)),
        ("  normalisation", lambda: detector.normalise(features), 0),
        ("  flow, one step", lambda: detector.transport(x_0), count(detector.field)),
        ("  flow, calibration, log p", lambda: detector.log_p(x_0), count(detector.field)),
        ("  map and score", lambda: detector.read(log_p), 0),
    )


@torch.inference_mode()
def speed(args):
    """Print milliseconds at batch 1 and 16, beside FLOPs / (the matrix rate of this run)."""
    device = evaluate.pick_device(args.device)
    a = torch.randn(2048, 2048, device=device)
    with wtflow.autocast(device):
        rate = 2 * 2048**3 / milliseconds(lambda: a @ a, device)[0]  # FLOPs per ms
    table = []

    def add(name, f, parameters, batch):
        with FlopCounterMode(display=False) as counter:
            f()
        median, spread = milliseconds(f, device)
        table.append({"stage": name, "batch": batch, "ms": median, "spread": spread})
        table[-1]["images_per_s"] = 1000 * batch / median
        table[-1]["parameters_M"] = parameters / 1e6
        table[-1]["x_bound"] = median * rate / max(counter.get_total_flops(), 1)

    for size in (256, 512):
        detector = random_detector(replace(Recipe(), image_size=size), device)
        for batch in (1, 16):
            images = torch.randint(0, 255, (batch, 3, size, size), dtype=torch.uint8)
            for name, f, parameters in stages(detector, images):
                add(name, f, parameters, batch)
    ours = peak_gib()
    unet = wtflow.UNetField(1024, PAPER.base).to(device).eval()
    for batch in (1, 16):
        x_0 = torch.randn(batch, 1024, 8, 8, device=device)
        add(
            "flow of the released U-Net",
            lambda x_0=x_0: wtflow.euler(unet, x_0),
            count(unet),
            batch,
        )
    columns = ("stage", "batch", "ms", "spread", "images_per_s", "parameters_M", "x_bound")
    evaluate.print_table(columns, table)
    print(
        f"matrix rate {rate / 1e9:.2f} TFLOP/s, {torch.get_num_threads()} threads, "
        f"peak memory {ours:.1f} GiB ({peak_gib():.1f} GiB with the U-Net)"
    )


# ---- 5. The command ------------------------------------------------------------------------------
def main(argv=None):
    parser = evaluate.OneLineParser(prog="python -m tests.benchmark", description=__doc__)
    add = parser.add_argument
    add("what", choices=("speed", "compare", "ablation"))
    add("--data", nargs="+", default=[], metavar="DIR", help="data sets or categories")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="for speed")
    args = parser.parse_args(argv)
    if args.what != "speed" and not args.data:
        raise InputError(f"{args.what}: give --data, the data sets to measure on")
    {"speed": speed, "compare": compare, "ablation": ablation}[args.what](args)


if __name__ == "__main__":
    evaluate.exit_cleanly(main)
