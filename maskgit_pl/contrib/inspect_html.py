"""The HTML of an inspection page: self-contained, without scripts and network, for light and dark screens."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from maskgit_pl.contrib.inspect_charts import quote

__all__ = ["embed_png", "format_html", "make_section"]

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 12px; max-width: 1180px }
body { overflow-wrap: anywhere }
h1 { font-size: 1.35em } h2 { font-size: 1.15em; border-bottom: 1px solid #8886; padding-bottom: 4px }
section > div { display: flex; flex-wrap: wrap; gap: 14px }
figure { margin: 0; max-width: 100% } figure.chart { width: 360px }
figcaption { font-weight: 600; margin: 4px 0 } img { max-width: 100%; height: auto; image-rendering: pixelated }
svg { width: 100%; height: auto } svg text { font-size: 11px; fill: currentColor } .grid { stroke: #8885 }
.legend { display: flex; flex-wrap: wrap; gap: 2px 12px; font-size: 13px }
.legend i { display: inline-block; width: 10px; height: 10px; margin-right: 4px }
.problem { border-left: 4px solid #d97706; padding: 2px 10px; margin: 8px 0 }
.healthy { border-left: 4px solid #2e9e6b; padding: 2px 10px; margin: 8px 0 }
"""
# The browser loads nothing and runs nothing, even if a text were not escaped.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def format_html(title: str, sections: Sequence[str]) -> str:
    """Returns a complete HTML document.

    Args:
        title: Title, as plain text.
        sections: Contents, as HTML; see ``make_section``.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{quote(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{quote(title)}</h1>\n{''.join(sections)}</body></html>\n"
    )


def make_section(title: str, parts: Sequence[str], *, notes: Sequence[str] = ()) -> str:
    """Returns a section; an empty string if it has neither parts nor notes.

    Args:
        title: Title, as plain text.
        parts: Figures and paragraphs, as HTML.
        notes: Sentences below the title, as plain text.
    """
    shown = [part for part in parts if part]
    if not shown and not notes:
        return ""
    text = "".join(f"<p>{quote(note)}</p>" for note in notes)
    return f"<section><h2>{quote(title)}</h2>{text}<div>{''.join(shown)}</div></section>\n"


def embed_png(title: str, png: bytes, *, description: str) -> str:
    """Returns a figure with a PNG file inside of the page.

    Args:
        title: Title above the picture.
        png: The file; it must come from an own encoder, not from the run.
        description: Text for those who do not see the picture.
    """
    data = base64.b64encode(png).decode("ascii")
    return (
        f"<figure><figcaption>{quote(title)}</figcaption>"
        f'<img alt="{quote(description)}" src="data:image/png;base64,{data}"></figure>'
    )
