"""Generation, editing and canvases: results depend on class, seed and settings only, and known pixels stay."""

import logging

import pytest
import torch

from maskgit_pl.data.images import fit_image
from maskgit_pl.decoding import DecodingStep
from maskgit_pl.decoding.config import AutoregressiveDecoding
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline import tasks as generate
from tests.conftest import save_tiny_pretrained
from tests.pipeline.conftest import images, last_tokens

N = 16


@pytest.fixture(scope="module")
def causal(tiny_autoregressive) -> MaskGIT:
    return MaskGIT.from_pretrained(tiny_autoregressive)


@pytest.mark.parametrize("kind", ["pipe", "causal"])
def test_an_image_depends_on_its_class_and_seed_only(request, kind) -> None:
    pipe, classes = request.getfixturevalue(kind), [0, 1, None, 1]
    together = last_tokens(pipe, classes, seed=3)
    single = [last_tokens(pipe, [label], seed=3 + row) for row, label in enumerate(classes)]
    assert torch.equal(together, torch.cat(single))
    pixels = images(pipe, classes, seed=3), images(pipe, classes, seed=[3, 4, 5, 6], batch_size=1)
    assert (pixels[0].int() - pixels[1].int()).abs().max() <= 1  # rounding to bytes


def test_the_callback_gets_each_step_of_each_batch(pipe, causal) -> None:
    for model, options, num_steps in ((pipe, {"num_steps": 3}, 3), (causal, {}, N)):
        steps: list[DecodingStep] = []
        images(model, [0, 1, 2], batch_size=2, callback=steps.append, **options)
        assert [step.step for step in steps] == [*range(num_steps)] * 2


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 8.0},
        {"guidance_scale": 8.0, "negative_class": "Trouser"},
        {"sampling_temperature": (1.0, 0.1)},
        {"top_k": 1},
        {"decoding": AutoregressiveDecoding(top_k=1).to_config(N)},
    ],
    ids=str,
)
def test_an_autoregressive_model_follows_each_of_its_settings(causal, settings) -> None:
    unguided = images(causal, [0, 1, 2], guidance_scale=0)
    assert not torch.equal(images(causal, [0, 1, 2], **{"guidance_scale": 0, **settings}), unguided)


def test_an_autoregressive_model_edits_nothing(causal) -> None:
    image, mask = torch.zeros(1, 8, 8, dtype=torch.uint8), torch.ones(8, 8, dtype=torch.bool)
    for task, call in {
        "inpaint": lambda: causal.inpaint(image, mask, classes=[0]),
        "edit": lambda: causal.edit(image, strength=0.5),
        "outpaint": lambda: causal.outpaint(image, left=2, classes=[0]),
        "panorama": lambda: causal.panorama([0], 16),
    }.items():
        with pytest.raises(ValueError, match=f"{task} requires a model with bidirectional attention"):
            call()


def test_a_saved_autoregressive_pipeline_generates_the_same(tiny_autoregressive, tmp_path, caplog) -> None:
    decoding = AutoregressiveDecoding("constant", 0.5).to_config(N)
    own = MaskGIT.from_pretrained(tiny_autoregressive, decoding=decoding)
    own.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        again = MaskGIT.from_pretrained(tmp_path)
    assert again.decoding == own.decoding
    assert torch.equal(images(again, [0, 1, 2]), images(own, [0, 1, 2]))
    assert not caplog.records


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


def test_tokens_outside_the_region_stay_at_every_step(pipe) -> None:
    image = picture()
    _, steps = recorded(pipe.inpaint, image, BOX, classes=1, num_steps=6)
    known = ~REGION.flatten()
    assert torch.equal(steps[0].was_masked[0], ~known)
    for step in steps:
        assert torch.equal(step.tokens[0][known], tokens_of(pipe, image)[known])
        assert not step.still_masked[0][known].any()
    assert not torch.equal(steps[-1].tokens[0], tokens_of(pipe, image))


def test_pixels_outside_the_region_stay_bit_by_bit_with_a_hard_edge(pipe) -> None:
    image = picture()
    region = REGION.repeat_interleave(2, 0).repeat_interleave(2, 1)
    hard, steps = recorded(pipe.inpaint, image, BOX, classes=[1] * 5, blend=0)
    assert torch.equal(hard[..., ~region], image[..., ~region].expand(5, -1, -1))
    decoded = pipe.tokenizer.network.decode(steps[-1].tokens, (4, 4)).clamp(0, 1).mul(255).round().to(torch.uint8)
    assert torch.equal(hard[..., region], decoded[..., region])
    soft = pipe.inpaint(image, BOX, classes=[1] * 5, blend=3, output_type="pt")
    assert not torch.equal(soft[..., ~region], hard[..., ~region])


@pytest.mark.parametrize("settings", [{"num_steps": 12}, {"num_steps": 12, "guidance_scale": 3.0}], ids=str)
def test_an_edit_of_everything_is_a_generation(pipe, settings) -> None:
    expected = images(pipe, [2, 0, 2], seed=5, **settings)
    options = {"classes": [2, 0, 2], "seed": 5, "output_type": "pt", **settings}
    assert torch.equal(pipe.inpaint(picture(), torch.ones(8, 8, dtype=torch.bool), blend=0, **options), expected)
    assert torch.equal(pipe.edit(picture(), strength=1, **options), expected)


