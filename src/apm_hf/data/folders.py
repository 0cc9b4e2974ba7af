"""List the images of a local folder, so that a folder of n images is n images, or the difference is said.

`datasets` takes names of files and folders for splits and patterns: `test tube.jpg` becomes a test split, and a folder
`photos [2024]` has no files. Here names are names. Folders are walked with their links, each real folder once.

    FOLDER/*.jpg                      images without classes
    FOLDER/CLASS/**/*.jpg             classes are the folders on top, below a folder that stands alone
    FOLDER/train/... FOLDER/test/...  splits, where all folders on top are named so; with or without classes in them
"""

import glob
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Name of a folder -> the split it holds.
SPLIT_FOLDERS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
# `datasets` reads folders of such files, and image folders that describe their images in a file of such a name.
TABLES, DESCRIPTIONS = (".parquet", ".arrow", ".tar"), ("metadata.csv", "metadata.jsonl")
# Files that systems and galleries leave beside images.
LITTER = {"thumbs.db", "desktop.ini", "__macosx", "@eadir"}
NOT_IMAGES = {".eps", ".ps", ".pdf", ".mpg", ".mpeg", ".mp4"}  # that Pillow counts among its formats
UNREAD = {".heic", ".heif", ".svg", ".raw", ".cr2", ".cr3", ".nef", ".arw", ".dng"}  # that it does not read


@dataclass(frozen=True)
class ListedFolder:
    """The images of a folder.

    Args:
        splits: name -> paths, sorted.
        classes: name of the split -> the class of every path; empty where there are none.
        class_names: sorted.
    """

    splits: dict[str, list[str]]
    classes: dict[str, list[str]]
    class_names: list[str]

    def dataset(self, split: str) -> Any:
        """Return a `datasets.Dataset` of one split, with the column `image` and, where there are classes, `label`."""
        import datasets

        columns: dict[str, Any] = {"image": self.splits[split]}
        features: dict[str, Any] = {"image": datasets.Image(decode=False)}
        if self.class_names:
            columns["label"] = [self.class_names.index(name) for name in self.classes[split]]
            features["label"] = datasets.ClassLabel(names=self.class_names)
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@dataclass(frozen=True)
class DescribedFolder:
    """A folder whose images are described in files, `metadata.csv` or `metadata.jsonl`, which `datasets` reads.

    Args:
        splits: name -> folder; several, where every folder on top is named so and has such a file.
    """

    splits: dict[str, str]

    def data_files(self) -> dict[str, str]:
        """Return patterns that mean the folders, whatever their names: no name in them is taken for a split."""
        return {name: f"{glob.escape(os.path.abspath(folder))}/**" for name, folder in self.splits.items()}

    def say_left_out(self, split: str, dataset: Any) -> None:
        """Log the images of a split that no description is of, and which `datasets` leaves out."""
        import datasets

        images = [path for path in _entries(Path(self.splits[split])) if path.suffix.lower() in _suffixes()]
        if len(images) > len(dataset):
            column = dataset.select_columns("image").cast_column("image", datasets.Image(decode=False))
            described = {os.path.realpath(row["image"]["path"]) for row in column if row["image"]}
            left = [path for path in images if os.path.realpath(path) not in described]
            _say_left_out(logger.warning, "images that are not described", left)


def list_images(folder: str | os.PathLike[str], *, split: str | None = None) -> ListedFolder | DescribedFolder | None:
    """List a folder of image files; None for a folder of tables or archives, or without images.

    Args:
        split: one that is asked for: a folder on top that is named so is a split then, even if it stands alone.

    Raises:
        ValueError: for a folder with at least as many images as tables or archives: it could mean either.
    """
    root = Path(folder)
    images, others, broken, misnamed = list[Path](), list[Path](), list[Path](), list[Path]()
    tables, descriptions = list[Path](), list[Path]()
    for path in _entries(root):
        suffix, name = path.suffix.lower(), path.relative_to(root)
        if suffix in TABLES:
            tables.append(name)
        elif path.name in DESCRIPTIONS:
            descriptions.append(name)
        elif suffix not in _suffixes():
            others.append(name)
        elif not path.is_file():
            broken.append(name)
        else:
            (images if _is_utf8(path) else misnamed).append(name)
    if tables and len(images) >= len(tables):
        raise ValueError(
            f"{folder}: expected images or tables of them, got {len(images)} images, as {images[0]}, beside "
            f"{len(tables)} tables or archives, as {tables[0]}; move one kind elsewhere, or name a table"
        )
    if tables:
        _say_left_out(logger.warning, "images beside tables or archives", images)
        return None
    if descriptions:
        return _described(root, descriptions)
    _say_left_out(logger.warning, "images that are links to nothing, or no files", broken)
    _say_left_out(logger.warning, "images whose names are not UTF-8, which tables cannot hold", misnamed)
    if not images:
        return None
    unread = [path for path in others if path.suffix.lower() in UNREAD]
    _say_left_out(logger.warning, "images of a format that cannot be read here", unread)
    _say_left_out(logger.info, "files that are no images", [path for path in others if path not in unread])
    parts = _by_split(images, asked=split)
    below = {name: [path.parts[depth:] for path in paths] for name, (paths, depth) in parts.items()}
    classes = _classes(below)
    splits = {name: [str(root / path) for path in paths] for name, (paths, _) in parts.items()}
    return ListedFolder(splits, classes, sorted({one for names in classes.values() for one in names}))


