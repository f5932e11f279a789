import pytest
import torch

from maskgit_pl.importers.rules import Rule, convert, count_numbers, number_rules, read_widths, shape_of

HEADS = "inputs heads size -> (heads size) inputs"
TABLE = [
    Rule("norm", "n"),
    Rule("blocks.{}.both", "b.{}.one b.{}.two", HEADS),
    Rule("blocks.{}.first blocks.{}.second", "b.{}.rows"),
    Rule("optional", "o"),
]
SHAPES = {"norm": (3,), "blocks.0.both": (8, 3), "blocks.0.first": (1, 5), "blocks.0.second": (2, 5)}


def theirs():
    sizes = {"n": (3,), "b.0.one": (3, 2, 2), "b.0.two": (3, 2, 2), "b.0.rows": (3, 5)}
    return {name: torch.rand(shape).half() for name, shape in sizes.items()}


def test_the_rows_of_theirs_are_the_rows_of_ours():
    tensors = theirs()
    weights = convert(tensors, number_rules(TABLE, 1), SHAPES, heads=2)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == SHAPES
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert torch.equal(weights["blocks.0.both"][4:].T.reshape(3, 2, 2), tensors["b.0.two"].float())
    assert torch.equal(weights["blocks.0.second"], tensors["b.0.rows"][1:].float())
    storages = [tensor.untyped_storage().data_ptr() for tensor in weights.values()]
    assert len(set(storages)) == len(storages)  # safetensors refuses tensors that share memory


def test_all_differences_are_in_one_message():
    tensors = theirs() | {"b.0.two": torch.zeros(3, 4), **{f"x{number}": torch.zeros(1) for number in range(5)}}
    del tensors["n"]
    with pytest.raises(ValueError, match="tensors must have the names and shapes of the network, got ") as caught:
        convert(tensors, number_rules(TABLE, 1), SHAPES, heads=2)
    differences = str(caught.value).partition("got ")[2]
    assert differences == (
        "missing: n; not in the network: x0, x1, x2 and 2 more; of another shape: b.0.two (3, 4) instead of (3, 2, 2)"
    )


def test_sizes_are_read_off_names_and_shapes():
    assert count_numbers(["a.0.x", "a.1.x", "a.1.y", "b.2.x", "a.b"], "a.") == 2
    assert shape_of({"a": torch.zeros(2, 3)}, "a") == (2, 3)
    assert read_widths(32, [32, 64]) == (1, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shape_of({}, "a"), "tensors are missing: a"),
        (lambda: shape_of({"a": torch.zeros(2)}, "a"), r"tensor a must have 2 axes of sizes >= 1, got shape \(2,\)"),
        (lambda: shape_of({"a": torch.zeros(2, 0)}, "a"), r"of sizes >= 1, got shape \(2, 0\)"),
        (lambda: read_widths(32, [32, 40]), r"multiples of the first convolution's 32, got \[32, 40\]"),
        (lambda: read_widths(32, []), r"got \[\]"),
    ],
)
def test_sizes_that_cannot_be_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