def test_an_edit_does_not_depend_on_its_batch(pipe) -> None:
    pictures = [picture(number) for number in range(4)]
    masks = [box_pixels(), torch.ones(8, 8, dtype=torch.bool), box_pixels((3, 3, 8, 8)), box_pixels((7, 0, 8, 1))]
    classes, options = [1, 1, 2, 1], {"num_steps": 8, "output_type": "pt"}  # with several first steps
    together = pipe.inpaint(pictures, masks, classes=classes, seed=3, **options)
    assert len({variant.numpy().tobytes() for variant in together}) == 4
    for row in range(4):
        single = pipe.inpaint(pictures[row], masks[row], classes=[classes[row]], seed=3 + row, **options)
        assert (single[0].int() - together[row].int()).abs().max() <= 1  # rounding to bytes
    small = pipe.inpaint(pictures, masks, classes=classes, seed=3, batch_size=2, **options)
    assert (small.int() - together.int()).abs().max() <= 1


def test_one_image_gives_a_variant_for_each_class_and_seed(pipe) -> None:
    image, mask, options = picture(), box_pixels(), {"guidance_scale": 40.0, "output_type": "pt"}
    variants = pipe.inpaint(image, mask, classes=["Trouser", 1, 1], seed=[5, 5, 6], **options)
    assert len({variant.numpy().tobytes() for variant in variants}) == 3
    listed = pipe.inpaint([image] * 3, [mask] * 3, classes=[2, 1, 1], seed=[5, 5, 6], **options)
    assert torch.equal(variants, listed)
    assert torch.equal(variants[1], pipe.inpaint(image, BOX, classes="T-shirt", seed=5, **options)[0])
    without_class = pipe.inpaint(image, mask, **options)
    assert torch.equal(without_class, pipe.inpaint(image, mask, classes=[None], **options))


def test_colour_is_edited_and_larger_images_are_cropped_with_fit(tmp_path) -> None:
    pipe = MaskGIT.from_pretrained(save_tiny_pretrained(tmp_path, in_channels=3))
    large = picture(channels=3, size=16)
    edited = pipe.inpaint(large, (0, 0, 8, 4), classes=1, fit=True, blend=0, output_type="pt")
    middle = fit_image(large, image_size=8, crop=None)
    assert torch.equal(edited[0, :, 4:], middle[:, 4:])
    assert not torch.equal(edited[0, :, :4], middle[:, :4])
    redrawn = pipe.edit(large, strength=0.5, fit=True, output_type="pt")
    assert torch.equal(redrawn, pipe.edit(middle, strength=0.5, output_type="pt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": picture(size=9), "mask": box_pixels(size=9)}, "8 x 8 pixels of the model, got 9 x 9"),
        ({"image": [picture()] * 2, "classes": [0, 1, 2]}, "image must be one image, or one for each of the 3 classes"),
        ({"image": [picture(), picture()[:, :4]], "classes": [0, 1]}, "image 1 must have 8 x 4"),
        ({"blend": -1}, "blend must be a number in"),
    ],
)
def test_images_and_masks_that_do_not_fit_are_refused(pipe, options, message) -> None:
    given = {"image": picture(), "mask": box_pixels(), "classes": [0], **options}
    with pytest.raises(ValueError, match=message):
        pipe.inpaint(given.pop("image"), given.pop("mask"), **given)


@pytest.mark.parametrize(("strength", "count"), [(1e-3, 1), (torch.tensor(0.25), 4), (0.26, 5), (0.6, 10), (0.99, 16)])
def test_strength_is_the_share_of_the_tokens_that_are_masked(pipe, strength, count) -> None:
    _, steps = recorded(pipe.edit, picture(), strength=strength, classes=[0, 1], num_steps=8)
    assert steps[0].was_masked.sum(1).tolist() == [count, count]
    known = ~steps[0].was_masked
    assert torch.equal(steps[-1].tokens[known], tokens_of(pipe, picture()).expand(2, -1)[known])
    assert steps[0].step == (0 if count == 16 else 1)


def test_the_positions_of_a_seed_are_its_own_and_grow_with_the_strength(pipe) -> None:
    _, steps = recorded(pipe.edit, picture(), strength=0.5, classes=[0, 0], seed=[3, 4])
    assert not torch.equal(*steps[0].was_masked)
    masks = [recorded(pipe.edit, picture(), strength=share)[1][0].was_masked for share in (0.3, 0.7)]
    assert (masks[1] >= masks[0]).all()


def test_a_strength_out_of_range_is_refused(pipe) -> None:
    with pytest.raises(ValueError, match=r"strength must be a number in \(0, 1\], got 0"):
        pipe.edit(picture(), strength=0)


