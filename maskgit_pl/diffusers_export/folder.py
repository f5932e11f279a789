"""The two files that make a pretrained folder one of 🤗 diffusers: ``model_index.json`` and ``pipeline.py``."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from maskgit_pl.files import write_text

__all__ = ["CLASS_NAME", "INDEX", "PIPELINE", "is_template", "write_index"]

INDEX, PIPELINE = "model_index.json", "pipeline.py"
CLASS_NAME = ["pipeline", "MaskGITPipeline"]
"""The entry of ``model_index.json`` that names the file without its suffix, and the class in it."""

_MODULE = "maskgit_pl.diffusers_export.pipeline"
_TEMPLATE = Path(__file__).with_name("template.py")
_CARD = "README.md"
_EXAMPLE = """
## 🤗 diffusers

```python
from diffusers import DiffusionPipeline  # pip install 'maskgit_pl[diffusers]'

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder", trust_remote_code=True)
pipe([0], seed=0).images[0].save("image.png")
```
"""


def write_index(folder: Path) -> None:
    """Adds ``model_index.json`` and ``pipeline.py`` to a pretrained folder, and an example to its card."""
    index = {
        "_class_name": CLASS_NAME,
        "_diffusers_version": version("diffusers"),
        "tokenizer": [_MODULE, "MaskGITTokenizer"],
        "transformer": [_MODULE, "MaskGITTransformer"],
    }
    write_text(folder / PIPELINE, _TEMPLATE.read_text(encoding="utf-8"))
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    write_text(folder / _CARD, (folder / _CARD).read_text(encoding="utf-8") + _EXAMPLE)


def is_template(content: bytes) -> bool:
    """Returns True for the content of ``pipeline.py`` that ``write_index`` writes."""
    return content == _TEMPLATE.read_bytes()
