"""Masks: which parts of a picture are learnt. White is learnt, black is not (or a little, see ``weights``), grey in between.

A mask is a picture of its picture's name in a folder ``masks`` beside it (or another folder that is named), a picture called
``portrait_mask.png`` beside ``portrait.png``, or the picture's own opacity. It is scaled and cropped as its picture is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor

from smidgen.errors import DataError
from smidgen.tasks.data.listing import LAYOUT, ROLES, Listing, list_folder
from smidgen.tasks.data.pixels import decode, fit
from smidgen.tasks.data.tables import counted

FOLDERS, ENDINGS = ROLES["masks"]
SKEW = 0.02  # sides of a mask and its picture may differ so much in proportion: a pixel lost to rounding


@dataclass(frozen=True)
class Masks:
    """Where the masks of a folder's pictures are: beside them, in ``folder``, or (``alpha``) in their own opacity."""

    wanted: bool = False
    folder: Path | None = None
    alpha: bool = False

    def candidates(self, found: Listing) -> list[Path]:
        """The files that may be masks; they are no pictures of ``found`` and need no warning any more."""
        if not self.wanted or self.alpha:
            return []
        if self.folder is None:
            names = found.left_out.pop(("picture", LAYOUT.format("masks")), [])
            return [found.folder / name for name in names]
        if not self.folder.is_dir():
            raise DataError(f"The mask folder {self.folder} is not a folder.")
        inside, role = self.folder.resolve(), ("picture", LAYOUT.format("masks"))
        found.pictures = [path for path in found.pictures if inside not in path.resolve().parents]
        left = [name for name in found.left_out.pop(role, []) if inside not in (found.folder / name).resolve().parents]
        found.left_out |= {role: left} if left else {}
        return list_folder(self.folder).pictures

    def paired(
        self, found: Listing, sizes: Mapping[Path, tuple[int, int]], candidates: Sequence[Path], warnings: list[str]
    ) -> dict[Path, Path]:
        """Picture -> its mask, checked, for the pictures whose (width, height) are ``sizes``.

        Raises:
            DataError: no picture has a mask, one has several, or a mask cannot be read, has other proportions or is black.
        """
        if not self.wanted:
            return {}
        root = self.folder or found.folder
        pairs = _by_alpha(sizes) if self.alpha else _by_name(found, list(sizes), candidates, root)
        what = "transparent part" if self.alpha else f"mask in {root}" if self.folder else "mask beside it"
        if not pairs:
            raise DataError(
                f"No picture of {found.folder} has a {what}. Masks are called as their pictures are, in a folder masks/ "
                "(--masked-loss) or another (--mask-folder), or are the pictures' own transparency (--alpha-mask)."
            )
        _check(found, pairs, sizes)
        without = [found.name(path) for path in sizes if path not in pairs]
        if without:
            warnings.append(counted("picture", without, f"without a {what.removesuffix(' beside it')}, learnt whole"))
        unused = [path.relative_to(root).as_posix() for path in candidates if path not in set(pairs.values())]
        if unused:
            warnings.append(counted("mask", unused, "of no picture that is trained on, not used"))
        return pairs


NO_MASKS = Masks()


def load_mask(path: Path, own: bool, size: tuple[int, int] | None = None) -> Image.Image:
    """A mask as 8 bits a pixel, upright; with ``own`` the opacity of the picture at ``path``. ``size`` is its picture's, for one
    that was saved smaller or larger."""
    decoded = decode(path, 1)
    white = Image.new("L", decoded.image.size, 255)
    mask = white if own else decoded.image.convert("L")
    mask = ImageChops.multiply(mask, decoded.alpha) if decoded.alpha else mask  # what is transparent is not learnt
    return mask.resize(size, Image.Resampling.BOX) if size and size != mask.size else mask


def fitted_mask(path: Path, own: bool, size: tuple[int, int], target: int | tuple[int, int]) -> Tensor:
    """The mask of a picture of ``size``, cropped as its picture is: [1, height, width] in 0..1.

    Raises:
        DataError: the crop keeps nothing of what is to be learnt.
    """
    mask = np.asarray(fit(load_mask(path, own, size), target, Image.Resampling.BOX), dtype=np.float32) / 255
    if not mask.any():
        raise DataError(
            f"The crop of {path.name} to {'x'.join(map(str, (target, target) if isinstance(target, int) else target))} pixels "
            "keeps nothing that its mask leaves. Crop the picture yourself, or keep its shape with --aspect-ratio-bucketing."
        )
    return torch.from_numpy(mask)[None]


def weights(masks: Tensor, least: float) -> Tensor:
    """What each latent's error counts [n, ...], of masks [n, ...] in 0..1: ``least`` where a mask is 0, and 1 on average in each
    image, so that a small mask does not make the loss small (ai-toolkit's ``mask_min_value``).

    Example:
        >>> weights(torch.tensor([[0.0, 1.0, 1.0]]), least=0.1)
        tensor([[0.1429, 1.4286, 1.4286]])
    """
    raised = least + (1 - least) * masks
    return raised / raised.mean(dim=tuple(range(1, raised.ndim)), keepdim=True)


def _by_alpha(sizes: Mapping[Path, tuple[int, int]]) -> dict[Path, Path]:
    return {path: path for path in sizes if (alpha := decode(path).alpha) and alpha.getextrema()[0] < 255}  # type: ignore[operator]


def _by_name(found: Listing, pictures: Sequence[Path], masks: Sequence[Path], root: Path) -> dict[Path, Path]:
    """By the name, in the folder that mirrors the picture's; else in the outermost, for a name that one picture has."""
    named: dict[tuple[tuple[str, ...], str], list[Path]] = {}
    for mask in masks:
        above = tuple(part for part in mask.relative_to(root).parent.parts if part.lower().strip("_-") not in FOLDERS)
        for stem in {mask.stem.lower(), *(mask.stem.lower().removesuffix(end) for end in ENDINGS)}:
            named.setdefault((above, stem), []).append(mask)
    alike = Counter(picture.stem.lower() for picture in pictures)
    pairs: dict[Path, Path] = {}
    for picture in pictures:
        stem, above = picture.stem.lower(), picture.relative_to(found.folder).parent.parts
        own = named.get((above, stem)) or (named.get(((), stem)) if alike[stem] == 1 else None) or []
        if len(own) > 1:
            names = ", ".join(mask.relative_to(root).as_posix() for mask in own)
            raise DataError(f"{found.name(picture)} has {len(own)} masks: {names}. Keep one.")
        if own:
            pairs[picture] = own[0]
    return pairs


def _check(found: Listing, pairs: Mapping[Path, Path], sizes: Mapping[Path, tuple[int, int]]) -> None:
    black = []
    for picture, path in pairs.items():
        try:
            mask = load_mask(path, path == picture)
        except DataError as error:
            raise DataError(f"The mask {path} cannot be read: {error}.") from error
        (width, height), (own_width, own_height) = sizes[picture], mask.size
        if abs(width * own_height / (height * own_width) - 1) > SKEW:
            raise DataError(
                f"The mask {path.name} is {own_width}x{own_height} pixels, but its picture {found.name(picture)} is "
                f"{width}x{height}: a mask has its picture's proportions."
            )
        if not mask.getbbox():
            black.append(found.name(picture))
    if black:
        raise DataError(
            counted("picture", black, "whose mask is black throughout: nothing of it would be learnt. White is learnt")
        )
