"""Compiles kernels for a GPU that is not present; run by ``test_compile`` in a process of its own.

    GEMSMODE_TARGET=cuda:90 python compile_worker.py JOBS RESULTS SHARD SHARDS full|some|few|brief [TARGET...]

JOBS is a pickle of :class:`Job`; RESULTS becomes a JSON list with a row for each kernel and one for each failed plan.
TARGETs default to the process's own.
"""

from __future__ import annotations

import json
import math
import pickle
import re
import struct
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Job(NamedTuple):
    """A call to plan for: arguments in the order of the schema, tensors as metadata.

    Attributes:
        op: the overload's name.
        args: its arguments.
        what: what is particular about it (``"flat float32"``).
        aligned: whether its pointers are to be taken as divisible by 16.
        sound: False if the metadata was made by scaling and the planner may find it inconsistent.
    """

    op: str
    args: tuple[Any, ...]
    what: str
    aligned: bool
    sound: bool


def functions_in(value: Any) -> list[str]:
    """The names of the ``@triton.jit`` functions among constants, which make kernels of one kernel."""
    if isinstance(value, tuple):
        return [name for v in value for name in functions_in(v)]
    return [f"{value.fn.__module__}.{value.__name__}"] if hasattr(value, "fn") and hasattr(value, "arg_names") else []


def launch_choice(spec: Any) -> tuple[Any, ...]:
    """What of a spec the launch choice decided: block sizes and flags, warps and stages."""
    plain = tuple((n, v) for n, v in spec.constants if isinstance(v, (int, bool, str)))
    return f"{spec.kernel.fn.__module__}.{spec.kernel.__name__}", plain, spec.num_warps, spec.num_stages


TARGETS = ("cuda:90", "cuda:80", "cuda:100", "hip:gfx942")


def work(spec: Any) -> tuple[bool, int]:
    """What orders launches of a kernel by how long they compile: of the elementwise ones the flat one first, then by block sizes."""
    sizes = [v for n, v in spec.constants if n.startswith("BLOCK") and isinstance(v, int)]
    return spec.kernel.__name__ in ("tiled_kernel", "indexed_kernel"), math.prod(sizes) * spec.num_stages


def choose(specs: dict[Any, str], amount: str, target: str) -> list[Any]:
    """The specs to compile: all for ``full``, else in dtypes and layouts that depend on names only

    - ``some``: each function that a kernel is made of once, and a fifth of the launch choices of each kernel;
    - ``few``: each kernel once, a twelfth of the functions, and a thirtieth of the launch choices;
    - ``brief``: each kernel once, in the launch that compiles fastest, and an eighth of the functions (all four targets
      together half of them). Of sm_80 and sm_100, which differ least, each takes half of the kernels.
    """
    if amount == "full":
        return list(specs)
    every_function, every_choice = {"some": (1, 5), "few": (12, 30), "brief": (2 * len(TARGETS), 1 << 32)}[amount]
    turn = TARGETS.index(target) if amount == "brief" and target in TARGETS else 0
    groups: dict[Any, list[Any]] = {}
    for spec in specs:
        name = f"{spec.kernel.fn.__module__}.{spec.kernel.__name__}"
        groups.setdefault(("kernel", name), []).append(spec)
        for function in functions_in(spec.constants):
            if zlib.crc32(function.encode()) % every_function == turn:
                groups.setdefault(("function", name, function) if "pointwise" not in name else ("function", function), []).append(spec)
        choice = launch_choice(spec)
        if zlib.crc32(repr(choice).encode()) % every_choice == 0:
            groups.setdefault(("choice", choice), []).append(spec)
    chosen: dict[Any, None] = {}
    for key, members in groups.items():
        if amount == "brief":
            if key[0] == "kernel" and turn in (1, 2) and zlib.crc32(key[1].encode()) % 2 != turn - 1:
                continue
            least = min(map(work, members))
            members = [m for m in members if work(m) == least]
        if not any(m in chosen for m in members):
            chosen[members[zlib.crc32(repr(key).encode()) % len(members)]] = None
    return list(chosen)


def resources(compiled: Any, backend: str) -> tuple[int | None, int]:
    """Registers a thread, and bytes of stack (spilled registers and local arrays)."""
    if backend == "hip":
        found = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", compiled.asm["amdgcn"]))
        return int(found.get("vgpr_count", 0)), int(found.get("private_segment_fixed_size", 0))
    return cubin_resources(compiled.asm["cubin"])


