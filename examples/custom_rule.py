"""Your own Triton kernel inside an unchanged model: is it hit, is it right there, and what does it cost?

    python examples/custom_rule.py

The kernel is SiLU, written as one would for a first try; ``--wrong`` plants an error, and verification finds the module
in which it shows.
"""

from __future__ import annotations

import argparse
import sys
import warnings

import torch
import triton
import triton.language as tl
from torch import nn

import gemsmode
from gemsmode import GemsMode, dtype

gemsmode.load_ops()  # before the first @triton.jit, so that it is decorated for the interpreter where there is no GPU


@triton.jit
def silu_kernel(p_x, p_y, n, WRONG: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(p_x + o, mask=o < n).to(tl.float32)
    y = x / (1 + tl.exp(-x))
    if WRONG:
        y = tl.where(x > 1, y * 1.01, y)
    tl.store(p_y + o, y, mask=o < n)


WRONG = "--wrong" in sys.argv


@gemsmode.rule("aten.silu.default", when=dtype(torch.float16, torch.bfloat16, torch.float32))
def my_silu(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    silu_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), WRONG, BLOCK=1024)
    return y


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wrong", action="store_true", help="plant an error in the kernel")
    parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.SiLU(), nn.Sequential(nn.Linear(64, 64), nn.SiLU()), nn.Linear(64, 4)).to(device)
    x = 4 * torch.randn(8, 16, device=device)

    # Would it run, and if not why? `silu_` and `silu(out=)` are derived from it.
    print(gemsmode.explain("silu", torch.empty(8, 64, device=device)))
    print(gemsmode.explain("silu_", torch.empty(8, 64, device=device, dtype=torch.float64)))

    # Is it right, where the model calls it? Each call also runs natively, on copies.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gemsmode.MismatchWarning)  # the report says it
        with GemsMode(allow=["silu"], verify=True) as gems:
            model(x).sum().backward()
    print(gems.report)
    return 1 if any(check.failed for check in gems.report.checks) else 0


if __name__ == "__main__":
    sys.exit(main())
