"""What a library is asked and what it answers: requests, the events on the way, results, and how asking can fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from smidgen.errors import SmidgenError

if TYPE_CHECKING:
    from PIL.Image import Image

    from smidgen.bases.protocol import Size

Model: TypeAlias = str | Mapping[str, float]  # an adapter's or a base's name; or adapters with the weight of each


class UnknownAdapterError(SmidgenError):
    """There is no adapter and no base of this name."""


class BusyError(SmidgenError):
    """The queue is full; the same request may be made again later."""


class ClosedError(SmidgenError):
    """The library is closed, or its worker stopped: nothing is answered any more."""


class FailedError(SmidgenError):
    """Computing failed in a way that nobody foresaw; what failed is its cause."""


class ReplacedError(SmidgenError):
    """An adapter's files were replaced or deleted while the request waited to begin; it may be made again."""


class CancelledRequestError(SmidgenError):
    """A result was asked for, and the request had been cancelled before there was any."""


@dataclass(frozen=True)
class Served:
    """Which version of an adapter answers, at which weight. ``fingerprint`` is that of its files."""

    name: str
    fingerprint: str
    weight: float = 1.0


@dataclass(frozen=True)
class AdapterInfo:
    """What is known of an adapter in the folder without its base.

    Attributes:
        name: its folder within the library's, with slashes.
        fingerprint: 16 letters that follow from its files, and from nothing else.
        task: ``text-to-image``, ``instruction``, ``text-classification`` or ``image-classification``.
        method: as ``--method`` calls it.
        base: the public name of the base it is for.
        bytes: of its numbers in memory, which is what the budget counts; parameters: how many these are, heads included.
        labels: the classes of its head.
        created: when its files were written, in seconds since 1970.
        resident: in memory now; pinned: and never evicted.
    """

    name: str
    fingerprint: str
    task: str
    method: str
    base: str
    bytes: int
    parameters: int
    labels: tuple[str, ...] = ()
    created: float = 0.0
    resident: bool = False
    pinned: bool = False


@dataclass(frozen=True)
class BaseInfo:
    """A base that the library serves.

    Attributes:
        name: what requests call it.
        verbs: what it does without an adapter, of ``generate``, ``embed``, ``draw`` and ``classify``.
        fingerprint: 16 letters that follow from its weights; "" while it is not loaded.
        loaded: whether it is in memory.
    """

    name: str
    verbs: tuple[str, ...]
    fingerprint: str = ""
    loaded: bool = False


# ---- requests --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextRequest:
    """Text to go on from.

    Args:
        model: who answers.
        prompt: a text, gone on from as it stands; or a conversation, ``{"role": ..., "content": ...}`` each, which the
            chat template writes.
        max_tokens: the longest answer; None: as long as the model reads.
        temperature: 0 says the likeliest token; above that, tokens are drawn.
        top_p: drawn from the likeliest tokens that have this share together.
        seed: fixes what is drawn, whoever shares the batch; None takes one by chance, which the result tells.
        stop: texts that end the answer, which does not hold them.
    """

    model: Model
    prompt: str | Sequence[Mapping[str, str]]
    max_tokens: int | None = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageRequest:
    """An image to draw.

    Args:
        model: whose.
        prompt: what it shows; negative_prompt: what guidance leads away from.
        seed: fixes its noise; None takes one by chance, which the result tells.
        steps, guidance: None as the base draws; each image of a batch has its own.
        size: pixels of a side, or (width, height); None as the base was made for.
    """

    model: Model
    prompt: str
    negative_prompt: str = ""
    seed: int | None = 0
    steps: int | None = None
    guidance: float | None = None
    size: Size | None = None


@dataclass(frozen=True)
class ClassifyRequest:
    """A text, a pair of texts, or an image (of Pillow's) to sort by the head of an adapter."""

    model: Model
    given: str | tuple[str, str] | Any


@dataclass(frozen=True)
class EmbedRequest:
    """A text to embed: the mean of the base's last states over its tokens, of length 1."""

    model: Model
    text: str


# ---- events, the last of which is the result -------------------------------------------------------------------------


@dataclass(frozen=True)
class TextPiece:
    """The next letters of an answer. ``tokens`` counts those of the answer so far."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Progress:
    """An image after ``step`` of ``steps``."""

    step: int
    steps: int


@dataclass(frozen=True)
class TextResult:
    """An answer: all its pieces joined.

    ``finish_reason`` is ``stop`` (the model or a stop text ended it), ``length`` or ``cancelled``; ``token_ids`` are what the
    model said, the end included.
    """

    text: str
    finish_reason: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    seed: int
    adapters: tuple[Served, ...]

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class ImageResult:
    """A drawn image and what fixed it."""

    image: Image
    seed: int
    steps: int
    guidance: float
    adapters: tuple[Served, ...]


@dataclass(frozen=True)
class Classification:
    """The likeliest class; or all that hold; or a regression's number. Probabilities and logits are by class."""

    answer: str | tuple[str, ...] | float
    probabilities: Mapping[str, float]
    logits: Mapping[str, float]
    adapters: tuple[Served, ...]
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Embedding:
    """A vector of length 1."""

    vector: tuple[float, ...]
    prompt_tokens: int
    adapters: tuple[Served, ...]


Event: TypeAlias = TextPiece | Progress | TextResult | ImageResult | Classification | Embedding


@dataclass(frozen=True)
class Counters:
    """What a library did and holds, for metrics; ``queued`` to ``resident_bytes`` are of now, the rest since it was opened."""

    queued: int = 0
    active: int = 0
    resident: int = 0
    resident_bytes: int = 0
    requests: Mapping[str, int] = field(default_factory=dict)  # by verb
    tokens: int = 0
    images: int = 0
    steps: int = 0
    loads: int = 0
    evictions: int = 0
