"""The mistakes a user can make, one class each; every message says what was expected, what came and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class GemsError(Exception):
    """Base class of every error gemsmode raises itself."""


class UnknownOpError(GemsError, ValueError):
    """A name that selects nothing; ``near`` is what is compared with the ``known`` names, if not ``name`` itself."""

    def __init__(self, name: str, known: Iterable[str], what: str = "op", near: str | None = None) -> None:
        close = difflib.get_close_matches(near or name, sorted(known), n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(repr(c) for c in close)}?" if close else "`gemsmode ops` lists what is registered."
        super().__init__(f"{name!r} is not a known {what}; {hint}")


class DuplicateRuleError(GemsError, ValueError):
    """Two rules of one name, or of one priority, for the same op."""


class RuleFailedError(GemsError, RuntimeError):
    """A rule raised while it was being planned or launched, and ``strict=True`` asked not to fall back."""


class RuleDeclarationError(GemsError, TypeError):
    """A rule that cannot be registered as written."""


class MismatchError(GemsError, AssertionError):
    """A rule's result is not PyTorch's own, and ``on_mismatch="raise"`` asked to stop there; ``mismatch`` says all about it."""

    def __init__(self, mismatch: Any) -> None:
        super().__init__(str(mismatch))
        self.mismatch = mismatch


class MismatchWarning(UserWarning):
    """A rule's result is not PyTorch's own."""


class DryRunError(GemsError, RuntimeError):
    """What a dry run cannot do on this machine."""


class CaptureError(GemsError, RuntimeError):
    """What :func:`gemsmode.capture` cannot put into a CUDA graph."""
