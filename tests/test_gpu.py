"""On a GPU; skipped where there is none: same arithmetic, one CUDA graph, a whole run, torchrun."""

import pytest
import torch
from conftest import ROOT, run, shell, succeeds
from test_wtflow import fitted

import evaluate
import wtflow
from wtflow import Recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SMALL = Recipe(image_size=64, width=64, steps=20, batch=64)


def images(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 64, 64), dtype=torch.uint8, generator=generator)


def relative(a, b):
    a, b = a.cpu().float(), b.cpu().float()
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture
def full_precision(monkeypatch):
    """Without types of 16 bits and TF32, on either device."""
    monkeypatch.setattr(wtflow, "autocast", lambda d, _=None: torch.autocast(d.type, enabled=False))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def test_a_model_scores_as_on_the_cpu(full_precision):
    detector, _ = fitted(SMALL, n=12)
    maps, scores = detector(images(4, seed=1))
    on_gpu = detector.to("cuda")(images(4, seed=1))
    assert relative(on_gpu[0], maps) < 1e-3 and relative(on_gpu[1], scores) < 1e-3


def test_gaussians_are_as_on_the_cpu(full_precision):
    """Given the field: mean, covariance and leave-one-out scores."""
    detector, good = fitted(SMALL, n=12)
    features = detector.features(good)
    kept = detector.fit_gaussian(features), detector.gaussian.mean, detector.gaussian.W
    detector.to("cuda")
    there = detector.fit_gaussian(features.cuda()), detector.gaussian.mean, detector.gaussian.W
    for a, b in zip(there, kept, strict=True):
        assert relative(a, b) < 1e-2


def test_sixteen_bits_hardly_move_scores():
    """Measured: 0.003."""
    detector, _ = fitted(SMALL, n=12, device="cuda")
    maps, scores = detector(images(4, seed=1))
    on_cpu = detector.to("cpu")(images(4, seed=1))
    assert relative(maps, on_cpu[0]) < 0.01 and relative(scores, on_cpu[1]) < 0.01


def test_features_have_float16():
    """Measured: 0.003; bfloat16 has three bits less, and whitening enlarges what that loses."""
    detector, _ = fitted(SMALL, n=12)
    features = detector.features(images(4, seed=1))
    on_gpu = detector.to("cuda").features(images(4, seed=1))
    assert relative(on_gpu, features) < 0.01


def test_a_cuda_graph_computes_the_same():
    detector, _ = fitted(SMALL, n=12, device="cuda")
    few = images(1, seed=1).cuda()
    graph = torch.cuda.make_graphed_callables(detector.forward, (few.clone(),))
    for x in (few, images(1, seed=2).cuda()):
        for a, b in zip(graph(x), detector(x), strict=True):
            assert torch.equal(a, b)


def test_a_run_on_a_gpu(data, tmp_path):
    """Trained there and resumed; its model scores there and on the CPU."""
    options = ("--data", data / "bolt", "--steps", 20, "--image-size", 64, "--device", "cuda")
    succeeds(run("train.py", *options, "--out", tmp_path))
    model = tmp_path / "tiny/bolt/model.pt"
    succeeds(run("train.py", *options, "--out", tmp_path, "--resume"))
    for device in ("cuda", "cpu"):
        detector = evaluate.load_model(model, device)
        result = evaluate.score(detector, data / "bolt/test/dent/000.png")
        assert result.verdict == "defect"


def test_torchrun_shares_the_categories(data, tmp_path):
    """Two processes; where there is one GPU, both on it."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    options = ("--data", data, "--steps", 20, "--image-size", 64, "--out", tmp_path)
    result = succeeds(shell(*launch, ROOT / "train.py", *options, "--device", "cuda"))
    assert "bolt" in result.stdout and "nut" in result.stdout
