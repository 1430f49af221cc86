"""From words to a command, and from errors to an exit status."""

import logging
import sys
from collections.abc import Callable, Sequence

from smidgen.cli import comparing, generator, telling, using, zoo
from smidgen.cli.flags import ALIASES, TRAIN_ALIASES, familiar, run
from smidgen.cli.recipes import RECIPES, find, overview, recipe_command
from smidgen.errors import ConfigError, SmidgenError, did_you_mean

SUMMARY = {
    "train": "train an adapter of kilobytes on texts, pictures or conversations: train TASK DATA",
    "personalize": "train an adapter of kilobytes on a folder of pictures",
    "subject": "draw pictures of an invented person for the embedded base",
    "pairs": "draw portraits with control pictures for the embedded base: train control on them",
    "generate": "draw pictures with an adapter",
    "zoo": "train the adapters of many people at once: zoo build|status|import",
    "predict": "predict a person's adapter from photos, without training: predict PHOTO --out DIR",
    "edit": "move a predicted person along attributes: edit PHOTO --set skin=dark:1.0 --out DIR",
    "blend": "make somebody between two people: blend PHOTO PHOTO --out DIR",
    "invert": "find the adapter that draws a photo best among those a generator can make",
    "sample": "make adapters of people who do not exist: sample --seeds 0..7 --out DIR",
    "generator": "train and look at what predicts: generator train|directions|inspect",
    "compare": "compare methods on a task by quality and bytes: compare EXPERIMENT",
    "verify": "prove that an adapter is on and belongs to its base",
    "inspect": "say what an adapter folder holds",
    "methods": "list the methods and what they train",
    "count": "count the numbers a method trains in a well-known architecture",
    "config": "show or check a config file: config show|validate FILE",
}
COMMANDS: dict[str, Callable[..., None]] = {
    "subject": using.subject,
    "pairs": using.pairs,
    "generate": using.generate,
    "compare": comparing.compare,
    "verify": using.verify,
    "inspect": using.inspect,
    "methods": telling.methods,
    "count": telling.count,
    "config": telling.config,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("smidgen").setLevel(logging.INFO)
    try:
        return _dispatch(words)
    except SmidgenError as error:
        print(f"smidgen: {error}", file=sys.stderr)
        signum = getattr(error, "signum", None)
        return 2 if signum is None else 128 + signum
    except KeyboardInterrupt:
        print("smidgen: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] in ("-V", "--version"):
        from importlib.metadata import version

        print(f"smidgen {version('smidgen')}")
        return 0
    name, rest = words[0], words[1:]
    if name not in SUMMARY:
        hint = did_you_mean(name, SUMMARY) or f" Commands: {', '.join(SUMMARY)}."
        raise ConfigError(f"There is no command {name!r}.{hint}")
    if name == "train":
        return _train(rest)
    if name == "zoo":
        return _zoo(rest)
    if name == "generator":
        return _generator(rest)
    if name in generator.COMMANDS:
        run(generator.command(name), familiar(rest), f"smidgen {name}")
    elif name == "personalize":
        run(recipe_command(RECIPES[name], rest), familiar(rest), f"smidgen {name}")
    else:
        run(COMMANDS[name], familiar(rest), f"smidgen {name}")
    return 0


def _train(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        return 0
    recipe, rest = find(words[0]), words[1:]
    aliases = TRAIN_ALIASES if recipe.data == "path" else ALIASES
    run(recipe_command(recipe, rest), familiar(rest, aliases), f"smidgen train {recipe.name}")
    return 0


def _zoo(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(zoo.overview())
        return 0
    run(zoo.find(words[0], words[1:]), familiar(words[1:]), f"smidgen zoo {words[0]}")
    return 0


def _generator(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(generator.overview())
        return 0
    found = generator.find(words[0], words[1:])
    run(found, familiar(words[1:]), f"smidgen generator {words[0]}", sections=words[0] == "train")
    return 0


def _overview() -> str:
    width = max(map(len, SUMMARY))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in SUMMARY.items()]
    return "usage: smidgen COMMAND [OPTIONS]\n\n" + "\n".join(lines) + "\n\nsmidgen COMMAND --help says more."
