"""What the tests of ops on images share: layouts of an input, and a call compared with PyTorch's and with float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import harness
import torch

from gemsmode.registry import find_op


def layouts(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """``x`` in the layouts that matter: contiguous, channels last, every other column of a wider one, transposed."""
    yield "contiguous", x
    if x.dim() in (4, 5):
        yield "channels_last", x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    wide = torch.zeros([*x.shape[:-1], 2 * x.shape[-1]], dtype=x.dtype, device=x.device)
    wide[..., ::2] = x
    yield "sliced", wide[..., ::2]
    yield "transposed", x.transpose(-1, -2).contiguous().transpose(-1, -2)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers where kernels run, the same in each run."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype).to(harness.OPTIONS.device)


def exactly(call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The call in float64, on the CPU: PyTorch's kernels for GPUs forget the padding in the backward of average pools over
    channels-last images, and take the indices of max pools to be contiguous."""
    if harness.OPTIONS.device == "cpu":
        return harness.reference(lambda given: call(*given), args)
    given = harness.in_float64(args, "cpu")
    try:
        return None if given is None else harness.quietly(lambda: call(*given))
    except Exception:  # what only a GPU has
        return None


def check(op: str, *args: Any, function: Callable[..., Any] | None = None, values: bool = True) -> Any:
    """``function`` (the op itself by default) under the mode: ``op`` ran a rule, and its results are PyTorch's.

    PyTorch's own results are compared in dtype, shape and strides; values must be near them or near those of float64.
    """
    overload = find_op(f"aten.{op}" if "." in op else f"aten.{op}.default")
    call = function or overload
    native = harness.quietly(lambda: call(*args))
    exact = exactly(call, args)
    outcome = harness.under_mode(call, *args)
    reasons = [f"{name}: {decision.reason}" for name, decision in outcome.calls]
    assert outcome.intercepted([overload]), f"{op} was not served: {reasons}"
    harness.compare(op, outcome.result, native, exact, values=values)
    return outcome.result


def refuse(function: Callable[[], Any]) -> None:
    """PyTorch rejects the call, and under the mode its own error is seen."""
    errors = []
    for run in (function, lambda: harness.under_mode(function)):
        try:
            run()
        except Exception as error:
            errors.append(error)
    assert len(errors) == 2, f"{len(errors)} of two calls were rejected"
    assert type(errors[0]) is type(errors[1]) and str(errors[0]) == str(errors[1])


def passes(op: str, *args: Any, reason: str) -> None:
    """The call passes through for a reason that says ``reason``."""
    overload = find_op(f"aten.{op}.default")
    outcome = harness.under_mode(overload, *args)
    [decision] = [d for name, d in outcome.calls if name is overload]
    text = f"{decision.reason} {decision.considered}"
    assert decision.kind == "pass" and reason in text, text
