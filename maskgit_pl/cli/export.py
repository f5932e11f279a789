"""``maskgit export``: a checkpoint of a run as a pretrained folder, whatever ranks wrote it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from maskgit_pl.locks import locked
from maskgit_pl.runs.plan import Plan
from maskgit_pl.runs.recipe import Recipe
from maskgit_pl.runs.recipe_files import STAGES, Stage
from maskgit_pl.runs.safe_yaml import read_yaml

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["add_parser", "run"]

# The run's own settings, except that one process of this machine reads them.
_HERE = ("--trainer.accelerator=cpu", "--trainer.strategy=auto", "--trainer.devices=1", "--trainer.num_nodes=1")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to ``maskgit``."""
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint's averaged weights as a pretrained folder",
        description="Write a checkpoint's averaged weights as a pretrained folder (safetensors and JSON), as training "
        "does at its end. Checkpoints of any number of ranks are read, on a processor.",
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder (runs/NAME)")
    parser.add_argument("--stage", choices=STAGES, help="one stage alone (default: each that has a checkpoint)")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the run's shards, if they lie elsewhere now")
    parser.add_argument("--out", type=Path, metavar="DIR", help="pretrained folder (default: RUN/pretrained)")
    parser.add_argument("--replace", action="store_true", help="in place of what an earlier export wrote")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exports.

    Raises:
        FileNotFoundError: No such run, stage, checkpoint, data or tokenizer.
        FileExistsError: The folder holds an export.
        ValueError: A checkpoint that is not whole.
    """
    stages = _stages(args.folder, args.stage)
    out = args.out or args.folder / "pretrained"
    for stage in stages:
        if (out / stage).exists() and not args.replace:
            raise FileExistsError(f"{out / stage}: is there already; --replace writes it anew, --out elsewhere")
    plans = [_plan(args.folder, stage, args.data, out) for stage in stages]
    from maskgit_pl.training.checkpoint_files import complete_checkpoints, step_of

    chosen: list[Path] = []
    for plan in plans:
        found = {step_of(path): path for path in complete_checkpoints(plan.checkpoints)}
        if not found or args.step not in {None, *found}:
            there = ", ".join(map(str, found)) or "none"
            wanted = "a complete one" if args.step is None else f"step {args.step}"
            raise FileNotFoundError(f"{plan.checkpoints}: {wanted} is needed, complete are: {there}")
        chosen.append(found[max(found) if args.step is None else args.step])
    from maskgit_pl.runs.stage import export_checkpoint

    with locked(out, way_out="give another --out"):
        for plan, checkpoint in zip(plans, chosen, strict=True):
            export_checkpoint(plan, checkpoint, out)
    return 0


def _stages(folder: Path, named: Stage | None) -> Sequence[Stage]:
    """The stage that is named, or those that were trained, the tokenizer first."""
    stages = [named] if named else [stage for stage in STAGES if (folder / stage / "checkpoints").is_dir()]
    for stage in stages:
        if not (folder / stage / "config.yaml").is_file():
            raise FileNotFoundError(f"run {folder}: training wrote no {stage}/config.yaml there; name a run folder")
    if not stages:
        raise FileNotFoundError(f"run {folder}: no stage with checkpoints there; name a run folder, such as runs/NAME")
    return stages


def _plan(folder: Path, stage: Stage, data: Path | None, out: Path) -> Plan:
    config = folder / stage / "config.yaml"
    tree = read_yaml(config)
    shards = data or Path(tree["data"]["path"])
    if tree["data"].get("stream") is None and not shards.is_dir():
        raise FileNotFoundError(f"data {shards}, of {config}: no such folder; name where it lies now with --data")
    words = [*_HERE, f"--data.path={shards}"]
    tokenizer = None
    if stage == "transformer":
        places = [Path(tree["model"]["tokenizer"]), folder / "pretrained" / "tokenizer", out / "tokenizer"]
        tokenizer = next((place for place in places if (place / "config.json").is_file()), None)
        if tokenizer is None:
            raise FileNotFoundError(
                f"tokenizer {places[0]}, of {config}: not there; copy it back, or `maskgit export {folder} --stage "
                "tokenizer` if the run trained it"
            )
        words.append(f"--model.tokenizer={tokenizer}")
    recipe = Recipe.from_run(stage, config, words)
    return Plan(recipe, shards, folder, tokenizer)
