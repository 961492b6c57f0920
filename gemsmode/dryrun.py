"""Dry runs: what would be replaced, on a device that need not be here, without weights, memory or a kernel.

A model built under ``torch.device("meta")`` or on fake tensors (``FakeTensorMode``) runs under ``GemsMode(dry_run=...)``::

    with torch.device("meta"):
        model, tokens = Llama(config), torch.zeros(1, 2048, dtype=torch.long)
    with GemsMode(dry_run="cuda:90") as gems:
        model(tokens)
    print(gems.report)

Each call is decided by its metadata as on the target device and runs as PyTorch's own shape functions alone.

Which device a tensor is on: ``meta`` tensors stand for the target's. Fake tensors keep their device, except that calls
on fake CPU tensors alone stand for calls on the target's device too. A real tensor beside meta tensors is taken for
one of them, unless it has no dimension: then it is the scalar on the host that it would be in a real run.

How composite ops are taken apart depends on the device, in C++. On meta tensors that stand for a GPU the ones that
models call are taken apart as on a GPU (:data:`ON_GPU`): ``scaled_dot_product_attention`` into the fused attention
that CUDA's choice falls on, ``dropout`` into ``native_dropout``, ``rms_norm`` into ``_fused_rms_norm``; optimizers take
their ``_foreach_`` path. Others (recurrent layers, ``batch_norm`` by cuDNN) appear as PyTorch's portable code. A real
device is not asked, so attention's choice is that of a build with cuDNN 9.15 and flash attention.

Reading a value (``loss.item()``, ``if mask.any()``) gives 1 or True, and the report says how often. A boolean mask on
the meta device is taken to select everything; other ops whose result's shape depends on values raise PyTorch's own error.

On a PyTorch without CUDA, autograd ends the process when it meets a fake CUDA tensor (its device guard is missing):
dry runs with gradients need meta tensors there, and say so.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._C import _pop_torch_dispatch_stack, _push_on_torch_dispatch_stack
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import flop_registry

from gemsmode.errors import DryRunError
from gemsmode.handlers import Decision, OpHandler, _exotic
from gemsmode.native import native, numbers_of_host
from gemsmode.signature import TensorMeta, describe
from gemsmode.target import INTERPRETER, Target, _from_name, current

if TYPE_CHECKING:
    from gemsmode.tracing import Recorder

DEFAULT_TARGET = "cuda:90"
"""What ``dry_run=True`` means where there is no accelerator: an H100 or H200."""

aten = torch.ops.aten


def target_of(where: bool | str | Target) -> Target:
    """The target that an option names: True, ``"cuda:90"``, ``"hip:gfx942"``, ``"cpu"`` (the interpreter), or a target.

    Raises:
        ValueError: none of these.
    """
    if isinstance(where, Target):
        found = where
    elif where is True:
        found = _from_name(DEFAULT_TARGET) if current().interpreted else current()
    elif where in ("cpu", "interpreter"):
        return INTERPRETER
    elif where == "cuda":
        found = current() if current().backend == "cuda" else _from_name(DEFAULT_TARGET)
    else:
        try:
            found = _from_name(str(where))
        except ValueError:
            raise ValueError(f"a dry run is for 'cuda:90', 'hip:gfx942' or the like, or 'cpu' for the interpreter, not {where!r}") from None
    return dataclasses.replace(found, present=False)


# -- memory ------------------------------------------------------------------------------------------------------------


class Memory:
    """How much memory the tensors seen so far would take, by their storages: now, and at most."""

    def __init__(self) -> None:
        self.bytes = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._lock = threading.RLock()

    def see(self, tensor: torch.Tensor) -> None:
        """Count ``tensor``'s storage until it is freed, once however many tensors share it."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse and the like
            return
        key = id(storage)
        if key in self._alive:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            with self._lock:
                if self._alive.pop(key, None) is not None:
                    self.bytes -= size

        with self._lock:
            self._alive[key] = weakref.ref(storage, freed)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


# -- composite ops as a GPU takes them apart ---------------------------------------------------------------------------


