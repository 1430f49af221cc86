"""One training run: steps within a budget, an annealed learning rate, EMA, atomic checkpoints, resume.

A batch is drawn from a generator seeded by (seed, step), so a checkpoint needs no random state: weights, averaged
weights and the optimisers' moments in one safetensors file, step and seconds in its metadata. A run counted in steps resumes to
the bit.

Small convolutions gain nothing from a second thread inside one operation, so a batch is cut in `PARTS`, each part's
loss and gradients are computed by its own Python thread (torch releases the interpreter's lock), and the gradients are
averaged in a fixed order: twice the speed on two cores, and still the same bits every time.
"""

import copy
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from torch import Tensor, nn

from smidgen.adapters.atomic import new_file, replace_file
from smidgen.bases.embedded.layers import in_int8
from smidgen.lab.embedded_base.config import Budget
from smidgen.training.quick import multiplies_bf16

log = logging.getLogger(__name__)
PARTS = 2
Loss = Callable[[torch.Generator], Tensor]
"""Randomness of one part of a step -> scalar to minimise over that part of the batch."""


def save_weights(path: Path, module: nn.Module, numbers: dict[str, float], int8: bool = False) -> None:
    """A network in fp16, or its matrices in int8, with what was measured of it as metadata; ``smidgen.bases.embedded.judge.load_weights``
    reads it."""
    tensors = {n: t.half() if t.is_floating_point() else t for n, t in module.state_dict().items()}
    if int8:
        tensors = in_int8(tensors)
    tensors = {n: t.contiguous() for n, t in tensors.items()}
    replace_file(path, save(tensors, {n: repr(v) for n, v in numbers.items()}))


def step_generator(seed: int, step: int, part: int) -> torch.Generator:
    """The randomness of one part of a step, the same whenever and wherever it is made."""
    return torch.Generator().manual_seed(seed * 1_000_000_007 + step * PARTS + part)


def learning_rate(progress: float, warm_up: float = 0.03, floor: float = 0.01) -> float:
    """Share of the peak rate: linear up to `warm_up`, then a half cosine down to `floor` at the end of the budget."""
    if progress < warm_up:
        return max(floor, progress / warm_up)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warm_up) / (1 - warm_up)))


class Muon(torch.optim.Optimizer):
    """Momentum whose update is brought near to an orthogonal matrix (Jordan et al. 2024), with the size that Adam's would have. As
    ``torch.optim.Muon``, which always computes in bf16: where a processor has to emulate it, that is four times as long as the step itself."""

    def __init__(self, matrices: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            inner = torch.bfloat16 if multiplies_bf16(torch.device("cpu")) else torch.float32
            for matrix in group["params"]:
                kept = self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
                kept.lerp_(matrix.grad, 1 - momentum)
                update = orthogonal(matrix.grad.lerp(kept, momentum).to(inner))
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.add_(update.to(matrix.dtype), alpha=-rate * 0.2 * max(matrix.shape) ** 0.5)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """[rows, columns] with singular values near one, by the quintic Newton-Schulz iteration of Muon."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), wide, beta=3.4445)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


class Run:
    """Trains `model` by Adam, and by Muon (Jordan et al. 2024) the matrices that `muon` names; `average` holds the moving average
    of its weights and is what gets exported."""

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        budget: Budget,
        ema: float = 0.999,
        weight_decay: float = 0.0,
        muon: Callable[[str], bool] = lambda name: False,
    ):
        self.path, self.model, self.budget, self.ema = path, model, budget, ema
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = [p for n, p in self.parameters.items() if p.ndim == 2 and muon(n)]
        rest = [p for n, p in self.parameters.items() if p.ndim != 2 or not muon(n)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=budget.lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
        ]
        if matrices:
            self.optimizers.append(Muon(matrices, lr=budget.lr))
        self.average = copy.deepcopy(model).requires_grad_(False)
        self.step, self.seconds = 0, 0.0
        if path.exists():
            self._load()

    @property
    def done(self) -> bool:
        return self.budget.progress(self.step, self.seconds) >= 1

    def train(
        self,
        loss: Loss,
        seed: int,
        report: Callable[[], str] | None = None,
        report_every: float = 180,
        stop: int | None = None,
    ) -> None:
        """Step until the budget is spent (or step `stop`), saving every minute; `report` adds a line to the log."""
        if self.done:
            return
        began = logged = saved = reported = time.monotonic()
        before, losses = self.seconds, []
        self.model.train()
        with ThreadPoolExecutor(PARTS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            while not self.done and self.step != stop:
                losses.append(self._one_step(pool, loss, seed))
                now = time.monotonic()
                self.seconds = before + now - began
                if now - logged > 30 or self.done:
                    self._log(torch.stack(losses).mean().item(), len(losses) / (now - logged))
                    logged, losses = now, []
                if now - saved > 60:
                    self.save()
                    saved = now
                if report and now - reported > report_every:
                    log.info("%s: %s", self.path.stem, report())
                    reported = time.monotonic()
        self.save()

    def _log(self, loss: float, rate: float) -> None:
        log.info("%s step %d, %.0f s, loss %.4f, %.2f steps/s", self.path.stem, self.step, self.seconds, loss, rate)

    def _one_step(self, pool: ThreadPoolExecutor, loss: Loss, seed: int) -> Tensor:
        rate = self.budget.lr * learning_rate(self.budget.progress(self.step, self.seconds))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        parameters = list(self.parameters.values())

        def part(number: int) -> tuple[Tensor, tuple[Tensor, ...]]:
            value = loss(step_generator(seed, self.step, number))
            return value.detach(), torch.autograd.grad(value, parameters)

        parts = list(pool.map(part, range(PARTS)))
        for i, parameter in enumerate(parameters):
            parameter.grad = sum(gradients[i] for _, gradients in parts) / PARTS  # type: ignore[assignment]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self._update_average()
        return torch.stack([value for value, _ in parts]).mean()

    def _update_average(self) -> None:
        decay = min(self.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            ours, theirs = list(self.average.state_dict().values()), list(self.model.state_dict().values())
            floats = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.is_floating_point()]
            torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - decay)

    def save(self) -> None:
        """Write the checkpoint atomically."""
        tensors = {f"model.{n}": t for n, t in self.model.state_dict().items()}
        tensors |= {f"average.{n}": t for n, t in self.average.state_dict().items()}
        for name, parameter in self.parameters.items():
            for key, value in self._state(parameter).items():
                tensors[f"state.{key}.{name}"] = value
        metadata = {"step": str(self.step), "seconds": repr(self.seconds)}
        with new_file(self.path) as beside:
            save_file({n: t.detach().contiguous().clone() for n, t in tensors.items()}, beside, metadata)

    def _load(self) -> None:
        with safe_open(self.path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])
        self.model.load_state_dict(_part(tensors, "model."))
        self.average.load_state_dict(_part(tensors, "average."))
        for key in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
            for name, value in _part(tensors, f"state.{key}.").items():
                self._state(self.parameters[name])[key] = value

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """What its optimiser keeps of a parameter."""
        holds = next(o for o in self.optimizers if any(parameter is p for g in o.param_groups for p in g["params"]))
        return holds.state[parameter]


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
