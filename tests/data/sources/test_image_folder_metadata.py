"""Labels of image folders from metadata.csv and metadata.jsonl, and class numbers."""

import json
from pathlib import Path

import pytest
from PIL import Image

from maskgit_pl.data.samples import UnreadableSample
from maskgit_pl.data.sources.image_folder import ImageFolder
from maskgit_pl.data.sources.making import open_source


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (9, 8), (number, 1, 2)).save(folder / f"{number}.png")
    return folder


def write(folder: Path, lines: list[str], *, kind: str = "csv", header: str = "file_name,label") -> None:
    text = "\n".join([header, *lines] if kind == "csv" else lines)
    (folder / f"metadata.{kind}").write_text(text, encoding="utf-8")


def labels_of(source: ImageFolder) -> dict[str, str]:
    return {file.name: source.classes[file.label] for files in source._files.values() for file in files}


def test_names_are_classes_in_alphabetical_or_in_the_given_order(photos):
    write(photos, [f"{number}.png,{'dog' if number % 2 else 'cat'}" for number in range(20)])
    expected = {f"{number}.png": "dog" if number % 2 else "cat" for number in range(20)}
    for given, classes in ((None, ("cat", "dog")), (["dog", "cat", "bird"], ("dog", "cat", "bird"))):
        source = open_source(photos, classes=given, val_fraction=0.3)
        assert source.classes == classes
        assert labels_of(source) == expected
    with pytest.raises(ValueError, match="label must be one of the class names, got 'cat'"):
        open_source(photos, classes=["dog"])


def test_whole_numbers_are_class_numbers(photos):
    write(photos, [f"{number}.png,{number % 3}" for number in range(20)])
    assert open_source(photos, val_fraction=0.3).classes == ("0", "1", "2")
    assert open_source(photos, classes=["a", "b", "c", "d"], val_fraction=0.3).classes == ("a", "b", "c", "d")
    with pytest.raises(ValueError, match=r"metadata metadata.csv: 2.png: label must be in \[0, 2\), got 2"):
        open_source(photos, classes=["a", "b"])
    for wrong in (-1, 2**40):
        write(photos, ["0.png,0", f"1.png,{wrong}"])
        with pytest.raises(ValueError, match=rf"csv: 1.png: label must be in \[0, 100000\), got {wrong}"):
            open_source(photos)


@pytest.mark.parametrize("odd", ["cat", "01"])
def test_numbers_that_become_names_because_of_one_label_are_named(photos, odd, caplog):
    write(photos, [f"{number}.png,{number % 3}" for number in range(19)] + [f"19.png,{odd}"])
    assert open_source(photos, val_fraction=0.3).classes == tuple(sorted(["0", "1", "2", odd]))
    assert caplog.messages == [
        f"metadata metadata.csv: 19.png: label is '{odd}', which is no class number; so all labels are class names, "
        "also numbers such as 0"
    ]


def test_quotes_bom_and_other_columns_are_read_as_csv(photos):
    (photos / 'a, "b".png').write_bytes((photos / "0.png").read_bytes())
    lines = [f'{number}.png,"a cat, asleep\non a mat",kind {number % 2}' for number in range(20)]
    write(photos, [*lines, '"a, ""b"".png",x,kind 0'], header="\ufefffile_name,text,label")
    source = open_source(photos, val_fraction=0.3)
    assert source.classes == ("kind 0", "kind 1")
    assert labels_of(source)['a, "b".png'] == "kind 0"


def test_missing_files_are_unreadable_and_files_without_a_row_are_left_out(photos):
    write(photos, [f"{number}.png,a" for number in range(2, 23)] + ["2.png,a"])
    (photos / "notes.txt").write_text("x")
    source = ImageFolder(photos, val_fraction=0.3)
    samples = [sample for split, count in source.counts.items() for sample in source.samples(split, range(count))]
    faults = sorted(sample.error for sample in samples if isinstance(sample, UnreadableSample))
    assert faults == [f"image {photos}/{n}.png cannot be read: No such file or directory" for n in (20, 21, 22)]
    assert len(samples) == 21
    assert source.left_out == (
        "1 .txt (notes.txt)",
        "2 without a row in metadata.csv (0.png, 1.png)",
    )


def test_another_column_may_hold_the_labels(photos):
    lines = [json.dumps({"file_name": f"{n}.png", "species": "ab"[n % 2]}) for n in range(20)]
    write(photos, [*lines, ""], kind="jsonl")
    assert open_source(photos, label_field="species", val_fraction=0.3).classes == ("a", "b")
    with pytest.raises(ValueError, match="must have a column 'label', got file_name, species; set it with"):
        open_source(photos)


CSV_FAULTS = {
    "file_name,label\n0.png": "must be UTF-8 text with a CSV table, got: 1 values for 2 columns in line 2",
    "file_name;label\n0.png;a": "must have a column 'file_name', got file_name;label",
    "name,label\n0.png,a": "must have a column 'file_name', got name, label",
    "file_name,label,label\n0.png,a,b": "got: a repeated column",
    "": "must have a column 'file_name', got no rows",
    "file_name,label\n0.png,": "line 2: label must be a class name or a class number, got ''",
    "file_name,label\n,a": "line 2: file_name must be a path inside the folder of the metadata file, got ''",
    "file_name,label\n../0.png,a": "line 2: file_name must be a path inside",
    "file_name,label\n/etc/a.png,a": "line 2: file_name must be a path inside",
    "file_name,label\n0.png,a\n./0.png,b": "line 3: 0.png must have one label, got 'a' and 'b'",
    'file_name,label\n"0.png,a': "got: unexpected end of data",
    "file_name,label\n0.png,\ud800": "must be UTF-8 text",
    'file_name,label\n0.png,"a\nb"': "a class must have a UTF-8 name on one line, got 'a\\\\nb'",
    "file_name,label\n0.png," + "9" * 200_000: "got: field larger than field limit",
}
JSON_FAULTS = {
    "[1]": "must be UTF-8 text with one JSON object per line, got: line 1 is not an object",
    '{"file_name": "0.png", "label": 1': "with one JSON object per line, got: line 1 is not valid JSON: Expecting",
    "[" * 100_000: "with one JSON object per line, got: ",
    '{"file_name": "0.png", "label": true}': "line 1: label must be a class name or a class number, got True",
    '{"file_name": "0.png", "label": [1]}': r"line 1: label must be a class name or a class number, got \[1\]",
    '{"file_name": 5, "label": 1}': "line 1: file_name must be a path inside",
    '{"file_name": "0.png", "label": "\\ud800"}': "a class must have a UTF-8 name on one line",
}


@pytest.mark.parametrize(
    ("kind", "text"), [("csv", text) for text in CSV_FAULTS] + [("jsonl", text) for text in JSON_FAULTS]
)
def test_faulty_metadata_are_refused_in_one_line(photos, kind, text):
    (photos / f"metadata.{kind}").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=(CSV_FAULTS if kind == "csv" else JSON_FAULTS)[text]) as caught:
        open_source(photos)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_two_metadata_files_are_refused(photos):
    write(photos, ["0.png,a"])
    write(photos, ['{"file_name": "0.png", "label": "a"}'], kind="jsonl")
    with pytest.raises(ValueError, match=r"must have one metadata file, got metadata\.csv and metadata\.jsonl"):
        open_source(photos)


def test_a_split_folder_with_metadata_needs_the_other(photos):
    photos.rename(photos.with_name("train"))
    write(photos.with_name("train"), [f"{number}.png,a" for number in range(20)])
    with pytest.raises(ValueError, match=r"must have val/ \(or test/\) beside train/"):
        open_source(photos.parent)
