import warnings
from functools import partial

import pytest
import torch

from maskgit_pl.importers.tokenizers import import_tokenizer
from maskgit_pl.importers.transformers import import_transformer


def sparse():
    return torch.eye(4).to_sparse()


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its API is a prototype
        return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.strided)


HALTON = {"cls_emb.weight": torch.zeros(3, 4), "last_norm.mlp.1.weight": torch.zeros(8, 4)}
MAGVIT2 = {
    "encoder.conv_in.weight": torch.zeros(32, 3, 3, 3),
    "encoder.conv_out.weight": torch.zeros(6, 32, 3, 3),
    "encoder.mid_block.0.conv1.weight": torch.zeros(32, 32, 3, 3),
    "decoder.adaptive.0.gamma.weight": torch.zeros(2, 2),
}
TAMING = {
    "encoder.down.0.block.0.conv1.weight": torch.zeros(2, 2, 3, 3),
    "encoder.mid.block_1.conv1.weight": torch.zeros(1),
    "quantize.embedding.weight": torch.zeros(4, 4),
}
REFUSED = [
    ({0: torch.zeros(2), 1: torch.zeros(2)}, "must hold tensors by their names, got the name 0, which is no text"),
    ({"state_dict": {0: torch.zeros(2)}}, "must hold tensors by their names, got the name 0"),
    (MAGVIT2 | {b"loss": torch.zeros(1)}, "must hold tensors by their names, got the name b'loss'"),
    (TAMING | {3: torch.zeros(1)}, "must hold tensors by their names, got the name 3"),
    (
        HALTON | {"head.weight": sparse(), "tok_emb.weight": sparse()},
        r"tensor 'head\.weight' must be a dense CPU tensor, got torch\.sparse_coo",
    ),
    (
        HALTON | {"head.weight": torch.zeros(4, 4), "tok_emb.weight": nested()},
        r"tensor 'tok_emb\.weight' must be a dense CPU tensor, got a nested tensor",
    ),
    (MAGVIT2, "tensors are missing: those of the levels of the encoder|it must be a transformer"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED)
@pytest.mark.parametrize("kind", ["tokenizer", "transformer"])
def test_an_odd_state_dict_is_refused_in_one_line_and_nothing_is_written(
    kind, content, message, tiny_pretrained, tmp_path
):
    torch.save(content, tmp_path / "odd.pt")
    if kind == "tokenizer":
        convert = import_tokenizer
    else:
        convert = partial(import_transformer, tokenizer=tiny_pretrained / "tokenizer")
    with pytest.raises(ValueError, match=message) as caught:
        convert(tmp_path / "odd.pt", tmp_path / "out")
    assert "odd.pt" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
