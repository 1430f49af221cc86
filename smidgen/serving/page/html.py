"""Pieces of the page that Gradio has not: notices, findings, a live status, lists of runs. Plain HTML, everything escaped."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from smidgen.adapters.export import size
from smidgen.serving.page import runs
from smidgen.serving.page.pictures import BAD, GOOD, NOTE, TEXT, Finding, summary
from smidgen.serving.page.runs import Run, Status

KINDS = {
    "personalize": "Trained", "predict": "Predicted", "edit": "Edited", "blend": "Blended", "text-classification": "Text classifier",
    "": "From the command line",
}  # fmt: skip
STATES = {
    runs.STARTING: "Starting", runs.TRAINING: "Training", runs.FINISHING: "Finishing", runs.DONE: "Ready",
    runs.STOPPED: "Stopped", runs.FAILED: "Failed",
}  # fmt: skip
FIELDS = {  # what a flag of the command line is called on the page
    "--class-word": "'What it is'", "--placeholder-token": "'Its own word'", "--placeholder-token sks": "'Its own word'",
    "--instance-prompt": "'What it is'", "--max-train-steps": "'Steps'", "--method": "'Method'", "--base": "'Base'",
    "max_length": "'Longest text, in tokens'", "--learning-rate": "the learning rate", "--out": "name", "--text-column": "'Texts'", "--label-column": "'Labels'",
    "--share": "'How much of the second'", "--set": "the slider", "--from-adapter": "'Start from'",
}  # fmt: skip
_MARKS = {GOOD: "&#10003;", NOTE: "!", BAD: "&#10005;", TEXT: "T"}
_SPOKEN = {GOOD: "Good", NOTE: "Note", BAD: "Left out", TEXT: "Words"}


def good(words: str) -> str:
    return _notice(GOOD, "status", words)


def busy(words: str) -> str:
    """Something is being done."""
    return _notice("busy", "status", words)


def note(words: str) -> str:
    return _notice(NOTE, "status", words)


def told(words: str) -> str:
    """What was seen or read: nothing to heed."""
    return _notice(TEXT, "status", words)


def bad(words: str) -> str:
    """What went wrong and what to do, flags of the command line called as the page calls them."""
    for flag in sorted(FIELDS, key=len, reverse=True):
        words = re.sub(rf"{re.escape(flag)}(?![\w-])", FIELDS[flag], words)
    return _notice(BAD, "alert", words)


def empty(title: str, words: str) -> str:
    """What to do first, where there is nothing yet."""
    return f'<div class="sm-empty"><p class="sm-empty-title">{escape(title)}</p><p>{escape(words)}</p></div>'


def heading(number: str, title: str, words: str = "") -> str:
    """The head of a step."""
    mark = f'<span class="sm-number" aria-hidden="true">{number}</span>' if number else ""
    more = f'<p class="sm-hint">{escape(words)}</p>' if words else ""
    return f'<h2 class="sm-heading">{mark}{escape(title)}</h2>{more}'


def findings(found: Sequence[Finding]) -> str:
    """What was found of the dropped pictures: a sentence about all, then each; what is wrong stands first."""
    if not found:
        return ""
    verdict, words = summary(found)
    order = [BAD, NOTE, GOOD, TEXT]
    rows = sorted(found, key=lambda one: order.index(one.verdict))
    items = "".join(_finding(one) for one in rows)
    return f'{_notice(verdict, "status", words)}<ul class="sm-findings" tabindex="0" aria-label="Pictures">{items}</ul>'


def _finding(one: Finding) -> str:
    image = f'<img src="{one.thumb}" alt="" width="48" height="48">' if one.thumb else '<span class="sm-noimg"></span>'
    return (
        f'<li class="sm-{one.verdict}">{image}<span class="sm-mark" aria-hidden="true">{_MARKS[one.verdict]}</span>'
        f'<span><b>{escape(one.name)}</b><br><span class="sm-said"><span class="sm-hidden">{_SPOKEN[one.verdict]}. </span>'
        f"{escape(one.words)}</span></span></li>"
    )


def status(run: Run, now: Status, began: float = 0.0) -> str:
    """A run as it stands: state, steps, loss, time left."""
    parts = [f'<div class="sm-run-head"><b>{escape(run.title)}</b>{_badge(now.state)}</div>']
    if now.total:
        share = min(1.0, now.step / now.total)
        facts = [f"<dt>Step</dt><dd>{now.step:,} of {now.total:,}</dd>"]
        if now.losses:
            recent = now.losses[-20:]
            facts.append(f"<dt>Loss</dt><dd>{sum(recent) / len(recent):.4f}</dd>")
        if now.state == runs.TRAINING:
            facts.append(f"<dt>Time left</dt><dd>{duration(now.seconds_left)}</dd>")
        elif now.at_work and began:
            facts.append(f"<dt>So far</dt><dd>{duration(time.time() - began)}</dd>")
        parts.append(
            f'<div class="sm-bar" role="progressbar" aria-label="Steps done" aria-valuemin="0" aria-valuemax="100" '
            f'aria-valuenow="{share * 100:.0f}"><span style="width:{share * 100:.1f}%"></span></div>'
            f'<dl class="sm-facts">{"".join(facts)}</dl>'
        )
    if len(now.losses) > 2:
        parts.append(sparkline(now.losses))
    verdict = {runs.DONE: GOOD, runs.FAILED: BAD, runs.STOPPED: NOTE}.get(now.state, "busy")
    parts.append(bad(now.words) if verdict == BAD else _notice(verdict, "status", now.words))
    return f'<div class="sm-card">{"".join(parts)}</div>'


def sheet(path: Path, title: str) -> str:
    """A picture from a run's folder, which opens whole in another tab."""
    url = escape(f"gradio_api/file={quote(str(path))}?at={path.stat().st_mtime_ns}")
    final = path.name == "contact_sheet.png"
    what = (
        "the subject, the base and the adapter, the same noise in each column"
        if final
        else "the adapter as it draws now"
    )
    return (
        f'<figure class="sm-card sm-sheet"><a href="{url}" target="_blank" rel="noopener"><img src="{url}" alt="{escape(title)}: {what}">'
        f"</a><figcaption>{what.capitalize()}</figcaption></figure>"
    )


