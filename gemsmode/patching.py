"""``gemsmode.patch(model)``: parts of a model whose structure is known run fused ops; ``gemsmode.unpatch(model)`` takes that back.

    report = gemsmode.patch(model)
    print(report)          # what was changed, and what looked alike and was left

A *pattern* knows a part by what it is made of (its parameters and sub-modules, not its class or name) and then makes sure: a
small copy of it runs on random numbers, in each mode, and must give what the pattern's formula gives. What does not agree is
left as it is, with the reason in the report. So it does not matter which library or version a model is from.

Only ``forward`` of the part is replaced, on the instance: parameters, names, hooks, ``state_dict`` and ``isinstance`` stay as
they were, and other models of the same classes are not touched. What a fused op does not take at run time (parameters of
another dtype than the input, say) runs the part's own ``forward``.

    rms_norm          LlamaRMSNorm and its kin; with a weight that 1 is added to (Gemma)      one kernel for about 6 ops
    gated_mlp         down(act(gate(x)) * up(x)) with SiLU or GELU                            one kernel for 2; of one row, for 4
    qkv               an attention's q_proj, k_proj, v_proj of one row; inference             one kernel for 3
    rotary            an attention that calls ``apply_rotary_pos_emb(q, k, cos, sin)``        one kernel for about 10
    residual_norm     x + attention(norm(x)), then norm, in a layer whose norms come first    one kernel for 2
    skip_layer_norm   LayerNorm(dropout(dense(x)) + residual) (BERT)                          one kernel for 2
    linear_gelu       gelu(dense(x)), alone or before a second layer (BERT, ViT); inference   one kernel for 2
    linear            torch.nn.Linear; inference                                              one op for 4
    gelu              a GELU written out in elementary ops (GPT-2's ``NewGELUActivation``)    one kernel for 8
    causal_lm_loss    ``model.loss_function`` of transformers' language models                1 read of the logits for 3

Each rounds its result once, where the separate ops round after every step: in 16 bits results differ in the last places; in
float32 they agree to about 1e-6.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

Forward = Callable[..., Any]

_MARK = "_gemsmode_patched"
_SHARED = "_gemsmode_shared"
"""Of a layer that is computed together with others: their :class:`_Shared`."""


class NotRecognised(Exception):
    """A part that looks like a pattern's and is not; the text is the reason that the report shows."""


# -- the report --------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """One part of the model that was changed.

    Attributes:
        path: its name in the model (empty for the model itself).
        kind: its class.
        pattern: the pattern's name.
    """

    path: str
    kind: str
    pattern: str


class Left(NamedTuple):
    """One part that looked like a pattern's and was left as it is.

    Attributes:
        path: its name in the model.
        kind: its class.
        pattern: the pattern's name.
        reason: why it was left.
    """

    path: str
    kind: str
    pattern: str
    reason: str


def _grouped(rows: Iterable[tuple[str, ...]]) -> list[tuple[tuple[str, ...], int, str]]:
    """Rows (path, ...) by all but their path: the rest, how many there are, and the first path."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for path, *rest in rows:
        groups.setdefault(tuple(rest), []).append(path)
    return [(rest, len(paths), paths[0] or "(the model)") for rest, paths in groups.items()]


@dataclass
class PatchReport:
    """What :func:`patch` did to a model.

    Attributes:
        model: the model's class.
        changes: the parts that were changed, in the model's order.
        left: the parts that looked like a pattern's and were left.
    """

    model: str
    changes: list[Change] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        def table(columns: str, rows: Iterable[tuple[str, ...]]) -> Table:
            found = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
            for name in columns.split(","):
                found.add_column(name, justify="right" if name == "parts" else "left", overflow="fold")
            for row in rows:
                found.add_row(*map(Text, row))
            return found

        parts: list[Any] = [Text.assemble((f"gemsmode.patch({self.model})", "bold"), f": {len(self.changes)} parts changed")]
        if self.changes:
            parts.append(table("pattern,class,parts,first", (
                (pattern, kind, str(count), first) for (kind, pattern), count, first in _grouped(self.changes))))
        if self.left:
            parts += [Text(), Text.assemble(("Left as they are", "bold"), f": {len(self.left)} parts")]
            parts.append(table("pattern,class,parts,first,reason", (
                (pattern, kind, str(count), first, reason) for (kind, pattern, reason), count, first in _grouped(self.left))))
        return Group(*parts)

    def __str__(self) -> str:
        from gemsmode.tracing.table import plain

        return plain(self)


