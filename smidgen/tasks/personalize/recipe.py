"""Personalise a text-to-image base: a folder of pictures in, an adapter of kilobytes out. Read from top to bottom.

    report = personalize(PersonalizeConfig(data=Data("pictures"), adapter=Adapter("svfit"), out=Path("me")))

The steps: read and check the pictures; encode them once; train; save; load the file into a fresh base and prove that it
works; draw and score it beside the base and beside peft's own LoRA trained the same way.
"""

import gc
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import smidgen
from smidgen.adapters.atomic import replace_file
from smidgen.bases.distilled import Helper, check_distilled, digest
from smidgen.bases.families import load_base
from smidgen.bases.judging import NO_JUDGE, Judge
from smidgen.bases.pipelines import default_device
from smidgen.bases.protocol import ImageBase, Prompts
from smidgen.errors import ConfigError, DataError
from smidgen.tasks.cards import public_name, write_report
from smidgen.tasks.contact_sheet import loss_plot
from smidgen.tasks.data import images
from smidgen.tasks.diffusion.gallery import gallery, previewer
from smidgen.tasks.diffusion.limits import OWN_PROMPTS, UNSCORED, foreign_pictures, unknown_words
from smidgen.tasks.diffusion.scenes import Scenes
from smidgen.tasks.diffusion.task import Encoded, PersonalizeTask, encode_examples, encode_prior
from smidgen.tasks.personalize.settings import PEFT_LORA, Data, PersonalizeConfig, rates, text_rates
from smidgen.tasks.png import about_adapter, write_png
from smidgen.tasks.report import Report, card
from smidgen.training.alone import runs_alone
from smidgen.training.fitting import Beside, Fitted, fit
from smidgen.training.processes import run_folder
from smidgen.training.randomness import derive
from smidgen.training.settings import decisive, dump_yaml, to_dict

logger = logging.getLogger(__name__)

CLASS_LATENTS = "class_latents.safetensors"  # a cache: what a refused run drew, the next one need not


@runs_alone
def personalize(config: PersonalizeConfig, judge: Judge | None = None, progress: bool = True) -> Report:
    """Train, save, prove and score one adapter in ``config.out``; see the module's text.

    ``judge`` scores the pictures (None: the base's own judge if it has one). Raises SmidgenError for every refusal:
    unusable pictures, settings without meaning, a run that diverged, a saved adapter that does not come back.
    """
    if config.data.folder is None:
        raise DataError("Which pictures? Give the folder that holds them.")
    how: dict[str, Any] = {"quantize": config.quantize, "variant": config.variant, "text_first": True}

    def load() -> ImageBase:
        found = load_base(config.base, config.train.mixed_precision, default_device(), **how)
        if config.adapter.train_text_encoder:
            found.train_text_encoders()
        return found

    base = load()
    check_distilled(base, config.helper_adapter)
    resolution = config.data.resolution or base.resolution
    found = images.read_folder(config.data.folder, config.data.instance_prompt, resolution)
    subject = [images.load_picture(picture.path, resolution) for picture in found.pictures]
    foreign, strange = foreign_pictures(base, found.pictures, subject)
    captions = _bound(found.captions, config.data)
    words = [*captions, *config.show.validation_prompt, *filter(None, [config.data.class_prompt])]
    warnings = (*found.warnings, *strange, *unknown_words(base, words))
    for warning in warnings:
        logger.warning("%s", warning)
    logger.info("Training on %s of %s.", found, config.data.folder)
    blind = judge is None and all(foreign)
    judge = judge or (None if blind else base.judge())
    scenes, asked = _scenes(config, base, judge, found, resolution)

    folders = config.out, config.resume_from_checkpoint, config.overwrite, config.out / "peft_lora"
    with run_folder(*folders, keep=[CLASS_LATENTS]) as out:
        replace_file(out / "config.yaml", dump_yaml(config))
        task = _task(config, base, found, captions, resolution)
        own = len(config.show.validation_prompt) or 4
        task.previewer = previewer(base, scenes, own) if config.train.preview_steps else None
        base.release_encoders(keep_vae=task.previewer is not None)
        identity = _identity(config, base, found)

        runs = [_fit(config, config.adapter.method, base, task, out, identity, progress)]
    if config.show.compare_lora or (config.show.compare_lora is None and judge is not None):
        again = load()
        again.release_encoders()
        runs.append(_fit(config, PEFT_LORA, again, replace(task, base=again), out / "peft_lora", identity, progress))
        del again
    del base, task  # another one is read to draw with
    gc.collect()

    known = [image for image, other in zip(subject, foreign, strict=True) if not other]
    readable = known if any(foreign) and known else subject
    shown = gallery(load, runs, scenes, asked, subject, judge, readable)
    facts: dict[str, Any] = {"shows": "the subject, the base, each adapter", "base": public_name(config.base)}
    facts["adapters"] = [about_adapter(run.folder, run.name) for run in runs]
    write_png(shown.sheet, out / "contact_sheet.png", facts | scenes.facts)
    loss_plot({run.name: run.losses for run in runs}, out / "loss.png")
    unscored = UNSCORED.format(public_name(config.base)) if blind else NO_JUDGE
    scored = [f"Scored by {judge.name}."] if judge else [unscored]
    scored += [OWN_PROMPTS] if judge and shown.entries[-1].caption is None else []
    notes = (f"Trained on {found}.", *scored, *shown.proof)
    told = (shown.entries, warnings, notes, bool(shown.proof), identity, runs[0].coverage)
    report = Report(config.adapter.method, config.base, out, *told)
    write_report(out, report, card(report, list(dict.fromkeys(scenes.prompts)), _subject_words(config.data)))
    return report


