"""How much of a model an adapter reaches: by kind of layer, by stack of blocks, and as a share of the parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from smidgen.adapters.tuner import experts
from smidgen.adapters.tuner.kinds import kind_of

_WRAP = "base_model.model."
SMALL = 0.05  # a stack with a smaller share of the model's parameters is no main part of it
_TOWERS = ("vision", "visual", "audio", "image_tower", "speech")


@dataclass
class Entry:
    """Layers of one name: how many are adapted, how many there are, and the share of the model's parameters adapted."""

    name: str
    matched: int = 0
    there: int = 0
    share: float = 0.0


@dataclass
class Stack:
    """A list of blocks in a model: how many hold an adapted layer, of how many that hold any, its share of the parameters,
    and whether most of what could be adapted in it are convolutions."""

    name: str
    touched: int
    blocks: int
    share: float
    convolves: bool = False


@dataclass
class Coverage:
    """What :func:`coverage` found.

    Attributes:
        entries: names of layers that are adapted; ``share`` is that of the adapted ones.
        layers, there: layers adapted, and all that could be.
        share: share of the model's parameters in adapted layers; left: in layers that could be adapted and are not;
            experts: in fused experts that are not adapted (a part of ``left``); owners: ends of the names of the modules that own
            them; fused: in weights of three axes that belong to no layer, which no adapter can be put on.
        stacks: the outermost lists of blocks.
    """

    entries: list[Entry] = field(default_factory=list)
    layers: int = 0
    there: int = 0
    share: float = 0.0
    left: float = 0.0
    experts: float = 0.0
    owners: list[str] = field(default_factory=list)
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
        for name, module in base_modules(model)
        if isinstance(module, BaseTunerLayer) and adapter_name in module._get_available_adapters()
    }
    found, entries = Coverage(), dict[str, Entry]()
    total, sizes, owned, seen = 0, dict[str, int](), dict[str, int](), set[int]()
    named: list[tuple[str, nn.Module]] = [*experts.stacks(model).items(), *base_modules(model)]
    for name, module in named:
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        own = 0
        for parameter in inner.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                own += parameter.numel()
                layered = isinstance(inner, nn.modules.conv._ConvNd) or ".parametrizations." in f".{name}."
                fused = parameter.dim() > 2 and parameter.shape[0] > 1 and not layered and not experts.is_stack(inner)
                found.fused += parameter.numel() if fused else 0
        kind = kind_of(inner)
        if kind is not None:
            own = (
                max(own, prod(kind.geometry(inner)[1:3])) if own else 0
            )  # a packed weight stands for more numbers than it holds
            sizes[name] = own
            entry = entries.setdefault(entry_of(name), Entry(entry_of(name)))
            entry.there += 1
            if name in adapted:
                entry.matched += 1
                entry.share += own
            elif experts.is_stack(inner):
                found.experts += own
                owner = name.rpartition(".")[0].rpartition(".")[2] or name
                found.owners += [owner] if owner not in found.owners else []
        owned[name] = own
        total += own
    total = max(total, 1)
    found.entries = sorted((e for e in entries.values() if e.matched), key=lambda e: e.name)
    found.layers, found.there = len(adapted), len(sizes)
    for entry in found.entries:
        entry.share /= total
    found.share = sum(entry.share for entry in found.entries)
    found.left = sum(size for name, size in sizes.items() if name not in adapted) / total
    found.experts /= total
    found.fused /= total
    found.stacks = _stacks(model, adapted, sizes, owned, total)
    return found


def base_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
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


def blocks_of(model: nn.Module) -> dict[str, list[str]]:
    """The outermost lists of blocks of a model: start of their names -> names of the blocks in it.

    A list is a ``ModuleList``, or a ``Sequential`` of several modules of one class; a block is a module of it that holds
    layers.
    """
    found: dict[str, list[str]] = {}
    for name, module in base_modules(model):
        start = f"{name}." if name else ""
        if not any(start.startswith(outer) for outer in found) and (blocks := _blocks(module)):
            found[start] = blocks
    return found


def _blocks(module: nn.Module) -> list[str]:
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return []
    blocks = {name: m for name, m in module.named_children() if any(True for _ in m.children())}
    blocks = {n: m for n, m in blocks.items() if not isinstance(m, BaseTunerLayer) and kind_of(m) is None}
    one_class = len(blocks) > 1 and len({type(m) for m in blocks.values()}) == 1
    return list(blocks) if isinstance(module, nn.ModuleList) or one_class else []


def _stacks(
    model: nn.Module, adapted: set[str], sizes: dict[str, int], owned: dict[str, int], total: int
) -> list[Stack]:
    convolutions = {name for name, module in base_modules(model) if is_convolution(module)}
    out = []
    for start, names in blocks_of(model).items():
        inside = {n: size for n, size in sizes.items() if n.startswith(start)}
        blocks = {n[len(start) :].partition(".")[0] for n in inside}.intersection(names)
        touched = {n[len(start) :].partition(".")[0] for n in adapted if n.startswith(start)}
        conv = sum(size for n, size in inside.items() if n in convolutions)
        share = sum(size for n, size in owned.items() if n.startswith(start)) / total
        if len(blocks) > 1:
            out.append(Stack(start.rstrip("."), len(touched), len(blocks), share, 2 * conv > sum(inside.values())))
    return out


def is_convolution(module: nn.Module) -> bool:
    """Whether a layer, adapted or not, is a convolution."""
    return isinstance(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, nn.Conv2d)


def gaps(found: Coverage) -> list[str]:
    """Sentences about main parts of a model that an adapter's default targets leave out, or that they may not mean."""
    main = [stack for stack in found.stacks if stack.share >= SMALL]
    towers = [stack for stack in main if is_tower(stack.name)]
    said = [
        f"{stack.name}: {stack.touched} of {stack.blocks} blocks hold an adapted layer"
        for stack in main
        if 2 * stack.touched < stack.blocks and stack not in towers and not stack.convolves
    ]
    if any(stack.touched for stack in found.stacks if not is_tower(stack.name)):
        said += [
            f"{stack.name} is adapted too ({stack.touched} of {stack.blocks} blocks; exclude_modules leaves it out)"
            if stack.touched
            else f"{stack.name} ({stack.share:.0%} of the parameters) is left out"
            for stack in towers
        ]
    return said


def is_tower(name: str) -> bool:
    """Whether a list of blocks is by its name the vision or sound tower of a model."""
    return any(word in name for word in _TOWERS)
