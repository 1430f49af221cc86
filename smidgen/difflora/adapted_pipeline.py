"""A base with an adapter: any adapters of one layout are held in its bank, drawn with and trained.

pipeline = AdaptedPipeline.load("embedded", generator.layout)
images = pipeline.draw(generator.predict([photo]), Scenes(("a portrait of a person",), (0,), steps=20, guidance=2.0))
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import smidgen
from smidgen.adapters.bank import Bank
from smidgen.adapters.methods import Rates
from smidgen.adapters.tuner.injection import remove
from smidgen.bases.families import load_base
from smidgen.bases.pipelines import default_device
from smidgen.bases.protocol import ImageBase
from smidgen.difflora.weightspace.layout import Layout, check_model, layout_of
from smidgen.errors import BaseLockError
from smidgen.tasks.data.images import to_tensor
from smidgen.tasks.diffusion.scenes import Scenes
from smidgen.tasks.diffusion.task import Encoded
from smidgen.training.loop import LoopConfig, Task, train

if TYPE_CHECKING:
    from PIL.Image import Image


class AdaptedPipeline:
    """A base whose denoiser, ``model``, carries one frozen adapter, as it is before training, for banks to share its factors.

    Attributes:
        config: of the adapter, and so of those of the banks.
        layout: what each number of a weight vector is.
    """

    def __init__(self, base: ImageBase, config: smidgen.SmidgenConfig, layout: Layout | None = None) -> None:
        self.base = base
        self.model: nn.Module = base.model
        smidgen.adapt(self.model, replace(config, target_modules=config.target_modules or set(base.targets)))
        self.config: smidgen.SmidgenConfig = base.model.peft_config["default"]
        self.layout = layout or layout_of(self.model, self.config)
        self.model.requires_grad_(False)

    @classmethod
    def load(cls, name: str, adapter: Layout | smidgen.SmidgenConfig, precision: str = "no") -> AdaptedPipeline:
        """The base called ``name`` for adapters of a layout, or of a config.

        Raises:
            BaseLockError: the base is not the one that adapters of the layout sit on.
        """
        base = load_base(name, precision, default_device())
        if not isinstance(adapter, Layout):
            return cls(base, adapter)
        try:
            check_model(adapter, base.model)
        except BaseLockError as error:
            raise BaseLockError(f"The adapters are for another base than {name!r}: {error}") from error
        return cls(base, smidgen.SmidgenConfig(**adapter.config), adapter)

    def bank(self, names: Sequence[str], seeds: Sequence[int] = ()) -> Bank:
        """A bank of untrained adapters that shares the frozen factors of the pipeline's own; each starts as that one, or
        from a seed of its own.

        Raises:
            SmidgenError: what a seed decides is frozen in this config, so adapters of a bank share it.
        """
        bank = Bank(self.model, self.config, names)
        bank.start()
        for name, seed in zip(names, seeds, strict=bool(seeds)):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module="peft")  # a second adapter beside the pipeline's is meant
                smidgen.adapt(self.model, replace(self.config, seed=seed), "start")
                try:
                    bank.put(name, self.model, "start")
                finally:
                    remove(self.model, "start")
                    self.model.requires_grad_(False)
        return bank

    @contextmanager
    def banked(self, layout: Layout | None = None) -> Iterator[Bank]:
        """Within, a bank to hold weight vectors of ``layout``: the pipeline's own, or one of more rank."""
        own = layout is None or layout.config == self.layout.config
        config = self.config if own else smidgen.SmidgenConfig(**layout.config)  # type: ignore[union-attr]
        with Bank(self.model, config, ["row"]) as bank:
            bank.start()
            for parameter in bank.parameters():
                parameter.requires_grad_(False)
            yield bank

    @torch.no_grad()
    def draw(
        self, rows: Tensor, scenes: Scenes, layout: Layout | None = None, with_base: bool = False, batch: int = 8
    ) -> list[list[Image]]:
        """Images [adapter][scene] of the weight vectors ``rows`` [n, size] of ``layout`` (None: the pipeline's own), after
        those of the base alone if asked for; the same noise for all in a scene."""
        layout, count = layout or self.layout, len(scenes.prompts)
        prompts, options = scenes.encoded(self.base)
        owners: list[int | None] = [None] if with_base else []
        pairs = [(owner, scene) for owner in [*owners, *range(len(rows))] for scene in range(count)]
        images: list[Image] = []
        with self.banked(layout) as bank:
            tensors = layout.unpack(rows.to(self.base.device))
            for at in range(0, len(pairs), batch):
                own, shown = zip(*pairs[at : at + batch], strict=True)
                with bank.holding(tensors, own, copies=True) if len(rows) else bank.rows(own):
                    seeds = [scenes.seeds[scene] for scene in shown]
                    latents = self.base.draw_latents(prompts[list(shown)], seeds, batch=batch, **options)
                images += self.base.decode(latents, batch)
        return [images[at : at + count] for at in range(0, len(images), count)]

    def encode(self, images: Sequence[Image], captions: Sequence[str], of: str = "image") -> Encoded:
        """Images of the base's size and their captions as training takes them, the first called "<of> 1"."""
        mean, std = self.base.encode_images(to_tensor(images), batch=16)
        names = tuple(f"{of} {number + 1}" for number in range(len(images)))
        return Encoded(mean, std, self.base.encode_prompts(captions), names)

    def train(
        self, task: Task, bank: Bank, rates: Rates, decay: float, loop: LoopConfig, folder: Path,
        identity: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Trains the bank's adapters with the one loop; goes on from the newest checkpoint in ``folder``."""
        groups: dict[str, dict[str, Any]] = {}
        for slot in bank.slots.values():
            for name, parameter in slot.named_parameters():
                parameter.requires_grad_(True)
                kind = name.partition("_")[0]
                groups.setdefault(kind, {"params": [], "lr": rates.of(kind), "weight_decay": decay})["params"].append(
                    parameter
                )
        identity = {**identity, "layout": self.layout.digest}
        try:
            train(
                task,
                self.model,
                list(groups.values()),
                loop,
                folder,
                resume="latest",
                identity=identity,
                progress=False,
            )
        finally:
            for parameter in bank.parameters():
                parameter.requires_grad_(False)
