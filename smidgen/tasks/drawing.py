"""What is done with a finished adapter folder: draw with it, verify it, look into it."""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import smidgen
from smidgen.adapters.api import folders, read_adapter
from smidgen.adapters.atomic import new_file
from smidgen.adapters.checkpoint.base_lock import read_lock
from smidgen.adapters.checkpoint.files import CONFIG_NAME, LORA_NAME, is_recipe, public_name, read_config, read_tensors
from smidgen.adapters.checkpoint.formats import ADAPTERS_NAME, FORMATS, read_lora
from smidgen.adapters.checkpoint.formats.peft import own_options
from smidgen.adapters.components import component_folders
from smidgen.adapters.layer_norms import layer_norms, lora_norm
from smidgen.adapters.tuner.config import is_ours
from smidgen.adapters.tuner.coverage import entry_of
from smidgen.adapters.tuner.injection import remove
from smidgen.bases.families import load_base
from smidgen.bases.origin import IMAGES, Origin, load_own_base, read_origin
from smidgen.bases.pipelines import default_device
from smidgen.bases.protocol import ImageBase
from smidgen.errors import AdapterFileError, ConfigError, DataError
from smidgen.tasks import cards
from smidgen.tasks.control import hint
from smidgen.tasks.control.conditions import edge_picture
from smidgen.tasks.control.pairs import as_controls, load_control
from smidgen.tasks.control.sampling import draw_controlled
from smidgen.tasks.data.images import load_picture
from smidgen.tasks.data.listing import drawn_into, holds_training_data
from smidgen.tasks.diffusion.limits import unknown_words
from smidgen.tasks.png import about_adapter, read_facts, write_png
from smidgen.training import engine
from smidgen.training.ranges import check_value

logger = logging.getLogger(__name__)


def generate(
    adapter: Path | Sequence[Path],
    prompt: list[str],
    base: str | None = None,
    out: Path = Path("generated"),
    num_images: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    strength: float = 1.0,
    negative_prompt: str = "",
    control: Path | None = None,
    edges_of: Path | None = None,
    control_scale: float = 1.0,
    mixed_precision: str = "no",
    overwrite: bool = False,
    base_config: str | None = None,
    weights: Sequence[float] | None = None,
    loaded: ImageBase | None = None,
) -> list[Path]:
    """Draw ``num_images`` pictures for each prompt and save them as PNG; returns their paths.

    Several adapters of one base add up, each at its weight (1 unless given) times ``strength``; the base is the one that
    they name unless it is given. An adapter trained with control pictures follows ``control``, or the edges of the picture ``edges_of``.
    ``out`` is a folder, or the name of a single picture; ``base_config`` is that of a base in one file; ``loaded`` is the base where
    it is in memory already, and is left without the adapters. Raises SmidgenError for an adapter that does not fit the base,
    for an ``out`` among pictures to train on, and for a file that is there already, unless ``overwrite``.
    """
    if not prompt:
        raise ConfigError("Give at least one prompt: what is to be drawn?")
    adapters = [adapter] if isinstance(adapter, str | Path) else list(adapter)
    names = [f"adapter_{number}" for number in range(len(adapters))]
    shares = dict(zip(names, _weights(adapters, weights, strength), strict=True))
    numbers = {"num_images": num_images, "seed": seed, "steps": steps, "guidance": guidance, "strength": strength}
    for name, value in (numbers | {"control_scale": control_scale}).items():
        check_value(name, value)
    for value in shares.values():
        check_value("strength", value)
    single = out.suffix.lower() == ".png"
    if single and len(prompt) * num_images > 1:
        raise ConfigError(f"{out} names one picture, but {len(prompt) * num_images} are asked for; give a folder.")
    prompts = [text for text in prompt for _ in range(num_images)]
    seeds = [seed + number for _ in prompt for number in range(num_images)]
    places = [out] if single else [out / name for name in _names(prompts, seeds, num_images)]
    _check_places(out.parent if single else out, places, single, overwrite)
    origin = _origin_of(adapters, base)
    base_config = base_config if base else origin.base_config
    base = origin.named(base)
    made = _check_control(adapters, control, edges_of)
    loaded = loaded or load_base(base, mixed_precision, default_device(), config=base_config)
    if made is not None:
        hint.attach(loaded.model, made)
    with _wearing(loaded.pipe, dict(zip(names, adapters, strict=True)), shares):
        for warning in unknown_words(loaded, [*prompt, negative_prompt]):
            logger.warning("%s", warning)
        encoded = loaded.encode_prompts(prompts)
        options = {"negative": loaded.encode_prompts([negative_prompt]), **loaded.sampling.chosen(steps, guidance)}
        if made is None:
            images = loaded.draw(encoded, seeds, **options)
        else:
            controls = as_controls([_control_picture(control, edges_of, loaded.resolution)] * len(prompts))
            images = draw_controlled(loaded, encoded, seeds, controls, scale=control_scale, **options)
    facts = {
        "negative_prompt": negative_prompt,
        **loaded.sampling.chosen(steps, guidance),
        "base": public_name(base),
        **_about(adapters, list(shares.values())),
        **({"control": {"kind": made.control, "scale": control_scale}} if made is not None else {}),
        "precision": mixed_precision,
    }
    return [
        write_png(image, place, {"prompt": text, "seed": number} | facts)
        for place, image, text, number in zip(places, images, prompts, seeds, strict=True)
    ]