# -- patterns ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pattern:
    """A part of a model that a fused op can stand for.

    Attributes:
        name: to select it by.
        recognise: given a module, the function that takes its ``forward``'s place, or by their names the functions for some of
            its children, which are then computed together; None if the module is nothing of the kind. Raises
            :class:`NotRecognised` if it only looks so.
        attribute: what of the module is replaced.
        of_children: whether ``recognise`` gives functions for children.
    """

    name: str
    recognise: Callable[[torch.nn.Module], Any]
    attribute: str = "forward"
    of_children: bool = False


PATTERNS: dict[str, Pattern] = {}
"""Every pattern by name, in the order in which they are tried; a module takes the first that recognises it."""


def pattern(name: str, attribute: str = "forward", of_children: bool = False) -> Callable[[Callable[[torch.nn.Module], Any]], Any]:
    """Declare a pattern; the function decorated is its ``recognise``."""

    def decorate(recognise: Callable[[torch.nn.Module], Any]) -> Any:
        PATTERNS[name] = Pattern(name, recognise, attribute, of_children)
        return recognise

    return decorate


def _fused() -> Any:
    from gemsmode.mode import load_ops

    load_ops()
    from gemsmode.ops import fused

    return fused


def _own(module: torch.nn.Module) -> Callable[..., Any]:
    """The module's own ``forward``, as its class has it."""
    return types.MethodType(type(module).forward, module)


