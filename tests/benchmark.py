"""The numbers that the READMEs quote, each from one command.

    python -m tests.benchmark speed                    milliseconds of each stage, beside a bound
    python -m tests.benchmark memory                   peak MiB of training and of scoring
    python -m tests.benchmark compare --data D [D ..]  couplings and other detectors, side by side
    python -m tests.benchmark rho --data D [D ..]      worst transport of any rho, rFM, OT-CFM
    python -m tests.benchmark ablation --data D [D ..] what each setting of the recipe is worth
    python -m tests.benchmark few --data D [D ..]      what fewer training images do
    python -m tests.benchmark spoiled --data D [D ..]  what defects among the training images do

Metrics are image AUROC / pixel AUROC / AUPRO in percent, mean +- standard deviation over --seeds;
fpr and recall are those at the threshold for 1 % false positives. Features are extracted once;
every method has the same ones, but PatchCore and PaDiM have no whitening and, with "256 px", a grid
of their own.
"""

import argparse
import contextlib
import io
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in evaluate.py

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import train
import wtflow
from wtflow import PAPER, Detector, InputError, Recipe

METRICS = ("image_auroc", "pixel_auroc", "aupro")
MIB = 2**20


# ---- 1. One category, its features, and the metrics of a method ----------------------------------
class Sample(NamedTuple):
    """A category and its features (n, d, h, w) float16, as the extractor of `recipe` gives them.

    All that is fitted to them is on their device.
    """

    category: evaluate.Category
    recipe: Recipe
    train: torch.Tensor
    test: torch.Tensor
    sizes: list


FEATURES = ("backbone", "image_size", "aspect", "strides", "spacing")  # settings of the extractor


def read_sample(category, recipe, device="cpu"):
    """The Sample of a category. Raises InputError if there is nothing to measure."""
    if not category.test:
        raise InputError(f"{category.name}: no test images: nothing to measure")
    detector = evaluate.new_detector(category.train, recipe, device=device)
    good, _ = evaluate.extract_good(detector, category.train, category.train)
    test, sizes, _ = evaluate.extract(detector, [item.path for item in category.test])
    return Sample(category, detector.recipe, good, test, sizes)


