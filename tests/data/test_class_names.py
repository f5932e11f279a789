import pytest

from maskgit_pl.data.samples import parse_class_names


def test_names_stand_after_commas_or_one_a_line_of_a_file(tmp_path):
    (tmp_path / "names.txt").write_text(" ant\n\nbee \r\n")
    assert parse_class_names("ant, bee") == parse_class_names(str(tmp_path / "names.txt")) == ["ant", "bee"]


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffcat\r\ndog\r\n".encode())
    assert parse_class_names(str(tmp_path / "names.txt")) == ["cat", "dog"]


def test_a_thousand_names_are_no_path():
    assert parse_class_names(",".join(map(str, range(1000)))) == list(map(str, range(1000)))


@pytest.mark.parametrize("given", ["ant,,bee", "ant,bee,ant", ""])
def test_names_that_are_empty_or_come_twice_are_refused(given):
    with pytest.raises(ValueError, match="class names must be unique and not empty"):
        parse_class_names(given)


@pytest.mark.parametrize(("content", "rule"), [(b"\xff\xfe", "UTF-8 text"), (b"a\n" * 2**24, "at most 16777216 bytes")])
def test_a_file_that_is_no_text_or_too_large_is_refused_by_name(tmp_path, content, rule):
    (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"names\.txt must (be|have) {rule}"):
        parse_class_names(str(tmp_path / "names.txt"))
