"""Runs the scripts of ``paper/`` in this process."""

from importlib import import_module

from maskgit_pl.cli import run_script


def run(name: str, *words: object) -> int:
    """Runs ``python -m paper.NAME`` with its arguments; returns the exit code."""
    function = getattr(import_module(f"paper.{name}"), name)
    return run_script(function, prog=f"python -m paper.{name}", argv=[str(word) for word in words])
