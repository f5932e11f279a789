"""Runs the benchmarks that compare, and writes one table of their ratios into benchmarks/README.md.

    make benchmarks

Each ratio is our time divided by that of the alternative in the same round, as the median over the rounds: below 1,
ours is faster. All are CPU seconds of one thread, so that other programs matter little. Alternatives whose package is
not installed are left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import format_table, read_cpu_name

from maskgit_pl.distributed import has_bfloat16

_README = Path(__file__).parent / "README.md"
_BEGIN, _END = "<!-- ratios: written by `make benchmarks` -->", "<!-- end of ratios -->"
_DECODE = "decode.py --only 'ours, first step cached' 'ours, weights not packed' "
_DECODE += "'encoder layers of torch, as dome272' 'BertModel of transformers, as 1d-tokenizer' "
_DECODING = "decoding, {group}, batch {batch_size}"
SOURCES: Mapping[str, str] = {
    f"{_DECODE}--dtype float32 --batch-size 1": _DECODING,
    f"{_DECODE}--dtype bfloat16 --batch-size 1": _DECODING,
    f"{_DECODE}--dtype bfloat16 --batch-size 8": _DECODING,
    "stage1_step.py": "training step of stage 1, {group}",
    "stage2_step.py": "training step of stage 2, {group}",
    "tokenizer.py": "tokenizer, {group}",
    "data.py": "data: {group}",
    "import_time.py": "{group}",
}
"""Command of each benchmark, and the task of a row."""

_OURS = {
    "ours": "",
    "ours, first step cached": ", class seen before",
    "ours, bf16": ", bf16",
    "MaskGIT": ": MaskGIT",
    "maskgit sample, one image": ": maskgit sample, one image",
}
"""Our contenders, and what they add to the task; all others are alternatives."""


def read_ratios(report: Mapping[str, Any], task: str) -> Iterator[dict[str, str]]:
    """Yields a row for each pair of ours and an alternative of a group."""
    seconds = {(row["group"], row["name"]): row["seconds"] for row in report["measured"]}
    for (group, alternative), theirs in seconds.items():
        for ours, addition in _OURS.items() if alternative not in _OURS else ():
            if (group, ours) in seconds:
                ratios = [mine / its for mine, its in zip(seconds[group, ours], theirs, strict=True)]
                yield {
                    "task": task.format(group=group, **report["settings"]) + addition,
                    "alternative": alternative,
                    "ours / alternative": f"{median(ratios):.2f}",
                    "of each round": f"{min(ratios):.2f} to {max(ratios):.2f}",
                }


def measure(*, repeats: int, only: Sequence[str] = ()) -> str:
    """Runs the benchmarks one after another and returns the table and the list of the commands.

    Args:
        repeats: Rounds of each benchmark.
        only: Scripts to run, such as ``data.py``; empty for all.
    """
    rows: list[dict[str, str]] = []
    commands: list[str] = []
    for source, task in SOURCES.items():
        command = f"{source} --repeats {repeats}"
        if (only and command.split()[0] not in only) or ("bfloat16" in command and not has_bfloat16("cpu")):
            continue
        print(f"python benchmarks/{command}", flush=True)
        commands.append(f"{len(commands) + 1}. `python benchmarks/{command}`")
        rows += [{**row, "command": str(len(commands))} for row in read_ratios(run_benchmark(command), task)]
    return "\n".join([format_table(rows), "", *commands])


def run_benchmark(command: str) -> Any:
    """Runs a benchmark in a process of its own and returns the content of its JSON file."""
    script, *words = shlex.split(command)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        subprocess.run([sys.executable, str(Path(__file__).parent / script), *words, "--json", str(file)], check=True)
        return json.loads(file.read_text())


def write_table(table: str, readme: Path = _README) -> None:
    """Replaces what stands between the two comments of the page."""
    before, rest = readme.read_text().split(_BEGIN)
    after = rest.split(_END)[1]
    machine = f"{datetime.date.today().isoformat()}, {read_cpu_name()}, 1 thread, torch {torch.__version__}:"
    readme.write_text(f"{before}{_BEGIN}\n\n{machine}\n\n{table}\n\n{_END}{after}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each benchmark (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="SCRIPT", help="print the ratios of these only")
    arguments = parser.parse_args(argv)
    table = measure(repeats=arguments.repeats, only=arguments.only)
    print("\n" + table)
    if not arguments.only:
        write_table(table)


if __name__ == "__main__":
    main()
