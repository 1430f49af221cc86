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
from smidgen.adapters.checkpoint.files import public_name
from smidgen.bases.distilled import Helper, check_distilled, digest
from smidgen.bases.families import load_base
from smidgen.bases.judging import NO_JUDGE, Judge
from smidgen.bases.origin import IMAGES
from smidgen.bases.pipelines import default_device
from smidgen.bases.protocol import ImageBase, Prompts, Size, sides
from smidgen.bases.schedules import reweighted
from smidgen.errors import ConfigError, DataError
from smidgen.tasks.cards import write_report
from smidgen.tasks.contact_sheet import loss_plot
from smidgen.tasks.data import images
from smidgen.tasks.data.buckets import parse_shape
from smidgen.tasks.diffusion.gallery import gallery, previewer
from smidgen.tasks.diffusion.limits import OBLONG, OWN_PROMPTS, UNSCORED, foreign_pictures, unknown_words, words_alike
from smidgen.tasks.diffusion.scenes import Scenes
from smidgen.tasks.diffusion.task import Buckets, Encoded, PersonalizeTask, encode_prior, encode_shapes
from smidgen.tasks.going_on import check_start
from smidgen.tasks.personalize.settings import PEFT_LORA, Data, PersonalizeConfig, rates, text_rates
from smidgen.tasks.personalize.subjects import TrainingData, read_subjects
from smidgen.tasks.png import about_adapter, write_png
from smidgen.tasks.report import Report, card
from smidgen.training.alone import runs_alone
from smidgen.training.fitting import Beside, Fitted, fit
from smidgen.training.processes import num_processes, run_folder
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
    if not config.data.source:
        raise DataError("Which pictures? Give the folder that holds them.")
    how: dict[str, Any] = {"quantize": config.quantize, "variant": config.variant, "config": config.base_config}

    def load() -> ImageBase:
        found = load_base(config.base, config.train.mixed_precision, default_device(), text_first=True, **how)
        if config.adapter.train_text_encoder:
            found.train_text_encoders()
        return found

    base = load()
    check_distilled(base, config.helper_adapter)
    schedule = reweighted(base.schedule, config.adapter.weighting_scheme, config.adapter.shift)
    data = read_subjects(config.data, base.resolution, base.step)
    config = in_steps(config, data)
    found = data.found
    subject = [images.load_picture(picture.path, data.size) for picture in found.pictures]
    foreign, strange = foreign_pictures(base, found.pictures, subject)
    words = [*data.captions, *config.show.validation_prompt, *filter(None, [config.data.class_prompt])]
    alike = words_alike(base, [one.phrase for one in data.subjects])
    warnings = (*found.warnings, *strange, *unknown_words(base, words), *alike)
    for warning in warnings:
        logger.warning("%s", warning)
    logger.info("Training on %s of %s.", found, config.data.source)
    blind = judge is None and all(foreign)
    own = None if judge or blind else base.judge()
    judge = judge or own
    scenes, asked, owners = _scenes(config, base, judge, data)
    oblong = scenes.size is not None and len(set(sides(scenes.size))) > 1
    judge = None if oblong and judge is own else judge  # which reads squares

    folders = config.out, config.resume_from_checkpoint, config.overwrite, config.out / "peft_lora"
    with run_folder(*folders, keep=[CLASS_LATENTS]) as out:
        replace_file(out / "config.yaml", dump_yaml(config))
        task = replace(_task(config, base, data), schedule=schedule)
        most = len(config.show.validation_prompt) or 4
        task.previewer = previewer(base, scenes, most) if config.train.preview_steps else None
        base.release_encoders(keep_vae=task.previewer is not None)
        if max(sides(scenes.size or base.resolution)) > base.largest:
            raise ConfigError(
                f"{base.name!r} draws images with sides of {base.largest:,} pixels at most, not {scenes.size}."
            )
        identity = _identity(config, base, data)

        runs = [_fit(config, config.adapter.method, base, task, out, identity, progress)]
    if config.show.compare_lora or (config.show.compare_lora is None and judge is not None):
        again = load()
        again.release_encoders()
        runs.append(_fit(config, PEFT_LORA, again, replace(task, base=again), out / "peft_lora", identity, progress))
        del again
    del base, task  # another one is read to draw with
    gc.collect()

    readable = []
    for one in data.subjects:
        known = [subject[number] for number in one.pictures if not foreign[number]]
        readable.append(known or [subject[number] for number in one.pictures])
    shown = gallery(load, runs, scenes, asked, subject, judge, readable, owners)
    facts: dict[str, Any] = {"shows": "the subject, the base, each adapter", "base": public_name(config.base)}
    facts["adapters"] = [about_adapter(run.folder, run.name) for run in runs]
    write_png(shown.sheet, out / "contact_sheet.png", facts | scenes.facts)
    loss_plot({run.name: run.losses for run in runs}, out / "loss.png")
    unscored = UNSCORED.format(public_name(config.base)) if blind else OBLONG if own and oblong else NO_JUDGE
    scored = [f"Scored by {judge.name}."] if judge else [unscored]
    scored += [OWN_PROMPTS] if judge and shown.entries[-1].caption is None else []
    notes = (f"Trained on {found}.", *data.notes, *scored, *shown.proof)
    told = (shown.entries, warnings, notes, bool(shown.proof), identity, runs[0].coverage, config.base_config)
    report = Report(config.adapter.method, config.base, out, *told)
    phrases = " or ".join(one.phrase for one in data.subjects)
    write_report(out, report, card(report, list(dict.fromkeys(scenes.prompts)), phrases))
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
        options["beside"] = text_adapters(config, method, base)
        options["identity"] |= {"text_encoder_rate": text_rates(config, method).residual}
    if config.from_adapter is not None and method != PEFT_LORA:
        names = ("rank", "residual_rank", "alpha", "transform_rank", "target_modules")
        given = {name: getattr(chosen, name) for name in names}
        beside = list(options.get("beside", ()))
        digest_of = check_start(config.from_adapter, config.out, IMAGES, setup, given, base.model, beside=beside)
        options |= {"start": config.from_adapter, "identity": options["identity"] | {"from_adapter": digest_of}}
    return fit(method, base.model, task, setup, rate, config.train, folder, resume=resume, **options)


