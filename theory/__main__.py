"""python -m theory [--out DIR] [--data D ..]: all claims, predicted beside measured; the figures.

With --data: the claims' assumptions beside the features of data sets instead.
"""

import argparse
import math
from pathlib import Path

import torch
from PIL import Image

import evaluate
from theory import (
    concentration,
    draw,
    extremes,
    learned_field,
    local_transport,
    one_step,
    real_features,
    singularity,
    unconditional_field,
    worst_transport,
)

CLAIMS = (
    singularity,
    concentration,
    worst_transport,
    local_transport,
    unconditional_field,
    one_step,
    extremes,
)


def line(row):
    """A Row as a line of the table; the relative error of a predicted 0 or nan is a dash."""
    numbers = f"{row.predicted:11.5g} {row.measured:11.5g}"
    known = row.predicted != 0 and not math.isnan(row.predicted)
    relative = f"{abs(row.measured / row.predicted - 1):10.1e}" if known else f"{'-':>10}"
    return f"{row.claim:5} {row.what:70} {numbers} {relative} {row.se:10.1e}"


def print_head():
    """The head of a table, on stdout."""
    head = f"{'predicted':>11} {'measured':>11} {'rel. error':>10} {'std. error':>10}"
    print(f"{'claim':5} {'what':70} {head}")


def print_rows(rows):
    """Rows of a table, on stdout, each as soon as it is known."""
    for row in rows:
        print(line(row), flush=True)


def save_figures(out, figures):
    """Save {name: figure} in the folder `out`; their paths, in that order."""
    paths = []
    for name, figure in figures.items():
        path = out / f"{name}.png"
        figure.savefig(path, dpi=80)
        with Image.open(path) as image:  # colours enough for lines, at a third of the bytes
            small = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        small.save(path, optimize=True)
        paths.append(path)
    return paths


def main(arguments=None):
    """The command line; arguments: a list of words, by default those of the process."""
    what = "a table of all claims, predicted beside measured, and the figures"
    parser = argparse.ArgumentParser(prog="python -m theory", description=what)
    add = parser.add_argument
    out = Path("theory-figures")
    add("--out", type=Path, default=out, help="folder for the PNG files [%(default)s]")
    text = "data sets: the assumptions beside their features instead [none]"
    add("--data", type=Path, nargs="+", default=[], metavar="D", help=text)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.data:
        categories = [c for root in args.data for c in evaluate.read_dataset(root)[1]]
        measured = []
        print_head()
        for category in (*categories, None):
            measured.append(
                real_features.measure(category) if category else real_features.control()
            )
            print_rows(real_features.table(measured[-1]))
        figures = {"real_features": draw.real_features_figure(measured)}
    else:
        torch.set_num_threads(1)  # matrices this small run slower on more
        learnt = learned_field.run()
        print_head()
        for claims in CLAIMS:
            print_rows(claims.table())
        print_rows(learned_field.table(*learnt))
        figures = draw.figures(*learnt)
    print(f"figures: {', '.join(map(str, save_figures(args.out, figures)))}")


if __name__ == "__main__":
    evaluate.exit_cleanly(main)
