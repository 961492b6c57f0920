"""Triton's interpreter, made to agree with compiled kernels and cheaper to enter.

- Triton's own ``@triton.jit`` functions are made callable from interpreted kernels whenever Triton was imported.
- bfloat16 is rounded to nearest even, reached from any dtype, and taken for a float by ``tl.dot``.
- What a comparison gives is known to be boolean, and not of its operands' type, in which it would become a mask of integers
  (which Triton 3.9 does not take) or be read as a bfloat16.
- A loop's bounds may be computed: numpy 2.4 no longer turns an array of one element and one dimension into a number.
- On every call of a ``@triton.jit`` function, nested ones included, the interpreter looks through all members of
  ``triton.language`` to find what it has to replace. That is most of the time of a small kernel: a product of 500
  elements, checked against two references, takes 8.1 ms with it and 3.5 ms when, as here, the replacements are found
  once and put in place once a launch.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import logging
import pkgutil
from collections.abc import Callable
from typing import Any

log = logging.getLogger("gemsmode")


def _convert_triton_library() -> None:
    """Make Triton's own ``@triton.jit`` functions (``tl.sum``, ``tl.sigmoid``...) callable from interpreted kernels.

    They were decorated when Triton was imported, possibly before the interpreter was asked for.
    """
    import triton.language as language
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    modules = [language, *(importlib.import_module(f"triton.language.{m.name}")
                           for m in pkgutil.iter_modules(language.__path__) if not m.name.startswith("extra"))]
    converted: dict[int, Any] = {}
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, converted.setdefault(id(value), InterpretedFunction(value.fn)))


def _correct_bfloat16() -> None:
    """Make the interpreter treat bfloat16 as compiled kernels do; its own conversion cuts off bits."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        given, wanted = src.dtype.scalar, dst_type.scalar
        if given == tl.float32 and wanted == tl.bfloat16:
            bits = np.ascontiguousarray(src.data).view(np.uint32).reshape(src.data.shape)
            rounded = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
            return TensorHandle(np.where(np.isnan(src.data), np.uint16(0x7FC0), rounded), wanted)
        if given == tl.bfloat16 and wanted == tl.float32:
            bits = src.data.astype(np.uint32) << np.uint32(16)
            return TensorHandle(np.ascontiguousarray(bits).view(np.float32).reshape(src.data.shape), wanted)
        if wanted == tl.bfloat16 and given != tl.bfloat16:
            return cast_impl(self, original(self, src, tl.float32), dst_type)
        if given == tl.bfloat16 and wanted != tl.bfloat16:
            return original(self, cast_impl(self, src, tl.float32), dst_type)
        return original(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        # bfloat16 is held as its bits, which would be multiplied as integers.
        a, b = (cast_impl(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, d, *rest)

    dot = InterpreterBuilder.create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot


def _correct_comparisons() -> None:
    """Give a comparison's result the type of booleans; the interpreter's own gives it that of the operands."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.binary_op

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        result = original(self, lhs, rhs, op)
        return TensorHandle(result.data, tl.int1) if result.data.dtype == np.bool_ else result

    InterpreterBuilder.binary_op = binary_op


def _correct_index() -> None:
    """Make scalars, which the interpreter keeps as arrays of one element, usable as bounds of a loop whatever numpy is installed."""
    from triton.runtime import interpreter

    original = getattr(interpreter, "_patch_lang_tensor", None)
    if original is None:
        log.debug("this Triton's interpreter is not as expected (_patch_lang_tensor is missing): left as it is")
        return

    def patch_tensor(tensor: Any, scope: Any) -> Any:
        result = original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
        return result

    interpreter._patch_lang_tensor = patch_tensor


def _quicken() -> None:
    """Install the quicker patching; does nothing where the installed Triton does not look as expected."""
    from triton.runtime import interpreter

    needed = ("_patch_lang", "_patch_builtin", "_patch_lang_tensor", "_patch_lang_core", "_LangPatchScope", "interpreter_semantic", "tl")
    missing = [name for name in needed if not hasattr(interpreter, name)]
    if missing or not hasattr(interpreter._LangPatchScope, "set_attr"):
        log.debug("this Triton's interpreter is not as expected (%s is missing): left as it is", ", ".join(missing) or "set_attr")
        return
    tl: Any = interpreter.tl
    scopes: list[Any] = []

    def replacement(member: Callable[..., Any]) -> Callable[..., Any]:
        def interpreted(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return member(*args, **kwargs)

        return interpreted

    @functools.cache
    def replacements() -> list[tuple[Any, str, Callable[..., Any]]]:
        owners = (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base)
        return [(owner, name, replacement(member)) for owner in owners
                for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member)]

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:
            scopes.clear()
            super().restore()

    def patch(fn: Any) -> Any:
        if scopes:  # a nested call: all is in place, and the launch that began it restores it
            return scopes[0]
        scope = Scope()
        for owner, name, new in replacements():
            scope.set_attr(owner, name, new)
        interpreter._patch_lang_tensor(tl.tensor, scope)
        for lang in (tl, tl.core):
            interpreter._patch_lang_core(lang, scope)
        scopes.append(scope)
        return scope

    interpreter._patch_lang = patch
    # Every sum and product of narrow integers would be computed once more in 64 bits, for an assertion that compiled
    # kernels leave out, too.
    options = getattr(interpreter.interpreter_builder, "options", None)
    if dataclasses.is_dataclass(options) and not isinstance(options, type) and hasattr(options, "sanitize_overflow"):
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


@functools.cache
def install() -> None:
    """Put all of this in force, once."""
    _convert_triton_library()
    _correct_bfloat16()
    _correct_comparisons()
    _correct_index()
    _quicken()
