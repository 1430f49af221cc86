"""Images step by step in one batch, each with its own adapters, guidance and steps, which may join at any time.

Each image is drawn by the base's own pipeline, scheduler and all, in a thread of its own; what they share are the calls of the
denoiser. A call waits until every image in the batch has one; then those that fit together are one call, in which each row
wears its image's adapters. So nothing of a family is written a second time, and all families are served.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from smidgen.bases.protocol import ImageBase, Prompts, sides
from smidgen.errors import ConfigError, SmidgenError
from smidgen.serving.jobs import Job
from smidgen.serving.requests import CancelledRequestError, ImageResult, Progress
from smidgen.serving.residents import Residents

PROMPTS = 256  # encoded ones that are kept


class ImageBatch:
    """The images that a base is drawing.

    Args:
        base: its denoiser carries the adapters of ``residents``.
    """

    def __init__(self, base: ImageBase, residents: Residents) -> None:
        self._base, self._residents = base, residents
        self._drawings: list[Drawing] = []
        self._changed = threading.Condition()
        self._prompts: OrderedDict[str, Prompts] = OrderedDict()
        self.steps = self.images = 0

    @property
    def active(self) -> int:
        return len(self._drawings)

    def pause(self) -> None:
        """Nothing is open between steps."""

    def abandon(self, error: BaseException) -> None:
        drawings, self._drawings = self._drawings, []
        for drawing in drawings:
            drawing.job.fail(error)
            drawing.answer(error=error)

    def admit(self, jobs: Sequence[Job]) -> None:
        fitting = [job for job in jobs if self._fits(job)]
        self._encode([text for job in fitting for text in (job.request.prompt, job.request.negative_prompt)])
        for job in fitting:
            drawing = Drawing(job, self._base, self._changed)
            self._drawings.append(drawing)
            drawing.start(self._prompts[job.request.prompt], self._prompts[job.request.negative_prompt])

    def _fits(self, job: Job) -> bool:
        try:
            check_size(self._base, job.request.size)
        except ConfigError as error:
            job.fail(error)
            return False
        return True

    def _encode(self, texts: Sequence[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self._prompts]
        for text, prompts in zip(new, (self._base.encode_prompts([text]) for text in new), strict=True):
            self._prompts[text] = prompts
        for text in texts:
            self._prompts.move_to_end(text)
        while len(self._prompts) > max(PROMPTS, len(texts)):
            self._prompts.popitem(last=False)

    @torch.no_grad()
    def step(self) -> None:
        with self._changed:
            while any(drawing.running for drawing in self._drawings):
                self._changed.wait()
        self._send_off()
        groups: dict[Any, list[Drawing]] = {}
        for drawing in self._drawings:
            if drawing.job.handle.cancelled:
                drawing.answer(error=CancelledRequestError("The request was cancelled."))
            else:
                groups.setdefault(drawing.call.form, []).append(drawing)
        for group in groups.values():
            self._run(group)
        self.steps += bool(groups)

    def _run(self, drawings: list[Drawing]) -> None:
        """One call of the denoiser for all."""
        calls = [drawing.call for drawing in drawings]
        if not alike(calls):
            for drawing in drawings:
                self._run([drawing])
            return
        args, kwargs = merged(calls)
        rows = [drawing.job.row for drawing in drawings for _ in range(drawing.call.rows)]
        with self._residents.rows(rows):
            out = self._base.model(*args, **kwargs)
        sizes = [call.rows for call in calls]
        for drawing, own in zip(drawings, split(out, sizes), strict=True):
            drawing.answer(own)

    def _send_off(self) -> None:
        """Images whose latents are there are decoded and given; those that failed have said so."""
        done = [drawing for drawing in self._drawings if drawing.done]
        self._drawings = [drawing for drawing in self._drawings if not drawing.done]
        drawn: dict[Any, list[Drawing]] = {}
        for drawing in done:
            if isinstance(drawing.error, CancelledRequestError):
                drawing.job.end_cancelled()
            elif drawing.error is not None:
                drawing.job.fail(drawing.error)
            else:
                assert drawing.latents is not None
                drawn.setdefault(drawing.latents.shape, []).append(drawing)
        for group in drawn.values():
            images = self._base.decode(torch.cat([drawing.latents for drawing in group]))  # type: ignore[misc]
            self.images += len(images)
            for drawing, image in zip(group, images, strict=True):
                job, options = drawing.job, drawing.options
                result = ImageResult(image, job.prepared, options["steps"], options["guidance"], job.handle.adapters)
                job.finish(result)


class Call:
    """A call of the denoiser by one image's pipeline: ``rows`` of its inputs are the image's; ``form`` is what calls that can
    be one have in common."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.rows = next(
            len(value)
            for value in (*args, *kwargs.values())
            if (isinstance(value, Tensor) and value.dim() > 1) or (isinstance(value, list) and value)
        )
        self.form = (_form(args, self.rows), _form(kwargs, self.rows))


