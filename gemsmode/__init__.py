"""gemsmode: an interception layer for PyTorch.

``with GemsMode():`` around an unchanged model runs Triton kernels in place of aten ops, and can say what it replaced,
what it did not, why, and what each call cost.
"""

import importlib
import logging
from typing import Any

from gemsmode.errors import (
    CaptureError,
    DryRunError,
    DuplicateRuleError,
    GemsError,
    MismatchError,
    MismatchWarning,
    RuleDeclarationError,
    RuleFailedError,
    UnknownOpError,
)
from gemsmode.explain import Explanation, explain
from gemsmode.graphs import Captured, capture
from gemsmode.mode import GemsMode, disable, enable, load_ops
from gemsmode.patching import patch, unpatch
from gemsmode.predicates import Predicate, contiguous, device, dtype, floating, ndim, not_complex, numel, on_gpu, value, where
from gemsmode.registry import Registry, Rule, rule
from gemsmode.signature import Call, TensorMeta
from gemsmode.target import choose_interpreter_early

__version__ = "0.1.0"

__all__ = [
    "Call", "CaptureError", "Captured", "DryRunError", "DuplicateRuleError", "Explanation", "GemsError", "GemsMode",
    "MismatchError", "MismatchWarning", "Predicate", "Registry", "Rule", "RuleDeclarationError", "RuleFailedError",
    "TensorMeta", "UnknownOpError", "capture", "contiguous", "device", "disable", "dtype", "enable", "explain", "floating",
    "load_ops", "ndim", "not_complex", "numel", "on_gpu", "patch", "rule", "unpatch", "value", "where",
]


def __getattr__(name: str) -> Any:
    """``gemsmode.ops`` and ``gemsmode.nn`` on first use: importing them chooses between GPU and interpreter."""
    if name in ("ops", "nn"):
        load_ops()
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


logging.getLogger(__name__).addHandler(logging.NullHandler())
choose_interpreter_early()
