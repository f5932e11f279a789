"""Installs a package for a test: writes the files that pip would write into a folder on ``sys.path``."""

import importlib
from pathlib import Path


def install(folder: Path, *, name: str, entry_points: str, modules: dict[str, str]) -> None:
    """Writes modules and a ``.dist-info`` into a folder on ``sys.path``.

    Args:
        folder: Folder in the role of site-packages.
        name: Name of the package.
        entry_points: Content of its ``entry_points.txt``.
        modules: Source code of its modules, by name.
    """
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source)
    importlib.invalidate_caches()
