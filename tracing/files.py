"""Writing reports: whole or not at all, and never over a file that is something else."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from gemsmode.errors import GemsError

MARKER = "gemsmode-report"
"""Stands within the first bytes of every report that gemsmode writes; CSV is known by its header."""

_CSV_HEAD = "overload,decision,rule,reason,inputs,dtypes,module"
_LOOK_AT = 512


class NotAReportError(GemsError, FileExistsError):
    """A report was to be written over a file that is not a report."""


def is_report(path: Path) -> bool:
    """Whether a report may replace the file: it is one, or it is empty."""
    with open(path, "rb") as file:
        head = file.read(_LOOK_AT)
    return not head or MARKER.encode() in head or head.startswith(_CSV_HEAD.encode())


def check(path: str | os.PathLike[str], overwrite: bool = False) -> Path:
    """Whether :func:`write` would refuse, found out beforehand; raises as it would."""
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; name a file in it")
    if target.is_file() and not overwrite and not is_report(target):
        raise NotAReportError(f"{target} exists and is not a gemsmode report; choose another name, or replace it: overwrite=True, --force")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} to")
    return target


def write(path: str | os.PathLike[str], text: str, overwrite: bool = False) -> Path:
    """Write ``text``, a report, to ``path``.

    Args:
        path: where; its folder must exist.
        text: a report in any format.
        overwrite: replace whatever is there.

    Raises:
        NotAReportError: a file that is not a report is there and ``overwrite`` is not set.
        OSError: it cannot be written.
    """
    target = check(path, overwrite)
    if target.exists() and not target.is_file():  # /dev/stdout and the like
        target.write_text(text, encoding="utf-8")
        return target
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise
    return target
