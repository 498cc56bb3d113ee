"""Writing files so that a reader, a crash or a full disk never meets half of one."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from pathlib import Path


def write_atomic(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Replace a file's content in one step: afterwards it is all old or all new.

    The data goes to a temporary file in the same folder (so that the final rename never crosses a file system),
    is flushed to disk and then renamed over `path`. A symbolic link keeps pointing where it did. On any failure the
    temporary file is removed and the old content stays.

    Raises:
        FileNotFoundError: the folder does not exist.
        PermissionError: the folder or the file may not be written.
        IsADirectoryError: `path` is a folder.
        OSError: the disk is full or failed.
    """
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"Cannot write {target}: there is no folder {target.parent}. Create it first.")
    if target.is_dir():
        raise IsADirectoryError(f"Cannot write {target}: it is a folder, not a file.")
    content = data.encode() if isinstance(data, str) else data
    temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except PermissionError as error:
        raise PermissionError(f"Cannot write {target}: no permission to write in {target.parent}.") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"Cannot write {target}: the disk is full. Free some space and try again.") from error
        raise
    finally:
        with contextlib.suppress(OSError):  # gone already after a success; must not hide the first error
            temporary.unlink(missing_ok=True)
