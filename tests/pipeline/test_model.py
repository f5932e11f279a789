"""``MaskGIT``: classes, options, saving and loading, and the errors of wrong arguments."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.networks.kernels import FastLinear, _packed_dtypes
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pretrained.networks import load_tokenizer, save_tokenizer
from maskgit_pl.schedules import Pow
from tests.conftest import save_tiny_pretrained
from tests.pipeline.conftest import images, last_tokens

IMAGE = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8)
MASK = IMAGE[0] > 20


def test_classes_are_given_by_name_or_index_in_any_form(pipe) -> None:
    assert pipe.classes.labels(["T-shirt", "ankle BOOT", 1, np.int64(2), None]) == [1, 0, 1, 2, 3]
    assert pipe.classes.labels(np.array([0, 2])) == pipe.classes.labels(torch.tensor([0, 2])) == [0, 2]
    for single in ("Trouser", 2, np.int64(2)):
        assert torch.equal(images(pipe, single), images(pipe, [2]))


def test_output_types_hold_the_same_pixels(pipe) -> None:
    array = pipe.generate([0, 1], output_type="np")
    assert (array == images(pipe, [0, 1]).permute(0, 2, 3, 1).numpy()).all()
    assert (np.stack([np.asarray(picture) for picture in pipe.generate([0, 1])]) == array[..., 0]).all()


@pytest.mark.parametrize("device", ["cuda:99", "cdua", torch.device("cuda", 99), "meta"])
def test_a_missing_device_is_refused_before_anything_moves(pipe, device) -> None:
    with pytest.raises(ValueError, match=rf"device must be one of cpu.*, got '{device}'"):
        pipe.to(device)
    assert pipe.device.type == "cpu"
    with pytest.raises(ValueError, match=r"got 'torch.float16'; a dtype is the second argument"):
        pipe.to(torch.float16)


@pytest.mark.parametrize(
    "settings",
    [
        {"token_selector": "halton"},
        {"token_selector": {"name": "remdm", "eta": 0.5}},
        {"sampling_temperature": (3.0, 0.1)},
        {"top_k": 1},
        {"tokens_per_step": [1, 1, 14]},
        {"mask_schedule": "exp", "num_steps": 8},
        {"guidance": {"name": "cosine", "scale": 9.0}},
        {"choice_temperature": 0.0},
        {"negative_class": 0, "guidance_scale": 5.0},
        {"decoding": DecodingConfig(16, "random")},
    ],
    ids=str,
)
def test_each_setting_changes_the_tokens(pipe, settings) -> None:
    classes, steps = [0, 1, 2] * 4, []
    pipe.generate(classes, output_type="pt", callback=steps.append, **settings)
    assert not torch.equal(steps[-1].tokens, last_tokens(pipe, classes))


def test_a_saved_pipeline_generates_the_same(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path / "copy")
    again = MaskGIT.from_pretrained(tmp_path / "copy")
    assert torch.equal(images(pipe, [0, 1, 2]), images(again, [0, 1, 2]))
    assert again.decoding == pipe.decoding
    assert again.transformer.mask_schedule == pipe.transformer.mask_schedule


def test_selectors_and_schedules_may_be_objects(pipe) -> None:
    by_name = images(pipe, [0, 1], token_selector={"name": "halton"}, mask_schedule="square")
    by_object = images(pipe, [0, 1], token_selector=token_selectors.build("halton"), mask_schedule=Pow(2))
    assert torch.equal(by_object, by_name)


def test_a_pipeline_in_bfloat16_is_saved_and_loaded(tiny_pretrained, tmp_path) -> None:
    half = MaskGIT.from_pretrained(tiny_pretrained).to("cpu", torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    assert len(MaskGIT.from_pretrained(tmp_path / "half").generate([0])) == 1
    loaded = MaskGIT.from_pretrained(tiny_pretrained, dtype=torch.bfloat16)
    assert torch.equal(images(loaded, [0, 1]), images(half, [0, 1]))


def test_a_tokenizer_that_the_transformer_does_not_know_is_refused(pipe, tiny_pretrained, tmp_path) -> None:
    shutil.copytree(tiny_pretrained, tmp_path / "mixed")
    tokenizer = load_tokenizer(tmp_path / "mixed" / "tokenizer")
    weights = {name: tensor + 1 for name, tensor in tokenizer.network.state_dict().items()}
    save_tokenizer(tmp_path / "mixed" / "tokenizer", tokenizer.network.config, weights, image_size=8)
    with pytest.raises(ValueError, match="transformer must be used with the tokenizer that it was trained with"):
        MaskGIT.from_pretrained(tmp_path / "mixed")
    with pytest.raises(ValueError, match=r"image_size .* grid of 4 x 4 .*, got 16 x 16 pixels with a grid of 8 x 8"):
        MaskGIT(replace(pipe.tokenizer, image_size=16), pipe.transformer)


@pytest.mark.parametrize(
    ("classes", "options", "message"),
    [
        (["Trousers"], {}, "unknown class 'Trousers': did you mean 'Trouser'"),
        ([3], {}, r"class must be an index in \[0, 3\)"),
        ([1.5], {}, "class must be .* got 1.5"),
        (1.5, {}, "class must be .* got 1.5"),
        ([], {}, "at least one"),
        ([0], {"num_steps": 17}, "num_steps must be <= 16"),
        ([0], {"guidance_scale": math.nan}, "guidance_scale must be a number in"),
        ([0], {"seed": [1, 2]}, "seed must be one number or one for each of the 1 images"),
        ([0], {"seed": 2**32}, "seed must be an integer in"),
        ([0], {"batch_size": 0}, "batch_size must be an integer in"),
    ],
)
def test_wrong_classes_and_settings_are_refused(pipe, classes, options, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        pipe.generate(classes, **options)


def test_a_name_of_two_classes_is_refused(tiny_pretrained) -> None:
    twice = MaskGIT.from_pretrained(tiny_pretrained)
    object.__setattr__(twice.transformer, "class_names", ("crane", "boat", "crane"))
    with pytest.raises(ValueError, match=r"give one of the indices \[0, 2\]"):
        twice.generate(["crane"])


def test_a_model_without_a_null_class_is_guided_by_a_negative_class(tmp_path) -> None:
    bare = MaskGIT.from_pretrained(save_tiny_pretrained(tmp_path / "bare", class_dropout=0.0))
    with pytest.raises(ValueError, match="class must not be None: the model was trained without a null class"):
        bare.generate([None])
    with pytest.raises(ValueError, match=r"guidance must have scale 0 for a model that has no null class .* negative"):
        bare.generate([1], guidance_scale=3.0)
    guided = images(bare, [1] * 4, guidance_scale=30.0, negative_class="Trouser")
    assert not torch.equal(guided, images(bare, [1] * 4))
    assert torch.equal(guided, images(bare, [1] * 4, guidance_scale=30.0, negative_class=2))


def packed(network: torch.nn.Module) -> list[torch.Tensor]:
    layers = [layer for layer in network.modules() if isinstance(layer, FastLinear)]
    assert layers
    return [weight.data for layer in layers for weight in layer._packed.values()]


needs_mkl = pytest.mark.skipif(torch.float32 not in _packed_dtypes(), reason="torch is built without MKL")


@needs_mkl
def test_the_first_image_packs_the_weights_and_a_cast_frees_them(tiny_pretrained):
    pipe, plain = (MaskGIT.from_pretrained(tiny_pretrained, pack_weights=packs) for packs in (True, False))
    assert torch.equal(images(pipe, [0, 1, 2]), images(plain, [0, 1, 2]))
    assert packed(pipe.transformer.network)
    assert not packed(plain.transformer.network)
    pipe.to("cpu", dtype=torch.float64)
    assert not packed(pipe.transformer.network)


@pytest.mark.exports
@pytest.mark.slow  # the inductor
@pytest.mark.filterwarnings("ignore")  # torch warns of its own imports
def test_a_compiled_pipeline_generates_the_same_images():
    plain, pipe = (MaskGIT.from_pretrained("fashion-mnist-demo") for _ in range(2))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = images(pipe.compile(), [0, 1, 2])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert (compiled == images(plain, [0, 1, 2])).float().mean() > 0.9  # rounding may change a token
    assert not packed(pipe.transformer.network)
