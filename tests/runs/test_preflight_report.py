import pytest

from maskgit_pl.runs.preflight_report import parse_size


@pytest.mark.parametrize(("text", "value"), [("80GB", 80e9), ("24GiB", 24 * 1024**3), ("4e10", 4e10), ("1.5MB", 1.5e6)])
def test_sizes(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["much", "0", "1.2.3G", "-1"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=f"must be a size such as 80GB.* got {text}"):
        parse_size(text)
