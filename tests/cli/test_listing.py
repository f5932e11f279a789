"""The commands that list what there is, and ``maskgit completion``, whose script is tried in a real shell."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import maskgit_pl
from maskgit_pl.cli import _parse, main
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.runs.recipe import STAGES, Recipe, list_recipes
from maskgit_pl.runs.settings import json_schema
from maskgit_pl.schedules import mask_schedules
from tests.installed_packages import install

ROOT = Path(__file__).parents[2]


def printed(capsys, *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def rows(capsys, *words: str) -> list[dict[str, str]]:
    return json.loads(printed(capsys, *words, "--json"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("recipes show cosin", "did you mean 'cosine'"),
        ("recipes copy log --as=../x", "--as must be letters, digits and ._-, got '../x'"),
        ("recipes schema tokeniser", "must be one of tokenizer, transformer, autoregressive, got 'tokeniser'; did you"),
        ("plugins quantisers", "KIND must be one of mask_schedules, .*did you mean 'quantizers'"),
        ("schedules --schedules cosin", "did you mean 'cosine'"),
        ("schedules --schedules '{name'", "--schedules must be a name or a mapping such as"),
        ("completion fish", "must be one of bash, zsh, got 'fish'"),
    ],
)
def test_bad_input_is_refused_in_one_line(words: str, message: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(words)) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# models, plugins and env


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
        args = _parse(shlex.split(row["command"])[1:])
        if row["from"] in ("package", "run"):
            assert MaskGIT.from_pretrained(args.folder).class_names
    assert "28 x 28 grey" in printed(capsys, "models")


LISTED_ALONE = """
import os
import lightning.pytorch, torch
from maskgit_pl.cli import main
from maskgit_pl.cli.listing import REGISTRIES
for kind in REGISTRIES:
    if os.fork() == 0:  # no other kind has imported modules of the package
        main(["plugins", kind, "--json"])
        os._exit(0)
    os.wait()