class Drawing:
    """One image on its way: its pipeline runs in a thread until it calls the denoiser, and waits there for the answer."""

    def __init__(self, job: Job, base: ImageBase, changed: threading.Condition) -> None:
        self.job, self._base, self._changed = job, base, changed
        asked = job.request
        self.options: dict[str, Any] = base.sampling.chosen(asked.steps, asked.guidance)
        self.latents: Tensor | None = None
        self.error: BaseException | None = None
        self.done = False
        self._call: Call | None = None
        self._answer: Any = None
        self._failure: BaseException | None = None

    @property
    def running(self) -> bool:
        """Whether its own thread is at work, and neither waits nor is at its end."""
        return self._call is None and not self.done

    @property
    def call(self) -> Call:
        assert self._call is not None
        return self._call

    def start(self, prompts: Prompts, negative: Prompts) -> None:
        threading.Thread(target=self._draw, args=(prompts, negative), name="smidgen-image", daemon=True).start()

    def answer(self, out: Any = None, error: BaseException | None = None) -> None:
        """What the denoiser said; the thread goes on."""
        with self._changed:
            self._answer, self._failure, self._call = out, error, None
            self._changed.notify_all()

    def _ask(self, *args: Any, **kwargs: Any) -> Any:
        """What the pipeline calls in place of the denoiser."""
        call = Call(args, kwargs)
        with self._changed:
            self._call = call
            self._changed.notify_all()
            while self._call is call:
                self._changed.wait()
            if self._failure is not None:
                raise self._failure
            return self._answer

    def _draw(self, prompts: Prompts, negative: Prompts) -> None:
        try:
            asked = self.job.request
            own = with_own_pipeline(self._base, self._ask, self._stepped)
            self.latents = own.draw_latents(
                prompts, [self.job.prepared], negative=negative, size=asked.size, batch=1, **self.options
            )
        except BaseException as error:
            self.error = error
        with self._changed:
            self.done = True
            self._changed.notify_all()

    def _stepped(self, step: int, steps: int) -> None:
        self.job.handle.put(Progress(step, steps))


class Stand:
    """In a pipeline in place of the denoiser: everything of it but that its calls go to ``ask``."""

    def __init__(self, denoiser: Any, ask: Callable[..., Any]) -> None:
        self._denoiser, self._ask = denoiser, ask

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """diffusers names calls for caches between steps, which nothing here has."""
        yield


def with_own_pipeline(base: Any, ask: Callable[..., Any], stepped: Callable[[int, int], None]) -> Any:
    """A base that draws as ``base`` does, with a pipeline and a scheduler of its own, whose denoiser is ``ask``; each step of the
    scheduler is told to ``stepped``."""
    own, pipe, scheduler = copy.copy(base), copy.copy(base.pipe), copy.deepcopy(base.pipe.scheduler)
    count = 0

    @wraps(scheduler.step)
    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        out = type(scheduler).step(scheduler, *args, **kwargs)
        count += 1
        stepped(count, len(scheduler.timesteps))
        return out

    vars(scheduler)["step"] = step
    vars(pipe).update({base.component: Stand(base.model, ask), "scheduler": scheduler})  # its own setter writes configs
    own.pipe = pipe
    return own


