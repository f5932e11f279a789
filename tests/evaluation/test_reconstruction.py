import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torchmetrics.image import StructuralSimilarityIndexMeasure

from maskgit_pl.data import Batch
from maskgit_pl.evaluation import TokenizerOptions, evaluate_tokenizer, train_classifier
from maskgit_pl.evaluation.evaluator import FeatureMetrics
from maskgit_pl.evaluation.extractors import extract
from maskgit_pl.evaluation.options import ClassifierConfig
from maskgit_pl.evaluation.reconstruction import measure_reconstruction, open_lpips
from maskgit_pl.evaluation.reference import Reference
from maskgit_pl.pretrained.networks import load_tokenizer
from tests.evaluation.feature_networks import distances, few, open_shards, pictures


def batch_of(images: torch.Tensor, valid: list[bool] | None = None, first: int = 0) -> Batch:
    count = torch.arange(first, first + len(images))
    return Batch(images, count, count, count, count, torch.tensor(valid or [True] * len(images)))


class Brightness(torch.nn.Module):
    """Encodes a 1 x 1 px image to its value / 4 and decodes it to that, times a factor."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))
        self.config = SimpleNamespace(codebook_size=64)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return (images * 255 / 4).round().long().flatten(1)

    def decode(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return (tokens.float() * 4 / 255).reshape(-1, 1, *grid) * self.factor


def tokenizer(factor: float = 1.0) -> SimpleNamespace:
    return SimpleNamespace(network=Brightness(factor), image_size=1, grid=(1, 1))


def pixels(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1)


def test_the_error_is_pooled_over_all_valid_images() -> None:
    batches = [batch_of(pixels(1, 0, 0)), batch_of(pixels(0, 2), valid=[True, False])]
    measured = measure_reconstruction(tokenizer(), batches)  # 1 -> 0; the padding row would add 2 -> 0 or 4
    assert measured["images"] == 4
    assert measured["psnr_db"] == pytest.approx(-10 * math.log10((1 / 255) ** 2 / 4), rel=1e-5)
    assert measure_reconstruction(tokenizer(), [batch_of(pixels(0, 4, 8, 8))])["psnr_db"] == 100
    clipped = measure_reconstruction(tokenizer(factor=2.0), [batch_of(pixels(252))])["psnr_db"]
    assert clipped == pytest.approx(-20 * math.log10(3 / 255), rel=1e-4)


class Noisy(Brightness):
    """Decodes any image to itself, a little darker."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.images = images
        return super().encode(images[:, :1, :1, :1])

    def decode(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return self.images * self.factor


def noisy(factor: float, size: int) -> SimpleNamespace:
    return SimpleNamespace(network=Noisy(factor), image_size=size, grid=(1, 1))


def test_structural_similarity_is_the_mean_over_images() -> None:
    images = pictures(5, size=16)
    measured = measure_reconstruction(noisy(0.5, 16), [batch_of(images[:3]), batch_of(images[3:], first=3)])
    assert list(measured) == ["psnr_db", "ssim", "codebook_usage", "perplexity", "images"]
    metric = StructuralSimilarityIndexMeasure(data_range=1.0)
    assert measured["ssim"] == pytest.approx(float(metric(images / 255 * 0.5, images / 255)), rel=1e-5)
    assert measure_reconstruction(noisy(1.0, 16), [batch_of(images)])["ssim"] == pytest.approx(1)
    assert "ssim" not in measure_reconstruction(noisy(1.0, 8), [batch_of(pictures(5))])  # smaller than its window


def test_reconstructions_have_a_distance_from_the_originals() -> None:
    images, network = pictures(30), few()
    originals = Reference.from_features(extract([network], [(images, torch.arange(30))])["classifier"])
    options = {"networks": [FeatureMetrics(network, originals)]}
    batches = [batch_of(images[:20]), batch_of(images[20:], first=20)]
    assert measure_reconstruction(noisy(1.0, 8), batches, **options)["rfid/classifier"] == pytest.approx(0, abs=1e-9)
    measured = measure_reconstruction(noisy(0.5, 8), batches, **options)
    dark = extract([network], [((images * 0.5).round().to(torch.uint8), torch.arange(30))])["classifier"]
    assert measured["rfid/classifier"] == pytest.approx(distances(dark, originals)["fid"], rel=1e-6)


@pytest.fixture
def run(tiny_pretrained: Path, tmp_path: Path) -> Path:
    """A run of its own, whose classifier is trained for a moment."""
    shutil.copytree(tiny_pretrained, tmp_path / "run" / "pretrained")
    return tmp_path / "run"


def test_all_numbers_are_those_of_the_images_measured_by_hand(run: Path, tiny_shards: Path) -> None:
    quick = ClassifierConfig(width=4, max_steps=3, batch=20)
    train_classifier(tiny_shards, config=quick, runs_folder=run.parent, device="cpu")
    options = TokenizerOptions(device="cpu", batch_size=7, num_images=30)  # of 24
    report = evaluate_tokenizer(run, data=tiny_shards, options=options, out=run / "other" / "a.json")
    content = json.loads((run / "other" / "a.json").read_text())
    assert content == report.content
    numbers = content["numbers"]
    data = open_shards(tiny_shards)
    tokenizer = load_tokenizer(run / "pretrained" / "tokenizer")
    pixels = torch.cat([batch.content[batch.valid] for batch in data.val_dataloader()])
    tokens = tokenizer.encode(pixels)
    decoded = tokenizer.network.decode(tokens, tokenizer.grid).clamp(0, 1)
    errors = (decoded - pixels / 255).double().square().flatten(1).mean(1)
    assert numbers["psnr_db"] == pytest.approx(-10 * math.log10(errors.mean()), rel=1e-4)
    assert numbers["mean_psnr_db"] == pytest.approx(float(-10 * errors.log10().mean()), rel=1e-4)
    shares = tokens.flatten().bincount(minlength=16) / tokens.numel()
    assert numbers["bits_per_pixel"] == pytest.approx(16 * 4 / 64)  # 16 tokens of 4 bits, 64 pixels
    entropy = float(torch.special.entr(shares).sum()) / math.log(2)
    assert numbers["coded_bits_per_pixel"] == pytest.approx(entropy * 16 / 64, rel=1e-4)
    assert numbers["codebook_usage"] == pytest.approx(float((shares > 0).float().mean()))
    assert {"rfid/classifier", "rfid_floor/classifier", "rkid/classifier", "rkid_floor/classifier"} <= numbers.keys()
    assert content["num_images"] == 24
    assert {path.name for path in (run / "other").iterdir()} == {"a.json"}
    console = Console(width=200, record=True)
    console.print(report.table())
    shown = console.export_text()
    assert re.search(rf"reconstruction FID \(classifier\) +│ +{numbers['rfid/classifier']:.2f} │ +\d+\.\d\d", shown)
    assert "mean PSNR, dB" in shown


def test_lpips_is_the_mean_over_the_images_of_all_batches():
    images = torch.arange(5 * 256).remainder(251).to(torch.uint8).reshape(5, 1, 16, 16)
    batches = [batch_of(images[:3]), batch_of(images[3:], first=3)]

    def distance(decoded, originals):
        return (originals - decoded).flatten(1).mean(1)

    measured = measure_reconstruction(noisy(0.5, 16), batches, lpips=distance)
    assert measured["lpips"] == pytest.approx(float(images.double().mean()) / 255 / 2, rel=1e-5)
    assert "lpips" not in measure_reconstruction(noisy(0.5, 16), batches)


def test_lpips_of_small_images_and_without_its_file_is_refused():
    assert open_lpips(None, noisy(1.0, 8)) is None
    with pytest.raises(ValueError, match=r"^image_size must be >= 16 with lpips, got 8"):
        open_lpips(Path("vgg.pth"), noisy(1.0, 8))
    with pytest.raises(ValueError, match=r"^lpips weights must be an existing file"):
        open_lpips(Path("none.pth"), noisy(1.0, 16))
