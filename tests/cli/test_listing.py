"""The commands that list what there is: ``recipes``, ``plugins``, ``models`` and ``env``."""

import json
import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

import maskgit_pl
from maskgit_pl.cli import build_parser, main
from maskgit_pl.cli.generation_flags import find_model
from maskgit_pl.cli.listing import REGISTRIES
from maskgit_pl.runs.recipe import STAGES, Recipe, list_recipes
from maskgit_pl.runs.settings import json_schema
from maskgit_pl.schedules import mask_schedules
from tests.cli.commands import call_command
from tests.installed_packages import install


def printed(capsys, *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def rows(capsys, *words: str) -> list[dict[str, str]]:
    return json.loads(printed(capsys, *words, "--json"))


def test_plugins_lists_every_registry_of_the_package(capsys) -> None:
    root = Path(maskgit_pl.__file__).parent
    defined = {
        name
        for file in root.rglob("*.py")
        for name in re.findall(r"^(\w+)(?::.*)? = Registry\(", file.read_text(), re.M)
    }
    assert defined == set(REGISTRIES)
    found = rows(capsys, "plugins")
    for kind, module in REGISTRIES.items():
        names = getattr(import_module(f"maskgit_pl.{module}"), kind).names()
        assert [row["name"] for row in found if row["kind"] == kind] == names
    assert [row["name"] for row in found if row["package"] == "maskgit_pl" and not row["description"]] == []


def test_plugins_names_the_package_of_a_plug_in_and_does_not_load_it(capsys, tmp_path, monkeypatch) -> None:
    points = "[maskgit_pl.mask_schedules]\nsine = no_such_module:Sine\n"
    install(tmp_path, name="my-schedules", entry_points=points, modules={})
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {row["name"]: row for row in rows(capsys, "plugins", "mask_schedules")}
    assert (found["sine"]["package"], found["sine"]["description"]) == ("my-schedules", "")
    assert found["cosine"]["package"] == "maskgit_pl"


def test_recipes_list_has_every_recipe_once_with_a_sentence(capsys) -> None:
    found = rows(capsys, "recipes", "list")
    names = {name for kind in (*STAGES, "cluster") for name in list_recipes(kind)}
    assert [row["recipe"] for row in found] == sorted(names)
    assert all(len(row["description"]) > 20 for row in found)


def test_recipes_show_prints_the_files_of_both_stages(capsys) -> None:
    text = printed(capsys, "recipes", "show", "own-images")
    for stage in STAGES:
        assert list_recipes(stage)["own-images"].read_text() in text


def test_a_copied_recipe_is_found_first_and_is_never_overwritten(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed(capsys, "recipes", "copy", "log", "--as", "mine")
    copied = tmp_path / "recipes" / "transformer" / "mine.yaml"
    copied.write_text(f"{copied.read_text()}trainer: {{max_steps: 77}}\n")
    recipe = Recipe.read("transformer", names="mine")
    assert (recipe.get("trainer.max_steps"), recipe.get("model.mask_schedule")) == (77, "log")
    assert {"recipes/"} == {row["from"] for row in rows(capsys, "recipes", "list") if row["recipe"] == "mine"}
    assert main(["recipes", "copy", "cosine", "--as", "mine"]) == 2
    assert "mine.yaml: the file exists; choose another name with --as" in capsys.readouterr().err
    assert "77" in copied.read_text()


@pytest.mark.parametrize("name", ["../x", "a b", "", "-x"])
def test_a_copy_stays_in_the_folder_of_recipes(name: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "copy", "log", f"--as={name}"]) == 2
    assert "--as must be letters, digits and ._-" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "answer"),
    [(("recipes", "show", "cosin"), "did you mean 'cosine'"), (("plugins", "quantisers"), "did you mean 'quantizers'")],
)
def test_an_unknown_name_is_answered_with_the_nearest(words: tuple[str, ...], answer: str, capsys) -> None:
    assert main(words) == 2
    assert answer in capsys.readouterr().err


def test_env_prints_the_versions_that_a_report_needs(capsys) -> None:
    values = json.loads(printed(capsys, "env", "--json"))
    text = printed(capsys, "env")
    for name in ("maskgit_pl", "python", "torch", "lightning", "machine", "default device", "recipes"):
        value = values[name]
        assert re.search(rf"^{name} +{re.escape(value[0] if isinstance(value, list) else value)}", text, re.M)


def test_models_lists_package_runs_and_folders_with_commands_that_there_are(
    capsys, tmp_path, monkeypatch, tiny_pretrained
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_pretrained, "runs/one run/pretrained")
    shutil.copytree(tiny_pretrained / "tokenizer", "pretrained/taming/tokenizer")
    shutil.copytree(tiny_pretrained, "pretrained/damaged")
    (tmp_path / "pretrained/damaged/transformer/config.json").write_text("{")
    found = {row["model"]: row for row in rows(capsys, "models")}
    assert found["fashion-mnist-demo"]["content"] == "28 x 28 grey, 49 tokens, 10 classes"
    assert (found["runs/one run"]["from"], found["runs/one run"]["command"]) == ("run", "maskgit sample 'runs/one run'")
    assert found["pretrained/taming"]["content"] == "tokenizer"
    assert found["pretrained/damaged"]["content"] == "cannot be read"
    assert {"google-research/maskgit", "LlamaGen", "Halton-MaskGIT"} <= found.keys()
    for row in found.values():
        args = build_parser().parse_args(shlex.split(row["command"])[1:])
        if row["from"] in ("package", "run"):
            assert find_model(args)[1].class_names
    assert "28 x 28 grey" in printed(capsys, "models")


def test_the_schema_of_editors_is_printed(capsys) -> None:
    for kind in ("tokenizer", "transformer", "autoregressive"):
        assert json.loads(printed(capsys, "recipes", "schema", kind)) == json_schema(kind)


def test_schedules_are_printed_as_json(capsys) -> None:
    found = rows(capsys, "schedules", "--num-steps", "4", "--num-tokens", "16", "--schedules", "linear,cosine")
    assert [row["mask_schedule"] for row in found] == ["linear", "cosine"]
    assert found[0]["known"] == [4, 8, 12, 16]


def call(*words: str) -> int:
    return call_command("schedules", *words)


def test_every_schedule_that_needs_no_argument_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--num-tokens", "49", "--num-steps", "4") == 0
    shown = capsys.readouterr().out
    rows = [line.split("│")[1].strip() for line in shown.splitlines() if line.startswith("│")]
    assert rows == [name for name in mask_schedules.names() if name != "pow"]


def test_named_schedules_and_mappings_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    call("--schedules", 'linear, {"name": "pow", "exponent": 4}', "--num-steps", "4")
    shown = capsys.readouterr().out
    assert "pow (exponent 4)" in shown
    assert "cosine" not in shown


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    call("--out", str(tmp_path / "deep" / "figure.png"), "--schedules", "cosine,linear")
    with Image.open(tmp_path / "deep" / "figure.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--schedules", "cosin"], "did you mean 'cosine'"),
        (["--schedules", "{name"], "a name or a mapping such as"),
        (["--num-tokens", "4"], "--num-steps must be <= 4, the tokens per image"),
    ],
)
def test_bad_input_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(*words)
