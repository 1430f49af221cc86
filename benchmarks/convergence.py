"""How fast do LoLDU and SVFit learn beside LoRA? Losses on unseen tweets after so many steps, each method at its best rate.

    make bench NAME=convergence     (ten CPU minutes; resumable, a file a run in work/convergence)

MiniLM on tweets, value and output projections of the last two layers, whose input is computed once; the head starts as a logistic
regression on the frozen features (mean-pooled) and trains with every method at one rate, so that what is compared is the adapter.
A batch is 16 tweets, the rate falls by a cosine after 20 steps. The rate is the one of a grid with the lowest loss after the last step
on validation tweets, on a seed of its own; a grid whose best is at an edge grows there, twice at most. Losses are means over two seeds on test tweets. Numbers: svfit and loldu at full rank train
one sixteenth of LoRA's at r 8, the ratio that SVFit's paper has. Intervals: 95 % bootstrap over tweets, seeds averaged.
"""

import copy
import functools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import smidgen
from benchmarks import extract
from benchmarks._harness import write_result
from smidgen.adapters.atomic import new_file, replace_file
from smidgen.tasks.png import write_figure
from smidgen.training.quick import mixed
from smidgen.training.randomness import examples

ROOT = extract.ROOT
WORK = ROOT / "work" / "convergence"
STEPS, BATCH, SEEDS = 400, 16, 2
SEEN = (25, 50, 100, 200, STEPS)
SIZES = {"train": 6000, "validation": 600, "test": 1000}
SEARCH = 100  # the seed of the search for rates
FROM = 4  # the first layer that is adapted
LENGTH, HEAD_RATE, WARM_UP = 32, 1e-3, 20
TARGETS = ["attention.self.value", "attention.output.dense"]
Change = Callable[[nn.Module], Any]
METHODS: dict[str, tuple[tuple[float, ...], Change]] = {
    "lora": ((1e-3, 3e-3, 1e-2), lambda model: smidgen.adapt(model, "lora", r=8, alpha=8, target_modules=TARGETS)),
    "svfit": ((0.03, 0.1, 0.3), lambda model: smidgen.adapt(model, "svfit", r="full", target_modules=TARGETS)),
    "loldu": ((0.03, 0.1, 0.3), lambda model: smidgen.adapt(model, "loldu", r="full", target_modules=TARGETS)),
    "full": ((3e-5, 1e-4, 3e-4), lambda model: model.requires_grad_(True)),
}


