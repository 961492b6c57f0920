"""Two processes under ``torchrun``: training under the mode equals training without it, and the gathered report adds up.

On the CPU through gloo, in the interpreter; with ``--device cuda`` through NCCL where there are two GPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import skip_without_cuda

from gemsmode.tracing import Report

WORKER = Path(__file__).with_name("distributed_worker.py")

# The others differ from these in one thing: plain DDP and FSDP without checkpointing.
BY_DEFAULT = ("replicated_and_checkpointed", "fully_sharded_and_checkpointed", "fully_sharded_in_bfloat16", "tensor_parallel",
              "sequence_parallel", "everything_a_dtensor")

# Shapes of the second operand of each product in the forward, in a block: whole, or this rank's half of the weight.
WHOLE = {"up": "[16,32]", "down": "[32,16]"}
HALVES = {"up": "[16,16]", "down": "[16,16]"}


def test_training_in_two_processes(device: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if device == "cuda":
        skip_without_cuda(device, gpus=2)
    elif not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    ways = [] if device == "cuda" or request.config.getoption("--full") else BY_DEFAULT
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, str(WORKER), device, str(tmp_path), *ways], env=environment, capture_output=True, text=True,
                          timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0].keys() == ranks[1].keys() and len(ranks[0]) >= len(BY_DEFAULT)
    for rank, found in enumerate(ranks):
        for way, seen in found.items():
            where = f"{way}, rank {rank}: {seen}"
            bfloat16 = way == "fully_sharded_in_bfloat16"
            # Training under the mode equals training without it.
            assert seen["losses"] == pytest.approx(seen["expected losses"], rel=1e-2 if bfloat16 else 1e-5), where
            assert seen["apart"] < (2e-2 if bfloat16 else 1e-4), where
            # Every call on plain tensors was seen, those inside DTensors and sharded modules included.
            assert not seen["miscounted"] and not seen["failed"], where
            # The products of each block ran as kernels, on this rank's share of the weights.
            shapes = HALVES if way in ("tensor_parallel", "sequence_parallel") else WHOLE
            products = {tuple(p) for p in seen["products"]}
            assert all(decision == "rule" for *_, decision in products), where
            kind = "bf16" if bfloat16 else "f32"
            for block in "01":
                for layer, shape in shapes.items():
                    assert (kind + shape, f"{block}.{layer}", "forward", "rule") in products, where
                    assert any(p[1:3] == (f"{block}.{layer}", "backward") for p in products), where
            assert seen["coverage"] > 0.85 and seen["communication"] > 0, where
            # Two blocks in two steps compute their activations again.
            assert seen["again"] == (4 if "checkpointed" in way else 0), where
            # What is gathered is what both have seen.
            assert seen["gathered"] == seen["counted by all"] == sum(seen["ranks"]), where
            assert seen["ranks"][rank] == seen["calls"] and seen["views of ranks"] == 2, where
            # The first rank alone prints, and writes the merged report; each writes its own.
            assert (seen["printed"] > 0) == (rank == 0), where
            assert sorted(seen["written"]) == [f"{way}.json"] * (rank == 0) + [f"{way}.rank{rank}.json"], where
            merged, own = (Report.load(tmp_path / f"{way}{suffix}.json") for suffix in ("", f".rank{rank}"))
            assert (merged.calls, own.calls) == (seen["gathered"], seen["calls"]), where


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_communication_is_not_called_compute() -> None:
    from gemsmode.native import communicates, computes

    op = torch.ops._c10d_functional.all_reduce.default
    assert communicates(op) and computes(op) and not communicates(torch.ops.aten.mm.default)
