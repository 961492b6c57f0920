"""What the generated tests share: tolerances, references, samples, counts of what was intercepted.

Samples come from PyTorch's own OpInfo database. Under an ordinary dispatch mode each OpInfo tells which aten ops it
reaches (:func:`reach`), and the calls it makes are templates (:func:`templates`) from which calls of every overload,
memory layout and special value are made, so that a newly registered op is tested without a line of its own.

A result is right if PyTorch's metadata is met exactly and each value is close to PyTorch's own or to a float64
reference: being more exact than PyTorch is no error, being far from both is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import random
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import gemsmode
from gemsmode import registry
from gemsmode.handlers import Decision
from gemsmode.native import is_composite
from gemsmode.registry import Candidate, functional_name, short_name
from gemsmode.signature import Variant, parameters, variant_of

# -- options of the run ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Options:
    """How this run of pytest was asked to be.

    Attributes:
        device: ``"cpu"`` (Triton's interpreter) or ``"cuda"``.
        ref: ``"cpu"`` computes float64 references on the CPU, ``"device"`` on ``device``.
        full: every sample of every dtype instead of a few of each.
        brief: one or two samples of each op, in two dtypes: what a default run in the interpreter has time for.
    """

    device: str = "cpu"
    ref: str = "device"
    full: bool = False
    brief: bool = False


OPTIONS = Options()
"""Set by ``conftest.py`` before tests are collected."""


# -- tolerances --------------------------------------------------------------------------------------------------------


class Tolerance(NamedTuple):
    """``|got - expected| <= absolute * max(1, scale) + relative * |expected|``; scale: the largest expected magnitude
    for results that sum up terms, else 1."""

    relative: float
    absolute: float
    scaled: bool = False


TOLERANCES: dict[str, dict[torch.dtype, Tolerance]] = {
    # one element of each operand in, one out: within a few units in the last place
    "pointwise": {
        torch.float64: Tolerance(1e-12, 1e-14),
        torch.float32: Tolerance(4e-6, 1e-7),
        torch.bfloat16: Tolerance(1.6e-2, 1e-5),
        torch.float16: Tolerance(2e-3, 1e-5),
    },
    # a few terms that may cancel: the error is relative to the largest
    "combination": {
        torch.float64: Tolerance(1e-12, 1e-14, True),
        torch.float32: Tolerance(4e-6, 2e-7, True),
        torch.bfloat16: Tolerance(1.6e-2, 4e-3, True),
        torch.float16: Tolerance(2e-3, 5e-4, True),
    },
    # gradients that PyTorch computes by formulas which lose digits, its own among them
    "amplified": {
        torch.float64: Tolerance(1e-8, 1e-9, True),
        torch.float32: Tolerance(1e-2, 1e-3, True),
        torch.bfloat16: Tolerance(2e-1, 5e-2, True),
        torch.float16: Tolerance(5e-2, 1e-2, True),
    },
    # functions that PyTorch itself computes to fewer digits than their dtype has
    "approximate": {
        torch.float64: Tolerance(4e-6, 4e-6),
        torch.float32: Tolerance(1e-5, 4e-6),
        torch.bfloat16: Tolerance(1.6e-2, 1e-5),
        torch.float16: Tolerance(2e-3, 1e-5),
    },
    # softmax of products of products: differences of sums over whole rows, which are larger than the results
    "attention": {
        torch.float64: Tolerance(1e-10, 1e-11, True),
        torch.float32: Tolerance(2e-5, 1e-5, True),
        torch.bfloat16: Tolerance(1.6e-2, 1.6e-2, True),
        torch.float16: Tolerance(3e-3, 3e-3, True),
    },
    # sums of many terms: the error is relative to the terms, not to a sum that may cancel
    "reduction": {
        torch.float64: Tolerance(1e-10, 1e-11, True),
        torch.float32: Tolerance(2e-5, 1e-6, True),
        torch.bfloat16: Tolerance(1.6e-2, 1.6e-2, True),
        torch.float16: Tolerance(3e-3, 3e-3, True),
    },
}
"""By kind and dtype of the result; other dtypes must be equal."""


def kind_of(op: OpOverload) -> str:
    """The kind of tolerance for ``op``."""
    candidates = served().get(op, ())
    if "attention" in _packet(op):
        return "attention"
    if _packet(op) in APPROXIMATE:
        return "approximate"
    if not candidates or not all(c.rule.family in ("pointwise", "copy") for c in candidates):
        return "reduction"
    bases = [c.variant.base if c.variant is not None else op for c in candidates]
    several = any(len(pointwise_bases()[b].functions[0].arg_names) > 2 for b in bases if b in pointwise_bases())
    return "combination" if several or _packet(op) in NEAR_ROOTS else "pointwise"


APPROXIMATE = {"special_airy_ai", "special_bessel_j0", "special_bessel_j1", "special_bessel_y0", "special_bessel_y1", "polygamma",
               "polygamma_", "igamma", "igamma_", "igammac", "igammac_"}
"""Functions that PyTorch computes to 6 to 10 digits in float64; test_special compares them with 40."""

AMPLIFIED: dict[str, str] = {
    "logcumsumexp": "the gradient is a difference of exponentials of sums of logarithms",
}
"""OpInfos whose gradients lose digits, whoever computes the steps, and why."""

NEAR_ROOTS = {"digamma", "lgamma", "special_entr", "special_log_ndtr", "log1p", "erfinv", "mvlgamma", "mvlgamma_",
              "special_hermite_polynomial_h", "special_hermite_polynomial_he", "special_laguerre_polynomial_l",
              "special_legendre_polynomial_p",
              *(f"special_{shift}chebyshev_polynomial_{kind}" for shift in ("", "shifted_") for kind in "tuvw")}
"""Functions with roots elsewhere than at 0, next to which no implementation keeps its relative error."""


# -- comparison --------------------------------------------------------------------------------------------------------


class Mismatch(AssertionError):
    """A result that is wrong; the text names the tensor, the error and the coordinates."""


def _close(got: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> torch.Tensor:
    """Elementwise closeness, computed in float64; NaN is close to NaN, infinities to themselves."""
    finite = expected[expected.isfinite()].abs()
    scale = max(1.0, float(finite.max())) if tolerance.scaled and finite.numel() else 1.0
    near = (got - expected).abs() <= tolerance.absolute * scale + tolerance.relative * expected.abs()
    return (near & expected.isfinite()) | (got == expected) | (got.isnan() & expected.isnan())


def _coordinates(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    result = []
    for size in reversed(shape):
        flat, i = divmod(flat, size)
        result.append(i)
    return tuple(reversed(result))


def compare_tensor(what: str, got: Any, native: Any, exact: Any, kind: str, *, values: bool = True, strides: bool = True) -> None:
    """Check one result against PyTorch's and a float64 reference (or None).

    Raises:
        Mismatch: dtype, shape or strides differ, or a value is far from both.
    """
    if not isinstance(native, torch.Tensor):
        if isinstance(native, float) and isinstance(got, float):
            got, native = torch.tensor(got, dtype=torch.float64), torch.tensor(native, dtype=torch.float64)
            compare_tensor(what, got, native, None, kind)
        elif got != native:
            raise Mismatch(f"{what}: {got!r}, PyTorch {native!r}")
        return
    if not isinstance(got, torch.Tensor):
        raise Mismatch(f"{what}: {type(got).__name__}, PyTorch a tensor")
    for name in ("dtype", "shape", "device", *(("stride",) if strides and native.layout == torch.strided else ())):
        if name == "stride" and not native.numel() and kind in ("reduction", "attention"):
            continue  # composites of PyTorch give empty results strides that follow from nothing
        mine, theirs = getattr(got, name), getattr(native, name)
        if name == "stride":
            mine, theirs = mine(), theirs()
        if mine != theirs:
            raise Mismatch(f"{what}: {name} {tuple(mine) if name in ('shape', 'stride') else mine}, "
                           f"PyTorch {tuple(theirs) if name in ('shape', 'stride') else theirs} (shape {tuple(native.shape)})")
    if not values or not native.numel():
        return
    got, native = got.detach().resolve_conj().resolve_neg().cpu(), native.detach().resolve_conj().resolve_neg().cpu()
    if native.dtype.is_complex:
        got, native, exact = torch.view_as_real(got), torch.view_as_real(native), None
    table = TOLERANCES[kind]
    if native.dtype in table:
        tolerance = table[native.dtype]
        a, b = got.double(), native.double()
        ok = _close(a, b, tolerance)
        if isinstance(exact, torch.Tensor) and exact.shape == native.shape and exact.dtype == torch.float64:
            exact = exact.detach().cpu()
            ok |= _close(a, exact.to(native.dtype).double(), tolerance) | _close(a, exact, tolerance)
        else:
            exact = None
    else:
        a, b, exact = got, native, None
        ok = got == native if not got.dtype.is_floating_point else (got == native) | (got.isnan() & native.isnan())
    if bool(ok.all()):
        return
    bad = (~ok).flatten().nonzero().flatten()
    at = int(bad[0])
    text = f"{a.flatten()[at].item()}, PyTorch {b.flatten()[at].item()}"
    if exact is not None:
        text += f", float64 {exact.flatten()[at].item()}"
    where = list(_coordinates(at, ok.shape))
    raise Mismatch(f"{what}: {len(bad)} of {ok.numel()} values wrong, the first at {where}: {text} ({native.dtype})")


def compare(what: str, got: Any, native: Any, exact: Any = None, kind: str = "reduction", *, values: bool = True) -> None:
    """Check a call's results, in whatever nesting they come, against PyTorch's and a float64 reference."""
    mine, theirs = tree_leaves(got), tree_leaves(native)
    if len(mine) != len(theirs):
        raise Mismatch(f"{what}: {len(mine)} results, PyTorch {len(theirs)}")
    exacts = tree_leaves(exact) if exact is not None else []
    if len(exacts) != len(theirs):
        exacts = [None] * len(theirs)
    for i, (a, b, e) in enumerate(zip(mine, theirs, exacts)):
        compare_tensor(what if len(mine) == 1 else f"{what}, result {i}", a, b, e, kind, values=values)


# -- references --------------------------------------------------------------------------------------------------------


def in_float64(tree: Any, device: str) -> Any:
    """``tree`` with every floating-point tensor in float64 on ``device``; None if a dtype is asked for in it."""
    leaves, spec = tree_flatten(tree)
    if any(isinstance(x, (torch.dtype, torch.Generator)) or (isinstance(x, torch.Tensor) and x.is_complex()) for x in leaves):
        return None

    def convert(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return torch.device(device) if isinstance(x, torch.device) else x
        # A CPU tensor among a GPU's stays there: what dropout was seeded with is read by the host.
        y = x.detach() if x.device.type == "cpu" else x.detach().to(device)
        y = y.to(torch.float64, copy=True) if y.is_floating_point() else y.clone()
        return y.requires_grad_(x.requires_grad and y.is_floating_point())

    return tree_unflatten([convert(x) for x in leaves], spec)


def reference(function: Callable[..., Any], tree: Any, better: bool = False) -> Any:
    """``function(tree in float64)``, or None where PyTorch cannot; ``better``: it is more exact than PyTorch in float64, too.

    Of float64 itself the CPU's result, where the call runs on a GPU: PyTorch's kernels there have constants of float32 in
    places (the sixth of hardswish).
    """
    dtypes = {x.dtype for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and x.is_floating_point()}
    if not better and (not dtypes or (dtypes == {torch.float64} and OPTIONS.device == "cpu")):
        return None
    converted = in_float64(tree, "cpu" if OPTIONS.ref == "cpu" or dtypes == {torch.float64} else OPTIONS.device)
    if converted is None:
        return None
    try:
        return quietly(function, converted)
    except Exception:
        return None


class GpuLost(BaseException):
    """A call after which the GPU answers no more to this process: no later sample, whoever is asked, can say anything.

    Not an ``Exception``, so that whoever goes on to the next sample when PyTorch raises does not go on here.
    """


def gpu_error() -> str | None:
    """What the GPU answers when it is asked to finish: None if all is well (or kernels do not run on one)."""
    if OPTIONS.device != "cuda" or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def quietly(function: Callable[..., Any], *args: Any, who: str = "PyTorch's own kernels") -> Any:
    """Run ``function`` from a fixed state of all random generators and without PyTorch's warnings.

    Raises:
        GpuLost: its kernels, which are ``who``'s, ended in an error that no later call survives.
    """
    seed()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message="gemsmode: rule .* failed")
            return function(*args)
    finally:
        if (lost := gpu_error()) is not None:
            raise GpuLost(f"{who}: {lost}")


def seed(value: int = 0) -> None:
    torch.default_generator.manual_seed(value)  # torch.manual_seed takes 0.7 ms to tell every kind of device
    if OPTIONS.device == "cuda":
        torch.cuda.manual_seed(value)
    random.seed(value)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(value)


def own_memory(tree: Any, grad: bool = True) -> Any:
    """A copy of ``tree`` whose tensors have memory of their own and the layout (strides, offset) of the originals.

    ``grad=False``: none of them requires a gradient.
    """
    def copied(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if x.layout != torch.strided or x.is_quantized:
            return x.detach().clone().requires_grad_(grad and x.requires_grad)
        y = x.detach()
        storage = y.untyped_storage().clone()
        y = torch.empty(0, dtype=y.dtype, device=y.device).set_(storage, x.storage_offset(), x.shape, x.stride())
        y = torch._neg_view(y) if x.is_neg() else y
        y = y.conj() if x.is_conj() else y
        return y.requires_grad_(grad and x.requires_grad)

    return tree_map(copied, tree)


# -- counting interception ---------------------------------------------------------------------------------------------


class Watcher:
    """A recorder for ``GemsMode`` that keeps each call's op and decision."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Decision]] = []

    def enter(self) -> None:
        """The mode was entered."""

    def leave(self, error: BaseException | None) -> None:
        """The mode was left."""

    def close(self) -> None:
        """The mode ended."""

    def begin(self, *args: Any) -> None:
        return None

    def end(self, token: Any, op: Any, decision: Decision, *args: Any, by_signature: bool = False) -> None:
        self.calls.append((op, decision))


class WatchedMode(gemsmode.GemsMode):
    """A strict mode that can say, of the calls made under it, which ran a rule and why the others did not."""

    def __init__(self, **options: Any) -> None:
        super().__init__(strict=True, **options)
        self.watcher = Watcher()
        self.recorder = self.watcher  # type: ignore[assignment]
        self._prepare()

    def take(self) -> list[tuple[Any, Decision]]:
        """The calls since the last ``take``."""
        calls, self.watcher.calls = self.watcher.calls, []
        return calls


@functools.cache
def watched() -> WatchedMode:
    """The mode that the generated tests run under; decisions are kept from test to test."""
    return WatchedMode()


class Outcome(NamedTuple):
    """What a function under the mode returned, and the calls it made."""

    result: Any
    calls: list[tuple[Any, Decision]]

    def intercepted(self, ops: Iterable[OpOverload] | None = None) -> bool:
        wanted = None if ops is None else set(ops)
        return any(d.kind == "rule" and (wanted is None or op in wanted) for op, d in self.calls)


def under_mode(function: Callable[..., Any], *args: Any) -> Outcome:
    """Run ``function`` under the watched mode from a fixed random state, and count its calls."""
    mode = watched()
    mode.take()

    def run() -> Any:
        with mode:
            return function(*args)

    return Outcome(quietly(run, who="under the mode"), mode.take())


@dataclasses.dataclass
class Tally:
    """Samples of one op: compared after a rule ran, or passed through, by reason."""

    compared: int = 0
    passed: Counter[str] = dataclasses.field(default_factory=Counter)


TALLIES: dict[str, Tally] = defaultdict(Tally)
"""By overload's short name; printed at the end of a run."""

KERNELS: list[dict[str, Any]] = []
"""Rows of ``test_compile``: what each kernel compiled to; printed at the end of a run."""


def tally(calls: Iterable[tuple[Any, Decision]]) -> None:
    """Count one sample for each op among ``calls`` that a rule may serve."""
    by_op: dict[Any, list[Decision]] = defaultdict(list)
    for op, decision in calls:
        by_op[op].append(decision)
    for op, decisions in by_op.items():
        if isinstance(op, OpOverload) and op in served():
            entry = TALLIES[short_name(op)]
            if any(d.kind == "rule" for d in decisions):
                entry.compared += 1
            else:
                entry.passed[decisions[0].reason or decisions[0].kind] += 1


def reasons(ops: Iterable[OpOverload]) -> str:
    """Why samples of ``ops`` passed through, in words."""
    lines = []
    for op in ops:
        entry = TALLIES[short_name(op)]
        why = "; ".join(f"{reason} ({count}x)" for reason, count in entry.passed.most_common(4))
        lines.append(f"{short_name(op)}: {why or 'never called'}")
    return "\n  ".join(lines)


class Failures:
    """Collects the failures of a test's samples, so that one run shows them all."""

    def __init__(self, limit: int = 8) -> None:
        self.texts: list[str] = []
        self.limit = limit

    def check(self, label: str, function: Callable[[], None]) -> None:
        try:
            function()
        except GpuLost as lost:
            raise GpuLost("\n".join([f"{label}: {lost}", *self.texts])) from lost
        except Exception as error:
            text = str(error).strip() or type(error).__name__
            name = "" if isinstance(error, Mismatch) else f"{type(error).__name__}: "
            self.texts.append(f"{label}: {name}{text[:600]}")

    def done(self) -> None:
        if self.texts:
            more = f"\n... and {len(self.texts) - self.limit} more" if len(self.texts) > self.limit else ""
            raise AssertionError(f"{len(self.texts)} samples failed\n" + "\n".join(self.texts[:self.limit]) + more)


# -- what is served ----------------------------------------------------------------------------------------------------


@functools.cache
def served() -> dict[OpOverload, tuple[Candidate, ...]]:
    """Every overload of aten that a rule of gemsmode's own may serve. (Fused ops, which PyTorch does not have, are in test_fused.)"""
    gemsmode.load_ops()
    return {op: candidates for op, candidates in registry.default.overloads().items() if op.namespace == "aten"}


def bases() -> dict[OpOverload, None]:
    """The overloads that rules were declared for, without derived ones."""
    return {op: None for op, candidates in served().items() if any(c.variant is None for c in candidates)}


def is_random(op: OpOverload) -> bool:
    return torch.Tag.nondeterministic_seeded in op.tags


VALUES_NOT_COMPARED: dict[str, str] = {
    "empty_like": "uninitialized memory", "new_empty": "uninitialized memory", "empty": "uninitialized memory",
    "empty_strided": "uninitialized memory", "new_empty_strided": "uninitialized memory", "empty_permuted": "uninitialized memory",
}
"""Names of aten ops whose results cannot be compared by value, and why. Those that draw random numbers are known by
their tag: where a rule serves one, its stream of numbers is its own and its tests compare distributions."""


# -- OpInfo ------------------------------------------------------------------------------------------------------------

EXACT_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = (*FLOAT_DTYPES, *EXACT_DTYPES, torch.complex64)
"""The dtypes that tests go through, where an OpInfo has them."""

CAPS = {torch.float32: 6, torch.bfloat16: 3, torch.int64: 3, torch.bool: 2, torch.float16: 2, torch.int32: 2}
DEFAULT_CAP = 1
BRIEF_CAPS = {torch.float32: 2}
"""Samples of each op and dtype; ``--full`` takes all."""


def some(dtypes: Sequence[torch.dtype], name: str, count: int = 2) -> list[torch.dtype]:
    """Of ``dtypes`` all, or in a brief run the first and others that depend on ``name`` only."""
    if not OPTIONS.brief or len(dtypes) < 2:
        return list(dtypes)
    start = zlib.crc32(name.encode())
    return [dtypes[0], *(dtypes[1 + (start + i) % (len(dtypes) - 1)] for i in range(min(count, len(dtypes)) - 1))]

LARGEST = 1 << 14
"""Elements of a sample's largest tensor in a default run."""


@functools.cache
def opinfos() -> dict[str, Any]:
    """PyTorch's OpInfos by name, variant included."""
    from torch.testing._internal import common_methods_invocations as database

    foreach = [info for name in sorted(vars(database)) if name.startswith("foreach_") and name.endswith("_op_db")
               for info in getattr(database, name)]
    result: dict[str, Any] = {}
    for info in (*database.op_db, *foreach):
        name = info.formatted_name
        while name in result:
            name += "_"
        result[name] = info
    return result


def all_samples(info: Any, dtype: torch.dtype, grad: bool = False) -> Iterator[Any]:
    """``info``'s sample inputs, each from a fixed random state; ends early where the database itself fails.

    Not by way of ``info.sample_inputs``, which looks for a ``unittest`` class through the whole stack of callers: a
    quarter of a second under pytest, and most of the time of a run.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = iter(info.sample_inputs_func(info, OPTIONS.device, dtype, grad))
            while True:
                seed(zlib.crc32(info.formatted_name.encode()))
                yield next(found)
        except Exception:  # at its end, too
            return


def elements(tree: Any) -> int:
    return max((x.numel() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)), default=0)


def thin(items: Sequence[Any], cap: int | None, size: Callable[[Any], int]) -> list[Any]:
    """At most ``cap`` of ``items`` in a default run, spread evenly over those that are not large."""
    if OPTIONS.full or cap is None:
        return list(items)
    small = [x for x in items if size(x) <= LARGEST]
    if len(small) <= cap:
        return small
    return [small[i * len(small) // cap] for i in range(cap)]


def samples(info: Any, dtype: torch.dtype, grad: bool = False, cap: int | None = None) -> list[Any]:
    """The samples that this run takes of ``info`` in ``dtype``."""
    limit = (BRIEF_CAPS if OPTIONS.brief else CAPS).get(dtype, DEFAULT_CAP)
    limit = limit if cap is None else min(cap, limit)
    most = None if OPTIONS.full else 12 if OPTIONS.brief else 60
    return thin(list(itertools.islice(all_samples(info, dtype, grad), most)), limit, lambda s: elements((s.input, s.args, s.kwargs)))


def spread(info: Any, dtype: torch.dtype, grad: bool, count: int) -> list[Any]:
    """``count`` of the first 40 samples of ``info``, the first one and others evenly from all of them."""
    found = list(itertools.islice(all_samples(info, dtype, grad), 40))
    return found if len(found) <= count else [found[i * len(found) // count] for i in range(count)]


def dtypes_of(info: Any, grad: bool = False) -> list[torch.dtype]:
    supported = info.supported_backward_dtypes(OPTIONS.device) if grad else info.supported_dtypes(OPTIONS.device)
    wanted = DTYPES if not grad else FLOAT_DTYPES
    if grad and not OPTIONS.full:
        wanted = (torch.float32, torch.bfloat16)
    wanted = [d for d in wanted if d in supported]
    return wanted[:1] if grad and OPTIONS.brief else some(wanted, info.name)


def scan_dtype(info: Any) -> torch.dtype | None:
    supported = info.supported_dtypes(OPTIONS.device)
    return next((d for d in (torch.float32, torch.int64, torch.bool) if d in supported), None)


class _Ordinary(TorchDispatchMode):
    """A dispatch mode, without the wrapper around each call that keeps compiled code out."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Names(_Ordinary):
    """An ordinary dispatch mode, which notes the ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func)
        return func(*args, **(kwargs or {}))


def differentiable(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and x.requires_grad]


def gradients(outputs: Any, inputs: Sequence[torch.Tensor]) -> tuple[Any, ...]:
    """The gradients of ``inputs`` for gradients of the outputs that are the same for every run and precision."""
    outs = differentiable(outputs)
    if not outs:
        return ()
    grads = []
    for i, out in enumerate(outs):
        steps = torch.arange(out.numel(), dtype=torch.float64, device=out.device).reshape(out.shape)
        wave = torch.cos(steps * 0.7 + i) + 0.25
        # Halves of small integers, which every dtype represents.
        grads.append(((wave * 4).round() / 4).to(out.dtype) if not out.dtype.is_complex else (wave * 4).round().to(out.dtype) / 4)
    return torch.autograd.grad(outs, inputs, grads, allow_unused=True)


class Reach(NamedTuple):
    """The aten ops that an OpInfo's calls arrive as: with autograd forward and backward, and under inference mode."""

    forward: frozenset[Any]
    backward: frozenset[Any]
    inference: frozenset[Any]


@functools.cache
def reach() -> dict[str, Reach]:
    """What each OpInfo reaches, found by running its first samples (about ten seconds)."""
    return {name: found for name, info in opinfos().items() if (found := _reach_of(info)) is not None}


def _reach_of(info: Any) -> Reach | None:
    dtype = scan_dtype(info)
    if dtype is None:
        return None
    grad = bool(info.supports_autograd and dtype.is_floating_point)
    forward, backward, inference = Names(), Names(), Names()

    def with_autograd(sample: Any) -> None:
        with forward:
            out = info(sample.input, *sample.args, **sample.kwargs)
        inputs = differentiable((sample.input, sample.args, sample.kwargs)) if grad else []
        if inputs:
            with backward:
                gradients(out, inputs)

    def without(sample: Any) -> None:
        with torch.inference_mode(), inference:
            info(sample.input, *sample.args, **sample.kwargs)

    for sample in spread(info, dtype, grad, 6):
        for part in (with_autograd, without):
            with contextlib.suppress(Exception):
                quietly(part, sample)
    return Reach(frozenset(forward.seen), frozenset(backward.seen), frozenset(inference.seen - forward.seen))


def _packet(op: Any) -> str:
    return functional_name(op._schema.name.partition("::")[2]) if isinstance(op, OpOverload) else str(op)


@dataclasses.dataclass(frozen=True)
class Case:
    """An OpInfo to be run, and the served ops for whose sake it is run."""

    name: str
    targets: tuple[OpOverload, ...]

    @property
    def info(self) -> Any:
        return opinfos()[self.name]

    def __str__(self) -> str:
        return self.name


@functools.cache
def cases(part: str) -> tuple[Case, ...]:
    """The OpInfos to run for ``part`` of :class:`Reach`.

    Those of the served ops themselves, and for a served op without one, the two that reach it with the fewest other
    ops. ``--full`` runs every OpInfo that reaches any served op.
    """
    known = served()
    hits = {name: frozenset(op for op in getattr(r, part) if op in known) for name, r in reach().items()}
    hits = {name: ops for name, ops in hits.items() if ops}
    chosen: dict[str, set[OpOverload]] = defaultdict(set)
    covered: set[OpOverload] = set()
    for name, ops in hits.items():
        info = opinfos()[name]
        own = {functional_name(n.rpartition(".")[2]).strip("_") for n in (info.name, info.aten_name)}
        direct = {op for op in ops if _packet(op).strip("_") in own}
        if part == "backward" and any(op in known and _packet(op).strip("_") in own for op in reach()[name].forward):
            direct = set(ops)
        if direct:
            chosen[name] |= direct
            covered |= direct
    for op in sorted({op for ops in hits.values() for op in ops} - covered, key=str):
        reaching = sorted((n for n in hits if op in hits[n]), key=lambda n: (len(getattr(reach()[n], part)), n))
        for name in reaching[:2]:
            chosen[name].add(op)
    if OPTIONS.full:
        for name, ops in hits.items():
            chosen[name] |= ops
    return tuple(Case(name, tuple(sorted(ops, key=str))) for name, ops in sorted(chosen.items()))


# -- templates: calls of one aten op -----------------------------------------------------------------------------------


class Template(NamedTuple):
    """The arguments of one call, all of them in the order of the op's schema."""

    args: tuple[Any, ...]
    origin: str


def in_order(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments of a call in the order of the schema, defaults filled in."""
    result = []
    for i, p in enumerate(parameters(op)):
        result.append(args[i] if i < len(args) else kwargs.get(p.name, p.default))
    return tuple(result)


def call_op(op: OpOverload, args: Sequence[Any]) -> Any:
    """Call ``op`` with all its arguments, given in order; composites without autograd, or they would not reach a mode."""
    if op in _formulas() and OPTIONS.device == "cpu" and not torch.utils._python_dispatch._get_current_dispatch_mode_stack():
        return _formulas()[op](*args)
    if is_composite(op) and not torch.is_inference_mode_enabled():
        with torch.inference_mode():
            return call_op(op, args)
    declared = parameters(op)
    positional = [a for p, a in zip(declared, args) if not p.kwarg_only]
    return op(*positional, **{p.name: a for p, a in zip(declared, args) if p.kwarg_only})


@functools.cache
def _formulas() -> dict[OpOverload, Callable[..., torch.Tensor]]:
    """What ops compute of which PyTorch has a kernel for GPUs only: what is expected where there is none."""
    def masked_scale(x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
        return (x.double() * mask * scale).to(x.dtype)

    return {torch.ops.aten._masked_scale.default: masked_scale,
            torch.ops.aten._masked_scale.out: lambda x, mask, scale, out: out.copy_(masked_scale(x, mask, scale))}


class _CallLog(_Ordinary):
    """Keeps copies of the arguments of calls of the ops that a rule may serve."""

    def __init__(self, origin: str) -> None:
        super().__init__()
        self.calls: dict[Any, list[Template]] = defaultdict(list)
        self.origin = origin

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in served() and not types and len(self.calls[func]) < 60:
            plain = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            if all(type(x) is torch.Tensor and x.layout == torch.strided for x in plain) and elements((args, kwargs)) <= 1 << 16:
                self.calls[func].append(Template(own_memory(in_order(func, args, kwargs), grad=False), self.origin))
        return func(*args, **kwargs)


@functools.lru_cache(maxsize=256)
def logged(name: str, dtype: torch.dtype) -> dict[Any, list[Template]]:
    """The calls of served ops that the OpInfo ``name`` makes in ``dtype``, forward and backward."""
    info = opinfos()[name]
    if dtype not in info.supported_dtypes(OPTIONS.device):
        return {}
    grad = bool(info.supports_autograd and dtype in info.supported_backward_dtypes(OPTIONS.device))
    log = _CallLog(name)
    for sample in spread(info, dtype, grad, 8 if OPTIONS.brief else 24):
        def run(s: Any = sample) -> None:
            with log:
                out = info(s.input, *s.args, **s.kwargs)
                inputs = differentiable((s.input, s.args, s.kwargs)) if grad else []
                if inputs:
                    gradients(out, inputs)
            if name in {c.name for c in cases("inference")}:
                with torch.inference_mode(), log:
                    info(s.input, *s.args, **s.kwargs)

        try:
            quietly(run)
        except Exception:
            continue
    return log.calls


@functools.cache
def _reaching() -> dict[Any, tuple[str, ...]]:
    """For each op, the OpInfos whose calls arrive as it, the most direct first."""
    table: dict[Any, list[str]] = defaultdict(list)
    for name, r in reach().items():
        for op in r.forward | r.backward | r.inference:
            table[op].append(name)

    def rank(op: Any, name: str) -> tuple[bool, int, str]:
        own = opinfos()[name].aten_name.rpartition(".")[2]
        return own != _packet(op), sum(map(len, reach()[name])), name

    return {op: tuple(sorted(names, key=functools.partial(rank, op))) for op, names in table.items()}


def _direct(op: OpOverload, dtype: torch.dtype) -> list[Template]:
    result: list[Template] = []
    for name in _reaching().get(op, ())[:3]:
        result += logged(name, dtype).get(op, [])
    # The OpInfos of as_strided always give an offset, which no rule serves; for those in BY_HAND see there.
    if not result or _packet(op).startswith("as_strided_") or short_name(op) in BY_HAND:
        result = [Template(args, "by hand") for args in by_hand(op, dtype)] + result
    return result


def by_hand(op: OpOverload, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Calls of ops that no OpInfo reaches, or that none reaches on a GPU: their arguments in the order of the schema."""
    name, packet = short_name(op), _packet(op)
    if packet.startswith("_foreach_") and not any(p.is_out for p in parameters(op)):
        return _foreach_call(op, dtype)
    if packet == "scatter" and name.endswith(("scatter.reduce", "scatter.value_reduce")) and dtype != torch.bool:
        rows = torch.tensor([[0, 2, 1, 4, 3], [1, 0, 2, 3, 4]], device=OPTIONS.device)
        value = 2 if "value" in name else tensor((2, 5), dtype, 40)
        return [(tensor((5, 5), dtype), 0, rows, value, way) for way in ("add", "multiply")]
    if packet == "as_strided_copy" and name == packet:
        return [(tensor((5, 7), dtype), (3, 4), (7, 2), None), (tensor((5, 7), dtype), (2, 2, 2), (1, 1, 1), None)]
    if packet == "as_strided_scatter" and name == packet:
        return [(tensor((5, 7), dtype), tensor((3, 4), dtype, 40), (3, 4), (7, 1), None)]
    made, of_any_dtype = BY_HAND.get(name), ("_unsafe_index", "_unsafe_index_put", "_index_put_impl", "pixel_unshuffle")
    if made is not None and (dtype in FLOAT_DTYPES or packet in of_any_dtype):
        return made(dtype)
    if packet.startswith("_native_batch_norm_legit") and dtype in FLOAT_DTYPES and not any(p.is_out for p in parameters(op)):
        x, of_channels = tensor((4, 3, 5), dtype), [tensor((3,), torch.float32, 20 * i).abs() + 0.5 for i in range(4)]
        choices = {"input": x, "momentum": 0.1, "eps": 1e-5}
        choices |= {n: t.to(dtype) for n, t in zip(("weight", "bias", "running_mean", "running_var"), of_channels)}
        ways = (True,) if "no_stats" in name else (True, False)  # without statistics and not in training PyTorch's own crashes
        return [tuple(choices.get(p.name, training) for p in parameters(op)) for training in ways]
    return []


def _rows() -> torch.Tensor:
    return torch.tensor([2, 0, 4], device=OPTIONS.device)


def _convolutions(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Patches: windows that do not overlap."""
    x, weight = tensor((2, 3, 8, 8), dtype), tensor((16, 3, 4, 4), dtype, 40)
    return [(x, weight, tensor((16,), dtype, 80), [4, 4], [0, 0], [1, 1], False, [0, 0], 1)]


BY_HAND: dict[str, Callable[[torch.dtype], list[tuple[Any, ...]]]] = {
    # no OpInfo reaches these on a GPU in every supported version of PyTorch
    "normal_functional": lambda d: [(tensor((5, 7), d), 0.5, 2.0, None)],
    "_masked_scale": lambda d: [(tensor((5, 7), d), tensor((5, 7), torch.uint8, 3).clamp(max=1), 1.25)],
    "_unsafe_index.Tensor": lambda d: [(tensor((5, 7), d), [_rows()])],
    "_unsafe_index_put": lambda d: [(tensor((5, 7), d), [_rows()], tensor((3, 7), d, 40), False)],
    "_index_put_impl_": lambda d: [(tensor((5, 7), d), [_rows()], tensor((3, 7), d, 40), False, False)],
    "_upsample_bicubic2d_aa_backward": lambda d: [(tensor((2, 3, 4, 5), d), [4, 5], [2, 3, 8, 7], False, None, None)],
    # OpInfos may reach these only with calls that no rule serves
    "convolution": _convolutions,
    "pixel_unshuffle": lambda d: [(tensor((2, 3, 4, 6), d), 2)],
    "unfold_backward": lambda d: [(tensor((4, 7, 3), d), [9, 7], 0, 3, 2)],
    "_foreach_norm.Scalar": lambda d: [([tensor(s, d, i) for i, s in enumerate(((5, 7), (3,)))], order, None) for order in (2, 1)],
}
"""Calls by the op's short name, which come before those of OpInfos."""


def _foreach_call(op: OpOverload, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """A call on three tensors; numbers that suit every dtype."""
    args: list[Any] = []
    for i, p in enumerate(parameters(op)):
        if p.type == "List[Tensor]":
            args.append([tensor(shape, dtype, 17 * i + k) for k, shape in enumerate(((5, 7), (3,), (2, 1, 4)))])
        elif p.has_default:
            args.append(p.default)
        elif p.type == "Tensor":
            args.append(torch.tensor(2, device=OPTIONS.device).to(dtype))
        elif p.type in ("List[number]", "number"):
            whole = [True, True, True] if dtype == torch.bool else [2, 3, 1]
            args.append(whole if p.type == "List[number]" else whole[0])
        else:
            return []
    return [tuple(args)]


def _to_base(variant: Variant, template: Template) -> Template:
    return Template(tuple(template.args[i] for i in variant.order), template.origin)


@functools.lru_cache(maxsize=512)
def templates(op: OpOverload, dtype: torch.dtype) -> tuple[Template, ...]:
    """Calls of ``op`` for samples of ``dtype``: its own, else made from calls of the ops it is a variant of or has as
    variants, else (elementwise ops) from its schema."""
    found = _direct(op, dtype)
    if not found:
        for candidate in served()[op]:
            if candidate.variant is not None and (calls := _base_templates(candidate.variant.base, dtype)):
                found = [t for call in calls if (t := as_variant(op, candidate.variant, call)) is not None]
                break
        else:
            if any(c.variant is None for c in served()[op]):
                found = list(_base_templates(op, dtype)) or _from_twin(op, dtype)
    return tuple(found)


def _from_twin(op: OpOverload, dtype: torch.dtype) -> list[Template]:
    """Calls of an in-place or ``out=`` overload made from those of the functional one with the same arguments."""
    if not op._schema.is_mutable:
        return []
    names = [p.name for p in parameters(op) if not p.is_out]
    for overload in registry.aten_overloads().get(_packet(op), ()):
        base = registry.find_op(f"aten.{_packet(op)}.{overload}")
        if base._schema.is_mutable or [p.name for p in parameters(base)] != names:
            continue
        order = tuple(i for i, p in enumerate(parameters(op)) if not p.is_out)
        variant = Variant(base, False, (), (), order)
        found = [t for call in _direct(base, dtype) if (t := as_variant(op, variant, call)) is not None]
        if found:
            return found
    return []


@functools.lru_cache(maxsize=512)
def _base_templates(base: OpOverload, dtype: torch.dtype) -> tuple[Template, ...]:
    found = _direct(base, dtype)
    if not found:
        for op in served():
            if _packet(op) == _packet(base) and (variant := variant_of(op, base)) is not None and not variant.numbers:
                found = [_to_base(variant, t) for t in _direct(op, dtype)]
                if found:
                    break
    if not found and base in pointwise_bases():
        found = [Template(args, "schema") for args in from_schema(base, dtype, (5, 7))]
    return tuple(found)


@functools.cache
def pointwise_bases() -> dict[OpOverload, Any]:
    """The overloads that pointwise declarations are for, with the declaration."""
    served()
    from gemsmode.ops.pointwise import declarations

    return {registry.find_op(d.op): d for d in declarations}


def promoted_dtypes(op: OpOverload) -> frozenset[torch.dtype]:
    """The promoted dtypes that the declarations behind a pointwise ``op`` take."""
    bases = [op, *(c.variant.base for c in served().get(op, ()) if c.variant is not None)]
    return frozenset(d for b in bases if b in pointwise_bases() for d in pointwise_bases()[b].dtypes)


_NUMBERS = {"number": 2, "float": 0.5, "int": 1, "SymInt": 1, "bool": False, "str": "none"}


def from_schema(op: OpOverload, dtype: torch.dtype, shape: tuple[int, ...]) -> list[tuple[Any, ...]]:
    """A call of an elementwise ``op`` on tensors of ``shape``, other arguments at their defaults or at plain values."""
    args: list[Any] = []
    for i, p in enumerate(parameters(op)):
        kind = p.type.removeprefix("Optional[").removesuffix("]")
        if kind == "Tensor" and not (p.has_default and p.default is None):
            args.append(tensor(shape, dtype, 17 * i))
        elif p.has_default:
            args.append(p.default)
        elif kind in _NUMBERS:
            args.append(None if p.type.startswith("Optional[") else _NUMBERS[kind])
        else:
            return []
    return [tuple(args)]


def tensor(shape: Sequence[int], dtype: torch.dtype, start: int = 0) -> torch.Tensor:
    """A tensor with assorted values that are the same on every run."""
    n = math.prod(shape)
    steps = torch.arange(start, start + n, dtype=torch.float64)
    values = torch.sin(steps * 1.7) * 3.3
    if dtype == torch.bool:
        values = (steps * 0.618) % 1 > 0.5
    elif not dtype.is_floating_point and not dtype.is_complex:
        values = (values * 4).round()
        if dtype == torch.uint8:
            values = values.abs()
    return values.to(dtype).reshape(tuple(shape)).to(OPTIONS.device)


def as_variant(op: OpOverload, variant: Variant, call: Template) -> Template | None:
    """A call of ``op`` that means what ``call`` of its functional base means; None if there is none."""
    base_args = own_memory(call.args)
    args: list[Any] = [None] * len(parameters(op))
    for base_position, position in enumerate(variant.order):
        value = base_args[base_position]
        if position in variant.numbers and isinstance(value, torch.Tensor):
            if not value.numel() or value.dtype.is_complex:
                return None
            value = value.flatten()[0].item()
        args[position] = value
    for i, p in enumerate(parameters(op)):
        if not p.is_out and i not in variant.order:
            args[i] = p.default
    outs = [i for i, p in enumerate(parameters(op)) if p.is_out]
    if outs:
        try:
            results = quietly(call_op, variant.base, own_memory(call.args))
        except NotImplementedError:  # no kernel for a GPU: only metadata is wanted, which the CPU's has, too
            if OPTIONS.device == "cpu":
                return None
            results = tree_map(lambda x: x.cpu() if isinstance(x, torch.Tensor) else x, own_memory(call.args))
            try:
                results = quietly(call_op, variant.base, results)
            except Exception:
                return None
            results = tree_map(lambda x: x.to(OPTIONS.device) if isinstance(x, torch.Tensor) else x, results)
        except Exception:
            return None
        several = isinstance(results, tuple) or (isinstance(results, list) and len(outs) > 1)
        for i, result in zip(outs, results if several else (results,)):
            if not all(isinstance(r, torch.Tensor) for r in tree_leaves(result)):
                return None
            args[i] = tree_map(lambda r: torch.empty_like(r).fill_(1), result)
    return Template(tuple(args), call.origin)


def written(op: OpOverload) -> list[int]:
    """Positions of the arguments that ``op`` writes to."""
    return [i for i, p in enumerate(parameters(op)) if p.is_written or p.is_out]


RUNNING_STATISTICS = {"native_batch_norm", "cudnn_batch_norm"}
"""Ops whose schema does not say that they write to ``running_mean`` and ``running_var``."""


def written_unsaid(op: OpOverload) -> list[int]:
    """Positions of the arguments that ``op`` writes to though its schema calls it functional."""
    names = ("running_mean", "running_var") if _packet(op) in RUNNING_STATISTICS else ()
    return [i for i, p in enumerate(parameters(op)) if p.name in names]


# -- running one call both ways ----------------------------------------------------------------------------------------


def label(op: OpOverload, args: Sequence[Any]) -> str:
    """``add.Tensor(float32[3, 4], 2)``."""
    def text(a: Any) -> str:
        if isinstance(a, torch.Tensor):
            return str(gemsmode.TensorMeta.of(a))
        if isinstance(a, (list, tuple)):
            return "[" + ", ".join(map(text, a)) + "]"
        return repr(a)

    return f"{short_name(op)}({', '.join(map(text, args))})"


def _values_matter(op: OpOverload) -> bool:
    return not is_random(op) and _packet(op) not in VALUES_NOT_COMPARED


NATIVE_CRASHES: dict[str, str] = {
    "cudnn_batch_norm_backward": "PyTorch's own ends the process without the reserve of its forward; test_norm calls both",
    "cudnn_batch_norm_backward.out": "as without out=",
    "cudnn_batch_norm.out": "PyTorch's own fails an assertion of its own where two of its results are empty",
}
"""Overloads whose native kernel must not be called with arguments made up for it, and why."""

TIES = {"sort", "topk", "kthvalue", "median", "nanmedian", "mode"}
"""Ops that return values and where they stood: of equal values PyTorch leaves open which one is meant."""


def ties_open(op: OpOverload, args: Sequence[Any]) -> bool:
    """Whether ``op`` may return other indices than PyTorch does."""
    stable = next((a for p, a in zip(parameters(op), args) if p.name == "stable"), False)
    return _packet(op) in TIES and not stable and len(op._schema.returns) == 2


def how_often(x: torch.Tensor, dim: int, values: torch.Tensor) -> torch.Tensor:
    """How often each of ``values``, the modes along ``dim``, occurs there: of values equally frequent PyTorch leaves open
    which is meant, and on a GPU the dtype and the length decide."""
    if not x.ndim:
        return values
    return (x == (values if values.ndim == x.ndim else values.unsqueeze(dim))).sum(dim)


def _indices_lead_to_values(what: str, op: OpOverload, args: Sequence[Any], result: Any) -> None:
    values, indices = result
    given = {p.name: a for p, a in zip(parameters(op), args)}
    x, dim = given["self"], given.get("dim", -1)
    if not x.ndim or not isinstance(dim, int) or not indices.numel():
        return
    at, expected = (indices, values) if indices.ndim == x.ndim else (indices.unsqueeze(dim), values.unsqueeze(dim))
    compare_tensor(f"{what}, values at the indices", x.gather(dim, at.to(x.device)), expected, None, "pointwise", strides=False)


def results_open(op: OpOverload, args: Sequence[Any]) -> set[int]:
    """The results of a call that PyTorch's kernels leave unwritten or undefined on a GPU, because nobody asked for them."""
    if OPTIONS.device != "cuda":
        return set()
    given = {p.name: a for p, a in zip(parameters(op), args)}
    if _packet(op) == "nll_loss2d_forward" and given["reduction"] == 0:
        return {1}  # the weight of all targets, which only a sum or a mean needs
    if _packet(op) == "_unique2" and given["self"].dtype == torch.bool:
        return {i for i, name in ((1, "return_inverse"), (2, "return_counts")) if not given[name]}
    return set()


CPU_ONLY_ERRORS = ("not implemented for", "ZeroDivisionError", "could not create a primitive")
"""What PyTorch raises on CPU tensors and not on a GPU's, whose behaviour the kernels have."""


def _gelu_backward(grad: torch.Tensor, x: torch.Tensor, approximate: str) -> torch.Tensor:
    if approximate != "none":
        return torch.ops.aten.gelu_backward(grad, x, approximate=approximate)
    return grad * (torch.special.erfc(-x / 2**0.5) / 2 + x * torch.exp(-x * x / 2) / (2 * math.pi) ** 0.5)


def _zeta(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.special.zeta(x.double(), q.double())


BETTER_REFERENCES: dict[str, Callable[..., Any]] = {"gelu_backward": _gelu_backward, "special_zeta": _zeta}
"""By overload: what computes a float64 reference where PyTorch's own formula cancels in float64, too, or where integers
lead to a float32 that PyTorch computes as inf * 0."""


def _exact(op: OpOverload, args: tuple[Any, ...]) -> Any:
    """A float64 reference of a call; of an ``out=`` overload, that of its functional base."""
    if (better := BETTER_REFERENCES.get(short_name(op))) is not None:
        return reference(lambda a: better(*a), args, better=True)
    if not any(p.is_out for p in parameters(op)):
        return reference(lambda a: call_op(op, a), args)
    for candidate in served().get(op, ()):
        if candidate.variant is not None:
            base = candidate.variant.base
            inputs = tuple(args[i] for i in candidate.variant.order)
            return reference(functools.partial(call_op, base), inputs)
    return None


def check_call(op: OpOverload, args: tuple[Any, ...], kind: str | None = None, given: tuple[Any, ...] | None = None) -> bool:
    """Run ``op`` on copies of ``args`` natively and under the mode and compare results and written arguments.

    Where PyTorch raises, the mode must raise the same class of error. ``given``: the same values laid out otherwise, for
    PyTorch's own kernels that cannot take ``args``.

    Returns:
        Whether a rule ran.
    """
    native_args, own_args = own_memory(args if given is None else given), own_memory(args)
    kind = kind or kind_of(op)
    where = label(op, args)
    try:
        expected = quietly(call_op, op, native_args)
    except Exception as error:
        if any(text in str(error) for text in CPU_ONLY_ERRORS) and OPTIONS.device == "cpu":
            return False
        if OPTIONS.device != "cpu" and isinstance(error, NotImplementedError):
            return _check_where_native_has_no_kernel(op, args, kind, where)
        try:
            outcome = under_mode(call_op, op, own_args)
        except Exception as mine:
            if type(mine) is not type(error):
                raise Mismatch(f"{where}: {type(mine).__name__}: {mine}; PyTorch raises {type(error).__name__}: {error}") from mine
            return False
        raise Mismatch(f"{where}: no error ({outcome.calls}); PyTorch raises {type(error).__name__}: {error}") from None
    outcome = under_mode(call_op, op, own_args)
    tally(outcome.calls)
    positions, unsaid = written(op), written_unsaid(op)
    open_outs: list[int] = []  # which PyTorch may write or not
    exact = _exact(op, args if given is None else given)
    values = _values_matter(op)
    if ties_open(op, args):
        mine, theirs = outcome.result[0], expected[0]
        if _packet(op) == "mode":
            compare(f"{where}, values", mine, theirs, None, kind, values=False)
            given_args = {p.name: a for p, a in zip(parameters(op), args)}
            mine, theirs = (how_often(given_args["self"], given_args["dim"], v) for v in (mine, theirs))
        compare(f"{where}, values", mine, theirs, None, kind)
        compare(f"{where}, indices", outcome.result[1], expected[1], None, kind, values=False)
        _indices_lead_to_values(where, op, args, outcome.result)
        values = False
    elif unasked := results_open(op, args):
        exacts = exact if isinstance(exact, tuple) and len(exact) == len(expected) else (None,) * len(expected)
        for i, (a, b, e) in enumerate(zip(outcome.result, expected, exacts, strict=True)):
            if i not in unasked:
                compare(f"{where}, result {i}", a, b, e, kind, values=values)
        outs = [i for i, p in enumerate(parameters(op)) if p.is_out]
        open_outs = [i for k, i in enumerate(outs) if k in unasked]
        positions = [i for i in positions if i not in open_outs]
    else:
        compare(where, outcome.result, expected, exact, kind, values=values)
    if positions:
        results = tree_leaves(outcome.result)
        for i in positions:
            mine, theirs = own_args[i], native_args[i]
            for a, b in zip(tree_leaves(mine), tree_leaves(theirs)):
                if not isinstance(b, torch.Tensor):
                    continue
                match = exact if exact is not None and len(positions) == 1 and isinstance(exact, torch.Tensor) else None
                compare(f"{where}, argument {i}", a, b, match, kind, values=values)
            for a, b in zip(tree_leaves(mine), tree_leaves(args[i])):
                if isinstance(a, torch.Tensor) and a.shape == b.shape and not any(p.is_out for p in parameters(op)):
                    sentinels_stand(f"{where}: argument {i}", a, b)
        target = own_args[positions[0]]
        if results and len(positions) == 1 and isinstance(target, torch.Tensor) and results[0] is not target:
            raise Mismatch(f"{where}: does not return the tensor it wrote to")
    for i in unsaid:
        compare(f"{where}, argument {i}", own_args[i], native_args[i], None, kind, values=values)
    for i, (mine, before) in enumerate(zip(own_args, args)):
        if i not in positions and i not in unsaid and i not in open_outs:
            for a, b in zip(tree_leaves(mine), tree_leaves(before)):
                if isinstance(b, torch.Tensor) and b.layout == torch.strided:
                    unchanged(f"{where}: argument {i} was only to be read", a, b)
    return outcome.intercepted([op])


def _check_where_native_has_no_kernel(op: OpOverload, args: tuple[Any, ...], kind: str, where: str) -> bool:
    """Compare a rule with PyTorch's CPU kernel where PyTorch has none for a GPU."""
    own_args = own_memory(args)
    outcome = under_mode(call_op, op, own_args) if watched().policy.handler(op).lookup(tuple(own_args)).decision.kind == "rule" else None
    if outcome is None:
        return False

    def moved(tree: Any, device: str) -> Any:
        return tree_map(lambda x: x.detach().to(device) if isinstance(x, torch.Tensor) else x, tree)

    expected = moved(quietly(call_op, op, moved(args, "cpu")), OPTIONS.device)
    tally(outcome.calls)
    compare(where, outcome.result, expected, None, kind, values=_values_matter(op))
    return outcome.intercepted([op])


def memory(t: torch.Tensor) -> torch.Tensor:
    """All bytes of the memory that ``t`` is a view of."""
    storage = t.detach().untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage, 0, (storage.nbytes(),), (1,))


def unchanged(what: str, after: torch.Tensor, before: torch.Tensor) -> None:
    """Check that two tensors' whole memory is the same, bit for bit."""
    if not torch.equal(memory(after), memory(before)):
        raise Mismatch(f"{what}, and its memory changed")



def sentinels_stand(what: str, after: torch.Tensor, before: torch.Tensor) -> None:
    """Check that writing to a view left the memory around it as it was."""
    whole, old = (t.detach().new_empty(0).set_(t.detach().untyped_storage()) for t in (after, before))
    inside = torch.zeros(whole.numel(), dtype=torch.bool, device=whole.device)
    inside.as_strided(after.shape, after.stride(), after.storage_offset()).fill_(True)
    width = whole.element_size()
    new_bytes, old_bytes = (memory(t)[:len(inside) * width].reshape(-1, width) for t in (whole, old))
    if not torch.equal(new_bytes[~inside], old_bytes[~inside]):
        raise Mismatch(f"{what}: memory outside of the view was written to")


# -- tables at the end of a run ----------------------------------------------------------------------------------------


def tally_table() -> list[str]:
    """Samples compared and passed through, by family, and the ops whose samples all passed through."""
    if not TALLIES:
        return []
    rows: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    never: list[str] = []
    for name, entry in sorted(TALLIES.items()):
        candidates = served().get(registry.find_op(f"aten.{name}" if name.split(".")[0] in registry.aten_overloads() else name), ())
        row = rows[candidates[0].rule.family if candidates else "other"]
        passed = sum(entry.passed.values())
        for i, n in enumerate((1, int(entry.compared > 0), entry.compared, passed)):
            row[i] += n
        if not entry.compared:
            why = entry.passed.most_common(1)[0][0] if entry.passed else "never called"
            never.append(f"{name} ({why})")
    lines = ["", "samples of each op under the mode: compared after a rule ran, or passed through",
             f"  {'family':<14}{'overloads':>10}{'intercepted':>13}{'compared':>10}{'passed':>8}"]
    total = [sum(column) for column in zip(*rows.values())]
    for family, row in [*sorted(rows.items()), ("all", total)]:
        lines.append(f"  {family:<14}{row[0]:>10}{row[1]:>13}{row[2]:>10}{row[3]:>8}")
    if never:
        lines.append(f"  only passed through: {', '.join(never[:40])}" + (f", and {len(never) - 40} more" if len(never) > 40 else ""))
    if OPTIONS.full:
        lines += [f"  {name:<50}{entry.compared:>8}{sum(entry.passed.values()):>8}" for name, entry in sorted(TALLIES.items())]
    return lines


def kernel_table() -> list[str]:
    """What the kernels compiled to: per target and kernel the most registers and shared memory, and spills."""
    if not KERNELS:
        return []
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in KERNELS:
        groups[row["target"], row["kernel"]].append(row)
    lines = ["", "kernels compiled for GPUs that are not present: the most that any of them needs",
             f"  {'target':<12}{'kernel':<34}{'compiled':>9}{'registers':>11}{'shared':>9}{'spilling':>9}{'failed':>8}"]
    for (target, kernel), rows in sorted(groups.items()):
        good = [r for r in rows if not r["error"]]
        registers = [r["registers"] for r in good if r["registers"] is not None]
        most, shared = max(registers) if registers else "-", max((r["shared"] for r in good), default=0)
        spilling = sum(bool(r["spilled"]) for r in good)
        lines.append(f"  {target:<12}{kernel:<34}{len(good):>9}{most:>11}{shared:>9}{spilling:>9}{len(rows) - len(good):>8}")
    return lines