def text_adapters(config: PersonalizeConfig, method: str, base: ImageBase) -> dict[str, Beside]:
    """What goes on the text encoders, by their names in the pipeline."""
    rate = text_rates(config, method)
    return {
        name: Beside(base.encoders[name], adapter_setup(config, method, list(layers)), rate)
        for name, layers in base.train_text_encoders().items()
    }


def adapter_setup(config: PersonalizeConfig, method: str, targets: list[str]) -> Any:
    """The peft config of ``method``; peft's own LoRA for PEFT_LORA."""
    chosen = config.adapter
    if method == PEFT_LORA:
        import peft

        rank = chosen.rank if chosen.method == "lora" and isinstance(chosen.rank, int) else 4
        return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    named = {"r": chosen.rank, "alpha": chosen.alpha, "output": chosen.output}
    named |= {"transform_rank": chosen.transform_rank, "residual_rank": chosen.residual_rank}
    given = {name: value for name, value in named.items() if value is not None}
    return smidgen.config(method, target_modules=targets, seed=config.train.seed, **given)


def _task(config: PersonalizeConfig, base: ImageBase, training: TrainingData) -> PersonalizeTask:
    """Everything encoded, so that the VAE and the text encoders can go."""
    data, prior = config.data, None
    if data.with_prior_preservation:
        about = [data.class_prompt] if data.class_prompt else training.found.captions
        prompts = tuple(about[number % len(about)] for number in range(data.num_class_images))
        seeds = tuple(derive(config.train.seed, "prior", number) for number in range(len(prompts)))
        scenes = Scenes(prompts, seeds, size=training.size, **_sampling(config, base))
        prior = encode_prior(base, scenes, config.out / CLASS_LATENTS, base.fingerprint())
    pictures, shapes = training.found.pictures, training.shapes
    subject = encode_shapes(base, pictures, training.captions, shapes, data.mask_min_weight)
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
        preserved=_preserved(data, base, subject, training),
        preserved_weight=data.preservation_loss_weight,
    )


