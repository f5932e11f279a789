import csv
import io
import json
import logging
from pathlib import Path

import pytest
import torch
from rich.console import Console

from maskgit_pl.decoding import DecodingConfig
from maskgit_pl.decoding.selectors import token_selectors
from maskgit_pl.evaluation.decoders.comparison import (
    Rows,
    as_csv,
    as_markdown,
    as_table,
    contenders,
    every_selector,
    selector_sheet,
    sheet_steps,
)
from maskgit_pl.pipeline import MaskGIT
from tests.hostile_words import HOSTILE
from tests.test_text import structure

OWN = {"name": "confidence", "choice_temperature": 9.0}
PROTOCOL = {"num_images": 12, "seed": 0, "mask_schedule": "Cosine()", "device": "cpu"}
FLOOR = {"fid/classifier": 0.5, "kid/classifier": 0.0, "images": 12}
CONTEXT = {"real": {"accuracy": 0.9, "images": 24, "real_against_real": FLOOR}, "environment": {"cpus": 2}}


def numbers(fid: float) -> dict[str, float]:
    return {
        "class_agreement": 0.75,
        "diversity": 0.8,
        "fid/classifier": fid,
        "kid/classifier": fid / 10,
        "steps_taken": 4.0,
        "seconds_per_image": 0.01,
    }


def filled(file: Path) -> Rows:
    rows = Rows(file, PROTOCOL, CONTEXT)
    for label, steps, fid in (("confidence", 8, 2.0), ("random", 8, 3.0), ("confidence", 4, 5.0), ("random", 4, 4.0)):
        rows.add(label, DecodingConfig(steps, label), numbers(fid), commit="abc")
    return rows


def test_every_registered_selector_is_compared_and_remdm_with_each_strategy() -> None:
    labels = [label for label, _ in every_selector()]
    assert {label.split()[0] for label in labels} == set(token_selectors.names())
    assert {"remdm cap", "remdm rescale", "remdm confidence", "remdm loop"} <= set(labels)


def test_names_take_the_model_s_choice_temperature_and_mappings_stay() -> None:
    found = {each.label: each.token_selector for each in contenders(["margin", "halton"], OWN)}
    assert found == {"margin": {"name": "margin", "choice_temperature": 9.0}, "halton": "halton"}
    remdm = {each.label: each.token_selector for each in contenders(None, OWN)}["remdm loop"]
    assert remdm == {"name": "remdm", "strategy": "loop", "choice_temperature": 9.0}
    mapping = {"name": "remdm", "eta": 0.4}
    assert contenders([mapping], OWN)[0].token_selector == mapping
    assert contenders([mapping], OWN)[0].label == "remdm (eta 0.4)"
    assert contenders(["margin"], "halton")[0].token_selector == "margin"  # there is none to take


def test_unknown_selectors_and_the_same_one_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'confidence'"):
        contenders(["confidnce"], OWN)
    with pytest.raises(ValueError, match="token selector margin: once is enough"):
        contenders(["margin", "halton", "margin"], OWN)
    with pytest.raises(ValueError, match="unknown key 'eta'"):
        contenders([{"name": "margin", "eta": 1}], OWN)


def test_rows_come_back_from_their_file(tmp_path: Path) -> None:
    filled(tmp_path / "deep" / "comparison.json")
    again = Rows(tmp_path / "deep" / "comparison.json", PROTOCOL, CONTEXT)
    row = again.find(DecodingConfig(8, "random"))
    assert row is not None
    assert (row["fid/classifier"], row["milliseconds_per_image"], row["commit"]) == (3.0, 10.0, "abc")
    assert again.find(DecodingConfig(8, "halton")) is None
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["comparison.json"]


def test_rows_of_another_protocol_are_kept_aside(tmp_path: Path, caplog) -> None:
    file = tmp_path / "comparison.json"
    filled(file)
    with caplog.at_level(logging.INFO, logger="maskgit_pl"):
        assert Rows(file, {**PROTOCOL, "seed": 1}, CONTEXT).rows == []
    assert "another protocol (seed), kept as comparison.json.old" in caplog.text
    assert len(json.loads((tmp_path / "comparison.json.old").read_text())["rows"]) == 4


def test_nothing_is_lost_where_the_protocol_changes_often(tmp_path: Path) -> None:
    file = tmp_path / "comparison.json"
    for seed in range(4):
        rows = Rows(file, {**PROTOCOL, "seed": seed}, CONTEXT)
        rows.add("random", DecodingConfig(4, "random"), numbers(seed), commit=None)
    kept = [json.loads((tmp_path / f"comparison.json.old{each}").read_text()) for each in ("", "2", "3")]
    assert [content["rows"][0]["fid/classifier"] for content in kept] == [0, 1, 2]


