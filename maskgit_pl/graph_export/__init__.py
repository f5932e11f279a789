"""Exports a model as ONNX or ``torch.export`` files, for programs without this package.

Used by ``maskgit export --format onnx`` and ``--format pt2``. A graph is one network call as a file: the tokenizer's
decoder and encoder, and the transformer's logits. The decoding loop stays outside; ``docs/export.md`` has one in NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from maskgit_pl.lazy_names import lazy_names

if TYPE_CHECKING:
    from maskgit_pl.graph_export.exporting import export_graphs
    from maskgit_pl.graph_export.kinds import FORMATS, Format

__all__ = ["FORMATS", "Format", "export_graphs"]

__getattr__ = lazy_names(__name__, {"FORMATS": "kinds", "Format": "kinds", "export_graphs": "exporting"})
