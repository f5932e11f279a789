import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from maskgit_pl.cli import main
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.pipeline.pretrained import load_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENIZER, TRANSFORMER = GOLDEN / "vqvae_checkpoint.msgpack", GOLDEN / "transformer_n16_checkpoint.msgpack"


def call(*words: object) -> int:
    return main(["import-jax", *map(str, words)])


def test_an_import_says_what_it_made_and_what_to_do_next_and_that_works(tmp_path, capsys):
    out = tmp_path / "new" / "small"
    assert call("--tokenizer", TOKENIZER, "--transformer", TRANSFORMER, "--out", out, "--image-size", 8) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tokenizer: 390,435 parameters; 64 codes; images of 8 x 8 px are 4 x 4 tokens"
    assert lines[1] == "transformer: 77,323 parameters; 2 blocks of size 64; 10 classes, '0' to '9'"
    written, _, following = lines[2].partition(": written; next: maskgit ")
    assert written == str(out)
    assert (
        main([*following.split(), "--per-class", "2", "--out", str(tmp_path / "samples.png"), "--device", "cpu"]) == 0
    )
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.mode == "RGB"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])  # the second has a byte order mark
def test_class_names_stand_in_a_file_one_a_line(encoding, tmp_path):
    names = [f"Käse {number}" for number in range(10)]
    (tmp_path / "names.txt").write_text("".join(f"{name} \n" for name in names), encoding=encoding)
    words = ["--tokenizer", TOKENIZER, "--transformer", TRANSFORMER, "--class-names", tmp_path / "names.txt"]
    assert call(*words, "--out", tmp_path / "out") == 0
    assert MaskGIT.from_pretrained(tmp_path / "out").class_names == tuple(names)


def test_a_tokenizer_alone_has_the_size_that_is_asked_for(tmp_path):
    assert call("--tokenizer", TOKENIZER, "--image-size", 512, "--out", tmp_path / "out") == 0
    assert load_tokenizer(tmp_path / "out" / "tokenizer").image_size == 512


@pytest.fixture
def files(tmp_path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "cut").write_bytes(TRANSFORMER.read_bytes()[:100_000])
    (folder / "pickle").write_bytes(pickle.dumps({"a": 1}))
    (folder / "page").write_text("<!doctype html>")
    (folder / "nine").write_text("a\n" * 9)
    (folder / "latin").write_bytes("Käse\n".encode("latin-1"))
    (folder / "orbax").mkdir()
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tokenizer": "nowhere"}, "nowhere: no such file; download it, or name another"),
        ({"transformer": "nowhere"}, "nowhere: no such file"),
        ({"transformer": "pickle"}, "a Python pickle"),
        ({"transformer": "page"}, "a web page"),
        ({"transformer": "orbax"}, "got a folder; name the file itself"),
        ({"transformer": "cut"}, "the file of 100,000 bytes is cut off; download it again"),
        ({"tokenizer": TRANSFORMER}, "name that file with --transformer"),
        ({"image-size": "256"}, "--image-size must be 8, for 4 x 4 tokens of this transformer, got 256; "),
        ({"class-names": "nine"}, "must be 10, one for each class of the transformer, got 9"),
        ({"class-names": "latin"}, "a text in UTF-8"),
        ({"class-names": "nowhere"}, "no such file; name a text file with one name per line"),
        ({"out": "."}, "must be a new or empty folder, got one with content"),
        ({"out": "cut"}, "must be a new or empty folder, got one with content"),
        ({"out": "cut/out"}, "must lie in a folder, got the file"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_written(flags, message, files, tmp_path, capsys):
    given = {"tokenizer": TOKENIZER, "transformer": TRANSFORMER, "out": "out"} | flags
    words = [
        word
        for name, value in given.items()
        for word in (f"--{name}", value if name == "image-size" else files / value)
    ]
    before = sorted(tmp_path.rglob("*"))
    assert call(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("maskgit import-jax: ")
    assert error.count("\n") == 1
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_of_another_kind_is_answered_without_torch(files, tmp_path):
    code = "import sys; from maskgit_pl.cli import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    for name in ("nowhere", "pickle", "page"):
        words = ["import-jax", "--tokenizer", str(files / name), "--out", str(tmp_path / "out")]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
        assert done.stdout == "2 False\n"
        assert name in done.stderr


@pytest.mark.slow
def test_the_console_script_imports(tmp_path):
    script = Path(sys.executable).with_name("maskgit")
    words = [
        "import-jax",
        "--tokenizer",
        str(TOKENIZER),
        "--transformer",
        str(TRANSFORMER),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run([script, *words], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 3
    assert MaskGIT.from_pretrained(tmp_path / "out").generate([1])[0].size == (8, 8)