def _fit(
    config: PersonalizeConfig,
    method: str,
    base: ImageBase,
    task: PersonalizeTask,
    folder: Path,
    identity: dict,
    progress: bool,
) -> Fitted:
    """Train ``method`` in ``base``'s UNet; peft's own LoRA for PEFT_LORA, by the same loop on the same batches."""
    chosen = config.adapter
    targets = list(chosen.target_modules or base.targets)
    if config.gradient_checkpointing:
        base.model.enable_gradient_checkpointing()
    setup = adapter_setup(config, method, targets)
    rate = rates(config, method)
    identity = identity | {"method": method, "rate": rate.residual, "transform_rate": rate.transform}
    options: dict[str, Any] = {"weight_decay": chosen.weight_decay, "identity": identity, "progress": progress}
    resume = config.resume_from_checkpoint
    if method == PEFT_LORA and resume:
        resume = "latest"
    if config.helper_adapter not in (None, "none"):
        helper = Helper(base, config.helper_adapter)
        options["during"] = helper.on()
        if task.previewer is not None:
            task.previewer = helper.on(False)(task.previewer)  # drawn as it will be used
    if chosen.train_text_encoder:
        texts, encoders = text_rates(config, method), base.train_text_encoders()
        options["beside"] = {
            name: Beside(base.encoders[name], adapter_setup(config, method, list(layers)), texts)
            for name, layers in encoders.items()
        }
        options["identity"] |= {"text_encoder_rate": texts.residual}
    return fit(method, base.model, task, setup, rate, config.train, folder, resume=resume, **options)


def adapter_setup(config: PersonalizeConfig, method: str, targets: list[str]) -> Any:
    """The peft config of ``method``; peft's own LoRA for PEFT_LORA."""
    chosen = config.adapter
    if method == PEFT_LORA:
        import peft

        rank = chosen.rank if chosen.method == "lora" and isinstance(chosen.rank, int) else 4
        return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    named = {"r": chosen.rank, "alpha": chosen.alpha}
    named |= {"transform_rank": chosen.transform_rank, "residual_rank": chosen.residual_rank}
    given = {name: value for name, value in named.items() if value is not None}
    return smidgen.config(method, target_modules=targets, seed=config.train.seed, **given)