def categories_in(roots):
    """The categories of the data sets under `roots`. Raises InputError if two have one name."""
    found = [category for root in roots for category in evaluate.read_dataset(root)[1]]
    names = [category.name for category in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--data: two categories are called {name}: give one of them")
    return found


def in_place_of(recipe, sample):
    """A recipe with what the features of a sample were made with."""
    return replace(recipe, **{name: getattr(sample.recipe, name) for name in FEATURES})


def timed(sample, fit, seed):
    """The row of a method: fit(sample, seed) -> (score, tensors[, scores of good images]).

    score: features -> maps (n, h, w) and image scores (n,). fpr and recall need scores of good
    images, to set the threshold with.
    """
    began = time.perf_counter()
    score, kept, *good = fit(sample, seed)
    fitted = time.perf_counter()
    maps, scores = (y.cpu() for y in score(sample.test))
    done = time.perf_counter()
    row = measured(sample, maps, scores, good[0].cpu() if good else None)
    row |= {"train_s": fitted - began, "mib": mib(kept)}
    return row | {"ms_per_image": 1000 * (done - fitted) / len(sample.test)}


def measured(sample, maps, scores, good, how="tail"):
    """METRICS of the test images of a sample; fpr and recall too, if there are good scores."""
    known = evaluate.calibrate(scores.numpy() if good is None else good.numpy(), how=how)
    found = evaluate.classify(scores.numpy(), known)
    row = evaluate.measure(sample.category, (maps, found, sample.sizes))
    names = METRICS if good is None else (*METRICS, "fpr", "recall")
    return {name: row[name] for name in names}


def fit_flow(sample, seed, recipe=None):
    """WT-Flow under a recipe, by default the sample's, as a method among the others."""
    recipe = sample.recipe if recipe is None else in_place_of(recipe, sample)
    detector = Detector(recipe).to(sample.train.device)
    train.fit_detector(detector, sample.train, seed)
    return detector.score, detector.state_dict().values(), detector.normal_scores


def mib(tensors):
    return sum(v.numel() * v.element_size() for v in tensors) / MIB


def mean_and_spread(rows):
    """One row of text, "mean +- standard deviation", from a row for each seed."""
    merged = {}
    for name in rows[0]:
        values = [row[name] for row in rows if row.get(name) is not None]  # no masks: none
        merged[name] = f"{np.mean(values):.2f}" if values else ""
        if len(values) > 1 and name in METRICS:
            merged[name] += f" +- {np.std(values, ddof=1):.2f}"
    return merged


# ---- 2. Other detectors on the same frozen network -----------------------------------------------
# Facts from the papers (PatchCore: Roth et al. 2022; PaDiM: Defard et al. 2021) and from the
# settings of anomalib 2.7, marked [anomalib]. Features here are not whitened.
ENTRIES = 2**24  # of a matrix of distances that are held at a time
POOL = 4096  # rows among which the greedy coreset looks for the farthest
NEIGHBOURS = 9  # [anomalib] of the memory, for the reweighted score of PatchCore
RIDGE = 0.01  # on the diagonal of PaDiM's covariances
OTHER_BLUR = 4.0  # pixels at 256 px [anomalib]
PART = 64  # positions whose Gaussians are fitted at a time
# What PatchCore and PaDiM are usually given: a square of 256 px, 32 x 32 cells of strides 8, 16.
USUAL = Recipe(image_size=256, aspect=1.0)


def to_rows(x):
    """Features (n, d, h, w) -> one row per location (n h w, d)."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def squared_distances(a, b):
    """|a_i - b_j|^2 of rows a (n, d) and b (m, d), by one matrix product: (n, m)."""
    products = torch.addmm(b.square().sum(1), a, b.T, alpha=-2)
    return products.add_(a.square().sum(1, keepdim=True)).clamp_(min=0)


def lower(distances, rows, centres):
    """Lower distances (n,) to the squared distances of rows (n, d) to centres (k, d), in place."""
    part = max(1, ENTRIES // len(centres))
    for d, r in zip(distances.split(part), rows.split(part), strict=True):
        torch.minimum(d, squared_distances(r.float(), centres).amin(1), out=d)


def greedy_coreset(rows, size, seed):
    """Indices (size,) of a k-centre greedy coreset of rows (n, d), the first drawn at random.

    Each next one is the row that is farthest from those chosen. Exact, without passing over all
    rows at each step: distances only fall, so while the farthest of the POOL farthest rows is
    beyond every row outside the pool, it is the farthest of all. Rows outside learn of new centres
    together, in one matrix product.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(rows), (1,), generator=generator).tolist()
    distances = torch.full((len(rows),), torch.inf, device=rows.device)
    lower(distances, rows, rows[chosen].float())
    while len(chosen) < size:
        far, index = distances.topk(min(POOL, len(rows)))
        candidates = rows[index].float()
        known = len(chosen)
        bound = far[-1].item() if len(rows) > POOL else -1.0
        while len(chosen) < size:
            k = int(far.argmax())
            if far[k] < max(bound, 0):
                break
            chosen.append(int(index[k]))
            lower(far, candidates, candidates[k : k + 1])
            far[k] = -1.0  # never a second time, equal rows or not
        if len(chosen) == known:
            break  # all rows are chosen or equal to a chosen one
        lower(distances, rows, rows[chosen[known:]].float())
        distances[chosen] = -1.0
    return torch.tensor(chosen)


