"""Teach a text-to-image base to follow control pictures: edges, parts, landmarks. Read from top to bottom.

    report = control(ControlConfig(data=Data(Path("pairs"), "segmentation"), out=Path("steered")))

The steps: read and check the pairs; encode them once; train a hint encoder and an adapter; save both; load the file
into a fresh base and prove that it answers as the trained model did; draw the held-out controls and score them beside
the base.
"""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from PIL import Image

from smidgen.adapters.atomic import replace_file
from smidgen.adapters.checkpoint.files import public_name
from smidgen.bases.families import load_base
from smidgen.bases.origin import IMAGES
from smidgen.bases.pipelines import default_device
from smidgen.bases.protocol import ImageBase
from smidgen.errors import AdapterFileError, ConfigError, DataError
from smidgen.tasks.cards import write_report
from smidgen.tasks.contact_sheet import Row, contact_sheet, loss_plot
from smidgen.tasks.control import hint
from smidgen.tasks.control.pairs import ControlPairs, as_controls, read_pairs
from smidgen.tasks.control.report import ControlReport, Line, card
from smidgen.tasks.control.sampling import Scenes, can_score, scores, wanted
from smidgen.tasks.control.settings import TARGETS, ControlConfig, rates
from smidgen.tasks.control.task import ControlTask
from smidgen.tasks.data import images
from smidgen.tasks.diffusion.task import encode_examples
from smidgen.tasks.finetune.settings import PROBE, setup
from smidgen.tasks.going_on import check_start
from smidgen.tasks.png import about_adapter, write_png
from smidgen.training.alone import runs_alone
from smidgen.training.fitting import Fitted, Rates, fit, prove
from smidgen.training.processes import is_main, run_folder
from smidgen.training.randomness import derive
from smidgen.training.settings import decisive, dump_yaml

logger = logging.getLogger(__name__)


@runs_alone
def control(config: ControlConfig, progress: bool = True) -> ControlReport | None:
    """Train, save, prove and score one adapter with its hint encoder in ``config.out``; see the module's text.

    Under ``accelerate launch`` only the main process returns a report. Raises SmidgenError for every refusal: pairs
    that do not fit, settings without meaning, a run that diverged, a saved adapter that does not come back.
    """
    data = config.data
    if data.folder is None:
        raise DataError("Which pictures? Give the folder that holds them.")
    device = default_device()
    base = load_base(config.base, config.train.mixed_precision, device, config=config.base_config)
    resolution = data.resolution or base.resolution
    pairs = read_pairs(data.folder, data.control, data.instance_prompt, resolution)
    for warning in pairs.warnings:
        logger.warning("%s", warning)
    seen, held_out = pairs.split(data.num_held_out)
    logger.info("Training on %s of %s.", seen, data.folder)
    made, rate = hint.config_for(base, data.control, config.adapter.hint_width), rates(config)
    chosen = setup(config.adapter, list(config.adapter.target_modules or TARGETS), config.train.seed)
    identity = _identity(config, base, pairs)
    if config.from_adapter is not None:
        identity["from_adapter"] = _check_start(config, base, made, chosen)

    with run_folder(config.out, config.resume_from_checkpoint, config.overwrite) as out:
        if is_main():
            replace_file(out / "config.yaml", dump_yaml(config))
            replace_file(out / hint.FILE, hint.dump_config(made))
        scenes = _scenes(config, base, held_out, resolution)
        fitted = _fit(config, base, seen, made, chosen, rate, (scenes, held_out), identity, progress)
    if not is_main():
        return None

    trained = scenes.answer(base)
    base.model.cpu()
    base = load_base(config.base, config.train.mixed_precision, device, config=config.base_config)
    drawn = {"real pictures": [images.load_picture(picture.path, resolution) for picture in held_out.pictures]}
    drawn["base without control"] = plain = scenes.draw(base, steer=False)
    said = f"Trained on {seen}, each with its control picture; {len(held_out)} more were kept from training."
    notes = (said, *_proved(config, base, made, scenes, trained))
    drawn[fitted.name] = ours = scenes.draw(base)
    if all(a.tobytes() == b.tobytes() for a, b in zip(plain, ours, strict=True)):
        raise AdapterFileError(f"{out} draws exactly what the base draws: nothing steers.")

    few = slice(config.show.num_columns)
    rows = [Row("control", held_out.controls[few]), *(Row(name, found[few]) for name, found in drawn.items())]
    title = f"{data.control} with {fitted.name} on {public_name(config.base)}: pictures kept from training"
    facts = {"shows": title, "adapters": [about_adapter(out, fitted.name)], "base": public_name(config.base)}
    facts |= {"control": data.control, "prompts": [picture.caption for picture in held_out.pictures[few]]}
    write_png(contact_sheet(title, rows), out / "contact_sheet.png", facts | {"seeds": list(scenes.seeds[few])})
    loss_plot({fitted.name: fitted.losses}, out / "loss.png")
    lines = _lines(config, base, held_out, drawn, fitted)
    told = (pairs.warnings, notes, identity, fitted.coverage)
    report = ControlReport(fitted.name, config.base, data.control, out, lines, *told)
    write_report(out, report, card(report, held_out.pictures[0].caption))
    return report


