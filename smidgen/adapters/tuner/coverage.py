"""How much of a model an adapter reaches: by kind of layer, by stack of blocks, and as a share of the parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from smidgen.adapters.tuner.kinds import kind_of

_WRAP = "base_model.model."
SMALL = 0.05  # a stack with a smaller share of the model's parameters is no main part of it
_TOWERS = ("vision", "visual", "audio")


@dataclass
class Entry:
    """Layers of one name: how many are adapted, how many there are, and the share of the model's parameters adapted."""

    name: str
    matched: int = 0
    there: int = 0
    share: float = 0.0


@dataclass
class Stack:
    """A list of blocks in a model: how many hold an adapted layer, of how many, and its share of the parameters."""

    name: str
    touched: int
    blocks: int
    share: float


@dataclass
class Coverage:
    """What :func:`coverage` found.

    Attributes:
        entries: names of layers that are adapted; ``share`` is that of the adapted ones.
        layers, there: layers adapted, and all that could be.
        share: share of the model's parameters in adapted layers; left: in layers that could be adapted and are not;
            fused: in weights that belong to no layer, such as experts in one tensor, which no adapter can be put on.
        stacks: the outermost lists of blocks.
    """

    entries: list[Entry] = field(default_factory=list)
    layers: int = 0
    there: int = 0
    share: float = 0.0
    left: float = 0.0
    fused: float = 0.0
    stacks: list[Stack] = field(default_factory=list)

    def rows(self) -> list[list[str]]:
        """[entry, layers, share] for a table."""
        found = [[e.name, f"{e.matched} of {e.there} layers", f"{e.share:.1%}"] for e in self.entries]
        if self.there > self.layers:
            found.append(["not adapted", f"{self.there - self.layers} layers", f"{self.left:.1%}"])
        if self.fused:
            found.append(["fused weights", "no layers", f"{self.fused:.1%}"])
        return found


def coverage(model: nn.Module, adapter_name: str) -> Coverage:
    """How much of a model's layers, blocks and parameters an adapter is on, smidgen's or peft's."""
    adapted = {
        name
        for name, module in _modules(model)
        if isinstance(module, BaseTunerLayer) and adapter_name in module._get_available_adapters()
    }
    found, entries = Coverage(), dict[str, Entry]()
    total, sizes, owned, seen = 0, dict[str, int](), dict[str, int](), set[int]()
    for name, module in _modules(model):
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        own = 0
        for parameter in inner.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                own += parameter.numel()
                fused = (
                    parameter.dim() > 2 and parameter.shape[0] > 1 and not isinstance(inner, nn.modules.conv._ConvNd)
                )
                found.fused += parameter.numel() if fused else 0
        kind = kind_of(inner)
        if kind is not None:
            geometry = kind.geometry(inner)
            own = max(own, prod(geometry[1:3])) if own else 0  # a packed weight stands for more numbers than it holds
            sizes[name] = own
            entry = entries.setdefault(entry_of(name), Entry(entry_of(name)))
            entry.there += 1
            if name in adapted:
                entry.matched += 1
                entry.share += own
        owned[name] = own
        total += own
    total = max(total, 1)
    found.entries = sorted((e for e in entries.values() if e.matched), key=lambda e: e.name)
    found.layers, found.there = len(adapted), len(sizes)
    for entry in found.entries:
        entry.share /= total
    found.share = sum(entry.share for entry in found.entries)
    found.left = sum(size for name, size in sizes.items() if name not in adapted) / total
    found.fused /= total
    found.stacks = _stacks(model, adapted, owned, total)
    return found


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name without peft's wrapping, module) of the base model: nothing that an adapter brought."""
    out, inside = [], "\0"
    for name, module in model.named_modules():  # what is inside a layer follows it at once
        if name.startswith(inside) or ".modules_to_save." in name:
            continue
        if isinstance(module, BaseTunerLayer):
            inside = f"{name}."
        out.append((name.removeprefix(_WRAP), module))
    return out


def entry_of(name: str) -> str:
    """The end of a layer's name that says what it is: "q_proj", "to_out.0"."""
    parts = name.split(".")
    start = len(parts) - 1
    while start > 0 and parts[start].isdigit():
        start -= 1
    return ".".join(parts[start:])


def _stacks(model: nn.Module, adapted: set[str], owned: dict[str, int], total: int) -> list[Stack]:
    lists = [name for name, m in _modules(model) if isinstance(m, nn.ModuleList) and len(m) > 1]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    out = []
    for stack in outermost:
        start, inside = f"{stack}.", {n: size for n, size in owned.items() if n.startswith(f"{stack}.")}
        blocks = {n[len(start) :].partition(".")[0] for n in inside}
        touched = {n[len(start) :].partition(".")[0] for n in adapted if n.startswith(start)}
        share = sum(inside.values()) / total
        out.append(Stack(stack, len(touched), len(blocks), share))
    return out


def gaps(found: Coverage) -> list[str]:
    """Sentences about main parts of a model that an adapter's default targets leave out, or that they may not mean."""
    main = [stack for stack in found.stacks if stack.share >= SMALL]
    said = [
        f"{stack.name}: {stack.touched} of {stack.blocks} blocks hold an adapted layer"
        for stack in main
        if 2 * stack.touched < stack.blocks and not _is_tower(stack)
    ]
    towers = [stack for stack in found.stacks if stack.touched and _is_tower(stack)]
    if any(not _is_tower(stack) and stack.touched for stack in found.stacks):
        said += [
            f"{stack.name} is adapted too ({stack.touched} of {stack.blocks} blocks; exclude_modules leaves it out)"
            for stack in towers
        ]
    return said


def _is_tower(stack: Stack) -> bool:
    return any(word in stack.name for word in _TOWERS)
