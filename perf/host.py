"""Where the host time of a small call goes, step by step: ``python -m perf host``.

For each of the tiny cases, untraced, under ``torch.no_grad()``:

- *eager*, *gemsmode*: the whole call, without and with the mode, and their ratio;
- *interception*: reaching a mode whose handler does nothing at all (dispatcher, ``__torch_dispatch__``, look-up of the op);
- *key*: building the signature's key and finding its plan;
- *allocation*: the outputs (and workspace);
- *launch*: the rest of running the plan: pointers, checks, the driver's launch;
- *native*: for a call that passes through, PyTorch's own op called from Python;
- *plan*: once for each new signature: deciding and binding, with the kernels compiled already.

A step's time is measured by itself, over many calls; the column *rest* is what the sum leaves of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import gemsmode
from gemsmode import launch, plan
from gemsmode.registry import default
from gemsmode.signature import describe, parameters
from gemsmode.target import current
from perf.cases import Case, shrunk
from perf.measure import Runnable, Stopwatch
from perf.results import CPU_NOTE, heading, number
from perf.runner import Prepared, decisions, environment

STEPS = ("eager", "gemsmode", "ratio", "interception", "key", "allocation", "launch", "native", "rest", "plan")


def _by_keyword(op: Any, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in schema order, as a dispatch mode is given them."""
    given = [a for p, a in zip(parameters(op), args) if not p.kwarg_only]
    return tuple(given), {p.name: a for p, a in zip(parameters(op), args) if p.kwarg_only}


class _DoesNothing(dict):
    """A mode's table of which every handler gives back a result made before: for a view, each time another tensor."""

    def __init__(self, results: dict[Any, Any], calls: int) -> None:
        super().__init__()
        for op, result in results.items():
            if op.is_view:
                # PyTorch marks what a view op returns as a view, which it does to a tensor once.
                fresh = [torch.empty(1) for _ in range(calls)]
                self[op] = lambda *args, _fresh=fresh, **kwargs: _fresh.pop()
            else:
                self[op] = lambda *args, _result=result, **kwargs: _result


def profile(case: Case, watch: Stopwatch, tiny: bool = False) -> dict[str, Any]:
    """Microseconds of each of :data:`STEPS` for one call of ``case``, and what was decided for its ops."""
    number_of, rounds = (3, 2) if tiny else (200, 11)

    def timed(call: Callable[[], Any], around: Any = None) -> float:
        runnable = Runnable(call) if around is None else Runnable(call, lambda: around)
        return watch.host_times({"": runnable}, rounds, number_of)[""].median

    prepared = Prepared(case, watch.device, shrunk(case) if tiny else case.sizes)
    found: dict[str, Any] = dict.fromkeys(STEPS)
    with torch.no_grad():
        mode = gemsmode.GemsMode()
        with mode:
            prepared.call()
        both = watch.host_times({"eager": Runnable(prepared.call), "gemsmode": Runnable(prepared.call, lambda: mode)}, rounds, number_of)
        found["eager"], found["gemsmode"] = both["eager"].median, both["gemsmode"].median
        found["ratio"] = found["eager"] / found["gemsmode"]
        calls = decisions(prepared.call)
        results = {}
        for op, _, args in calls:
            given, keywords = _by_keyword(op, args)
            results[op] = op(*given, **keywords)
        empty = gemsmode.GemsMode()
        empty._table = _DoesNothing(results, number_of * (rounds + 1))  # type: ignore[assignment]
        found["interception"] = timed(prepared.call, empty)
        found["decided"] = [f"{op}: {d.kind}{f' {d.rule}' if d.rule else ''}" for op, d, _ in calls]
        for op, decision, args in calls:
            handler = mode.policy.handler(op)
            given, keywords = _by_keyword(op, args)
            if handler.functions is not None:
                key, plans = handler.functions.key, handler._plans
                _add(found, "key", timed(partial(_look_up, plans, key, given, keywords)))
            run = partial(handler.lookup(args).run, *args) if handler.functions is not None else partial(handler.call, *given, **keywords)
            metas = tuple(describe(a) for a in args)
            planned = handler.decide(metas, bind=False).plan if decision.kind == "rule" else None
            if planned is None:
                _add(found, "native", timed(run))
                continue
            allocation = timed(partial(_allocate, plan._allocator(current().device_type), [a[:3] for a in planned.allocs]))
            _add(found, "allocation", allocation)
            _add(found, "launch", max(timed(run) - allocation, 0.0))
            _add(found, "plan", timed(partial(handler.decide, metas)))
    parts = [found[s] for s in ("interception", "key", "allocation", "launch", "native") if found[s] is not None]
    found["rest"] = found["gemsmode"] - sum(parts)
    return found


def _look_up(plans: dict, key: Callable[..., Any], given: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return plans.get(key(*given, **keywords))


def _allocate(empty: Callable[..., torch.Tensor], allocs: Sequence[tuple[Any, ...]]) -> list[torch.Tensor]:
    return [empty(*a) for a in allocs]


def _add(found: dict[str, Any], step: str, value: float) -> None:
    found[step] = (found[step] or 0.0) + value


def table(cases: Sequence[Case], watch: Stopwatch, tiny: bool = False) -> tuple[str, list[dict[str, Any]]]:
    """The table of :func:`profile` over ``cases`` as text, and its rows; a case that fails has its error in its row."""
    rows: list[dict[str, Any]] = []
    for case in cases:
        try:
            rows.append({"case": case.label, **profile(case, watch, tiny)})
        except Exception as error:
            rows.append({"case": case.label, "error": f"{type(error).__name__}: {error}"})
    lines = [heading(environment(), {}) if watch.on_gpu else CPU_NOTE,
             "Host time in microseconds a call; plan: once for each new signature.", "",
             f"{'case':<18}" + "".join(f"{s:>13}" for s in STEPS) + "  decided"]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['case']:<18} ERROR {row['error'].splitlines()[0]}")
            continue
        lines.append(f"{row['case']:<18}" + "".join(f"{number(row[s], '{:.2f}'):>13}" for s in STEPS) + f"  {', '.join(row['decided'])}")
    lines += ["", f"kernels compiled in this process: {len(launch._compiled)}; rules: {len(default.rules)}"]
    return "\n".join(lines), rows
