"""What the base lock says of bases that became something else since an adapter was made.

python -m benchmarks.base_lock       (ten minutes, most of it a full fine-tuning of MiniLM; --tuned FOLDER takes one that is there)

Adapters of svfit, loldu and lora are saved on packaged MiniLM with a classifier's head (which they keep) and held against
it re-cast, quantised, fine-tuned, merged into, rescaled, with noise, and with parts replaced. Written:
benchmarks/results/base_lock.json and the table in docs/verify.md.
"""

from __future__ import annotations

import argparse
import copy
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import smidgen
from benchmarks._harness import between, write_result
from smidgen import testing
from smidgen.bases.transformers import Head, load_classifier
from smidgen.errors import SmidgenError

DOCS = Path(__file__).parent.parent / "docs" / "verify.md"
METHODS = {"svfit": 16, "loldu": 16, "lora": 4}
LABELS = ("negative", "neutral", "positive")  # as many as packaged tweets have
IDS = {"input_ids": torch.arange(1000, 1016)[None]}
STATES = ("same", "cast", "changed", "other", "unlocked")


def minilm() -> Any:
    """Packaged MiniLM with a fresh head."""
    return load_classifier("AutoModelForSequenceClassification", "minilm", Head(LABELS), 0, "no", None).model.eval()


def tuned(folder: Path) -> Any:
    """MiniLM after a full fine-tuning on packaged tweets, trained into ``folder`` unless it is there."""
    from transformers import AutoModelForSequenceClassification

    if not (folder / "model.safetensors").is_file():
        from dataclasses import replace

        from smidgen.tasks.text_classification.recipe import PRESETS, text_classification

        default = PRESETS["default"]
        text_classification(
            replace(
                default,
                data=replace(default.data, path="tweets"),
                adapter=replace(default.adapter, method="full"),
                out=folder,
            ),
            progress=False,
        )
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def quantised(kind: str) -> Any:
    """MiniLM with its linear layers in int8 (torchao, one scale a row) or nf4 (bitsandbytes)."""
    model = minilm()
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model.bert.encoder, Int8WeightOnlyConfig())
        return model
    import bitsandbytes as bnb

    for name, layer in list(model.bert.encoder.named_modules()):
        if isinstance(layer, nn.Linear):
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, quant_type="nf4", compute_dtype=torch.float32
            )
            weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            new.weight, new.bias = weight, layer.bias
            setattr(model.bert.encoder.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], new.to("cpu"))
    return model


@torch.no_grad()
def noise(share: float) -> Any:
    """MiniLM with Gaussian noise of a share of each tensor's norm."""
    model, generator = minilm(), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.add_(share * p.norm() / p.numel() ** 0.5 * torch.randn(p.shape, generator=generator))
    return model


@torch.no_grad()
def scaled(by: float) -> Any:
    """MiniLM, every weight times a number."""
    model = minilm()
    for p in model.parameters():
        p.mul_(by)
    return model


@torch.no_grad()
def replaced(part: str) -> Any:
    """MiniLM with fresh numbers in the tensors whose names hold ``part``."""
    model = minilm()
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if part in name:
            p.copy_(torch.randn(p.shape) * 0.02 if p.dim() > 1 else torch.full_like(p, float("weight" in name)))
    return model


def merged(targets: list[str]) -> Any:
    """MiniLM with a LoRA merged in, as large as a training leaves one (2 % of a weight)."""
    model = minilm()
    testing.perturb(smidgen.adapt(model, "lora", r=8, target_modules=targets))
    smidgen.set_strength(model, 0.05)
    return smidgen.merge(model)


def bases(folder: Path) -> dict[str, Callable[[], Any]]:
    """What is compared, by name."""
    return {
        "as it was": minilm,
        "fp16": lambda: minilm().half(),
        "bf16": lambda: minilm().bfloat16(),
        "int8 (torchao)": lambda: quantised("int8"),
        "nf4 (bitsandbytes)": lambda: quantised("nf4"),
        "fine-tuned (tweets, 500 steps)": lambda: tuned(folder),
        "fine-tuned, then bf16": lambda: tuned(folder).bfloat16(),
        "merged into query, value": lambda: merged(["query", "value"]),
        "merged into key": lambda: merged(["key"]),
        "times 1.02": lambda: scaled(1.02),
        "times 1.5": lambda: scaled(1.5),
        **{f"noise of {share:.0%}": lambda share=share: noise(share) for share in (0.01, 0.02, 0.05, 0.1, 0.2)},
        "another pooler": lambda: replaced("pooler"),
        "another head (the adapter has its own)": lambda: replaced("classifier"),
        "norms at their start": lambda: replaced("LayerNorm"),
        "another model in the same shapes": lambda: replaced(""),
    }


class Said(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main() -> None:
    """Writes benchmarks/results/base_lock.json and the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tuned", type=Path, help="folder of a fine-tuning: the one there, or where it goes")
    figures: dict[str, float] = {}
    rows = [
        "| base | differs: targets | all else | state | svfit | loldu | lora | what load says |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folder = parser.parse_args().tuned or root / "tuned"
        for method, r in METHODS.items():
            model = smidgen.adapt(
                minilm(), method, r=r, target_modules=["query", "value"], modules_to_save=["classifier"]
            )
            smidgen.save(testing.perturb(model), root / method)
        for base, make in bases(folder).items():
            made, verdicts, said = make(), [], ""
            for method in METHODS:
                listener = Said()
                logging.getLogger("smidgen").addHandler(listener)
                try:
                    smidgen.load(copy.deepcopy(made), root / method)
                except SmidgenError as error:
                    listener.lines = [str(error)]
                finally:
                    logging.getLogger("smidgen").removeHandler(listener)
                report = smidgen.verify(copy.deepcopy(made), root / method, IDS)
                verdicts.append(report.verdict)
                key = f"{base}_{method}".replace(" ", "_")
                figures[f"{key}_on"] = int(report.ok)
                if method == "lora":
                    said = " ".join(listener.lines) or "nothing"
                    figures[f"{key}_state"] = STATES.index(report.base)
                    figures[f"{key}_targets"] = round(report.base_difference, 6)
                    figures[f"{key}_rest"] = round(report.base_rest or 0.0, 6)
                    row = [base, f"{report.base_difference:.1e}", f"{report.base_rest or 0:.1e}", report.base]
            rows.append(f"| {' | '.join([*row, *verdicts, said])} |")
    write_result("base_lock", figures, "python -m benchmarks.base_lock")
    between(DOCS, "base_lock", "\n".join(rows))


if __name__ == "__main__":
    main()
