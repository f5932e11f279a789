"""Commands that list what there is, such as ``maskgit models`` and ``recipes``."""

from __future__ import annotations

import ast
import json
import logging
import math
import re
import shlex
from pathlib import Path
from typing import Annotated, Literal

from maskgit_pl.checks import CHANNELS, check_choice, check_integer, pixels_text
from maskgit_pl.cli.arguments import Output, Word
from maskgit_pl.cli.flags import Folder, Specs, print_rows
from maskgit_pl.files import read_json, read_text, write_atomically
from maskgit_pl.pipeline.sharing import bundled_models
from maskgit_pl.registry import describe, find_plugins, nearest
from maskgit_pl.runs import recipe
from maskgit_pl.runs.recipe import STAGES, Kind, Stage
from maskgit_pl.schedules import mask_schedules
from maskgit_pl.text import count_text, printable

log = logging.getLogger(__name__)

PARTS = (  # what a recipe can name: the registries
    "mask_schedules", "mask_ratios", "mask_positions", "corruptions", "objectives", "distillations", "backbones",
    "quantizers", "tokenizer_losses", "discriminators", "perceptual_networks", "feature_networks", "token_selectors",
    "guidance_schedules", "metrics", "augmentations", "optimizers", "loggers", "callbacks",
)  # fmt: skip
_KINDS: tuple[Stage | Literal["cluster"], ...] = (*STAGES, "cluster")


def models(*, runs_folder: Folder = Path("runs")) -> None:
    """Lists the models that commands can load: those of the package, of runs/ and of pretrained/, with a command each.

    Example: maskgit models

    Args:
        runs_folder: Folder of all runs.
    """
    if runs_folder != Path("runs") and not runs_folder.is_dir():
        raise FileNotFoundError(f"--runs-folder {runs_folder}: no such folder; name the folder of your runs")
    candidates = [
        *((name, folder, "package") for name, folder in bundled_models().items()),
        *((str(folder.parent), folder, "run") for folder in sorted(runs_folder.glob("*/pretrained"))),
        *((str(folder), folder, "folder") for folder in sorted(Path("pretrained").glob("*"))),
    ]
    rows = [_model_row(name, folder, origin) for name, folder, origin in candidates if (folder / "tokenizer").is_dir()]
    print_rows(rows)


def _model_row(name: str, folder: Path, origin: str) -> dict[str, str]:
    """Describes a pretrained folder with a tokenizer, and mostly a transformer."""
    words = ["maskgit", "sample", name]
    try:
        tokenizer, transformer = (read_json(folder / stage / "config.json") for stage in STAGES)
        num_tokens = math.prod(map(int, transformer["network"]["grid"]))
        size, colours = pixels_text(tokenizer["image_size"]), CHANNELS[tokenizer["network"]["in_channels"]]
        classes = count_text(len(transformer["class_names"]), "class")
        content = f"{size} {colours}, {num_tokens} tokens, {classes}"
    except (OSError, ValueError, KeyError, TypeError):
        content = "cannot be read"
    if not (folder / "transformer").is_dir():
        content, words = "tokenizer", ["maskgit", "train", "transformer", "--tokenizer", str(folder / "tokenizer")]
    return {"model": name, "from": origin, "content": content, "command": shlex.join(words)}


def recipes_list() -> None:
    """Lists all recipes.

    Example: maskgit recipes list
    """
    rows = []
    for name in sorted({name for kind in _KINDS for name in recipe.list_recipes(kind)}):
        files = _recipe_files(name)
        (*_, last) = files.values()
        comment = re.match(r"(?:#.*\w.*\n)*", read_text(last))  # which opens the file
        words = re.sub(r"(?m)^#", "", comment[0] if comment else "").split()
        sentence = re.split(r"(?<=\.) |:$", " ".join(words))[0]
        rows.append({
            "recipe": name, "of": ", ".join(files), "from": "package" if last.is_absolute() else "recipes",
            "description": sentence,
        })  # fmt: skip
    print_rows(rows)


def recipes_show(name: str) -> None:
    """Prints the files of a recipe.

    Example: maskgit recipes show paper-256

    Args:
        name: Name of the recipe.
    """
    for file in _recipe_files(name).values():
        print(f"# {file}", *(printable(line, limit=None) for line in read_text(file).split("\n")), sep="\n")


def recipes_copy(name: str, *, as_: Annotated[str, Word("NEW")] | None = None) -> None:
    """Copies a recipe, to change it.

    Its files are copied to recipes/ of the working directory, where --recipe finds them first.

    Example: maskgit recipes copy own-images --as my-photos

    Args:
        name: Name of the recipe.
        as_: Name of the copy (default: NAME).
    """
    new = name if as_ is None else as_
    targets = {Path("recipes", kind, f"{new}.yaml"): file for kind, file in _recipe_files(name).items()}
    for target in targets:
        if target.exists():
            raise ValueError(f"{target}: the file exists; choose another name with --as")
    for target, file in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(target) as stream:
            stream.write(read_text(file).encode())
        print(f"{target}: a copy of {file}")


