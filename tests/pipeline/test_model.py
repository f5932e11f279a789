import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit_pl.data.images import fit_image
from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.pretrained import load_tokenizer, save_tokenizer
from maskgit_pl.schedules import MaskSchedule, Pow, mask_schedules
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
    assert pipe.class_ids(np.array([0, 2])) == pipe.class_ids(torch.tensor([0, 2])) == [0, 2]


def test_output_types_hold_the_same_pixels(pipe) -> None:
    array = pipe.generate([0, 1], output_type="np")
    assert (array == images(pipe, [0, 1]).permute(0, 2, 3, 1).numpy()).all()
    assert (np.stack([np.asarray(picture) for picture in pipe.generate([0, 1])]) == array[..., 0]).all()


@pytest.mark.parametrize("one", ["Trouser", 2, np.int64(2)])
def test_one_class_is_one_image_in_a_list(pipe, one) -> None:
    made = pipe.generate(one)
    assert [np.asarray(picture).tolist() for picture in made] == [np.asarray(pipe.generate([2])[0]).tolist()]
    assert pipe.inpaint(picture(), box_pixels(), classes=one, output_type="pt").shape == (1, 1, 8, 8)


def test_a_pipeline_says_in_one_line_what_it_is(pipe) -> None:
    sizes = f"{pipe._origin.name}: 3 classes, grey images of 8 x 8 pixels, 4 x 4 tokens of 16 codes, 4 steps"
    counts = [
        sum(each.numel() for each in part.parameters()) for part in (pipe.tokenizer.network, pipe.transformer.network)
    ]
    parameters = " + ".join(f"{count:,}" for count in counts)
    assert repr(pipe) == f"MaskGIT({sizes}, {parameters} parameters, float32 on cpu)"


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cdua", torch.device("cuda", 99), "meta"])
def test_a_device_that_is_not_here_is_refused_before_anything_moves(pipe, device) -> None:
    with pytest.raises(ValueError, match=rf"device must be one of cpu.*, got '{device}'"):
        pipe.to(device)
    assert pipe.device.type == "cpu"


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


def test_a_mask_schedule_is_used_before_it_is_saved_and_after(pipe, tmp_path) -> None:
    other = MaskGIT(pipe.tokenizer, pipe.transformer, mask_schedule=Pow(0.3))
    assert not torch.equal(images(other, [0, 1, 2]), images(pipe, [0, 1, 2]))
    assert torch.equal(images(other, [0, 1, 2]), images(pipe, [0, 1, 2], mask_schedule=Pow(0.3)))
    other.save_pretrained(tmp_path / "copy")
    again = MaskGIT.from_pretrained(tmp_path / "copy")
    assert again.transformer.mask_schedule == Pow(0.3)
    assert torch.equal(images(other, [0, 1, 2]), images(again, [0, 1, 2]))


def test_a_registered_class_without_fields_is_saved_by_its_name(pipe, tmp_path, monkeypatch) -> None:
    class Falling(MaskSchedule):
        def __call__(self, progress: torch.Tensor, num_tokens: int) -> torch.Tensor:
            return 1 - progress

    monkeypatch.setitem(mask_schedules._factories, "falling", Falling)
    MaskGIT(pipe.tokenizer, pipe.transformer, mask_schedule="falling").save_pretrained(tmp_path / "copy")
    assert isinstance(MaskGIT.from_pretrained(tmp_path / "copy").transformer.mask_schedule, Falling)


def test_an_autoregressive_model_takes_no_mask_schedule(tiny_autoregressive) -> None:
    one = MaskGIT.from_pretrained(tiny_autoregressive)
    with pytest.raises(ValueError, match="mask_schedule requires a model with bidirectional attention"):
        MaskGIT(one.tokenizer, one.transformer, mask_schedule="cosine")


def test_parts_may_be_objects(pipe) -> None:
    by_name = images(pipe, [0, 1], token_selector={"name": "halton"}, mask_schedule="square")
    assert torch.equal(
        images(pipe, [0, 1], token_selector=token_selectors.build("halton"), mask_schedule=Pow(2)), by_name
    )


