"""What lies in a folder of pictures: the pictures, captions and tables in it, and by name and reason whatever is left out.

Nothing that Smidgen wrote is taken for a picture (see ``smidgen.tasks.png``), and ``sort_out`` leaves masks,
conditioning and regularisation pictures of other trainers' layouts apart from those of the subject.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from smidgen.adapters.atomic import new_files
from smidgen.errors import ConfigError
from smidgen.tasks.data.pixels import known_endings, no_file, why_unread
from smidgen.tasks.data.tables import counted, split_of
from smidgen.tasks.png import written_by_smidgen

TABLES = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet")
CAPTIONS = (".txt", ".caption")
SYSTEM = {"thumbs.db", "desktop.ini", "__macosx"}
OURS = "written by Smidgen and left out"
LAYOUT = "that folder or name call {}, left out"
CONDITIONING = LAYOUT.format("conditioning pictures")
OUR_PAGES = re.compile(r"(contact_sheet|loss|preview-\d+)\.png")  # of versions that set no mark
OUR_FOLDERS = ("adapter_config.json", "config.yaml")  # one of them lies beside those pages

# Folders and endings of names by which trainers know pictures that are not of the subject (kohya's scripts, OneTrainer,
# ai-toolkit, diffusers' ControlNet examples).
ROLES: Mapping[str, tuple[frozenset[str], tuple[str, ...]]] = {
    "masks": (frozenset({"mask", "masks", "mask_images", "segmentation_masks"}), ("_mask", "-mask", "-masklabel")),
    "conditioning pictures": (
        frozenset(
            {"conditioning", "conditioning_images", "conditioning_image", "condition", "conditions", "cond", "control"}
            | {"controls", "control_images", "conditioning_data", "hint", "hints"}
        ),
        ("_cond", "_control", "_conditioning", "-condlabel", "_canny", "_depth", "_openpose", "_hint"),
    ),
    "regularisation pictures": (
        frozenset({"reg", "regs", "reg_images", "regularization", "regularisation", "regularization_images"})
        | frozenset({"regularisation_images", "class_images", "prior", "prior_images"}),
        (),
    ),
}
KOHYA = re.compile(r"([1-9]\d{0,2})_(\S.*)")  # 10_ann person: each picture ten times, of "ann person"


@dataclass
class Listing:
    """The files below ``folder`` in the order of their names; ``left_out`` holds names by reason, and ``others`` are the
    names of files of no kind that is read."""

    folder: Path
    pictures: list[Path] = field(default_factory=list)
    captions: list[Path] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    left_out: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    def name(self, path: Path) -> str:
        """``path`` as messages call it."""
        return path.relative_to(self.folder).as_posix()

    def leave_out(self, path: Path, why: str, noun: str = "picture") -> None:
        self.left_out.setdefault((noun, why), []).append(self.name(path))

    def table_of(self, picture: Path) -> Path | None:
        """The table that describes a picture: of its own folder, or of the nearest above it."""
        own = {table.parent: table for table in reversed(self.tables)}
        return next((own[above] for above in picture.parents if above in own), None)

    def warnings(self) -> list[str]:
        """A sentence for each reason, with the names."""
        stems = {self.name(path.with_suffix("")) for path in self.pictures}
        beside = [name for name in self.others if name.rsplit(".", 1)[0] in stems]
        found = [counted(noun, names, why) for (noun, why), names in self.left_out.items()]
        return found + ([counted("file", beside, "beside a picture, of no kind that is read")] if beside else [])


def list_folder(folder: Path) -> Listing:
    """Everything below ``folder``, links to folders included, hidden files and those of operating systems not."""
    found, seen = Listing(folder), {os.path.realpath(folder)}

    def closed(error: OSError) -> None:
        found.leave_out(Path(error.filename), f"cannot be opened ({error.strerror}), left out", "folder")

    for above, folders, files in os.walk(folder, onerror=closed, followlinks=True):
        kept = []
        for name in sorted(folders):
            path = Path(above, name)
            if name.startswith(".") or name.lower() in SYSTEM:
                continue
            real = os.path.realpath(path)
            if path.is_symlink() and any(real == one or one.startswith(real + os.sep) for one in seen):
                found.leave_out(path, "a link back to what is read anyway, not followed", "folder")
                continue
            if path.suffix.lower() in known_endings():
                found.leave_out(path, "named like a picture; it is read as a folder", "folder")
            seen.add(real)
            kept.append(name)
        folders[:] = kept
        for name in sorted(files):
            if not name.startswith(".") and name.lower() not in SYSTEM:
                _sort(found, Path(above, name))
    for part in (found.pictures, found.captions):
        part.sort()
    found.tables.sort(key=lambda path: (path.parent, TABLES.index(path.name.lower())))
    for table in found.tables[:]:
        if table != next(one for one in found.tables if one.parent == table.parent):
            found.tables.remove(table)
            found.leave_out(table, "beside another table and not read", "table")
    return found


def sort_out(found: Listing, named: Iterable[Path] = ()) -> dict[Path, Path]:
    """Leaves masks, conditioning, regularisation and held-out pictures out, unless they are ``named`` in a table.

    Returns the conditioning picture of each picture that has one of its own name in a folder of such pictures.
    """
    named, stems = set(named), {(path.parent, path.stem) for path in found.pictures}
    split = "train" in {split_of(one.name) for one in found.folder.iterdir() if one.is_dir()}
    roles = {path: _role(found, path, stems, split) for path in found.pictures if path not in named}
    kept = [path for path in found.pictures if not roles.get(path)]
    twins: dict[str, list[Path]] = {}
    for path in (path for path, role in roles.items() if role == "conditioning pictures"):
        twins.setdefault(path.stem, []).append(path)
    for path, role in roles.items():
        if role == "test":
            found.leave_out(path, "in a split kept from training, left out")
        elif role:
            found.leave_out(path, LAYOUT.format(role))
    found.pictures = kept
    return {path: twins[path.stem][0] for path in kept if len(twins.get(path.stem, ())) == 1}


def repeats(found: Listing, picture: Path) -> tuple[int, str]:
    """How often a picture counts, and the words that stand for its caption, as kohya's folder names say: (1, "") without.

    Example:
        >>> repeats(Listing(Path("img")), Path("img/10_ann person/1.png"))
        (10, 'ann person')
    """
    above = picture.parent
    while True:
        match = KOHYA.fullmatch(above.absolute().name)
        if match:
            return int(match[1]), match[2].replace("_", " ").strip()
        if above == found.folder or above == above.parent:
            return 1, ""
        above = above.parent


def captions_beside(found: Listing) -> dict[Path, Path]:
    """The caption file of each picture: of its stem or its whole name, ``.txt`` before ``.caption``. What is used twice or
    not at all is left in ``found``'s warnings."""
    by_name: dict[tuple[Path, str], list[Path]] = {}
    for text in found.captions:
        by_name.setdefault((text.parent, text.stem), []).append(text)
        by_name.setdefault((text.parent, text.stem.lower()), []).append(text)
    chosen: dict[Path, Path] = {}
    for picture in found.pictures:
        names = (picture.stem, picture.name, picture.stem.lower(), picture.name.lower())
        texts = [text for name in names for text in by_name.get((picture.parent, name), ())]
        texts = sorted(dict.fromkeys(texts), key=lambda text: CAPTIONS.index(text.suffix.lower()))
        if texts:
            chosen[picture] = texts[0]
            for other in texts[1:]:
                found.leave_out(other, f"beside {texts[0].name} and not read", "caption file")
    spoken_for = {path.with_suffix("") for path in _left_out(found, "picture")}
    unread = set(found.captions) - set(chosen.values()) - _left_out(found, "caption file")
    unread = {text for text in unread if text.with_suffix("") not in spoken_for}
    for text in sorted(unread):
        found.leave_out(text, "without a picture beside it and ignored", "caption file")
    shared: dict[Path, list[str]] = {}
    for picture, text in chosen.items():
        shared.setdefault(text, []).append(found.name(picture))
    for text, pictures in shared.items():
        if len(pictures) > 1:
            found.left_out[("picture", f"with one caption file between them, {found.name(text)}; all are used")] = (
                pictures
            )
    return chosen


