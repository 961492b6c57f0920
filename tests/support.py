"""What the tests of the core share: a registry whose rules write down each call, and a look at a mode's decisions."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemsmode import GemsMode, Registry, registry, rule
from gemsmode.handlers import Decided, Decision, Policy
from gemsmode.registry import find_op


class Spy:
    """A registry with simple rules that do what PyTorch does and write down who called them.

    Attributes:
        registry: give it to a mode.
        calls: the names of the ops that ran here, in order.
        threads: the thread of each call.
    """

    def __init__(self, *ops: str) -> None:
        self.registry = Registry("spy")
        self.calls: list[str] = []
        self.threads: list[int] = []
        for name in ops:
            self._add(name)

    def _add(self, name: str) -> None:
        op = find_op(name)

        @rule(op, name=f"spy {name}", registry=self.registry, numbers=True)
        def spied(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            self.threads.append(threading.get_ident())
            return op(*args, **kwargs)

    def take(self) -> list[str]:
        """The calls since the last time."""
        calls, self.calls[:] = list(self.calls), []
        return calls


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers where tensors are made by default, the same on every device: drawn on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cpu").to(device=torch.get_default_device(), dtype=dtype)


class Counting(TorchDispatchMode):
    """An ordinary dispatch mode that counts the overloads it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def in_order(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call as its schema states them, all of them."""
    given = {a.name: value for a, value in zip(op._schema.arguments, args)} | kwargs
    return tuple(given.get(a.name, a.default_value if a.has_default_value() else None) for a in op._schema.arguments)


def decided(mode: GemsMode, name: str, *args: Any, **kwargs: Any) -> Decided:
    """What ``mode`` does for ``name(*args, **kwargs)``, with the function that does it."""
    op = find_op(name)
    return mode.policy.handler(op).lookup(in_order(op, args, kwargs))


def decision(mode: GemsMode, name: str, *args: Any, **kwargs: Any) -> Decision:
    """What ``mode`` decides for ``name(*args, **kwargs)``."""
    return decided(mode, name, *args, **kwargs).decision


def run(name: str, *args: Any) -> Any:
    """The result of a call, which must be a rule's."""
    op = find_op(name)
    given = in_order(op, args, {})
    found = Policy(registry.default, strict=True).handler(op).lookup(given)
    assert found.decision.kind == "rule", found.decision.reason
    return found.run(*given)


def check_results(name: str, args: tuple[Any, ...], wanted: Sequence[bool]) -> None:
    """A rule's results of a call are PyTorch's or near float64, as far as they are ``wanted``: others may be left unwritten."""
    import harness

    op = find_op(name)

    def of_interest(*given: Any) -> list[Any]:
        return [result for result, want in zip(op(*given), wanted, strict=True) if want]

    native, exact = harness.quietly(of_interest, *args), harness.reference(lambda given: of_interest(*given), args)
    outcome = harness.under_mode(of_interest, *args)
    assert outcome.intercepted([op]), outcome.calls
    harness.compare(harness.label(op, args), outcome.result, native, exact)


def reason(name: str, *args: Any) -> str:
    """Why a call passes through."""
    op = find_op(name)
    found = Policy(registry.default).handler(op).lookup(in_order(op, args, {})).decision
    assert found.kind == "pass", found
    return found.reason or ""


def stack() -> list[Any]:
    """This thread's dispatch modes, from the bottom."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return list(_get_current_dispatch_mode_stack())


def skip_compiling_for_a_gpu_that_is_present() -> None:
    """Skip a test of what is compiled for GPUs: machines without one run it, and on a GPU the other tests compile and launch."""
    import harness
    import pytest

    if harness.OPTIONS.device != "cpu":
        pytest.skip("compiled where no GPU is present")


needs_cuda = "needs a GPU: run with --device cuda"


def skip_without_cuda(device: str, gpus: int = 1) -> None:
    """Skip the test unless kernels run on a GPU (and on enough of them)."""
    import pytest

    if device != "cuda":
        pytest.skip(needs_cuda)
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs; PyTorch sees {torch.cuda.device_count()}")


def skip_in_company(device: str) -> None:
    """Skip a test of time on a GPU that other workers use at the same moment."""
    import pytest

    if device != "cpu" and "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("measures time on a GPU, which it must have to itself: run it without -n")