@pytest.mark.parametrize("name", PROTOCOL)
def test_a_protocol_that_does_not_say_everything_is_another_one(tmp_path: Path, name: str) -> None:
    less = {key: value for key, value in PROTOCOL.items() if key != name}
    Rows(tmp_path / "comparison.json", less, CONTEXT).save()
    Rows(tmp_path / "comparison.json", PROTOCOL, CONTEXT)
    assert (tmp_path / "comparison.json.old").exists()


DEEP = "[" * 100_000 + "]" * 100_000
HEAD = '{"format": "maskgit_pl.comparison", "version": 1, '


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": "other"}',
        f'{{"a": {DEEP}}}',
        f"{HEAD}}}",
        f'{HEAD}"protocol": [], "rows": []}}',
        f'{HEAD}"protocol": {{}}, "rows": {{}}}}',
    ],
)
def test_a_file_of_something_else_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / "comparison.json").write_text(text)
    with pytest.raises(ValueError, match=r"comparison .*comparison\.json .*--out"):
        Rows(tmp_path / "comparison.json", PROTOCOL, CONTEXT)
    assert (tmp_path / "comparison.json").read_text() == text


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (None, r"rows\[1\] must be a mapping"),
        ({"selector": 3}, r"rows\[1\]\.selector must be a string"),
        ({"num_steps": "8"}, r"rows\[1\]\.num_steps must be an integer"),
        ({"diversity": "much"}, r"rows\[1\]\.diversity must be a finite number"),
        ({"decoding": [1]}, r"rows\[1\]\.decoding must be a mapping"),
        ({"decoding": {"num_steps": "8"}}, r"rows\[1\]\.decoding\.num_steps must be an integer"),
        ({"decoding": {"steps": 8}}, r"rows\[1\]\.decoding: unknown key 'steps'"),
    ],
)
def test_a_row_of_a_stranger_is_refused_by_place_and_key(tmp_path: Path, change: dict | None, match: str) -> None:
    file = tmp_path / "comparison.json"
    content = filled(file).content
    content["rows"][1] = None if change is None else content["rows"][1] | change
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=match):
        Rows(file, PROTOCOL, CONTEXT)


def test_tables_show_every_row_and_the_least_distance_of_each_t_in_bold(tmp_path: Path) -> None:
    content = filled(tmp_path / "comparison.json").content
    page = as_markdown(content, command="maskgit compare runs/x")
    assert "| confidence | 5.00 | **2.00** |" in page
    assert "| random | **4.00** | 3.00 |" in page
    assert "| real images, 12 | 0.50 | 0.50 |" in page
    assert "    maskgit compare runs/x\n" in page
    assert page.index("| 4 | random |") < page.index("| 4 | confidence |") < page.index("| 8 | confidence |")
    read = list(csv.DictReader(io.StringIO(as_csv(content))))
    assert (read[0]["num_steps"], read[0]["selector"]) == ("4", "random")
    assert json.loads(read[0]["decoding"])["token_selector"] == "random"
    assert as_table(content).row_count == 5
    Console(file=io.StringIO()).print(as_table(content))


@pytest.mark.parametrize("word", [word for word in HOSTILE if word.strip()], ids=lambda word: ascii(word[:30]))
def test_no_name_of_a_selector_becomes_markup(tmp_path: Path, word: str) -> None:
    def page(name: str) -> list[str]:
        content = dict(filled(tmp_path / "comparison.json").content)
        content["rows"] = [{**row, "selector": name} for row in content["rows"][:1]]
        Console(file=io.StringIO()).print(as_table(content))
        text = as_markdown(content, command=name)
        assert all(line.isprintable() for line in text.split("\n"))
        return structure(text)

    assert page(word) == page("name")


def test_the_sheet_shows_the_number_of_steps_nearest_to_eight() -> None:
    assert sheet_steps([{"num_steps": 4}, {"num_steps": 8}, {"num_steps": 16}]) == 8
    assert sheet_steps([{"num_steps": 32}, {"num_steps": 2}]) == 2


def test_a_column_of_the_sheet_has_one_class_and_one_noise(tiny_pretrained: Path, monkeypatch) -> None:
    pipe = MaskGIT.from_pretrained(tiny_pretrained)
    made: list[torch.Tensor] = []
    generate = pipe.generate

    def kept(*args: object, **options: object) -> torch.Tensor:
        made.append(generate(*args, **options))
        return made[-1]

    monkeypatch.setattr(pipe, "generate", kept)
    decodings = {"a": DecodingConfig(2), "same as a": DecodingConfig(2), "b": DecodingConfig(2, "halton")}
    picture = selector_sheet(pipe, decodings, seed=5)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], pipe.generate([0, 1, 2], decoding=DecodingConfig(2), seed=5, output_type="pt"))
    assert picture.width > 3 * 84
    assert picture.height > 3 * 84