def nearest(rows, memory):
    """Distance (n,) of rows (n, d) to the nearest row of memory (m, d), and its index (n,)."""
    parts = rows.split(max(1, ENTRIES // len(memory)))
    found = [squared_distances(part.float(), memory).min(1) for part in parts]
    return torch.cat([d for d, _ in found]).sqrt(), torch.cat([i for _, i in found])


def reweighted(x, distances, index, memory):
    """PatchCore's score (n,): the largest distance s = |x* - m*| of an image, reweighted.

    Times 1 minus the softmax weight of m* among the distances from x* to the NEIGHBOURS rows of
    memory around m*, m* one of them (equation 7, its sign as in [anomalib]).
    """
    s, place = distances.max(1)
    own = torch.arange(len(x), device=x.device)
    x_far = x.flatten(2).movedim(1, -1)[own, place].float()
    m_near = memory[index[own, place]]
    count = min(NEIGHBOURS, len(memory))
    around = squared_distances(m_near, memory).topk(count, largest=False)[1]
    to_x = (memory[around] - x_far[:, None]).norm(dim=2)
    return s * (1 - torch.softmax(to_x, 1)[:, 0])


def distance_map(distances, size):
    """Distances (n, h, w) on the grid -> maps (n, *size), upsampled and blurred."""
    y = F.interpolate(distances[:, None], size, mode="bilinear")[:, 0].cpu().numpy()
    return torch.from_numpy(
        gaussian_filter(y, (0, OTHER_BLUR, OTHER_BLUR), mode="nearest", truncate=3)
    )


def fit_patchcore(sample, seed, share):
    """PatchCore with a greedy coreset of `share` of all rows."""
    rows = to_rows(sample.train)
    memory = rows[greedy_coreset(rows, int(share * len(rows)), seed)].float()

    def score(x):
        distances, index = nearest(to_rows(x), memory)
        distances, index = distances.view(len(x), -1), index.view(len(x), -1)
        scores = reweighted(x, distances, index, memory)
        grid = distances.view(len(x), *x.shape[2:])
        return distance_map(grid, wtflow.image_shape(sample.recipe)), scores

    return score, (memory,)


def fit_padim(sample, seed):
    """PaDiM on all channels: a Gaussian in each cell, its covariance plus RIDGE."""
    cells = sample.train.flatten(2).permute(2, 0, 1)
    d = cells.shape[-1]
    mean, inverse = [], []
    for part in cells.split(PART):
        part = part.float()
        mu = part.mean(1, keepdim=True)
        S = (part - mu).mT @ (part - mu) / (part.shape[1] - 1)
        mean.append(mu)
        L = torch.linalg.cholesky(S + RIDGE * torch.eye(d, device=part.device))
        inverse.append(torch.cholesky_inverse(L))
    mean, inverse = torch.cat(mean), torch.cat(inverse)

    def score(features):
        maps = []
        for x in features.split(wtflow.SCORED):
            e = x.float().flatten(2).permute(2, 0, 1) - mean
            square = (torch.bmm(e, inverse) * e).sum(2).clamp_min(0)
            grid = square.sqrt().T.reshape(len(x), *x.shape[2:])
            maps.append(distance_map(grid, wtflow.image_shape(sample.recipe)))
        maps = torch.cat(maps)
        return maps, maps.flatten(1).amax(1)

    return score, (mean, inverse)


class Zero(torch.nn.Module):
    """v_theta = 0: the residual is x_0 - E[x_1 | x_0] at every time."""

    def forward(self, x, t):
        return torch.zeros_like(x)


def fit_untrained(sample, seed, rho=0.0):
    """The same whitening, coupling, Gaussians and score, with nothing learnt: v_theta = 0.

    At rho = 0 they are Mahalanobis distances of the features.
    """
    detector = Detector(replace(sample.recipe, coupling="worst", rho=rho)).to(sample.train.device)
    detector.field = Zero()
    detector.fit_whitening(sample.train)
    _, scores = train.fit_gaussians(detector, sample.train)
    return detector.score, detector.state_dict().values(), scores


# ---- 3. Side by side, and one setting at a time --------------------------------------------------
COLUMNS = (
    *("category", "method", *METRICS, "fpr", "recall"),
    *("train_s", "ms_per_image", "mib"),
)
COUPLINGS = {
    "WT-Flow": {},
    "rFM": {"coupling": "independent"},
    "OT-CFM": {"coupling": "optimal"},
}
RATIO = 0.6 / 0.4  # of noise to signal: that of rFM at the default's time
UNTRAINED = {f"v = 0, rho = {rho:g}": partial(fit_untrained, rho=rho) for rho in (0, 0.1, 0.5, 0.9)}
OTHERS = {
    "PatchCore 1 %": partial(fit_patchcore, share=0.01),
    "PatchCore 10 %": partial(fit_patchcore, share=0.1),
    "PaDiM": fit_padim,
}


def table_of(category, named_rows):
    """Rows of text from {method: [row of each seed]}."""
    return [
        {**dict.fromkeys(COLUMNS), "category": category.name, "method": name}
        | mean_and_spread(rows)
        for name, rows in named_rows.items()
    ]


def flow_rows(sample, named_recipes, seeds):
    """{name: [row of each seed]} of WT-Flow under each recipe."""
    return {
        name: [timed(sample, partial(fit_flow, recipe=recipe), seed) for seed in seeds]
        for name, recipe in named_recipes.items()
    }


def compare(args):
    """Print the couplings, the same score with nothing learnt and other detectors, by category.

    What the field adds is what is ahead of the best row with v = 0.
    PatchCore and PaDiM on what they are usually given, and on the images and the grid that WT-Flow
    has, but for the memory of 10 %, which is slow to choose there.
    """
    for category in categories_in(args.data):
        sample = read_sample(category, Recipe(), args.device)
        recipes = {name: replace(Recipe(), **changes) for name, changes in COUPLINGS.items()}
        rows = flow_rows(sample, recipes, args.seeds)
        rows |= {name: [timed(sample, fit, 0)] for name, fit in UNTRAINED.items()}
        usual = read_sample(category, USUAL, args.device)
        for name, fit in OTHERS.items():
            seeds = args.seeds[:1] if fit is fit_padim else args.seeds
            rows[f"{name}, 256 px"] = [timed(usual, fit, seed) for seed in seeds]
            if name != "PatchCore 10 %":
                rows[name] = [timed(sample, fit, seed) for seed in seeds]
        evaluate.print_table(COLUMNS, table_of(category, rows))


def time_at(ratio, rho):
    """The time at which x_t of worst(rho) has this ratio of noise to signal, on the shell (W8)."""
    noise = (1 - rho**2) ** 0.5
    return ratio / (noise + ratio * (1 + rho))


def rho(args):
    """Print worst transport of growing rho, rFM and OT-CFM, all at one ratio of noise to signal.

    With --released, the same couplings under the released recipe at a width that trains here.
    """
    couplings = {
        f"rho={r}": {"rho": r, "time": time_at(RATIO, r)} for r in (-0.5, 0.1, 0.25, 0.5, 0.9)
    }
    couplings |= {name: COUPLINGS[name] for name in ("rFM", "OT-CFM")}
    base = Recipe()
    if args.released:
        base = Recipe(**PAPER | {"backbone": base.backbone, "width": 64})
        couplings = {name: changes | {"time": 0.0} for name, changes in couplings.items()}
    for category in categories_in(args.data):
        sample = read_sample(category, base, args.device)
        recipes = {name: replace(base, **changes) for name, changes in couplings.items()}
        rows = flow_rows(sample, recipes, args.seeds)
        evaluate.print_table(COLUMNS, table_of(category, rows))


# Changes of the default in each row; `train.py --NAME VALUE` makes the same.
ABLATION = (
    {},
    {"coupling": "independent"},
    {"coupling": "optimal"},
    {"rho": 0.25, "time": 0.55},
    {"rho": 0.5, "time": 0.48},
    {"time": 0.5},
    {"time": 0.7},
    {"steps": 400},
    {"steps": 1600},
    {"width": 768},
    {"lr": 0.001},
    {"aspect": 1.0},
    {"strides": (4, 8, 16)},
    {"image_size": 320},
    {"image_size": 448},
)


def ablation(args):
    """Print what each change of the default does, then what a choice among them can be trusted for.

    Leave one set out: the change of the best mean of image AUROC and AUPRO over all categories but
    one, and its metrics on that one.
    """
    names = [" ".join(f"{k}={v}" for k, v in c.items()) or "the default" for c in ABLATION]
    measured = {}  # (category, change): metrics, means over seeds
    categories = categories_in(args.data)
    for category in categories:  # a choice needs both of its metrics
        kinds = {item.kind == "good" for item in category.test}
        if len(kinds) < 2 or any(item.masks is None for item in category.test):
            raise InputError(f"{category.name}: give good and defective test images, and masks")
    for category in categories:
        table, samples = {}, {}
        for name, changes in zip(names, ABLATION, strict=True):
            recipe = replace(Recipe(), **changes)
            features = tuple(getattr(recipe, setting) for setting in FEATURES)
            samples.setdefault(features, {})[name] = recipe
        for recipes in samples.values():  # one extraction for all that share it
            sample = read_sample(category, next(iter(recipes.values())), args.device)
            table |= flow_rows(sample, recipes, args.seeds)
        evaluate.print_table(COLUMNS, table_of(category, {name: table[name] for name in names}))
        for name in names:
            rows = table[name]
            measured[category.name, name] = {k: np.mean([r[k] for r in rows]) for k in METRICS}
    left_out = leave_one_out(sorted({category for category, _ in measured}), names, measured)
    if left_out:
        evaluate.print_table(("left_out", "chosen_on_the_others", *METRICS), left_out)


def leave_one_out(categories, names, measured):
    """For each category the change that is best on all others, and its metrics there; their mean.

    measured: {(category, change): {metric: percent}}. None if there are not two categories.
    """
    if len(categories) < 2:
        return None
    rows = []
    for left in categories:

        def merit(name, left=left):
            others = [measured[c, name] for c in categories if c != left]
            return np.mean([row["image_auroc"] + row["aupro"] for row in others])

        best = max(names, key=merit)
        rows.append({"left_out": left, "chosen_on_the_others": best, **measured[left, best]})
    mean = {name: np.mean([row[name] for row in rows]) for name in METRICS}
    return [*rows, {"left_out": "mean", "chosen_on_the_others": None, **mean}]


def few(args):
    """Print WT-Flow trained on n of a category's good images, other ones for each seed.

    For each n up to all that there are.
    """
    for category in categories_in(args.data):
        sample = read_sample(category, Recipe(), args.device)
        table = {}
        for n in args.images:
            if n > len(sample.train):
                print(f"{category.name}: has {len(sample.train)} images, not {n}", file=sys.stderr)
                continue
            table[f"{n} images"] = []
            for seed in args.seeds:
                generator = torch.Generator().manual_seed(seed)
                chosen = torch.randperm(len(sample.train), generator=generator)[:n].sort().values
                part = sample._replace(train=sample.train[chosen])
                table[f"{n} images"].append(timed(part, fit_flow, seed))
        evaluate.print_table(COLUMNS, table_of(category, table))


SPOILED = (0, 1, 5, 10)  # percent of the training images that are defective


def spoiled(args):
    """Print what defective images among the training images do: found by rank and by the tail, and
    after those that stand out are left out; "marked" is the share of them that stands out.

    They are moved there from the test images, drawn at random. Scores of the last row are those of
    a detector that is trained anew.
    """
    columns = ("category", "method", *METRICS, "fpr", "recall", "marked", "good_marked")
    for category in categories_in(args.data):
        sample = read_sample(category, Recipe(), args.device)
        named = {}
        for share in SPOILED:
            for seed in args.seeds:
                for name, row in rows_of_spoiled(sample, share, seed).items():
                    named.setdefault(f"{share} % spoiled, {name}", []).append(row)
        rows = [
            {**dict.fromkeys(columns), "category": category.name, "method": name}
            | mean_and_spread(rows)
            for name, rows in named.items()
        ]
        evaluate.print_table(columns, rows)


def rows_of_spoiled(sample, share, seed):
    """{"rank", "tail", "left out": metrics} of a Sample with `share` percent of defects added."""
    generator = torch.Generator().manual_seed(seed)
    items, n = sample.category.test, len(sample.train)
    bad = torch.tensor([j for j, item in enumerate(items) if item.kind != "good"])
    moved = bad[torch.randperm(len(bad), generator=generator)][: round(share / (100 - share) * n)]
    kept = [j for j in range(len(items)) if j not in moved]
    category = sample.category._replace(test=[items[j] for j in kept])
    sizes = [sample.sizes[j] for j in kept]
    good = torch.cat([sample.train, sample.test[moved]])
    order = torch.randperm(len(good), generator=generator)  # folds take images in turn
    own = sample._replace(category=category, train=good[order], test=sample.test[kept], sizes=sizes)
    detector = Detector(own.recipe).to(good.device)
    train.fit_detector(detector, own.train, seed)
    scores = detector.normal_scores.cpu().numpy()
    suspects = evaluate.fit_tail(scores).suspects
    marked = np.isin(np.arange(len(scores)), np.argsort(scores)[len(scores) - suspects :])
    is_bad = order.numpy() >= n
    of_bad = {"marked": 100 * marked[is_bad].mean() if share else None}
    found, good = detector.score(own.test), detector.normal_scores.cpu()
    rows = {"rank": measured(own, *found, good, "rank"), "tail": measured(own, *found, good)}
    rows["tail"] |= of_bad | {"good_marked": 100 * marked[~is_bad].mean()}
    if suspects:
        train.fit_detector(detector, own.train[~torch.from_numpy(marked)], seed)
    found, good = detector.score(own.test), detector.normal_scores.cpu()
    return rows | {"left out": measured(own, *found, good)}


# ---- 4. Speed ------------------------------------------------------------------------------------
BATCHES = (1, 16)


def milliseconds(f, device, repeats=15):
    """Median and interquartile range of f() in ms, after three warm-up calls.

    Calls stop after 10 s: one that takes longer is timed once, without a warm-up.
    """
    times = []
    while len(times) < repeats + 3 and sum(times) < 1e4:
        began = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    low, median, high = np.percentile(times[3:] or times[-1:], (25, 50, 75))
    return median, high - low


def count(module):
    return sum(p.numel() for p in module.parameters())


def peak_gib(device):
    """Peak memory of this process, or what it had of a GPU's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@torch.enable_grad()
def random_detector(recipe, device):
    """A detector fitted to noise: for timing alone."""
    detector = Detector(replace(recipe, steps=1, folds=0)).to(device)
    shape = (2, 3, recipe.image_size, recipe.image_size)
    train.fit_detector(detector, detector.features(torch.randint(0, 255, shape, dtype=torch.uint8)))
    return detector


def stages(detector, images):
    """(name, function without arguments, parameters) of each stage of the arrow."""
    features = detector.features(images)
    square = detector.gaussian.squared_distance(detector.residual(features))
    size = detector.recipe.image_size
    field, total = count(detector.field), count(detector.extractor) + count(detector.field)
    rows = [
        (f"images to maps, {size} px", lambda: detector(images), total),
        ("  extractor", lambda: detector.features(images), count(detector.extractor)),
        ("  whitening, one step, residual", lambda: detector.residual(features), field),
        ("  the same, Gaussian, map, score", lambda: detector.score(features), field),
        ("  map and score", lambda: wtflow.map_and_score(square), 0),
    ]
    if detector.device.type == "cuda":
        fast, flow = reloaded(detector), evaluate.captured(detector.residual, features)
        rows += [
            (f"images to maps, {size} px, CUDA graphs", lambda: fast(images), total),
            ("  whitening, one step, residual, CUDA graph", lambda: flow(features), field),
        ]
    return rows


def reloaded(detector):
    """What load_model gives of a detector: on a GPU it runs as CUDA graphs."""
    detector.reading = evaluate.Reading()  # what is timed has seen no files
    with tempfile.TemporaryDirectory() as folder:
        evaluate.save_model(Path(folder, "model.pt"), detector)
        return evaluate.load_model(Path(folder, "model.pt"), detector.device)


def beside_a_busy_process(detector, rounds=5):
    """Milliseconds of 20 training steps alone, and beside a process that uses all of a core.

    Medians of alternating rounds.
    """
    detector = Detector(replace(detector.recipe, steps=20)).to(detector.device)
    features = torch.randn(8, detector.feature_mean.numel(), 16, 16, device=detector.device)
    detector.fit_whitening(features)
    alone, beside = [], []
    for _ in range(rounds):
        for times, busy in ((alone, False), (beside, True)):
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
            try:
                began = time.perf_counter()
                train.train_field(detector, features)
                times.append(1000 * (time.perf_counter() - began))
            finally:
                if other is not None:
                    other.kill()
                    other.wait()
    return np.median(alone), np.median(beside)


def speed(args):
    """Print milliseconds at batch 1 and 16, beside FLOPs / (the matrix rate of this run)."""
    alone, beside = beside_a_busy_process(
        random_detector(replace(Recipe(), image_size=256), args.device)
    )
    with torch.no_grad():
        stage_table(args.device)
        peers(args.device)
        files(args.device)
    print(
        f"20 training steps: {alone:.0f} ms alone, {beside:.0f} ms beside a busy process, "
        f"{beside / alone:.1f} times"
    )


def peers(device, n=100):
    """Print WT-Flow beside other detectors: PatchCore and PaDiM on the same features.

    Training from features of n images of noise; milliseconds from images uint8 on the host to maps
    of their size and scores on the host. On a GPU WT-Flow as loaded and EfficientAD are CUDA
    graphs. EfficientAD has random weights: its time is all that is measured.
    """
    net, table = Detector(USUAL).to(device), []
    generator = torch.Generator().manual_seed(0)
    shape = (n, 3, *wtflow.image_shape(USUAL))
    images = torch.randint(0, 255, shape, dtype=torch.uint8, generator=generator)
    sample = Sample(None, USUAL, net.features(images), None, [])
    shape = (max(BATCHES), 3, 256, 256)  # all that EfficientAD takes
    squares = torch.randint(0, 255, shape, dtype=torch.uint8, generator=generator)

    def add(name, arrow, kept, train_s=None, images=images):
        row = {"method": name, "train_s": train_s, "mib": mib(kept)}

        def whole(x):
            maps, scores, *_ = map(torch.as_tensor, arrow(x))
            return F.interpolate(maps[:, None], x.shape[2:], mode="bilinear").cpu(), scores.cpu()

        for batch in BATCHES:
            x = images[:batch]
            median, _ = milliseconds(lambda x=x: whole(x), net.device)
            row[f"ms_per_image_batch_{batch}"] = median / batch
        table.append(row)

    for name, fit in {"WT-Flow": fit_flow, "v = 0": fit_untrained, **OTHERS}.items():
        began = time.perf_counter()
        with torch.enable_grad():
            score, kept, *_ = fit(sample, 0)
        seconds = time.perf_counter() - began
        add(name, lambda x, score=score: score(net.features(x)), kept, seconds)
        if name == "WT-Flow":
            detector = reloaded(score.__self__)
    if device.type == "cuda":
        fast = detector.state_dict().values()
        add("WT-Flow as loaded: CUDA graphs", lambda x: detector.score(detector.features(x)), fast)
    elif find_spec("onnxruntime") and find_spec("onnxscript"):
        run, size = onnx_session(detector)
        add("WT-Flow in ONNX Runtime", run, [torch.empty(size, dtype=torch.uint8)])
    for name in EFFICIENT_AD:
        other = EfficientAD(name).to(device, memory_format=torch.channels_last).eval()
        if device.type == "cuda":
            other = other.half()
        runs = {}
        for batch in BATCHES:
            x = squares[:batch].to(device)
            other(x)  # the first call of a network sets up what a graph cannot
            runs[batch] = evaluate.captured(other, x) if device.type == "cuda" else other

        def arrow(x, runs=runs):
            return runs[len(x)](x.to(device))

        add(name, arrow, other.state_dict().values(), images=squares)
    evaluate.print_table([*table[0]], table)


def onnx_session(detector):
    """(images -> what the exported program of a detector gives, its bytes)."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path, known = Path(folder, "model.onnx"), evaluate.calibration_of(detector, 1.0, "tail")
        with contextlib.redirect_stdout(io.StringIO()):
            evaluate.export_model(path, detector, known)
        session = onnxruntime.InferenceSession(path)
        return lambda x: session.run(None, {"images": x.numpy()}), path.stat().st_size


EFFICIENT_AD = ("EfficientAD-S", "EfficientAD-M")


class EfficientAD(torch.nn.Module):
    """EfficientAD (Batzner et al. 2024), tables 6 to 8, 256 px, without padding, as in [anomalib].

    Images uint8 (B, 3, 256, 256) -> maps (B, 256, 256) and scores (B,). Weights are random.
    """

    def __init__(self, name):
        super().__init__()
        pdn = pdn_small if name == "EfficientAD-S" else pdn_medium
        self.teacher, self.student = pdn(384), pdn(768)
        layers, c_in = [], 3
        for c, kernel, stride in ((32, 4, 2), (32, 4, 2), (64, 4, 2), (64, 4, 2), (64, 4, 2)):
            layers += [torch.nn.Conv2d(c_in, c, kernel, stride, 1), torch.nn.ReLU()]
            c_in = c
        layers.append(torch.nn.Conv2d(64, 64, 8))
        for size in (3, 8, 15, 32, 63, 127):
            layers += [torch.nn.Upsample(size, mode="bilinear"), torch.nn.Conv2d(64, 64, 4, 1, 2)]
            layers.append(torch.nn.ReLU())
        layers += [torch.nn.Upsample(56, mode="bilinear"), torch.nn.Conv2d(64, 64, 3, 1, 1)]
        layers += [torch.nn.ReLU(), torch.nn.Conv2d(64, 384, 3, 1, 1)]
        self.autoencoder = torch.nn.Sequential(*layers)

    def forward(self, images):
        x = images.to(next(self.parameters()).dtype, memory_format=torch.channels_last) / 255
        teacher, autoencoder = self.teacher(x), self.autoencoder(x)
        of_teacher, of_autoencoder = self.student(x).chunk(2, 1)
        of_student = (teacher - of_teacher).square().mean(1, keepdim=True)
        y = (of_student + (autoencoder - of_autoencoder).square().mean(1, keepdim=True)) / 2
        y = F.interpolate(F.pad(y, (4, 4, 4, 4)), images.shape[2:], mode="bilinear")[:, 0].float()
        return y, y.amax((1, 2))


def pdn_small(channels):
    """Patch description network of EfficientAD-S."""
    conv, pool, relu = torch.nn.Conv2d, torch.nn.AvgPool2d(2), torch.nn.ReLU()
    first = (conv(3, 128, 4), relu, pool, conv(128, 256, 4), relu, pool)
    return torch.nn.Sequential(*first, conv(256, 256, 3), relu, conv(256, channels, 4))


def pdn_medium(channels):
    """Patch description network of EfficientAD-M."""
    conv, pool, relu = torch.nn.Conv2d, torch.nn.AvgPool2d(2), torch.nn.ReLU()
    first = (conv(3, 256, 4), relu, pool, conv(256, 512, 4), relu, pool)
    then = (conv(512, 512, 1), relu, conv(512, 512, 3), relu, conv(512, channels, 4), relu)
    return torch.nn.Sequential(*first, *then, conv(channels, channels, 1))


def files(device, n=64, side=1024):
    """Print milliseconds an image from file to verdict: read, one by one, in a folder of n."""
    detector, table = reloaded(random_detector(Recipe(), device)), []
    known, shape = evaluate.calibrate(np.array([1.0, 1.1, 1.2])), wtflow.image_shape(Recipe())
    part = train.washer(np.random.default_rng(0), side)
    image = Image.fromarray((np.clip(part, 0, 1) * 255).astype(np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        for suffix in ("png", "jpg", "bmp"):
            path = Path(folder, f"0.{suffix}")
            image.save(path)
            steps = {
                "read_ms": lambda path=path: evaluate.read_resized(path, shape, evaluate.Reading()),
                "score_ms": lambda path=path: evaluate.score(detector, path),
                "folder_ms": lambda path=path: [
                    *evaluate.predictions_of(detector, n * [path], known)
                ],
            }
            row = {"file": f"{suffix}, {side} x {side}"}
            row |= {name: milliseconds(f, device, 5)[0] for name, f in steps.items()}
            table.append(row | {"folder_ms": row["folder_ms"] / n})
    evaluate.print_table([*table[0]], table)


@contextlib.contextmanager
def threads(count):
    """With another number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def stage_table(device):
    """Print the milliseconds of each stage of the arrow."""
    n = 2048 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device)
    with wtflow.autocast(device):
        a = a @ a / n  # in the type that products have here
        rate = 2 * n**3 / milliseconds(lambda: a @ a, device)[0]  # FLOPs per ms
    table = []

    def add(name, f, parameters, batch):
        # one: without wtflow.parallel_map, as operations are counted in this thread alone
        with FlopCounterMode(display=False) as counter, threads(1):
            f()
        median, spread = milliseconds(f, device)
        table.append({"stage": name, "batch": batch, "ms": median, "spread": spread})
        table[-1]["images_per_s"] = 1000 * batch / median
        table[-1]["parameters_M"] = parameters / 1e6
        operations = counter.get_total_flops()  # none are counted in a CUDA graph
        table[-1]["x_bound"] = median * rate / operations if operations else None

    for size in (256, 512):
        detector = random_detector(replace(Recipe(), image_size=size), device)
        for batch in BATCHES:
            images = torch.randint(0, 255, (batch, 3, size, size), dtype=torch.uint8)
            for name, f, parameters in stages(detector, images):
                add(name, f, parameters, batch)
    ours = peak_gib(device)
    unet = wtflow.UNetField(1024, PAPER["width"]).to(device).eval()
    for batch in BATCHES:
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
        f"peak memory {ours:.1f} GiB ({peak_gib(device):.1f} GiB with the U-Net)"
    )


def memory(args):
    """Print the peak resident size of the commands that train on n images, and that score them.

    Each is a process of its own. The images are links to one of noise, of 320 x 320 pixels.
    """
    rows = []
    for n in args.images:
        with tempfile.TemporaryDirectory() as folder:
            good = Path(folder, "parts/noise/train/good")
            good.mkdir(parents=True)
            pixels = np.random.default_rng(0).integers(0, 256, (320, 320, 3), np.uint8)
            Image.fromarray(pixels).save(good / "0.png")
            for k in range(1, n):
                (good / f"{k}.png").symlink_to(good / "0.png")
            out = Path(folder, "runs")
            train = ("train.py", "--data", good.parents[1], "--out", out, "--steps", "5")
            model = out / "parts/noise/model.pt"
            scores = ("evaluate.py", "--model", model, "--image", good)
            row = {"images": n, "train_mib": peak_of(train), "score_mib": peak_of(scores)}
            rows.append(row)
    evaluate.print_table([*rows[0]], rows)


def peak_of(command):
    """Peak resident size in MiB of a command of this repository. Raises InputError if it fails."""
    root = Path(__file__).resolve().parents[1]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, root / command[0], *command[1:]], **silent)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        code = os.waitstatus_to_exitcode(status)
        raise InputError(f"{command[0]}: ended with {code}: run it by itself to see why")
    return usage.ru_maxrss / 1024


# ---- 5. The command ------------------------------------------------------------------------------
IMAGES = {"memory": (200, 1600), "few": (25, 50, 100, 200, 600)}  # what --images is by default


def main(argv=None):
    parser = evaluate.OneLineParser(
        prog="python -m tests.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    commands = {"speed": speed, "memory": memory, "compare": compare}
    commands |= {"rho": rho, "ablation": ablation, "few": few, "spoiled": spoiled}
    add("what", choices=commands)
    add("--data", nargs="+", default=[], metavar="DIR", help="data sets or categories")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    numbers = "; ".join(f"{what}: {' '.join(map(str, n))}" for what, n in IMAGES.items())
    add("--images", nargs="+", type=int, metavar="N", help=f"how many (default: {numbers})")
    add("--released", action="store_true", help="rho: under the released recipe, width 64")
    args = parser.parse_args(argv)
    args.device = evaluate.pick_device(args.device)
    args.images = args.images or IMAGES.get(args.what)
    if min(args.images or [1]) < 1:
        raise InputError(f"--images {min(args.images)}: give at least 1")
    if args.what not in ("speed", "memory") and not args.data:
        raise InputError(f"{args.what}: give --data, the data sets to measure on")
    commands[args.what](args)


if __name__ == "__main__":
    evaluate.exit_cleanly(main)
