"""The numbers that the READMEs quote, each from one command.

    python -m tests.benchmark compare --data D [D ..]  couplings and other detectors, side by side
    python -m tests.benchmark rho --data D [D ..]      worst transport of any rho, rFM, OT-CFM
    python -m tests.benchmark ablation --data D [D ..] what each setting of the recipe is worth
    python -m tests.benchmark few --data D [D ..]      what fewer training images do
    python -m tests.benchmark spoiled --data D [D ..]  what defects among the training images do
    python -m tests.benchmark speed                    milliseconds of each stage

Metrics are image AUROC / pixel AUROC / AUPRO in percent, mean +- standard deviation over --seeds;
fpr and recall are those at the threshold for 1 % false positives. Features are extracted once;
every method has the same ones, but PatchCore and PaDiM have no whitening and, with "256 px", a grid
of their own.
"""

import argparse
import os
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in evaluate.py

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

import evaluate
import train
import wtflow
from wtflow import PAPER, Detector, InputError, Recipe

METRICS = ("image_auroc", "pixel_auroc", "aupro")


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


def samples_of(args, recipe):
    """The Sample of each category in --data. Raises InputError for one that cannot be measured."""
    found = [category for root in args.data for category in evaluate.read_dataset(root)[1]]
    names = [category.name for category in found]
    for category in found:
        name, kinds = category.name, {item.kind == "good" for item in category.test}
        if names.count(name) > 1:
            raise InputError(f"--data: two categories are called {name}: give one of them")
        if len(kinds) < 2 or any(item.masks is None for item in category.test):
            raise InputError(f"{name}: give good and defective test images, and masks")
    return (read_sample(category, recipe, args.device) for category in found)


def read_sample(category, recipe, device="cpu"):
    """The features of a category."""
    detector = evaluate.new_detector(category.train, recipe, device=device)
    good, _ = evaluate.extract_good(detector, category.train)
    test, sizes, _ = evaluate.extract(detector, [item.path for item in category.test])
    return Sample(category, detector.recipe, good, test, sizes)


def rows_of(sample, fit, seeds):
    """A row for each seed of a method: fit(sample, seed) -> (score, scores of good images).

    score: features -> maps (n, h, w) and image scores (n,). fpr and recall need scores of good
    images, to set the threshold with; PatchCore and PaDiM have None.
    """
    rows = []
    for seed in seeds:
        began = time.perf_counter()
        score, good = fit(sample, seed)
        fitted = time.perf_counter()
        maps, scores = (y.cpu() for y in score(sample.test))
        spent = 1000 * (time.perf_counter() - fitted) / len(sample.test)
        row = measured(sample, maps, scores, good)
        rows.append(row | {"train_s": fitted - began, "ms_per_image": spent})
    return rows


def measured(sample, maps, scores, good, how="tail"):
    """METRICS of the test images of a sample; fpr and recall too, if there are good scores."""
    known = evaluate.calibrate((scores if good is None else good.cpu()).numpy(), how=how)
    found = evaluate.classify(scores.numpy(), known)
    row = evaluate.measure(sample.category, (maps, found, sample.sizes))
    names = METRICS if good is None else (*METRICS, "fpr", "recall")
    return {name: row[name] for name in names}


def print_rows(category, named_rows):
    """Print {method: [row of each seed]} as a table, mean +- standard deviation."""
    columns = list(dict.fromkeys(name for rows in named_rows.values() for name in rows[0]))
    table = []
    for method, rows in named_rows.items():
        line = dict.fromkeys(columns) | {"category": category.name, "method": method}
        for name in rows[0]:
            values = [row[name] for row in rows if row[name] is not None]  # no masks: none
            line[name] = f"{np.mean(values):.2f}" if values else ""
            if len(values) > 1 and name in METRICS:
                line[name] += f" +- {np.std(values, ddof=1):.2f}"
        table.append(line)
    evaluate.print_table(("category", "method", *columns), table)


