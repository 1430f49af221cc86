"""Scenes to draw, the same with everything that is compared."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from smidgen.bases.protocol import ImageBase, Prompts, Size

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Scenes:
    """What to draw: prompts, the seed of each one's noise, and how they are sampled; ``size`` None is the base's own."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance: float
    size: Size | None = None
    negative: str = ""  # what guidance leads away from

    @property
    def facts(self) -> dict[str, Any]:
        """What a sheet of them says of itself."""
        told = {
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "steps": self.steps,
            "guidance": self.guidance,
        }
        told |= {"negative_prompt": self.negative} if self.negative else {}
        return told | ({"drawn_size": self.size} if self.size else {})

    def encoded(self, base: ImageBase) -> tuple[Prompts, dict[str, Any]]:
        """The prompts, and the options of ``base.draw`` besides prompts and seeds."""
        options = {"steps": self.steps, "guidance": self.guidance, "size": self.size}
        return base.encode_prompts(self.prompts), options | {"negative": base.encode_prompts([self.negative])}

    def drawn_by(self, base: ImageBase) -> "Callable[[], list[Image]]":
        """What draws them whenever it is called; the prompts are encoded now."""
        prompts, options = self.encoded(base)
        return partial(base.draw, prompts, self.seeds, **options)

    def first(self, count: int) -> "Scenes":
        """The first scene of each of the first ``count`` prompts."""
        places = [self.prompts.index(prompt) for prompt in dict.fromkeys(self.prompts)][:count]
        seeds = tuple(self.seeds[at] for at in places)
        return replace(self, prompts=tuple(self.prompts[at] for at in places), seeds=seeds)
