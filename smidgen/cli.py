"""The command line. Each command is one function, its flags are that function's signature, its work one call below.

User errors end with one line on stderr and status 2, Ctrl-C with 130; results go to stdout, progress to stderr.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from smidgen.errors import ConfigError, MissingExtraError, SmidgenError, did_you_mean

if TYPE_CHECKING:
    from smidgen.training.recipes.personalize_settings import PersonalizeConfig

SUMMARY = {
    "personalize": "train an adapter of kilobytes on a folder of pictures",
    "subject": "draw pictures of an invented person for the embedded base",
    "generate": "draw pictures with an adapter",
    "verify": "prove that an adapter is on and belongs to its base",
    "inspect": "say what an adapter folder holds",
    "methods": "list the methods and what they train",
    "count": "count the numbers a method trains in a well-known architecture",
    "config": "show or check a config file: config show|validate FILE",
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
    command = personalize_command(rest) if name == "personalize" else COMMANDS[name]
    tyro = _tyro()
    omit = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    tyro.cli(command, args=_familiar(rest), prog=f"smidgen {name}", config=omit)
    return 0


def _overview() -> str:
    width = max(map(len, SUMMARY))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in SUMMARY.items()]
    return "usage: smidgen COMMAND [OPTIONS]\n\n" + "\n".join(lines) + "\n\nsmidgen COMMAND --help says more."


ALIASES = {  # what other trainers call the same thing
    "--output-dir": "--out",
    "--pretrained-model-name-or-path": "--base",
    "--instance-data-dir": "--folder",
    "--train-data-dir": "--folder",
}


def _familiar(words: Sequence[str]) -> list[str]:
    """Other trainers' flags as ours; ``--compare-lora`` as a switch, although the setting has a third value."""
    switches = {"--compare-lora": "True", "--no-compare-lora": "False"}
    found: list[str] = []
    for number, word in enumerate(words):
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        valued = number + 1 < len(words) and words[number + 1] in ("True", "False", "None")
        if flag in switches and not equals and not valued:
            found += ["--compare-lora", switches[flag]]
        else:
            found.append(ALIASES[flag] + equals + value if flag in ALIASES else word)
    return found


# ---- personalize -----------------------------------------------------------------------------------------------------


def personalize_command(words: Sequence[str]) -> Callable[..., None]:
    """The command with the defaults that ``--config`` or ``--preset`` among ``words`` names."""
    from smidgen.training.recipes.personalize_settings import PersonalizeConfig

    tyro = _tyro()
    default = _default(_value_of(words, "--config"), _value_of(words, "--preset"))
    folder_default = default.data.folder
    shown = replace(default, data=replace(default.data, folder=None))

    def personalize(
        folder: Annotated[Path | None, tyro.conf.Positional] = folder_default,
        /,
        settings: Annotated[PersonalizeConfig, tyro.conf.arg(name="")] = shown,
        config: Path | None = None,
        preset: Literal["default", "debug", "thorough"] = "default",
    ) -> None:
        """Train an adapter of kilobytes on the pictures in FOLDER.

        Captions come from metadata.jsonl or metadata.csv (file_name, text), from .txt files beside the pictures, or
        from --instance-prompt. Ends with the adapter, a contact sheet, a loss plot and a report in the --out folder.

        Args:
            folder: the pictures.
            settings: all that can be set.
            config: YAML file of settings; flags override it.
            preset: settings to start from.
        """
        from smidgen.training.recipes.personalize import personalize as run

        chosen = settings if folder is None else replace(settings, data=replace(settings.data, folder=folder))
        report = run(chosen)
        print(report.table())
        print("\n".join(["", *report.notes, f"Adapter, contact sheet, report and model card: {report.adapter}/"]))

    return personalize


def _default(config: str | None, preset: str | None) -> "PersonalizeConfig":
    from smidgen.training.recipes.personalize_settings import PRESETS, PersonalizeConfig
    from smidgen.training.settings import load_yaml

    if config and preset:
        raise ConfigError("Give --config or --preset, not both.")
    if config:
        return load_yaml(PersonalizeConfig, config)
    if preset and preset not in PRESETS:
        raise ConfigError(f"There is no preset {preset!r}.{did_you_mean(preset, PRESETS)} Known: {', '.join(PRESETS)}.")
    return PRESETS[preset or "default"]


def _value_of(words: Sequence[str], flag: str) -> str | None:
    """The value of ``flag`` among raw words, read before the parser knows its defaults."""
    for number, word in enumerate(words):
        if word == flag and number + 1 < len(words):
            return words[number + 1]
        if word.startswith(flag + "="):
            return word.partition("=")[2]
    return None


def subject(folder: Path, /, seed: int = 0, num_pictures: int = 12) -> None:
    """Draw a person the embedded base has never seen into FOLDER: pictures and captions to personalize with.

    Args:
        folder: where the pictures and metadata.jsonl go.
        seed: which person, and which scenes.
        num_pictures: how many pictures.
    """
    from smidgen.training.drawing import draw_subject as run

    print(run(folder, seed, num_pictures))


