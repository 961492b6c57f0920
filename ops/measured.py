"""Shape classes for which PyTorch's own kernels were measured to be faster: rules decline them where that was measured.

One row of :data:`SLOWER` for each class: the family that asks, the compute capability, the class in words, the test of a
call's facts, and what was measured (or why it cannot be otherwise). A row is taken out, or its test narrowed, when
``python -m perf`` says so; ``GEMSMODE_SLOWER=serve`` in the environment serves every class, to measure them.

Rows hold only for GPUs of the compute capability that they name. Elsewhere, and in the interpreter, nothing is declined.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from gemsmode.plan import Decline
from gemsmode.target import Target


class Slower(NamedTuple):
    """A class of calls that is left to PyTorch.

    Attributes:
        family: who asks: ``product``, ``attention``, ``sort``, ``unique``, ``median`` (of all elements), ``kthvalue`` or
            ``upsample``, ``power``, ``shuffle``, ``search`` or ``patches`` (of a convolution).
        capability: the compute capability where it holds, as :attr:`Target.arch` has it.
        what: the class in words.
        test: takes the call's facts.
        measured: PyTorch's time over this package's, on what GPU, or why it is slower.
    """

    family: str
    capability: int
    what: str
    test: Callable[..., bool]
    measured: str


def _attention_forward(*, backward: bool, itemsize: int, biased: bool, m: int, **_: Any) -> bool:
    return not backward and itemsize == 2 and not biased and m > 64


def _attention_backward(*, backward: bool, itemsize: int, **_: Any) -> bool:
    return backward and itemsize == 2


def _float_attention(*, backward: bool, itemsize: int, m: int, **_: Any) -> bool:
    return itemsize == 4 and (backward or m > 16)


def _ieee_product(*, kind: str, m: int, n: int, **_: Any) -> bool:
    return kind == "ieee" and min(m, n) > 1


def _few_float_rows(*, kind: str, m: int, n: int, k: int, **_: Any) -> bool:
    return kind == "tf32x3" and 1 < min(m, n) < 16 and k >= 512


def _some_float_rows(*, kind: str, m: int, n: int, k: int, batch: int, **_: Any) -> bool:
    return kind == "tf32x3" and 32 < min(m, n) <= 64 and k >= 512 and batch * max(m, n) < 64 * 132


def _floats_across(*, kind: str, m: int, n: int, k: int, across: bool, **_: Any) -> bool:
    return kind == "tf32x3" and across and min(m, n) > 64 and ((min(m, n) < 256 and m * n * k >= 2**26) or k >= 8192)


def _tf32_product(*, kind: str, **_: Any) -> bool:
    return kind == "tf32"


def _short_addmm(*, kind: str, m: int, n: int, k: int, batch: int, alone: bool, **_: Any) -> bool:
    return kind == "half" and batch == 1 and alone and min(m, n) >= 1024 and 512 <= k <= 1024


def _large_product(*, kind: str, m: int, n: int, k: int, batch: int, alone: bool, **_: Any) -> bool:
    return kind == "half" and batch == 1 and alone and k > 1024 and 2**36 <= m * n * k < 2**38


def _patches_of_floats(*, itemsize: int, width: int, programs: int) -> bool:
    return itemsize == 4 and (width % 4 != 0 or programs < 132)


def _wide_window(*, taps: int, itemsize: int, **_: Any) -> bool:
    return taps > 100 and itemsize == 4


def _long_sort(*, rows: int, n: int, itemsize: int, **_: Any) -> bool:
    return n > 1024 and not (rows == 1 and itemsize == 8 and 2**15 < n <= 2**16)


def _sort_of_1024(*, n: int, itemsize: int, **_: Any) -> bool:
    return 512 < n <= 1024 and itemsize == 4


def _long_unique(*, n: int, **_: Any) -> bool:
    return n > 2**17


def _long_median(*, n: int, **_: Any) -> bool:
    return n >= 2**14


def _one_selection(*, rows: int, n: int, **_: Any) -> bool:
    return rows == 1 and 2**11 < n < 2**15


def _power(*, dtype: torch.dtype) -> bool:
    return dtype == torch.float32


def _shuffle(*, factor: int, itemsize: int, **_: Any) -> bool:
    return factor == 2 and itemsize == 2


def _long_search(*, boundaries: int, **_: Any) -> bool:
    return boundaries >= 2**15


SLOWER: tuple[Slower, ...] = (
    Slower("product", 90, "float32 products over no multiple of 32 elements, or of rows of no multiple of 16 bytes", _ieee_product,
           "on an H200 0.14x at 129x65x2047, 0.53x at 100x100x100, 1.05x at 127x129x127, 0.82x at 2048x2048x2048 with that kernel"),
    Slower("product", 90, "float32 products of 2 to 15 rows over 512 elements or more", _few_float_rows,
           "on an H200 0.92x at 4x4096x4096, and PyTorch's rounding errors are smaller; at 9x4096x4096 by 1.7"),
    Slower("product", 90, "float32 products of 33 to 64 rows with too few columns for every multiprocessor", _some_float_rows,
           "on an H200 0.68x to 1.04x at 64x4096x4096"),
    Slower("product", 90, "float32 products of few rows, or over 8192 elements or more, with neither operand contiguous along that length",
           _floats_across, "on an H200 0.86x at 768x3072x16384 and 0.70x at 256x256x8192; elsewhere one is turned around first, which "
           "takes at least 256 rows"),
    Slower("product", 90, "float32 products with TF32", _tf32_product,
           "operands rounded to nearest cost 0.16x to 0.40x at 4096x4096x4096 on an H200, 0.59x at 512x512x512, 0.94x at 16x2048x2048"),
    Slower("product", 90, "large 16-bit products over 512 to 1024 elements", _short_addmm,
           "0.93x for addmm 4096x3072x768 on an H200"),
    Slower("product", 90, "16-bit products of 2^36 to 2^38 multiplications over more than 1024 elements", _large_product,
           "on an H200 0.97x for 4096x4096x4096 in bfloat16, 0.95x in float16, and 0.95x for 2048x11008x4096"),
    Slower("patches", 90, "float32 patches of a width that is no multiple of 4, or too few for every multiprocessor", _patches_of_floats,
           "on an H200 0.63x for 16x3x224x224 in patches of 14x14 to 1024 channels and 0.43x for 2x64x56x56 of 4x4 to 96; 2.3x and 3.1x "
           "for patches of 16x16 and 32x32"),
    Slower("attention", 90, "attention's backward in 16-bit floats", _attention_backward,
           "seven matrix products without atomics where cuDNN needs five; 0.55x, causal, 4x32x2048x128 on an H200"),
    Slower("attention", 90, "attention of more than 64 queries in 16-bit floats without a bias", _attention_forward,
           "on an H200 0.66x causal, 4x32x4096x128, 0.74x with groups of 4 heads, 2x32x8192x128, and 0.88x without a mask, 16x16x1024x64"),
    Slower("attention", 90, "attention of more than 16 queries in float32, and its gradients", _float_attention,
           "on an H200 0.53x and with gradients 0.41x, 4x16x1024x64; 0.81x and 0.61x causal, 1x12x2048x64"),
    Slower("sort", 90, "sorts of rows of more than 1024 elements", _long_sort,
           "on an H200 0.65x at 4096x2048, 0.87x at 1024x8192, 0.56x at 256x32768 and 0.36x for 2^20 elements, float32; "
           "0.20x to 0.93x for all sizes and dtypes but 65536 int64, 1.25x"),
    Slower("sort", 90, "sorts of rows of 513 to 1024 elements of 4 bytes", _sort_of_1024, "0.89x at 8192x1024 float32 on an H200"),
    Slower("unique", 90, "unique elements among more than 131072", _long_unique,
           "0.83x for 262144 and 0.43x for 2^20 int64, with inverse and counts, on an H200"),
    Slower("median", 90, "the median of 16384 elements or more", _long_median, "0.79x for 16384 and 0.36x for 2^20 float32 on an H200"),
    Slower("kthvalue", 90, "the k-th smallest of one row of 2049 to 32767 elements", _one_selection,
           "0.49x for 16384 float32 on an H200, where 65536 take 1.35x"),
    Slower("upsample", 90, "antialiased interpolation of more than 100 inputs an output in float32", _wide_window,
           "0.39x for 32x3x512x512 to 224x224, bicubic, on an H200"),
    Slower("power", 90, "powers of float32 tensors by tensors", _power,
           "0.91x for 8192x8192 on an H200, where both are limited by arithmetic; its error is below 0.6 ulp, PyTorch's 0.9"),
    Slower("shuffle", 90, "pixel shuffles by 2 of 2-byte elements", _shuffle, "0.91x for 16x256x128x128 bfloat16 on an H200"),
    Slower("search", 90, "searches among 32768 boundaries or more", _long_search,
           "0.47x for 16777216 float32 among 100000 on an H200, where 100 take 1.94x"),
)


def serves_slower() -> bool:
    """Whether the table is to be left aside."""
    return os.environ.get("GEMSMODE_SLOWER", "") == "serve"


@functools.cache
def _rows(family: str, capability: int | str) -> tuple[Slower, ...]:
    return tuple(row for row in SLOWER if row.family == family and row.capability == capability)


def check_measured(family: str, target: Target, **facts: Any) -> None:
    """Decline a call whose facts are those of a class in :data:`SLOWER`.

    Raises:
        Decline: it is one; the reason says what was measured.
    """
    if target.backend != "cuda":
        return
    for row in _rows(family, target.arch):
        if row.test(**facts) and not serves_slower():
            raise Decline(f"PyTorch's own is faster for {row.what} ({row.measured})")
