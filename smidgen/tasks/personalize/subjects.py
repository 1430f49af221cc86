"""Whose pictures are trained on: one folder, or a list of folders that each have their own words, repeats and masks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from smidgen.errors import ConfigError, DataError
from smidgen.tasks.data import images
from smidgen.tasks.data.buckets import Shape, describe, parse_sizes, shapes_of
from smidgen.tasks.data.masks import Masks
from smidgen.tasks.personalize.settings import Data
from smidgen.training.ranges import check
from smidgen.training.settings import check_file, from_dict


@dataclass(frozen=True)
class SubjectFolder:
    """One folder of a list of subjects; what is None is as for all."""

    folder: Path
    instance_prompt: str | None = None
    class_word: str | None = None
    placeholder_token: str | None = None
    repeats: int = 1  # how often each picture counts beside those of other folders
    loss_weight: float = 1.0  # what the loss of its pictures is multiplied with
    mask_folder: Path | None = None
    alpha_mask: bool | None = None


@dataclass(frozen=True)
class Subject:
    """Who is learnt: its words, and which of the pictures are its own."""

    class_word: str
    placeholder: str | None
    pictures: range

    @property
    def phrase(self) -> str:
        return f"{self.placeholder} {self.class_word}" if self.placeholder else f"a {self.class_word}"

    def plain(self, captions: Sequence[str]) -> list[str]:
        """Its own of all ``captions``, without its word."""
        own = [captions[number] for number in self.pictures]
        return images.of_class(own, self.class_word, self.placeholder) if self.placeholder else own

    def bound(self, captions: Sequence[str]) -> list[str]:
        """Captions with its own word in them."""
        return images.bind(captions, self.class_word, self.placeholder) if self.placeholder else list(captions)


@dataclass(frozen=True)
class TrainingData:
    """All pictures, the shapes they are trained at, and the subjects they show; ``captions`` have the subjects' words in them."""

    found: images.PictureFolder
    captions: list[str]
    subjects: tuple[Subject, ...]
    shapes: dict[Shape, list[int]]
    size: int  # of drawn images

    def __str__(self) -> str:
        return str(self.found)

    @property
    def notes(self) -> list[str]:
        told = describe(self.shapes)
        masked = sum(picture.mask is not None for picture in self.found.pictures)
        learnt = [f"{masked} picture{'s' if masked > 1 else ''} learnt where a mask is white."] if masked else []
        return ([told] if told else []) + learnt

    def each_example(self, values: Sequence[str]) -> list[str]:
        """What ``values`` say of each picture, for each example: a picture is one at every shape it is trained at."""
        return [values[number] for own in self.shapes.values() for number in own]

    def steps(self, epochs: int, batch: int) -> int:
        """Optimizer steps of ``batch`` pictures in which each picture is seen ``epochs`` times as often as it counts."""
        pictures = self.found.pictures
        seen = sum(pictures[number].repeats for own in self.shapes.values() for number in own)
        return -(-epochs * seen // batch)


def read_subjects(data: Data, resolution: int, step: int) -> TrainingData:
    """Read and check all folders for a base of ``resolution`` whose sides are multiples of ``step``.

    Raises:
        DataError: as ``images.read_folder`` does, or two subjects that answer to the same words.
        ConfigError: settings that make no sense.
    """
    sizes = parse_sizes(data.resolution, resolution, step)
    folders = _folders(data)
    pictures, captions, warnings, subjects = list[images.Picture](), list[str](), list[str](), list[Subject]()
    for one in folders:
        alpha = data.alpha_mask if one.alpha_mask is None else one.alpha_mask
        masks = Masks(
            data.masked_loss or alpha or bool(one.mask_folder), one.mask_folder, alpha and not one.mask_folder
        )
        found = images.read_folder(one.folder, one.instance_prompt or data.instance_prompt, sizes[0], masks=masks)
        own = range(len(pictures), len(pictures) + len(found.pictures))
        subject = Subject(one.class_word or data.class_word, one.placeholder_token or data.placeholder_token, own)
        pictures += [replace(p, repeats=p.repeats * one.repeats, weight=one.loss_weight) for p in found.pictures]
        captions += subject.bound(found.captions)
        warnings += found.warnings if len(folders) == 1 else [f"{one.folder.name}: {told}" for told in found.warnings]
        subjects.append(subject)
    phrases = [subject.phrase for subject in subjects]
    if len(set(phrases)) < len(phrases):
        raise DataError(
            f"Two folders of {data.source} answer to the same words, {max(phrases, key=phrases.count)!r}, and would be learnt as "
            "one. Give each its own placeholder_token, or put their pictures into one folder."
        )
    shapes, small = shapes_of(pictures, sizes, step, data.aspect_ratio_bucketing)
    if len(shapes) > 1 and data.with_prior_preservation:
        raise ConfigError(
            "with_prior_preservation draws class pictures of one size; with aspect_ratio_bucketing or several sizes leave it out."
        )
    if data.aspect_ratio_bucketing:  # little is lost to crops then
        warnings = [told for told in warnings if "crop to its centre square" not in told]
    size = sizes[0] if resolution not in sizes else resolution
    return TrainingData(
        images.PictureFolder(tuple(pictures), (*warnings, *small)), captions, tuple(subjects), shapes, size
    )


def _folders(data: Data) -> list[SubjectFolder]:
    if data.folder is not None:
        return [SubjectFolder(data.folder, mask_folder=data.mask_folder)]
    if data.subject:
        return [_named(text, data.mask_folder) for text in data.subject]
    if data.subjects is None:
        raise DataError("Which pictures? Give the folder that holds them.")
    check_file(data.subjects)
    try:
        rows = yaml.safe_load(data.subjects.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"The subjects {str(data.subjects)!r} cannot be read: {error}") from error
    if not isinstance(rows, list) or not rows:
        raise ConfigError(
            f"{data.subjects} must hold a list of folders, such as '- folder: ann' with placeholder_token below it."
        )
    found = []
    for number, row in enumerate(rows):
        row = {"folder": row} if isinstance(row, str) else row
        try:
            one = from_dict(SubjectFolder, row, f"subject {number + 1}, ")
            check(one)
        except ConfigError as error:
            raise ConfigError(f"{data.subjects}: {error}") from error
        beside = data.subjects.parent
        own = beside / one.mask_folder if one.mask_folder else data.mask_folder
        found.append(replace(one, folder=beside / one.folder, mask_folder=own))
    return found


def _named(text: str, masks: Path | None) -> SubjectFolder:
    """The folder of "ann=sks", or of "rex=ohwx dog", whose word is followed by what it is one of."""
    folder, _, words = text.rpartition("=")
    first, _, rest = words.strip().partition(" ")
    if not folder or not first:
        raise ConfigError(
            f"subject takes folders and their words, such as ann=sks or 'rex=ohwx dog', not {text!r}; for more than words give a "
            "YAML list with --subjects."
        )
    return SubjectFolder(Path(folder).expanduser(), None, rest.strip() or None, first, mask_folder=masks)