def _task(
    config: PersonalizeConfig, base: ImageBase, found: images.PictureFolder, captions: list[str], resolution: int
) -> PersonalizeTask:
    """Everything encoded, so that the VAE and the text encoders can go."""
    data, prior = config.data, None
    if data.with_prior_preservation:
        about = [data.class_prompt] if data.class_prompt else found.captions
        prompts = tuple(about[number % len(about)] for number in range(data.num_class_images))
        seeds = tuple(derive(config.train.seed, "prior", number) for number in range(len(prompts)))
        scenes = Scenes(prompts, seeds, size=resolution, **_sampling(config, base))
        prior = encode_prior(base, scenes, config.out / CLASS_LATENTS, base.fingerprint())
    subject = encode_examples(base, found.pictures, captions, resolution)
    return PersonalizeTask(
        subject,
        base,
        batch_size=data.train_batch_size,
        seed=config.train.seed,
        prior=prior,
        prior_batch_size=max(1, data.train_batch_size // 2),
        prior_weight=data.prior_loss_weight,
        snr_gamma=config.adapter.snr_gamma,
        blank=base.encode_prompts([""]) if data.caption_dropout else None,
        dropout=data.caption_dropout,
        preserved=_preserved(data, base, subject, found),
        preserved_weight=data.preservation_loss_weight,
    )


def _preserved(data: Data, base: ImageBase, subject: Encoded, found: images.PictureFolder) -> Prompts | None:
    """For each picture the prompt whose answer stays the base's."""
    if data.preservation is None:
        return None
    about = data.class_prompt if data.preservation == "class" else ""
    plain = [about or ""] * len(subject)
    if about is None and data.placeholder_token:
        plain = images.of_class(found.captions, data.class_word, data.placeholder_token)
    same = sorted(set(plain) & set(_bound(found.captions, data)))
    if same:
        raise ConfigError(
            f"preservation {data.preservation} keeps the base's answer to {same[0]!r}, which is also a caption of the subject; "
            "give the subject a word of its own, as with --placeholder-token sks."
        )
    return Prompts({**subject.prompts.tensors, **base.encode_prompts(plain).tensors})


def _scenes(
    config: PersonalizeConfig, base: ImageBase, judge: Judge | None, found: images.PictureFolder, resolution: int
) -> tuple[Scenes, list[str]]:
    """What to draw, each prompt with each seed, and the prompts without the subject's word."""
    show = config.show
    plain = list(show.validation_prompt)
    if not plain and judge is not None:
        plain = judge.prompts(show.num_prompts, config.train.seed)
    plain = plain or list(dict.fromkeys(found.captions))[: show.num_prompts]
    bound = _bound(plain, config.data) if not show.validation_prompt else plain
    columns = [(prompt, number) for prompt in range(len(plain)) for number in range(len(show.seeds) or show.num_seeds)]
    seeds = tuple(
        show.seeds[at] if show.seeds else derive(config.train.seed, "show", prompt, at) for prompt, at in columns
    )
    prompts = tuple(bound[prompt] for prompt, _ in columns)
    scenes = Scenes(prompts, seeds, size=resolution, negative=show.negative_prompt, **_sampling(config, base))
    return scenes, [plain[prompt] for prompt, _ in columns]


def _sampling(config: PersonalizeConfig, base: ImageBase) -> dict[str, Any]:
    return base.sampling.chosen(config.show.inference_steps, config.show.guidance_scale)


def _bound(captions: list[str], data: Data) -> list[str]:
    return images.bind(captions, data.class_word, data.placeholder_token) if data.placeholder_token else captions


def _subject_words(data: Data) -> str:
    return f"{data.placeholder_token} {data.class_word}" if data.placeholder_token else f"a {data.class_word}"


def _identity(config: PersonalizeConfig, base: ImageBase, found: images.PictureFolder) -> dict[str, Any]:
    """The settings that decide the trained numbers; where things lie and what is shown does not."""
    known = {"pictures": found.identity(), "base_weights": base.fingerprint()}
    if config.helper_adapter not in (None, "none"):
        known["helper"] = digest(config.helper_adapter)
    return decisive(config, "base", "helper_adapter", *to_dict(config.show)) | known