def sparkline(losses: Sequence[float], width: int = 320, height: int = 48) -> str:
    """The losses as a small line, each point the mean of its neighbours."""
    window = max(1, len(losses) // 30)
    means = [
        sum(losses[max(0, at - window) : at + 1]) / len(losses[max(0, at - window) : at + 1])
        for at in range(len(losses))
    ]
    every = max(1, len(means) // 160)
    shown = means[::every]
    low, high = min(shown), max(shown)
    scale = (height - 6) / (high - low) if high > low else 0.0
    points = " ".join(
        f"{at * width / max(1, len(shown) - 1):.1f},{height - 3 - (value - low) * scale:.1f}"
        for at, value in enumerate(shown)
    )
    label = f"Loss from {means[0]:.3f} to {means[-1]:.3f}"
    return (
        f'<svg class="sm-spark" viewBox="0 0 {width} {height}" role="img" aria-label="{label}" preserveAspectRatio="none">'
        f'<polyline points="{points}" fill="none" vector-effect="non-scaling-stroke"/></svg>'
    )


def run_list(found: Sequence[tuple[Run, Status]]) -> str:
    """The history, the newest first."""
    if not found:
        return empty("No runs yet", "Go to Make, drop a few pictures, and predict or train. Every run is kept here.")
    rows = []
    for run, now in found:
        facts = [KINDS.get(run.kind, run.kind), run.about, when(run.when)]
        facts += [size(run.bytes())] if run.finished else []
        facts += [f"step {now.step:,} of {now.total:,}"] if now.total and now.state != runs.DONE else []
        told = " · ".join(escape(fact) for fact in facts if fact)
        rows.append(
            f'<li><div><b>{escape(run.title)}</b>{_badge(now.state)}</div><span class="sm-said">{told}</span></li>'
        )
    return f'<ul class="sm-runs">{"".join(rows)}</ul>'


def shares(text: str, answers: Sequence[tuple[str, float]]) -> str:
    """What a classifier says of a text: a bar for each label."""
    rows = "".join(
        f'<li><span class="sm-label">{escape(label)}</span><span class="sm-share"><span style="width:{share * 100:.1f}%"></span>'
        f"</span><span>{share:.0%}</span></li>"
        for label, share in answers
    )
    return f'<figure class="sm-card"><figcaption>{escape(text)}</figcaption><ul class="sm-shares">{rows}</ul></figure>'


def counts(found: Mapping[str, int]) -> str:
    """How many texts there are of each label."""
    total = max(1, sum(found.values()))
    ordered = sorted(found.items(), key=lambda pair: -pair[1])[:12]
    return "".join(
        f'<li><span class="sm-label">{escape(label)}</span><span class="sm-share"><span style="width:{count / total * 100:.1f}%">'
        f"</span></span><span>{count:,}</span></li>"
        for label, count in ordered
    )


def table(rows: Sequence[tuple[str, str]], title: str) -> str:
    """Facts in two columns."""
    lines = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows)
    return f'<table class="sm-table"><caption>{escape(title)}</caption><tbody>{lines}</tbody></table>'


def duration(seconds: float | None) -> str:
    """Seconds for people.

    Example:
        >>> duration(42.4), duration(150), duration(5000), duration(None)
        ('42 s', '3 min', '1.4 h', 'a moment')
    """
    if seconds is None:
        return "a moment"
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 - 900 else f"{seconds / 3600:.1f} h"


def when(seconds: float) -> str:
    """A moment as the local clock has it."""
    return time.strftime("%d %b %Y, %H:%M", time.localtime(seconds)) if seconds else ""


def _badge(state: str) -> str:
    return f'<span class="sm-badge sm-{state}">{STATES[state]}</span>'


def _notice(kind: str, role: str, words: str) -> str:
    return f'<div class="sm-notice sm-{kind}" role="{role}">{escape(words)}</div>'
