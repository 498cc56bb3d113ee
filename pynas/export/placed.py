"""Files that take their names only when they are whole and checked."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def placed(target: Path, beside: str = "") -> Iterator[Path]:
    """Gives a path in a temporary folder beside `target`; moves the file there if the block succeeds.

    A folder, because an exporter may put a second file beside the first: that is refused, and cleaned up, but for the
    one whose name is that of the first and `beside`. It moves before the first, so that who finds the first has both.

    Raises:
        OSError: The folder does not exist or cannot be written.
        ValueError: Other files were put beside the first.
    """
    folder = target.parent
    if target.is_dir():
        raise IsADirectoryError(f"Cannot write {target}: it is a folder. Add a file name.")
    if not folder.is_dir():
        raise FileNotFoundError(f"Cannot write {target}: there is no folder {folder}. Create it first.")
    try:
        scratch = tempfile.TemporaryDirectory(dir=folder, prefix=".export-")
    except OSError as error:
        raise type(error)(f"Cannot write {target}: {error.strerror} in {folder}. Choose another folder.") from error
    with scratch as name:
        temporary = Path(name) / target.name
        second = Path(name) / f"{target.name}{beside}"
        yield temporary
        others = sorted(file.name for file in temporary.parent.iterdir() if file not in (temporary, second))
        if others:
            raise ValueError(f"{target.name} was not written: it would need {', '.join(others)} beside it.")
        files = [second, temporary] if beside else [temporary]
        for file in files:
            with file.open("rb+") as content:
                os.fsync(content.fileno())
        for file in files:
            file.replace(target.with_name(file.name))
