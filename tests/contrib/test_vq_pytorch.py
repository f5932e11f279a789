"""Quantizers of vector-quantize-pytorch learn what the package learns, and say what they do not promise."""

import copy
import sys

import pytest
import torch
from einops import rearrange

from maskgit_pl.contrib.vq_pytorch import _warn_once
from maskgit_pl.networks.quantizers import quantizers
from tests.networks.test_lookup_free import build, features


@pytest.mark.parametrize("options", [{}, {"use_cosine_sim": True, "decay": 0.5}, {"rotation_trick": False}], ids=str)
def test_vector_quantize_learns_as_the_package_does_in_its_forward_pass(options):
    pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    quantizer = build({"name": "vq_pytorch", "options": options}, 8, 4)
    package, inputs = copy.deepcopy(quantizer.inner), features(4)
    images = [inputs.clone().requires_grad_() for _ in range(2)]
    quantized, tokens, loss = package(rearrange(images[0], "b d h w -> b (h w) d"))
    output = quantizer(images[1])
    assert torch.equal(output.tokens, tokens)
    torch.testing.assert_close(rearrange(output.quantized, "b d h w -> b (h w) d"), quantized)
    torch.testing.assert_close(output.loss, loss)
    gradients = [torch.autograd.grad(made.sum() + part, image)[0] for made, part, image in
                 ((quantized, loss, images[0]), (output.quantized, output.loss, images[1]))]  # fmt: skip
    torch.testing.assert_close(*gradients)
    quantizer.update([output.tokens], [output.features], seed=0, step=0)
    torch.testing.assert_close(quantizer.inner.codebook, package.codebook)
    assert not torch.equal(quantizer.nearest(inputs), tokens)  # it has learned


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(ValueError, match=r'pip install "maskgit_pl\[quantizers\]"'):
        quantizers.build("vq_pytorch").create(codebook_size=16, code_dim=4)


def test_the_missing_promise_of_exact_resuming_is_logged_once(caplog):
    pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    _warn_once.cache_clear()
    for _ in range(2):
        build("vq_pytorch", 8, 4)
    assert [record.getMessage().count("not promised to be bit-exact") for record in caplog.records] == [1]