def holds_training_data(folder: Path, whole: bool = True) -> str:
    """Why ``folder`` looks like one to train on, "" when it does not: a table, a captioned picture, or (``whole``) any
    picture that Smidgen did not draw."""
    if not folder.is_dir():
        return ""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    pictures = [path for path in files if path.suffix.lower() in known_endings() and not _is_ours(path)]
    stems = {path.stem for path in files if path.suffix.lower() in CAPTIONS}
    signs = [path for path in files if path.name.lower() in TABLES]
    signs += [path for path in pictures if whole or path.stem in stems]
    return f"it holds {signs[0].name}" if signs else ""


@contextmanager
def drawn_into(folder: Path) -> Iterator[Path]:
    """A scratch folder whose files are in ``folder`` afterwards, which must be new or empty, or hold just these already.

    Raises:
        ConfigError: it holds something else, which would be lost or trained on with them.
    """
    with new_files(folder) as scratch:
        yield scratch
        new = {path.relative_to(scratch): path for path in scratch.rglob("*") if path.is_file()}
        there = (
            {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()} if folder.is_dir() else {}
        )
        there = {name: path for name, path in there.items() if not any(part.startswith(".") for part in name.parts)}
        others = sorted(n for n, path in there.items() if n not in new or path.read_bytes() != new[n].read_bytes())
        if others:
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            raise ConfigError(f"{folder} holds {others[0]}{more} already; give a new folder, or empty this one.")