@pytest.mark.parametrize(
    ("sides", "rows", "columns"),
    [
        ({"right": 6}, slice(0, 8), slice(0, 8)),
        ({"left": 4}, slice(0, 8), slice(4, 12)),
        ({"left": 4, "right": 4, "up": 4, "down": 4}, slice(4, 12), slice(4, 12)),
    ],
    ids=str,
)
def test_outpainting_keeps_the_image_bit_by_bit_with_a_hard_edge(pipe, sides, rows, columns) -> None:
    wide = pipe.outpaint(picture(), classes=[1, 2], blend=0, output_type="pt", **sides)
    height, width = 8 + sides.get("up", 0) + sides.get("down", 0), 8 + sides.get("left", 0) + sides.get("right", 0)
    assert wide.shape == (2, 1, height, width)
    assert torch.equal(wide[:, :, rows, columns], picture().expand(2, -1, -1, -1))
    outside = torch.ones(height, width, dtype=torch.bool)
    outside[rows, columns] = False
    assert wide[:, 0, outside].float().std() > 0


def test_a_blurred_seam_of_outpainting_blends_with_nothing_outside_of_the_image(pipe) -> None:
    hard, soft = (pipe.outpaint(picture(), right=6, classes=[1], blend=blend, output_type="pt") for blend in (0, 2))
    assert torch.equal(hard[..., 8:], soft[..., 8:])
    assert not torch.equal(hard[..., :8], soft[..., :8])


def test_half_of_an_image_is_completed_as_in_table_2(pipe) -> None:
    half = picture()[..., :4]
    whole, steps = recorded(pipe.outpaint, half, right=4, classes=[1], blend=0)
    assert torch.equal(whole[0, ..., :4], half)
    repeated = torch.cat([half, half[..., -1:].expand(-1, -1, 4)], dim=-1)  # as if the picture continued
    known = tokens_of(pipe, repeated).unflatten(0, (4, 4))[:, :2]
    assert torch.equal(steps[-1].tokens[0].unflatten(0, (4, 4))[:, :2], known)


def test_a_panorama_depends_on_its_class_and_seed_only(pipe) -> None:
    assert torch.equal(pipe.panorama([0, 1], 8, output_type="pt"), images(pipe, [0, 1]))
    wide, steps = recorded(pipe.panorama, [0, 1, 2], 22, seed=5)
    assert wide.shape == (3, 1, 8, 22)
    assert steps[0].tokens.shape == (3, 4 * 11)
    assert not steps[-1].still_masked.any()
    assert all(step.still_masked.any() for step in steps[:-1])  # windows to come are masked
    single = pipe.panorama([2], 22, seed=7, output_type="pt")
    assert (wide[2].int() - single[0].int()).abs().max() <= 1


def test_windows_have_noise_of_their_own(pipe, monkeypatch) -> None:
    seeds, decode = [], generate.decode

    def record(transformer, request, **options):
        seeds.extend(request.seeds)
        return decode(transformer, request, **options)

    monkeypatch.setattr(generate, "decode", record)
    pipe.panorama([0, 1], 16, seed=5)  # three windows of two images
    assert seeds[:2] == [5, 6]
    assert len(set(seeds)) == len(seeds) == 6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: pipe.outpaint(picture()), "one of left, right, up and down must be > 0"),
        (lambda pipe: pipe.outpaint(picture(), right=3), "right must be a multiple of 2 pixels, .* use 2 or 4"),
        (lambda pipe: pipe.outpaint(picture(size=2), right=2), r"height must be an integer in \[8, "),
        (lambda pipe: pipe.outpaint(picture(), right=2, fit=True), "option 'fit': "),
        (lambda pipe: pipe.panorama([0], 6), r"width must be an integer in \[8, .*, got 6"),
    ],
)
def test_sizes_that_no_canvas_has_are_refused(pipe, call, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(pipe)


# Images that do not fill their last tokens: 7 pixels in 4 tokens of 2 pixels each way


@pytest.fixture(scope="module")
def cut(tmp_path_factory) -> MaskGIT:
    return MaskGIT.from_pretrained(save_tiny_pretrained(tmp_path_factory.mktemp("cut") / "pretrained", image_size=7))


def test_images_have_the_size_of_the_model_and_canvases_whole_tokens(cut):
    tokens = torch.arange(16)[None]
    image, canvas = cut.tokenizer.decode(tokens), cut.tokenizer.decode(tokens, grid=(4, 4))
    assert (image.shape, canvas.shape) == ((1, 1, 7, 7), (1, 1, 8, 8))
    assert torch.equal(canvas[..., :7, :7], image)
    assert images(cut, [0]).shape == (1, 1, 7, 7)
    assert cut.panorama([0], 10, output_type="pt").shape == (1, 1, 8, 10)
    assert cut.panorama([0], 8, height=10, output_type="pt").shape == (1, 1, 10, 8)
    with pytest.raises(ValueError, match=r"width must be a multiple of 2 pixels, the size of a token, got 7; use 8$"):
        cut.panorama([0], 7)
    narrow = torch.arange(48, dtype=torch.uint8).reshape(1, 8, 6)
    wide = cut.outpaint(narrow, right=2, classes=[0], blend=0, output_type="pt")
    assert torch.equal(wide[0, ..., :6], narrow)
