"""Verification: each call that a rule serves also runs natively, on copies of its inputs, and the two are compared.

::

    with GemsMode(verify=True, on_mismatch="raise") as gems:
        loss = model(x).sum()
        loss.backward()
    print(gems.report)

**What is compared.** Results and written tensors (in-place, ``out=``): dtype, shape, strides, values. Tensors that must
not change, and the memory around views that are written, bit by bit. Random ops by properties: dtype, shape, mean and
spread, against a native run whose draw is taken back.

**With what.** The reference is the native op in float64 on upcast inputs, where it has one; else in the call's own
dtype. The native op in the call's own dtype runs too, and what it loses against the reference is part of what is
tolerated::

    |result - reference| <= ROUNDINGS[dtype] * eps * |reference| + 8 * (largest error of the native result) + smallest normal

and, for ops that are sums of products (:data:`LINEAR`), 4 eps of float32 times the same op of absolute values, since
what cancels there was rounded before. A result that equals the native one passes. Integers and booleans must be equal;
indices (``argmax``, ``sort``) may differ where they select equal values.

Where PyTorch allows TF32 (by default for convolutions on a GPU; ``torch.backends.cuda.matmul.fp32_precision = "tf32"`` for
products and attention), float32 operands on a GPU may lose all but 10 bits of their mantissas before they are multiplied,
whatever the native op does with the same call: the 4 eps are then TF32's, and of attention, for which no op of absolute
values bounds the error, twice that of its largest element is tolerated.

Errors are given relative to the reference's own element in units of the dtype's epsilon, and relative to its largest.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._ops import OpOverload

from gemsmode.errors import MismatchError, MismatchWarning
from gemsmode.handlers import Decided, OpHandler
from gemsmode.native import native_in_order
from gemsmode.registry import Rule, find_op, short_name
from gemsmode.signature import TensorMeta, functional_name, parameters

if TYPE_CHECKING:
    from gemsmode.tracing import Check, Recorder

ROUNDINGS = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 16.0, torch.float64: 256.0, torch.complex64: 16.0,
             torch.complex128: 256.0}
"""Epsilons of an element's own size that are tolerated: half of one is the result's last rounding; float32 and float64
leave room for approximations of functions."""

LOSSES = 8.0
"""How many times the native result's own largest error is tolerated."""

CANCELLING = 4.0
"""Epsilons of float32 (float64 for float64) tolerated of the sum of the absolute values of what is added up."""

LINEAR = frozenset({"sum", "mean", "nansum", "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "addr", "linear",
                    "matmul", "convolution", "convolution_backward", "_conv_depthwise2d", "cumsum", "trace", "index_add", "scatter_add",
                    "embedding_dense_backward"})
"""Ops whose result is a sum of products of their arguments, where cancellation decides the error."""

TF32_EPS = 2.0**-10
"""What TF32, with a mantissa of 10 bits, keeps of a float32 operand."""

CONVOLUTIONS = frozenset({"convolution", "convolution_backward", "_conv_depthwise2d"})
PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "linear", "matmul"})
"""Ops that tensor cores may do in TF32; the attention ops, which their names tell, are products too."""

STEPS = frozenset({"floor_divide", "remainder", "fmod", "nextafter", "frexp", "bucketize", "searchsorted", "histc", "view_as_real",
                   "view_as_complex"})
"""Ops whose result jumps where a rounding of the arguments' dtype does, so that float64 answers another question."""

WRITES_TOO = dict.fromkeys(("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"), ("running_mean", "running_var"))
"""Arguments that an op writes although its schema does not say so."""

_UP = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64, torch.complex64: torch.complex128}


# -- copies ------------------------------------------------------------------------------------------------------------


