"""Class names and labels as users and strangers write them."""

import pytest

from maskgit_pl.data.samples import Labels, parse_class_names


@pytest.mark.parametrize("content", [" ant\n\nbee \r\n", "\ufeffant\r\nbee\r\n"], ids=["plain", "byte order mark"])
def test_class_names_are_separated_by_commas_or_lines_of_a_file(tmp_path, content):
    (tmp_path / "names.txt").write_bytes(content.encode())
    assert parse_class_names("ant, bee") == parse_class_names(str(tmp_path / "names.txt")) == ["ant", "bee"]
    assert len(parse_class_names(",".join(map(str, range(1000))))) == 1000  # too long for a path


@pytest.mark.parametrize("given", ["ant,,bee", "ant,bee,ant", ""])
def test_class_names_that_are_empty_or_repeated_are_refused(given):
    with pytest.raises(ValueError, match=r"class names: (a|each) class must have"):
        parse_class_names(given)


@pytest.mark.parametrize(
    ("letter", "count", "rule"), [(b"\xff", 1, "be UTF-8 text"), (b"a", 2**24 + 1, "have at most")]
)
def test_class_names_in_a_file_that_is_no_text_or_too_large_are_refused_by_name(tmp_path, letter, count, rule):
    (tmp_path / "names.txt").write_bytes(letter * count)
    with pytest.raises(ValueError, match=rf"names\.txt must {rule}"):
        parse_class_names(str(tmp_path / "names.txt"))


@pytest.mark.parametrize("text", [b"1_000", b"", b"-1", b"cat", b"1.0", b"+1", "\u0661".encode(), b"01", b"3"])
def test_a_label_that_is_no_class_is_refused_by_name(text):
    labels = Labels(classes=("a", "b", "c"))
    assert labels.read(b"2\n", name="x.tar:a.cls") == 2
    with pytest.raises(ValueError, match=r"x\.tar:a\.cls must be a class number in \[0, 3\), got"):
        labels.read(text, name="x.tar:a.cls")
