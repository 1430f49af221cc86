"""Flags before they are parsed: other trainers' names for them."""

from collections.abc import Mapping, Sequence

ALIASES = {  # what other trainers call the same thing
    "--output-dir": "--out",
    "--per-device-train-batch-size": "--train-batch-size",
    "--per-device-eval-batch-size": "--eval-batch-size",
    "--max-steps": "--max-train-steps",
    "--max-seq-length": "--max-length",
    "--warmup-steps": "--lr-warmup-steps",
    "--lr-scheduler-type": "--lr-scheduler",
    "--save-steps": "--checkpointing-steps",
    "--save-total-limit": "--checkpoints-total-limit",
}
BASE = {  # beside these where a command has --base, and --model
    "--pretrained-model-name-or-path": "--base",
    "--instance-data-dir": "--folder",
    "--train-data-dir": "--folder",
}
MODEL = {
    "--pretrained-model-name-or-path": "--model",
    "--model-name-or-path": "--model",
    "--train-file": "--path",
    "--train-data-dir": "--path",
}


def familiar(words: Sequence[str], more: Mapping[str, str] = BASE) -> list[str]:
    """Other trainers' flags as ours; ``--compare-lora`` as a switch, although the setting has a third value."""
    aliases = {**ALIASES, **more}
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
