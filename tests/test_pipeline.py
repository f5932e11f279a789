import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit_pl import pretrained
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.shards.images import fit_square
from tests.conftest import save_tiny_pretrained


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


# Editing

BOX = (0, 0, 4, 2)  # of 8 x 8 pixels and 4 x 4 tokens: 2 x 1 tokens, with their neighbours 3 x 2
REGION = torch.zeros(4, 4, dtype=torch.bool)
REGION[:2, :3] = True


def picture(seed: int = 0, *, size: int = 8, channels: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, size, size), dtype=torch.uint8, generator=generator)


def box_pixels(box=BOX, *, size: int = 8) -> torch.Tensor:
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def tokens_of(pipe: MaskGIT, image: torch.Tensor) -> torch.Tensor:
    return pipe.tokenizer.network.encode(image[None].float() / 255)[0]


def recorded(edit, *args, **options) -> tuple[torch.Tensor, list]:
    steps: list = []
    return edit(*args, output_type="pt", callback=steps.append, **options), steps


def test_tokens_outside_the_region_stay_through_all_of_the_decoding(pipe) -> None:
    image = picture()
    _, steps = recorded(pipe.edit_class, image, BOX, 1, num_steps=6)
    known = ~REGION.flatten()
    assert torch.equal(steps[0].was_masked[0], ~known)
    for step in steps:
        assert torch.equal(step.tokens[0][known], tokens_of(pipe, image)[known])
        assert not step.still_masked[0][known].any()
    assert not torch.equal(steps[-1].tokens[0], tokens_of(pipe, image))


def test_pixels_outside_the_region_stay_bit_by_bit_with_a_hard_edge(pipe) -> None:
    image = picture()
    region = REGION.repeat_interleave(2, 0).repeat_interleave(2, 1)
    made, steps = recorded(pipe.edit_class, image, BOX, 1, blend=0, variants=5)
    assert made.shape == (5, 1, 8, 8)
    assert torch.equal(made[..., ~region], image[..., ~region].expand(5, -1, -1))
    decoded = pipe.tokenizer.network.decode(steps[-1].tokens, (4, 4)).clamp(0, 1).mul(255).round().to(torch.uint8)
    assert torch.equal(made[..., region], decoded[..., region])
    soft = pipe.edit_class(image, BOX, 1, blend=3, variants=5, output_type="pt")
    assert not torch.equal(soft[..., ~region], made[..., ~region])


def test_an_edit_begins_late_and_guidance_with_it(pipe) -> None:
    _, steps = recorded(pipe.edit_class, picture(), BOX, 1, num_steps=12)
    assert [step.step for step in steps] == list(range(2, 12))
    _, steps = recorded(pipe.edit_class, picture(), BOX, 1, num_steps=5)
    assert [step.step for step in steps] == list(range(5))
    scales = pipe.decoding_with(num_steps=12, guidance_scale=4.0).scales()
    seen: list[int] = []
    hook = pipe.transformer.network.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        pipe.edit_class(picture(), BOX, 1, num_steps=12, guidance_scale=4.0, variants=3)
    finally:
        hook.remove()
    assert seen == [6 if scale > 0 else 3 for scale in scales[2:]]


def test_a_full_mask_is_a_generation(pipe) -> None:
    everything = torch.ones(8, 8, dtype=torch.bool)
    for settings in ({"num_steps": 12}, {"num_steps": 12, "guidance_scale": 3.0}):
        made = pipe.inpaint(picture(), everything, classes=[2, 0, 2], seed=5, blend=0, output_type="pt", **settings)
        assert torch.equal(made, images(pipe, [2, 0, 2], seed=5, **settings))


def test_an_edit_does_not_depend_on_its_batch(pipe) -> None:
    pictures = [picture(number) for number in range(4)]
    masks = [box_pixels(), torch.ones(8, 8, dtype=torch.bool), box_pixels((3, 3, 8, 8)), box_pixels((7, 0, 8, 1))]
    classes, settings = [1, 1, 2, 1], {"num_steps": 8, "dilation": 0}  # a class of images that start differently
    whole = pipe.inpaint(pictures, masks, classes=classes, seed=3, output_type="pt", **settings)
    assert len({made.numpy().tobytes() for made in whole}) == 4
    for number in range(4):
        alone = pipe.inpaint(
            pictures[number], masks[number], classes=[classes[number]], seed=3 + number, output_type="pt", **settings
        )
        assert (alone[0].int() - whole[number].int()).abs().max() <= 1  # rounding to bytes
    small = pipe.inpaint(pictures, masks, classes=classes, seed=3, output_type="pt", batch_size=2, **settings)
    assert (small.int() - whole.int()).abs().max() <= 1


