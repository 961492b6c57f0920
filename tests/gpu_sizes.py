"""Compiling the kernels of stated calls, at the sizes of a GPU's work, for a GPU that is not present."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import pytest
import support
import torch
from compile_worker import Job

from gemsmode.plan import contiguous_strides
from gemsmode.registry import find_op
from gemsmode.signature import TensorMeta

STACK = 128
"""Bytes of stack a thread that a kernel may use."""


def on_gpu(shape: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...] | None = None) -> TensorMeta:
    """The metadata of a tensor on a GPU, contiguous unless strides are given."""
    return TensorMeta(dtype, shape, stride or contiguous_strides(shape), torch.device("cuda", 0))


def compile_calls(calls: Sequence[tuple[str, tuple[Any, ...]]], target: str, folder: Path) -> int:
    """Plan and compile ``(op, arguments in schema order)`` calls in a process of its own; the number of kernels.

    A default run compiles them for sm_90 alone: test_compile takes some of each kernel for the other GPUs.

    Raises:
        AssertionError: a call is not served, does not compile, or spills.
    """
    support.skip_compiling_for_a_gpu_that_is_present()
    if harness.OPTIONS.brief and target != "cuda:90":
        pytest.skip("compiled with --generated")
    jobs = [Job(str(find_op(name)), args, f"call {i}", True, True) for i, (name, args) in enumerate(calls)]
    path, results = folder / "jobs.pickle", folder / "rows.json"
    path.write_bytes(pickle.dumps(jobs))
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER")}
    environment["GEMSMODE_TARGET"] = target
    worker = Path(__file__).with_name("compile_worker.py")
    done = subprocess.run([sys.executable, str(worker), str(path), str(results), "0", "1", "full"], env=environment,
                          capture_output=True, text=True, check=False, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows: list[dict[str, Any]] = json.loads(results.read_text())
    harness.KERNELS.extend(r for r in rows if r["kernel"] != "-")
    errors = [f"{r['kernel']} ({r['what']}): {r['error'][:400]}" for r in rows if r["error"]]
    spills = [f"{r['kernel']} ({r['what']}): {r['spilled']} bytes of stack" for r in rows if r["spilled"] > STACK]
    assert not errors and not spills, f"{target}\n" + "\n".join(errors + spills)
    return len(rows)