def _numbers(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def _close(got: Any, expected: torch.Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Raise :class:`NotRecognised` unless ``got`` is ``expected``. Modules that compute in float32 stay within the tolerance."""
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape:
        raise NotRecognised(f"it does not give one tensor of {what}'s shape")
    scale = expected.abs().max().clamp_min(1e-30)
    error = ((got.double() - expected).abs().max() / scale).item()
    if not error <= tolerance:
        raise NotRecognised(f"it does not compute {what}: off by {error:.1e} of the largest value")


def _try(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What ``function`` (a module's own, given a small copy of it) gives.

    Raises:
        NotRecognised: it raises: the copy is not what the module expects to be.
    """
    try:
        return function(*args, **kwargs)
    except NotRecognised:
        raise
    except Exception as error:
        text = str(error).strip().splitlines()
        raise NotRecognised(f"a small copy of it does not run: {type(error).__name__}: {text[0] if text else ''}") from None


def _small(module: torch.nn.Module, parts: dict[str, torch.nn.Module], training: bool = False) -> torch.nn.Module:
    """A copy of ``module`` with other sub-modules, without hooks."""
    clone = copy.copy(module)
    clone.__dict__ = {k: v for k, v in module.__dict__.items() if k not in ("forward", _MARK, _SHARED)}
    clone.__dict__["_modules"] = dict(parts)
    clone.__dict__["training"] = training
    for name in clone.__dict__:
        if "hooks" in name and isinstance(clone.__dict__[name], dict):
            clone.__dict__[name] = type(clone.__dict__[name])()
    return clone


def _linear(seed: int, inputs: int, outputs: int, bias: bool) -> torch.nn.Linear:
    layer = torch.nn.Linear(inputs, outputs, bias, dtype=torch.float64, device="cpu")
    layer.weight.data.copy_(_numbers(seed, outputs, inputs))
    if bias:
        layer.bias.data.copy_(_numbers(seed + 1, outputs))
    return layer


def _is_linear(module: torch.nn.Module | None) -> bool:
    """Whether ``module`` is a linear layer (a plain one, or one of fewer bits or more processes in its place)."""
    return module is not None and "Linear" in type(module).__name__ and hasattr(module, "weight")


def _has_hooks(module: torch.nn.Module) -> bool:
    """Whether calling ``module`` does more than its ``forward``."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _does_more(module: torch.nn.Module, kind: type[torch.nn.Module]) -> bool:
    """Whether calling ``module`` does more than ``kind`` does: another class, hooks, or a ``forward`` that others put there."""
    return (type(module) is not kind or _has_hooks(module)
            or ("forward" in module.__dict__ and "forward" not in module.__dict__.get(_MARK, ())))


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _is_here(module: torch.nn.Module, input: torch.Tensor) -> bool:
    """Whether the weight of ``module`` can be used without calling it: its hooks may gather it, or bring it to this device."""
    weight = module.weight
    return type(weight) in _PLAIN and weight.device == input.device and not _does_more(module, torch.nn.Linear)


def _parameters_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())


# -- RMS norm ----------------------------------------------------------------------------------------------------------

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon")


class _Norm(NamedTuple):
    """What is known of an RMS norm: the name of its eps, and whether 1 is added to its weight."""

    eps: str
    offset: bool


def _rms_norm_of(module: torch.nn.Module | None) -> _Norm | None:
    """What is known of ``module`` if it is an RMS norm; None if it does not look like one.

    Raises:
        NotRecognised: it looks like one and computes something else.
    """
    if module is None or list(dict(module.named_parameters(recurse=False))) != ["weight"] or module._modules or module._buffers:
        return None
    if module.weight.ndim != 1 or isinstance(module, torch.nn.LayerNorm):
        return None
    eps = next((n for n in _EPS_NAMES if isinstance(getattr(module, n, None), float)), None)
    if eps is None:
        return None
    size = module.weight.shape[0]
    w = _numbers(0, size).float()
    results = []
    for seed, scale in ((1, 1.0), (2, math.sqrt(getattr(module, eps))), (3, 100.0)):
        x = _numbers(seed, 2, 3, size, scale=scale).float()
        given = {"weight": torch.nn.Parameter(w, requires_grad=False)}
        for training in (False, True):
            clone = _small(module, {}, training)
            clone.__dict__["_parameters"] = given
            results.append((x, _try(type(module).forward, clone, x)))
    refusal: NotRecognised | None = None
    for offset in (False, True):
        try:
            for x, got in results:
                h = x.double() * (x.double().square().mean(-1, keepdim=True) + getattr(module, eps)).rsqrt()
                _close(got, h * (w.double() + offset), "an RMS norm")
            return _Norm(eps, offset)
        except NotRecognised as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal


def _scale(norm: torch.nn.Module, offset: bool) -> torch.Tensor:
    return 1.0 + norm.weight.float() if offset else norm.weight


@pattern("rms_norm")
def _rms_norm(module: torch.nn.Module) -> Forward | None:
    known = _rms_norm_of(module)
    if known is None:
        return None
    fused, (eps, offset) = _fused(), known

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = self.weight
        if not offset and weight.dtype != hidden_states.dtype:
            return type(self).forward(self, hidden_states)
        return fused.rms_norm(hidden_states, weight.shape, _scale(self, offset), getattr(self, eps))

    return forward


# -- gated MLP ---------------------------------------------------------------------------------------------------------

_GATES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation", "intermediate_act_fn")
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def _activation_of(function: Any) -> str | None:
    """The name of the activation that ``function`` is, if it is a known one."""
    x = torch.linspace(-12, 12, 241, dtype=torch.float64, device="cpu")
    for name, known in _ACTIVATIONS.items():
        try:
            _close(_try(function, x.clone()), known(x), name, 1e-9)
            return name
        except NotRecognised:
            continue
    return None


@pattern("gated_mlp")
def _gated_mlp(module: torch.nn.Module) -> Forward | None:
    children = module._modules
    names = next((n for n in _GATES if all(_is_linear(children.get(c)) for c in n)), None)
    if names is None or module._parameters:
        return None
    act = next((n for n in _ACTIVATION_NAMES if callable(getattr(module, n, None))), None)
    if act is None:
        raise NotRecognised("its activation is not found")
    others = set(children) - {*names, act}
    if others:
        raise NotRecognised(f"it has other parts: {', '.join(sorted(others))}")
    function = getattr(module, act)
    kind = _activation_of(function)
    if kind is None:
        raise NotRecognised("its activation is neither SiLU nor GELU")
    gate, up, down = names
    for training in (False, True):
        parts: dict[str, torch.nn.Module] = {gate: _linear(0, 6, 10, True), up: _linear(2, 6, 10, False), down: _linear(4, 10, 6, True)}
        if act in children:
            parts[act] = function
        clone = _small(module, parts, training)
        x = _numbers(9, 2, 3, 6)
        expected = parts[down](_ACTIVATIONS[kind](parts[gate](x)) * parts[up](x))
        _close(_try(type(module).forward, clone, x), expected, "a gated MLP")
    fused = _fused()

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        first, second = getattr(self, gate), getattr(self, up)
        if (fused.is_one_row(x, first.weight, second.weight) and _is_here(first, x) and _is_here(second, x)
                and first.bias is None and second.bias is None):
            return getattr(self, down)(fused.gated_linear(x, first.weight, second.weight, kind))
        a, b = first(x), second(x)
        if kind == "silu":
            return getattr(self, down)(fused.silu_and_mul(a, b))
        return getattr(self, down)(fused.gelu_and_mul(a, b, "none" if kind == "gelu" else "tanh"))

    return forward


# -- rotary embedding in an attention ----------------------------------------------------------------------------------

_ROTARY = "apply_rotary_pos_emb"


def _fused_rotary(function: types.FunctionType) -> Forward:
    """The fused form of a model's ``apply_rotary_pos_emb``.

    Raises:
        NotRecognised: it is not the one of Llama and its kin.
    """
    names = [p.name for p in _parameters_of(function)]
    if names[:4] != ["q", "k", "cos", "sin"] or names[4:] != ["unsqueeze_dim"]:
        raise NotRecognised(f"its {_ROTARY} takes other arguments: {', '.join(names)}")
    if _parameters_of(function)[4].default != 1:
        raise NotRecognised(f"its {_ROTARY} has another default for unsqueeze_dim")
    c, s = _numbers(2, 2, 5, 8), _numbers(3, 2, 5, 8)
    for dim in (1, 2):
        q, k = (_numbers(i, 2, *((h, 5) if dim == 1 else (5, h)), 8) for i, h in ((0, 4), (1, 2)))
        got = _try(function, q, k, c, s, unsqueeze_dim=dim)
        for x, y in zip((q, k), got):
            a, b = x[..., :4], x[..., 4:]
            expected = x * c.unsqueeze(dim) + torch.cat((-b, a), -1) * s.unsqueeze(dim)
            _close(y, expected, "a rotary embedding in halves")
    fused = _fused()

    def apply_rotary_pos_emb(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> Any:
        if (unsqueeze_dim not in (1, 2) or q.ndim != 4 or cos.ndim != 3 or not q.dtype == k.dtype == cos.dtype == sin.dtype
                or cos.shape != sin.shape or cos.shape[-1] != q.shape[-1]):
            return function(q, k, cos, sin, unsqueeze_dim)
        return fused.turn(q, k, cos, sin, None, False, True, unsqueeze_dim == 1)

    return apply_rotary_pos_emb


@pattern("rotary")
def _rotary(module: torch.nn.Module) -> Forward | None:
    own = type(module).forward
    inner = inspect.unwrap(own)
    if not isinstance(inner, types.FunctionType) or _ROTARY not in inner.__code__.co_names:
        return None
    function = inner.__globals__.get(_ROTARY)
    if not isinstance(function, types.FunctionType):
        raise NotRecognised(f"its {_ROTARY} is not a plain function")
    # The same code, with another function under that name.
    renamed = _copied(inner, {**inner.__globals__, _ROTARY: _fused_rotary(function)}, inner.__closure__)
    return _decorated_like(own, inner, renamed)


def _copied(function: types.FunctionType, names: dict[str, Any], closure: tuple[types.CellType, ...] | None) -> types.FunctionType:
    copied = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copied.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copied, function, updated=())
    del copied.__dict__["__wrapped__"]
    return copied


def _decorated_like(own: Any, inner: types.FunctionType, instead: types.FunctionType) -> types.FunctionType:
    """``instead`` with the decorators (made with ``functools.wraps``) that make ``own`` of ``inner``.

    Raises:
        NotRecognised: a decorator does not keep what it decorates in a variable of its own.
    """
    if own is inner:
        return instead
    wrapped = own.__wrapped__
    within = _decorated_like(wrapped, inner, instead)
    cells = getattr(own, "__closure__", None) or ()
    if not isinstance(own, types.FunctionType) or not any(_content(cell) is wrapped for cell in cells):
        raise NotRecognised("its forward is decorated in a way that cannot be copied")
    copied = _copied(own, own.__globals__, tuple(types.CellType(within) if _content(cell) is wrapped else cell for cell in cells))
    copied.__dict__["__wrapped__"] = within
    return copied


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return None


# -- a layer whose norms come first: residual and norm -----------------------------------------------------------------


class _Roles(NamedTuple):
    """The names of a layer's parts; ``dropout`` may be None."""

    first: str
    attention: str
    second: str
    mlp: str
    dropout: str | None = None


_LAYERS = (
    _Roles("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),  # Llama and its kin
    _Roles("ln_1", "attn", "ln_2", "mlp"),  # GPT-2
    _Roles("layernorm_before", "attention", "layernorm_after", "mlp", "dropout"),  # ViT
)


class _Recording(torch.nn.Module):
    """Stands for an attention: twice its input, and what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return 2 * next(a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)), None


class _Cubed(torch.nn.Module):
    """Stands for an MLP."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x * x


class _Doubled(torch.nn.Module):
    """Stands for a dropout, to tell where it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def _norm_of(module: torch.nn.Module | None) -> _Norm | None:
    """What is known of a layer's norm: an RMS norm, or PyTorch's own LayerNorm (whose ``eps`` goes by that name)."""
    if isinstance(module, torch.nn.LayerNorm):
        if type(module) is not torch.nn.LayerNorm:
            return None
        return _Norm("eps", False) if len(module.normalized_shape) == 1 and module.weight is not None else None
    return _rms_norm_of(module)


def _little_norm(source: torch.nn.Module, seed: int, size: int) -> torch.nn.Module:
    clone = _small(source, {})
    given = {n: torch.nn.Parameter(_numbers(seed + i, size).float(), requires_grad=False)
             for i, (n, p) in enumerate(source._parameters.items()) if p is not None}
    clone.__dict__["_parameters"] = {**source._parameters, **given}
    if isinstance(source, torch.nn.LayerNorm):
        clone.__dict__["normalized_shape"] = (size,)
    return clone


def _normalized(x: torch.Tensor, norm: Any, known: _Norm) -> torch.Tensor:
    """What the norm should give, in float64."""
    wide = x.double()
    if isinstance(norm, torch.nn.LayerNorm):
        bias = None if norm.bias is None else norm.bias.double()
        return F.layer_norm(wide, norm.normalized_shape, norm.weight.double(), bias, norm.eps)
    return wide * (wide.square().mean(-1, keepdim=True) + getattr(norm, known.eps)).rsqrt() * (norm.weight.double() + known.offset)


_HIDDEN = "hidden_states"


def _call_of_attention(attention: _Recording, keywords: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Which arguments of the layer reach the attention: those by position, and by keyword under which name.

    Raises:
        NotRecognised: it is not called once, with the layer's own arguments and further keywords as they are.
    """
    (args, given), *more = attention.calls or [((), {})]
    names = {id(value): name for name, value in keywords.items()}

    def name_of(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return _HIDDEN
        if id(value) not in names:
            raise NotRecognised("its attention is given something else than the layer's arguments")
        return names[id(value)]

    positions = tuple([name_of(a) for a in args])
    by_keyword = {key: name_of(value) for key, value in given.items()}
    if more or by_keyword.pop("another_keyword", None) != "another_keyword" or [*positions, *by_keyword.values()].count(_HIDDEN) != 1:
        raise NotRecognised("its attention is not called once, with the layer's keywords")
    return positions, by_keyword


@pattern("residual_norm")
def _residual_norm(module: torch.nn.Module) -> Forward | None:
    roles = next((r for r in _LAYERS if set(module._modules) == {n for n in r if n is not None}), None)
    if roles is None or module._parameters:
        return None
    first, second = getattr(module, roles.first), getattr(module, roles.second)
    known = _norm_of(second)
    if known is None or _norm_of(first) != known or type(first) is not type(second):
        raise NotRecognised("its norms are not RMS norms, or LayerNorms, of one kind")
    own = _parameters_of(type(module).forward)[1:]
    if not own or own[0].name != _HIDDEN or own[-1].kind is not inspect.Parameter.VAR_KEYWORD:
        raise NotRecognised("its forward does not take hidden_states and keywords for the attention")
    names = [p.name for p in own[1:-1]]
    # A cross-attention that is not there: with these arguments the layer runs its own code.
    absent = [n for n in names if n.startswith("encoder_")]
    keywords: dict[str, Any] = {n: object() for n in (*names, "another_keyword") if n not in absent}
    calls = []
    for training in (False, True):
        norms = _little_norm(first, 0, 6), _little_norm(second, 2, 6)
        attention = _Recording()
        parts: dict[str, torch.nn.Module] = {roles.first: norms[0], roles.attention: attention, roles.second: norms[1], roles.mlp: _Cubed()}
        if roles.dropout is not None:
            parts[roles.dropout] = _Doubled()
        clone = _small(module, parts, training)
        x = _numbers(5, 2, 3, 6).float()
        got = _try(type(module).forward, clone, x, **keywords)
        times = 1 if roles.dropout is None else 2
        total = x.double() + times * 2 * _normalized(x, norms[0], known)
        _close(got, total + times * _normalized(total, norms[1], known)**3, "a layer whose norms come first", 1e-4)
        calls.append(_call_of_attention(attention, keywords))
    if calls[0] != calls[1]:
        raise NotRecognised("its attention is called otherwise in training")
    fused, (eps, offset), (by_position, by_keyword) = _fused(), known, calls[0]
    defaults = {p.name: p.default for p in own[1:-1] if p.default is not inspect.Parameter.empty}
    is_layer_norm = isinstance(second, torch.nn.LayerNorm)

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        norm = getattr(self, roles.second)
        weight = norm.weight
        given = {**defaults, **dict(zip(names, args)), **kwargs}
        if (_has_hooks(norm) or (not offset and weight.dtype != hidden_states.dtype)
                or any([given[n] is not None for n in absent]) or len(given) < len(names)):
            return type(self).forward(self, hidden_states, *args, **kwargs)
        given[_HIDDEN] = getattr(self, roles.first)(hidden_states)
        more = {n: value for n, value in given.items() if n not in names and n != _HIDDEN}
        positions, keywords = [given[n] for n in by_position], {k: given[n] for k, n in by_keyword.items()}
        attended = getattr(self, roles.attention)(*positions, **keywords, **more)[0]
        if roles.dropout is not None:
            attended = getattr(self, roles.dropout)(attended)
        if is_layer_norm and attended.dtype == hidden_states.dtype:
            normed, residual = fused.add_layer_norm(attended, hidden_states, weight.shape, weight, norm.bias, norm.eps)
        elif is_layer_norm:
            # Under autocast the attention's result has 16 bits and PyTorch's own norm gives float32.
            residual = hidden_states + attended
            normed = norm(residual)
        else:
            normed, residual = fused.skip_rms_norm(attended, hidden_states, weight.shape, _scale(norm, offset), getattr(norm, eps))
        result = getattr(self, roles.mlp)(normed)
        if roles.dropout is not None:
            result = getattr(self, roles.dropout)(result)
        return residual + result

    return forward


# -- BERT's output -----------------------------------------------------------------------------------------------------


@pattern("skip_layer_norm")
def _skip_layer_norm(module: torch.nn.Module) -> Forward | None:
    children = module._modules
    if len(children) != 3 or module._parameters:
        return None
    dense = next((n for n, c in children.items() if _is_linear(c)), None)
    norm = next((n for n, c in children.items() if type(c) is torch.nn.LayerNorm), None)
    dropout = next((n for n, c in children.items() if type(c) is torch.nn.Dropout), None)
    if dense is None or norm is None or dropout is None or len(_parameters_of(type(module).forward)) != 3:
        return None
    eps: Any = children[norm].eps
    for training in (False, True):
        little = torch.nn.LayerNorm(6, eps=eps, dtype=torch.float64, device="cpu")
        little.weight.data.copy_(_numbers(0, 6))
        little.bias.data.copy_(_numbers(1, 6))
        layer = _linear(2, 5, 6, True)
        clone = _small(module, {dense: layer, norm: little, dropout: _Doubled()}, training)
        x, residual = _numbers(7, 2, 3, 5), _numbers(8, 2, 3, 6)
        got = _try(type(module).forward, clone, x, residual)
        _close(got, little(2 * layer(x) + residual), "a layer norm of dense(x) + residual")
    fused = _fused()

    def forward(self: Any, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        last = getattr(self, norm)
        x = getattr(self, dropout)(getattr(self, dense)(hidden_states))
        # Under autocast PyTorch's own norm of a 16-bit sum gives float32.
        if _has_hooks(last) or x.dtype != input_tensor.dtype or (last.weight is not None and last.weight.dtype != x.dtype):
            return last(x + input_tensor)
        return fused.skip_layer_norm(x, input_tensor, last.normalized_shape, last.weight, last.bias, last.eps)

    return forward


# -- linear layers -----------------------------------------------------------------------------------------------------


@pattern("linear")
def _linear_layer(module: torch.nn.Module) -> Forward | None:
    if type(module) is not torch.nn.Linear:
        return None
    fused = _fused()

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        return fused.linear(input, self.weight, self.bias)

    return forward


# -- the projections of an attention -----------------------------------------------------------------------------------

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class _Ahead(NamedTuple):
    """Results of layers that were computed with the first one.

    Attributes:
        input: what they were computed from...
        version: ... and how often it had been written to by then.
        stream: the CUDA stream that they are computed on.
        results: by layer (its ``id``) its weight and its result; taken out when the layer is called.
    """

    input: torch.Tensor
    version: int
    stream: Any
    results: dict[int, tuple[torch.Tensor, torch.Tensor]]


class _Shared:
    """Layers of one input, the first of which computes them all where that pays, and the results until the others are called.

    A result is used only for the very input that it was computed from, with the very weight, so that it does not matter who
    calls the layers, in which order and whether at all.
    """

    def __init__(self, layers: tuple[torch.nn.Module, ...]) -> None:
        self.layers = layers
        self.ahead: _Ahead | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "ahead": None}

    def take(self, layer: torch.nn.Module, input: torch.Tensor) -> torch.Tensor | None:
        """The result of ``layer`` for ``input``, if it is here."""
        ahead = self.ahead
        if ahead is None or ahead.input is not input or ahead.version != input._version or ahead.stream != _stream_of(input):
            return None
        weight, result = ahead.results.pop(id(layer), (None, None))
        if not ahead.results:
            self.ahead = None
        return result if weight is layer.weight else None


def _stream_of(tensor: torch.Tensor) -> Any:
    return torch._C._cuda_getCurrentRawStream(tensor.device.index) if tensor.is_cuda else None


@pattern("qkv", of_children=True)
def _qkv(module: torch.nn.Module) -> dict[str, Forward] | None:
    layers = [module._modules.get(name) for name in _PROJECTIONS]
    if any(type(layer) is not torch.nn.Linear for layer in layers):
        return None
    if len({layer.in_features for layer in layers if isinstance(layer, torch.nn.Linear)}) != 1:
        return None
    fused = _fused()

    def first(self: Any, input: torch.Tensor) -> torch.Tensor:
        shared: _Shared = self.__dict__[_SHARED]
        q, k, v = shared.layers
        if (not fused.is_one_row(input, q.weight, k.weight, v.weight) or not (_is_here(k, input) and _is_here(v, input))
                or input.is_inference()):  # which says nothing of having been written to since
            return fused.linear(input, self.weight, self.bias)
        result, *others = fused.qkv_linear(input, q.weight, k.weight, v.weight, q.bias, k.bias, v.bias)
        shared.ahead = _Ahead(input, input._version, _stream_of(input),
                              {id(layer): (layer.weight, y) for layer, y in zip((k, v), others)})
        return result

    def other(self: Any, input: torch.Tensor) -> torch.Tensor:
        result = self.__dict__[_SHARED].take(self, input)
        return fused.linear(input, self.weight, self.bias) if result is None else result

    return dict(zip(_PROJECTIONS, (first, other, other)))


# -- a linear layer and its GELU ---------------------------------------------------------------------------------------

_BEFORE_GELU = (("dense",), ("fc1", "fc2"))


@pattern("linear_gelu")
def _linear_gelu(module: torch.nn.Module) -> Forward | None:
    children = module._modules
    names = next((n for n in _BEFORE_GELU if all(_is_linear(children.get(c)) for c in n)), None)
    act = next((n for n in _ACTIVATION_NAMES if callable(getattr(module, n, None))), None)
    if names is None or act is None or module._parameters or set(children) - {*names, act}:
        return None
    if [p.name for p in _parameters_of(type(module).forward)] != ["self", "hidden_states"]:
        return None
    function = getattr(module, act)
    kind = _activation_of(function)
    if kind not in ("gelu", "gelu_tanh"):
        return None
    for training in (False, True):
        layers = [_linear(2 * i, 6 + 4 * (i % 2), 10 - 4 * (i % 2), True) for i in range(len(names))]
        parts: dict[str, torch.nn.Module] = dict(zip(names, layers))
        if act in children:
            parts[act] = function
        x = _numbers(9, 2, 3, 6)
        expected = _ACTIVATIONS[kind](layers[0](x))
        for layer in layers[1:]:
            expected = layer(expected)
        _close(_try(type(module).forward, _small(module, parts, training), x), expected, "a linear layer and its GELU")
    fused, approximate = _fused(), "none" if kind == "gelu" else "tanh"

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        first, last = getattr(self, names[0]), getattr(self, act)
        if _does_more(first, torch.nn.Linear) or (isinstance(last, torch.nn.Module) and _has_hooks(last)):
            x = last(first(hidden_states))
        else:
            x = fused.linear_gelu(hidden_states, first.weight, first.bias, approximate)
        for name in names[1:]:
            x = getattr(self, name)(x)
        return x

    return forward


# -- GELU in elementary ops --------------------------------------------------------------------------------------------


class _CountOps(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pattern("gelu")
def _gelu(module: torch.nn.Module) -> Forward | None:
    if module._parameters or module._buffers or module._modules or "gelu" not in type(module).__name__.lower():
        return None
    if len(_parameters_of(type(module).forward)) != 2:
        return None
    own, x = _own(module), _numbers(0, 4)
    counting = _CountOps()
    with counting:
        _try(own, x)
    if counting.count <= 1:
        return None  # one op already
    kind = _activation_of(own)
    if kind not in ("gelu", "gelu_tanh"):
        raise NotRecognised("it is neither GELU nor its tanh form")
    approximate = "none" if kind == "gelu" else "tanh"

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        return F.gelu(input, approximate=approximate)

    return forward


# -- the loss of a language model --------------------------------------------------------------------------------------


@pattern("causal_lm_loss", attribute="loss_function")
def _causal_lm_loss(module: torch.nn.Module) -> Forward | None:
    function = getattr(type(module), "loss_function", None)
    if not isinstance(function, property) or getattr(module, "lm_head", None) is None:
        return None
    own = module.loss_function
    if not isinstance(own, types.FunctionType):
        raise NotRecognised("its loss_function is not a plain function")
    names = [p.name for p in _parameters_of(own)]
    if names[:6] != ["logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels"]:
        return None
    logits, labels = _numbers(0, 2, 5, 7).float(), torch.tensor([[3, -100, 6, 0, 1], [5, 5, -100, 2, 4]], device="cpu")
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:]
    cases: tuple[tuple[dict[str, Any], torch.Tensor], ...] = (
        ({}, shifted), ({"num_items_in_batch": 3}, shifted), ({"shift_labels": labels}, labels))
    for keywords, target in cases:
        got = _try(own, logits, labels, 7, **keywords)
        items = keywords.get("num_items_in_batch")
        expected = F.cross_entropy(logits.double().view(-1, 7), target.reshape(-1), reduction="sum" if items else "mean")
        _close(got, expected / (items or 1), "the loss of a causal language model")
    fused = _fused()

    def loss_function(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, num_items_in_batch: Any = None, ignore_index: int = -100,
                      shift_labels: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        if shift_labels is None:
            shift_labels = torch.cat((labels[..., 1:], labels.new_full((*labels.shape[:-1], 1), ignore_index)), -1)
        flat, targets = logits.reshape(-1, vocab_size), shift_labels.reshape(-1).to(logits.device)
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = fused.cross_entropy_loss(flat, targets, None, reduction, ignore_index, float32=True)
        if num_items_in_batch is None:
            return loss
        return loss / (num_items_in_batch.to(loss.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)

    return loss_function


# -- patch and unpatch -------------------------------------------------------------------------------------------------


def _selected(only: Iterable[str] | str | None, skip: Iterable[str] | str) -> list[Pattern]:
    def names(given: Iterable[str] | str) -> list[str]:
        return [given] if isinstance(given, str) else list(given)

    for name in (*names(only or ()), *names(skip)):
        if name not in PATTERNS:
            raise ValueError(f"no pattern is called {name!r}; there are {', '.join(PATTERNS)}")
    wanted = set(PATTERNS if only is None else names(only)) - set(names(skip))
    return [p for n, p in PATTERNS.items() if n in wanted]


def _replaced_already(module: torch.nn.Module, attribute: str) -> bool:
    """Whether someone else has put something in the place of the class's own."""
    return attribute in module.__dict__ or (attribute == "loss_function" and "_loss_function" in module.__dict__)


def patch(model: torch.nn.Module, only: Iterable[str] | str | None = None, skip: Iterable[str] | str = ()) -> PatchReport:
    """Let the parts of ``model`` that gemsmode knows run its fused ops.

    Works in place; :func:`unpatch` takes it back. Patching again changes what is not changed yet. ``copy.deepcopy`` of a
    patched model is patched.

    Args:
        model: a module of ``transformers`` or any other.
        only: names of the patterns to use (see :data:`PATTERNS`); by default all.
        skip: names of patterns not to use.

    Returns:
        What was changed, and what looked like a pattern's part and was left, and why.

    Raises:
        ValueError: no pattern has that name.
    """
    chosen = _selected(only, skip)
    report = PatchReport(type(model).__name__)
    with torch.no_grad(), _disable_current_modes():
        for path, module in model.named_modules():
            for one in chosen:
                if not one.of_children and one.attribute in module.__dict__.get(_MARK, ()):
                    continue
                try:
                    found = one.recognise(module)
                    if found is None:
                        continue
                    together = found if one.of_children else {"": found}
                    parts = {name: module.get_submodule(name) for name in together}
                    if any(one.attribute in part.__dict__.get(_MARK, ()) for part in parts.values()):
                        continue
                    for part in parts.values():
                        if _replaced_already(part, one.attribute):
                            raise NotRecognised(f"its {one.attribute} was replaced by something else already")
                except NotRecognised as refusal:
                    report.left.append(Left(path, type(module).__name__, one.name, str(refusal)))
                    continue
                shared = _Shared(tuple(parts.values()))
                for name, part in parts.items():
                    replacement = together[name]
                    setattr(part, one.attribute, types.MethodType(replacement, part) if one.attribute == "forward" else replacement)
                    part.__dict__[_MARK] = {**part.__dict__.get(_MARK, {}), one.attribute: one.name}
                    if name:
                        part.__dict__[_SHARED] = shared
                    report.changes.append(Change(".".join(filter(None, (path, name))), type(part).__name__, one.name))
    return report


def unpatch(model: torch.nn.Module) -> list[Change]:
    """Take back what :func:`patch` did to ``model``.

    Returns:
        The parts that run their own code again.
    """
    undone = []
    for path, module in model.named_modules():
        marks: dict[str, str] = module.__dict__.pop(_MARK, {})
        module.__dict__.pop(_SHARED, None)
        for attribute, name in marks.items():
            module.__dict__.pop("_loss_function" if attribute == "loss_function" else attribute, None)
            undone.append(Change(path, type(module).__name__, name))
    return undone


def patched(model: torch.nn.Module) -> Iterator[Change]:
    """The parts of ``model`` that are patched at the moment."""
    for path, module in model.named_modules():
        for name in module.__dict__.get(_MARK, {}).values():
            yield Change(path, type(module).__name__, name)
