"""What the tabs share: where runs lie, the models in memory, errors in words, and the watch on a run."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from smidgen.errors import SmidgenError
from smidgen.serving.page import html, runs
from smidgen.serving.page.making import Bases
from smidgen.serving.page.runs import Run
from smidgen.serving.page.texts import Classifiers

logger = logging.getLogger(__name__)
Updates = Iterator[dict[Any, Any]]
QUIET: dict[str, Any] = {
    "show_progress": "hidden",
    "api_visibility": "private",
}  # of every event: the page says itself what it does
TICK = 1.5  # seconds between two looks at a run


@dataclass(frozen=True)
class Context:
    """One page: its folder of runs, and the models it keeps in memory, shared by all who look at it."""

    folder: Path
    bases: Bases = field(default_factory=Bases)
    classifiers: Classifiers = field(default_factory=Classifiers)


def galleries(columns: int, *labels: str) -> list[gr.Gallery]:
    """Pictures beside pictures, hidden until there are some."""
    options: dict[str, Any] = {
        "visible": False, "interactive": False, "columns": columns, "height": "auto", "object_fit": "contain",
        "buttons": ["download", "fullscreen"], "elem_classes": "sm-gallery",
    }  # fmt: skip
    with gr.Row():
        return [gr.Gallery(label=label, **options) for label in labels]


def told(notice: gr.HTML, handler: Callable[..., Updates]) -> Callable[..., Updates]:
    """``handler`` with errors as words in ``notice``: what is wrong and what to do."""

    @functools.wraps(handler)
    def run(*given: Any) -> Updates:
        try:
            yield from handler(*given)
        except SmidgenError as error:
            yield {notice: html.bad(str(error))}
        except Exception as error:
            logger.exception("The page's %s failed.", handler.__name__)
            memory = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
            yield {
                notice: html.bad(
                    "The memory is full. Draw fewer pictures at once, or close other programs."
                    if memory
                    else f"A fault of Smidgen's own ({type(error).__name__}: {str(error)[:200]}). The terminal that runs the page has "
                    "the details; please report them."
                )
            }

    return run


@dataclass(frozen=True)
class Watch:
    """A run that is looked at while it is at work: status, preview, and what can be done with it."""

    context: Context
    name: gr.State
    status: gr.HTML
    preview: gr.HTML
    stop: gr.Button
    resume: gr.Button
    timer: gr.Timer
    seen: gr.State

    @property
    def parts(self) -> list[Any]:
        return [self.name, self.status, self.preview, self.stop, self.resume, self.timer, self.seen]

    def show(self, run: Run | None) -> dict[Any, Any]:
        """Everything about a run; nothing where there is none."""
        if run is None:
            return {
                self.name: None, self.status: "", self.preview: "",
                self.stop: gr.update(visible=False), self.resume: gr.update(visible=False), self.timer: gr.Timer(active=False),
                self.seen: None,
            }  # fmt: skip
        now = run.status()
        shown = html.status(run, now, runs.began(run.folder))
        going = now.state in (runs.STOPPED, runs.FAILED) and run.kind in runs.COMMANDS
        picture = html.sheet(now.preview, run.title) if now.preview else ""
        return {
            self.name: run.name, self.status: shown,
            self.preview: picture,
            self.stop: gr.update(visible=now.at_work, interactive=True), self.resume: gr.update(visible=going),
            self.timer: gr.Timer(active=now.at_work), self.seen: (shown, picture, now.state),
        }  # fmt: skip

    def look(self, name: str | None, seen: Any) -> dict[Any, Any]:
        """What has changed of a run since it was ``seen``."""
        run = runs.read_run(self.context.folder / name) if name else None
        found = self.show(run)
        new = found[self.seen]
        if seen and new:
            if new[0] == seen[0]:
                found.pop(self.status)
            if new[1] == seen[1]:
                found.pop(self.preview)
            if new[2] == seen[2]:
                for part in (self.stop, self.resume, self.timer):
                    found.pop(part)
        return found

    def wire(self, notice: gr.HTML, finished: Callable[[Run], dict[Any, Any]], outputs: list[Any]) -> None:
        """Look at each tick, stop and resume on request; ``finished`` says what else changes when it has ended well."""

        def tick(name: str | None, seen: Any) -> Updates:
            found = self.look(name, seen)
            run = runs.read_run(self.context.folder / name) if name else None
            if run is not None and seen and seen[2] != found[self.seen][2]:
                found |= {notice: ""} | (finished(run) if found[self.seen][2] == runs.DONE else {})
            yield found

        def stop(name: str | None) -> Updates:
            runs.find(self.context.folder, name).stop()
            yield {
                notice: html.busy("Stopping. The step at work is finished and kept first."),
                self.stop: gr.update(interactive=False),
            }

        def resume(name: str | None) -> Updates:
            run = runs.find(self.context.folder, name)
            run.resume(self.context.folder)
            yield {notice: ""} | self.show(run)

        both = [notice, *self.parts, *outputs]
        self.timer.tick(told(notice, tick), [self.name, self.seen], both, concurrency_limit=None, **QUIET)
        self.stop.click(told(notice, stop), [self.name], both, **QUIET)
        self.resume.click(told(notice, resume), [self.name], both, **QUIET)


def watch(context: Context) -> Watch:
    """The components of a watch, laid out where it is called."""
    name, seen, timer = gr.State(None), gr.State(None), gr.Timer(TICK, active=False)
    status = gr.HTML(padding=False)
    with gr.Row():
        stop = gr.Button("Stop", visible=False, size="sm")
        resume = gr.Button("Resume", visible=False, size="sm", variant="primary")
    preview = gr.HTML(padding=False)
    return Watch(context, name, status, preview, stop, resume, timer, seen)


def choices(found: list[Run]) -> list[tuple[str, str]]:
    """Runs as a dropdown has them: what is shown, and the name; titles that two runs share carry their folder's name."""
    titles = [run.title for run in found]
    return [(run.title if titles.count(run.title) == 1 else f"{run.title} ({run.name})", run.name) for run in found]


def chosen(found: list[Run], value: str | None, blank: bool = False) -> Any:
    """A dropdown's update: all of ``found``, the value kept where it is still there, else the first (``blank``: none)."""
    known = [run.name for run in found]
    kept = value if value in known else None if blank or not known else known[0]
    return gr.update(
        choices=([("none", "")] if blank else []) + choices(found), value=kept if kept else ("" if blank else None)
    )
