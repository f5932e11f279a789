import shutil

import pytest
import torch

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.importers.folder import Imported, ImportedTransformer, check_out, choose_class_names, write_import
from maskgit_pl.networks.transformer import TransformerConfig
from maskgit_pl.networks.vqgan import VQGAN, VQGANConfig
from maskgit_pl.pipeline.pretrained import load_tokenizer, load_transformer


def imported(out, *, with_transformer=False, image_size=8, **more):
    config = VQGANConfig(3, base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, codebook_size=8, code_dim=4)
    network = TransformerConfig(8, 3, (4, 4), 16, 1, 2, 32)
    weights, decoding = (
        network.create().state_dict(),
        DecodingConfig(num_steps=4, guidance={"name": "constant", "scale": 0.5}),
    )
    transformer = ImportedTransformer(network, weights, "cosine", decoding, ("cat", "dog", "owl"))
    state = VQGAN(config).state_dict()
    return Imported(out, "project", config, state, image_size, transformer if with_transformer else None, **more)


def test_a_folder_with_both_parts_is_written_and_described(tmp_path):
    made = write_import(imported(tmp_path / "new" / "out", with_transformer=True))
    tokenizer, transformer = load_tokenizer(made.folder / "tokenizer"), load_transformer(made.folder / "transformer")
    assert tokenizer.image_size == 8
    assert transformer.class_names == ("cat", "dog", "owl")
    assert transformer.tokenizer_fingerprint == tokenizer.fingerprint
    for line in (
        f"{made.folder}: project layout, {sum(part.numel() for part in transformer.network.parameters()):,} parameters",
        "  images    3 x 8 x 8 -> 4 x 4 tokens",
        "  codebook  8 codes of size 4, quantizer gradient",
        "  network   bert, 1 blocks",
        "  classes   3, 'cat' to 'owl'",
        "  decoding  4 steps, confidence, guidance constant scale 0.5",
        "  ignored   nothing",
        f"next: maskgit sample {made.folder} --classes 0,2",
    ):
        assert line in str(made).splitlines()


def test_a_tokenizer_is_described_with_the_next_commands_and_printable_names(tmp_path):
    names = ["\x1b]0;title\x07\n", "x" * 10_000, *(f"entry {number}" for number in range(1000))]
    made = write_import(imported(tmp_path / "a b", image_size=(4, 16), ignored=names, notes=["a note"]))
    lines = str(made).splitlines()
    options = f"--dataset NAME --recipe paper-256 --tokenizer '{made.folder}/tokenizer' --model.network.codebook_size 8"
    assert lines[1] == "  images    3 x 4 x 16 -> 2 x 8 tokens"
    assert lines[-3:-1] == ["  note      a note", f"next: maskgit tokenize {options} --model.network.grid '[2,8]'"]
    assert lines[-1].startswith(f"then: maskgit train transformer {options}")
    ignored = next(line for line in lines if line.startswith("  ignored "))
    assert str(made).replace("\n", "").isprintable()
    assert r"\x1b]0;title\x07\n" in ignored
    assert len(ignored) < 1000


def test_a_wrong_image_size_and_weights_that_are_not_finite_leave_nothing(tmp_path):
    with pytest.raises(ValueError, match="image size must be a positive multiple"):
        write_import(imported(tmp_path / "out", image_size=0))
    made = imported(tmp_path / "out", with_transformer=True)
    made.transformer.weights["head_bias"].fill_(torch.inf)  # the tokenizer is written already
    with pytest.raises(ValueError, match="must hold finite numbers, got inf"):
        write_import(made)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_even_if_a_file_manager_has_shown_it(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".DS_Store").touch()
    write_import(imported(tmp_path / "out"))
    assert (tmp_path / "out" / "tokenizer" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["file", "link", "other folder", "pretrained", "in a file"])
def test_what_is_something_else_is_never_overwritten(kind, tmp_path):
    out, made = tmp_path / "out", write_import(imported(tmp_path / "made")).folder
    if kind == "file":
        out.write_text("mine")
    elif kind == "link":
        out.symlink_to(made)
    elif kind == "other folder":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    elif kind == "pretrained":
        shutil.copytree(made, out)
    else:
        (tmp_path / "file").write_text("mine")
        out = tmp_path / "file" / "out"
    with pytest.raises(
        (FileExistsError, ValueError), match=r"import .*out must be a new or empty folder|writable folder"
    ):
        check_out(out)


def test_a_thousand_classes_are_those_of_imagenet_and_others_are_numbers():
    names = choose_class_names(None, 1000)
    known = {0: "tench", 9: "ostrich", 207: "golden retriever", 281: "tabby", 388: "giant panda", 999: "toilet tissue"}
    assert {number: names[number] for number in known} == known
    assert len(names) == 1000
    assert choose_class_names(None, 3) == ("0", "1", "2")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # the second has a byte order mark
def test_class_names_stand_in_a_list_or_in_a_file_one_a_line(encoding, tmp_path):
    names = ("Käse 1", "Käse 2")
    (tmp_path / "names.txt").write_text("".join(f"{name} \n" for name in names), encoding=encoding)
    assert choose_class_names(tmp_path / "names.txt", 2) == choose_class_names(names, 2) == names


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a"], "must be 3, one for each class of the transformer, got 1"),
        (["a", " ", "c"], "got 3, 1 of them empty; change the list"),
        ("nowhere", "class names .*nowhere must be a text in UTF-8, one name per line, got .*No such file"),
        ("latin", "class names .*latin must be a text in UTF-8"),
    ],
)
def test_names_that_do_not_fit_are_refused(names, message, tmp_path):
    (tmp_path / "latin").write_bytes("Käse\n".encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        choose_class_names(tmp_path / names if isinstance(names, str) else names, 3)