@contextmanager
def _wearing(pipe: Any, adapters: Mapping[str, Path], weights: Mapping[str, float]) -> Iterator[None]:
    """Within, a pipeline has these adapters at these weights."""
    put: list[tuple[Any, str]] = []
    try:
        for name, folder in adapters.items():
            smidgen.load(pipe, folder, name)
            put += [(part, name) for part, _ in folders(pipe, folder).values()]
        if len(adapters) > 1:
            smidgen.set_active(pipe, list(adapters))
        if set(weights.values()) != {1.0}:
            smidgen.set_strength(pipe, dict(weights))
        yield
    finally:
        for part, name in put:
            remove(part, name)


def verify(adapter: Path, base: str | None = None, base_config: str | None = None) -> tuple[bool, str]:
    """Verify ``adapter`` on the base that it names, or on ``base``: (is it on?, what was found).
    ``base_config`` is that of a base in one file."""
    _check_no_recipe(adapter)
    if not adapter.is_dir():
        raise AdapterFileError(f"{adapter} is no adapter folder.")
    if (adapter / engine.CONTROL).is_file():
        raise ConfigError(
            f"{adapter} holds a trained head or a whole model, no adapter: there is nothing to prove of it."
        )
    loaded: Any = load_own_base(read_origin(adapter), base, base_config)
    made = hint.read_config(adapter)
    if made is not None:
        hint.attach(loaded.model, made)
    found = smidgen.verify(getattr(loaded, "pipe", loaded.model), adapter)
    return bool(found.ok), str(found)


def _check_no_recipe(path: Path) -> None:
    if is_recipe(path):
        raise ConfigError(
            f"{path} is a recipe, which stands for an adapter: `smidgen load {path} --out DIR` makes its folder."
        )


