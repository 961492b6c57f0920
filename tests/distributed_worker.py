"""What each process of test_distributed.py runs, under ``torchrun``: training in several ways, with and without the mode.

    torchrun --nproc-per-node 2 tests/distributed_worker.py cpu FOLDER [WAY...]

Each way trains a small model natively under a plain dispatch mode that counts, then under ``GemsMode(trace=True)`` from
the same weights on the same data, and writes what a rank found to ``FOLDER/rank<n>.json``.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import checkpoint

from gemsmode import GemsMode
from gemsmode.tracing import gather

WIDTH, INNER, BATCH, STEPS = 16, 32, 4, 2

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"


class Block(nn.Module):
    """A feed-forward block; ``again``: its activations are computed again in the backward."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.again = again

    def inside(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.up(self.norm(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (checkpoint(self.inside, x, use_reentrant=False) if self.again else self.inside(x))


class Net(nn.Module):
    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(again) for _ in range(2))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def replicated(mesh: DeviceMesh) -> nn.Module:
    return nn.parallel.DistributedDataParallel(Net().to(mesh.device_type))


def replicated_and_checkpointed(mesh: DeviceMesh) -> nn.Module:
    return nn.parallel.DistributedDataParallel(Net(again=True).to(mesh.device_type))


def _sharded(mesh: DeviceMesh, **options: Any) -> nn.Module:
    net = Net(options.pop("again", False)).to(mesh.device_type)
    for block in net.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def fully_sharded(mesh: DeviceMesh) -> nn.Module:
    return _sharded(mesh)


def fully_sharded_and_checkpointed(mesh: DeviceMesh) -> nn.Module:
    return _sharded(mesh, again=True)


def fully_sharded_in_bfloat16(mesh: DeviceMesh) -> nn.Module:
    return _sharded(mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def tensor_parallel(mesh: DeviceMesh) -> nn.Module:
    net = Net().to(mesh.device_type)
    for block in net.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return net


def sequence_parallel(mesh: DeviceMesh) -> nn.Module:
    """Tensor parallel, with the rows of what is between the products on one rank each."""
    net = Net().to(mesh.device_type)
    for block in net.blocks:
        parallelize_module(block, mesh, {
            "norm": SequenceParallel(sequence_dim=0), "up": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(output_layouts=Shard(0))})
    return parallelize_module(net, mesh, PrepareModuleInput(
        input_layouts=Replicate(), desired_input_layouts=Shard(0), use_local_output=True))


def everything_a_dtensor(mesh: DeviceMesh) -> nn.Module:
    """Parameters replicated as DTensors and activations sharded by rows: every op is a DTensor's."""

    def rows(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return (DTensor.from_local(inputs[0], mesh, [Replicate()]).redistribute(mesh, [Shard(0)]),)

    return distribute_module(Net().to(mesh.device_type), mesh, input_fn=rows)


WAYS: dict[str, Callable[[DeviceMesh], nn.Module]] = {f.__name__: f for f in (
    replicated, replicated_and_checkpointed, fully_sharded, fully_sharded_and_checkpointed, fully_sharded_in_bfloat16, tensor_parallel,
    sequence_parallel, everything_a_dtensor)}

OWN_DATA = {"replicated", "replicated_and_checkpointed", "fully_sharded", "fully_sharded_and_checkpointed", "fully_sharded_in_bfloat16"}
"""Ways in which each rank has data of its own."""


class Counting(TorchDispatchMode):
    """An ordinary mode that counts the calls on plain tensors, and leaves subclasses to take their calls apart."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack()):
            return func(*args, **(kwargs or {}))  # shapes being worked out on fake tensors
        if any(t.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ for t in types):
            return NotImplemented
        key = "CompositeImplicitAutograd" if func is torch.ops.aten.narrow.default else ""
        if func.namespace == "fsdp" and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "Meta"):
            key = DEVICE.upper()
        if key:  # FSDP's copies are written in Python (those with a kernel for "meta"), below autograd: what they call is counted
            with self:
                return func._op_dk(getattr(torch._C.DispatchKey, key), *args, **(kwargs or {}))
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def train(way: str, mesh: DeviceMesh, mode: Any) -> tuple[list[float], list[torch.Tensor]]:
    """Two steps; the losses and the parameters, gathered."""
    torch.manual_seed(0)
    net = WAYS[way](mesh)
    # Lists of parameters must be of one kind for the `_foreach_*` ops.
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, foreach=way not in ("tensor_parallel", "sequence_parallel"))
    generator = torch.Generator().manual_seed(1 + (dist.get_rank() if way in OWN_DATA else 0))
    batches = [torch.randn(BATCH, WIDTH, generator=generator).to(mesh.device_type) for _ in range(STEPS)]
    losses = []
    with mode:
        for x in batches:
            y = net(x)
            loss = (y.to_local() if isinstance(y, DTensor) else y).float().square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    parameters = [p.detach() for p in net.parameters()]
    return [float(loss) for loss in losses], [p.full_tensor() if isinstance(p, DTensor) else p.clone() for p in parameters]


def outcome(way: str, mesh: DeviceMesh, folder: Path) -> dict[str, Any]:
    """What this rank sees of one way to train."""
    counting, mode = Counting(), GemsMode(trace=True)
    expected_losses, expected = train(way, mesh, counting)
    losses, parameters = train(way, mesh, mode)
    gathered = gather(mode.report)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        gathered.print()
    written = gathered.save(folder / f"{way}.json")
    total = torch.tensor(sum(counting.calls.values()), device=mesh.device_type)
    dist.all_reduce(total)
    seen: Counter[str] = Counter()
    for record in mode.report.records:
        seen[record.overload] += record.calls
    products = [r for r in mode.report.records if r.overload in ("aten.mm.default", "aten.addmm.default")]
    return {
        "losses": losses, "expected losses": expected_losses,
        "apart": max(float((a - b).abs().max()) for a, b in zip(parameters, expected)),
        "miscounted": {k: (seen[k], counting.calls[k]) for k in seen | counting.calls if seen[k] != counting.calls[k]},
        "gathered": gathered.merged.calls, "counted by all": int(total),
        "ranks": [r.calls for r in gathered.ranks], "calls": mode.report.calls, "views of ranks": str(gathered).count("\nrank "),
        "written": [path.name for path in written],
        "printed": len(printed.getvalue()),
        "coverage": mode.report.coverage.calls, "failed": sorted({r.overload for r in mode.report.records if r.decision == "error"}),
        "communication": sum(r.calls for r in mode.report.records if r.decision == "comm"),
        "products": sorted({(r.inputs[-1], r.module.partition("blocks.")[2], r.phase, r.decision) for r in products}),
        "again": sum(r.calls for r in mode.report.records if r.overload == "aten.silu.default" and r.phase == "backward"),
    }


def main() -> None:
    device, folder = DEVICE, Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    rank = dist.get_rank()
    if device == "cuda":
        torch.cuda.set_device(rank)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    found = {way: outcome(way, mesh, folder) for way in sys.argv[3:] or WAYS}
    (folder / f"rank{rank}.json").write_text(json.dumps(found, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
