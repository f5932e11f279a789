import pytest

from maskgit_pl.runs.flag_values import (
    parse_features,
    parse_json_spec,
    parse_list,
    parse_numbers,
    parse_spec,
    parse_specs,
)


def test_numbers_of_steps_are_listed_or_ranges() -> None:
    assert parse_numbers("--num-steps", "4,8, 16") == (4, 8, 16)
    assert parse_numbers("--num-steps", "2-4,4,12") == (2, 3, 4, 12)
    for text in ("", "4-", "8-4", "-3", "1.5", "\u00b2", "1-99999999999", "9" * 5000):
        with pytest.raises(ValueError, match="--num-steps"):
            parse_numbers("--num-steps", text)


def test_specs_are_names_or_mappings_in_json_or_yaml() -> None:
    mapping = {"name": "remdm", "eta": 0.4}
    assert parse_specs("--selectors", "halton, {name: remdm, eta: 0.4}") == ["halton", mapping]
    assert parse_specs("--selectors", '{"name": "remdm", "eta": 0.4},halton,') == [mapping, "halton"]
    assert parse_spec("--guidance", "1.5") == 1.5
    for text in ("[halton", "true", "[halton]", "}{"):
        with pytest.raises(ValueError, match="--guidance"):
            parse_spec("--guidance", text)


def test_features_come_once_each() -> None:
    assert parse_features("--features", "classifier,inception=a.pt") == ["classifier", "inception=a.pt"]
    with pytest.raises(ValueError, match="must name each network once, got inception twice"):
        parse_features("--features", "inception=a.pt,inception=b.pt")


def test_a_plug_in_is_a_name_or_a_mapping_in_json() -> None:
    assert parse_json_spec("--guidance", "linear") == "linear"
    assert parse_json_spec("--guidance", '{"name": "linear", "scale": 2}') == {"name": "linear", "scale": 2}
    for text in ('{"name"', "[1]", '{"scale": 2}', '"linear"'):
        with pytest.raises(ValueError, match=r"--guidance must be a name or a JSON mapping"):
            parse_json_spec("--guidance", text)


def test_numbers_in_a_list_are_of_one_kind() -> None:
    assert parse_list("--x", "1,2", int) == (1, 2)
    assert parse_list("--x", "1,2.5", float) == (1.0, 2.5)
    with pytest.raises(ValueError, match=r"--x must be integers separated by commas, got 1,2\.5"):
        parse_list("--x", "1,2.5", int)
