"""Commands that list what there is: ``maskgit models``, ``recipes``, ``plugins``, ``env`` and ``schedules``."""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from maskgit_pl.checks import CHANNELS, check_choice, count_text, pixels_text
from maskgit_pl.cli.flags import (
    add_json_argument,
    check_at_least,
    check_outputs,
    make_folder,
    print_rows,
    use_flag_names,
)
from maskgit_pl.errors import printable
from maskgit_pl.files import write_atomically
from maskgit_pl.importers.files import TOKENIZER_LAYOUTS
from maskgit_pl.pipeline.sharing import bundled_models
from maskgit_pl.registry import describe, nearest
from maskgit_pl.runs.flag_values import parse_specs
from maskgit_pl.runs.layers import Kind
from maskgit_pl.runs.recipe import STAGES, Stage, list_recipes, recipes_folders

if TYPE_CHECKING:
    from maskgit_pl.registry import Registry
    from maskgit_pl.schedules import MaskSchedule

__all__ = [
    "REGISTRIES",
    "add_env_parser",
    "add_models_parser",
    "add_plugins_parser",
    "add_recipes_parser",
    "add_schedules_parser",
]

log = logging.getLogger(__name__)

REGISTRIES = {  # module of each registry, by the name of the registry
    "mask_schedules": "schedules",
    "mask_ratios": "masking",
    "mask_positions": "masking",
    "objectives": "objectives",
    "corruptions": "objectives",
    "backbones": "networks.backbone",
    "quantizers": "networks.quantizers",
    "discriminators": "networks.discriminators",
    "perceptual_networks": "networks.perceptual",
    "feature_networks": "networks.features",
    "token_selectors": "decoding.selectors",
    "guidance_schedules": "decoding.guidance",
    "augmentations": "data.augmentations",
    "optimizers": "training.optimizers",
    "learning_rate_schedules": "training.learning_rates",
    "loggers": "training.loggers",
    "callbacks": "training.callbacks",
    "profilers": "training.callbacks",
}

_IMPORTED = Path("pretrained")  # folder of the examples of the importers
_TOKENIZER = "maskgit import-tokenizer FILE --out pretrained/NAME"
_TRANSFORMER = "maskgit import-transformer FILE --tokenizer DIR/tokenizer --out pretrained/NAME"
_RELEASED = (  # project, content, command
    (
        "google-research/maskgit",
        "ImageNet 256 and 512, JAX",
        "maskgit import-jax --tokenizer FILE --transformer FILE --out pretrained/NAME",
    ),
    *((layout, "tokenizer", _TOKENIZER) for layout in TOKENIZER_LAYOUTS),
    ("Halton-MaskGIT", "transformer, ImageNet 256 and 384", _TRANSFORMER),
    ("MaskGIL", "transformer, ImageNet 256", _TRANSFORMER),
)

_KINDS: tuple[Stage | Literal["cluster"], ...] = (*STAGES, "cluster")

_OPTIONAL = (  # libraries whose versions ``env`` also prints
    "numpy", "pillow", "torchvision", "torchmetrics", "webdataset", "timm", "safetensors", "simplejpeg", "pyarrow",
)  # fmt: skip


def add_models_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "models",
        help="list the models that commands can load, and how to get others",
        description="List the models of the package, of runs/ and of pretrained/, and the released models that can be "
        "imported, each with a command.",
        epilog="Example: maskgit models --json",
    )
    parser.add_argument(
        "--runs-folder", type=Path, default=Path("runs"), metavar="DIR", help="folder of all runs (default: runs)"
    )
    add_json_argument(parser)
    parser.set_defaults(run=_run_models)


def _run_models(args: argparse.Namespace) -> int:
    """Prints the table."""
    runs = sorted(args.runs_folder.glob("*/pretrained"))
    places = [
        *((name, folder, "package") for name, folder in bundled_models().items()),
        *((str(folder.parent), folder, "run") for folder in runs),
        *((str(folder), folder, "folder") for folder in sorted(_IMPORTED.glob("*"))),
    ]
    rows = [_model_row(name, folder, origin) for name, folder, origin in places if (folder / "tokenizer").is_dir()]
    rows += [_row_of_model(name, "released elsewhere", content, command) for name, content, command in _RELEASED]
    print_rows(rows, as_json=args.json)
    return 0


def _model_row(name: str, folder: Path, origin: str) -> dict[str, str]:
    """Describes a pretrained folder with a tokenizer, and mostly a transformer."""
    from maskgit_pl.pipeline.outline import Outline  # takes a moment

    outline = Outline.read(folder)
    if outline is not None:
        colours = CHANNELS[outline.channels]
        sizes = f"{pixels_text(outline.image_size)} {colours}, {outline.num_tokens} tokens"
        content = f"{sizes}, {count_text(len(outline.class_names), 'class')}"
        return _row_of_model(name, origin, content, shlex.join(["maskgit", "sample", name]))
    if (folder / "transformer").is_dir():
        return _row_of_model(name, origin, "cannot be read", shlex.join(["maskgit", "sample", name]))
    train = ["maskgit", "train", "transformer", "--tokenizer", str(folder / "tokenizer")]
    return _row_of_model(name, origin, "tokenizer", shlex.join(train))