# ---- 2. WT-Flow, the same with nothing learnt, and other detectors on the same network -----------
def fit_flow(sample, seed, **changes):
    """WT-Flow, with changes of the sample's recipe."""
    detector = Detector(replace(sample.recipe, **changes)).to(sample.train.device)
    train.fit_detector(detector, sample.train, seed)
    return detector.score, detector.normal_scores


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
    return detector.score, train.fit_gaussians(detector, sample.train)[1]


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

    return score, None


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

    return score, None


# ---- 3. Side by side, and one setting at a time --------------------------------------------------
COUPLINGS = {
    "WT-Flow": {},
    "rFM": {"coupling": "independent"},
    "OT-CFM": {"coupling": "optimal"},
}
UNTRAINED = {f"v = 0, rho = {rho:g}": partial(fit_untrained, rho=rho) for rho in (0, 0.1, 0.5, 0.9)}
OTHERS = {
    "PatchCore 1 %": partial(fit_patchcore, share=0.01),
    "PatchCore 10 %": partial(fit_patchcore, share=0.1),
    "PaDiM": fit_padim,
}


def compare(args):
    """Print the couplings, the same score with nothing learnt and other detectors, by category.

    What the field adds is what is ahead of the best row with v = 0. PatchCore and PaDiM on what
    they are usually given, and on the images and the grid that WT-Flow has, but for the memory of
    10 %, which is slow to choose there.
    """
    for sample in samples_of(args, Recipe()):
        usual = read_sample(sample.category, USUAL, args.device)
        named = {
            k: rows_of(sample, partial(fit_flow, **v), args.seeds) for k, v in COUPLINGS.items()
        }
        named |= {name: rows_of(sample, fit, [0]) for name, fit in UNTRAINED.items()}
        for name, fit in OTHERS.items():
            seeds = [0] if fit is fit_padim else args.seeds
            named[f"{name}, 256 px"] = rows_of(usual, fit, seeds)
            if name != "PatchCore 10 %":
                named[name] = rows_of(sample, fit, seeds)
        print_rows(sample.category, named)


def time_at(ratio, rho):
    """The time at which x_t of worst(rho) has this ratio of noise to signal, on the shell (W8)."""
    noise = (1 - rho**2) ** 0.5
    return ratio / (noise + ratio * (1 + rho))


def rho(args):
    """Print worst transport of growing rho, rFM and OT-CFM, all at one ratio of noise to signal.

    With --released, the same couplings under the released recipe at a width that trains here.
    """
    ratio, base = 0.6 / 0.4, Recipe()  # that of rFM at the default's time
    couplings = {f"rho={r}": {"rho": r, "time": time_at(ratio, r)} for r in RHOS}
    couplings |= {name: COUPLINGS[name] for name in ("rFM", "OT-CFM")}
    if args.released:
        base = Recipe(**PAPER | {"backbone": base.backbone, "width": 64})
        couplings = {name: changes | {"time": 0.0} for name, changes in couplings.items()}
    for sample in samples_of(args, base):
        named = {
            k: rows_of(sample, partial(fit_flow, **v), args.seeds) for k, v in couplings.items()
        }
        print_rows(sample.category, named)


RHOS = (-0.5, 0.1, 0.25, 0.5, 0.9)
FEATURES = {"backbone", "image_size", "aspect", "strides", "spacing"}  # settings of the extractor
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
    metrics = {}  # {category: {change: {metric: mean over seeds}}}
    for sample in samples_of(args, Recipe()):
        named, category = {}, sample.category
        for changes in ABLATION:
            name = " ".join(f"{k}={v}" for k, v in changes.items()) or "the default"
            own, fit = sample, partial(fit_flow, **changes)
            if FEATURES & changes.keys():
                own = read_sample(category, replace(Recipe(), **changes), args.device)
                fit = fit_flow
            named[name] = rows_of(own, fit, args.seeds)
        print_rows(category, named)
        metrics[category.name] = {
            name: {k: np.mean([row[k] for row in rows]) for k in METRICS}
            for name, rows in named.items()
        }
    if len(metrics) > 1:
        evaluate.print_table(("left_out", "chosen_on_the_others", *METRICS), leave_one_out(metrics))


