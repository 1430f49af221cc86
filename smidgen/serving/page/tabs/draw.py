"""The tab Draw: scenes with an adapter at any weight, two side by side, and the files for other programs."""

from __future__ import annotations

from typing import Any

import gradio as gr

from smidgen.adapters.export import size
from smidgen.serving.page import html, making, runs
from smidgen.serving.page.context import QUIET, Context, Updates, chosen, galleries, told
from smidgen.serving.page.tabs.make import PROMPTS

NONE = "base"  # in place of the second adapter: the base alone


def build(context: Context, page: gr.Blocks, tab: gr.Tab) -> gr.Dropdown:
    """Lay the tab out; returns the dropdown that says which adapter."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            gr.HTML(html.heading("", "What to draw"), padding=False)
            first = gr.Dropdown([], label="Adapter", elem_id="sm-adapter")
            weight = gr.Slider(
                0, 2, 1, step=0.05, label="Weight", info="0 is the base alone, 1 the adapter, more exaggerates."
            )
            prompts = gr.Textbox(label="Prompts, one a line", value=PROMPTS, lines=3, max_lines=8)
            with gr.Accordion("Beside it", open=False):
                second = gr.Dropdown(
                    [("nothing", ""), ("the base alone", NONE)], value="", label="Second adapter", elem_id="sm-second"
                )
                other = gr.Slider(0, 2, 1, step=0.05, label="Its weight")
            with gr.Row():
                seed = gr.Number(label="Seed", value=0, precision=0, info="The same noise for both.")
                each = gr.Slider(1, 4, 1, step=1, label="Pictures of each prompt")
            go = gr.Button("Draw", variant="primary", elem_id="sm-draw")
            notice = gr.HTML(padding=False)
        with gr.Column(scale=7, min_width=320):
            blank = gr.HTML(
                html.empty(
                    "Nothing drawn yet",
                    "Choose an adapter, write a prompt, and draw. Without an adapter, go to Make first.",
                ),
                padding=False,
            )
            left, right = galleries(2, "First", "Second")
            gr.HTML(html.heading("", "Take it with you", "One file, for the program you draw with."), padding=False)
            wanted = gr.Radio(list(making.FORMATS), value="Smidgen", label="For")
            make_file = gr.Button("Make the file", elem_id="sm-file")
            said = gr.HTML(padding=False)
            file = gr.DownloadButton("Download", visible=False, variant="primary", elem_id="sm-download")

    def draw(
        name: str, weight: float, prompts: str, beside: str, other: float, seed: float | None, each: float
    ) -> Updates:
        run = runs.find(context.folder, name)
        lines = [line for line in prompts.splitlines() if line.strip()]
        making.check_prompts(lines, int(each))
        columns = [(left, run, weight)]
        if beside == NONE:
            columns.append((right, run, 0.0))
        elif beside:
            columns.append((right, runs.find(context.folder, beside), other))
        yield {
            notice: html.busy(f"Drawing {len(lines) * int(each) * len(columns)} pictures."), blank: "",
            left: gr.update(value=[], visible=False), right: gr.update(value=[], visible=False),
        }  # fmt: skip
        shown: dict[Any, list[tuple[str, str]]] = {left: [], right: []}
        for prompt in lines:
            for gallery, own, at in columns:
                drawn = making.draw(context.bases, own.folder, at, [prompt], int(seed or 0), int(each))
                shown[gallery] += [(str(path), said) for path, said in drawn]
                label = f"{own.title}, weight {at:g}" if at or beside != NONE else "The base alone"
                yield {
                    gallery: gr.update(
                        value=list(shown[gallery]), visible=True, label=label, columns=2 if len(columns) == 1 else 1
                    )
                }
        yield {notice: html.good("Drawn, and kept in the run's folder.")}

    def redraw(*given: Any) -> Updates:
        """A weight that was moved draws again what is shown."""
        *values, there = given
        if there:
            yield from draw(*values)

    def download(name: str, wanted: str) -> Updates:
        run = runs.find(context.folder, name)
        yield {said: html.busy("Writing the file, and reading it back."), file: gr.update(visible=False)}
        path, words = making.download(run, wanted)
        label = f"Download {path.name} ({size(path.stat().st_size)})"
        yield {said: html.note(words), file: gr.update(visible=True, value=str(path), label=label)}

    def refresh(name: str | None, beside: str | None) -> Updates:
        found = making.drawable(context.folder)
        pairs = [("nothing", ""), ("the base alone", NONE), *[(run.title, run.name) for run in found]]
        kept = beside if beside in [value for _, value in pairs] else ""
        words = "" if found else html.note("There is no adapter yet. Make one first, under Make.")
        yield {first: chosen(found, name), second: gr.update(choices=pairs, value=kept), notice: words}

    given, outputs = [first, weight, prompts, second, other, seed, each], [notice, blank, left, right]
    go.click(told(notice, draw), given, outputs, **QUIET)
    for slider in (weight, other):
        slider.release(told(notice, redraw), [*given, left], outputs, **QUIET)
    make_file.click(told(said, download), [first, wanted], [said, file], **QUIET)
    first.change(lambda: (gr.update(visible=False), ""), [], [file, said], **QUIET)
    tab.select(told(notice, refresh), [first, second], [first, second, notice], **QUIET)
    page.load(told(notice, refresh), [first, second], [first, second, notice], **QUIET)
    return first


def with_run(context: Context, name: str | None) -> Any:
    """The dropdown with this run chosen."""
    return chosen(making.drawable(context.folder), name)
