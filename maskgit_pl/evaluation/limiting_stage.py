"""Says which stage of a model limits its images, and which commands to run next.

``evaluate`` prints the result, and writes it into ``evaluation.json``.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from maskgit_pl.evaluation.metric_names import metric_name
from maskgit_pl.evaluation.run_folders import read_run_recipe
from maskgit_pl.files import read_json
from maskgit_pl.runs.recipe_files import DEFAULT_DATASET
from maskgit_pl.text import printable

__all__ = ["LimitingStage", "describe_limit", "find_limiting_stage", "next_commands"]

LimitingStage = Literal["tokenizer", "transformer", "neither"]

_TOKENIZER_SHARE = 0.5  # of the FID of generated images
_NEAR_REAL = 1.5  # times the FID of real images
_MANY_CODES = 0.9  # fraction of the codes in use from which more codes can help
_BUDGETS, _LONGEST = ("15m", "1h"), "1h"  # recipes of the transformer
_ESTIMATES = ("exact_bits_per_token", "elbo_bits_per_token")
_MAX_ENVIRONMENT_BYTES = 1_000_000


def find_limiting_stage(fid: float, reconstruction_fid: float, real_fid: float) -> LimitingStage:
    """Finds the stage that most of the FID of generated images comes from.

    The tokenizer decodes the generated tokens, so its reconstruction FID is about the FID that a perfect transformer
    would have. The rule, in this order:

    1. ``neither`` if the FID is at most 1.5 times that of as many real images: it can hardly fall further.
    2. ``tokenizer`` if the reconstruction FID is more than half of the FID: a better transformer can remove less than
       half of it.
    3. ``transformer`` otherwise.

    Args:
        fid: FID of generated images.
        reconstruction_fid: FID of reconstructed val images in the same network.
        real_fid: FID of as many real images as were generated, in the same network.
    """
    if fid <= _NEAR_REAL * real_fid:
        return "neither"
    return "tokenizer" if reconstruction_fid > _TOKENIZER_SHARE * fid else "transformer"


def describe_limit(content: Mapping[str, Any], run: Path) -> dict[str, Any]:
    """Describes the limiting stage in plain values, by the FID of the first feature network.

    Args:
        content: Content of ``evaluation.json``.
        run: Run folder.

    Returns:
        ``text``: one or two sentences. ``bits_per_token`` and ``uniform_bits_per_token`` (log2 K). Where the
        reconstruction FID is known, ``stage``, ``reconstruction_share`` (a fraction of the FID) and ``commands``.
    """
    network = next(iter(content["protocol"]["features"]))
    bits = next(content["likelihood"][name] for name in _ESTIMATES if name in content["likelihood"])
    uniform = math.log2(content["model"]["codebook_size"])
    described: dict[str, Any] = {"network": network, "bits_per_token": bits, "uniform_bits_per_token": uniform}
    of_tokens = f"The transformer needs {bits:.2f} bits per val token, a uniform guess {uniform:.2f}."
    rebuilt = content["reconstruction"].get(metric_name("rfid", network))
    if rebuilt is None:  # reconstructions are compared with the val split only
        return {**described, "text": of_tokens}
    columns = content["samples"]["exported_guidance"], content["real_against_real"]
    fid, real = (column[metric_name("fid", network)] for column in columns)
    stage = find_limiting_stage(fid, rebuilt, real)
    return {
        **described,
        "stage": stage,
        "reconstruction_share": rebuilt / fid,
        "text": f"{_sentence(stage, fid, rebuilt, real)} {of_tokens}",
        "commands": next_commands(stage, run, content),
    }


def _sentence(stage: LimitingStage, fid: float, rebuilt: float, real: float) -> str:
    if stage == "neither":
        return (
            f"Neither stage limits: FID {fid:.2f} is close to {real:.2f}, that of as many real images; a larger "
            "--num-images shows smaller differences."
        )
    share = f"reconstructed real images already have FID {rebuilt:.2f}, {rebuilt / fid:.0%} of {fid:.2f}"
    return f"The {stage} limits: {share}."


def next_commands(stage: LimitingStage, run: Path, content: Mapping[str, Any]) -> list[str]:
    """Returns the commands that improve the limiting stage in a new run.

    A tokenizer gets four times as many codes if it uses at least 90 % of them, else twice as many steps. A transformer
    gets the budget of an hour, after that twice as many steps.

    Args:
        stage: The limiting stage.
        run: Run folder.
        content: Content of ``evaluation.json``.

    Returns:
        The commands; none if neither stage limits, or the folder does not record its training.
    """
    if stage == "neither":
        return []
    file = run / stage / "environment.json"
    steps = (read_run_recipe(run / stage / "config.yaml").get("trainer") or {}).get("max_steps")
    if steps is None or not file.is_file():
        return []
    flags = _read_flags(read_json(file, max_bytes=_MAX_ENVIRONMENT_BYTES).get("command"))
    recipes, dataset = flags.get("recipe", "").split(), flags.get("dataset", DEFAULT_DATASET)
    if stage == "tokenizer" and content["reconstruction"]["codebook_usage"] >= _MANY_CODES:
        more = [f"--model.network.codebook_size={4 * content['model']['codebook_size']}"]
    elif stage == "tokenizer" or _LONGEST in recipes:
        more = [f"--trainer.max_steps={2 * steps}"]
    else:
        recipes, more = [*(each for each in recipes if each not in _BUDGETS), _LONGEST], []
    of_run = {
        "--dataset": dataset,
        "--data": flags.get("data") if flags.get("data") != f"data/shards/{dataset}" else None,
        "--recipe": " ".join(recipes),
        "--run": f"{run.resolve().name}-more",
        "--tokenizer": f"{run}/pretrained/tokenizer" if stage == "transformer" else None,
    }
    words = [word for flag, text in of_run.items() if text for word in (flag, text)]
    later = more if stage == "transformer" else []
    commands = [["tokenize", *words, *later], ["train", "transformer", *words, *later]]
    if stage == "tokenizer":
        commands = [["train", "tokenizer", *words, *more], *commands]
    return [shlex.join(["maskgit", *each]) for each in commands]


def _read_flags(command: Any) -> dict[str, str]:
    """Returns the flags of a recorded command line by name, without dashes."""
    words = [printable(word) for word in command] if isinstance(command, Sequence) else []
    flags = {}
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            name, is_joined, joined = word[2:].partition("=")
            flags[name] = joined if is_joined else value
    return flags