def leave_one_out(metrics):
    """For each category the change that is best on all others, and its metrics there; their mean.

    metrics: {category: {change: {metric: percent}}}.
    """
    rows = []
    for left, own in metrics.items():
        others = [changes for category, changes in metrics.items() if category != left]
        merit = {k: sum(m[k]["image_auroc"] + m[k]["aupro"] for m in others) for k in own}
        best = max(merit, key=merit.get)
        rows.append({"left_out": left, "chosen_on_the_others": best, **own[best]})
    mean = {name: np.mean([row[name] for row in rows]) for name in METRICS}
    return [*rows, {"left_out": "mean", "chosen_on_the_others": None, **mean}]


def few(args):
    """Print WT-Flow trained on n of a category's good images, other ones for each seed.

    For each n up to all that there are.
    """
    for sample in samples_of(args, Recipe()):
        named, most = {}, len(sample.train)
        for n in args.images:
            if n > most:
                print(f"{sample.category.name}: has {most} images, not {n}", file=sys.stderr)
                continue
            named[f"{n} images"] = []
            for seed in args.seeds:
                generator = torch.Generator().manual_seed(seed)
                chosen = torch.randperm(most, generator=generator)[:n].sort().values
                part = sample._replace(train=sample.train[chosen])
                named[f"{n} images"] += rows_of(part, fit_flow, [seed])
        print_rows(sample.category, named)


def spoiled(args):
    """Print what defective images among the training images do: found by rank and by the tail, and
    after those that stand out are left out; "marked" is the share of them that stands out.

    They are moved there from the test images, drawn at random. Scores of the last row are those of
    a detector that is trained anew.
    """
    for sample in samples_of(args, Recipe()):
        named = {}
        for share in (0, 1, 5, 10):  # percent of the training images that are defective
            for seed in args.seeds:
                for name, row in rows_of_spoiled(sample, share, seed).items():
                    named.setdefault(f"{share} % spoiled, {name}", []).append(row)
        print_rows(sample.category, named)


def rows_of_spoiled(sample, share, seed):
    """{"rank", "tail", "left out": metrics} of a Sample with `share` percent of defects added."""
    generator = torch.Generator().manual_seed(seed)
    items, n = sample.category.test, len(sample.train)
    bad = torch.tensor([j for j, item in enumerate(items) if item.kind != "good"])
    moved = bad[torch.randperm(len(bad), generator=generator)][: round(share / (100 - share) * n)]
    kept = [j for j in range(len(items)) if j not in moved]
    good = torch.cat([sample.train, sample.test[moved]])
    order = torch.randperm(len(good), generator=generator)  # folds take images in turn
    own = sample._replace(
        category=sample.category._replace(test=[items[j] for j in kept]),
        train=good[order],
        test=sample.test[kept],
        sizes=[sample.sizes[j] for j in kept],
    )
    score, scores = fit_flow(own, seed)
    found, scores = score(own.test), scores.cpu()
    suspects = evaluate.fit_tail(scores.numpy()).suspects
    rows = {how: measured(own, *found, scores, how) for how in ("rank", "tail")}
    marked = torch.zeros(len(good), dtype=torch.bool)
    marked[scores.argsort()[len(scores) - suspects :]] = True
    of_bad, of_good = (marked[part].double().mean().item() for part in (order >= n, order < n))
    rows["tail"] |= {"marked": 100 * of_bad if share else None, "good_marked": 100 * of_good}
    if suspects:
        score, scores = fit_flow(own._replace(train=own.train[~marked]), seed)
        found = score(own.test)
    return rows | {"left out": measured(own, *found, scores)}


