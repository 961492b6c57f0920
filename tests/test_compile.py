"""Every kernel, with the launch choices that plans really make, is compiled for GPUs that are not present.

The calls planned for are OpInfo's, with their tensors' metadata moved to a GPU, in several dtypes and layouts and scaled
up; elementwise ops get shapes of their own for each path through their kernels. A default run compiles each kernel for
sm_90, gfx942 and one of sm_80 and sm_100, and half of the functions of elementwise ops for one of the four;
``--generated`` compiles each function and a fifth of the launch choices for sm_90, and ``--full`` everything.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
import pytest
import support
import torch
from compile_worker import TARGETS, Job
from harness import parameters, served
from torch._ops import OpOverload

from gemsmode import registry
from gemsmode.plan import contiguous_strides
from gemsmode.registry import short_name
from gemsmode.signature import TensorMeta

GPU = torch.device("cuda", 0)

NO_PLAN: dict[str, str] = {
}
"""Ops for which no call here makes a plan on a GPU, and why."""

STACK = 128
"""Bytes of stack a thread that are reported but no failure: the trigonometric functions keep 32 for large arguments, and
a few registers spilled outside of a loop are not worth a smaller block."""

SPILLS: dict[str, str] = {
    "special_zeta": "sixteen elements a thread in a tile of operands in two orders; none spills beyond 88 bytes where the orders agree",
    "igamma": "as special_zeta", "igammac": "as special_zeta",
}
"""Kernels that may use more stack, by a function they are made of or by their name, and why."""


def meta(shape: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...] | None = None) -> TensorMeta:
    return TensorMeta(dtype, shape, contiguous_strides(shape) if stride is None else stride, GPU)


Layouts = dict[str, tuple[TensorMeta, TensorMeta]]


def elementwise_layouts(dtype: torch.dtype) -> Layouts:
    """One pair of metadata for each path through the elementwise kernels: the first operand's, and the others'."""
    def m(shape: tuple[int, ...], stride: tuple[int, ...] | None = None) -> TensorMeta:
        return meta(shape, dtype, stride)

    return {
        "flat, small": (m((64, 63)), m((64, 63))),
        "flat, large": (m((8192, 8192)), m((8192, 8192))),
        "unaligned": (m((8192, 8191)), m((8192, 8191))),
        "row": (m((8192, 8192)), m((8192,))),
        "column": (m((8192, 8192)), m((8192, 1))),
        "outer": (m((4096, 1)), m((1, 4096))),
        "transposed": (m((4096, 4096)), m((4096, 4096), (1, 4096))),
        "transposed, odd": (m((4095, 4097)), m((4095, 4097), (1, 4095))),
        "batched": (m((8, 512, 64, 128)), m((8, 512, 64, 128), (512 * 64 * 128, 128, 512 * 128, 1))),
        "short rows": (m((4096, 3, 5), (64, 16, 2)), m((4096, 3, 5))),
        "six dimensions": (m((4, 3, 5, 3, 4, 7), (4096, 1024, 200, 60, 14, 2)), m((4, 3, 5, 3, 4, 7))),
        "0-dim": (m((4096, 4096)), m(())),
        "wide": (m((70000, 40000)), m((70000, 40000))),
        "wide row": (m((70000, 40000)), m((40000,))),
        "wide strides": (m((3, 5), (2**31, 2)), m((3, 5))),
    }


FLOATS = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
OTHERS = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.int8, torch.int16)
if harness.OPTIONS.brief:
    FLOATS, OTHERS = FLOATS[:2], OTHERS[:1]


def retyped(args: Any, old: torch.dtype, new: torch.dtype) -> Any:
    """Metadata with one dtype exchanged, also where it is an argument."""
    if isinstance(args, TensorMeta):
        return args._replace(dtype=new) if args.dtype == old else args
    if isinstance(args, (list, tuple)):
        return type(args)(retyped(a, old, new) for a in args)
    return new if args is old else args


def on_gpu(value: Any) -> Any:
    """A call's argument as a decision sees it, on a GPU."""
    if isinstance(value, torch.Tensor):
        return TensorMeta(value.dtype, tuple(value.shape), tuple(value.stride()), GPU)
    if isinstance(value, torch.device):
        return GPU
    if isinstance(value, (list, tuple)):
        return tuple(on_gpu(v) for v in value)
    return value