def recipes_schema(kind: Kind) -> None:
    """Prints the JSON Schema of recipes, for editors.

    An editor with a YAML language server completes and checks a recipe that begins with the line
    '# yaml-language-server: $schema=FILE'.

    Example: maskgit recipes schema transformer > recipes/transformer.schema.json

    Args:
        kind: Kind of recipe; autoregressive is for causal attention.
    """
    from maskgit_pl.runs.resolve import json_schema

    print(json.dumps(json_schema(kind), indent=1))


def _recipe_files(name: str) -> dict[str, Path]:
    """Returns the file of each kind that has a recipe of this name."""
    recipes = {kind: recipe.list_recipes(kind) for kind in _KINDS}
    if name not in (names := set().union(*recipes.values())):
        raise FileNotFoundError(f"recipe {name!r}: no such recipe: {nearest(name, names)}")
    return {kind: files[name] for kind, files in recipes.items() if name in files}


def plugins(kind: Annotated[str, Word("KIND")] | None = None) -> None:
    """Lists schedules, selectors, quantizers and all other parts that a recipe can name.

    Each name of each registry is listed with the package that it comes from. Other packages add names with
    entry points in the group maskgit_pl.KIND, which are listed without loading them.

    Example: maskgit plugins quantizers

    Args:
        kind: Kind of part, such as mask_schedules, quantizers or loggers (default: all).
    """
    kinds = PARTS if kind is None else [check_choice("KIND", kind, PARTS)]
    built_in = registered_parts()
    rows = []
    for part in kinds:
        parts = [(name, "maskgit_pl", text) for name, text in built_in.get(part, {}).items()]
        parts += [(point.name, package, point.value) for package, point in sorted(find_plugins(f"maskgit_pl.{part}"))]
        rows += [dict(zip(("kind", "name", "package", "description"), (part, *row), strict=True)) for row in parts]
    print_rows(rows)


def registered_parts() -> dict[str, dict[str, str]]:
    """Returns the names and descriptions of each registry's own parts, by the name of the registry.

    They are read from the source, since the modules of all registries take seconds to import.
    """
    parts: dict[str, dict[str, str]] = {}
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        text = read_text(file)
        body = ast.parse(text).body if ".register(" in text else []
        for node in (node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)):
            for decorator in node.decorator_list:
                match decorator:
                    case ast.Call(func=ast.Attribute(ast.Name(registry), "register"), args=[ast.Constant(str(name))]):
                        paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                        summary = re.split(r" Source:|[;:] see ", paragraph)[0].replace("``", "")
                        parts.setdefault(registry, {})[name] = f"{summary.rstrip('.')}."
    return parts


def env() -> None:
    """Prints versions, machine and devices, for a report of a problem.

    Example: maskgit env
    """
    import torch

    from maskgit_pl.devices import default_device, describe_environment, device_name

    values = describe_environment()
    values["default device"] = device_name(torch.device(default_device()))
    values["recipes"] = [*map(str, recipe.recipes_folders())]
    width = max(map(len, values)) + 2
    for name, value in values.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")
        print(f"{name:{width}}{text or 'none'}")


def schedules(
    *,
    num_tokens: int = 256,
    num_steps: Annotated[int, Word("T")] = 8,
    schedules: Specs | None = None,
    out: Annotated[Path, Output(".png")] | None = None,
) -> None:
    """Lists the mask schedules.

    Each has the number of tokens that are known after each decoding step.

    Example: maskgit schedules --num-tokens 49 --schedules cosine,linear --out schedules.png

    Args:
        num_tokens: Tokens per image.
        num_steps: Number of decoding steps.
        schedules: Names, or mappings such as '{name: pow, exponent: 3}' (default: every schedule without arguments).
        out: Also draw the mask ratio against progress.
    """
    from maskgit_pl.evaluation.figures import count_known_tokens, draw_schedules

    check_integer("num_tokens", num_tokens, "[1, inf)")
    built = mask_schedules.build_all()
    if schedules is not None:
        built = {describe(spec): mask_schedules.build(spec) for spec in schedules}
    rows = []
    for name, schedule in built.items():
        counts = count_known_tokens(schedule, num_tokens=num_tokens, num_steps=num_steps)
        rows.append({"mask_schedule": name, **{str(step): count for step, count in enumerate(counts, start=1)}})
    print(f"tokens known after each of {num_steps} steps, of {num_tokens}")
    print_rows(rows)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(out) as stream:
            stream.write(draw_schedules(built, num_tokens=num_tokens))
        log.info("%s: mask ratio of %d schedules", out, len(built))
