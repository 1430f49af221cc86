"""The table of commands: a command is a row. Nothing is imported before a command is run."""

from dataclasses import dataclass

from smidgen.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Command:
    """A command: what the overview says of it, the function whose signature are its flags, and the extras it needs."""

    summary: str
    function: str  # module:name inside smidgen.cli
    needs: tuple[str, ...] = ()


GROUPS = {  # words that stand before others
    "train": "train an adapter of kilobytes on texts, pictures or conversations: train TASK DATA",
    "plan": "say what a run would need before it is run: plan personalize",
    "zoo": "train the adapters of many people at once: zoo build|status|import",
    "keys": "say who may ask a server: keys add|list|remove",
    "generator": "train and look at what predicts: generator train|directions|calibrate|inspect",
}
COMMANDS = {
    "train control": Command(
        "make a text-to-image base follow control pictures: edges, parts, landmarks",
        "recipes:control",
        ("diffusion", "control"),
    ),
    "train text-classification": Command(
        "sort texts, or pairs of texts, into classes, or give them a number", "recipes:text_classification", ("tasks",)
    ),
    "train image-classification": Command("sort pictures into classes", "recipes:image_classification", ("tasks",)),
    "train instruction": Command("teach a language model to answer", "recipes:instruction", ("tasks",)),
    "personalize": Command(
        "train an adapter of kilobytes on a folder of pictures", "recipes:personalize", ("diffusion",)
    ),
    "plan personalize": Command(
        "memory, disk and seconds of a personalisation, and the settings that would fit",
        "planning:personalize",
        ("diffusion",),
    ),
    "subject": Command("draw pictures of an invented person for the embedded base", "using:subject", ("world",)),
    "pairs": Command(
        "draw portraits with control pictures for the embedded base: train control on them", "using:pairs", ("world",)
    ),
    "ui": Command("make adapters, draw with them and take them along in a browser", "page:ui", ("ui",)),
    "generate": Command("draw pictures with an adapter, or with several", "using:generate", ("diffusion",)),
    "classify": Command(
        "sort texts or images with an adapter: classify ADAPTER FILE_OR_TEXT...", "using:classify", ("tasks",)
    ),
    "chat": Command("talk to a language model with an adapter", "using:chat", ("tasks",)),
    "serve": Command(
        "serve a folder of adapters over HTTP, each as a model: serve ADAPTERS", "serving:serve", ("serve",)
    ),
    "keys add": Command("make an API key of a server: keys add FILE NAME", "serving:add_key"),
    "keys list": Command("list the API keys of a server", "serving:list_keys"),
    "keys remove": Command("take an API key back", "serving:remove_key"),
    "merge": Command("write an adapter and its base as one plain model: merge ADAPTER --out MODEL", "using:merge"),
    "zoo build": Command("train an adapter for each of many people, many at once", "zoo:build", ("diffusion", "zoo")),
    "zoo status": Command("say how a zoo stands", "zoo:status", ("zoo",)),
    "zoo import": Command("make a zoo of LoRA files", "zoo:import_", ("diffusion", "zoo")),
    "zoo evaluate": Command(
        "judge a generator on held-out people, beside everything simpler", "zoo:evaluate", ("diffusion", "zoo")
    ),
    "zoo plan": Command("say what a generator for SDXL or SD 1.5 would cost", "zoo:plan", ("diffusion",)),
    "predict": Command(
        "predict a person's adapter from photos, without training: predict PHOTO --out DIR",
        "generator:predict",
        ("diffusion",),
    ),
    "load": Command(
        "write the adapter that a recipe of predict stands for: load RECIPE --out DIR", "generator:load", ("diffusion",)
    ),
    "edit": Command(
        "move a predicted person along attributes: edit PHOTO --set skin=dark:1.0 --out DIR",
        "generator:edit",
        ("diffusion",),
    ),
    "blend": Command(
        "make somebody between two people: blend PHOTO PHOTO --out DIR", "generator:blend", ("diffusion",)
    ),
    "invert": Command(
        "find the adapter that draws a photo best among those a generator can make", "generator:invert", ("diffusion",)
    ),
    "sample": Command(
        "make adapters of people who do not exist: sample --seeds 0..7 --out DIR", "generator:sample", ("diffusion",)
    ),
    "generator train": Command("train a generator, on a zoo or end to end", "generator:train", ("diffusion", "zoo")),
    "generator directions": Command(
        "learn what edit moves along: the attributes of training people", "generator:directions", ("diffusion", "zoo")
    ),
    "generator calibrate": Command(
        "learn which photos a generator can read, and how surely", "generator:calibrate", ("diffusion", "zoo")
    ),
    "generator inspect": Command("say what a generator is", "generator:inspect"),
    "compare": Command(
        "compare methods on a task by quality and bytes: compare EXPERIMENT", "comparing:compare", ("tasks",)
    ),
    "verify": Command("prove that an adapter is on and belongs to its base", "using:verify"),
    "inspect": Command("say what an adapter folder holds", "using:inspect"),
    "export": Command(
        "write an adapter for other programs: export ADAPTER --to FORMAT --out DIR",
        "using:export",
    ),
    "extract": Command(
        "make an adapter of what a fine-tuned model has changed: extract BASE FINETUNED --out DIR",
        "using:extract",
        ("tasks",),
    ),
    "resize": Command("give a lora or svfit adapter another rank: resize ADAPTER --rank 4 --out DIR", "using:resize"),
    "combine": Command("add adapters into one: combine A B --weights 0.5,0.5 --out C", "using:combine"),
    "methods": Command("list the methods and what they train", "telling:methods"),
    "count": Command("count the numbers a method trains in a well-known architecture", "telling:count"),
    "config": Command("show or check a config file: config show|validate FILE", "telling:config"),
}


def summaries(group: str = "") -> dict[str, str]:
    """The words that may come first, or after those of a group, and what the overview says of them."""
    if group:
        return {name.split()[1]: row.summary for name, row in COMMANDS.items() if name.split()[0] == group}
    first = {name.split()[0]: row.summary for name, row in COMMANDS.items()}
    return first | GROUPS


def overview(group: str = "") -> str:
    """The commands, or those of a group, one a line."""
    found = summaries(group)
    width = max(map(len, found))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in found.items()]
    start = " ".join(filter(None, ["smidgen", group, "TASK" if group == "train" else "COMMAND"]))
    data = " [DATA]" if group == "train" else ""
    return f"usage: {start}{data} [OPTIONS]\n\n" + "\n".join(lines) + f"\n\n{start} --help says more."


def find(word: str, group: str = "") -> str:
    """The name of the command ``word``, alone or in a group; ConfigError with the nearest names otherwise."""
    name, known = f"{group} {word}".strip(), summaries(group)
    if word not in known:
        hint = did_you_mean(word, known)
        raise ConfigError(
            f"There is no command {name!r}.{hint}" + ("" if hint and not group else f" Known: {', '.join(known)}.")
        )
    return name