def test_one_image_gives_a_variant_for_each_class_and_seed(pipe) -> None:
    image, mask = picture(), box_pixels()
    made = pipe.inpaint(image, mask, classes=["Trouser", 1, 1], seed=[5, 5, 6], output_type="pt")
    assert len({variant.numpy().tobytes() for variant in made}) == 3
    assert torch.equal(made, pipe.inpaint([image] * 3, [mask] * 3, classes=[2, 1, 1], seed=[5, 5, 6], output_type="pt"))
    assert torch.equal(made[1], pipe.edit_class(image, BOX, "T-shirt", seed=5, output_type="pt")[0])
    assert [variant.mode for variant in pipe.inpaint(image, mask, classes=[1, 1])] == ["L", "L"]
    assert pipe.edit_class(image, BOX, 1, variants=2, output_type="np").shape == (2, 8, 8, 1)


def test_files_and_pictures_are_edited_like_pixels(pipe, tmp_path) -> None:
    image, mask = picture(), box_pixels()
    Image.fromarray(image[0].numpy()).save(tmp_path / "image.png")
    Image.fromarray(mask.numpy()).save(tmp_path / "mask.png")
    expected = pipe.inpaint(image, mask, classes=[1], output_type="pt")
    for one, its_mask in (
        (tmp_path / "image.png", tmp_path / "mask.png"),
        (str(tmp_path / "image.png"), Image.fromarray(mask.numpy())),
        (Image.fromarray(image[0].numpy()), mask.numpy()),
        (image[0].numpy(), mask),
    ):
        assert torch.equal(pipe.inpaint(one, its_mask, classes=[1], output_type="pt"), expected)


def test_colour_is_edited_and_larger_images_are_cut_where_asked(tmp_path) -> None:
    pipe = MaskGIT.from_pretrained(save_tiny_pretrained(tmp_path, in_channels=3))
    assert pipe.edit_class(picture(channels=3), BOX, 1)[0].mode == "RGB"
    large = picture(channels=3, size=16)
    made = pipe.edit_class(large, (0, 0, 8, 4), 1, fit=True, blend=0, output_type="pt")
    middle = fit_square(large, image_size=8, crop=None)
    assert torch.equal(made[0, :, 4:], middle[:, 4:])
    assert not torch.equal(made[0, :, :4], middle[:, :4])
    with pytest.raises(ValueError, match="model's 8 x 8 pixels are needed, got 16 x 16"):
        pipe.edit_class(large, (0, 0, 8, 4), 1)


def test_a_pipeline_in_bfloat16_edits(tiny_pretrained) -> None:
    half = MaskGIT.from_pretrained(tiny_pretrained).to("cpu", dtype=torch.bfloat16)
    image = picture()
    made = half.edit_class(image, BOX, 1, blend=0, output_type="pt")
    assert torch.equal(made[0, :, 4:], image[:, 4:])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"classes": ["Trousers"]}, ValueError, "did you mean 'Trouser'"),
        ({"mask": torch.zeros(8, 8, dtype=torch.bool)}, ValueError, "mask of image: something to generate is needed"),
        ({"mask": box_pixels(size=9)}, ValueError, "mask of image: the image's 8 x 8 pixels are needed, got 9 x 9"),
        ({"image": picture(size=9), "mask": box_pixels(size=9)}, ValueError, "model's 8 x 8 pixels .* got 9 x 9"),
        ({"image": [picture()] * 2, "classes": [0, 1, 2]}, ValueError, "image: one, or one for each of the 3 classes"),
        ({"mask": [box_pixels()] * 2, "classes": [0, 1, 2]}, ValueError, "mask: one, or one for each of the 3"),
        ({"image": [picture(), picture()[:, :4]], "classes": [0, 1]}, ValueError, "image 1: the image's 8 x 4"),
        ({"dilation": -1}, ValueError, "dilation: at least 0"),
        ({"blend": -1.0}, ValueError, "blend: a blur of at least 0"),
        ({"num_steps": 17}, ValueError, "num_steps: at most the 16 tokens"),
        ({"batch_size": 0}, ValueError, "batch_size: at least 1"),
        ({"output_type": "pill"}, ValueError, "did you mean 'pil'"),
        ({"seed": -1}, ValueError, "seed: numbers in"),
        ({"num_stesp": 3}, TypeError, "setting 'num_stesp': did you mean 'num_steps'"),
    ],
)
def test_what_cannot_be_edited_is_refused(pipe, options, error, message) -> None:
    given = {"image": picture(), "mask": box_pixels(), "classes": [0], **options}
    with pytest.raises(error, match=message):
        pipe.inpaint(given.pop("image"), given.pop("mask"), **given)


def test_a_box_and_a_number_of_variants_that_are_none_are_refused(pipe) -> None:
    with pytest.raises(ValueError, match="box 0,0,9,2: it must lie within the image"):
        pipe.edit_class(picture(), (0, 0, 9, 2), 1)
    with pytest.raises(ValueError, match="variants: at least 1"):
        pipe.edit_class(picture(), BOX, 1, variants=0)


def test_an_unknown_setting_is_refused(pipe) -> None:
    with pytest.raises(TypeError, match="setting 'guidance': did you mean 'guidance_scale'"):
        pipe.generate([0], guidance=3.0)
