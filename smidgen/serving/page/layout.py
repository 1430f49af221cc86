"""The page as a whole: its head, its tabs, its colours."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from smidgen.serving.page.context import QUIET, Context
from smidgen.serving.page.tabs import change, draw, history, make, text

CSS = Path(__file__).parent / "style.css"
HEAD = (
    '<meta name="color-scheme" content="light dark"><meta name="description" content="Smidgen: adapters of kilobytes">'
)
FONTS = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]


def build(folder: Path) -> gr.Blocks:
    """The page over a folder of runs."""
    context = Context(folder)
    with gr.Blocks(title="Smidgen", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            '<header class="sm-head"><h1>Smidgen</h1><p>Teach an image model one subject, in a file of kilobytes.</p></header>',
            padding=False,
        )  # fmt: skip
        with gr.Tabs(elem_id="sm-tabs") as tabs:
            with gr.Tab("Make", id="make") as make_tab:
                make_place = gr.Column()
            with gr.Tab("Draw", id="draw") as draw_tab:
                chosen = draw.build(context, page, draw_tab)

            def open_in_draw(button: gr.Button, name: gr.State) -> None:
                """A button that leads to Draw, with the run in ``name`` chosen."""
                button.click(
                    lambda run: (gr.Tabs(selected="draw"), draw.with_run(context, run)), [name], [tabs, chosen], **QUIET
                )

            with make_place:
                make.build(context, page, make_tab, open_in_draw)
            with gr.Tab("Change", id="change") as change_tab:
                change.build(context, page, change_tab)
            with gr.Tab("Runs", id="runs") as runs_tab:
                history.build(context, page, runs_tab, open_in_draw)
            with gr.Tab("Text", id="text") as text_tab:
                text.build(context, page, text_tab)
    return page


def theme() -> gr.themes.Base:
    """Quiet greys, one green, fonts of the reader's own machine."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.emerald, neutral_hue=gr.themes.colors.stone, radius_size=gr.themes.sizes.radius_md,
        spacing_size=gr.themes.sizes.spacing_md, font=FONTS, font_mono=MONO,
    ).set(
        body_background_fill="#faf9f7", body_background_fill_dark="#171614",
        block_background_fill="#ffffff", block_background_fill_dark="#211f1d",
        block_border_width="1px", block_border_color="#e4e1dc", block_border_color_dark="#3a3733",
        button_primary_background_fill="#0b6b4f", button_primary_background_fill_hover="#095740", button_primary_text_color="#ffffff",
        button_primary_background_fill_dark="#0b6b4f", button_primary_background_fill_hover_dark="#0e7d5c",
        button_primary_text_color_dark="#ffffff",
        button_secondary_background_fill="#ffffff", button_secondary_border_color="#b9b4ac", button_secondary_text_color="#2a2724",
        button_secondary_background_fill_dark="#2a2825", button_secondary_text_color_dark="#f1efec",
        button_border_width="1px", button_border_width_dark="1px",
        button_primary_border_color="#0b6b4f", button_primary_border_color_dark="#0b6b4f", button_secondary_border_color_dark="#6b655e",
        checkbox_background_color_selected="#0b6b4f", checkbox_background_color_selected_dark="#0b6b4f",
        slider_color="#0b6b4f", slider_color_dark="#3fb68d",
        body_text_color="#26231f", body_text_color_subdued="#5e5953", block_info_text_color="#5e5953", block_label_text_color="#4b4640",
        body_text_color_dark="#f1efec", body_text_color_subdued_dark="#b7b1a9", block_info_text_color_dark="#b7b1a9",
        block_label_text_color_dark="#cfc9c1", block_title_text_color="#37332e", block_title_text_color_dark="#dcd7d0",
        input_placeholder_color="#75706a", input_placeholder_color_dark="#a39d95",
    )  # fmt: skip
