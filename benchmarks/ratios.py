"""Runs the benchmarks that compare, and writes one table of their ratios into benchmarks/README.md.

    make benchmarks ARGS="--peers ~/clones"

Each ratio is our time divided by that of the alternative in the same round, as the median over the rounds: below 1,
ours is faster. One thread is measured in CPU seconds, so that other programs matter little, several in seconds.
Alternatives whose code is not there are left out.
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
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measuring import format_table

from maskgit_pl.devices import cpu_name, has_bfloat16

_README = Path(__file__).parent / "README.md"
_BEGIN, _END = "<!-- ratios: written by `make benchmarks` -->", "<!-- end of ratios -->"
_DECODING = "decoding, {depth} layers, {group}, batch {batch_size}"
_OTHERS = "--only dome272/MaskGIT-pytorch bytedance/1d-tokenizer"
SOURCES: Mapping[str, str] = {
    "decode.py --dtype float32 PEERS": _DECODING,
    "decode.py --dtype bfloat16 PEERS": _DECODING,
    f"decode.py --dtype bfloat16 --batch-size 8 --depth 8 {_OTHERS} PEERS": _DECODING,
    "stage1_step.py": "training step of stage 1, {group}",
    "stage2_step.py --memory PEERS": "training step of stage 2, {group}",
    "tokenizer.py": "tokenizer, {group}",
    "data.py": "data: {group}",
    "import_time.py": "{group}",
}
"""Command of each benchmark, and the task of a row."""

_OURS = ("ours", "MaskGIT", "maskgit sample, one image")


def read_ratios(report: Mapping[str, Any], task: str) -> Iterator[dict[str, str]]:
    """Yields a row for each alternative of a group: the ratio of ours, and of ours with the backbone ``adaln``."""
    seconds = {(row["group"], row["name"]): row["seconds"] for row in report["measured"]}

    def ratio(group: str, name: str, theirs: Sequence[float]) -> str:
        if (group, name) not in seconds:
            return ""
        ratios = [mine / its for mine, its in zip(seconds[group, name], theirs, strict=True)]
        return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    for (group, alternative), theirs in seconds.items():
        is_ours = alternative in _OURS or alternative.startswith("ours")
        for name in () if is_ours else _OURS:
            if text := ratio(group, name, theirs):
                yield {
                    "task": task.format(group=group, **report["settings"]) + (f": {name}" if name != "ours" else ""),
                    "alternative": alternative,
                    "ours / alternative": text,
                    "adaln / alternative": ratio(group, "ours, adaln", theirs),
                }


def measure(*, repeats: int, threads: Sequence[int] = (1,), peers: Path | None = None, only: Sequence[str] = ()) -> str:
    """Runs the benchmarks one after another and returns the table.

    Args:
        repeats: Rounds of each benchmark.
        threads: Numbers of threads; all benchmarks run with each.
        peers: Folder with clones of the peers; None leaves them out.
        only: Scripts to run, such as ``data.py``; empty for all.
    """
    rows: list[dict[str, str]] = []
    for count, (source, task) in product(threads, SOURCES.items()):
        if (only and source.split()[0] not in only) or ("bfloat16" in source and not has_bfloat16("cpu")):
            continue
        folder = "" if peers is None else f"--peers {shlex.quote(str(peers))}"
        command = f"{source.replace('PEERS', folder)} --repeats {repeats} --threads {count}"
        print(f"python benchmarks/{command}", flush=True)
        rows += [{"threads": str(count), **row} for row in read_ratios(run_benchmark(command), task)]
    return format_table(rows)


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
    machine = f"{datetime.date.today().isoformat()}, {cpu_name()}, torch {torch.__version__}:"
    readme.write_text(f"{before}{_BEGIN}\n\n{machine}\n\n{table}\n\n{_END}{after}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, prints the table, and writes it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each benchmark (%(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], metavar="N", help="numbers of threads (1)")
    parser.add_argument("--peers", type=Path, metavar="FOLDER", help="folder with clones of the peers")
    parser.add_argument("--only", nargs="+", default=[], metavar="SCRIPT", help="print the ratios of these only")
    arguments = parser.parse_args(argv)
    table = measure(**vars(arguments))
    print("\n" + table)
    if not arguments.only:
        write_table(table)


if __name__ == "__main__":
    main()
