"""Which ``nn.Module`` a call belongs to, forward and backward.

Forward: global module hooks, in force only while a recorder is, keep a stack of paths per thread. Backward: autograd
numbers its nodes as the forward creates them, so the number of the node that is running says during which module's
forward it was made; an ``AccumulateGrad`` node belongs to the module of its parameter.

Each thread numbers its own nodes, and a node does not say whose number it has. A backward that runs in a thread of
its own (autograd's, for a GPU) is therefore looked up among the numbers of the first thread that ran a forward: with
forwards in several threads, or a re-entrant checkpoint on a GPU, some of it may be put to another module.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from typing import Any

import torch
from torch.autograd import _get_sequence_nr
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary, WeakTensorKeyDictionary

MAX_MARKS = 1_000_000
"""Module boundaries remembered per thread; the older half goes first, whose backward has long run."""

_NO_NUMBER = 2**64 - 1


class Place:
    """Where a thread is: the stack of modules, and the autograd numbers at which the innermost one changed."""

    __slots__ = ("module", "numbers", "paths", "phase", "runs_forwards", "stack")

    def __init__(self) -> None:
        self.stack: list[tuple[int, str, str]] = []
        self.module, self.phase = "", "forward"
        self.numbers = array("Q")
        self.paths: list[str] = []
        self.runs_forwards = False

    def push(self, key: int, module: str, phase: str) -> None:
        self.stack.append((key, module, phase))
        self._moved()

    def pop(self, key: int) -> None:
        """Leave ``key`` and whatever was entered since and never left."""
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i][0] == key:
                del self.stack[i:]
                self._moved()
                return

    def _moved(self) -> None:
        _, self.module, self.phase = self.stack[-1] if self.stack else (0, "", "forward")
        number = _get_sequence_nr()
        if not self.runs_forwards:
            self.runs_forwards = torch._C._current_graph_task_id() == -1
        if self.numbers and self.numbers[-1] == number:
            self.paths[-1] = self.module
            return
        self.numbers.append(number)
        self.paths.append(self.module)
        if len(self.numbers) > MAX_MARKS:
            del self.numbers[: MAX_MARKS // 2]
            del self.paths[: MAX_MARKS // 2]


class ModuleTracker:
    """Names modules and keeps each thread's :class:`Place`, while entered.

    A module's path starts at the outermost module that was called: ``BertModel.encoder.layer.0``. A second model of
    the same class is ``BertModel#2``.
    """

    def __init__(self) -> None:
        self._names = WeakIdKeyDictionary()  # a module may define equality
        self._parameters = WeakTensorKeyDictionary()
        self._roots: dict[str, int] = {}
        self._local = threading.local()
        self._places: list[Place] = []
        self._handles: list[Any] = []
        self._lock = threading.Lock()
        self.saw_compiled = False

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Hook every module's forward and every optimizer's step of the process."""
        if not self._handles:
            self._handles = [
                register_module_forward_pre_hook(self._enter_module),
                register_module_forward_hook(self._leave_module, always_call=True),
                register_optimizer_step_pre_hook(self._enter_step),
                register_optimizer_step_post_hook(self._leave_step),
            ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for place in self._places:
            place.stack.clear()
            place.module, place.phase = "", "forward"

    def _enter_module(self, module: torch.nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        place = self.here()
        place.push(id(module), self._names.get(module) or self._name(module, place), place.phase)

    def _leave_module(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.here().pop(id(module))

    def _enter_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.here().push(id(optimizer), type(optimizer).__name__, "optimizer")

    def _leave_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.here().pop(id(optimizer))

    def _name(self, module: torch.nn.Module, place: Place) -> str:
        """Name ``module``, and the modules and parameters in it."""
        kind = type(module).__name__
        self.saw_compiled = self.saw_compiled or kind == "OptimizedModule"
        with self._lock:
            if place.module:
                root = f"{place.module}.{kind}"
            elif not module._modules and not module._parameters:
                root = kind  # a loss made anew at every step, say: not another model
            else:
                count = self._roots[kind] = self._roots.get(kind, 0) + 1
                root = kind if count == 1 else f"{kind}#{count}"
            try:
                members = list(module.named_modules())
            except TypeError:  # one of them has no hash
                members = [("", module)]
            for name, child in members:
                path = f"{root}.{name}" if name else root
                path = path.replace("._orig_mod", "")
                self._names[child] = path
                for parameter in child._parameters.values():
                    if parameter is not None:
                        self._parameters.setdefault(parameter, path)
        return self._names.get(module, root)

    # -- questions -----------------------------------------------------------------------------------------------------

    def here(self) -> Place:
        """This thread's place."""
        try:
            return self._local.place
        except AttributeError:
            place = self._local.place = Place()
            with self._lock:
                self._places.append(place)
            return place

    def backward_module(self, place: Place) -> str:
        """The module whose backward runs in this thread; ``""`` if none can be named."""
        if place.stack:  # a forward run again under activation checkpointing, or a module used in a custom backward
            return place.module
        node = torch._C._current_autograd_node()
        if node is None:
            return ""
        number = node._sequence_nr()
        if number == _NO_NUMBER:
            variable = getattr(node, "variable", None)
            return "" if variable is None else self._parameters.get(variable, "")
        if not place.runs_forwards:
            place = next((p for p in self._places if p.runs_forwards), place)
        found = bisect_right(place.numbers, number) - 1
        return place.paths[found] if found >= 0 else ""
