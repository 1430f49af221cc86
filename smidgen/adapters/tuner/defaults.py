"""Default targets: which layers an adapter goes on when nobody names them.

The papers adapt the query and value projections of attention, and so does this library wherever that reaches every
block of a model's main part. Where it does not (fused projections, state spaces, hybrids, other names) every linear
layer of the blocks is adapted, or every convolution of blocks that are made of them. What is no part of the mapping of
a block is left out: modulations by a time step, routers and routed experts; so are the vision and sound towers of a
model that writes text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from smidgen.adapters.tuner.bypass import bypassed
from smidgen.adapters.tuner.coverage import base_modules, blocks_of, is_tower
from smidgen.adapters.tuner.experts import is_stack
from smidgen.adapters.tuner.kinds import kind_of
from smidgen.adapters.tuner.targets import shortest_names
from smidgen.errors import TargetError

_TEXT_STREAM = ("to_q_t", "to_k_t", "to_v_t", "to_out_t")  # HiDream's own words for the four before it
# Names that must be there, and names of the same attention that are taken along: the best known first.
CONVENTIONS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("to_q", "to_k", "to_v"),
        ("to_out.0", "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", *_TEXT_STREAM),
    ),
    (("q_proj", "v_proj"), ()),
    (("query", "value"), ()),
    (("query_proj", "value_proj"), ()),
    (("q_lin", "v_lin"), ()),
    (("c_attn",), ()),
    (("query_key_value",), ()),
)
MAIN = 0.1  # a list of blocks with a smaller share of all blocks' parameters does not decide
_MODULATES = ("norm", "mod", "ada", "scale_shift", "time_emb", "temb")  # in the name of a layer that scales others


@dataclass
class Block:
    """One of a list of repeated blocks: its layers by name, linear ones and convolutions apart."""

    linear: dict[str, int]
    conv: dict[str, int]

    @property
    def convolves(self) -> bool:
        """Whether most of its parameters are in convolutions, as in a UNet's or a ResNet's blocks."""
        return sum(self.conv.values()) > sum(self.linear.values())

    def layers(self) -> set[str]:
        """What the general rule adapts."""
        return set(self.conv) if self.convolves else set(self.linear)


def default_targets(model: nn.Module) -> set[str]:
    """The layers that an adapter goes on when none are named: every block of the model's main part holds one.

    The query and value projections of attention where every block has them; otherwise all linear layers of the blocks.

    Returns:
        Ends of names, as short as they can be without hitting another module.

    Raises:
        TargetError: the model has neither attention of a known name nor repeated blocks.

    Example:
        >>> class Attention(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        >>> sorted(default_targets(nn.ModuleList([Attention(), Attention()])))
        ['q_proj', 'v_proj']
    """
    modules = dict(base_modules(model))
    layers = {n: inner for n, m in modules.items() if n and kind_of(inner := _inner(m)) and not is_stack(inner)}
    layers = {n: m for n, m in layers.items() if bypassed(model, n) is None}
    blocks = main_blocks(model, modules, layers)
    towers = _left_out(model, modules)
    known = [found for names, more in CONVENTIONS if (found := _known(names, more, layers, towers))]
    for there, along in known:
        if all(block.convolves or there & block.linear.keys() for block in blocks):
            return shortest_names(there | along, modules)
    general = {name for block in blocks for name in block.layers()}
    if general or known:
        return shortest_names(general or known[0][0] | known[0][1], modules)
    ends = sorted({end for name in modules if (end := name.rpartition(".")[2]) and not end.isdigit()})
    raise TargetError(
        f"A {type(model).__name__} has no attention projections of a known name and no repeated blocks; name "
        f"target_modules.{' Modules end in: ' + ', '.join(ends[:20]) + '.' if ends else ''}"
    )


def _inner(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _known(
    names: Iterable[str], more: Iterable[str], layers: Iterable[str], towers: tuple[str, ...]
) -> tuple[set[str], set[str]] | None:
    """Layers of a convention outside the towers: those that must be there, and those beside them that are taken along."""

    def hits(ends: Iterable[str]) -> dict[str, set[str]]:
        return {e: {n for n in layers if f".{n}".endswith(f".{e}") and not n.startswith(towers)} for e in ends}

    there = hits(names)
    if not all(there.values()):
        return None
    owners = {n.removesuffix(end) for end, found in there.items() for n in found}
    along = {n for end, found in hits(more).items() for n in found if n.removesuffix(end) in owners}
    return set().union(*there.values()), along


def main_blocks(model: nn.Module, modules: dict[str, nn.Module], layers: dict[str, nn.Module]) -> list[Block]:
    """The repeated blocks of a model's main part, with the layers that they map by."""
    towers, stacks = _left_out(model, modules), []
    for start, names in blocks_of(model).items():
        size = sum(p.numel() for p in modules[start.rstrip(".")].parameters())
        stacks.append((size, start, [_block(f"{start}{name}.", layers, modules) for name in names]))
    least = MAIN * sum(size for size, _, _ in stacks)
    return [
        block
        for size, start, blocks in stacks
        if size >= least and not start.startswith(towers)
        for block in blocks
        if block.linear or block.conv
    ]


def _block(start: str, layers: dict[str, nn.Module], modules: dict[str, nn.Module]) -> Block:
    block = Block({}, {})
    for name, layer in ((n, m) for n, m in layers.items() if n.startswith(start)):
        path = name[len(start) :].split(".")
        if any(word in part.lower() for part in path for word in _MODULATES) or _routes(name, modules):
            continue
        kind = kind_of(layer)
        assert kind is not None
        _, rows, cols, _ = kind.geometry(layer)
        (block.conv if kind.name == "conv2d" else block.linear)[name] = rows * cols
    return block


def _routes(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a layer chooses experts or is one of those that are chosen: it sees only the tokens sent to it."""
    path = name.split(".")
    parent = modules[".".join(path[:-1])]
    beside = isinstance(getattr(parent, "experts", None), nn.Module) and any(w in path[-1] for w in ("gate", "router"))
    return beside or "router" in path or "experts" in path[:-1]


def _left_out(model: nn.Module, modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """Starts of the names of vision and sound towers in a model that writes text; none for any other model."""
    try:
        writes = getattr(model, "get_output_embeddings", lambda: None)() is not None
    except (NotImplementedError, AttributeError):  # transformers' answer of a model without such a head
        writes = False
    if not writes and not any("language_model" in name.split(".") for name in modules):
        return ()
    stacks = list(blocks_of(model))
    towers = tuple(start for start in stacks if is_tower(start))
    return towers if len(towers) < len(stacks) else ()
