import shutil

import numpy as np
import pytest
import torch

from maskgit_pl import pretrained
from maskgit_pl.pipeline import MaskGIT


@pytest.fixture(scope="module")
def pipe(tiny_pretrained) -> MaskGIT:
    return MaskGIT.from_pretrained(tiny_pretrained)


def images(pipe: MaskGIT, classes, **settings) -> torch.Tensor:
    return pipe.generate(classes, output_type="pt", **settings)


def test_the_same_call_gives_the_same_images_and_another_seed_others(pipe) -> None:
    first = images(pipe, [0, 1, 2])
    assert torch.equal(first, images(pipe, [0, 1, 2]))
    assert not torch.equal(first, images(pipe, [0, 1, 2], seed=9))


def test_an_image_does_not_depend_on_its_batch(pipe) -> None:
    classes = [0, 1, 2, 1]
    whole = [step.tokens for step in pipe.steps(classes, seed=3)][-1]
    single = [list(pipe.steps([label], seed=3 + number))[-1].tokens for number, label in enumerate(classes)]
    assert torch.equal(whole, torch.cat(single))
    pixels = images(pipe, classes, seed=3), images(pipe, classes, seed=3, batch_size=1)
    assert (pixels[0].int() - pixels[1].int()).abs().max() <= 1  # rounding to bytes


def test_image_i_has_seed_plus_i(pipe) -> None:
    assert torch.equal(images(pipe, [0, 0, 0], seed=5), images(pipe, [0, 0, 0], seed=[5, 6, 7]))
    assert torch.equal(images(pipe, [0, 0], seed=[7, 7])[0], images(pipe, [0, 0], seed=[7, 7])[1])


def test_names_and_ids_name_the_same_classes(pipe) -> None:
    assert pipe.class_ids(["T-shirt", "ankle BOOT", 1, np.int64(2)]) == [1, 0, 1, 2]
    assert torch.equal(images(pipe, ["Trouser"]), images(pipe, [2]))


def test_output_types_hold_the_same_pixels(pipe) -> None:
    tensor = images(pipe, [0, 1])
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (2, 1, 8, 8)
    array = pipe.generate([0, 1], output_type="np")
    assert array.shape == (2, 8, 8, 1)
    assert (array == tensor.permute(0, 2, 3, 1).numpy()).all()
    pictures = pipe.generate([0, 1])
    assert [picture.mode for picture in pictures] == ["L", "L"]
    assert (np.stack([np.asarray(picture) for picture in pictures]) == array[..., 0]).all()


def test_settings_reach_the_decoder(pipe) -> None:
    steps: list[int] = []
    images(pipe, [0, 1, 2], num_steps=3, batch_size=2, callback=lambda step: steps.append(step.step))
    assert steps == [0, 1, 2, 0, 1, 2]
    decoding = pipe.decoding_with(guidance_scale=3.0, choice_temperature=0.5)
    assert decoding.guidance == {"name": "linear", "scale": 3.0}
    assert decoding.token_selector == {"name": "confidence", "choice_temperature": 0.5}
    assert decoding.num_steps == 4
    assert pipe.decoding_with() == pipe.decoding
    assert not torch.equal(images(pipe, [0, 1, 2], guidance_scale=0), images(pipe, [0, 1, 2], guidance_scale=8.0))


def test_a_saved_pipeline_generates_the_same(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path / "copy")
    again = MaskGIT.from_pretrained(tmp_path / "copy")
    assert torch.equal(images(pipe, [0, 1, 2]), images(again, [0, 1, 2]))
    assert again.decoding == pipe.decoding
    assert again.transformer.mask_schedule == pipe.transformer.mask_schedule


def test_a_pipeline_saved_in_bfloat16_still_fits_together(tiny_pretrained, tmp_path) -> None:
    half = MaskGIT.from_pretrained(tiny_pretrained).to("cpu", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    assert len(MaskGIT.from_pretrained(tmp_path / "half").generate([0])) == 1
    assert half.generate([0], output_type="pt").dtype == torch.uint8


def test_refuses_a_tokenizer_that_the_transformer_does_not_know(tiny_pretrained, tmp_path) -> None:
    shutil.copytree(tiny_pretrained, tmp_path / "mixed")
    other = pretrained.load_tokenizer(tmp_path / "mixed" / "tokenizer")
    weights = {name: tensor + 1 for name, tensor in other.network.state_dict().items()}
    pretrained.save_tokenizer(tmp_path / "mixed" / "tokenizer", other.network.config, weights, image_size=8)
    with pytest.raises(ValueError, match="transformer: it knows the tokens of the tokenizer with fingerprint"):
        MaskGIT.from_pretrained(tmp_path / "mixed")


def test_missing_folders_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        MaskGIT.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        MaskGIT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        (["Trousers"], ValueError, "class 'Trousers': did you mean 'Trouser'"),
        ([3], ValueError, r"class 3: a number in \[0, 3\)"),
        ([-1], ValueError, "class -1"),
        ([True], TypeError, "class True"),
        ([1.5], TypeError, "class 1.5"),
        ("Trouser", TypeError, r"write \['Trouser'\]"),
        ([], ValueError, "at least one"),
    ],
)
def test_unknown_classes_are_refused_by_name(pipe, classes, error, message) -> None:
    with pytest.raises(error, match=message):
        pipe.generate(classes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 17}, "num_steps: at most the 16 tokens"),
        ({"num_steps": 0}, "num_steps: at least 1"),
        ({"guidance_scale": -1.0}, "guidance schedule 'linear'"),
        ({"choice_temperature": -1.0}, "choice_temperature must be >= 0"),
        ({"seed": [1, 2]}, "seed: one number, or one for each of the 1 images"),
        ({"seed": -1}, "seed: numbers in"),
        ({"seed": 2**32}, "seed: numbers in"),
        ({"batch_size": 0}, "batch_size: at least 1"),
        ({"output_type": "pill"}, "did you mean 'pil'"),
    ],
)
def test_settings_out_of_range_are_refused(pipe, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.generate([0], **settings)


def test_a_name_of_two_classes_is_refused(tiny_pretrained, tmp_path) -> None:
    twice = MaskGIT.from_pretrained(tiny_pretrained)
    object.__setattr__(twice.transformer, "class_names", ("crane", "boat", "crane"))
    with pytest.raises(ValueError, match=r"the name of classes \[0, 2\]"):
        twice.generate(["crane"])