class Tail(nn.Module):
    """The last layers of the encoder, mean pooling and a head."""

    def __init__(self, layers: nn.Module, probe: dict[str, Tensor]) -> None:
        super().__init__()
        self.layers = layers
        self.requires_grad_(False)
        self.head_weight = nn.Parameter(probe["weight"].clone())
        self.head_bias = nn.Parameter(probe["bias"].clone())

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Logits [n, classes] of hidden states [n, tokens, width] and their mask [n, tokens]."""
        with mixed():
            for layer in self.layers:
                found = layer(hidden, attention_mask=(1 - mask[:, None, None, :]) * -1e4)
                hidden = found[0] if isinstance(found, tuple) else found
        return F.linear(pooled(hidden, mask), self.head_weight, self.head_bias)


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are there, in fp32."""
    return (hidden.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@functools.cache
def ready() -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """(the layers that are adapted, what is computed once, the head's start)."""
    prepared = extract._text()
    data = features(prepared.model.eval(), prepared.task)
    return prepared.model.bert.encoder.layer[FROM:], data, probe_of(data)


@torch.no_grad()
def features(model: Any, task: Any) -> dict[str, Tensor]:
    """By split: hidden states below the adapted layers, masks, labels, and pooled features; kept in a file."""
    path = WORK / "features.safetensors"
    if not path.is_file():
        found = {}
        for split, size in SIZES.items():
            data = task.splits[split]
            parts: list[tuple[Tensor, ...]] = []
            for start in range(0, size, 50):
                rows = data.rows[start : min(start + 50, size)]
                padded = task.tokenizer.pad(rows, padding="max_length", max_length=LENGTH, return_tensors="pt")
                padded = {name: padded[name] for name in task.tokenizer.model_input_names if name in padded}
                with mixed():
                    states = model.bert(**padded, output_hidden_states=True).hidden_states
                mask = padded["attention_mask"].float()
                parts.append((states[FROM].float(), mask, pooled(states[-1], mask)))
            hidden, mask, features = (torch.cat(part) for part in zip(*parts, strict=True))
            found |= {f"{split}_hidden": hidden, f"{split}_mask": mask, f"{split}_features": features}
            found[f"{split}_labels"] = data.labels[:size].clone()
        with new_file(path) as beside:
            save_file(found, beside)
    return load_file(path)


def probe_of(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logistic regression on the pooled features of the training tweets, with a little weight decay."""
    x, labels = data["train_features"], data["train_labels"]
    weight = torch.zeros(int(labels.max()) + 1, x.shape[1], requires_grad=True)
    bias = torch.zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), labels) + 1e-3 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return {"weight": weight.detach(), "bias": bias.detach()}


@torch.no_grad()
def losses(model: Tail, data: dict[str, Tensor], split: str) -> tuple[list[float], list[int]]:
    """(loss of each example, 1 where the answer is right)."""
    logits = torch.cat(
        [
            model(hidden, mask)
            for hidden, mask in zip(data[f"{split}_hidden"].split(100), data[f"{split}_mask"].split(100), strict=True)
        ]
    )
    labels = data[f"{split}_labels"]
    return F.cross_entropy(logits, labels, reduction="none").tolist(), (logits.argmax(1) == labels).int().tolist()


def run(method: str, rate: float, seed: int) -> dict[str, Any]:
    """Losses on test tweets by step, or on the seed of the search the last one on validation tweets; kept in a file."""
    path = WORK / f"{method}-{rate:g}-{seed}.json"
    if path.is_file():
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    layers, data, probe = ready()
    model = Tail(copy.deepcopy(layers), probe).eval()
    torch.manual_seed(seed)
    METHODS[method][1](model.layers)
    own = [p for p in model.layers.parameters() if p.requires_grad]
    groups = [{"params": own, "lr": rate}, {"params": [model.head_weight, model.head_bias], "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    )
    found: dict[str, Any] = {"numbers": sum(p.numel() for p in own)}
    for step in range(STEPS):
        picks = examples(seed, step, BATCH, SIZES["train"])
        logits = model(data["train_hidden"][picks], data["train_mask"][picks])
        optimizer.zero_grad()
        F.cross_entropy(logits, data["train_labels"][picks]).backward()
        optimizer.step()
        schedule.step()
        if step + 1 in SEEN and seed != SEARCH:
            found[str(step + 1)] = losses(model, data, "test")
    if seed == SEARCH:
        found["validation"] = float(np.mean(losses(model, data, "validation")[0]))
    replace_file(path, json.dumps(found))
    told = {key: round(float(np.mean(value[0] if key.isdigit() else value)), 4) for key, value in found.items()}
    print(path.name, told, flush=True)
    return found


def best_rate(method: str) -> tuple[float, bool]:
    """(the rate with the lowest loss on validation tweets, whether it is at the edge of its grid all the same)."""
    rates = sorted(METHODS[method][0])
    for grown in range(3):
        best = min(rates, key=lambda rate: float(run(method, rate, SEARCH)["validation"]))
        if best not in (rates[0], rates[-1]) or grown == 2:
            break
        rates = sorted([*rates, float(f"{best / 3:.1g}" if best == rates[0] else f"{best * 3:.1g}")])
    return best, best in (rates[0], rates[-1])


def interval(values: np.ndarray, draws: int = 10_000) -> list[float]:
    """95 % bootstrap interval of the mean."""
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    return [float(q) for q in np.quantile(values[picks].mean(axis=1), (0.025, 0.975))]


def main() -> int:
    torch.set_num_threads(1)
    WORK.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"steps": STEPS, "batch": BATCH, "seeds": SEEDS, "tested": SIZES["test"]}
    curves: dict[str, dict[int, np.ndarray]] = {}
    right: dict[str, np.ndarray] = {}
    _, data, probe = ready()
    start = F.cross_entropy(
        F.linear(data["test_features"], probe["weight"], probe["bias"]), data["test_labels"], reduction="none"
    ).numpy()
    for method in METHODS:
        rate, at_edge = best_rate(method)
        runs = [run(method, rate, seed) for seed in range(SEEDS)]
        curves[method] = {0: start} | {step: np.mean([one[str(step)][0] for one in runs], axis=0) for step in SEEN}
        right[method] = np.mean([one[str(STEPS)][1] for one in runs], axis=0)
        figures |= {f"{method}_rate": rate, f"{method}_numbers": runs[0]["numbers"]}
        figures[f"{method}_at_edge"] = int(at_edge)
        figures |= {f"{method}_loss_at_{step}": float(values.mean()) for step, values in curves[method].items()}
        figures[f"{method}_accuracy"] = float(right[method].mean())
    for method in ("svfit", "loldu"):
        for step in SEEN:
            difference = curves[method][step] - curves["lora"][step]
            figures[f"{method}_less_lora_loss_at_{step}"] = float(difference.mean())
            figures[f"{method}_less_lora_loss_at_{step}_interval"] = interval(difference)
    for method, other in (("svfit", "lora"), ("loldu", "lora"), ("lora", "full")):
        figures[f"{method}_less_{other}_accuracy"] = float((right[method] - right[other]).mean())
        figures[f"{method}_less_{other}_accuracy_interval"] = interval(right[method] - right[other])
    plot(curves, figures)
    print(write_result("convergence", figures, "make bench NAME=convergence"))
    return 0


def plot(curves: dict[str, dict[int, np.ndarray]], figures: dict[str, Any]) -> None:
    """Test loss over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    names = {
        "lora": "LoRA r 8",
        "svfit": "svfit, full",
        "loldu": "loldu, full",
        "full": "all weights of the two layers",
    }
    for method, curve in curves.items():
        label = f"{names[method]}: {figures[f'{method}_numbers']:,}, rate {figures[f'{method}_rate']:g}"
        axes.plot(list(curve), [float(values.mean()) for values in curve.values()], marker="o", label=label)
    axes.set(xlabel="steps of 16 tweets", ylabel=f"loss on {SIZES['test']} test tweets")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    write_figure(figure, ROOT / "docs" / "results" / "convergence.png")


if __name__ == "__main__":
    raise SystemExit(main())