def _sort(found: Listing, path: Path) -> None:
    suffix = path.suffix.lower()
    if path.name.lower() in TABLES and path.is_file():
        found.tables.append(path)
    elif suffix in CAPTIONS and path.is_file():
        found.captions.append(path)
    elif suffix in known_endings():
        if not path.is_file():
            found.leave_out(path, f"left out: {no_file(path)}")
        elif _is_ours(path):
            found.leave_out(path, OURS)
        else:
            found.pictures.append(path)
    elif why := why_unread(path):
        found.leave_out(path, f"left out: {suffix} {why}", "file")
    else:
        found.others.append(found.name(path))


def _role(found: Listing, path: Path, stems: set[tuple[Path, str]], split: bool) -> str:
    above = path.parent.relative_to(found.folder).parts
    for role, (folders, endings) in ROLES.items():
        if any(part.lower().strip("_-") in folders for part in above):
            return role
        for ending in endings:
            stem = path.stem.lower()
            if stem.endswith(ending) and (path.parent, path.stem[: -len(ending)]) in stems:
                return role
    return "test" if split and {split_of(part) for part in above} & {"validation", "test"} else ""


def _is_ours(path: Path) -> bool:
    if path.suffix.lower() not in (".png", ".apng"):
        return False
    if OUR_PAGES.fullmatch(path.name) and any((path.parent / name).is_file() for name in OUR_FOLDERS):
        return True
    return written_by_smidgen(path)


def _left_out(found: Listing, noun: str) -> set[Path]:
    return {found.folder / name for (what, _), names in found.left_out.items() if what == noun for name in names}


def masks_of_classes(pictures: Sequence[tuple[Path, str]]) -> set[Path]:
    """Pictures of a class called masks (or as ``ROLES`` has it) all of which are named as pictures of other classes are."""
    found: set[Path] = set()
    folders, endings = ROLES["masks"]
    for name in {label for _, label in pictures if label.lower().strip("_-") in folders}:
        stems = {path.stem for path, label in pictures if label != name}
        own = [path for path, label in pictures if label == name]
        if all(path.stem in stems or any(path.stem.removesuffix(end) in stems for end in endings) for path in own):
            found.update(own)
    return found
