"""Prefixes that torch's wrappers put before or into the names of tensors are removed."""

import pytest
import torch

from maskgit_pl.importers.layouts import remove_wrappers
from maskgit_pl.importers.tokenizers import import_tokenizer
from maskgit_pl.pipeline.pretrained import load_tokenizer
from tests.importers.test_taming import reference, save
from tests.importers.test_tokenizers import center_features, check_same, maskbit_model
from tests.importers.tokenizer_references import Magvit2Model, add_average, with_random_values


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("entry", [None, "model", "state_dict", "model_state_dict"])
def test_a_tokenizer_with_a_prefix_comes_out_as_it_goes_in(prefix, entry, tmp_path):
    original = maskbit_model()
    weights = {f"{prefix}{name}": value for name, value in original.state_dict().items()}
    torch.save(weights if entry is None else {entry: weights}, tmp_path / "a.pt")
    check_same(original, import_tokenizer(tmp_path / "a.pt", tmp_path / "out", image_size=16).folder)


def test_compiled_and_sharded_parts_have_their_names_back(tmp_path):
    original = reference("taming")
    weights = {
        name.replace("encoder.", "encoder._orig_mod.").replace("mid.", "mid._fsdp_wrapped_module."): value
        for name, value in original.state_dict().items()
    }
    torch.save({"state_dict": weights}, tmp_path / "a.ckpt")
    import_tokenizer(tmp_path / "a.ckpt", tmp_path / "out", image_size=16)
    import_tokenizer(save(original, tmp_path / "b.ckpt"), tmp_path / "same", image_size=16)
    got, expected = (load_tokenizer(tmp_path / name / "tokenizer").network.state_dict() for name in ("out", "same"))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_tensor_with_and_without_a_prefix_is_refused(tmp_path):
    weights = reference("taming").state_dict()
    torch.save({**weights, "module.quant_conv.bias": weights["quant_conv.bias"]}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"a\.ckpt: tensor quant_conv\.bias must be there once, got it twice"):
        import_tokenizer(tmp_path / "a.ckpt", tmp_path / "out", image_size=16)


def test_an_average_of_wrapped_weights_is_found(tmp_path):
    torch.manual_seed(0)
    original = center_features(with_random_values(Magvit2Model(), 0.03))
    weights = add_average(original.state_dict(), original.state_dict())
    torch.save({"state_dict": {f"module.{name}": value for name, value in weights.items()}}, tmp_path / "a.ckpt")
    made = import_tokenizer(tmp_path / "a.ckpt", tmp_path / "out", image_size=16)
    assert "the last, not averaged weights" in made.ignored


def test_other_names_stay():
    names = ["encoder.module.weight", "modules.0.weight", "module", "loss.module.weight"]
    assert list(remove_wrappers(dict.fromkeys(names))) == names