def _attention_kind(target: Target, q: Any, k: Any, v: Any, mask: Any, causal: bool, gradients: bool, grouped: bool) -> str:
    """Which implementation CUDA's selection takes, for a dense call; see ``sdp_utils.cpp`` of PyTorch 2.13."""
    backends, arch = torch.backends.cuda, target.arch if isinstance(target.arch, int) else 0
    nvidia = target.backend == "cuda"
    dim, dim_v = q.shape[-1], v.shape[-1]
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.ndim != 4 or not q.dtype == k.dtype == v.dtype or 0 in (*q.shape, *k.shape) or (mask is not None and mask.requires_grad):
        return "math"
    if causal and mask is not None:
        return "math"
    heads = q.shape[1], k.shape[1], v.shape[1]
    equal = heads[0] == heads[1] == heads[2]
    shared = grouped and heads[0] % heads[1] == 0 and heads[0] % heads[2] == 0
    if not q.shape[0] == k.shape[0] == v.shape[0] or not (equal or shared):
        return "math"
    same = dim == dim_v and dim <= 256 and half and (arch >= 80 or not nvidia)
    if nvidia and arch in (90, 100) and backends.cudnn_sdp_enabled() and same and dim % 8 == 0 and (dim <= 128 or not gradients):
        return "cudnn"
    if backends.flash_sdp_enabled() and same and mask is None and heads[1] == heads[2]:
        return "flash"
    aligned = dim % (8 if half else 4) == 0 and dim_v % (8 if half else 4) == 0
    fits = half or q.dtype == torch.float32
    # It does not know of heads that share keys: those are repeated on the way through the math.
    if backends.mem_efficient_sdp_enabled() and fits and equal and aligned and (q.dtype != torch.bfloat16 or arch >= 80 or not nvidia):
        return "efficient"
    return "math"


def _attention(target: Target) -> Callable[..., Any]:
    composite = aten.scaled_dot_product_attention.default

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, *,
                  scale: float | None = None, enable_gqa: bool = False) -> Any:
        gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
        kind = _attention_kind(target, query, key, value, attn_mask, is_causal, gradients, enable_gqa)
        if kind == "math":
            return composite._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, query, key, value, attn_mask, dropout_p, is_causal,
                                    scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, torch.zeros((), dtype=query.dtype, device=query.device), float("-inf"))
        if kind == "flash":
            padding = -query.shape[-1] % 8
            if not padding:
                return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            padded = [torch.nn.functional.pad(t, (0, padding)) for t in (query, key, value)]
            result = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
            return result[..., :query.shape[-1]]
        if attn_mask is not None:
            attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        if kind == "cudnn":
            return aten._scaled_dot_product_cudnn_attention(query, key, value, attn_mask, gradients, dropout_p, is_causal, False,
                                                            scale=scale)[0]
        return aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, gradients, dropout_p, is_causal, scale=scale)[0]

    return attention


def _attention_on_cpu(target: Target) -> Callable[..., Any]:
    composite = aten.scaled_dot_product_attention.default

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, *,
                  scale: float | None = None, enable_gqa: bool = False) -> Any:
        tensors = (query, key, value)
        fits = (all(t.ndim == 4 and t.dtype == query.dtype and t.shape[-1] == query.shape[-1] for t in tensors)
                and not any(0 in t.shape for t in tensors) and query.is_floating_point() and not dropout_p
                and (attn_mask is None or (attn_mask.ndim in (2, 4) and not attn_mask.requires_grad and not is_causal))
                and torch.backends.cuda.flash_sdp_enabled())
        if not fits:
            return composite._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, query, key, value, attn_mask, dropout_p, is_causal,
                                    scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, torch.zeros((), dtype=query.dtype, device=query.device), float("-inf"))
        flash = aten._scaled_dot_product_flash_attention_for_cpu
        return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    return attention