def inspect(adapter: Path, plot: Path | None = None) -> str:
    """A page of text about an adapter folder with its sub-folders for a pipeline's other components, about a LoRA that peft,
    diffusers, kohya's scripts, llama.cpp's or mlx-lm wrote, or about a picture of ours; nothing is executed and no base is needed.

    ``plot`` is a PNG for each layer's norm.
    """
    _check_no_recipe(adapter)
    others = (adapter / LORA_NAME).is_file() and not (adapter / CONFIG_NAME).is_file()
    if adapter.suffix in (".safetensors", ".gguf") or others or (adapter / ADAPTERS_NAME).is_file():
        return _inspect_lora(adapter, plot)
    if adapter.is_file():
        facts = read_facts(adapter)
        told = [f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items()]
        return "\n".join([f"{adapter}: a picture of Smidgen's", *told])
    config, tensors = own_options(adapter) or read_config(adapter), read_tensors(adapter)
    coded = {name for name, tensor in tensors.items() if str(tensor.dtype) == "torch.uint8"}
    if is_ours(adapter):
        tensors = read_adapter(adapter)[1]  # which holds them against the checksum
    sizes = {file: (adapter / file).stat().st_size for file in engine.FILES}
    lock = config.pop("base_lock", None)
    canary, checksum = config.pop("canary", None), config.pop("checksum", None)
    facts = {key: value for key, value in config.items() if value not in (None, [], {}, False, "")}
    numbers = sum(tensor.numel() for tensor in tensors.values())
    lines = [f"{adapter}: {config.get('method') or config.get('peft_type')}, {numbers:,} stored numbers"]
    lines += [f"  {file}: {size:,} bytes" for file, size in sizes.items()]
    lines += [f"  base lock: {_lock_words(lock)}", f"  canary: {'yes' if canary else 'no'}"]
    lines += [f"  checksum: {'right' if checksum else 'none, so damage that keeps shapes cannot be told'}", ""]
    lines += [f"  {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.items()]
    rows = []
    for name, tensor in sorted(tensors.items()):
        value = tensor.float()
        shape = "x".join(map(str, tensor.shape))
        kind = config.get("store_dtype") if name in coded else str(tensor.dtype).removeprefix("torch.")
        rows.append([name, shape, str(kind), f"{value.norm():.4g}", f"{value.abs().max():.4g}"])
    lines += _recipe(adapter / "config.yaml")
    if lock:
        lines += ["", *_covered(lock)]
    lines += ["", cards.table(["tensor", "shape", "dtype", "norm", "largest"], rows)]
    norms, of = _norms(adapter, tensors, config)
    lines += _bars(norms, of)
    if is_ours(adapter):
        lines += ["", f"Exported without loss to: {', '.join(_exact_formats(config))} (smidgen export)."]
    if plot is not None:
        _plot_norms(norms, of, adapter.name, plot)
    return "\n\n".join(["\n".join(lines), *map(inspect, component_folders(adapter))])


def _recipe(file: Path, most: int = 2**16) -> list[str]:
    """The settings that a recipe left beside the adapter it trained."""
    if not file.is_file() or file.stat().st_size > most:
        return []
    return ["", "Trained with (config.yaml):", *(f"  {line}" for line in file.read_text(errors="replace").splitlines())]


def _inspect_lora(path: Path, plot: Path | None) -> str:
    found = read_lora(path)
    if not found:
        raise AdapterFileError(f"{path} holds no tensors.")
    file = next((path / name for name in (LORA_NAME, ADAPTERS_NAME) if (path / name).is_file()), path)
    kind = _whose_keys(file, next(iter(found)))
    numbers = sum(one.a.numel() + one.b.numel() for one in found.values())
    ranks = sorted({one.r for one in found.values()})
    norms = {name: lora_norm(one) for name, one in found.items()}
    lines = [
        f"{path}: a LoRA with {kind} keys, {numbers:,} stored numbers",
        f"  {file.name}: {file.stat().st_size:,} bytes",
        f"  {len(found)} layers, rank {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}",
        "  base lock: none: it does not know its base, another one would go unnoticed",
        *_bars(norms, "update"),
    ]
    if plot is not None:
        _plot_norms(norms, "update", path.stem, plot)
    return "\n".join(lines)


def _whose_keys(file: Path, first: str) -> str:
    """Whose way a LoRA file of others names layers, by its name and the first of them."""
    if file.suffix == ".gguf":
        return "llama.cpp's"
    if file.name == ADAPTERS_NAME:
        return "mlx-lm's"
    if first.startswith("lora_"):
        return "kohya's"
    return "diffusers'" if "." in first.partition(".")[2] else "a LoRA's"


def _norms(adapter: Path, tensors: Any, config: dict[str, Any]) -> tuple[dict[str, float], str]:
    """Norm by layer of a folder of ours, or of a plain LoRA of peft's, and what it is of."""
    if is_ours(adapter):
        return layer_norms(read_adapter(adapter)[0], tensors)
    try:
        return {name: lora_norm(one) for name, one in read_lora(adapter).items()}, "update"
    except AdapterFileError:
        return {}, ""


def _bars(norms: dict[str, float], of: str, most: int = 12, width: int = 30) -> list[str]:
    """Text bars of the layers that an adapter changes most."""
    if not norms:
        return []
    top = sorted(norms.items(), key=lambda item: -item[1])[:most]
    largest, longest = max(top[0][1], 1e-30), max(len(name) for name, _ in top)
    rest = f", the {len(top)} largest of {len(norms)}" if len(norms) > len(top) else ""
    lines = ["", f"Norm of the {of} by layer{rest}:"]
    return lines + [f"  {name.ljust(longest)} {'#' * round(width * norm / largest)} {norm:.3g}" for name, norm in top]


def _plot_norms(norms: dict[str, float], of: str, title: str, path: Path) -> None:
    """A PNG with a bar for each layer, in the file's order."""
    from matplotlib.figure import Figure

    if not norms:
        raise ConfigError("There is nothing to plot: this file does not say which numbers are whose.")
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot writes a .png, not {path.name!r}.")
    figure = Figure(figsize=(7, max(2.0, 0.16 * len(norms) + 0.8)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(norms)), list(norms.values()))
    axes.set_yticks(range(len(norms)), list(norms), fontsize=5)
    axes.set(xlabel=f"norm of the {of}", title=title, ylim=(len(norms) - 0.4, -0.6))
    with new_file(path) as beside:
        figure.savefig(beside, format="png", dpi=120)


def _exact_formats(config: dict[str, Any]) -> list[str]:
    """Formats of ``smidgen export`` that hold an adapter as it is: products go anywhere, a rotation to peft's OFT, DoRA to peft's;
    whether peft's (IA)^3 holds factors of outputs is for the layers to say, which may have a bias."""
    transform, residual, output = (config.get(side) for side in ("transform", "residual", "output"))
    alone = None if residual or output else transform
    held = {"lora": not transform and not output, "rotation": alone == "rotation", "scales": alone == "diagonal"}
    dora, task = residual and output == "magnitude" and not transform, config.get("task_type")
    return [
        name
        for name, own in FORMATS.items()
        if (held.get(own.holds, True) or (dora and own.magnitudes))
        and own.task in (None, task)
        and (own.heads or not config.get("modules_to_save"))
    ]


def draw_subject(folder: Path, seed: int, num_pictures: int, world: str = "embedded") -> str:
    """Draw ``num_pictures`` of a held-out identity of an embedded base's world; returns a sentence about it."""
    import numpy

    from smidgen.bases.embedded.worlds import load_world

    drawn = load_world(world)
    if num_pictures < 1:
        raise ConfigError(f"num_pictures must be at least 1, not {num_pictures}.")
    identity = drawn.sample_identity(numpy.random.default_rng(seed), "test")
    with drawn_into(folder) as scratch:
        drawn.write_subject(scratch, identity, num_pictures, seed)
    looks = ", ".join(f"{name.replace('_', ' ')} {word}" for name, word in identity.as_dict().items())
    return f"{folder}: {num_pictures} pictures of a person the base has never seen ({looks})."


def _names(prompts: Sequence[str], seeds: Sequence[int], each: int) -> list[str]:
    drawn = enumerate(zip(prompts, seeds, strict=True))
    return [f"{number // each:02d}-{_slug(text)}-{seed}.png" for number, (text, seed) in drawn]


def _check_places(folder: Path, places: Sequence[Path], single: bool, overwrite: bool) -> None:
    """Nothing is drawn into a folder to train on, where the next training would meet it, nor over a file."""
    why = holds_training_data(folder, whole=not single)
    if why:
        raise ConfigError(f"{folder} looks like a folder to train on: {why}. Draw into another --out.")
    there = [path for path in places if path.exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise ConfigError(f"{there[0]}{more} is there already; give another --out, or --overwrite to draw it anew.")


def _weights(adapters: Sequence[Path], weights: Sequence[float] | None, strength: float) -> list[float]:
    if not adapters:
        raise ConfigError("Which adapter? Give the folder of one, or of several.")
    if weights is not None and len(weights) != len(adapters):
        raise ConfigError(f"{len(adapters)} adapters take {len(adapters)} weights, got {len(weights)}.")
    return [strength * weight for weight in weights or [1.0] * len(adapters)]


def _origin_of(adapters: Sequence[Path], base: str | None) -> Origin:
    """Where the first adapter comes from, which the others must share unless a base was given for all."""
    bases = {folder: read_origin(folder) for folder in adapters}
    for folder, origin in bases.items():
        if origin.task != IMAGES:
            raise ConfigError(f"{folder} does not draw, it is for {origin.task}.")
    first = bases[adapters[0]]
    for folder, origin in bases.items():
        if base is None and origin.base != first.base:
            raise ConfigError(
                f"{folder} is for {origin.base}, and {adapters[0]} for {first.base}: adapters of one base add up."
            )
    return first


def _about(adapters: Sequence[Path], weights: Sequence[float]) -> dict[str, Any]:
    """The adapters among a picture's facts."""
    if len(adapters) == 1:
        return {"adapter": about_adapter(adapters[0]), "strength": weights[0]}
    both = zip(adapters, weights, strict=True)
    return {"adapters": [about_adapter(folder) | {"weight": weight} for folder, weight in both]}


def _check_control(adapters: Sequence[Path], control: Path | None, edges_of: Path | None) -> hint.HintConfig | None:
    """The hint encoder's config; refuses a control picture for an adapter without one, and the other way round."""
    found = {folder: hint.read_config(folder) for folder in adapters}
    steered = [folder for folder, one in found.items() if one is not None]
    if len(steered) > 1:
        raise ConfigError(
            f"{' and '.join(map(str, steered))} each follow control pictures; one adapter at a time does."
        )
    adapter = steered[0] if steered else adapters[0]
    made, given = found[adapter], [path for path in (control, edges_of) if path is not None]
    if made is None and given:
        raise ConfigError(f"{adapter} was trained without control pictures, so {given[0]} cannot steer it.")
    if made is not None and len(given) != 1:
        raise ConfigError(
            f"{adapter} follows {made.control} pictures: give one with --control"
            + (", or --edges-of a picture." if made.control == "canny" else ".")
        )
    if made is not None and edges_of is not None and made.control != "canny":
        raise ConfigError(f"--edges-of is for canny adapters; {adapter} follows {made.control}: use --control.")
    return made


def _control_picture(control: Path | None, edges_of: Path | None, resolution: int) -> Any:
    if control is not None:
        return load_control(control, resolution)
    try:
        return edge_picture(load_picture(str(edges_of), resolution))
    except DataError as error:
        raise DataError(f"{edges_of} cannot be read as a picture: {error}.") from error


def _covered(lock: dict[str, Any]) -> list[str]:
    """A table of the layers an adapter is on, by the ends of their names. What else a base has, verify says."""
    kept, entries = read_lock(lock), dict[str, list[int]]()
    for name, shape in zip(kept.targets, kept.shapes, strict=True):
        entries.setdefault(entry_of(name), []).append(prod(shape))
    rows = [[entry, str(len(sizes)), f"{sum(sizes):,}"] for entry, sizes in sorted(entries.items())]
    return cards.table(["entry", "layers", "weights adapted"], rows).splitlines()


def _lock_words(lock: dict[str, Any] | None) -> str:
    if not lock:
        return "none: the adapter does not know its base, another one would go unnoticed"
    kept = read_lock(lock)
    rest = "nothing of the base's other weights (made by an older smidgen)"
    if kept.rest is not None:
        rest = f"{len(kept.rest)} groups of the base's other weights"
    return f"{len(kept.targets)} weights in {lock.get('dtype')}, their shapes and a sketch; {rest}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "picture"