def _each(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _each(item)


def _mapped(value: Any, to: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return to(value)
    if isinstance(value, (list, tuple)):
        return [_mapped(v, to) for v in value]
    return value


class Copies:
    """Copies of a call's arguments that share memory among themselves as the arguments do.

    Of each storage, the part that the arguments span is copied, with a margin on both sides.
    """

    MARGIN = 64

    def __init__(self, args: tuple[Any, ...]) -> None:
        self._parts: dict[int, tuple[torch.UntypedStorage, int, torch.Tensor]] = {}
        spans: dict[int, tuple[torch.Tensor, int, int]] = {}
        for t in _each(args):
            storage, size = t.untyped_storage(), t.element_size()
            first = t.storage_offset() * size
            last = first + TensorMeta.of(t).extent * size
            _, low, high = spans.get(storage._cdata, (t, first, last))
            spans[storage._cdata] = t, min(low, first), max(high, last)
        for key, (t, low, high) in spans.items():
            storage = t.untyped_storage()
            low = max(low - self.MARGIN, 0) // 16 * 16
            high = min(-(-(high + self.MARGIN) // 16) * 16, storage.nbytes())
            self._parts[key] = storage, low, _bytes(storage, low, high - low, t.device).clone()
        self.args = tuple(_mapped(a, self._copy) for a in args)

    def _copy(self, t: torch.Tensor) -> torch.Tensor:
        _, low, part = self._parts[t.untyped_storage()._cdata]
        size = t.element_size()
        new = torch.empty(0, dtype=t.dtype, device=t.device)
        new.set_(part.untyped_storage(), t.storage_offset() - low // size, t.shape, t.stride())
        new = torch._conj(new) if t.is_conj() else new
        return new._neg_view() if t.is_neg() else new

    def changed_outside(self, written: list[torch.Tensor]) -> str:
        """Where memory that ``written`` do not cover is no longer what it was, in words; empty if it is."""
        for key, (storage, low, part) in self._parts.items():
            now = _bytes(storage, low, part.numel(), part.device)
            free = torch.ones(part.numel(), dtype=torch.bool, device=part.device)
            if any(t.untyped_storage()._cdata == key and not self._holds(t, low, part.numel()) for t in written):
                continue  # it was resized
            for t in written:
                if t.untyped_storage()._cdata == key and t.numel():
                    size = t.element_size()
                    first = t.storage_offset() * size - low
                    shape, stride = (*t.shape, size), (*(s * size for s in t.stride()), 1)
                    free.as_strided(shape, stride, first).fill_(False)
            wrong = ((now != part) & free).nonzero()
            if wrong.numel():
                return f"{wrong.shape[0]} bytes outside of what is to be written have changed, the first at byte {low + int(wrong[0])}"
        return ""


    @staticmethod
    def _holds(t: torch.Tensor, low: int, count: int) -> bool:
        first = t.storage_offset() * t.element_size() - low
        return first >= 0 and first + TensorMeta.of(t).extent * t.element_size() <= count


def _bytes(storage: torch.UntypedStorage, low: int, count: int, device: torch.device) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, low, (count,), (1,))


def _upcast(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The arguments in float64, dtypes among them too; None if there is nothing to raise."""
    raised: dict[int, torch.Tensor] = {}

    def up(t: torch.Tensor) -> torch.Tensor:
        dtype = _UP.get(t.dtype)
        if dtype is None:
            return t.clone()
        if id(t) not in raised:
            if TensorMeta.of(t).may_overlap_itself:
                raised[id(t)] = t.to(dtype)
            else:
                raised[id(t)] = torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=t.device).copy_(t)
        return raised[id(t)]

    found = tuple(_mapped(a, up) for a in args)
    dtypes = tuple(_UP.get(a, a) if isinstance(a, torch.dtype) else a for a in found)
    return dtypes if raised or any(a is not b for a, b in zip(found, dtypes)) else None


# -- comparing ---------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How one call's results compare.

    Attributes:
        error_eps: largest error relative to the reference's element, in units of the dtype's epsilon.
        error: largest error relative to the reference's largest element.
        allowed: largest error as a multiple of what is tolerated; above 1 is a mismatch.
        problem: what is wrong, in words; empty if nothing is.
        skipped: why the call was not compared; empty if it was.
    """

    error_eps: float = 0.0
    error: float = 0.0
    allowed: float = 0.0
    problem: str = ""
    skipped: str = ""

    def add(self, other: Outcome) -> None:
        self.error_eps, self.error = max(self.error_eps, other.error_eps), max(self.error, other.error)
        self.allowed = max(self.allowed, other.allowed)
        self.problem = self.problem or other.problem


def may_be_tf32(name: str, dtype: torch.dtype, device_type: str) -> bool:
    """Whether the setting in force lets an op round its operands to TF32.

    Args:
        name: the functional op's.
        dtype, device_type: of the result.
    """
    if dtype != torch.float32 or device_type != "cuda":
        return False
    if name in CONVOLUTIONS:
        return _float32_precision("conv") == "tf32"
    return (name in PRODUCTS or "attention" in name) and _float32_precision("matmul") == "tf32"


def _draws(op: Any, name: str, args: Sequence[Any]) -> bool:
    """Whether a call's results are random. The backward of attention is tagged so, and draws nothing without dropout."""
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return False
    if not ("attention" in name and name.endswith("_backward")):
        return True
    return any(p.name == "dropout_p" and a != 0.0 for p, a in zip(parameters(op), args))


def _float32_precision(kind: str) -> str:
    """``"tf32"`` if PyTorch allows it for float32 ``"conv"`` or ``"matmul"``; anything else means IEEE."""
    return torch._C._get_fp32_precision_getter("cuda", kind)


def _layout_problem(got: torch.Tensor, wanted: torch.Tensor) -> str:
    for name in ("dtype", "shape", "device"):
        a, b = getattr(got, name), getattr(wanted, name)
        if a != b:
            show = tuple if name == "shape" else str
            return f"{name} {show(a)} where PyTorch gives {show(b)}"
    strides = [(a, b) for a, b, n in zip(got.stride(), wanted.stride(), got.shape) if n > 1]
    if got.numel() and any(a != b for a, b in strides):
        return f"strides {tuple(got.stride())} where PyTorch gives {tuple(wanted.stride())}"
    return ""


def _at(flat: int, shape: torch.Size) -> str:
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    return str(list(reversed(index)))


def _exact(got: torch.Tensor, wanted: torch.Tensor) -> Outcome:
    differ = (got != wanted).flatten()
    if not bool(differ.any()):
        return Outcome()
    first = int(differ.nonzero()[0])
    a, b = got.flatten()[first].item(), wanted.flatten()[first].item()
    return Outcome(allowed=float("inf"), problem=f"{int(differ.sum())} of {got.numel()} elements differ, the first at "
                                                 f"{_at(first, got.shape)}: {a} where PyTorch gives {b}")


def _close(got: torch.Tensor, mine: torch.Tensor | None, high: torch.Tensor | None, cancelling: torch.Tensor | None,
           leeway: float, tf32: bool = False) -> Outcome:
    """Compare floating-point ``got`` with the native result ``mine`` and the more precise ``high``, of which one may be None.

    Args:
        cancelling: the op of absolute values, for a sum of products.
        leeway: a factor on the roundings that are tolerated.
        tf32: whether operands of products may have been rounded to TF32.
    """
    dtype = got.dtype
    info = torch.finfo(dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    result = got.to(wide)
    reference = (mine if high is None else high)
    assert reference is not None
    ref = reference.to(wide)
    own = ref if mine is None else mine.to(wide)
    lost = _finite((own - ref).abs())
    size = ref.abs()
    largest = float(_finite(size).max()) if size.numel() else 0.0
    if high is not None and mine is not None and float(lost.max()) > 1024 * info.eps * largest:
        # The op means something else in float64 (a limit of the dtype, an overflow on the way): its own dtype decides.
        ref, size, lost = own, own.abs(), torch.zeros_like(lost)
    allowed = ROUNDINGS.get(dtype, 1.0) * leeway * info.eps * _finite(size) + LOSSES * float(lost.max()) + info.tiny
    if cancelling is not None:
        eps = TF32_EPS if tf32 else torch.finfo(torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32).eps
        allowed = allowed + CANCELLING * leeway * eps * _finite(cancelling.to(wide).abs())
    elif tf32:
        allowed = allowed + 2 * CANCELLING * leeway * TF32_EPS * largest  # attention: one product feeds another
    off = (result - ref).abs()
    equal = _equal(result, ref) | _equal(result, own) | _equal(result, reference.to(dtype).to(wide))
    off = torch.where(equal, torch.zeros_like(off), off)
    off = torch.where(torch.isnan(off) | torch.isinf(off), torch.full_like(off, float("inf")), off)
    ratio = off / allowed
    worst = int(ratio.argmax())
    off_there, size_there = float(off.flatten()[worst]), float(_finite(size).flatten()[worst])
    # In eps at the worst element, not at the largest number of eps, which cancellation makes near 0 whatever the kernel does.
    found = Outcome(off_there / (info.eps * max(size_there, info.tiny)), float(off.max()) / largest if largest else float(off.max()),
                    float(ratio.max()))
    if found.allowed > 1:
        a, b = got.flatten()[worst].item(), ref.flatten()[worst].item()
        found.problem = (f"{int((ratio > 1).sum())} of {got.numel()} elements are too far off, the worst at {_at(worst, got.shape)}: "
                         f"{a:.9g} where {'float64' if high is not None else 'PyTorch'} gives {b:.9g} "
                         f"({found.allowed:.3g} times what is tolerated)")
    return found


def _finite(t: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.isfinite(t), t, torch.zeros_like(t))


def _equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b) | (torch.isnan(a) & torch.isnan(b))


_SELECTING = frozenset({"sort", "topk", "max", "min", "argsort", "argmax", "argmin", "kthvalue", "median", "nanmedian", "mode", "cummax",
                        "cummin"})


def _selects_equal(args: tuple[Any, ...], got: torch.Tensor, wanted: torch.Tensor, op: OpOverload) -> bool:
    """Whether two results of indices into the first argument select equal values."""
    source = args[0]
    dim = next((a for p, a in zip(parameters(op), args) if p.name == "dim"), None)
    indices = [got, wanted]
    if dim is None:
        source, dim = source.flatten(), 0
        indices = [i.flatten() for i in indices]
    elif source.ndim == got.ndim + 1:
        indices = [i.unsqueeze(dim) for i in indices]
    if source.ndim != indices[0].ndim or got.min() < 0 or int(got.max()) >= source.shape[dim]:
        return False
    a, b = (torch.gather(source, dim, i) for i in indices)
    return bool(_equal(a, b).all())


def _absolute(t: torch.Tensor) -> torch.Tensor:
    return t.abs() if t.dtype.is_floating_point or t.dtype.is_complex else t.clone()


class Trial:
    """One call being verified: copies of its arguments, made before the rule ran."""

    def __init__(self, op: OpOverload, args: tuple[Any, ...]) -> None:
        self.op, self.args = op, args
        self.name = functional_name(op._schema.name.partition("::")[2])
        self.random = _draws(op, self.name, args)
        self.copies = Copies(args)
        self.raised = None if self.random or self.name in STEPS else _upcast(self.copies.args)
        self.cancelling: tuple[Any, ...] | None = None
        if self.name in LINEAR and not self.random:
            base = self.raised if self.raised is not None else Copies(args).args
            self.cancelling = tuple(_mapped(a, _absolute) for a in base)
        also = WRITES_TOO.get(self.name, ())
        self.written = [i for i, p in enumerate(parameters(op)) if p.is_written or p.is_out or p.name in also]

    def outcome(self, result: Any) -> Outcome:
        """Compare what the rule returned, and what it wrote, with the native op on the copies."""
        written = [t for i in self.written for t in _each(self.args[i])]
        outside = self.copies.changed_outside(written)
        if self.random:
            found = self._random(result)
        else:
            found = self._values(result)
        if outside:
            found.add(Outcome(allowed=float("inf"), problem=outside))
        return found

    def _run(self, args: tuple[Any, ...] | None) -> list[torch.Tensor] | Exception:
        """The native results on ``args``, then the tensors that were written."""
        if args is None:
            return ValueError("nothing to raise")
        try:
            result = native_in_order(self.op)(*args)
        except Exception as error:
            return error
        return [*_each(result), *(t for i in self.written for t in _each(args[i]))]

    def _values(self, result: Any) -> Outcome:
        got = [*_each(result), *(t for i in self.written for t in _each(self.args[i]))]
        mine, high = self._run(self.copies.args), self._run(self.raised)
        if isinstance(mine, Exception) and isinstance(high, Exception):
            return Outcome(skipped=f"PyTorch's own raises {type(mine).__name__}: {str(mine).strip().partition(chr(10))[0]}")
        cancelling = self._run(self.cancelling)
        native = mine if not isinstance(mine, Exception) else high
        assert isinstance(native, list)
        if len(native) != len(got):
            return Outcome(allowed=float("inf"), problem=f"{len(got)} results where PyTorch gives {len(native)}")
        found = Outcome()
        fused = "scaled_dot_product" in self.name
        for i, (g, n) in enumerate(zip(got, native)):
            own = None if isinstance(mine, Exception) else mine[i]
            if own is not None and (problem := _layout_problem(g, own)):
                if fused and i:
                    continue  # seeds and padding of one implementation, which another need not have
                found.add(Outcome(allowed=float("inf"), problem=f"result {i}: {problem}" if len(got) > 1 else problem))
                continue
            if g.shape != n.shape:
                found.add(Outcome(allowed=float("inf"), problem=f"shape {tuple(g.shape)} where PyTorch gives {tuple(n.shape)}"))
                continue
            if not g.numel() or (fused and not g.dtype.is_floating_point):
                continue
            g, n = g.detach(), n.detach()
            if g.dtype.is_floating_point or g.dtype.is_complex:
                precise = None if isinstance(high, Exception) or high[i].shape != g.shape else high[i].detach()
                cancel = None if isinstance(cancelling, Exception) or cancelling[i].shape != g.shape else cancelling[i].detach()
                # Where float64 cannot say what is right, both may be off.
                both = precise is None and g.dtype not in (torch.float64, torch.complex128)
                part = _close(g, own, precise, cancel, 16.0 if both else 1.0, may_be_tf32(self.name, g.dtype, g.device.type))
            elif own is None:
                continue
            else:
                part = _exact(g, own)
                if part.problem and self.name in _SELECTING and not self.written and _selects_equal(self.args, g, own, self.op):
                    part = Outcome()
            if part.problem and len(got) > 1:
                part.problem = f"result {i}: {part.problem}"
            found.add(part)
        return found

    def _random(self, result: Any) -> Outcome:
        got = [*_each(result), *(t for i in self.written for t in _each(self.args[i]))]
        generator = next((a for a in self.args if isinstance(a, torch.Generator)), None)
        devices = [t.device for t in got if t.device.type == "cuda"]
        with torch.random.fork_rng(devices[:1]):
            before = None if generator is None else generator.get_state()
            native = self._run(self.copies.args)
            if generator is not None and before is not None:
                generator.set_state(before)
        if isinstance(native, Exception):
            return Outcome(skipped=f"PyTorch's own raises {type(native).__name__}")
        found = Outcome()
        if self.name == "native_dropout" and len(got) == 2:
            x, p = self.args[0], self.args[1]
            scale = 0.0 if p == 1 else 1 / (1 - p)
            wanted = torch.where(got[1], x.to(torch.float64) * scale, 0.0)
            if got[0].numel() and got[0].is_floating_point():
                found.add(_close(got[0], None, wanted, None, 1.0))
        for i, (g, n) in enumerate(zip(got, native)):
            problem = _layout_problem(g, n)
            if not problem and g.numel() >= 100 and not g.dtype.is_complex:
                a, b = g.detach().to(torch.float64), n.detach().to(torch.float64)
                if not bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all()):
                    problem = "NaN or infinity among random numbers"
                else:
                    spread = max(float(a.std()), float(b.std()))
                    apart = abs(float(a.mean() - b.mean())) / (spread * (2 / g.numel()) ** 0.5 or 1.0)
                    width = float(b.max() - b.min()) or 1.0
                    if apart > 6:
                        problem = f"a mean of {float(a.mean()):.4g} where PyTorch's is {float(b.mean()):.4g}"
                    elif abs(float(a.std() - b.std())) > 6 * spread * (2 / g.numel()) ** 0.5 + 1e-12:
                        problem = f"a spread of {float(a.std()):.4g} where PyTorch's is {float(b.std()):.4g}"
                    elif float(a.max()) > float(b.max()) + width or float(a.min()) < float(b.min()) - width:
                        problem = (f"values from {float(a.min()):.4g} to {float(a.max()):.4g} where PyTorch's are from "
                                   f"{float(b.min()):.4g} to {float(b.max()):.4g}")
            if problem:
                found.add(Outcome(allowed=float("inf"), problem=f"result {i}: {problem}" if len(got) > 1 else problem))
        return found


# -- the mode's part ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mismatch:
    """A call whose rule and PyTorch disagree.

    Attributes:
        overload, rule: what was called, and who served it.
        problem: what is wrong, in words.
        error_eps, error, allowed: see :class:`Outcome`.
        inputs: the tensor arguments, as ``gemsmode explain`` takes them.
        module, phase: the ``nn.Module`` path, and forward, backward or optimizer.
        site: ``file:line in function`` of the program, outside PyTorch and gemsmode.
        number: which of the rule's verified calls on this overload it was, from 1.
        reproducer: the script that shows it, if one was asked for.
        args: the arguments of the call, in the order of the schema; written ones hold the rule's results.
    """

    overload: str
    rule: str
    problem: str
    error_eps: float
    error: float
    allowed: float
    inputs: tuple[str, ...]
    module: str
    phase: str
    site: str
    number: int
    reproducer: Path | None = None
    args: tuple[Any, ...] = dataclasses.field(default=(), repr=False)

    def __str__(self) -> str:
        parts = f"in {self.module}" if self.module else "", f"({self.phase})", f"at {self.site}" if self.site else ""
        where = " ".join(part for part in parts if part)
        script = f"; reproduce it with: python {self.reproducer}" if self.reproducer else ""
        return (f"rule {self.rule!r} on {self.overload}({', '.join(self.inputs)}) {where}, its call {self.number}: {self.problem}{script}")


_INTERNAL = tuple(str(Path(p).resolve()) + os.sep for p in (Path(torch.__file__).parent, Path(__file__).parent))


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] in ("gemsmode", "torch", "triton", "contextlib", "runpy", "functools")


def is_callers(frame: types.FrameType) -> bool:
    """Whether a frame is of code outside PyTorch and gemsmode."""
    file = frame.f_code.co_filename
    return not (file.startswith("<") or _is_ours(frame.f_globals.get("__name__") or "") or file.startswith(_INTERNAL))


def call_site() -> str:
    """``file:line in function`` of the innermost frame outside PyTorch and gemsmode; empty in autograd's own threads."""
    frame = sys._getframe(1)
    while frame is not None:
        if is_callers(frame):
            return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


class _Tally:
    """What is known of one rule on one overload."""

    def __init__(self) -> None:
        self.compared = self.failed = self.skipped = 0
        self.why = self.first = ""
        self.error_eps = self.error = 0.0
        self.allowed = -1.0
        self.worst: dict[str, Any] = {}


class Verifier:
    """Compares the calls of a mode and remembers what it found.

    Args:
        on_mismatch: ``"warn"`` (once for each rule and overload), ``"raise"``, or a function of a :class:`Mismatch`.
        reproducers: a folder for scripts that show the first mismatch of each rule and overload; made if need be.

    Raises:
        ValueError: another ``on_mismatch``.
    """

    def __init__(self, on_mismatch: str | Callable[[Mismatch], Any] = "warn", reproducers: str | os.PathLike[str] | None = None) -> None:
        if not callable(on_mismatch) and on_mismatch not in ("warn", "raise"):
            raise ValueError(f"on_mismatch is 'warn', 'raise' or a function, not {on_mismatch!r}")
        self.on_mismatch = on_mismatch
        self.reproducers = None if reproducers is None else Path(reproducers)
        self._tallies: dict[tuple[OpOverload, str], _Tally] = {}
        self._lock = threading.Lock()

    def function(self, op: OpOverload, handler: OpHandler, recorder: Recorder, run: Callable[..., Any]) -> Callable[..., Any]:
        """What the mode calls for ``op``: ``run``, with the calls that a rule serves compared."""
        functions = handler.functions
        assert functions is not None

        def verified(*args: Any, **kwargs: Any) -> Any:
            bound = functions.bind(*args, **kwargs)
            decided: Decided = handler.lookup(bound)
            if decided.decision.kind != "rule" or _cannot_copy(bound):
                return run(*args, **kwargs)
            trial = Trial(op, bound)
            kept = None if self.reproducers is None else Copies(bound).args
            result = run(*args, **kwargs)
            if handler.lookup(bound).decision.kind == "rule":  # it did not fail and fall back
                self._judge(trial, decided.decision.rule or "", result, recorder, handler, kept)
            return result

        return verified

    def _judge(self, trial: Trial, rule: str, result: Any, recorder: Recorder, handler: OpHandler, kept: tuple[Any, ...] | None) -> None:
        try:
            outcome = trial.outcome(result)
        except Exception as error:  # what verification cannot do must not end the program
            outcome = Outcome(skipped=f"comparing failed: {type(error).__name__}: {error}")
        mismatch: Mismatch | None = None
        with self._lock:
            tally = self._tallies.setdefault((trial.op, rule), _Tally())
            if outcome.skipped:
                tally.skipped += 1
                tally.why = outcome.skipped
                return
            tally.compared += 1
            tally.error_eps, tally.error = max(tally.error_eps, outcome.error_eps), max(tally.error, outcome.error)
            worse = outcome.allowed > tally.allowed
            if not worse and not outcome.problem:
                return
            module, phase = recorder.place()
            about = {"inputs": _inputs(trial.copies.args), "module": module, "phase": phase, "site": call_site()}
            if worse:
                tally.allowed, tally.worst = outcome.allowed, about
            if not outcome.problem:
                return
            tally.failed += 1
            mismatch = Mismatch(str(trial.op), rule, outcome.problem, outcome.error_eps, outcome.error, outcome.allowed,
                                number=tally.compared, args=trial.args, **about)  # type: ignore[arg-type]
            first = tally.failed == 1
            if first:
                if kept is not None and self.reproducers is not None:
                    found = next((c.rule for c, _, _ in handler._candidates if c.rule.name == rule), None)
                    mismatch = dataclasses.replace(mismatch, reproducer=write_reproducer(self.reproducers, mismatch, kept, found))
                tally.first = str(mismatch)
        if callable(self.on_mismatch):
            self.on_mismatch(mismatch)
        elif self.on_mismatch == "raise":
            raise MismatchError(mismatch)
        elif first:
            warnings.warn(f"gemsmode: {mismatch}", MismatchWarning, stacklevel=2)

    def checks(self) -> list[Check]:
        """What was found so far, the worst first."""
        from gemsmode.tracing import Check

        with self._lock:
            found = [Check(str(op), rule, t.compared, t.failed, t.skipped, t.why, t.error_eps, t.error, max(t.allowed, 0.0), first=t.first,
                           **t.worst)
                     for (op, rule), t in self._tallies.items()]
        return sorted(found, key=lambda c: (-c.allowed, c.overload, c.rule))


def _cannot_copy(args: tuple[Any, ...]) -> bool:
    return any(t.layout != torch.strided or t.is_quantized or t.is_nested for t in _each(args))


def _inputs(args: tuple[Any, ...]) -> tuple[str, ...]:
    from gemsmode.tracing.recorder import _shapes, _text

    return _text(_shapes(args))[0]


# -- reproducers -------------------------------------------------------------------------------------------------------

_SCRIPT = '''"""{text}"""

from pathlib import Path

import torch

from gemsmode.verify import compare
{module}
saved = torch.load(Path(__file__).with_name("inputs.pt"), weights_only=False)
print(compare(saved["op"], *saved["args"]))
'''


def write_reproducer(folder: Path, mismatch: Mismatch, args: tuple[Any, ...], rule: Rule | None) -> Path:
    """Save a call's arguments and a script that compares the rule with PyTorch on them; the script's path.

    Args:
        folder: a folder of its own is made in it.
        mismatch: what was found.
        args: the arguments before the call.
        rule: who served it; the script imports the module that registers it.
    """
    name = f"{short_name(find_op(mismatch.overload)).replace('.', '_').replace('::', '_')}-{mismatch.rule}"
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    place = folder / name
    number = 1
    while place.exists():
        number += 1
        place = folder / f"{name}-{number}"
    place.mkdir(parents=True)
    plain = [None if isinstance(a, torch.Generator) else a for a in args]
    torch.save({"op": mismatch.overload, "rule": mismatch.rule, "args": plain}, place / "inputs.pt")
    module = getattr(rule.implementation, "__module__", "") if rule is not None else ""
    if module.startswith("gemsmode.") or rule is None:
        line = ""
    elif module and module != "__main__":
        line = f"import {module}  # registers the rule"
    else:
        line = f"# import here what registers the rule: it is at {rule.where}"
    text = str(dataclasses.replace(mismatch, reproducer=None)).replace("\\", "/").replace('"""', "'''")
    script = place / "reproduce.py"
    script.write_text(_SCRIPT.format(text=text, module=line), encoding="utf-8")
    return script


def compare(op: str | OpOverload, *args: Any, registry: Any = None) -> str:
    """Run the rule that serves ``op(*args)`` and PyTorch's own, and say how they compare.

    Args:
        op: the overload.
        args: every argument of its schema, in order; they may be written.
        registry: defaults to the one every mode uses.
    """
    from gemsmode.mode import GemsMode

    found = find_op(op)
    mode = GemsMode(registry=registry)
    decided = mode.policy.handler(found).lookup(args)
    if decided.decision.kind != "rule":
        return f"{found}: no rule runs ({decided.decision.reason}); is the module imported that registers it?"
    trial = Trial(found, args)
    outcome = trial.outcome(decided.run(*args))
    verdict = outcome.problem or (f"not compared: {outcome.skipped}" if outcome.skipped else "agrees with PyTorch")
    return (f"{found}, rule {decided.decision.rule!r}: {verdict}\n  {outcome.error_eps:.3g} eps of the worst element, "
            f"{outcome.error:.2e} relative to the largest, {outcome.allowed:.3g} times what is tolerated")