def _batch_norm(target: Target) -> Callable[..., Any]:
    composite = aten.batch_norm.default

    def batch_norm(input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, training: bool, momentum: float, eps: float,
                   cudnn_enabled: bool) -> Any:
        # What CUDA's selection asks for, see `Normalization.cpp` of PyTorch.
        fits = (target.backend == "cuda" and cudnn_enabled and torch.backends.cudnn.enabled and weight is not None and bias is not None
                and torch.bfloat16 not in (input.dtype, weight.dtype) and (input.dtype != torch.float16 or weight.dtype == torch.float32)
                and ((running_mean is None) == (running_var is None)) and (running_mean is not None or training)
                and input.ndim >= 3 and input.shape[0] <= (880801 if training else 65535) and 0 < input.numel() < 2**31 - 1)
        if not fits:
            return composite._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, input, weight, bias, running_mean, running_var,
                                    training, momentum, eps, cudnn_enabled)
        return aten.cudnn_batch_norm(input.contiguous(memory_format=suggest_memory_format(input)), weight.contiguous(),
                                     bias.contiguous(), running_mean, running_var, training, momentum, eps)[0]

    return batch_norm


def _dropout(input: Any, p: float, train: bool) -> Any:
    if not train or p == 0 or input.numel() == 0:
        return input
    if p == 1:
        return aten.dropout.default._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, input, p, train)
    return aten.native_dropout(input, p, True)[0]


def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    if input.is_complex() or (weight is not None and weight.dtype != input.dtype):
        return aten.rms_norm.default._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, input, normalized_shape, weight, eps)
    if torch.is_grad_enabled() and (input.requires_grad or (weight is not None and weight.requires_grad)):
        return _FusedRmsNorm.apply(input, normalized_shape, weight, eps)
    with torch._C._AutoDispatchBelowAutograd():
        return aten._fused_rms_norm(input, normalized_shape, weight, eps)[0]


class _FusedRmsNorm(torch.autograd.Function):
    """``_fused_rms_norm`` with its own backward, which PyTorch has for GPUs alone."""

    @staticmethod
    def forward(ctx: Any, input: Any, normalized_shape: Any, weight: Any, eps: float | None) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            result, rstd = aten._fused_rms_norm(input, normalized_shape, weight, eps)
        ctx.save_for_backward(input, rstd, weight)
        ctx.normalized_shape = normalized_shape
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        input, rstd, weight = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
        grad, grad_weight = aten._fused_rms_norm_backward(grads[0], input, ctx.normalized_shape, rstd, weight, wanted)
        return grad, None, grad_weight, None


ON_GPU: dict[str, Callable[[Target], Callable[..., Any]]] = {
    "scaled_dot_product_attention": _attention,
    "dropout": lambda target: _dropout,
    "rms_norm": lambda target: _rms_norm,
    "batch_norm": _batch_norm,
}
"""Composite ops whose parts depend on the device, and how a GPU takes them apart."""

ON_CPU: dict[str, Callable[[Target], Callable[..., Any]]] = {"scaled_dot_product_attention": _attention_on_cpu}
"""The same for a CPU, where the meta device takes them apart in another way."""

_overrides = 0
_overridden: list[Any] = []
_overrides_lock = threading.Lock()


def _install(target: Target) -> None:
    """Take meta tensors apart as the target would, in C++ and for the whole process, until :func:`_remove`."""
    global _overrides
    with _overrides_lock:
        _overrides += 1
        if _overrides > 1:
            return
        library = torch.library.Library("aten", "IMPL")
        gpu = target.device_type == "cuda"
        # Fake CUDA tensors where no real one can be: PyTorch itself takes them for CPU tensors.
        keys = ["AutogradMeta", *(["AutogradCUDA"] if gpu and not torch.backends.cuda.is_built() else [])]
        for name, make in (ON_GPU if gpu else ON_CPU).items():
            for key in keys:
                library.impl(name, make(target), key)
        _overridden.append(library)
        import torch.fx.experimental._config as settings

        _overridden.append(settings.meta_nonzero_assume_all_nonzero)
        settings.meta_nonzero_assume_all_nonzero = True
        from torch.optim import optimizer

        supported = optimizer._get_foreach_kernels_supported_devices
        _overridden.append(supported)
        if gpu:
            optimizer._get_foreach_kernels_supported_devices = lambda: [*supported(), "meta"]