def test_a_pipeline_saved_in_bfloat16_still_fits_together(tiny_pretrained, tmp_path) -> None:
    half = MaskGIT.from_pretrained(tiny_pretrained).to("cpu", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    assert len(MaskGIT.from_pretrained(tmp_path / "half").generate([0])) == 1
    assert half.generate([0], output_type="pt").dtype == torch.uint8
    loaded = MaskGIT.from_pretrained(tiny_pretrained, dtype=torch.bfloat16)
    assert torch.equal(images(loaded, [0, 1]), images(half, [0, 1]))


def test_refuses_a_tokenizer_that_the_transformer_does_not_know(tiny_pretrained, tmp_path) -> None:
    shutil.copytree(tiny_pretrained, tmp_path / "mixed")
    other = load_tokenizer(tmp_path / "mixed" / "tokenizer")
    weights = {name: tensor + 1 for name, tensor in other.network.state_dict().items()}
    save_tokenizer(tmp_path / "mixed" / "tokenizer", other.network.config, weights, image_size=8)
    with pytest.raises(ValueError, match="transformer must be used with the tokenizer that it was trained with"):
        MaskGIT.from_pretrained(tmp_path / "mixed")


def test_an_image_size_that_does_not_give_the_grid_is_refused(pipe) -> None:
    with pytest.raises(ValueError, match=r"image_size .* grid of 4 x 4 .*, got 16 x 16 pixels with a grid of 8 x 8"):
        MaskGIT(replace(pipe.tokenizer, image_size=16), pipe.transformer)


def test_missing_folders_are_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        MaskGIT.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        MaskGIT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("classes", "error", "message"),
    [
        (["Trousers"], ValueError, "unknown class 'Trousers': did you mean 'Trouser'"),
        ([3], ValueError, r"class must be an index in \[0, 3\)"),
        ([-1], ValueError, "class must be an index .* got -1"),
        ([1.5], TypeError, "class must be .* got 1.5"),
        (True, TypeError, "class must be .* got True"),
        (1.5, TypeError, "classes must be class indices or names, got 1.5"),
        ([], ValueError, "at least one"),
    ],
)
def test_unknown_classes_are_refused_by_name(pipe, classes, error, message) -> None:
    with pytest.raises(error, match=message):
        pipe.generate(classes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 17}, "num_steps must be <= 16"),
        ({"num_steps": 0}, "num_steps must be an integer in"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a number in"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number in"),
        ({"choice_temperature": -1.0}, "choice_temperature must be a number in"),
        ({"seed": [1, 2]}, "seed must be one number or one for each of the 1 images"),
        ({"seed": -1}, "seed must be an integer in"),
        ({"seed": 2**32}, "seed must be an integer in"),
        ({"batch_size": 0}, "batch_size must be an integer in"),
        ({"output_type": "pill"}, "did you mean 'pil'"),
    ],
)
def test_settings_out_of_range_are_refused(pipe, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        pipe.generate([0], **settings)


def test_a_name_of_two_classes_is_refused(tiny_pretrained, tmp_path) -> None:
    twice = MaskGIT.from_pretrained(tiny_pretrained)
    object.__setattr__(twice.transformer, "class_names", ("crane", "boat", "crane"))
    with pytest.raises(ValueError, match=r"give one of the indices \[0, 2\]"):
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
    network = pipe.transformer.network
    whole = network.forward_at
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "forward_at", lambda *given: seen.append(len(given[0])) or whole(*given))
        pipe.edit_class(picture(), BOX, 1, num_steps=12, guidance_scale=4.0, variants=3)
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
    middle = fit_image(large, image_size=8, crop=None)
    assert torch.equal(made[0, :, 4:], middle[:, 4:])
    assert not torch.equal(made[0, :, :4], middle[:, :4])
    with pytest.raises(ValueError, match="8 x 8 pixels of the model, got 16 x 16"):
        pipe.edit_class(large, (0, 0, 8, 4), 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"classes": ["Trousers"]}, ValueError, "did you mean 'Trouser'"),
        ({"mask": torch.zeros(8, 8, dtype=torch.bool)}, ValueError, "mask of image must not be empty"),
        ({"mask": box_pixels(size=9)}, ValueError, "mask of image must have 8 x 8 pixels like the image, got 9 x 9"),
        ({"image": picture(size=9), "mask": box_pixels(size=9)}, ValueError, "8 x 8 pixels of the model, got 9 x 9"),
        (
            {"image": [picture()] * 2, "classes": [0, 1, 2]},
            ValueError,
            "image must be one image, or one for each of the 3 classes",
        ),
        (
            {"mask": [box_pixels()] * 2, "classes": [0, 1, 2]},
            ValueError,
            "mask must be one mask, or one for each of the 3",
        ),
        ({"image": [picture(), picture()[:, :4]], "classes": [0, 1]}, ValueError, "image 1 must have 8 x 4"),
        ({"dilation": -1}, ValueError, "dilation must be an integer in"),
        ({"blend": -1.0}, ValueError, "blend must be a number in"),
    ],
)
def test_what_cannot_be_edited_is_refused(pipe, options, error, message) -> None:
    given = {"image": picture(), "mask": box_pixels(), "classes": [0], **options}
    with pytest.raises(error, match=message):
        pipe.inpaint(given.pop("image"), given.pop("mask"), **given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.generate([0], guidance_scael=3.0), "option 'guidance_scael': did you mean 'guidance_scale'"),
        (lambda pipe: pipe.generate([0], num_inference_steps=8), "'num_inference_steps': its name here is num_steps"),
        (lambda pipe: pipe.generate([0], generator=torch.Generator()), "'generator': its name here is seed"),
        (lambda pipe: pipe.generate([0], cfg_scale=3.0), "guidance_scale, which is that of diffusers - 1"),
        (lambda pipe: pipe([0]), r"use pipe\.generate\(classes"),
        (lambda pipe: pipe.to(torch.float16), r"use pipe\.to\('cpu', dtype=torch\.float16\)"),
        (lambda pipe: MaskGIT.from_pretrained("x", torch_dtype=torch.float16), "'torch_dtype': its name here is dtype"),
    ],
)
def test_an_unknown_name_is_answered_with_the_one_to_use(pipe, call, message) -> None:
    with pytest.raises(TypeError, match=message):
        call(pipe)


