"""The kernels of gemsmode by family; importing this package registers their rules.

Each file declares its rules beside its kernels, under the full literal aten names, so that one search finds the kernel
of any op. Import it through :func:`gemsmode.load_ops`, which chooses between GPU and interpreter first.
"""

import importlib

from gemsmode.target import current

current()  # must come before the first @triton.jit

FAMILIES = ("unary", "activation", "binary", "ternary", "copy", "reduction", "scan", "sort", "search", "select", "unique",
            "softmax", "norm", "channel_norm", "loss", "movement", "pool", "unpool", "upsample", "pad", "fold", "convolution",
            "creation", "indexing", "scatter", "mask", "rearrange", "foreach", "amp", "random", "sampling", "attention", "matmul",
            "fused", "special")

for _name in FAMILIES:
    importlib.import_module(f"{__name__}.{_name}")
