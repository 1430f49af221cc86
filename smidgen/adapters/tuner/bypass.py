"""Layers whose weight their owner reads without calling them: an adapter there would train nothing or answer nothing.

:func:`bypassed` knows the owners of torch, transformers and diffusers that do so; what it does not know, a forward pass
of :func:`smidgen.verify` finds. torch's own encoder layer calls its layers in training and reads their weights in
evaluation: :func:`follow` keeps an adapted one on the path that calls them.
"""

from __future__ import annotations

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

# Owner's class in transformers or diffusers -> its layers whose weight it multiplies by hand, always or on one path.
READ = {
    "MambaMixer": ("dt_proj",),
    "FalconMambaMixer": ("dt_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "TDNNLayer": ("kernel",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "DetrMHAttentionMap": ("k_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "HunyuanDiTAttentionPool": ("q_proj", "k_proj", "v_proj", "c_proj"),
}
_LIBRARIES = ("transformers.", "diffusers.")
# The layer that holds several projections in one -> those it stands for.
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
_FAST_PATH = "_smidgen_fast_path"  # what was set aside while an encoder carries adapters


def bypassed(model: nn.Module, name: str) -> str | None:
    """Why the layer ``name`` of a model is not called in a forward pass and what to adapt instead; None if unknown."""
    parent, _, last = name.rpartition(".")
    owner = (model.get_base_model() if isinstance(model, PeftModel) else model).get_submodule(parent)
    kind = type(owner).__name__
    if isinstance(owner, nn.MultiheadAttention) and type(owner).forward is nn.MultiheadAttention.forward:
        return (
            "nn.MultiheadAttention reads the weights of its projections and calls none of them; adapt other layers "
            "(in an encoder layer: linear1 and linear2)"
        )
    if last in READ.get(kind, ()) and type(owner).__module__.startswith(_LIBRARIES):
        others = sorted({n for n, m in owner.named_children() if isinstance(m, nn.Linear)} - set(READ[kind]))
        instead = f"adapt {' or '.join(others)} instead" if others else "adapt other layers"
        return f"{kind} reads its weight and does not call it; {instead}"
    for fused, single in _FUSED.items():
        if last in single and hasattr(owner, fused) and _uses_fused(owner):
            return (
                f"{kind} answers through {fused}, which holds a copy of its weight; call unfuse_qkv_projections() on "
                f"the model first, or adapt {fused}"
            )
    return None


def is_fused(parameter: str) -> bool:
    """Whether a parameter is of a projection that diffusers made by fusing others: a copy, which nobody trains."""
    return parameter.rpartition(".")[0].rpartition(".")[2] in _FUSED


def _uses_fused(owner: nn.Module) -> bool:
    """Whether a diffusers attention runs on its fused projections; older ones keep them after they are unfused."""
    if "Fused" in type(getattr(owner, "processor", None)).__name__:
        return True
    older = type(owner).__module__ == "diffusers.models.attention_processor"
    return bool(getattr(owner, "fused_projections", False)) and not older


def follow(model: nn.Module) -> None:
    """Takes torch's encoders that carry adapters off their fast path, which reads weights; puts the others back on it."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            _set_aside(module, "activation_relu_or_gelu", 0)
        elif isinstance(module, nn.TransformerEncoder) and hasattr(module, "use_nested_tensor"):
            _set_aside(module, "use_nested_tensor", False)


def _set_aside(module: nn.Module, attribute: str, off: int | bool) -> None:
    kept = module.__dict__
    if any(isinstance(m, BaseTunerLayer) for m in module.modules()):
        if _FAST_PATH not in kept:
            kept[_FAST_PATH] = getattr(module, attribute)
            setattr(module, attribute, off)
    elif _FAST_PATH in kept:
        setattr(module, attribute, kept.pop(_FAST_PATH))