def _row_of_model(name: str, origin: str, content: str, command: str) -> dict[str, str]:
    return {"model": name, "from": origin, "content": content, "command": command}


def add_recipes_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "recipes",
        help="list, show and copy the recipes that --recipe can name, and their JSON Schema",
        description="List, show or copy recipes, or print their schema. Recipes are searched in recipes/ of the "
        "working directory, then in the installation.",
        epilog="Example: maskgit recipes copy cosine --as mine",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listed = actions.add_parser("list", help="list all recipes", description="List all recipes.",
                                epilog="Example: maskgit recipes list")  # fmt: skip
    add_json_argument(listed)
    listed.set_defaults(run=_run_list)
    shown = actions.add_parser("show", help="print a recipe", description="Print the files of a recipe.",
                               epilog="Example: maskgit recipes show paper-256")  # fmt: skip
    shown.add_argument("name", metavar="NAME", help="name of the recipe")
    shown.set_defaults(run=_run_show)
    copied = actions.add_parser(
        "copy",
        help="copy a recipe, to change it",
        description="Copy the files of a recipe to recipes/ of the working directory, where --recipe finds them first.",
        epilog="Example: maskgit recipes copy own-images --as my-photos",
    )
    copied.add_argument("name", metavar="NAME", help="name of the recipe")
    copied.add_argument("--as", dest="new", metavar="NEW", help="name of the copy (default: NAME)")
    copied.set_defaults(run=_run_copy)
    schema = actions.add_parser(
        "schema",
        help="print the JSON Schema of recipes, for editors",
        description="Print the JSON Schema of the recipes of a stage. An editor with a YAML language server completes "
        "and checks a recipe whose first line is: # yaml-language-server: $schema=FILE",
        epilog="Example: maskgit recipes schema transformer > recipes/transformer.schema.json",
    )
    schema.add_argument("kind", choices=get_args(Kind), help="kind of recipe; autoregressive is for causal attention")
    schema.set_defaults(run=_run_schema)


def _run_list(args: argparse.Namespace) -> int:
    found: dict[str, dict[str, Path]] = {}
    for kind in _KINDS:
        for name, file in list_recipes(kind).items():
            found.setdefault(name, {})[kind] = file
    print_rows([_recipe_row(name, files) for name, files in sorted(found.items())], as_json=args.json)
    return 0


def _run_show(args: argparse.Namespace) -> int:
    """Prints the files of a recipe, each with its path."""
    for file in _recipe_files(args.name).values():
        print(f"# {file}\n{file.read_text()}")
    return 0


def _run_copy(args: argparse.Namespace) -> int:
    """Copies the files of a recipe to ``recipes/`` of the working directory.

    Raises:
        FileNotFoundError: if there is no such recipe.
        ValueError: if the new name is not one, or a file of this name exists.
    """
    name = args.name if args.new is None else args.new
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"--as must be letters, digits and ._-, got {name!r}")
    targets = {Path("recipes", kind, f"{name}.yaml"): file for kind, file in _recipe_files(args.name).items()}
    for target in targets:
        if target.exists():
            raise ValueError(f"{target}: the file exists; choose another name with --as")
    for target, file in targets.items():
        make_folder(target.parent)
        with write_atomically(target) as stream:
            stream.write(file.read_bytes())
        print(f"{target}: a copy of {file}")
    return 0


def _run_schema(args: argparse.Namespace) -> int:
    from maskgit_pl.runs.settings import json_schema

    print(json.dumps(json_schema(args.kind), indent=1))
    return 0


def _recipe_row(name: str, files: Mapping[str, Path]) -> dict[str, str]:
    here, *shipped = recipes_folders()
    is_own = bool(shipped) and any(file.is_relative_to(here) for file in files.values())
    return {
        "recipe": name,
        "of": ", ".join(files),
        "from": "recipes/" if is_own else "maskgit_pl",
        "description": _first_sentence(list(files.values())[-1]),
    }


def _recipe_files(name: str) -> dict[str, Path]:
    """Returns the file of each kind that has a recipe of this name.

    Raises:
        FileNotFoundError: if there is none. The message lists the names and the closest one.
    """
    known = {kind: list_recipes(kind) for kind in _KINDS}
    found: dict[str, Path] = {kind: files[name] for kind, files in known.items() if name in files}
    if not found:
        every = {each for files in known.values() for each in files}
        raise FileNotFoundError(f"recipe {name!r}: no such recipe: {nearest(name, every)}")
    return found


def _first_sentence(file: Path) -> str:
    """Returns the first sentence of the comment that opens a recipe."""
    text: list[str] = []
    for line in file.read_text().splitlines():
        words = line.removeprefix("#").strip()
        if not line.startswith("#") or not words:
            break
        text.append(words)
    return re.split(r"(?<=\.) |:$", " ".join(text))[0]