# Image-to-image


def test_strength_1_generates_all_tokens(pipe) -> None:
    for settings in ({"num_steps": 12}, {"num_steps": 12, "guidance_scale": 3.0}):
        made = pipe.edit(picture(), strength=1, classes=[2, 0, 2], seed=5, output_type="pt", **settings)
        assert torch.equal(made, images(pipe, [2, 0, 2], seed=5, **settings))


@pytest.mark.parametrize(("strength", "count"), [(1e-3, 1), (0.25, 4), (0.26, 5), (0.6, 10), (0.99, 16)])
def test_strength_is_the_share_of_the_tokens_that_are_masked(pipe, strength, count) -> None:
    _, steps = recorded(pipe.edit, picture(), strength=strength, classes=[0, 1], num_steps=8)
    assert steps[0].was_masked.sum(1).tolist() == [count, count]
    known = ~steps[0].was_masked
    assert torch.equal(steps[-1].tokens[known], tokens_of(pipe, picture()).expand(2, -1)[known])
    assert steps[0].step == (0 if count == 16 else 1)


def test_an_image_to_image_result_depends_on_its_image_class_and_seed_only(pipe) -> None:
    given, options = [picture(number) for number in range(3)], {"strength": 0.5, "output_type": "pt"}
    whole = pipe.edit(given, classes=[0, 1, 2], seed=3, **options)
    for row in range(3):
        alone = pipe.edit(given[row], classes=[row], seed=3 + row, **options)
        assert (alone[0].int() - whole[row].int()).abs().max() <= 1  # rounding to bytes
    _, steps = recorded(pipe.edit, picture(), strength=0.5, classes=[0, 0], seed=[3, 4])
    assert not torch.equal(*steps[0].was_masked)  # each seed has its own positions


def test_a_larger_strength_masks_more_tokens_and_the_same(pipe) -> None:
    masks = [recorded(pipe.edit, picture(), strength=share)[1][0].was_masked for share in (0.3, 0.7)]
    assert (masks[1] >= masks[0]).all()


