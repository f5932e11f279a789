"""Images are in the range that an imported network expects: [-1, 1], or [0, 1] as in the pipelines of aMUSEd."""

import pytest
import torch
from torch import nn

from maskgit_pl.cli import main
from maskgit_pl.importers.tokenizers import import_tokenizer
from maskgit_pl.pipeline.pretrained import load_tokenizer
from tests.importers.test_taming import reference, save
from tests.importers.test_tokenizers import ATTENTION, diffusers_model, save_diffusers
from tests.importers.tokenizer_references import MaskBitModel, diffusers_config


def pixels(seed=0):
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def of_open_muse():
    """A tokenizer with the names of taming-transformers and no self-attention in the middle, as open-muse saved it."""
    network = reference("taming")
    network.encoder.mid.attn_1 = network.decoder.mid.attn_1 = nn.Identity()
    features = network.quant_conv(network.encoder(pixels(1))).movedim(1, -1).flatten(0, 2)
    network.quantize.embedding.weight.copy_(features[: len(network.quantize.embedding.weight)])
    return network


def test_the_form_of_open_muse_without_middle_attention_has_images_from_0_to_1(tmp_path):
    original = of_open_muse()
    made = import_tokenizer(save(original, tmp_path / "a.ckpt"), tmp_path / "out", image_size=16)
    tokenizer = load_tokenizer(made.folder)
    expected = original.encode(pixels())
    assert len(expected.unique()) > 8
    assert torch.equal(tokenizer.network.encode(pixels()), expected)
    decoded = original.decode(expected, tokenizer.grid)
    torch.testing.assert_close(tokenizer.network.decode(expected, tokenizer.grid), decoded, rtol=0, atol=1e-5)
    assert "8 x 8 tokens, in [0, 1] inside" in made.report(16)


@pytest.mark.slow
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_the_flag_chooses_the_range(attention, signed, tmp_path, capsys):
    config = diffusers_config(**(ATTENTION if attention else {}))
    original = diffusers_model(config)
    folder = save_diffusers(original, config, tmp_path / "vqvae")
    flag = "--signed-images" if signed else "--no-signed-images"
    out = tmp_path / "out"
    assert main(["import-tokenizer", str(folder), "--out", str(out), "--image-size", "16", flag]) == 0
    assert ("in [0, 1] inside" in capsys.readouterr().out) == (not signed)
    network = load_tokenizer(out / "tokenizer").network
    original.signed = signed
    torch.testing.assert_close(network.encoder(pixels()), original.features(pixels()), rtol=0, atol=1e-5)


def test_a_network_whose_range_is_known_has_no_choice(tmp_path):
    torch.save(MaskBitModel(table=32).state_dict(), tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"a\.bin: network signed_images must be True in layout 'maskgit', got False"):
        import_tokenizer(tmp_path / "a.bin", tmp_path / "out", image_size=16, signed_images=False)
    assert not (tmp_path / "out").exists()
