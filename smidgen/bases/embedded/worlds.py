"""The worlds by name: ``"embedded"``, which the shipped base was trained in, and ``"wide"``, which contains it.

A world is a module; what both have is the same: Identity, Scene, the samplers, caption, vocabulary, render, attribute_codes.

Example:
    >>> load_world("wide").CLASS_PHRASE
    'a person'
"""

from types import ModuleType

from smidgen.bases.embedded import EMBEDDED, EMBEDDED_FLOW, EMBEDDED_WIDE, wide, world
from smidgen.errors import ConfigError, did_you_mean

WORLDS: dict[str, ModuleType] = {"embedded": world, "wide": wide}
WORLD_OF = {EMBEDDED: "embedded", EMBEDDED_FLOW: "embedded", EMBEDDED_WIDE: "wide"}  # that each base draws


def load_world(name: str) -> ModuleType:
    """A world by its name.

    Raises:
        ConfigError: there is no such world.
    """
    if name not in WORLDS:
        raise ConfigError(f"No world {name!r}.{did_you_mean(name, WORLDS)} Known: {', '.join(WORLDS)}.")
    return WORLDS[name]
