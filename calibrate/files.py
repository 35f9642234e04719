"""Why a file that somebody names cannot be read, found out without opening it: a pipe would wait for its writer."""

from __future__ import annotations

import os
import stat


def file_problem(path: str | os.PathLike) -> str | None:
    """What is wrong with ``path`` as a file to read, in a few words, or None."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "no such file"
    except (OSError, ValueError) as e:  # no permission on a folder above it, a loop of links, a NUL in the name
        return f"cannot be read ({getattr(e, 'strerror', None) or e})"
    if stat.S_ISDIR(mode):
        return "a folder, not a file"
    if not stat.S_ISREG(mode):
        return "a pipe or device, not a regular file"
    return None if os.access(path, os.R_OK) else "no permission to read it"