def check_size(base: ImageBase, size: Any) -> None:
    """Refuses a size that a base cannot draw.

    Raises:
        ConfigError: with what would do.
    """
    if size is None:
        return
    for side in sides(size):
        if side % base.step or not 0 < side <= base.largest:
            near = min(base.largest, max(base.step, round(side / base.step) * base.step))
            raise ConfigError(
                f"{base.name} draws sides that are multiples of {base.step}, up to {base.largest} pixels; not {side}. {near}?"
            )


# ---- calls that are one ----------------------------------------------------------------------------------------------


def _form(value: Any, rows: int) -> Any:
    """What of a value must be the same in calls that are one."""
    if isinstance(value, Tensor):
        along = value.dim() > 0 and value.shape[0] in (1, rows)
        return "tensor", value.dtype, value.dim(), tuple(value.shape[along:])
    if isinstance(value, dict):
        return tuple((name, _form(own, rows)) for name, own in sorted(value.items()))
    if isinstance(value, tuple):
        return tuple(_form(own, rows) for own in value)
    if isinstance(value, list) and len(value) == rows:
        return "list"
    return repr(value)


def alike(calls: Sequence[Call]) -> bool:
    """Whether what calls of one form have beside their rows is the same too."""
    return all(
        _beside(call.args, call.rows, other.args, other.rows)
        and _beside(call.kwargs, call.rows, other.kwargs, other.rows)
        for call, other in pairwise(calls)
    )


def _beside(one: Any, rows: int, other: Any, others: int) -> bool:
    if isinstance(one, dict):
        return all(_beside(one[name], rows, other[name], others) for name in one)
    if isinstance(one, tuple):
        return all(_beside(a, rows, b, others) for a, b in zip(one, other, strict=True))
    if isinstance(one, Tensor) and one.dim() and one.shape[0] not in (1, rows):
        return torch.equal(one, other)
    return True


def merged(calls: Sequence[Call]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of one call with the rows of all.

    Example:
        >>> two = [Call((torch.zeros(2, 3), torch.tensor(5)), {}), Call((torch.ones(1, 3), torch.tensor(7)), {})]
        >>> merged(two)[0][1].tolist()
        [5, 5, 7]
    """
    sizes = [call.rows for call in calls]
    args = tuple(_merged(values, sizes) for values in zip(*(call.args for call in calls), strict=True))
    return args, {name: _merged([call.kwargs[name] for call in calls], sizes) for name in calls[0].kwargs}


def _merged(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    first, alone = values[0], len(values) == 1
    if isinstance(first, Tensor):
        if alone or (first.dim() and first.shape[0] not in (1, sizes[0])):
            return first
        return torch.cat([_rows(value, size) for value, size in zip(values, sizes, strict=True)])
    if isinstance(first, dict):
        return {name: _merged([value[name] for value in values], sizes) for name in first}
    if isinstance(first, tuple):
        return tuple(_merged(own, sizes) for own in zip(*values, strict=True))
    if isinstance(first, list) and len(first) == sizes[0]:
        return [one for value in values for one in value]
    return first


def _rows(value: Tensor, size: int) -> Tensor:
    """One value for all rows as one of each."""
    return value.expand(size, *value.shape[1:] if value.dim() else ())


def split(out: Any, sizes: Sequence[int]) -> list[Any]:
    """What a call gave, by the calls that it is made of."""
    if isinstance(out, Tensor) and len(out) == sum(sizes):
        return list(out.split(list(sizes)))
    if isinstance(out, list) and len(out) == sum(sizes):
        ends = [sum(sizes[: at + 1]) for at in range(len(sizes))]
        return [out[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    if isinstance(out, tuple):
        return [tuple(own) for own in zip(*(split(part, sizes) for part in out), strict=True)]
    if isinstance(out, dict):
        parts = {name: split(part, sizes) for name, part in out.items()}
        return [type(out)(**{name: part[at] for name, part in parts.items()}) for at in range(len(sizes))]
    raise SmidgenError(f"The denoiser gave a {type(out).__name__}, whose rows are not known.")
