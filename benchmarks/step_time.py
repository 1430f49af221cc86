"""Training step of one adapted layer, as ratios against the frozen layer and peft's LoRA r=8, in one run.

python -m benchmarks.step_time        (about 25 minutes, one thread; medians of interleaved rounds, processor seconds)
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import peft
import torch
from torch import Tensor, nn

import smidgen
from benchmarks._harness import write_result

WIDTHS, TOKENS = (384, 768, 1280, 2048, 4096), (256, 1024)
MANY, MANY_WIDEST = 32768, 1280


class One(nn.Module):
    """One linear layer under a name that targets can hit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)  # type: ignore[no-any-return]


class NaiveSVFit(nn.Module):
    """The published dense form at full rank: W_e + U diag(s) V^T is formed at every forward, autograd through it."""

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__()
        u, s, vh = torch.linalg.svd(base.weight.detach(), full_matrices=False)
        self.u, self.vh, self.bias = u[:, :r].clone(), vh[:r].clone(), base.bias.detach()
        self.s = nn.Parameter(s[:r].clone())
        self.rest = base.weight.detach() - (self.u * s[:r]) @ self.vh

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.rest + self.u @ torch.diag(self.s) @ self.vh, self.bias)


class NaiveLoLDU(nn.Module):
    """The released parametrisation: a dense permutation, three dense products at every forward."""

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__()
        p, lower, upper = torch.linalg.lu(base.weight.detach())
        d = upper.diagonal().clone()
        self.p, self.lower, self.upper = p, lower[:, :r].clone(), (upper / d[:, None])[:r].clone()
        self.z, self.bias = nn.Parameter(d[:r].clone()), base.bias.detach()
        self.rest = base.weight.detach() - p @ self.lower @ torch.diag(d[:r]) @ self.upper

    def forward(self, x: Tensor) -> Tensor:
        weight = self.rest + self.p @ self.lower @ torch.diag(self.z) @ self.upper
        return nn.functional.linear(x, weight, self.bias)


class NaiveTLoRA(nn.Module):
    """The released forward: T is formed by Kronecker products and W0 T by a dense product, at every step."""

    def __init__(self, base: nn.Linear, modes: tuple[int, ...]) -> None:
        super().__init__()
        self.cores = nn.ParameterList([nn.Parameter(torch.eye(n)) for n in modes])
        self.a = nn.Parameter(torch.randn(4, base.in_features) * 0.02)
        self.b = nn.Parameter(torch.zeros(base.out_features, 4))
        self.weight, self.bias = base.weight.detach(), base.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        t = self.cores[0]
        for core in list(self.cores)[1:]:
            t = torch.kron(t, core)
        return nn.functional.linear(x, self.weight @ t + self.b @ self.a, self.bias)


def _ours(width: int, method: str | None, **options) -> nn.Module:  # type: ignore[no-untyped-def]
    return smidgen.adapt(One(width), smidgen.config(method, target_modules=["proj"], **options))


def contenders(width: int) -> dict[str, Callable[[], nn.Module]]:
    """Name -> module under test, all over layers of the same width."""
    modes = {384: (6, 8, 8), 768: (8, 8, 12), 1280: (8, 10, 16), 2048: (8, 16, 16), 4096: (16, 16, 16)}[width]
    return {
        "frozen": lambda: One(width).requires_grad_(False),
        "peft_lora_r8": lambda: peft.get_peft_model(One(width), peft.LoraConfig(r=8, target_modules=["proj"])),
        "svfit_r16": lambda: _ours(width, "svfit", r=16),
        "svfit_r64": lambda: _ours(width, "svfit", r=64),
        "loldu_r16": lambda: _ours(width, "loldu", r=16),
        "loldu_r64": lambda: _ours(width, "loldu", r=64),
        "svfit_full": lambda: _ours(width, "svfit", r="full"),
        "tlora_1_2": lambda: _ours(width, "tlora"),
        "transform_1": lambda: _ours(width, None, transform="tensor_ring"),
        "loldu_full": lambda: _ours(width, "loldu", r="full"),
        "naive_svfit": lambda: NaiveSVFit(One(width).proj, width),
        "naive_loldu": lambda: NaiveLoLDU(One(width).proj, width),
        "naive_tlora": lambda: NaiveTLoRA(One(width).proj, modes),
    }


def step(module: nn.Module, x: Tensor, grad: Tensor) -> None:
    """Forward and backward; the input needs a gradient, as inside a network."""
    x.grad = None
    module.zero_grad(set_to_none=True)
    module(x).backward(grad)


def times(modules: dict[str, nn.Module], tokens: int, width: int, rounds: int) -> dict[str, float]:
    """Median seconds of a step, all contenders interleaved in every round."""
    x = torch.randn(tokens, width, requires_grad=True)
    grad = torch.randn(tokens, width)
    for module in modules.values():
        step(module, x, grad)
    taken: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(rounds):
        for name, module in modules.items():
            start = time.process_time()
            step(module, x, grad)
            taken[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


def saved_bytes(module: nn.Module, tokens: int, width: int) -> int:
    """Bytes autograd keeps between forward and backward, parameters and buffers of the module not counted."""
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    x = torch.randn(tokens, width, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x).sum()
    return sum(kept.values())


def main() -> None:
    """Runs everything and writes benchmarks/results/step_time.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # two threads on two shared cores measure the neighbours
    figures: dict[str, float] = {}
    for width in WIDTHS:
        modules = {name: make() for name, make in contenders(width).items()}
        for tokens in TOKENS:
            t = times(modules, tokens, width, args.rounds if width <= MANY_WIDEST else max(3, args.rounds // 3))
            for name, seconds in t.items():
                figures[f"w{width}_n{tokens}_{name}_over_frozen"] = round(seconds / t["frozen"], 3)
                figures[f"w{width}_n{tokens}_{name}_over_lora"] = round(seconds / t["peft_lora_r8"], 3)
            pairs = (("svfit_full", "naive_svfit"), ("loldu_full", "naive_loldu"), ("tlora_1_2", "naive_tlora"))
            for ours, naive in pairs:
                figures[f"w{width}_n{tokens}_{naive}_over_{ours}"] = round(t[naive] / t[ours], 3)
            lora = saved_bytes(copy.deepcopy(modules["peft_lora_r8"]), tokens, width)
            for name in ("svfit_r16", "svfit_r64", "loldu_r64", "svfit_full", "tlora_1_2", "transform_1"):
                figures[f"w{width}_n{tokens}_{name}_saved_over_lora"] = round(
                    saved_bytes(modules[name], tokens, width) / lora, 3
                )
        if width > MANY_WIDEST:
            continue
        many = {name: modules[name] for name in ("frozen", "peft_lora_r8", "svfit_full", "loldu_full")}
        t = times(many, MANY, width, max(3, args.rounds // 5))
        for name in many:
            figures[f"w{width}_n{MANY}_{name}_over_frozen"] = round(t[name] / t["frozen"], 3)
    write_result("step_time", figures, "python -m benchmarks.step_time")


if __name__ == "__main__":
    main()