def scaled(args: tuple[Any, ...], factor: int, only_first: bool = False) -> tuple[Any, ...]:
    """The call with every dimension longer, and lists of sizes that follow a tensor's with them."""
    shapes = [a.shape for a in harness.tree_leaves(args, is_leaf=lambda a: isinstance(a, TensorMeta)) if isinstance(a, TensorMeta)]
    first = next((s[0] for s in shapes if s), 0)

    def size(n: int) -> int:
        return n * factor if n > 1 and (not only_first or n == first) else n

    def change(a: Any) -> Any:
        if isinstance(a, TensorMeta):
            shape = tuple(size(n) for n in a.shape)
            return a._replace(shape=shape, stride=contiguous_strides(shape))
        if isinstance(a, tuple) and a and all(isinstance(n, int) for n in a) and any(s[len(s) - len(a):] == a for s in shapes):
            return tuple(size(n) for n in a)
        return tuple(change(x) for x in a) if isinstance(a, tuple) else a

    return tuple(change(a) for a in args)


def transposed(args: tuple[Any, ...]) -> tuple[Any, ...]:
    def change(a: Any) -> Any:
        if isinstance(a, TensorMeta) and a.ndim > 1:
            strides = list(contiguous_strides((*a.shape[:-2], a.shape[-1], a.shape[-2])))
            strides[-1], strides[-2] = strides[-2], strides[-1]
            return a._replace(stride=tuple(strides))
        return tuple(change(x) for x in a) if isinstance(a, tuple) and not isinstance(a, TensorMeta) else a

    return tuple(change(a) for a in args)


