"""``gemsmode doctor``: what is installed, what it sees, and whether it works, each answer with what to do about it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton


@dataclass(frozen=True)
class Check:
    """One answer.

    Attributes:
        name: what was looked at.
        state: ``"ok"``, ``"note"`` (works, and something is worth knowing) or ``"fail"``.
        text: what was found; for a failure also what to do.
    """

    name: str
    state: str
    text: str


def _versions() -> list[Check]:
    import gemsmode

    found = [Check("gemsmode", "ok", f"{gemsmode.__version__} in {Path(gemsmode.__file__).parent}"),
             Check("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    for name, version, least in (("torch", torch.__version__, (2, 11)), ("triton", triton.__version__, (3, 6))):
        numbers = tuple(int(n) for n in version.split("+")[0].split(".")[:2])
        wanted = ".".join(map(str, least))
        state, more = ("ok", "") if numbers >= least else ("fail", f"; gemsmode needs {wanted} or later: pip install '{name}>={wanted}'")
        found.append(Check(name, state, version + more))
    return found


def _devices() -> list[Check]:
    from gemsmode.target import current

    target = current()
    found = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            text = f"{p.name}, {p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} multiprocessors"
            found.append(Check(f"device {i}", "ok", text))
    if target.interpreted:
        forced = os.environ.get("TRITON_INTERPRET") == "1" and torch.accelerator.is_available()
        why = "TRITON_INTERPRET=1 is set" if forced else "PyTorch sees no GPU"
        if not forced and torch.version.cuda is None and torch.version.hip is None:
            why += ", and this is a CPU-only build of it"
        found.append(Check("kernels", "note", f"run in Triton's interpreter on CPU tensors, for checking and not for speed: {why}"))
    elif not target.present:
        found.append(Check("kernels", "note", f"are compiled for {target.backend}:{target.arch} and not run: GEMSMODE_TARGET is set"))
    else:
        found.append(Check("kernels", "ok", f"run on {target.device_type}, compiled for {target.backend}:{target.arch}"))
    return found


def _cache() -> list[Check]:
    folder = Path(triton.knobs.cache.dir)
    existing = next((p for p in (folder, *folder.parents) if p.exists()), Path("/"))
    if not os.access(existing, os.W_OK):
        return [Check("cache folder", "fail", f"{folder} cannot be written; set TRITON_CACHE_DIR to a folder that can")]
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.exists() else 0
    return [Check("cache folder", "ok", f"{folder}, {size / 2**20:.1f} MiB of compiled kernels")]


def _choices() -> list[Check]:
    """What ``prefer="fastest"`` knows of this machine."""
    from gemsmode import choice
    from gemsmode.target import current

    if not current().present:
        return []
    store = choice.default().store(current())
    text = f"{len(store):,} for this GPU and these versions, in {store.path}" if len(store) else f"none yet, in {choice.cache_folder()}"
    return [Check("measured choices", "ok", text)]


def _rules() -> list[Check]:
    import gemsmode
    from gemsmode.registry import default

    gemsmode.load_ops()
    rules = list(default.all_rules())
    state = "ok" if rules else "fail"
    return [Check("rules", state, f"{len(rules)}, which serve {len(default.overloads())} overloads with those derived from them")]


def _runs() -> list[Check]:
    """A kernel runs under the mode, forward and backward, with PyTorch's result."""
    import gemsmode
    from gemsmode.target import current

    target = current()
    if not target.present:
        return [Check("a kernel runs", "note", "not tried: the device that kernels are compiled for is not present")]
    x = torch.linspace(-3, 3, 1000, device=target.device_type, requires_grad=True)
    (native,) = torch.autograd.grad((x + x.exp()).sum(), x)
    with gemsmode.GemsMode(strict=True, trace=True) as mode:
        (got,) = torch.autograd.grad((x + x.exp()).sum(), x)
    replaced = sum(r.calls for r in mode.report.records if r.decision == "rule")
    error = (got - native).abs().max().item()
    if not replaced:
        return [Check("a kernel runs", "fail", "no call was replaced; `gemsmode explain add.Tensor f32[8] f32[8]` says why")]
    if not error <= 1e-4:
        return [Check("a kernel runs", "fail", f"{replaced} calls were replaced and the result is {error:.2g} off; please report it")]
    return [Check("a kernel runs", "ok", f"{replaced} calls replaced, result within {error:.1g} of PyTorch's")]


def _launcher() -> list[Check]:
    """Whether launches take the short way through Triton's C launcher."""
    from gemsmode import launch
    from gemsmode.target import current

    target = current()
    if target.interpreted or not target.present:
        return []
    entries = [launch.entry(compiled, key[0]) for key, compiled in list(launch._compiled.items())]
    if entries and all(e is None for e in entries):
        return [Check("launcher", "note", f"Triton {triton.__version__}'s launcher is not one that is known: launches cost some us more")]
    return [Check("launcher", "ok", "kernels are launched straight through Triton's C launcher")]


def examine() -> list[Check]:
    """Every check, in order. A check that raises is a failure and does not stop the others."""
    checks: list[tuple[str, Callable[[], list[Check]]]] = [
        ("versions", _versions), ("devices", _devices), ("cache folder", _cache), ("measured choices", _choices),
        ("rules", _rules), ("a kernel runs", _runs),
        ("launcher", _launcher)]
    # Taken first: choosing the interpreter sets TRITON_INTERPRET.
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith(("GEMSMODE_", "TRITON_"))}
    found: list[Check] = []
    for name, check in checks:
        try:
            found += check()
        except Exception as error:
            found.append(Check(name, "fail", f"{type(error).__name__}: {error}"))
    if variables:
        found.append(Check("environment", "note", ", ".join(f"{k}={v}" for k, v in variables.items())))
    return found


def as_dict(checks: list[Check]) -> dict[str, Any]:
    """The checks as plain values, for ``--json``."""
    return {"ok": all(c.state != "fail" for c in checks), "executable": sys.executable,
            "checks": [{"name": c.name, "state": c.state, "text": c.text} for c in checks]}