# ---- using adapters --------------------------------------------------------------------------------------------------


def generate(
    adapter: Path,
    /,
    prompt: list[str],
    base: str = "embedded",
    out: Path = Path("pictures"),
    num_images: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    strength: float = 1.0,
    negative_prompt: str = "",
    mixed_precision: Literal["no", "fp16", "bf16"] = "no",
) -> None:
    """Draw pictures with ADAPTER, the folder that personalize wrote.

    Args:
        adapter: the adapter's folder.
        prompt: one or more prompts.
        base: embedded, a pipeline folder, or a hub name; the one the adapter was trained on.
        out: a folder, or a .png for a single picture.
        num_images: pictures for each prompt, with seeds seed, seed + 1, ...
        seed: fixes the noise.
        steps: denoising steps (default: as the base needs).
        guidance: classifier-free guidance (default: as the base needs).
        strength: 0 is the base, 1 the adapter, more exaggerates.
        negative_prompt: what to keep away from.
        mixed_precision: precision of the base's weights.
    """
    from smidgen.training.drawing import generate as run

    values = {name: value for name, value in locals().items() if name != "run"}
    for path in run(**values):
        print(path)


def verify(adapter: Path, /, base: str = "embedded") -> None:
    """Prove that ADAPTER is on in BASE: base lock, coverage, norms, a canary output. Exit status 2 if it is not.

    Args:
        adapter: the adapter's folder.
        base: embedded, a pipeline folder, or a hub name.
    """
    from smidgen.training.drawing import verify as run

    ok, text = run(adapter, base)
    print(text)
    if not ok:
        raise SmidgenError(f"{adapter} does not verify on {base}.")


def inspect(adapter: Path, /) -> None:
    """Say what ADAPTER holds: method, settings, bytes, the base it is locked to, and each layer's norms.

    Args:
        adapter: the adapter's folder.
    """
    from smidgen.training.drawing import inspect as run

    print(run(adapter))


def methods() -> None:
    """List the methods: what each is made of and how many numbers it trains in a matrix."""
    from smidgen.adapters.methods import METHODS
    from smidgen.training.report import markdown_table

    head = ["method", "transform", "residual", "trained numbers per matrix", "defaults", "paper"]
    rows = []
    for method in METHODS.values():
        defaults = ", ".join(f"{key}={value}" for key, value in method.defaults.items())
        parts = [method.transform or "-", method.residual or "-"]
        rows.append([method.name, *parts, method.formula, defaults, method.paper])
    print(markdown_table(head, rows, left=len(head)))


Architecture = Literal[
    "sd15", "sdxl", "roberta-base", "roberta-large", "vit-base", "vit-large", "llama2-7b",
    "deberta-v3-base", "gemma-2b", "gemma-7b", "llama3-8b",
]  # fmt: skip


def count(
    method: str,
    /,
    architecture: Architecture,
    rank: int | str | None = None,
    transform_rank: int | None = None,
    residual_rank: int | None = None,
    target_modules: list[str] | None = None,
) -> None:
    """Count the numbers METHOD trains in a well-known architecture, without its weights.

    Args:
        method: as in `smidgen methods`, or tlora(2,6), tlora*(2,4).
        architecture: built on the meta device.
        rank: rank of the residual.
        transform_rank: ring rank of the transform.
        residual_rank: ring rank of the residual.
        target_modules: endings of module names (default: the paper's for the architecture).
    """
    import smidgen

    named: dict[str, Any] = {"r": rank, "transform_rank": transform_rank, "residual_rank": residual_rank}
    named["target_modules"] = target_modules
    given = {name: value for name, value in named.items() if value is not None}
    print(f"{smidgen.count(architecture, smidgen.config(method, **given)):,}")


def config(action: Literal["show", "validate"], file: Path | None = None, /, preset: str = "default") -> None:
    """Show every setting with its value, or check a config file.

    Args:
        action: show prints the whole config as YAML; validate only checks it.
        file: a YAML file as for personalize --config (none: a preset).
        preset: which preset to show when there is no file.
    """
    from smidgen.training.settings import dump_yaml

    found = _default(str(file) if file else None, None if file else preset)
    print(dump_yaml(found).rstrip() if action == "show" else f"{file or preset} is valid.")


COMMANDS: dict[str, Callable[..., None]] = {
    "subject": subject,
    "generate": generate,
    "verify": verify,
    "inspect": inspect,
    "methods": methods,
    "count": count,
    "config": config,
}


def _tyro() -> Any:
    try:
        import tyro
    except ImportError as error:
        raise MissingExtraError("The command line needs tyro: pip install 'smidgen[diffusion]'") from error
    return tyro


if __name__ == "__main__":
    sys.exit(main())