def _preserved(data: Data, base: ImageBase, subject: Encoded | Buckets, training: TrainingData) -> Prompts | None:
    """For each example the prompt whose answer stays the base's."""
    if data.preservation is None:
        return None
    about = data.class_prompt if data.preservation == "class" else ""
    plain = [about or ""] * len(subject)
    if about is None:
        plain = training.each_example(
            [text for one in training.subjects for text in one.plain(training.found.captions)]
        )
    same = sorted(set(plain) & set(training.captions))
    if same:
        raise ConfigError(
            f"preservation {data.preservation} keeps the base's answer to {same[0]!r}, which is also a caption of the subject; "
            "give the subject a word of its own, as with --placeholder-token sks."
        )
    return Prompts({**subject.prompts.tensors, **base.encode_prompts(plain).tensors})


def _scenes(
    config: PersonalizeConfig, base: ImageBase, judge: Judge | None, data: TrainingData
) -> tuple[Scenes, list[str], list[int]]:
    """What to draw, each prompt with each seed and each subject's word; the prompts without it, and whose each is."""
    show = config.show
    plain = list(show.validation_prompt)
    if not plain and judge is not None:
        plain = judge.prompts(show.num_prompts, config.train.seed)
    plain = plain or list(dict.fromkeys(data.found.captions))[: show.num_prompts]
    bound = [plain if show.validation_prompt else one.bound(plain) for one in data.subjects]
    each, whose = range(len(show.seeds) or show.num_seeds), range(len(bound))
    columns = [(prompt, at, who) for prompt in range(len(plain)) for at in each for who in whose]
    seeds = tuple(
        show.seeds[at] if show.seeds else derive(config.train.seed, "show", prompt, at) for prompt, at, _ in columns
    )
    prompts = tuple(bound[who][prompt] for prompt, _, who in columns)
    size: Size = data.size if show.preview_size is None else parse_shape(show.preview_size, base.step)
    scenes = Scenes(prompts, seeds, size=size, negative=show.negative_prompt, **_sampling(config, base))
    return scenes, [plain[prompt] for prompt, *_ in columns], [who for *_, who in columns]


def _sampling(config: PersonalizeConfig, base: ImageBase) -> dict[str, Any]:
    return base.sampling.chosen(config.show.inference_steps, config.show.guidance_scale)


def in_steps(config: PersonalizeConfig, data: TrainingData) -> PersonalizeConfig:
    """``config`` with as many steps as the epochs it asks for take."""
    if config.data.num_train_epochs is None:
        return config
    batch = config.data.train_batch_size * config.train.gradient_accumulation_steps * num_processes()
    return replace(config, train=replace(config.train, max_train_steps=data.steps(config.data.num_train_epochs, batch)))


def _identity(config: PersonalizeConfig, base: ImageBase, data: TrainingData) -> dict[str, Any]:
    """The settings that decide the trained numbers; where things lie and what is shown does not."""
    known: dict[str, Any] = {"pictures": data.found.identity(), "base_weights": base.fingerprint()}
    if len(data.subjects) > 1 or config.data.subject:
        known["phrases"] = [one.phrase for one in data.subjects]
    if config.helper_adapter not in (None, "none"):
        known["helper"] = digest(config.helper_adapter)
    return (
        decisive(
            config,
            "base",
            "base_config",
            "from_adapter",
            "helper_adapter",
            "mask_folder",
            "subject",
            "subjects",
            *to_dict(config.show),
        )
        | known
    )
