"""A pipeline packs the weights of its transformers on a CPU, and frees the packed copies when they move."""

import pytest
import torch

from maskgit_pl import MaskGIT
from maskgit_pl.networks.kernels import PackingLinear, _packed_dtypes
from maskgit_pl.pipeline.fine_tuning import PretrainedTransformer

pytestmark = pytest.mark.skipif(torch.float32 not in _packed_dtypes(), reason="torch is built without MKL")


def packed(given: MaskGIT | PretrainedTransformer) -> list[torch.Tensor]:
    layers = [
        each for each in getattr(given, "transformer", given).network.modules() if isinstance(each, PackingLinear)
    ]
    assert layers
    return [each.data for layer in layers for each in layer._packed.values()]


def test_weights_are_packed_by_the_first_image_and_the_images_stay_the_same(tiny_pretrained):
    pipe, plain = (MaskGIT.from_pretrained(tiny_pretrained, pack_weights=each) for each in (True, False))
    assert not packed(pipe)
    images = [each.generate([0, 1, 2], seed=0, output_type="pt") for each in (pipe, plain)]
    assert torch.equal(*images)
    assert packed(pipe)
    assert not packed(plain)


def test_a_pipeline_that_is_moved_or_cast_frees_its_packed_weights(tiny_pretrained):
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    pipe.generate([0])
    pipe.to("cpu", dtype=torch.float64)
    assert not packed(pipe)


def test_a_negative_model_that_every_call_names_is_packed_once(tiny_pretrained):
    pipe, negative = (MaskGIT.from_pretrained(tiny_pretrained) for _ in range(2))
    options = {"negative_model": negative, "guidance_scale": 1.0, "seed": 0}
    pipe.generate([0], **options)
    before = packed(negative)
    assert before
    pipe.generate([1], **options)
    assert all(one is other for one, other in zip(before, packed(negative), strict=True))


@pytest.mark.parametrize("packs", [True, False])
def test_a_pipeline_that_serves_as_a_negative_model_keeps_its_own_choice(tiny_pretrained, packs):
    other = MaskGIT.from_pretrained(tiny_pretrained, pack_weights=packs)
    pipe = MaskGIT.from_pretrained(tiny_pretrained, pack_weights=not packs, negative_model=other)
    pipe.generate([0], guidance_scale=1.0)
    pipe.generate([0], guidance_scale=1.0, negative_model=other.transformer)
    other.generate([0])
    assert bool(packed(other)) == packs


def test_a_negative_model_that_is_read_from_a_folder_is_packed_as_the_pipeline_is(tiny_pretrained):
    pipe = MaskGIT.from_pretrained(tiny_pretrained, negative_model=tiny_pretrained)
    pipe.generate([0], guidance_scale=1.0)
    assert packed(pipe.negative_model)
