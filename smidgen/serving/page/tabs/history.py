"""The tab Runs: what is on the disk, and what can be done with each: watch, stop, resume, continue, draw."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from smidgen.serving.page import html, making, runs
from smidgen.serving.page.context import QUIET, Context, Updates, chosen, told, watch
from smidgen.serving.page.runs import Run


def build(context: Context, page: gr.Blocks, tab: gr.Tab, open_in_draw: Callable[[gr.Button, gr.State], None]) -> None:
    """Lay the tab out."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            gr.HTML(html.heading("", "History", f"Every run is a folder in {context.folder}."), padding=False)
            history = gr.HTML(padding=False)
        with gr.Column(scale=5, min_width=320):
            gr.HTML(html.heading("", "One run"), padding=False)
            picked = gr.Dropdown([], label="Run", elem_id="sm-run")
            notice = gr.HTML(padding=False)
            live = watch(context)
            draw = gr.Button("Draw and download", visible=False, variant="primary")
            with gr.Accordion("Continue", open=False, visible=False, elem_id="sm-more") as more:
                steps = gr.Number(
                    label="More steps",
                    value=100,
                    precision=0,
                    minimum=1,
                    info="From this adapter, with the same pictures, as a new run.",
                )
                onward = gr.Button("Continue training", elem_id="sm-continue")

    def listed(value: str | None) -> dict[Any, Any]:
        found = runs.list_runs(context.folder)
        return {history: html.run_list([(run, run.status()) for run in found]), picked: chosen(found, value)}

    def actions(run: Run | None) -> dict[Any, Any]:
        drawable = run is not None and run.name in [one.name for one in making.drawable(context.folder)]
        again = run is not None and run.pictures.is_dir() and run in making.trainable(context.folder)
        return {draw: gr.update(visible=drawable), more: gr.update(visible=again)}

    def refresh(value: str | None) -> Updates:
        found = listed(value)
        name = found[picked]["value"]
        run = runs.read_run(context.folder / name) if name else None
        yield found | live.show(run) | actions(run) | {notice: ""}

    def pick(value: str | None) -> Updates:
        run = runs.read_run(context.folder / value) if value else None
        yield live.show(run) | actions(run) | {notice: ""}

    def go_on(value: str | None, steps: float | None) -> Updates:
        run = runs.find(context.folder, value)
        yield {notice: html.busy("Checking pictures and settings.")}
        made = making.train_on(context.folder, run, int(steps or 0))
        yield (
            {notice: html.note(f"{made.title} trains on its own from {run.title}.")}
            | listed(made.name)
            | live.show(made)
            | actions(made)
        )

    outputs = [history, picked, notice, draw, more, *live.parts]
    tab.select(told(notice, refresh), [picked], outputs, **QUIET)
    picked.input(told(notice, pick), [picked], outputs, **QUIET)
    onward.click(told(notice, go_on), [picked, steps], outputs, **QUIET)
    live.wire(notice, lambda run: listed(run.name) | actions(run), [history, picked, draw, more])
    open_in_draw(draw, live.name)
