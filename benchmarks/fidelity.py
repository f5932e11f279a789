"""Compares our metrics with torch-fidelity on the same images.

    python benchmarks/fidelity.py --data data/shards/fashion-mnist --num-images 250

The images are real: some of the val split against as many of the train split. The network is InceptionV3 with random
weights, which serve the comparison as well as the published ones.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from measuring import format_table
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics

from maskgit_pl.data import ShardData, ShardDataConfig
from maskgit_pl.data.manifest import read_manifest_summary
from maskgit_pl.evaluation.distances import frechet_distance, inception_score, kernel_distance, precision_recall
from maskgit_pl.evaluation.extractors import Extractor, ImageFeatures, extract, iter_image_batches
from maskgit_pl.evaluation.reference import Statistics, iter_real_batches
from maskgit_pl.networks.features import Inception, InceptionSpec

_SPLITS, _SEED = 10, 2020  # torch-fidelity's parts of the inception score, and the seed of its subsets
_NAMES = {
    "FID": "frechet_inception_distance",
    "KID": "kernel_inception_distance_mean",
    "IS": "inception_score_mean",
    "precision": "precision",
    "recall": "recall",
}


class _Colour(Dataset[Tensor]):
    """Images in the format of torch-fidelity: uint8 with three channels."""

    def __init__(self, images: Tensor) -> None:
        self.images = images.expand(-1, 3, -1, -1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor:
        return self.images[row]


def write_random_weights(file: Path) -> str:
    """Writes a file of random weights, scaled so that features neither vanish nor explode; returns its SHA-256."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Inception()
        for module in network.modules():
            # He initialization keeps the variance of the activations through the ReLU layers.
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                torch.nn.init.kaiming_normal_(module.weight)
    torch.save(network.state_dict(), file)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def load_images(data: ShardData, split: str, count: int) -> Tensor:
    """Returns ``count`` random images of a split, (count, C, H, W) uint8."""
    batches = iter_real_batches(data, split, num_images=count)  # type: ignore[arg-type]  # train or val
    return torch.cat([batch.content for batch in batches])


def measure_torch_fidelity(generated: Tensor, real: Tensor, weights: Path) -> dict[str, float]:
    """Returns the metrics of torch-fidelity."""
    # One subset of all images, so that KID does not depend on the draw of subsets.
    count = min(len(generated), len(real))
    metrics: Mapping[str, float] = calculate_metrics(
        input1=_Colour(generated), input2=_Colour(real), feature_extractor="inception-v3-compat", isc=True, fid=True,
        kid=True, prc=True, kid_subset_size=count, kid_subsets=1, cuda=False, cache=False, save_cpu_ram=True,
        verbose=False, batch_size=50, feature_extractor_weights_path=str(weights), samples_shuffle=True,
    )  # fmt: skip
    return {name: float(metrics[key]) for name, key in _NAMES.items()}


def measure_ours(generated: Tensor, real: Tensor, spec: InceptionSpec) -> dict[str, float]:
    """Returns the metrics of this project, with the random subsets and parts that torch-fidelity draws."""
    network = Extractor.create(spec)
    made, reference = (_extract(network, images) for images in (generated, real))
    precision, recall = precision_recall(made.pooled, reference.pooled)
    # torch-fidelity draws the parts of IS and the subsets of KID from generators with this seed.
    order = np.random.RandomState(_SEED).permutation(len(generated))
    drawn = np.random.RandomState(_SEED)
    count = min(len(generated), len(real))
    subsets = [torch.from_numpy(drawn.choice(len(images), count, replace=False)) for images in (generated, real)]
    kid = kernel_distance(made.pooled[subsets[0]], reference.pooled[subsets[1]])[0]
    assert made.logits is not None
    return {
        "FID": frechet_distance(*(Statistics.from_features(each.pooled) for each in (made, reference))),
        "KID": kid,
        "IS": inception_score(_invert_permutation(made.logits[torch.from_numpy(order)]), splits=_SPLITS)[0],
        "precision": precision,
        "recall": recall,
    }


def _extract(network: Extractor, images: Tensor) -> ImageFeatures:
    def read(rows: range) -> Tensor:
        return images[rows.start : rows.stop]

    return extract([network], iter_image_batches(read, len(images)))[network.label]


def _invert_permutation(logits: Tensor) -> Tensor:
    """Returns logits in an order that the permutation of torchmetrics turns into the given order."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the seed of ``inception_score``
        order = torch.randperm(len(logits))
    return logits[order.argsort()]


def compare(data: ShardData, count: int) -> dict[str, tuple[float, float]]:
    """Returns each metric of ``count`` images of each split, as we compute it and as torch-fidelity does."""
    generated, real = (load_images(data, split, count) for split in ("val", "train"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inception.pth"
        spec = InceptionSpec(str(file), write_random_weights(file))
        ours, theirs = measure_ours(generated, real, spec), measure_torch_fidelity(generated, real, file)
    return {name: (ours[name], theirs[name]) for name in _NAMES}


def main(argv: list[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, default=Path("data/shards/fashion-mnist"), help="data folder")
    parser.add_argument("--num-images", type=int, default=250, help="images of each split (default: 250)")
    args = parser.parse_args(argv)
    summary = read_manifest_summary(args.data)
    data = ShardData(ShardDataConfig(str(args.data), image_size=summary.images.height[0], in_channels=summary.channels))
    data.setup()
    print(f"InceptionV3, random weights; {args.num_images} val against as many train images of {args.data.name}\n")
    rows = [
        {
            "": name,
            "ours": f"{ours:.9g}",
            "torch-fidelity": f"{theirs:.9g}",
            "relative difference": f"{abs(ours - theirs) / max(abs(theirs), 1e-12):.1e}",
        }
        for name, (ours, theirs) in compare(data, args.num_images).items()
    ]
    print(format_table(rows))


if __name__ == "__main__":
    main()
