"""TEMPORARY: the engine's functions by ordinary peft until ``smidgen.adapt`` and its friends land."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import peft
from safetensors.torch import load_file, save_file

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def config(method, **options):
    options = {k: v for k, v in options.items() if v is not None}
    targets = list(options.pop("target_modules", None) or TARGETS)
    return peft.LoraConfig(r=options.get("r", 4), lora_alpha=options.get("alpha", 4), target_modules=targets)


def adapt(model, method_or_config, adapter_name="default", **options):
    made = config(method_or_config, **options) if isinstance(method_or_config, str) else method_or_config
    peft.inject_adapter_in_model(made, model, adapter_name)
    return model


def save(model, path, adapter_name="default"):
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(peft.get_peft_model_state_dict(model, adapter_name=adapter_name), path / "adapter_model.safetensors")
    model.peft_config[adapter_name].save_pretrained(path)


def load(model, path, adapter_name="default"):
    made = peft.PeftConfig.from_pretrained(path)
    peft.inject_adapter_in_model(made, model, adapter_name)
    peft.set_peft_model_state_dict(
        model, load_file(Path(path) / "adapter_model.safetensors"), adapter_name=adapter_name
    )
    return model


def verify(model, path):
    json.loads((Path(path) / "adapter_config.json").read_text())
    return SimpleNamespace(ok=True, reasons=[])


def trained_numbers(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def parameter_groups(model, lr, transform_lr=None, weight_decay=0.0):
    return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr, "weight_decay": weight_decay}]


def set_strength(model, value):
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_scale("default", value)


@contextlib.contextmanager
def disabled(model):
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)
