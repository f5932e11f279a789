"""An autoregressive model in the pipeline: it generates like another, and refuses what it cannot do."""

import logging

import numpy as np
import pytest
import torch

from maskgit_pl.decoding import AutoregressiveDecoding, DecodingConfig
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.bulk import generate_many

N = 16


@pytest.fixture(scope="module")
def pipe(tiny_autoregressive) -> MaskGIT:
    return MaskGIT.from_pretrained(tiny_autoregressive)


def images(pipe: MaskGIT, classes, **settings) -> torch.Tensor:
    return pipe.generate(classes, output_type="pt", **settings)


def test_it_takes_a_step_for_each_token(pipe) -> None:
    steps = list(pipe.steps([0, 1, 2], seed=3))
    assert pipe.decoding.num_steps == pipe.decoding_with(guidance_scale=2.0).num_steps == len(steps) == N
    assert [int(step.still_masked.sum()) for step in steps] == [3 * (N - 1 - number) for number in range(N)]
    seen: list[int] = []
    made = images(pipe, [0, 1, 2], seed=3, batch_size=2, callback=lambda step: seen.append(step.step))
    assert seen == [*range(N), *range(N)]
    assert made.shape == (3, 1, 8, 8)


def test_an_image_does_not_depend_on_its_batch_and_has_seed_plus_i(pipe) -> None:
    classes = [0, 1, None, 1]
    whole = [step.tokens for step in pipe.steps(classes, seed=3)][-1]
    single = [list(pipe.steps([label], seed=3 + number))[-1].tokens for number, label in enumerate(classes)]
    assert torch.equal(whole, torch.cat(single))
    assert not torch.equal(whole, [step.tokens for step in pipe.steps(classes, seed=9)][-1])


def test_its_own_settings_are_followed(pipe) -> None:
    plain = images(pipe, [0, 1, 2], guidance_scale=0)
    for settings in (
        {"guidance_scale": 8.0},
        {"guidance": "constant", "guidance_scale": 4.0},
        {"guidance_scale": 8.0, "negative_classes": "Trouser"},
        {"sampling_temperature": (1.0, 0.1)},
        {"top_k": 2},
        {"top_p": 0.3},
        {"decoding": AutoregressiveDecoding(top_k=1).to_config(N)},
    ):
        assert not torch.equal(images(pipe, [0, 1, 2], **{"guidance_scale": 0, **settings}), plain), settings


REFUSED = {
    "num_steps": 8,
    "token_selector": "confidence",
    "choice_temperature": 4.5,
    "mask_schedule": "cosine",
    "tokens_per_step": [1] * N,
    "decoding": DecodingConfig(num_steps=N),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_follow_is_refused_before_anything_is_drawn(pipe, name, tmp_path) -> None:
    names = "num_steps|token_selector|mask_schedule|tokens_per_step"
    message = rf"({names}) must .* for an autoregressive model.*; leave it out"
    steps: list[object] = []
    with pytest.raises(ValueError, match=message):
        pipe.generate([0], **{name: REFUSED[name]}, callback=steps.append)
    with pytest.raises(ValueError, match=message):
        generate_many(pipe, tmp_path / "a.npz", num_images=4, **{name: REFUSED[name]})
    assert not steps
    assert not list(tmp_path.iterdir())


def test_editing_is_refused_by_name(pipe) -> None:
    image, mask = torch.zeros(1, 8, 8, dtype=torch.uint8), torch.ones(8, 8, dtype=torch.bool)
    rule = "requires a model with bidirectional attention, .* got an autoregressive one; choose another run"
    with pytest.raises(ValueError, match=f"inpaint {rule}"):
        pipe.inpaint(image, mask, classes=[0])
    with pytest.raises(ValueError, match=f"inpaint {rule}"):
        pipe.edit_class(image, (0, 0, 4, 4), 1)
    with pytest.raises(ValueError, match=f"edit {rule}"):
        pipe.edit(image, strength=0.5)
    with pytest.raises(ValueError, match=f"outpaint {rule}"):
        pipe.outpaint(image, left=2, classes=[0])
    with pytest.raises(ValueError, match=f"panorama {rule}"):
        pipe.panorama([0], 16)


def test_a_decoding_of_another_kind_of_model_is_refused(tiny_pretrained) -> None:
    with pytest.raises(ValueError, match="token_selector must be a name or a mapping for parallel decoding, got None"):
        MaskGIT.from_pretrained(tiny_pretrained).generate([0], decoding=AutoregressiveDecoding().to_config(N))


def test_a_saved_pipeline_generates_the_same(pipe, tiny_autoregressive, tmp_path, caplog) -> None:
    own = MaskGIT.from_pretrained(tiny_autoregressive, decoding=AutoregressiveDecoding("constant", 0.5).to_config(N))
    for name, one in (("plain", pipe), ("own", own)):
        one.save_pretrained(tmp_path / name)
        with caplog.at_level(logging.WARNING):
            again = MaskGIT.from_pretrained(tmp_path / name)
        assert again.decoding == one.decoding
        assert torch.equal(images(again, [0, 1, 2]), images(one, [0, 1, 2]))
    assert not caplog.records


def test_its_card_says_what_it_is(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "The autoregressive baseline of MaskGIT" in card
    assert "decoded one token after the other." in card
    assert "| attention | causal |" in card
    assert "mask schedule" not in card
    assert "token_selector" not in card


def test_in_bfloat16_it_generates_too(tiny_autoregressive) -> None:
    half = MaskGIT.from_pretrained(tiny_autoregressive).to("cpu", dtype=torch.bfloat16)
    assert images(half, [0]).dtype == torch.uint8


def test_images_by_thousands_are_those_of_generate(pipe, tmp_path) -> None:
    file = tmp_path / "samples.npz"
    assert generate_many(pipe, file, num_images=7, batch_size=2, seed=5).made == 7
    with np.load(file) as arrays:
        made, labels = arrays["arr_0"], arrays["arr_1"]
    expected = pipe.generate(labels.tolist(), seed=5, output_type="np")
    assert np.abs(made[..., :1].astype(int) - expected.astype(int)).max() <= 1  # rounding to bytes
    assert generate_many(pipe, file, num_images=7, seed=5).made == 0
