"""Image folders: PATH/<class>/*, or PATH/train/<class>/* and PATH/val/<class>/*."""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

from PIL import Image

from pynas.training.sources import Source

SUFFIXES = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
LAYOUT = "Expected PATH/<class>/*.jpg, or PATH/train/<class>/*.jpg and PATH/val/<class>/*.jpg."

Files = dict[str, list[Path]]  # by class


def folder(path: Path) -> Source:
    """Lists an image folder. Classes are its folders, in the order of their names.

    With train/ and val/ (or test/, if there is no val/), the latter is the test set; otherwise the source has none of
    its own. Images may lie deeper inside a class folder; hidden files are passed over.

    Raises:
        FileNotFoundError: If there is no such folder.
        NotADirectoryError: If it is a file.
        PermissionError: If a folder must not be read.
        ValueError: If it holds no images, fewer than two classes, a class without images, or a class in one part only.
    """
    try:
        return _source(path)
    except PermissionError as error:
        raise PermissionError(
            f"Cannot read {error.filename}: permission denied. Try: chmod -R u+rX {error.filename}"
        ) from error


def _source(path: Path) -> Source:
    if not path.exists():
        raise FileNotFoundError(f"There is no folder {path.absolute()}. {LAYOUT}")
    if not path.is_dir():
        raise NotADirectoryError(f"{path.absolute()} is a file, not a folder of images. {LAYOUT}")
    train, test, notes = _parts(path)
    found = _classes(train)
    held_out = _classes(test) if test is not None else {}
    if test is not None:
        _same_classes(train, found, test, held_out)
    images = [
        (file, label) for part in (found, held_out) for label, files in enumerate(part.values()) for file in files
    ]
    strangers = [file for file, _ in images if not _is_image(file)]
    if strangers:
        example = strangers[0].relative_to(path)
        notes += (
            f"{len(strangers):,} files that are no images by their suffix were passed over, for example {example}",
        )
    images = [(file, label) for file, label in images if _is_image(file)]
    tests = range(sum(_is_image(file) for files in found.values() for file in files), len(images))

    def open_file(row: int) -> tuple[Image.Image, bytes]:
        content = images[row][0].read_bytes()
        return Image.open(BytesIO(content)), content

    names = tuple(file.relative_to(path).as_posix() for file, _ in images)
    labels = tuple(label for _, label in images)
    return Source(str(path), tuple(found), names, labels, tests, open_file, notes=notes)


def _parts(path: Path) -> tuple[Path, Path | None, tuple[str, ...]]:
    """The folder of training classes, that of test classes if there is one, and notes."""
    train, val, test = path / "train", path / "val", path / "test"
    held_out = val if val.is_dir() else test if test.is_dir() else None
    if train.is_dir() and held_out is not None:
        notes: tuple[str, ...] = ()
        if held_out == test:
            notes = ("test/ is the test set, as there is no val/",)
        elif test.is_dir():
            notes = ("val/ is the test set; test/ is not used",)
        return train, held_out, notes
    if train.is_dir() and _folders(train):
        return train, None, ("there is no val/, so the test set is split off train/",)
    if val.is_dir() and _folders(val):
        raise ValueError(f"{path} has val/ but no train/. {LAYOUT}")
    return path, None, ()


def _classes(path: Path) -> Files:
    """All visible files of each class folder, sorted by name; at least one image each, at least two classes."""
    found = {name: sorted(_walk(path / name), key=str) for name in _folders(path)}
    if not found:
        loose = any(_is_image(entry) for entry in path.iterdir())
        what = "holds images but no class folders" if loose else "holds no images and no class folders"
        raise ValueError(f"{path} {what}. Put each image into a folder that is named after its class. {LAYOUT}")
    for name, files in found.items():
        if not any(map(_is_image, files)):
            raise ValueError(
                f"The class folder {path / name} holds no images. Add some, or remove the folder. "
                f"Suffixes of images: {' '.join(SUFFIXES)}."
            )
    if len(found) < 2:
        raise ValueError(f"{path} has one class only, {next(iter(found))!r}; a classifier needs two or more. {LAYOUT}")
    return found


def _same_classes(train: Path, found: Files, test: Path, held_out: Files) -> None:
    for here, there, more, fewer in ((train, test, found, held_out), (test, train, held_out, found)):
        missing = [name for name in more if name not in fewer]
        if missing:
            names = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise ValueError(
                f"{here.parent} has classes in {here.name}/ that {there.name}/ lacks ({len(missing)}): {names}. "
                "Both need the same class folders: add or remove some."
            )


def _folders(path: Path) -> list[str]:
    """Names of the visible folders inside, sorted."""
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not _is_hidden(entry.name))


def _walk(top: Path) -> Iterator[Path]:
    """All visible files inside, at any depth. Links to folders are not followed, so that a loop does no harm."""
    for where, folders, files in os.walk(top, onerror=_reraise):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        yield from (Path(where, name) for name in files if not _is_hidden(name))


def _reraise(error: OSError) -> None:
    raise error


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))