"""
IN_LOOPS = {"mask_schedules", "metrics", "optimizers"}  # registries that also have names from tables


def registered_in_the_source() -> dict[str, set[str]]:
    """Returns the names in the decorators ``@REGISTRY.register("NAME")`` of the package, for each registry in it."""
    found: dict[str, set[str]] = {}
    for file in Path(maskgit_pl.__file__).parent.rglob("*.py"):
        text = file.read_text()
        for name in re.findall(r"^(\w+)(?::.*)? = Registry\(", text, re.M):
            found.setdefault(name, set())
        for registry, name in re.findall(r"^@(\w+)\.register\(\"([\w-]+)\"\)", text, re.M):
            found.setdefault(registry, set()).add(name)
    return found


def test_plugins_lists_every_name_of_every_registry_in_a_fresh_process() -> None:
    done = subprocess.run([sys.executable, "-c", LISTED_ALONE], capture_output=True, text=True, check=True, cwd=ROOT)
    listed = [row for part in done.stdout.split("]\n") if part.strip() for row in json.loads(f"{part}]")]
    wanted = registered_in_the_source()
    assert sum(map(len, wanted.values())) > 70
    for kind, names in wanted.items():
        found = {row["name"] for row in listed if row["kind"] == kind and row["package"] == "maskgit_pl"}
        assert found == names or (kind in IN_LOOPS and found > names), kind
    assert {row["kind"] for row in listed} == wanted.keys()
    assert all(row["description"] for row in listed if row["package"] == "maskgit_pl")


def test_plugins_names_the_package_of_a_plug_in_and_does_not_load_it(capsys, tmp_path, monkeypatch) -> None:
    points = "[maskgit_pl.mask_schedules]\nsine = no_such_module:Sine\n"
    install(tmp_path, name="my-schedules", entry_points=points, modules={})
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {row["name"]: row for row in rows(capsys, "plugins", "mask_schedules")}
    assert (found["sine"]["package"], found["sine"]["description"]) == ("my-schedules", "")
    assert found["cosine"]["package"] == "maskgit_pl"


def test_env_prints_the_versions_that_a_report_needs(capsys) -> None:
    values = json.loads(printed(capsys, "env", "--json"))
    text = printed(capsys, "env")
    for name in ("maskgit_pl", "python", "torch", "lightning", "machine", "default device", "recipes"):
        value = values[name]
        assert re.search(rf"^{name} +{re.escape(value[0] if isinstance(value, list) else value)}", text, re.M)


# recipes


def test_recipes_list_has_every_recipe_once_with_a_sentence(capsys) -> None:
    found = rows(capsys, "recipes", "list")
    names = {name for kind in (*STAGES, "cluster") for name in list_recipes(kind)}
    assert [row["recipe"] for row in found] == sorted(names)
    assert all(len(row["description"]) > 20 for row in found)


def test_recipes_show_prints_the_files_of_both_stages_and_schema_the_schema_of_editors(capsys) -> None:
    text = printed(capsys, "recipes", "show", "own-images")
    assert all(list_recipes(stage)["own-images"].read_text() in text for stage in STAGES)
    assert json.loads(printed(capsys, "recipes", "schema", "tokenizer")) == json_schema("tokenizer")


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


# schedules


def test_every_schedule_that_needs_no_argument_has_a_row(capsys) -> None:
    title, head, *lines = printed(capsys, "schedules", "--num-tokens", "49", "--num-steps", "4").splitlines()
    assert title == "tokens known after each of 4 steps, of 49"
    assert head.split() == ["mask", "schedule", "1", "2", "3", "4"]
    assert [line.split()[0] for line in lines] == [name for name in mask_schedules.names() if name != "pow"]
    assert all(line.split()[-1] == "49" for line in lines)


def test_named_schedules_and_mappings_are_counted(capsys) -> None:
    words = ["--num-steps", "4", "--num-tokens", "16", "--schedules", 'linear, {"name": "pow", "exponent": 4}']
    found = rows(capsys, "schedules", *words)
    assert [row["mask_schedule"] for row in found] == ["linear", "pow (exponent 4)"]
    assert found[0]["known"] == [4, 8, 12, 16]


def test_the_plot_is_a_png(tmp_path: Path, capsys) -> None:
    printed(capsys, "schedules", "--out", str(tmp_path / "deep" / "figure.png"), "--schedules", "cosine,linear")
    with Image.open(tmp_path / "deep" / "figure.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10


# completion

TAB = """
source "$1"; shift
function=$(complete -p maskgit | sed -E 's/.*-F ([^ ]+) .*/\\1/')
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); $function
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    with open(folder / "maskgit.bash", "w") as file:
        subprocess.run([sys.executable, "-m", "maskgit_pl", "completion", "bash"], check=True, stdout=file, cwd=ROOT)
    return folder / "maskgit.bash"


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["sam"], {"sample"}),
        (["data", "fe"], {"fetch"}),
        (["train", ""], {"tokenizer", "transformer"}),
        (["train", "tokenizer", "--dry"], {"--dry-run"}),
        (["sample", "--num-"], {"--num-steps", "--num-images"}),
        (["export", "recipes/tok"], {"recipes/tokenizer"}),  # files and folders
        (["tokenize", "--precision", ""], {"float32", "bfloat16"}),
    ],
)
def test_bash_completes_commands_choices_flags_and_files(words: list[str], wanted: set[str], script: Path) -> None:
    command = ["bash", "-c", TAB, "tab", str(script), "maskgit", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert set(done.stdout.split()) == wanted, done.stderr


def test_zsh_has_a_script_with_every_command(capsys) -> None:
    text = printed(capsys, "completion", "zsh")
    assert text.startswith("#compdef maskgit")
    assert all(command in text for command in ("evaluate-tokenizer", "data", "recipes", "completion"))