def _remove() -> None:
    global _overrides
    with _overrides_lock:
        _overrides -= 1
        if not _overrides:
            from torch.optim import optimizer

            optimizer._get_foreach_kernels_supported_devices = _overridden.pop()
            import torch.fx.experimental._config as settings

            settings.meta_nonzero_assume_all_nonzero = _overridden.pop()
            _overridden.pop()._destroy()


# -- the run -----------------------------------------------------------------------------------------------------------

_VALUES = {"_local_scalar_dense", "equal", "is_nonzero"}
"""Ops that read values, which a dry run has none of."""


def _value(op: Any, args: tuple[Any, ...]) -> Any:
    dtype = args[0].dtype if op._schema.name == "aten::_local_scalar_dense" else torch.bool
    # Not 0: it is what programs divide by.
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1 + 0j if dtype.is_complex else 1


def _forget_constants(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What is known of the tensors that a call writes ends there, where the call does not compute it.

    Fake tensors made of a number know it, until they are written to; not all versions of PyTorch see that, of lists for one.
    A number on the host that is written from meta tensors would stay what it was: it becomes 1, as what is read of the meta
    device (:func:`_value`). An optimizer divides by its count of steps, which starts as 0.
    """
    unknown = any(t.is_meta or isinstance(t, FakeTensor) for t in (*_tensors(args), *_tensors(tuple(kwargs.values()))))
    if not unknown:
        return
    parameters = op._schema.arguments
    given = [*zip(parameters, args), *[(p, kwargs[p.name]) for p in parameters[len(args):] if p.name in kwargs]]
    for parameter, value in given:
        if parameter.alias_info is None or not parameter.alias_info.is_write:
            continue
        for t in _tensors(value):
            if isinstance(t, FakeTensor):
                t.constant = None
            elif not t.is_meta and not t.ndim:
                with torch.no_grad():
                    t.data.fill_(1)


def _laid_out_by(grad: torch.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """A tensor like ``grad`` in the layout that convolutions of ``tensors``, input and weight, have.

    The shape function of ``convolution_backward`` lays out what it returns by the gradient that it is given (PyTorch 2.11),
    real ones by input and weight: autograd would copy the gradient of the weight into the weight's layout.
    """
    formats = [suggest_memory_format(t) for t in tensors]
    chosen = next((f for f in formats if f != torch.contiguous_format), torch.contiguous_format)
    return torch.empty(grad.shape, dtype=grad.dtype, device=grad.device, memory_format=chosen)


class DryRun:
    """What a dry mode does with each call: decide it as on ``target``, count it, and compute shapes alone.

    Args:
        where: see :func:`target_of`.
    """

    def __init__(self, where: bool | str | Target) -> None:
        self.target = target_of(where)
        self.memory = Memory()
        self.values_read = self.on_real = self.on_fake_cpu = 0
        kind = self.target.device_type
        self._device = torch.device("cpu") if kind == "cpu" else torch.device(kind, 0)
        self._guard = _NoAbort()

    @property
    def name(self) -> str:
        return "cpu (Triton's interpreter)" if self.target.interpreted else f"{self.target.backend}:{self.target.arch}"

    def install(self) -> None:
        """The mode was entered."""
        if self.target.device_type in ("cuda", "cpu"):
            _install(self.target)
        if self.target.device_type == "cuda" and not torch.backends.cuda.is_built():
            self._guard.__enter__()

    def remove(self) -> None:
        """The mode was left."""
        if self.target.device_type in ("cuda", "cpu"):
            _remove()
        if self.target.device_type == "cuda" and not torch.backends.cuda.is_built():
            self._guard.__exit__(None, None, None)

    def takes(self, op: Any, types: Sequence[type]) -> bool:
        """Whether a call with these tensor classes, among these modes, is for the dry run."""
        if getattr(op, "namespace", "") == "prim":  # a fake tensor being asked for its device
            return False
        others = [m for m in _get_current_dispatch_mode_stack() if m.is_infra_mode() and not isinstance(m, FakeTensorMode)]
        return not others and all(issubclass(t, FakeTensor) or getattr(t, "__torch_dispatch__", None) is torch.Tensor.__torch_dispatch__
                                  for t in types)

    def notes(self) -> list[str]:
        """What a reader of the report must know."""
        found = ["a dry run: calls were decided by their metadata and none was run; bytes are those of the tensor arguments, "
                 "memory is that of the tensors alone"]
        if self.values_read:
            found.append(f"{self.values_read} values were read from tensors (item(), a condition): each was taken to be 1")
        if self.on_real:
            found.append(f"{self.on_real} calls had real tensors only, and were run")
        if self.on_fake_cpu:
            found.append(f"{self.on_fake_cpu} calls on fake CPU tensors were counted as calls on {self.name}; composite ops were taken "
                         "apart as on a CPU: the meta device takes them apart as a GPU does")
        return found

    # -- calls ---------------------------------------------------------------------------------------------------------

    def function(self, op: Any, handler: OpHandler, recorder: Recorder) -> Callable[..., Any]:
        """What the mode calls for ``op``."""
        name = op._schema.name.partition("::")[2] if hasattr(op, "_schema") else ""
        run, functions = native(op), handler.functions
        decisions: dict[Any, Decision] = {}
        apart = None
        table = {"cuda": ON_GPU, "cpu": ON_CPU}.get(self.target.device_type, {})
        if name in table and op._overloadname in ("", "default"):
            apart = table[name](self.target)

        def composite(*args: Any, **kwargs: Any) -> Any:
            if apart is None:
                return handler._decompose(*args, **kwargs)
            _push_on_torch_dispatch_stack(handler.policy.reentry)
            try:
                return apart(*args, **kwargs)
            finally:
                _pop_torch_dispatch_stack(None)

        def dry(*args: Any, **kwargs: Any) -> Any:
            tensors = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
            stands = False
            if any(t.is_meta for t in tensors):
                args, kwargs = self._all_meta(args, kwargs)
            elif tensors:
                stands = self._device.type != "cpu" and all(t.device.type == "cpu" for t in tensors) and any(
                    isinstance(t, FakeTensor) for t in tensors)
            bound: tuple[Any, ...] = (*args, *kwargs.values())
            if functions is None:
                assert handler.fixed is not None
                decision = handler.fixed.decision
            else:
                bound = functions.bind(*args, **kwargs)
                decision = self._decision(handler, bound, stands, decisions)
            if decision.kind == "composite":
                return composite(*args, **kwargs)
            if decision.kind == "pass" and not stands and self._device.type != "cpu" and numbers_of_host(bound):
                decision = Decision("host")
            if decision.kind in ("rule", "pass") and tensors and not any(t.is_meta or isinstance(t, FakeTensor) for t in tensors):
                self.on_real += 1
            elif stands and decision.kind in ("rule", "pass"):
                self.on_fake_cpu += 1
            for t in tensors:
                if t.is_meta or isinstance(t, FakeTensor):
                    self.memory.see(t)
            token = recorder.begin(op, decision)
            result = None
            try:
                result = self._run(op, name, run, args, kwargs)
            finally:
                if decision.flops is None and decision.kind != "view":
                    decision = self._with_flops(op, decision, args, kwargs, result)
                recorder.end(token, op, decision, bound)
            for t in _tensors(result):
                if t.is_meta or isinstance(t, FakeTensor):
                    self.memory.see(t)
            return result

        return dry

    def _run(self, op: Any, name: str, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "convolution_backward" and args[0].is_meta:
            args = (_laid_out_by(args[0], args[1:3]), *args[1:])
        if name not in _VALUES:
            if op._schema.is_mutable:
                _forget_constants(op, args, kwargs)
            return run(*args, **kwargs)
        if not args[0].is_meta:
            try:
                return run(*args, **kwargs)
            except Exception:
                if not isinstance(args[0], FakeTensor):
                    raise
        self.values_read += 1
        return _value(op, args)

    def _all_meta(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with meta tensors: real tensors become meta, and nothing leaves the meta device."""

        def moved(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to("meta") if value.ndim and not value.is_meta and not isinstance(value, FakeTensor) else value
            if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
                return [moved(v) for v in value]
            return torch.device("meta") if isinstance(value, torch.device) else value

        return tuple(moved(a) for a in args), {k: moved(v) for k, v in kwargs.items()}

    def _decision(self, handler: OpHandler, bound: tuple[Any, ...], stands: bool, decisions: dict[Any, Decision]) -> Decision:
        try:
            key = (handler._key(bound), stands)
            found = decisions.get(key)
        except Exception:
            return handler._passing(_exotic(bound) or "its metadata cannot be read").decision
        if found is None:
            if exotic := _exotic(bound):
                return handler._passing(exotic).decision
            metas = tuple(self._stand_in(describe(a), stands) for a in bound)
            found = decisions[key] = handler.decide(metas, bind=False).decision
        return found

    def _stand_in(self, value: Any, stands: bool) -> Any:
        def device(given: torch.device) -> torch.device:
            return self._device if given.type == "meta" or (stands and given.type == "cpu") else given

        if value.__class__ is TensorMeta:
            return value._replace(device=device(value.device))
        if value.__class__ is tuple:
            return tuple(self._stand_in(v, stands) for v in value)
        return device(value) if isinstance(value, torch.device) else value

    def _with_flops(self, op: Any, decision: Decision, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Decision:
        """``decision`` with the operations of matrix products and the like, where its rule does not state them."""
        formula = flop_registry.get(getattr(op, "overloadpacket", None))
        if formula is None or result is None:
            return decision
        try:
            return decision._replace(flops=int(formula(*args, **kwargs, out_val=result)))
        except Exception:
            return decision


class _NoAbort(TorchFunctionMode):
    """Refuses what would end the process: autograd on a fake CUDA tensor in a PyTorch without CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            for t in (*_tensors(args), *_tensors(tuple(kwargs.values()))):
                if isinstance(t, FakeTensor) and t.device.type == "cuda" and t.requires_grad:
                    name = getattr(func, "__name__", str(func))
                    if name in ("__get__", "__set__", "__repr__", "size", "dim", "detach", "requires_grad_", "numel", "is_floating_point"):
                        continue
                    raise DryRunError(f"{name} of a fake CUDA tensor that requires gradients: this PyTorch is built without CUDA, and its "
                                      "autograd would end the process. Build the model under torch.device('meta'), which stands for the "
                                      "GPU, or run it under torch.no_grad()")
        return func(*args, **kwargs)


_LIKE_ITSELF = (torch.Tensor.new_tensor, torch.Tensor.new_full, torch.Tensor.new_zeros, torch.Tensor.new_ones, torch.Tensor.new_empty)


class OnMeta(TorchFunctionMode):
    """Runs a program that is not written for it on the meta device: whatever device it names, tensors are made there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils._device import _device_constructors

        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.cpu, torch.Tensor.xpu):
            return args[0].to("meta")
        if func is torch.tensor or func is torch.as_tensor:
            # The meta device has no use for their data. A number on no device is one on the host, as optimizers keep them, and
            # so is what they add to it.
            made = func(*args, **{**kwargs, "device": "cpu"})
            on_host = not made.ndim and torch.device(kwargs.get("device") or "cpu").type == "cpu"
            return made if on_host else torch.empty_like(made, device="meta", requires_grad=made.requires_grad)
        if func in _device_constructors():
            kwargs["device"] = "meta"
        elif func is torch.Tensor.to:
            args = tuple(torch.device("meta") if _is_device(a) else a for a in args)
            kwargs = {k: "meta" if k == "device" and v is not None else v for k, v in kwargs.items()}
        elif func in _LIKE_ITSELF:
            kwargs.pop("device", None)
        elif kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _is_device(value: Any) -> bool:
    if isinstance(value, torch.device):
        return True
    if isinstance(value, str):
        try:
            torch.device(value)
        except RuntimeError:
            return False
        return True
    return isinstance(value, int) and not isinstance(value, bool)

