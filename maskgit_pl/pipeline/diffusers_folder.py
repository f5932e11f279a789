"""The files that make a pretrained folder one of 🤗 diffusers: writes ``model_index.json`` and ``pipeline.py``.

``model_index.json`` names the classes and their file. From the Hub, diffusers loads only classes whose file is in the
folder of their network, so that ``pipeline.py`` is in three places. It imports the classes of ``diffusers_export``.
Used by ``diffusers_export``, and by ``maskgit push``, which sends no other code.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from maskgit_pl.files import read_json, write_text

__all__ = ["CLASSES", "CLASS_NAME", "DIFFUSERS_FILES", "INDEX", "check_diffusers_files", "write_diffusers_files"]

INDEX = "model_index.json"
_FILES_OF_CODE = ("pipeline.py", "tokenizer/pipeline.py", "transformer/pipeline.py")
DIFFUSERS_FILES = (INDEX, *_FILES_OF_CODE)
"""The files that a pretrained folder does not have otherwise."""

CLASSES = {"tokenizer": "MaskGITTokenizer", "transformer": "MaskGITTransformer"}
"""The class of each network."""

CLASS_NAME = ["pipeline", "MaskGITPipeline"]
"""The entry ``_class_name`` of ``model_index.json``: the file without its suffix, and the class in it."""

_INDEX = {"_class_name": CLASS_NAME, **{part: ["pipeline", name] for part, name in CLASSES.items()}}
_CODE = f'''"""The classes of this folder. Their code is in a package: pip install 'maskgit_pl[diffusers]'."""

try:
    from maskgit_pl.pipeline.diffusers_pipeline import {", ".join((CLASS_NAME[1], *CLASSES.values()))}
except ImportError as error:
    raise ImportError("this pipeline requires maskgit_pl; run pip install 'maskgit_pl[diffusers]'") from error

__all__ = {json.dumps([CLASS_NAME[1], *CLASSES.values()])}
'''
_CARD = "README.md"
_EXAMPLE = """
## In diffusers

```python
from diffusers import DiffusionPipeline  # pip install 'maskgit_pl[diffusers]'

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder", trust_remote_code=True)
pipe([0], seed=0).images[0].save("image.png")
```
"""


def write_diffusers_files(folder: Path) -> None:
    """Adds ``model_index.json`` and ``pipeline.py`` to a pretrained folder, and an example to its card."""
    for path in _FILES_OF_CODE:
        write_text(folder / path, _CODE)
    write_text(folder / INDEX, json.dumps({**_INDEX, "_diffusers_version": version("diffusers")}, indent=2) + "\n")
    write_text(folder / _CARD, (folder / _CARD).read_text(encoding="utf-8") + _EXAMPLE)


def check_diffusers_files(folder: Path) -> None:
    """Checks that the files of diffusers in a folder, if there are any, are those that are written here.

    Raises:
        ValueError: if one differs, and could run other code.
    """
    for file in (folder / path for path in DIFFUSERS_FILES if (folder / path).is_file()):
        if file.name == INDEX:
            is_ours = {**read_json(file), "_diffusers_version": ""} == {**_INDEX, "_diffusers_version": ""}
        else:
            is_ours = file.read_bytes() == _CODE.encode()
        if not is_ours:
            raise ValueError(f"{file} must be the file that `maskgit export --format diffusers` writes; export again")