def jobs_of(op: OpOverload) -> list[Job]:
    """The calls of ``op`` to plan for."""
    name = short_name(op)
    base_dtype, found = next(((d, t) for d in (torch.float32, torch.int64, torch.bool) if (t := harness.templates(op, d))), (None, ()))
    if base_dtype is None:
        return []
    dtypes = (*FLOATS, *OTHERS) if base_dtype == torch.float32 else OTHERS
    jobs: list[Job] = []
    plain = [on_gpu(t.args) for t in found if not any(isinstance(a, torch.Generator) for a in t.args)]
    if op in harness.pointwise_bases() and not any(p.is_tensor_list for p in parameters(op)) and plain:
        for dtype in dtypes:
            for layout, (first, others) in elementwise_layouts(dtype).items():
                seen = 0
                args: list[Any] = []
                for a in plain[0]:
                    if isinstance(a, TensorMeta):
                        own = first if not seen else others
                        args.append(own._replace(dtype=retyped(a, base_dtype, dtype).dtype))
                        seen += 1
                    else:
                        args.append(retyped(a, base_dtype, dtype))
                jobs.append(Job(name, tuple(args), f"{layout}, {short(dtype)}", layout != "unaligned", True))
        return jobs
    distinct = list(dict.fromkeys(a for a in plain if hashable(a)))
    most = 4 if harness.OPTIONS.brief else 12
    distinct = [distinct[i * len(distinct) // most] for i in range(most)] if len(distinct) > most else distinct
    for dtype in dtypes:
        for args in (retyped(a, base_dtype, dtype) for a in distinct):
            for what, changed, sound in (("as it is", args, True), ("transposed", transposed(args), False),
                                         ("64 times as long", scaled(args, 64), False), ("1000 times as long", scaled(args, 1000), False),
                                         ("longer than 2^31", scaled(args, 1 << 30, True), False)):
                jobs.append(Job(name, changed, f"{what}, {short(dtype)}", what != "transposed", sound))
    return jobs


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def stated_jobs() -> list[Job]:
    """The calls at the sizes of a GPU's work that other test files state, and those of optimizers, which OpInfo lacks."""
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if "\ndef gpu_calls(" in path.read_text():
            stated = importlib.import_module(path.stem).gpu_calls
            calls += stated(False) if inspect.signature(stated).parameters else stated()
    some = tuple(meta(shape, torch.float32) for shape in ((4096, 4096), (4096,), (33, 65)))
    scalar, counts = meta((), torch.float32), tuple(meta((), torch.float32) for _ in some)
    calls += [
        ("_fused_adamw_.default", (some, some, some, some, (), counts, 1e-3, 0.9, 0.999, 0.01, 1e-8, False, False, None, None)),
        ("_fused_sgd_.default", (some, some, some, 0.01, 0.9, 1e-3, 0.0, True, False, False, None, None)),
        ("_amp_foreach_non_finite_check_and_unscale_.default", (some, scalar, scalar)),
        ("_amp_update_scale_.default", (scalar, meta((), torch.int32), scalar, 2.0, 0.5, 2000)),
        ("native_dropout.default", (some[0], 0.5, True)),
    ]
    return [Job(short_name(registry.find_op(name)), args, "as stated", True, True) for name, args in calls]


@functools.cache
def jobs_file(folder: str) -> Path:
    """The jobs of all ops, made once a process."""
    planned = [op for op, candidates in served().items() if any(c.variant is None and c.rule.is_planned for c in candidates)]
    jobs = [job for op in sorted(planned, key=str) for job in jobs_of(op)] + stated_jobs()
    path = Path(folder) / f"jobs-{os.getpid()}.pickle"
    path.write_bytes(pickle.dumps(jobs))
    return path


def shards() -> list[tuple[str, int, int, str]]:
    """Targets, a share of their kernels, and how many kernels there are to be; a process each."""
    if harness.OPTIONS.full:
        return [(t, i, 4, "full") for t in TARGETS for i in range(4)]
    if harness.OPTIONS.brief:
        return [(" ".join(TARGETS), 0, 1, "brief")]
    return [("cuda:90", i, 2, "some") for i in range(2)] + [(t, 0, 1, "few") for t in TARGETS[1:]]


@pytest.mark.parametrize(("target", "shard", "of", "amount"), shards(), ids=lambda v: str(v).replace(":", "-"))
def test_kernels_compile(target: str, shard: int, of: int, amount: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    support.skip_compiling_for_a_gpu_that_is_present()
    targets, results = target.split(), tmp_path / "rows.json"
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")}
    environment["GEMSMODE_TARGET"] = targets[0]
    worker = Path(__file__).with_name("compile_worker.py")
    jobs = jobs_file(str(tmp_path_factory.getbasetemp()))
    command = [sys.executable, str(worker), str(jobs), str(results), str(shard), str(of), amount, *targets]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(results.read_text())
    harness.KERNELS.extend(r for r in rows if r["kernel"] != "-")
    unplanned = [f"{r['what']} on {r['target']}" for r in rows if not r["planned"] and r["what"] not in NO_PLAN]
    failed = [f"{r['target']} {r['kernel']}{r['functions']} ({r['what']}): {r['error'][:400]}" for r in rows if r["error"] and r["planned"]]
    spilling = [f"{r['target']} {r['kernel']}{r['functions']} ({r['what']}): {r['spilled']} bytes of stack, {r['registers']} registers"
                for r in rows if r["spilled"] > STACK and not any(n.rpartition(".")[2] in SPILLS for n in (*r["functions"], r["kernel"]))]
    compiled = sum(1 for r in rows if r["kernel"] != "-" and not r["error"])
    for name in targets:
        assert any(r["target"] == name and r["kernel"] != "-" and not r["error"] for r in rows), f"nothing was compiled for {name}"
    if amount == "brief":
        unplanned = []  # a few calls of each op need not be such as a rule takes
    problems = {"no plan on a GPU for any call of": unplanned, "not compiled:": failed, f"spill more than {STACK} bytes:": spilling}
    texts = [f"{len(found)} {title}\n  " + "\n  ".join(found[:40]) for title, found in problems.items() if found]
    assert not texts, f"{target}, {compiled} kernels compiled\n" + "\n".join(texts)
