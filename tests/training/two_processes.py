"""What test_two_processes.py runs under ``accelerate launch``; the same functions make its one-process references."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import smidgen
from smidgen.adapters.atomic import replace_file
from smidgen.bases.pipelines import default_device
from smidgen.errors import TrainingError
from smidgen.training.loop import LoopConfig, train
from smidgen.training.processes import is_main
from smidgen.training.randomness import examples, stream
from tests.training import toys

CONFIG = LoopConfig(
    max_train_steps=40, lr_warmup_steps=2, lr_scheduler="constant", checkpointing_steps=4, eval_steps=3,
    early_stopping_patience=3, max_grad_norm=1.0,
)  # fmt: skip
METHODS = ("svfit", "tlora", "peft lora")


class Masked(toys.Judged):
    """Rows of which a random number counts; the loss is the mean over those, which the batch's weight says."""

    def __init__(self, size: int, on_batch=None, poison: frozenset[int] = frozenset()):
        super().__init__(on_batch=on_batch)
        self.size, self.poison = size, poison

    def batch(self, index):
        if self.on_batch:
            self.on_batch(index)
        rows = examples(0, index, self.size, 37)
        x = torch.stack([torch.randn(5, 2, generator=stream(0, "row", row)) for row in rows])
        counts = torch.tensor([1 + row % 5 for row in rows])
        mask = (torch.arange(5) < counts[:, None]).float()
        x = x * float("nan") if index in self.poison else x
        return {"x": x, "y": 3 * x, "mask": mask, "weight": float(mask.sum()), "names": [f"row {row}" for row in rows]}

    def loss(self, model, batch):
        errors = (model(batch["x"]) - batch["y"]).square().mean(dim=-1)
        return (errors * batch["mask"]).sum() / batch["mask"].sum()


class Words(Masked):
    """Random words for a BERT, to be told apart by their first one; the attention mask says how many count."""

    def batch(self, index):
        rows = examples(0, index, self.size, 37)
        ids = torch.stack([torch.randint(5, 60, (6,), generator=stream(0, "words", row)) for row in rows])
        mask = (torch.arange(6) < torch.tensor([2 + row % 5 for row in rows])[:, None]).long()
        return {"ids": ids, "mask": mask}

    def loss(self, model, batch):
        scores = model(input_ids=batch["ids"], attention_mask=batch["mask"]).logits
        return nn.functional.cross_entropy(scores, batch["ids"][:, 0] % 3)


def fit(folder, task, config=CONFIG, **options):
    """A trained toy and its result; ``options`` go to ``train``."""
    module = toys.model()
    groups = toys.groups(module, lr=0.05)
    return module, train(task, module, groups, config, Path(folder), progress=False, **options)


def outcome(module, result) -> dict:
    return {
        "numbers": toys.bits(module).hex(), "losses": result.losses, "evaluations": result.evaluations,
        "best_step": result.best_step, "steps": result.steps,
    }  # fmt: skip


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(3)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **small, **quiet))


def adapted(method: str) -> nn.Module:
    """A tiny BERT with a fresh adapter."""
    from peft import LoraConfig, inject_adapter_in_model

    model, targets = bert(), ["query", "value", "intermediate.dense"]
    torch.manual_seed(4)
    if method == "peft lora":
        return inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), model)
    return smidgen.adapt(model, smidgen.config(method, target_modules=targets))


def fit_adapter(folder, method: str, size: int) -> dict[str, torch.Tensor]:
    """The trained numbers of an adapter after a few steps on batches of ``size``."""
    model = adapted(method)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    config = LoopConfig(max_train_steps=4, lr_warmup_steps=0, lr_scheduler="constant")
    groups = [{"params": list(trained.values()), "lr": 0.01}]
    train(Words(size), model, groups, config, Path(folder) / method, progress=False)
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


def gradients(method: str, wrap, index: int, size: int) -> dict[str, torch.Tensor]:
    """Gradients of batch ``index`` for an adapted BERT that went through ``wrap``, as a loop of one's own would."""
    model = adapted(method)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    ready, task = wrap(model), Words(size)
    task.loss(ready, task.batch(index)).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def sharded(model: nn.Module) -> nn.Module:
    """``model`` with every parameter sharded over the processes by torch's FSDP2."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _refused(work) -> dict:
    try:
        work()
    except TrainingError as error:
        return {"kind": type(error).__name__, "text": str(error)}
    return {}


def main(folder: Path) -> None:
    from accelerate import Accelerator

    default_device()  # as every recipe asks first
    accelerator = Accelerator()
    rank, found = accelerator.process_index, {"processes": accelerator.num_processes}
    found["whole"] = outcome(*fit(folder / "whole", Masked(4)))
    doubled = replace(CONFIG, gradient_accumulation_steps=2, max_train_steps=6, early_stopping_patience=0)
    found["accumulated"] = outcome(*fit(folder / "accumulated", Masked(2), doubled))

    def stop(index: int) -> None:
        if index == 2 * 9 + 1:  # drawn by the second process alone
            os.kill(os.getpid(), signal.SIGTERM)

    found["stopped"] = _refused(lambda: fit(folder / "cut", Masked(4, stop)))
    found["gone_on"] = outcome(*fit(folder / "cut", Masked(4), resume="latest"))
    found["poisoned"] = _refused(lambda: fit(folder / "bad", Masked(4, poison=frozenset({2 * 5 + 1}))))
    for method in METHODS:
        numbers = fit_adapter(folder, method, 4)
        for kind, wrap in (("ddp", accelerator.prepare_model), ("fsdp", sharded)):
            numbers |= {f"{kind}.{name}": grad for name, grad in gradients(method, wrap, rank, 4).items()}
        if is_main():
            save_file(numbers, folder / f"{method}.safetensors")
    replace_file(folder / f"found-{rank}.json", json.dumps(found))


def kill(folder: Path, index: int) -> None:
    """Train until batch ``index`` is drawn, then die."""

    def die(drawn: int) -> None:
        if drawn == index:
            os.kill(os.getpid(), signal.SIGKILL)

    fit(folder / "killed", Masked(4, die))


def go_on(folder: Path) -> None:
    found = outcome(*fit(folder / "killed", Masked(4), resume="latest"))
    if is_main():
        replace_file(folder / "found-0.json", json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *words = sys.argv[1:]
    if words[:1] == ["kill"]:
        kill(Path(folder), int(words[1]))
    elif words[:1] == ["resume"]:
        go_on(Path(folder))
    else:
        main(Path(folder))