def cubin_resources(cubin: bytes) -> tuple[int | None, int]:
    """What ``cuobjdump --dump-resource-usage`` says, read from the ELF section that it reads: a process less a kernel."""
    sections, = struct.unpack_from("<Q", cubin, 40)
    width, count, of_names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + i * width) for i in range(count)]
    found = {REGISTERS: 0, STACK: 0}
    for name, _, _, _, start, size in headers:
        at = headers[of_names][4] + name
        if cubin[at:cubin.index(b"\0", at)] != b".nv.info":
            continue
        end = start + size
        while start < end:
            form, attribute, length = struct.unpack_from("<BBH", cubin, start)
            start += 4
            if form == 4:  # with a value: the function's number, and what it needs
                if attribute in found:
                    found[attribute] = max(found[attribute], struct.unpack_from("<II", cubin, start)[1])
                start += length
    return found[REGISTERS] or None, found[STACK]


REGISTERS, STACK = 0x2F, 0x12
"""EIATTR_REGCOUNT and EIATTR_MIN_STACK_SIZE."""


def main(jobs_path: str, results_path: str, shard: str, shards: str, amount: str, *targets: str) -> None:
    import gemsmode
    from gemsmode import target
    from gemsmode.target import _from_name

    gemsmode.load_ops()
    jobs: list[Job] = pickle.loads(Path(jobs_path).read_bytes())
    rows: list[dict[str, Any]] = []
    for here in map(_from_name, targets) if targets else [target.current()]:
        rows += compile_for(here, jobs, int(shard), int(shards), amount)
    Path(results_path).write_text(json.dumps(rows))


def compile_for(here: Any, jobs: Sequence[Job], shard: int, shards: int, amount: str) -> list[dict[str, Any]]:
    """Plan ``jobs`` for the target ``here`` and compile a share of what the plans launch."""
    from gemsmode import launch, plan, registry
    from gemsmode.handlers import Policy

    name = f"{here.backend}:{here.arch}"
    policy = Policy(registry.default, strict=True, target=here)
    rows: list[dict[str, Any]] = []
    specs: dict[Any, str] = {}
    planned: dict[str, int] = {}
    for job in jobs:
        planned.setdefault(job.op, 0)
        try:
            decided = policy.handler(registry.find_op(job.op)).decide(job.args, bind=False)
        except Exception as error:
            if job.sound:
                rows.append(failure(name, job.op, f"planning {job.what}: {error}"))
            continue
        if decided.decision.kind == "rule" and decided.plan is not None:
            planned[job.op] += 1
            try:
                found = plan.specs(decided.plan, job.aligned)
            except plan.Decline as reason:  # the second stage, for the example of what the first one counts
                if job.sound:
                    rows.append(failure(name, job.op, f"planning the second stage of {job.what}: {reason}"))
                continue
            for spec in found:
                specs.setdefault(spec, f"{job.op}, {job.what}")
    for op, count in planned.items():
        if not count and shard == 0:
            rows.append(failure(name, op, "no plan was made for any of its calls", planned=False))
    for i, spec in enumerate(choose(specs, amount, name)):
        if i % shards != shard:
            continue
        began = time.perf_counter()
        row: dict[str, Any] = {"target": name, "kernel": spec.kernel.__name__, "what": specs[spec],
                               "functions": functions_in(spec.constants), "warps": spec.num_warps, "registers": None,
                               "spilled": 0, "shared": 0, "error": None, "planned": True}
        try:
            compiled = launch.compile(spec, here)
            row["shared"] = compiled.metadata.shared
            row["registers"], row["spilled"] = resources(compiled, here.backend)
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"
        row["seconds"] = time.perf_counter() - began
        rows.append(row)
    return rows


def failure(target: str, op: str, text: str, planned: bool = True) -> dict[str, Any]:
    return {"target": target, "kernel": "-", "what": op, "functions": [], "warps": 0, "registers": None, "spilled": 0, "shared": 0,
            "error": text, "seconds": 0.0, "planned": planned}


if __name__ == "__main__":
    # Unpickled jobs name their class by this module's name, whichever way it was started.
    sys.modules.setdefault("compile_worker", sys.modules["__main__"])
    main(*sys.argv[1:])
