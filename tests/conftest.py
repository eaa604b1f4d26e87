"""Shared by all tests: the import path, hypothesis profiles, a tiny data set like MVTec AD."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# The same sums here and in the subprocesses.
torch.set_num_threads(1)
MODULES = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": MODULES}

settings.register_profile("same", derandomize=True, deadline=None, database=None)  # every time
settings.register_profile("random", deadline=None, database=None)  # anew, or by --hypothesis-seed
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(path, **options)


def picture(seed, size=(40, 48), defect=False):
    """A grey striped image with a little grain, a bright square as its defect, and the mask."""
    rng = np.random.default_rng(seed)
    grey = 110 + 40 * np.sin(np.arange(size[1]) / 2)[None] + rng.normal(0, 4, size)
    mask = np.zeros(size, bool)
    if defect:
        mask[10:22, 12:26] = True
        grey[mask] = 250
    return np.clip(np.repeat(grey[..., None], 3, 2), 0, 255), mask


def make_mvtec(root, categories=("bolt",), train=6, good=3, bad=3):
    """A data set in the layout of MVTec AD under `root`; returns root."""
    for c, name in enumerate(categories):
        for k in range(train + good):
            part = "train" if k < train else "test"
            save(root / name / part / f"good/{k:03d}.png", picture(100 * c + k)[0])
        for k in range(bad):
            image, mask = picture(50 + 100 * c + k, defect=True)
            save(root / name / f"test/dent/{k:03d}.png", image)
            save(root / name / f"ground_truth/dent/{k:03d}_mask.png", mask * 255)
    return root


def run(command, *args):
    """A command of the project in this process: returncode, stdout, stderr as a shell sees them."""
    import evaluate
    import train
    from tests import benchmark

    commands = {"train.py": train, "evaluate.py": evaluate, "benchmark.py": benchmark}
    main = commands[command].main
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            evaluate.exit_cleanly(lambda: main([str(a) for a in args]))
        except SystemExit as e:
            code = e.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def shell(*args, stdout=subprocess.PIPE):
    """Python with these arguments as a subprocess."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
        env=ENVIRONMENT,
    )


def succeeds(result):
    assert result.returncode == 0, result.stderr
    return result


def fails(result, *words):
    """Bad input: exit code 2, one line on stderr that holds `words`, no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, (result.returncode, result.stderr)
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_mvtec(tmp_path_factory.mktemp("data") / "tiny", ("bolt", "nut"))


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """The folder of a finished run on both categories of `data`, and what it printed."""
    out = tmp_path_factory.mktemp("trained")
    options = ("--steps", 4, "--batch", 64, "--image-size", 64)
    result = succeeds(run("train.py", "--data", data, "--out", out, *options))
    return out / "tiny", result