def _fit(
    config: ControlConfig,
    base: ImageBase,
    seen: ControlPairs,
    made: hint.HintConfig,
    chosen: Any,
    rate: Rates,
    shown: tuple[Scenes, ControlPairs],
    identity: Mapping[str, Any],
    progress: bool,
) -> Fitted:
    scenes, held_out = shown
    captions = [picture.caption for picture in seen.pictures]
    encoded = encode_examples(base, seen.pictures, captions, scenes.options["size"])
    options: dict[str, Any] = {"batch_size": config.data.train_batch_size, "seed": config.train.seed}
    if config.data.caption_dropout:
        options |= {"blank": base.encode_prompts([""]), "dropout": config.data.caption_dropout}
    controls = as_controls(seen.controls)
    task = ControlTask(encoded, base, controls=controls, cubic=config.adapter.cubic_timesteps, **options)
    task.previewer = lambda _, step, folder: scenes.preview(base, held_out.controls, step, folder)
    base.release_encoders(keep_vae=bool(config.train.preview_steps))
    hint.attach(base.model, made, config.train.seed)
    if config.gradient_checkpointing:
        base.model.enable_gradient_checkpointing()
    options = {"weight_decay": config.adapter.weight_decay, "identity": identity, "progress": progress}
    options |= {"start": config.from_adapter, "heads": (hint.NAME,), "resume": config.resume_from_checkpoint}
    return fit(config.adapter.method, base.model, task, chosen, rate, config.train, config.out, **options)


def _check_start(config: ControlConfig, base: ImageBase, made: hint.HintConfig, wanted: Any) -> str:
    """The digest of the adapter to go on from, which must be what the settings ask for, with the same hint encoder."""
    assert config.from_adapter is not None
    given = {name: getattr(config.adapter, name) for name in ("rank", "alpha", "transform_rank", "target_modules")}
    digest = check_start(config.from_adapter, config.out, IMAGES, wanted, given, base.model)
    has = hint.read_config(config.from_adapter)
    if has is None:
        raise ConfigError(
            f"{config.from_adapter} was trained without control pictures: it has no hint encoder to go on from."
        )
    for name, flag in (("control", "control"), ("width", "hint-width"), ("factor", "base"), ("channels", "base")):
        own, asked = getattr(has, name), getattr(made, name)
        if own != asked:
            raise ConfigError(
                f"The hint encoder in {config.from_adapter} has {name} {own}, and the settings ask for {asked}: leave --{flag} out."
            )
    return digest


def _scenes(config: ControlConfig, base: ImageBase, held_out: ControlPairs, resolution: int) -> Scenes:
    options = base.sampling.chosen(config.show.inference_steps, config.show.guidance_scale)
    options |= {"negative": base.encode_prompts([""]), "size": resolution}
    prompts = base.encode_prompts([picture.caption for picture in held_out.pictures])
    seeds = [derive(config.train.seed, "show", number) for number in range(len(held_out))]
    return Scenes(prompts, as_controls(held_out.controls), seeds, options)


def _proved(
    config: ControlConfig, fresh: ImageBase, made: hint.HintConfig, scenes: Scenes, trained: torch.Tensor
) -> tuple[str, ...]:
    """Load the file into ``fresh`` and prove that it answers a control picture as the trained UNet did."""
    hint.attach(fresh.model, made)
    notes = prove(fresh.model, config.out, partial(scenes.answer, fresh))
    error = float((scenes.answer(fresh) - trained).norm() / trained.norm())
    halves = (
        getattr(getattr(fresh.model, "peft_config", {}).get("default"), "store_dtype", None) == "float16"
    )  # rounded when saved
    if not error <= (2e-2 if config.train.mixed_precision != "no" else 5e-3 if halves else 1e-4):
        raise AdapterFileError(
            f"The adapter saved in {config.out} does not answer a control picture as the trained one did: it is "
            f"{error:.1e} off."
        )
    return (*notes, f"Steered by a control picture, its answer differs from the trained model's by {error:.1e}.")


def _lines(
    config: ControlConfig,
    base: ImageBase,
    held_out: ControlPairs,
    drawn: Mapping[str, list[Image.Image]],
    fitted: Fitted,
) -> tuple[Line, ...]:
    """Every row of pictures scored against the held-out controls, where there is something to score them by."""
    kind = config.data.control
    asked = wanted(kind, held_out.controls) if can_score(kind, base) else None
    measured = {name: scores(kind, found, asked) if asked is not None else {} for name, found in drawn.items()}
    sizes: dict[str, Any] = {"numbers": fitted.trained_numbers, "hint_numbers": fitted.head_numbers}
    sizes |= {"bytes_on_disk": fitted.bytes, "seconds": fitted.seconds}
    if config.adapter.method == PROBE:
        sizes["numbers"] = 0
    return tuple(Line(name, found, **(sizes if name == fitted.name else {})) for name, found in measured.items())


def _identity(config: ControlConfig, base: ImageBase, pairs: ControlPairs) -> dict[str, Any]:
    """The settings that decide the trained numbers; where things lie and what is shown does not."""
    kept = decisive(config, "base", "base_config", "from_adapter", "inference_steps", "guidance_scale", "num_columns")
    return kept | {"pairs": pairs.digests(), "base_weights": base.fingerprint()}
