"""The commands that list what there is."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

import maskgit_pl
from maskgit_pl.cli import _parse
from maskgit_pl.cli.listing import PARTS
from maskgit_pl.evaluation.metrics import FeatureMetric, metrics
from maskgit_pl.pipeline import MaskGIT
from maskgit_pl.runs.recipe import STAGES, Recipe, list_recipes
from maskgit_pl.schedules import mask_schedules
from tests.cli.conftest import refused
from tests.installed_packages import install

ROOT = Path(__file__).parents[2]
PACKAGE = Path(maskgit_pl.__file__).parent


def parse_table(text: str) -> list[dict[str, str]]:
    """Reads a table, whose columns have at least two spaces between them; empty cells at the end are left out."""
    columns, *rows = [re.split(" {2,}", line) for line in text.splitlines()]
    return [dict(zip(columns, row, strict=False)) for row in rows]


@pytest.fixture
def printed(maskgit) -> Callable[..., str]:
    """Runs a command, and returns its output."""

    def call(*words: object) -> str:
        answer = maskgit(*words)
        assert answer.code == 0, answer
        return answer.out

    return call


@pytest.fixture
def rows(printed) -> Callable[..., list[dict[str, str]]]:
    """Runs a command, and returns the rows of its table."""
    return lambda *words: parse_table(printed(*words))


def test_models_lists_package_runs_and_folders_with_commands(rows, tmp_path, monkeypatch, tiny_pretrained) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_pretrained, "runs/one run/pretrained")
    shutil.copytree(tiny_pretrained / "tokenizer", "pretrained/taming/tokenizer")
    shutil.copytree(tiny_pretrained, "pretrained/damaged")
    (tmp_path / "pretrained/damaged/transformer/config.json").write_text("{")
    models = {row["model"]: row for row in rows("models")}
    assert models["fashion-mnist-demo"]["content"] == "28 x 28 grey, 49 tokens, 10 classes"
    assert models["runs/one run"]["command"] == "maskgit sample 'runs/one run'"
    assert models["pretrained/taming"]["content"] == "tokenizer"
    assert models["pretrained/damaged"]["content"] == "cannot be read"
    for row in models.values():
        args = _parse(shlex.split(row["command"])[1:])
        if row["from"] in ("package", "run"):
            assert MaskGIT.from_pretrained(args.folder).class_names


def test_plugins_lists_every_part_that_its_registry_has_with_a_description(rows) -> None:
    listed = rows("plugins")
    for kind in PARTS:
        (module,) = [
            file.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
            for file in PACKAGE.rglob("*.py")
            if re.search(rf"^{kind}(?::.*)? = Registry\(", file.read_text(), re.M)
        ]
        names = {row["name"] for row in listed if row["kind"] == kind and row["package"] == "maskgit_pl"}
        registered = getattr(import_module(f"maskgit_pl.{module}"), kind).names()
        # A measurement records its own columns, which no recipe names.
        others = {name for name, made in metrics.build_all().items() if not isinstance(made, FeatureMetric)}
        assert names == set(registered) - (others if kind == "metrics" else set()), kind
    assert len(listed) > 60
    assert all(row["description"] and "`" not in row["description"] for row in listed)


def test_plugins_imports_no_torch(site) -> None:
    code = "import sys; from maskgit_pl.cli import main; main(['plugins']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)


def test_plugins_names_the_package_of_a_plug_in_and_does_not_load_it(rows, site) -> None:
    # Not the name of the documentation: who follows it here may have registered that one.
    points = "[maskgit_pl.mask_schedules]\npackaged = no_such_module:Sine\n"
    install(site, name="my-schedules", entry_points=points, modules={})
    schedules = {row["name"]: row for row in rows("plugins", "mask_schedules")}
    assert schedules["packaged"] == {
        "kind": "mask_schedules",
        "name": "packaged",
        "package": "my-schedules",
        "description": "no_such_module:Sine",
    }
    assert schedules["cosine"]["package"] == "maskgit_pl"


def test_env_prints_the_versions_that_a_report_needs(printed, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")  # no git, as where a wheel is installed: the commit is not known
    text = printed("env")
    for name in ("maskgit_pl", "python", "torch", "lightning", "machine", "default device", "recipes"):
        assert re.search(rf"^{name} +\S", text, re.M)
    assert re.search("^commit +none$", text, re.M)


def test_recipes_are_listed_with_a_sentence_shown_and_described(printed, rows) -> None:
    recipes = rows("recipes", "list")
    names = {name for kind in (*STAGES, "cluster") for name in list_recipes(kind)}
    assert [row["recipe"] for row in recipes] == sorted(names)
    assert all(len(row["description"]) > 20 for row in recipes)
    text = printed("recipes", "show", "own-images")
    assert all(list_recipes(stage)["own-images"].read_text() in text for stage in STAGES)


def test_a_recipe_is_shown_escaped_and_read_only_if_it_is_a_file(printed, maskgit, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("recipes", "transformer")
    folder.mkdir(parents=True)
    (folder / "red.yaml").write_text("# \x1b[31mRed\n{}\n")
    assert printed("recipes", "show", "red") == f"# {folder / 'red.yaml'}\n# \\x1b[31mRed\n{{}}\n\n"
    (folder / "zero.yaml").symlink_to("/dev/zero")
    for words in (["list"], ["show", "zero"], ["copy", "zero", "--as", "mine"]):
        refused(maskgit("recipes", *words), "zero.yaml: must be a regular file, got a FIFO, a socket or a device")


def test_a_copied_recipe_is_read_first_and_never_overwritten(printed, rows, maskgit, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed("recipes", "copy", "log", "--as", "mine")
    copied = tmp_path / "recipes" / "transformer" / "mine.yaml"
    copied.write_text(f"{copied.read_text()}trainer: {{max_steps: 77}}\n")
    recipe = Recipe.read("transformer", names="mine")
    assert (recipe.get("trainer.max_steps"), recipe.get("model.mask_schedule")) == (77, "log")
    origins = {row["recipe"]: row["from"] for row in rows("recipes", "list")}
    assert (origins["mine"], origins["log"]) == ("recipes", "package")
    error = maskgit("recipes", "copy", "cosine", "--as", "mine").error
    assert "mine.yaml: the file exists; choose another name with --as" in error
    assert "77" in copied.read_text()


def test_schedules_counts_the_tokens_known_after_each_step(printed) -> None:
    title, head, *lines = printed("schedules", "--num-tokens", 49, "--num-steps", 4).splitlines()
    assert title == "tokens known after each of 4 steps, of 49"
    assert head.split() == ["mask", "schedule", "1", "2", "3", "4"]
    assert [line.split()[0] for line in lines] == [name for name in mask_schedules.names() if name != "pow"]
    assert all(line.split()[-1] == "49" for line in lines)
    words = ("--num-steps", 4, "--num-tokens", 16, "--schedules", 'linear, {"name": "pow", "exponent": 4}')
    _, _, linear, power = printed("schedules", *words).splitlines()
    assert linear.split() == ["linear", "4", "8", "12", "16"]
    assert power.startswith("pow (exponent 4) ")


def test_schedules_draws_a_png(printed, tmp_path: Path) -> None:
    printed("schedules", "--out", tmp_path / "deep" / "figure.png", "--schedules", "cosine,linear")
    with Image.open(tmp_path / "deep" / "figure.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 10
