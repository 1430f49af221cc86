"""The tab Change: move a predicted person along attributes, or blend two adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from smidgen.errors import ConfigError
from smidgen.serving.page import html, making, runs
from smidgen.serving.page.context import QUIET, Context, Updates, chosen, galleries, told

SCENES = 2  # drawn of each try


def build(context: Context, page: gr.Blocks, tab: gr.Tab) -> None:
    """Lay the tab out."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=4, min_width=320):
            gr.HTML(
                html.heading("", "Edit a person", "Predicted people can be moved along what their pictures show."),
                padding=False,
            )
            source = gr.Dropdown([], label="Person", elem_id="sm-person")
            rows = []
            for number, name in enumerate(("skin=dark", "hair=long", "facial_hair=beard")):
                with gr.Row():
                    what = gr.Dropdown(
                        [(_words(name), name)], value=name, label=f"Attribute {number + 1}", min_width=140
                    )
                    amount = gr.Slider(-1, 2, 0, step=0.05, label="Amount", min_width=140)
                rows += [what, amount]
            edit = gr.Button("Show the edit", variant="primary", elem_id="sm-edit")
            edited = gr.HTML(padding=False)
            gr.HTML(
                html.heading(
                    "", "Blend two", "Any two that draw: the person between two predicted ones, or both at once."
                ),
                padding=False,
            )
            with gr.Row():
                one = gr.Dropdown([], label="First", min_width=140)
                two = gr.Dropdown([], label="Second", min_width=140, elem_id="sm-two")
            share = gr.Slider(0, 1, 0.5, step=0.05, label="How much of the second")
            blend = gr.Button("Show the blend", variant="primary", elem_id="sm-blend")
            blended = gr.HTML(padding=False)
        with gr.Column(scale=7, min_width=320):
            blank = gr.HTML(
                html.empty(
                    "Nothing changed yet", "Choose a person that was predicted under Make, move a slider, and look."
                ),
                padding=False,
            )
            before, after = galleries(1, "Before", "After")
            with gr.Row(visible=False, equal_height=True) as keeping:
                title = gr.Textbox(label="Name", placeholder="Ann, darker skin", max_length=60, scale=3)
                keep = gr.Button("Keep it", scale=1, elem_id="sm-keep")
            kept = gr.HTML(padding=False)
    tried = gr.State(None)  # folder, kind, what it came from

    def show(folders: dict[Any, Path | Mapping[Path, float]], place: Path) -> Updates:
        """The same scenes from the same noise, each adapter's, or mixture's, in its gallery."""
        shown: dict[Any, list[tuple[str, str]]] = {gallery: [] for gallery in folders}
        for prompt in making.scenes(context.bases, place, SCENES):
            for gallery, folder in folders.items():
                drawn = making.draw(context.bases, folder, 1.0, [prompt])
                shown[gallery] += [(str(path), said) for path, said in drawn]
                yield {gallery: gr.update(value=list(shown[gallery]), visible=True)}

    def start(notice: gr.HTML, words: str) -> dict[Any, Any]:
        hidden = {gallery: gr.update(value=[], visible=False) for gallery in (before, after)}
        others = dict.fromkeys((edited, blended, kept, blank), "")
        return others | {notice: html.busy(words), keeping: gr.update(visible=False)} | hidden

    def make_edit(name: str | None, *given: Any) -> Updates:
        run = runs.find(context.folder, name)
        wanted = {
            what: float(amount or 0) for what, amount in zip(given[::2], given[1::2], strict=True) if what and amount
        }
        yield start(edited, "Moving the person.")
        place = making.edit(run, runs.scratch(context.folder), wanted)
        about = ", ".join(f"{what.replace('_', ' ').replace('=', ' ')} {value:g}" for what, value in wanted.items())
        yield {
            tried: (str(place), "edit", f"{run.title}, {about}"),
            before: gr.update(label=run.title),
            after: gr.update(label=about),
        }
        yield from show({before: run.folder, after: place}, place)
        yield {
            edited: html.good("Same scenes, same noise. Keep it if you like it."),
            keeping: gr.update(visible=True),
            title: f"{run.title}, {about}"[:60],
        }

    def make_blend(first: str | None, second: str | None, share: float) -> Updates:
        a, b = runs.find(context.folder, first), runs.find(context.folder, second)
        yield start(blended, "Mixing the two.")
        made = making.blend(a, b, runs.scratch(context.folder), share)
        about = f"{1 - share:.0%} {a.title}, {share:.0%} {b.title}"
        yield {
            tried: (str(made.folder), "blend", about) if made.folder else None,
            before: gr.update(label=a.title),
            after: gr.update(label=about),
        }
        yield from show({before: a.folder, after: made.parts}, made.folder or a.folder)
        ending = "Keep it if you like it." if made.folder else ""
        yield {
            blended: html.good(f"{made.words} Same scenes, same noise. {ending}".strip()),
            keeping: gr.update(visible=bool(made.folder)),
            title: f"{a.title} and {b.title}"[:60],
        }

    def keep_it(found: Any, name: str) -> Updates:
        if not found:
            raise ConfigError("There is nothing to keep yet: try it first.")
        run = making.keep_try(context.folder, Path(found[0]), found[1], name, found[2])
        people, all_that_draw = making.people(context.folder), making.drawable(context.folder)
        parts = {source: people, one: all_that_draw, two: all_that_draw}
        updates = {part: gr.update(choices=[(r.title, r.name) for r in found]) for part, found in parts.items()}
        yield {
            kept: html.good(f"{run.title} is kept. It is under Draw and Runs now."),
            keeping: gr.update(visible=False),
        } | updates

    def refresh(name: str | None, first: str | None, second: str | None) -> Updates:
        people, found = making.people(context.folder), making.drawable(context.folder)
        names = [run.name for run in found]
        second = second if second in names else names[1] if len(names) > 1 else None
        few = "Make one under Make first." if not found else "Make a second one under Make to blend two."
        words = html.note(few) if len(found) < 2 else ""
        yield {
            source: chosen(people, name),
            one: chosen(found, first),
            two: chosen(found, second) | {"value": second},
            blended: words,
        }

    def offer(name: str | None, *values: str | None) -> Updates:
        """The attributes that the chosen person can be moved along; what was chosen stays where there is such a one."""
        known = making.sliders(runs.find(context.folder, name) if name else None)
        named = [(_words(slider), slider) for slider in known]
        yield {
            what: gr.update(choices=named, value=value if value in known else known[0])
            for what, value in zip(rows[::2], values, strict=True)
        }

    outputs = [edited, blended, kept, blank, before, after, keeping, title, tried]
    edit.click(told(edited, make_edit), [source, *rows], outputs, **QUIET)
    blend.click(told(blended, make_blend), [one, two, share], outputs, **QUIET)
    keep.click(told(kept, keep_it), [tried, title], [kept, keeping, source, one, two], **QUIET)
    tab.select(told(blended, refresh), [source, one, two], [source, one, two, blended], **QUIET).then(
        told(edited, offer), [source, *rows[::2]], [edited, *rows[::2]], **QUIET
    )
    source.change(told(edited, offer), [source, *rows[::2]], [edited, *rows[::2]], **QUIET)


def _words(slider: str) -> str:
    """``facial_hair=full beard`` as people say it."""
    return slider.replace("_", " ").replace("=", ": ")
