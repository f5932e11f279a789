"""Every argument of the public methods of ``MaskGIT`` works or is refused in a sentence that names it."""

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from maskgit_pl import MaskGIT
from maskgit_pl.errors import _is_raised_by_us

ODD = [
    None, True, "x", "1", b"1", 0, 1, -1, 3, 10**30, 1.5, -0.5, math.nan, math.inf, 1j, Fraction(1, 2), object(),
    np.int64(1), np.uint8(8), np.float32(0.5), np.bool_(True), np.array(1), np.array(0.5), np.array([1, 2]),
    torch.tensor(1), torch.tensor(1.5), torch.tensor(True), torch.tensor([1]), torch.tensor([1.5, 2]),
    [], [1], [1.7], [None], ["1"], [[1]], [10**30], (1, 2), (0.5, 1.5, 2), {}, {"name": "x"}, {1}, range(2),
]  # fmt: skip
IMAGE = torch.arange(64, dtype=torch.uint8).reshape(1, 8, 8)
MASK = IMAGE[0] > 20
DECODING = (
    "seed", "batch_size", "callback", "negative_classes", "negative_model", "vectors", "decoding", "num_steps",
    "token_selector", "guidance", "guidance_scale", "choice_temperature", "sampling_temperature", "top_k", "top_p",
    "tokens_per_step", "mask_schedule", "draw_method",
)  # fmt: skip
EDITING = ("dilation", "blend", "fit")
# Method: arguments that work, and the names of all arguments.
METHODS = {
    "generate": ({"classes": [0]}, ("classes", "output_type", *DECODING)),
    "steps": ({"classes": [0]}, ("classes", "seed")),
    "record": ({"classes": [0]}, ("classes", "seed", "batch_size")),
    "inpaint": ({"image": IMAGE, "mask": MASK}, ("image", "mask", "classes", "batch_size", "seed", *EDITING)),
    "edit_class": (
        {"image": IMAGE, "region": MASK, "class_": 1},
        ("image", "region", "class_", "variants", "seed", *EDITING),
    ),
    "edit": ({"image": IMAGE, "strength": 0.5}, ("image", "strength", "classes", "seed", "fit")),
    "outpaint": (
        {"image": IMAGE, "right": 2},
        ("image", "left", "right", "up", "down", "classes", "overlap", "seed", *EDITING[:2]),
    ),
    "panorama": ({"classes": [0], "width": 8}, ("classes", "width", "height", "overlap", "seed", "batch_size")),
}
# Words by which a message names an argument, if not by its name.
WORDS = {
    "classes": ("class",),
    "class_": ("class",),
    "negative_classes": ("class",),
    "region": ("box", "mask"),
    "token_selector": ("token selector",),
    "mask_schedule": ("mask schedule",),
    "choice_temperature": ("choice_temperature", "token selector"),
    "tokens_per_step": ("tokens_per_step", "num_steps"),
    "right": ("right", "one of left"),
    "negative_model": ("negative_model", "owner/name"),
}


@pytest.fixture(scope="module")
def pipe(tiny_pretrained) -> MaskGIT:
    return MaskGIT.from_pretrained(tiny_pretrained)


def error_of(pipe: MaskGIT, method: str, arguments: dict[str, Any]) -> Exception | None:
    """Returns the error of a call; None if it works."""
    try:
        made = getattr(pipe, method)(**arguments)
        list(made if method == "steps" else ())
    except (TypeError, ValueError, FileNotFoundError) as error:
        return error
    return None


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name"), [(method, name) for method in METHODS for name in METHODS[method][1]])
def test_an_odd_value_works_or_is_refused_by_name(pipe, method, name):
    refused = []
    for value in ODD:
        error = error_of(pipe, method, METHODS[method][0] | {name: value})
        if error is not None:
            assert _is_raised_by_us(error), f"{name}={value!r}: {error}"
            assert any(word in str(error) for word in WORDS.get(name, (name,))), f"{name}={value!r}: {error}"
            refused.append(value)
    assert refused


def test_numbers_of_numpy_and_tensors_are_numbers(pipe):
    plain = pipe.generate([1, 2], seed=3, num_steps=4, top_k=5, batch_size=1, negative_classes=2, guidance_scale=2.5,
                          output_type="pt")  # fmt: skip
    number = np.int64
    made = pipe.generate(
        [number(1), torch.tensor(2)],
        seed=np.uint8(3),
        num_steps=number(4),
        top_k=torch.tensor(5),
        batch_size=number(1),
        negative_classes=number(2),
        guidance_scale=np.float32(2.5),
        output_type="pt",
    )
    assert torch.equal(made, plain)
    assert type(pipe.decoding_with(num_steps=number(4)).num_steps) is int
    wide = pipe.panorama([1], number(12), height=number(8), seed=np.array([3]), output_type="pt")
    assert torch.equal(wide, pipe.panorama([1], 12, seed=3, output_type="pt"))
    outside = pipe.outpaint(IMAGE, right=number(2), dilation=number(1), blend=np.float64(1), output_type="pt")
    assert torch.equal(outside, pipe.outpaint(IMAGE, right=2, dilation=1, blend=1, output_type="pt"))
    assert len(pipe.edit_class(IMAGE, MASK, number(1), variants=number(2))) == 2


def test_an_iterator_is_a_list(pipe):
    made = pipe.record(iter([0, 1]), seed=iter([5, 6]), negative_classes=iter([1, 2]))
    assert made.seeds == [5, 6]
    assert np.array_equal(made.images[1], pipe.generate([1], seed=6, negative_classes=2)[0])
