"""The tab Make: pictures in, an adapter out, predicted in a second or trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from smidgen.adapters.export import size
from smidgen.adapters.methods import known_methods
from smidgen.bases.embedded import EMBEDDED, FOLDERS
from smidgen.bases.embedded.world import SIZE
from smidgen.errors import ConfigError
from smidgen.serving.page import html, making, pictures, runs
from smidgen.serving.page.context import QUIET, Context, Updates, chosen, told, watch
from smidgen.serving.page.making import Wanted
from smidgen.serving.page.runs import Run

PIXELS = dict.fromkeys(FOLDERS, SIZE)  # on a side of what the bases that ship draw
PROMPTS = "a portrait of a person, smiling\na portrait of a person, with sunglasses, against a teal background"
FIRST = "Drop pictures, give them a name, then predict or train. What comes of it appears here."


def build(context: Context, page: gr.Blocks, tab: gr.Tab, open_in_draw: Callable[[gr.Button, gr.State], None]) -> None:
    """Lay the tab out. ``open_in_draw`` makes a button lead to the tab Draw with a run."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=5, min_width=320):
            gr.HTML(
                html.heading(
                    "1",
                    "Drop pictures",
                    "One is enough to predict, five to twenty are good to train. They stay on this machine.",
                ),
                padding=False,
            )
            files = gr.File(
                label="Pictures, and captions if there are any", file_count="multiple", height=150, elem_id="sm-files"
            )
            example = gr.Button("No pictures at hand? Draw an example person", size="sm", elem_classes="sm-quiet")
            found_words = gr.HTML(padding=False)
            again = gr.Button("Start over with other pictures", size="sm", elem_classes="sm-quiet", visible=False)
            gr.HTML(html.heading("2", "Name the subject"), padding=False)
            with gr.Row():
                title = gr.Textbox(label="Name", placeholder="Ann", max_length=60, elem_id="sm-title")
                kind = gr.Textbox(label="What it is", value="person", max_length=40, info="The word for it in prompts.")
            gr.HTML(html.heading("3", "Make the adapter"), padding=False)
            base = gr.Dropdown(
                list(PIXELS), value=EMBEDDED, label="Base", allow_custom_value=True,
                info="What draws. To train, also the folder of a diffusers pipeline, or one .safetensors file.",
            )  # fmt: skip
            with gr.Row():
                predict = gr.Button("Predict in a second", variant="primary", elem_id="sm-predict")
                train = gr.Button("Train", variant="secondary", elem_id="sm-train")
            notice = gr.HTML(padding=False)
            gr.HTML(
                '<p class="sm-hint">Predict reads one face as the base draws them, with embedded-wide of any hair and skin colour. '
                "Train learns any subject in some minutes, and is closer.</p>", padding=False,
            )  # fmt: skip
            with gr.Accordion("Training settings", open=False):
                method = gr.Dropdown(
                    [(f"{one.name}: {one.summary}", one.name) for one in known_methods()], value="svfit", label="Method"
                )
                with gr.Row():
                    steps = gr.Number(label="Steps", value=250, precision=0, info="More pictures need more.")
                    word = gr.Textbox(
                        label="Its own word (optional)",
                        placeholder="sks",
                        max_length=40,
                        info="A rare word to call it by.",
                    )
                prompts = gr.Textbox(label="Prompts to preview, one a line", value=PROMPTS, lines=2, max_lines=6)
                start = gr.Dropdown(
                    [("nothing", "")], value="", label="Start from", info="An earlier adapter, to train it further."
                )
                plan = gr.Button("What will it need?", size="sm")
                planned = gr.HTML(padding=False)
        with gr.Column(scale=6, min_width=320):
            blank = gr.HTML(html.empty("Nothing made yet", FIRST), padding=False)
            live = watch(context)
            gallery = gr.Gallery(
                label="Scenes", visible=False, interactive=False, columns=2, height="auto", object_fit="contain", buttons=["download", "fullscreen"],
                elem_classes="sm-gallery",
            )  # fmt: skip
            draw = gr.Button("Draw and download", visible=False, variant="primary", elem_id="sm-open")
    dropped, seen = gr.State([]), gr.State([])  # paths, and what was found of them
    settings = [title, kind, word, method, steps, base, prompts, start]
    result = [notice, blank, gallery, draw, *live.parts]

    def check(paths: list[str], base: str | None) -> dict[Any, Any]:
        found = pictures.look([Path(path) for path in paths], PIXELS.get(base or "", 0))
        return {
            dropped: paths,
            seen: found,
            found_words: html.findings(found),
            again: gr.update(visible=bool(found)),
            notice: "",
        }

    def add(new: list[str] | None, paths: list[str], base: str | None) -> Updates:
        """More pictures beside those that are there; the place to drop them stays free."""
        yield check([*paths, *(path for path in new or () if path not in paths)], base) | {files: None}

    def look_again(paths: list[str], base: str | None) -> Updates:
        yield check(paths, base)

    def start_over() -> Updates:
        yield check([], None)

    def draw_example(base: str | None) -> Updates:
        yield {notice: html.busy("Drawing a person nobody has seen before.")}
        folder = runs.scratch(context.folder)
        drawn = making.example(folder, int(folder.name[:4], 16), base or EMBEDDED)
        yield check([str(path) for path in drawn], base) | {title: gr.update(value="Example")}

    def make_prediction(found: list[pictures.Finding], name: str, base: str | None) -> Updates:
        _check(found, name)
        yield {
            notice: html.busy("Reading the face."),
            blank: "",
            gallery: gr.update(visible=False),
            draw: gr.update(visible=False),
        } | live.show(None)
        run, made = making.predict(context.folder, name, found, (base or EMBEDDED).strip())
        took = (
            f"{run.title} was predicted in {max(made.seconds['prediction'], 0.01):.2f} s and takes {size(run.bytes())}."
        )
        read = " ".join(note.replace(f"{run.pictures}/", "") for note in made.notes)
        done = html.good(f"{took} It is kept under Runs.") + (html.told(read) if read else "")
        yield {notice: done, live.name: run.name, draw: gr.update(visible=True)}
        shown: list[tuple[str, str]] = []
        for prompt in making.scenes(context.bases, run.folder):
            drawn = making.draw(context.bases, run.folder, 1.0, [prompt])
            shown += [(str(path), said) for path, said in drawn]
            yield {gallery: gr.update(value=list(shown), visible=True)}

    def asked(
        name: str,
        kind: str,
        word: str,
        method: str,
        steps: float | None,
        base: str | None,
        prompts: str,
        start: str | None,
    ) -> Wanted:
        lines = tuple(line.strip() for line in prompts.splitlines() if line.strip())
        source = runs.find(context.folder, start).folder if start else None
        if not steps or steps < 1:
            raise ConfigError("Steps are a whole number from 1; 250 are usual.")
        return Wanted(name, kind, word, method, int(steps), base or EMBEDDED, lines, source)

    def start_training(found: list[pictures.Finding], *given: Any) -> Updates:
        _check(found, given[0])
        wanted = asked(*given)
        yield {notice: html.busy("Checking pictures and settings."), blank: ""}
        run = making.train(context.folder, wanted, found)
        words = "It trains on its own: this page may be closed, and finds it again."
        yield {notice: html.note(words), gallery: gr.update(visible=False), draw: gr.update(visible=False)} | live.show(
            run
        )

    def make_plan(*given: Any) -> Updates:
        wanted = asked(*given)
        yield {planned: html.busy("Counting. The first time this takes some seconds.")}
        yield {planned: html.table(making.plan_rows(wanted), "Counted, nothing was tried")}

    def finished(run: Run) -> dict[Any, Any]:
        words = f"{run.title} is ready and takes {size(run.bytes())}."
        return {notice: html.good(words), draw: gr.update(visible=True)}

    def restore() -> Updates:
        """After a reload: the run at work, or the last one."""
        found = [run for run in runs.list_runs(context.folder) if run.kind == "personalize"]
        busy = runs.at_work(context.folder)
        run = busy if busy in found else found[0] if found else None
        starts = {start: chosen(making.trainable(context.folder), "", blank=True)}
        if run is None:
            yield starts
            return
        yield starts | live.show(run) | {blank: "", draw: gr.update(visible=run.finished)}

    def refresh(value: str | None) -> Updates:
        yield {start: chosen(making.trainable(context.folder), value, blank=True)}

    looked = [dropped, seen, found_words, again, notice]
    files.upload(told(notice, add), [files, dropped, base], [*looked, files], **QUIET)
    base.change(told(notice, look_again), [dropped, base], looked, **QUIET)
    again.click(told(notice, start_over), [], looked, **QUIET)
    example.click(told(notice, draw_example), [base], [*looked, title], **QUIET)
    predict.click(told(notice, make_prediction), [seen, title, base], result, **QUIET)
    train.click(told(notice, start_training), [seen, *settings], result, **QUIET)
    plan.click(told(planned, make_plan), settings, [planned], **QUIET)
    live.wire(notice, finished, [gallery, draw])
    open_in_draw(draw, live.name)
    tab.select(told(notice, refresh), [start], [start, notice], **QUIET)
    page.load(told(notice, restore), [], [*result, start], **QUIET)


def _check(found: list[pictures.Finding], name: str) -> None:
    if not found:
        raise ConfigError("Drop pictures first, or draw an example person.")
    if not any(one.used for one in found):
        raise ConfigError("None of the dropped pictures can be used; the list says why of each.")
    if not name.strip():
        raise ConfigError("Give it a name first, such as Ann.")
