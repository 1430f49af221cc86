"""Hidden states below the lowest trained layer, computed once for each example and then taken from memory.

Training changes nothing there, so every pass would compute the same again. The first blocks of the model are passed over and the
last of them gives the states that are known; all else (masks, positions, later layers) the model does itself, which is
why this works for any model whose blocks hand a tensor to each other.

It is left alone where it would be wrong: inputs that differ each time (random crops), dropout below, something trained below,
blocks that hand on more than one tensor. Whether that is so is not looked up but tried, on a batch, before anything is
taken from memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.tasks.finetune.measuring import Measured, at_rest

CLOSE = 1e-4  # relative difference of a loss with states from memory: sums in another order, not another model
States = dict[tuple[int, str, int], Tensor]  # (blocks passed over, split, example) -> what the last of them gives


@dataclass
class Lower:
    """The first ``depth`` of ``blocks`` and what they give for the examples seen so far, at most ``most`` bytes of it.

    ``states`` may be shared by trainings on one frozen base and one set of data.
    """

    blocks: Sequence[nn.Module]
    depth: int
    most: int
    states: States = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._held = sum(state.nbytes for state in self.states.values())
        self._tuples = False  # whether a block gives a tuple of one tensor

    @contextmanager
    def reading(self, split: str, picks: Sequence[int], lengths: Sequence[int] | None) -> Iterator[None]:
        """Within, the model reads the examples ``picks`` of ``split``: from memory, or they are remembered. ``lengths`` are their tokens
        where they differ; the rest of a row is padding, to the right."""
        known = [state for pick in picks if (state := self.states.get((self.depth, split, pick))) is not None]
        if len(known) == len(picks):
            with self._given(known):
                yield
        elif torch.is_grad_enabled():
            yield
        else:
            with _noticed(self.blocks[self.depth - 1]) as found:
                yield
            self._remember(split, picks, lengths, [_tensor(out) for out in found])

    def _remember(
        self, split: str, picks: Sequence[int], lengths: Sequence[int] | None, found: Sequence[Tensor]
    ) -> None:
        if len(found) != 1 or len(found[0]) != len(picks):
            return
        for row, pick in enumerate(picks):
            state = found[0][row] if lengths is None else found[0][row, : lengths[row]]
            if (self.depth, split, pick) not in self.states and self._held + state.nbytes <= self.most:
                self.states[self.depth, split, pick] = state.detach().cpu().clone()
                self._held += state.nbytes

    @contextmanager
    def _given(self, known: Sequence[Tensor]) -> Iterator[None]:
        """Within, the blocks below are passed over and the last gives ``known``, filled up with zeros."""
        below = self.blocks[: self.depth]

        def passed(*args: Any, **kwargs: Any) -> Any:
            hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            return (hidden,) if self._tuples else hidden

        def given(*args: Any, **kwargs: Any) -> Any:
            hidden = _tensor(passed(*args, **kwargs))
            filled = hidden.new_zeros(hidden.shape, dtype=known[0].dtype)
            for row, state in enumerate(known):
                filled[row, : len(state)] = state.to(hidden.device)
            return (filled,) if self._tuples else filled

        try:
            for block in below:
                block.forward = passed
            below[-1].forward = given
            yield
        finally:
            for block in below:
                block.__dict__.pop("forward", None)

    def holds_for(self, task: Measured, model: nn.Module) -> bool:
        """Whether states from memory give what the model gives, by a batch of ``task``."""
        batch = task.batch(0)  # type: ignore[attr-defined]
        picks = batch.get("picks")
        if picks is None or any("forward" in block.__dict__ for block in self.blocks[: self.depth]):
            return False
        last, alone = self.blocks[self.depth - 1], Lower(self.blocks, self.depth, self.most)
        with at_rest(model) as device, torch.random.fork_rng(devices=[]):
            batch = {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}
            given = []
            for training, seed in ((False, 0), (True, 1), (True, 2)):
                model.train(training)
                torch.manual_seed(seed)
                with _noticed(last) as found:
                    task.loss(model, batch)  # type: ignore[attr-defined]
                given += found
            model.eval()
            if len(given) != 3 or not all(_one_tensor(out) for out in given):
                return False
            self._tuples = alone._tuples = isinstance(given[0], tuple)
            states = [_tensor(out) for out in given]
            if states[0].shape[:1] != (len(picks),) or not all(torch.equal(states[0], other) for other in states[1:]):
                return False  # another batch, or chance below
            task.lower = alone
            try:
                plain, again = (float(task.loss(model, batch)) for _ in range(2))  # type: ignore[attr-defined]
            finally:
                task.lower = None
        return bool(alone.states) and abs(again - plain) <= CLOSE * max(abs(plain), 1e-3)


@contextmanager
def known_below(
    task: Measured, model: nn.Module, megabytes: int, reads: int, states: States | None = None
) -> Iterator[int]:
    """Within, ``task`` takes from memory what stays the same below the lowest trained layer of ``model``; yields how many blocks
    are passed over (0: none).

    Args:
        task: reads the examples.
        model: as it is trained, adapter and all.
        megabytes: of memory at most; 0 takes nothing from memory.
        reads: examples that training will read; where they are fewer than there are, remembering costs more than it saves.
        states: what is known already, of the same base and data; more is added.
    """
    total = len(task.splits["train"])  # type: ignore[attr-defined]
    lower = _find(task, model, megabytes << 20, {} if states is None else states) if megabytes else None
    if lower is None or not lower.holds_for(task, model):
        yield 0
        return
    task.lower = lower
    try:
        if reads >= total and any((lower.depth, "train", pick) not in lower.states for pick in range(total)):
            task.predict(model, "train")
        yield lower.depth
    finally:
        task.lower = None


def _find(task: Measured, model: nn.Module, most: int, states: States) -> Lower | None:
    """The blocks that a forward pass goes through before it comes to anything that is trained; None without any."""
    names = {module: name for name, module in model.named_modules()}
    called: list[nn.Module] = []
    hooks = [module.register_forward_pre_hook(lambda own, _: called.append(own)) for module in names]
    try:
        with at_rest(model) as device:
            batch = task.batch(0)  # type: ignore[attr-defined]
            task.loss(model, {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()})  # type: ignore[attr-defined]
    finally:
        for hook in hooks:
            hook.remove()
    times = {names[module]: at for at, module in reversed(list(enumerate(called)))}
    if "" not in times:  # the loss goes past the model
        return None
    trained = [_called_around(name, times) for name, p in model.named_parameters() if p.requires_grad]
    first = min((times[name] for name in trained), default=len(called))
    lists = [module for module in names if isinstance(module, nn.ModuleList) and len(module) > 1]
    found: Lower | None = None
    for blocks in lists:
        at = [times.get(names[block], -1) for block in blocks]
        if -1 in at or at != sorted(at) or any(called.count(block) != 1 for block in blocks):
            continue
        depth = sum(start < first for start in at)
        if depth > 0 and at[depth - 1] < first and any(_inside(name, names[blocks[depth - 1]]) for name in trained):
            depth -= 1
        if depth and (found is None or len(blocks) > len(found.blocks)):
            found = Lower(list(blocks), depth, most, states)
    return found


def _called_around(name: str, times: Mapping[str, int]) -> str:
    """The innermost module around a parameter that is called."""
    while name and name not in times:
        name = name.rpartition(".")[0]
    return name


def _inside(name: str, outer: str) -> bool:
    return name == outer or name.startswith(f"{outer}.")


@contextmanager
def _noticed(block: nn.Module) -> Iterator[list[Any]]:
    """Within, what ``block`` gives."""
    found: list[Any] = []
    hook = block.register_forward_hook(lambda _, __, out: found.append(out))
    try:
        yield found
    finally:
        hook.remove()


def _one_tensor(out: Any) -> bool:
    return isinstance(out, Tensor) or (isinstance(out, tuple) and len(out) == 1 and isinstance(out[0], Tensor))


def _tensor(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]
