"""Fused experts: the matrices of all experts of a mixture in one parameter [experts, out, in], or [experts, in, out].

No layer is called there: the module that owns the parameter sends tokens to experts by kernels of its own (in
transformers one of several, chosen by name). An adapter therefore acts on the weight: while a model carries one,
the parameter is a layer of its own (:class:`ExpertStack`), and the owner's forward pass runs on S (W T + D), made once a call
whatever the kernel. The parameter is itself again when the last adapter is taken off.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from smidgen.errors import TargetError

# Owners that do not say themselves (``is_transposed``) which axis of their parameters is the input: class -> transposed.
KNOWN = {
    "Llama4TextExperts": True,
    "SwiGLUExperts": True,
    "JetMoeParallelExperts": False,
    "LongcatFlashExperts": False,
    "Step3p7Experts": False,
}
_ORDER = "_smidgen_parameters"  # names of an owner's parameters in their order, while some are layers


class ExpertStack(nn.Module):
    """The matrices of fused experts as a layer, whose forward gives the weight that their owner is to use.

    Args:
        weight: [experts, out, in], or [experts, in, out].
        transposed: whether it is the second.
    """

    def __init__(self, weight: nn.Parameter, transposed: bool) -> None:
        super().__init__()
        self._parameters["weight"] = weight  # to register it would move it to the meta device while peft loads
        self.transposed = transposed

    def forward(self) -> Tensor:
        return self._parameters["weight"]  # type: ignore[return-value]


def stacks(model: nn.Module) -> dict[str, ExpertStack]:
    """Parameters of a model that are fused experts and not yet layers, as layers, by name. The model is not changed."""
    found = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            transposed = _transposed(module)
            if transposed is not None and parameter is not None and parameter.dim() == 3 and len(parameter) > 1:
                found[f"{name}.{key}" if name else key] = ExpertStack(parameter, transposed)
    return found


def _transposed(owner: nn.Module) -> bool | None:
    """Whether an owner of fused experts keeps them [experts, in, out]; None for what is no such owner."""
    said = getattr(owner, "is_transposed", None)
    if isinstance(said, bool):
        return said
    return next((KNOWN[c.__name__] for c in type(owner).__mro__ if c.__name__ in KNOWN), None)


def inside(name: str, names: Any) -> list[str]:
    """Those of the ``names`` of stacks that the module ``name`` owns."""
    start = f"{name}." if name else ""
    return [n for n in names if n.startswith(start) and "." not in n[len(start) :]]


def is_named(targets: Any, name: str) -> bool:
    """Whether targets that match the stack ``name`` mean it: they name its owner, as "experts" and "experts.down_proj" do.

    A bare "down_proj" is that of other layers: it meant them before experts could be adapted.
    """
    owner, _, _ = name.rpartition(".")
    if isinstance(targets, str):
        return owner.rpartition(".")[2] in targets
    own = [entry for entry in targets if "." in entry or not owner]
    return any(f".{name}".endswith(f".{e}") for e in own) or any(f".{owner}".endswith(f".{e}") for e in targets)


def open_stacks(model: nn.Module, names: Any) -> None:
    """Makes layers of parameters that :func:`stacks` found, in place.

    Raises:
        TargetError: an owner whose forward pass somebody else has replaced; nothing is changed then.
    """
    found = {name: stack for name, stack in stacks(model).items() if name in names}
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in found}
    for name, owner in owners.items():
        own = owner.__dict__.get(_place(owner))
        if own is not None and _is_replaced(own, owner):
            raise TargetError(f"{name!r}: the forward of its {type(owner).__name__} was replaced; adapt before that.")
    for name, stack in found.items():
        owner, key = owners[name], name.rpartition(".")[2]
        owner.__dict__.setdefault(_ORDER, list(owner._parameters))
        del owner._parameters[key]
        owner._modules[key] = stack
        owner.__dict__[_place(owner)] = partial(_forward, owner)


def close_stacks(model: nn.Module) -> None:
    """Makes parameters again of the stacks that carry no adapter."""
    for owner in [m for m in model.modules() if _ORDER in m.__dict__]:
        for key in [key for key, child in owner._modules.items() if isinstance(child, ExpertStack)]:
            stack: Any = owner._modules.pop(key)
            owner._parameters[key] = stack.weight
        if set(owner.__dict__[_ORDER]) <= owner._parameters.keys():
            owner._parameters = {key: owner._parameters[key] for key in owner.__dict__.pop(_ORDER)}
            if "_old_forward" in owner.__dict__:
                owner.__dict__["_old_forward"] = type(owner).forward.__get__(owner)
            else:
                del owner.__dict__["forward"]


def _is_replaced(forward: Any, owner: nn.Module) -> bool:
    return (
        getattr(forward, "func", None) is not _forward and getattr(forward, "__func__", None) is not type(owner).forward
    )


def _place(owner: nn.Module) -> str:
    """Where an owner's own forward is: accelerate's hooks set it aside and put theirs before it."""
    return "_old_forward" if "_old_forward" in owner.__dict__ else "forward"


def _forward(owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The owner's forward pass on what its stacks give: on a view of it, so that other threads see nothing of this call."""
    view = object.__new__(type(owner))
    made = {key: child() for key, child in owner._modules.items() if child is not None and is_stack(child)}
    view.__dict__.update(owner.__dict__)
    view.__dict__.update(made)  # apart: torch 2.15 compiles no union of the two
    return type(owner).forward(view, *args, **kwargs)


def is_stack(module: nn.Module) -> bool:
    """Whether a module is a stack of experts, adapted or not."""
    return isinstance(getattr(module, "base_layer", module), ExpertStack)
