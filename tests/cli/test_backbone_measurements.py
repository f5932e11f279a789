"""Every command that measures takes a model of any backbone."""

import json
from pathlib import Path

import pytest
import torch

from maskgit_pl.networks.backbone import backbones, build_config
from maskgit_pl.pipeline.pretrained import fingerprint, load_transformer, save_transformer
from tests.cli.commands import call_command
from tests.conftest import CLASSES, peak_predictions

SMALL = {"embed_dim": 16, "depth": 1, "num_heads": 2, "mlp_dim": 32}


def replace_transformer(pretrained_folder: Path, name: str) -> None:
    """Writes a transformer of another backbone for the same tokens."""
    decoding = load_transformer(pretrained_folder / "transformer").decoding
    values = {"backbone": name, "codebook_size": 16, "num_classes": 3, "grid": [4, 4], **SMALL}
    config = build_config(values, "network")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = peak_predictions(config.create()).state_dict()
    save_transformer(
        pretrained_folder / "transformer",
        config,
        weights,
        mask_schedule="cosine",
        decoding=decoding,
        class_names=CLASSES,
        tokenizer_fingerprint=fingerprint(pretrained_folder / "tokenizer"),
    )


@pytest.mark.slow
@pytest.mark.usefixtures("quick_judge")
@pytest.mark.parametrize("name", sorted(set(backbones.names()) - {"bert"}))
def test_a_model_of_any_backbone_is_measured_compared_and_tuned(run_folder: Path, tiny_shards: Path, name: str) -> None:
    replace_transformer(run_folder / "pretrained", name)
    words = (run_folder, "--data", tiny_shards, "--num-images", 6, "--device", "cpu")
    assert call_command("evaluate", *words, "--num-steps", 2, "--features", "classifier") == 0
    report = json.loads((run_folder / "evaluation.json").read_text())
    assert report["samples"]["exported_guidance"]["fid/classifier"] > 0
    assert report["likelihood"]["elbo_bits_per_token"] > 0
    assert call_command("compare", *words, "--num-steps", 2, "--selectors", "halton,margin") == 0
    assert call_command("tune", *words, "--num-steps", 2, "--trials", 2) == 0
