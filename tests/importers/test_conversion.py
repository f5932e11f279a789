"""A table of names converts tensors exactly, and a pretrained folder is written whole and described."""

import shutil

import pytest
import torch

from maskgit_pl.importers.conversion import (
    Imported,
    Rule,
    check_out,
    choose_class_names,
    convert,
    number_rules,
    read_widths,
    shape_of,
)
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig

TABLE = [
    Rule("norm", "n"),
    Rule("blocks.{}.both", "b.{}.one b.{}.two", "inputs heads size -> (heads size) inputs"),
    Rule("blocks.{}.rows", "b.{}.rows"),
    Rule("optional", "o"),
]
SHAPES = {"norm": (3,), "blocks.0.both": (8, 3), "blocks.0.rows": (3, 5)}


def theirs():
    sizes = {"n": (3,), "b.0.one": (3, 2, 2), "b.0.two": (3, 2, 2), "b.0.rows": (3, 5)}
    return {name: torch.rand(shape).half() for name, shape in sizes.items()}


def test_the_rows_of_their_tensors_are_the_rows_of_ours():
    tensors = theirs()
    weights = convert(tensors, number_rules(TABLE, 1), SHAPES, heads=2)
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == SHAPES
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert torch.equal(weights["blocks.0.both"][4:].T.reshape(3, 2, 2), tensors["b.0.two"].float())
    assert torch.equal(weights["blocks.0.rows"], tensors["b.0.rows"].float())
    storages = [tensor.untyped_storage().data_ptr() for tensor in weights.values()]
    assert len(set(storages)) == len(storages)  # safetensors refuses tensors that share memory


def test_all_differences_are_in_one_message():
    tensors = theirs() | {"b.0.two": torch.zeros(3, 4), **{f"x{number}": torch.zeros(1) for number in range(5)}}
    del tensors["n"]
    with pytest.raises(ValueError, match="tensors do not fit the network's sizes: ") as refusal:
        convert(tensors, number_rules(TABLE, 1), SHAPES, heads=2)
    assert str(refusal.value).partition("sizes: ")[2] == (
        "b.0.two must have shape (3, 2, 2), got (3, 4); n is missing; 'x0' is not in the network and 4 more"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shape_of({"a": torch.zeros(2)}, "a"), r"tensor a must have 2 axes of sizes >= 1, got shape \(2,\)"),
        (lambda: read_widths(32, []), r"multiples of the first convolution's 32, got \[\]"),
    ],
)
def test_impossible_sizes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_report_has_sizes_notes_and_the_next_command(tmp_path):
    config = VQGANConfig(3, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, codebook_size=8, code_dim=4)
    weights = VQGAN(config).state_dict()
    report = str(Imported(tmp_path / "a b", "project", config, weights, (4, 16), None, notes=["a note"]))
    assert "  images    3 x 4 x 16 -> 2 x 8 tokens of 8 codes\n" in report
    assert report.endswith(f"--dataset NAME --recipe RECIPE --tokenizer {tmp_path}/a b/tokenizer")
    assert "  note      a note\nnext: maskgit tokenize" in report


@pytest.mark.parametrize("kind", ["file", "link", "other folder", "in a file"])
def test_nothing_is_overwritten(kind, tmp_path):
    out, folder = tmp_path / "out", tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        out.symlink_to(folder)
    elif kind == "other folder":
        shutil.copytree(folder, out)
    else:
        out = folder / "notes.txt" / "out"
    message = r"import .*out must be a new or empty folder|writable folder"
    with pytest.raises((FileExistsError, ValueError), match=message):
        check_out(out)


def test_a_thousand_classes_are_those_of_imagenet_and_others_are_numbers():
    names = choose_class_names(1000)
    expected = {0: "tench", 9: "ostrich", 207: "golden retriever", 388: "giant panda", 999: "toilet tissue"}
    assert {number: names[number] for number in expected} == expected
    assert len(names) == 1000
    assert choose_class_names(3) == ("0", "1", "2")