def test_larger_images_are_fitted_for_image_to_image_where_asked(pipe) -> None:
    made = pipe.edit(picture(size=16), strength=0.5, fit=True, output_type="pt")
    assert torch.equal(made, pipe.edit(fit_image(picture(size=16), image_size=8, crop=None), strength=0.5,
                                       output_type="pt"))  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0}, r"strength must be a number in \(0, 1\], got 0"),
        ({"strength": math.nan}, "strength must be a finite number"),
        ({"strength": 0.5, "image": picture(size=9)}, "8 x 8 pixels of the model, got 9 x 9"),
        ({"strength": 0.5, "dilation": 1}, "option 'dilation': "),
    ],
)
def test_image_to_image_refuses_what_it_cannot_do(pipe, options, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        pipe.edit(options.pop("image", picture()), **options)


# Settings of decoding


@pytest.mark.parametrize(
    "settings",
    [
        {"token_selector": "halton"},
        {"token_selector": {"name": "remdm", "strategy": "cap", "eta": 0.5}},
        {"sampling_temperature": 0.5},
        {"sampling_temperature": (3.0, 0.1)},
        {"top_k": 1},
        {"top_p": 0.3},
        {"tokens_per_step": [1, 1, 14]},
        {"mask_schedule": "exp", "num_steps": 8},
        {"guidance": {"name": "interval", "scale": 9.0}},
        {"negative_classes": 0, "guidance_scale": 5.0},
        {"decoding": DecodingConfig(16, "random")},
    ],
    ids=str,
)
def test_each_setting_changes_what_is_generated(pipe, settings) -> None:
    plain = [step.tokens for step in pipe.steps([0, 1, 2] * 4)][-1]
    steps = []
    pipe.generate([0, 1, 2] * 4, output_type="pt", callback=steps.append, **settings)
    assert not torch.equal(steps[-1].tokens, plain)


def test_no_class_is_a_class_where_the_model_was_trained_with_it(pipe, tmp_path) -> None:
    assert pipe.class_ids([None, 1]) == [3, 1]
    assert not torch.equal(images(pipe, [None] * 4), images(pipe, [0] * 4))
    bare = MaskGIT.from_pretrained(save_tiny_pretrained(tmp_path / "bare", class_dropout=0.0))
    with pytest.raises(ValueError, match="class must not be None: the model was trained without a null class"):
        bare.generate([None])


def test_a_model_without_a_null_class_is_guided_by_a_negative_class(tmp_path) -> None:
    bare = MaskGIT.from_pretrained(save_tiny_pretrained(tmp_path / "bare", class_dropout=0.0))
    with pytest.raises(
        ValueError, match=r"guidance must have scale 0 for a model that has no null class .* or name negative classes"
    ):
        bare.generate([1], guidance_scale=3.0)
    plain = images(bare, [1] * 4)
    assert not torch.equal(images(bare, [1] * 4, guidance_scale=3.0, negative_classes="Trouser"), plain)
    one_each = images(bare, [1] * 4, guidance_scale=3.0, negative_classes=[2] * 4)
    assert torch.equal(images(bare, [1] * 4, guidance_scale=3.0, negative_classes="Trouser"), one_each)
    with pytest.raises(ValueError, match="negative_classes must be one class, or one for each of the 2 classes, got 3"):
        bare.generate([0, 1], negative_classes=[0, 1, 2])


def test_the_first_step_is_computed_once_a_class_for_all_batches_and_anew_after_a_move(tiny_pretrained) -> None:
    own = MaskGIT.from_pretrained(tiny_pretrained)
    rows: list[int] = []
    network = own.transformer.network
    whole = network.forward_at
    network.forward_at = lambda *given: rows.append(len(given[1])) or whole(*given)
    first = images(own, [0, 1] * 3, batch_size=2, guidance_scale=0, num_steps=1)
    assert rows == [2]
    assert torch.equal(images(own, [0, 1] * 3, guidance_scale=0, num_steps=1), first)
    assert rows == [2]
    own.to("cpu")
    images(own, [0, 1], guidance_scale=0, num_steps=1)
    assert rows == [2, 2]


# Beyond the borders


def test_outpainting_keeps_the_image_bit_by_bit_and_goes_on_beyond_it(pipe) -> None:
    image = picture()
    for sides, place in (
        ({"right": 6}, (slice(0, 8), slice(0, 8))),
        ({"left": 4}, (slice(0, 8), slice(4, 12))),
        ({"up": 2, "down": 10}, (slice(2, 10), slice(0, 8))),
        ({"left": 4, "right": 4, "up": 4, "down": 4}, (slice(4, 12), slice(4, 12))),
    ):
        made = pipe.outpaint(image, classes=[1, 2], blend=0, output_type="pt", **sides)
        height, width = 8 + sides.get("up", 0) + sides.get("down", 0), 8 + sides.get("left", 0) + sides.get("right", 0)
        assert made.shape == (2, 1, height, width)
        assert torch.equal(made[:, :, place[0], place[1]], image.expand(2, -1, -1, -1)), sides
        outside = torch.ones(height, width, dtype=torch.bool)
        outside[place] = False
        assert made[:, 0, outside].float().std() > 0


def test_half_of_an_image_is_completed_as_in_the_papers_table_2(pipe) -> None:
    half = picture()[..., :4]
    made, steps = recorded(pipe.outpaint, half, right=4, classes=[1], blend=0)
    assert made.shape == (1, 1, 8, 8)
    assert torch.equal(made[0, ..., :4], half)
    repeated = torch.cat([half, half[..., -1:].expand(-1, -1, 4)], dim=-1)  # as if the picture continued
    known = tokens_of(pipe, repeated).unflatten(0, (4, 4))[:, :2]
    assert torch.equal(steps[-1].tokens[0].unflatten(0, (4, 4))[:, :2], known)


def test_a_panorama_of_the_models_own_size_is_what_generate_makes(pipe) -> None:
    assert torch.equal(pipe.panorama([0, 1], 8, output_type="pt"), images(pipe, [0, 1]))


def test_a_panorama_is_as_wide_as_asked_and_depends_on_class_and_seed_alone(pipe) -> None:
    made, steps = recorded(pipe.panorama, [0, 1, 2], 22, seed=5)
    assert made.shape == (3, 1, 8, 22)
    assert steps[0].tokens.shape == (3, 4 * 11)
    assert not steps[-1].still_masked.any()
    assert all(step.still_masked.any() for step in steps[:-1])  # windows to come are masked
    one_by_one = pipe.panorama([0, 1, 2], 22, seed=5, batch_size=1, output_type="pt")
    assert (made.int() - one_by_one.int()).abs().max() <= 1
    assert pipe.panorama([0], 16, height=12, output_type="np").shape == (1, 12, 16, 1)


def test_windows_of_a_panorama_have_noise_of_their_own(pipe) -> None:
    _, steps = recorded(pipe.panorama, [0], 32, overlap=0.01)  # windows side by side, or nearly
    tokens = steps[-1].tokens[0].unflatten(0, (4, 16))
    assert not torch.equal(tokens[:, :4], tokens[:, 4:8])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.outpaint(picture()), "one of left, right, up and down must be > 0"),
        (lambda pipe: pipe.outpaint(picture(), right=-2), r"right must be an integer in \[0, 64000000\], got -2"),
        (lambda pipe: pipe.outpaint(picture(), right=3), "right must be a multiple of 2 pixels, .* use 2 or 4"),
        (lambda pipe: pipe.outpaint(picture(size=7), right=2), "height of the image must be a multiple of 2 pixels"),
        (lambda pipe: pipe.outpaint(picture(size=2), right=2), "height must be >= 8 pixels"),
        (lambda pipe: pipe.outpaint(picture(), right=2, fit=True), "option 'fit': "),
        (lambda pipe: pipe.outpaint(picture(), right=2, overlap=1.0), r"overlap must be a number in \(0, 1\)"),
        (lambda pipe: pipe.panorama([0], 6), "width must be >= 8 pixels, the width of the model's images, got 6"),
        (
            lambda pipe: pipe.panorama([0], 9),
            "width must be a multiple of 2 pixels, the size of a token, got 9; use 8 or",
        ),
    ],
)
def test_what_cannot_lie_on_a_canvas_is_refused(pipe, call, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(pipe)


def test_without_classes_a_region_is_filled_as_no_class(pipe) -> None:
    made = pipe.inpaint(picture(), box_pixels(), output_type="pt")
    assert torch.equal(made, pipe.inpaint(picture(), box_pixels(), classes=[None], output_type="pt"))
