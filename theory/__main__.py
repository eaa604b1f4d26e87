"""python -m theory [--out DIR]: one table of every claim, predicted beside measured, and one PNG per claim family."""
import argparse
from pathlib import Path

import torch
from PIL import Image

from theory import concentration, learned_field, singularity, worst_transport


def main():
    parser = argparse.ArgumentParser(prog="python -m theory", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--out", type=Path, default=Path("theory-figures"), help="folder for the PNG files [%(default)s]")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)                                # matrices this small run slower on more
    learnt = learned_field.run()
    print(f"{'claim':5} {'what':66} {'predicted':>11} {'measured':>11} {'rel. error':>10} {'std. error':>10}")
    for module, given in ((singularity, ()), (concentration, ()), (worst_transport, ()), (learned_field, learnt)):
        for row in module.table(*given):
            relative = abs(row.measured / row.predicted - 1) if row.predicted else float("nan")
            print(f"{row.claim:5} {row.what:66} {row.predicted:11.5g} {row.measured:11.5g} {relative:10.1e} {row.se:10.1e}".replace("nan", "  -"))
    figures = {"singularity": singularity.figure(), "concentration": concentration.figure(), "worst_transport": worst_transport.figure(),
               "fields": worst_transport.figure_fields(), "learned_field": learned_field.figure(*learnt)}
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=80)
        with Image.open(out / f"{name}.png") as image:      # 64 colours are enough for lines and a third of the bytes
            image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(out / f"{name}.png", optimize=True)
    print(f"figures: {', '.join(f'{out / name}.png' for name in figures)}")


if __name__ == "__main__":
    main()
