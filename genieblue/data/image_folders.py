"""Where the image paths of samples lead: a folder, and further ones by name, which images may not leave."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from genieblue.data.sample_keys import check_unread_keys, shortened
from modeling_genieblue.addresses_genieblue import shown


@dataclass(frozen=True)
class ImageFolders:
    """Folders that image paths are relative to; `OSError` or `ValueError` for one that does not exist.

    Attributes:
        folder: the usual one; an image that is a path is refused without it.
        roots: by name; `coco/a.jpg` is `a.jpg` in the root `coco`, whatever `folder` contains.
        follow_links: whether symbolic links may lead out of a folder. `..` never does.
    """

    folder: Path | None = None
    roots: Mapping[str, Path] = field(default_factory=dict)
    follow_links: bool = False

    def __post_init__(self):
        for name, folder in {"": self.folder, **self.roots}.items():
            if folder is not None and not os.path.isdir(folder):
                title = f"image root {name!r}, {shown(folder)}," if name else f"image folder {shown(folder)}"
                raise OSError(f"The {title} is not a folder: give an existing one.")
            if any(sign in name for sign in "/\\") or name in (".", ".."):
                raise ValueError(f"The image root {name!r} is no name: expected the first part of image paths.")
        object.__setattr__(self, "folder", None if self.folder is None else Path(os.path.realpath(self.folder)))
        real = {name: Path(os.path.realpath(folder)) for name, folder in self.roots.items()}
        object.__setattr__(self, "roots", real)

    def resolve(self, image: Any, where: str) -> Any:
        """An image of the sample `where` in a form that can be opened; a path becomes absolute.

        `ValueError` for anything else, a URL, or a path that leaves its folder.
        """
        if isinstance(image, dict):  # an image that `datasets` did not decode
            check_unread_keys(image, ("bytes", "path"), where, strict=True)
            # Only real bytes: a string would be opened as a path, bypassing the checks below.
            image = image["bytes"] if isinstance(image.get("bytes"), bytes) else image.get("path")
        if isinstance(image, (Image.Image, np.ndarray, torch.Tensor, bytes)):
            return image
        if not isinstance(image, (str, os.PathLike)) or not os.fspath(image):
            raise ValueError(f"{where}: the image is {shortened(image)}, expected a path, a PIL image or bytes.")
        name = os.fspath(image)
        if "\0" in name:
            raise ValueError(f"{where}: the image {shown(name)!r} is not a path: it contains a null byte.")
        if name[:11].lower() == "data:image/":
            return name
        if name.lower().startswith(("http://", "https://")):
            raise ValueError(f"{where}: the image {shown(name)} is a URL; download it and give its path.")
        return self._inside(name, where)

    def _inside(self, name: str, where: str) -> str:
        """The absolute path of an image; `ValueError` if it leaves its folder."""
        first, _, rest = name.partition("/")
        folder, rest = (self.roots[first], rest) if rest and first in self.roots else (self.folder, name)
        if folder is None:
            raise ValueError(
                f"{where}: the image {shown(name)} is a path; set `image_folder` (--image-folder) to the "
                "folder it is relative to."
            )
        # With links followed, only the written path must be inside; `..` is resolved before links are.
        path = os.path.abspath(folder / rest) if self.follow_links else os.path.realpath(folder / rest)
        if Path(path).is_relative_to(folder):
            return path
        leaves_by_link = Path(os.path.abspath(folder / rest)).is_relative_to(folder)
        links = "follow links with `follow_links` (--follow-links) or " if leaves_by_link else ""
        raise ValueError(
            f"{where}: the image {shown(name)} is outside {folder} (at {shown(path)}); move it inside. Commands with "
            f"these options can {links}read another `image_folder` (--image-folder)."
        )


def read_image_roots(given: Iterable[str]) -> dict[str, Path]:
    """Image roots by name, from `NAME=FOLDER`s; `ValueError` for anything else, and for a repeated name."""
    roots: dict[str, Path] = {}
    for text in given:
        name, sign, folder = text.partition("=")
        if not (name and sign and folder):
            raise ValueError(f"The image root {text!r} is not NAME=FOLDER, such as coco=/data/coco.")
        if name in roots:
            raise ValueError(f"The image root {name!r} is given twice; expected one folder for each name.")
        roots[name] = Path(folder).expanduser()
    return roots


def check_exists(image: Any) -> None:
    """`FileNotFoundError` if a resolved image is the path of no file."""
    if isinstance(image, str) and image[:5].lower() != "data:" and not os.path.isfile(image):
        raise FileNotFoundError(f"the image file {shown(image)} does not exist.")