def add_plugins_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "plugins",
        help="list schedules, selectors, quantizers and all other parts that a recipe can name",
        description="List the names of every registry, each with the package that it comes from. Other packages add "
        "names with entry points in the group maskgit_pl.KIND. The command lists these names without loading them.",
        epilog="Example: maskgit plugins quantizers",
    )
    parser.add_argument("kind", nargs="?", metavar="KIND", help=f"one of {', '.join(REGISTRIES)} (default: all)")
    add_json_argument(parser)
    parser.set_defaults(run=_run_plugins)


def _run_plugins(args: argparse.Namespace) -> int:
    """Prints the table."""
    if args.kind is not None:
        check_choice("KIND", args.kind, REGISTRIES)
    kinds = REGISTRIES if args.kind is None else [args.kind]
    print_rows([row for kind in kinds for row in _plugin_rows(kind)], as_json=args.json)
    return 0


def _plugin_rows(kind: str) -> list[dict[str, Any]]:
    registry: Registry[Any] = getattr(import_module(f"maskgit_pl.{REGISTRIES[kind]}"), kind)
    return [
        {"kind": kind, "name": name, "package": package, "description": registry.summary(name)}
        for name, package in registry.origins().items()
    ]


def add_env_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "env",
        help="print versions, machine and devices, for a report of a problem",
        description="Print versions of maskgit_pl and its libraries, the machine, and the devices that torch finds.",
        epilog="Example: maskgit env --json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run_env)


def _run_env(args: argparse.Namespace) -> int:
    """Prints one line for each value."""
    values = _describe_environment()
    if args.json:
        print(json.dumps(values, indent=1))
        return 0
    width = max(map(len, values)) + 2
    for name, value in values.items():
        text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
        print(f"{name:{width}}{text}")
    return 0


def _describe_environment() -> dict[str, Any]:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from maskgit_pl.distributed import default_device, describe_environment, device_name

    values = describe_environment()
    for name in _OPTIONAL:
        try:
            values[name] = version(name)
        except PackageNotFoundError:
            values[name] = "not installed"
    values["default device"] = device_name(torch.device(default_device()))
    values["recipes"] = list(map(str, recipes_folders()))
    return values


def add_schedules_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "schedules",
        help="list the mask schedules",
        description="Print the number of known tokens after each decoding step, for each mask schedule.",
        epilog="Example: maskgit schedules --num-tokens 49 --schedules cosine,linear --out schedules.png",
    )
    parser.add_argument("--num-tokens", type=int, default=256, metavar="N", help="tokens per image (default: 256)")
    parser.add_argument("--num-steps", type=int, default=8, metavar="T", help="number of decoding steps (default: 8)")
    parser.add_argument(
        "--schedules",
        metavar="A,B,...",
        help="names, or mappings such as '{name: pow, exponent: 3}' (default: every schedule without arguments)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="also draw the mask ratio against progress")
    add_json_argument(parser)
    parser.set_defaults(run=_run_schedules)


def _run_schedules(args: argparse.Namespace) -> int:
    """Prints the table, and draws the figure of ``--out``."""
    check_at_least(args, num_tokens=1, num_steps=1)
    check_outputs(args, out=".png")
    from maskgit_pl.decoding.plan import check_num_steps

    with use_flag_names(args):
        check_num_steps(args.num_steps, args.num_tokens)
    schedules = _build_schedules(args.schedules)
    from maskgit_pl.evaluation.reports.schedule_ablation import count_known_tokens, draw_schedules

    known = {
        name: count_known_tokens(schedule, num_tokens=args.num_tokens, num_steps=args.num_steps)
        for name, schedule in schedules.items()
    }
    if args.json:
        print_rows(
            [{"mask_schedule": name, "known": [*map(int, counts)]} for name, counts in known.items()], as_json=True
        )
    else:
        _print_known(known, num_tokens=args.num_tokens, num_steps=args.num_steps)
    if args.out is not None:
        make_folder(args.out.parent)
        with write_atomically(args.out) as stream:
            stream.write(draw_schedules(schedules, num_tokens=args.num_tokens))
        log.info("%s: mask ratio of %d schedules", args.out, len(schedules))
    return 0


def _print_known(known: Mapping[str, Sequence[int]], *, num_tokens: int, num_steps: int) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"tokens known after each of {num_steps} steps, of {num_tokens}")
    table.add_column("mask schedule")
    for step in range(1, num_steps + 1):
        table.add_column(str(step), justify="right")
    for name, counts in known.items():
        # Names of plug-ins are untrusted: no markup of Rich, no control characters.
        table.add_row(escape(printable(name)), *map(str, counts))
    Console().print(table)


def _build_schedules(wanted: str | None) -> dict[str, MaskSchedule]:
    from maskgit_pl.schedules import mask_schedules

    if wanted is None:
        return mask_schedules.build_all()
    return {describe(spec): mask_schedules.build(spec) for spec in parse_specs("--schedules", wanted)}