def _described(root: Path, descriptions: list[Path]) -> DescribedFolder:
    tops = {path.parts[0] for path in descriptions if len(path.parts) > 1}
    named = {SPLIT_FOLDERS[top.lower()]: top for top in tops if top.lower() in SPLIT_FOLDERS}
    if len(named) == len(tops) > 1 and all(len(path.parts) > 1 for path in descriptions):
        return DescribedFolder({name: str(root / top) for name, top in named.items()})
    return DescribedFolder({"train": str(root)})


def _say_left_out(log: Callable[[str], None], what: str, left: list[Path]) -> None:
    if left:
        named = ", ".join(path.as_posix() for path in left[:5]) + (", ..." if len(left) > 5 else "")
        named = named.encode(errors="backslashreplace").decode()  # of names that are not UTF-8
        log(f"left out {len(left)} {what}: {named}")


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _entries(root: Path) -> Iterator[Path]:
    """Yield all below a folder that is no folder, sorted, links followed, each real folder once, without litter."""
    seen: set[tuple[int, int]] = set()

    def walk(folder: Path) -> Iterator[Path]:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or path.name.lower() in LITTER:
                continue
            if path.is_dir():
                yield from walk(path)
            else:
                yield path

    return walk(root)


def _suffixes() -> set[str]:
    return set(PIL.Image.registered_extensions()) - NOT_IMAGES


def _by_split(images: list[Path], *, asked: str | None) -> dict[str, tuple[list[Path], int]]:
    """Group images by split; also return how many folders of each path name the split."""
    tops = {path.parts[0] for path in images if len(path.parts) > 1}
    named = {top for top in tops if top.lower() in SPLIT_FOLDERS}
    flat = any(len(path.parts) == 1 for path in images)
    hold_classes = all(
        len({path.parts[1] for path in images if path.parts[0] == top and len(path.parts) > 2}) > 1 for top in named
    )
    splits = {SPLIT_FOLDERS[top.lower()] for top in named}
    if flat or named != tops or not (len(splits) > 1 or asked in splits or (named and hold_classes)):
        return {"train": (images, 0)}
    found: dict[str, tuple[list[Path], int]] = {}
    for path in images:
        found.setdefault(SPLIT_FOLDERS[path.parts[0].lower()], ([], 1))[0].append(path)
    return found


def _classes(below: dict[str, list[tuple[str, ...]]]) -> dict[str, list[str]]:
    """Name the class of every path: its folder on top, below folders that stand alone; empty where there are none."""
    every = [parts for paths in below.values() for parts in paths]
    depth = 0
    while len({parts[depth] for parts in every}) == 1 and all(len(parts) > depth + 1 for parts in every):
        depth += 1
    names = {parts[depth] for parts in every if len(parts) > depth + 1}
    if any(len(parts) <= depth + 1 for parts in every) or all(name.lower() in SPLIT_FOLDERS for name in names):
        if names and any(len(parts) <= depth + 1 for parts in every):
            logger.warning("images lie both in the folder and in folders below it, so that these are no classes")
        return {}
    return {name: [parts[depth] for parts in paths] for name, paths in below.items()}


def find_photos(names: Iterable[str]) -> list[str]:
    """Return the files that names mean: all images below folders, what patterns match, all other names unchanged.

    A folder or pattern without an image is returned too, so that opening it reports what is wrong.
    """
    found: list[str] = []
    for name in names:
        images: list[str] = []
        if os.path.isdir(name):
            images = [str(path) for path in _entries(Path(name)) if path.suffix.lower() in _suffixes()]
        elif not os.path.exists(name) and glob.has_magic(name):
            images = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
        found += images or [name]
    return list(dict.fromkeys(found))


__all__ = ["DescribedFolder", "ListedFolder", "find_photos", "list_images"]
