"""Flags before they are parsed: other trainers' names for them, and the parser itself."""

from collections.abc import Sequence
from typing import Any

from smidgen.cli.extras import check_extras

ALIASES = {  # what other trainers call the same thing
    "--output-dir": "--out",
    "--pretrained-model-name-or-path": "--base",
    "--instance-data-dir": "--folder",
    "--train-data-dir": "--folder",
}
TRAIN_ALIASES = {
    "--output-dir": "--out",
    "--pretrained-model-name-or-path": "--model",
    "--model-name-or-path": "--model",
    "--train-file": "--path",
    "--train-data-dir": "--path",
    "--per-device-train-batch-size": "--train-batch-size",
    "--per-device-eval-batch-size": "--eval-batch-size",
    "--max-steps": "--max-train-steps",
    "--max-seq-length": "--max-length",
    "--warmup-steps": "--lr-warmup-steps",
    "--lr-scheduler-type": "--lr-scheduler",
    "--save-steps": "--checkpointing-steps",
    "--save-total-limit": "--checkpoints-total-limit",
}


def familiar(words: Sequence[str], aliases: dict[str, str] = ALIASES) -> list[str]:
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
            found.append(aliases[flag] + equals + value if flag in aliases else word)
    return found


def value_of(words: Sequence[str], flag: str) -> str | None:
    """The value of ``flag`` among raw words, read before the parser knows its defaults."""
    for number, word in enumerate(words):
        if word == flag and number + 1 < len(words):
            return words[number + 1]
        if word.startswith(flag + "="):
            return word.partition("=")[2]
    return None


def run(command: Any, words: Sequence[str], prog: str, sections: bool = False) -> None:
    """Parse ``words`` by the signature of ``command`` and call it. ``sections``: settings are named with their section, as in
    ``--end-to-end.learning-rate``, for a command whose sections share names."""
    check_extras(prog.removeprefix("smidgen "), words)
    import tyro

    omit = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    tyro.cli(command, args=list(words), prog=prog, config=(tyro.conf.AvoidSubcommands,) if sections else omit)