# ---- 4. Speed ------------------------------------------------------------------------------------
BATCHES = (1, 16)


def milliseconds(f, device, repeats=15):
    """Median time of f() in ms, after three warm-up calls.

    Calls stop after 10 s: one that takes longer is timed once, without a warm-up.
    """
    times = []
    while len(times) < repeats + 3 and sum(times) < 1e4:
        began = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return np.median(times[3:] or times[-1:])


def random_detector(recipe, device):
    """A detector fitted to noise: for timing alone."""
    detector = Detector(replace(recipe, steps=1, folds=0)).to(device)
    shape = (2, 3, *wtflow.image_shape(recipe))
    train.fit_detector(detector, detector.features(torch.randint(0, 255, shape, dtype=torch.uint8)))
    return detector


def stages(detector, images):
    """{name: function without arguments} of the stages; on a GPU as CUDA graphs too."""
    features, size = detector.features(images), f"{images.shape[-1]} px"
    named = {
        f"images to maps, {size}": lambda: detector(images),
        f"  extractor, {size}": lambda: detector.features(images),
        f"  whitening, one step, residual, {size}": lambda: detector.residual(features),
        f"  the same, Gaussian, map, score, {size}": lambda: detector.score(features),
    }
    if detector.device.type == "cuda":
        fast, flow = reloaded(detector), evaluate.captured(detector.residual, features)
        named[f"images to maps, {size}, CUDA graphs"] = lambda: fast(images)
        named[f"  whitening, one step, residual, {size}, CUDA graph"] = lambda: flow(features)
    return named


def reloaded(detector):
    """What load_model gives of a detector: on a GPU it runs as CUDA graphs."""
    detector.reading = evaluate.Reading()  # what is timed has seen no files
    with tempfile.TemporaryDirectory() as folder:
        evaluate.save_model(Path(folder, "model.pt"), detector)
        return evaluate.load_model(Path(folder, "model.pt"), detector.device)


def speed(args):
    """Print milliseconds of each stage at batch 1 and 16."""
    table, device = {}, args.device
    unet = wtflow.UNetField(1024, PAPER["width"]).to(device).eval()
    for batch in BATCHES:
        x_0 = torch.randn(batch, 1024, 8, 8, device=device)
        timed = {"the released U-Net": lambda x_0=x_0: wtflow.euler(unet, x_0)}
        for size in (256, 512):
            images = torch.randint(0, 255, (batch, 3, size, size), dtype=torch.uint8)
            timed |= stages(random_detector(replace(Recipe(), image_size=size), device), images)
        with torch.no_grad():
            for name, f in timed.items():
                row = table.setdefault(name, {"milliseconds": name})
                row[f"batch {batch}"] = milliseconds(f, device)
    evaluate.print_table([*row], [*table.values()])


# ---- 5. The command ------------------------------------------------------------------------------
def main(argv=None):
    parser = evaluate.OneLineParser(
        prog="python -m tests.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    commands = {"compare": compare, "rho": rho, "ablation": ablation, "few": few}
    commands |= {"spoiled": spoiled, "speed": speed}
    add("what", choices=commands)
    add("--data", nargs="+", default=[], metavar="DIR", help="data sets or categories")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: 0 1 2)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    images, text = [25, 50, 100, 200, 600], "few: how many (default: 25 50 100 200 600)"
    add("--images", nargs="+", type=int, default=images, metavar="N", help=text)
    add("--released", action="store_true", help="rho: under the released recipe, width 64")
    args = parser.parse_args(argv)
    args.device = evaluate.pick_device(args.device)
    if min(args.images) < 1:
        raise InputError(f"--images {min(args.images)}: give at least 1")
    if args.what != "speed" and not args.data:
        raise InputError(f"{args.what}: give --data, the data sets to measure on")
    commands[args.what](args)


if __name__ == "__main__":
    evaluate.exit_cleanly(main)
