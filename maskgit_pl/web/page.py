"""The page of a model: its tabs, its title and its style."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskgit_pl.text import markdown
from maskgit_pl.web.studio import Studio

__all__ = ["STYLE", "build_page"]

STYLE = Path(__file__).with_name("style.css")


def build_page(studio: Studio) -> Any:
    """Builds the page of a model.

    Args:
        studio: The model.

    Returns:
        The ``gradio.Blocks``.
    """
    import gradio as gr

    from maskgit_pl.web.tab_edit import add_edit_tab, add_panorama_tab
    from maskgit_pl.web.tab_generate import add_compare_tab, add_generate_tab
    from maskgit_pl.web.tab_schedules import add_schedules_tab

    with gr.Blocks(title=f"MaskGIT: {studio.name}", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(f"# MaskGIT\n{_describe(studio)}")
        with gr.Tab("Generate"):
            generated = add_generate_tab(studio, page)
        with gr.Tab("Compare"):
            add_compare_tab(studio, page)
        with gr.Tab("Edit") as tab:
            add_edit_tab(studio, tab, generated)
        with gr.Tab("Panorama"):
            add_panorama_tab(studio)
        with gr.Tab("Schedules"):
            add_schedules_tab(studio, page)
    return page


def _describe(studio: Studio) -> str:
    """Returns the name and the sizes of the model as Markdown."""
    sizes = repr(studio.pipe).removeprefix("MaskGIT(").removesuffix(")")
    named = sizes if sizes.startswith(f"{studio.name}: ") else f"{studio.name}: {sizes}"
    return markdown(named)
