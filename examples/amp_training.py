"""Mixed precision with ``torch.amp`` and ``GradScaler``, unchanged but for the line that puts the mode in force.

    python examples/amp_training.py

On a GPU in float16, where the scaler matters; elsewhere in bfloat16. Prints the losses with and without the mode.
"""

from __future__ import annotations

import argparse
import contextlib

import torch
from torch import nn

from gemsmode import GemsMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.bfloat16


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, width)
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.layers(x))


def train(steps: int, width: int, mode: contextlib.AbstractContextManager) -> list[float]:
    torch.manual_seed(0)
    net = Net(width).to(DEVICE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, fused=True)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**12)
    data = torch.randint(0, 64, (steps, 4, 16), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    losses = []
    with mode:  # forward, backward, unscaling, the step and the scaler's update
        for tokens in data:
            with torch.autocast(DEVICE, DTYPE):
                logits = net(tokens)
                loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
    return [float(loss) for loss in losses]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--width", type=int, default=32)
    options = parser.parse_args()

    gems = GemsMode(trace=True)
    native = train(options.steps, options.width, contextlib.nullcontext())
    replaced = train(options.steps, options.width, gems)
    for step, (a, b) in enumerate(zip(native, replaced)):
        print(f"step {step}: loss {a:.5f} natively, {b:.5f} under the mode")
    print(gems.report)
    print("the scaler's and the optimizer's own kernels:")  # short ones, which the table above may leave out
    for record in gems.report.compute:
        if record.overload.startswith(("aten._amp_", "aten._fused_")):
            print(f"  {record.overload.removeprefix('aten.').removesuffix('.default')} -> {record.rule or record.decision}, "
                  f"{record.calls} calls")


if __name__ == "__main__":
    main()
