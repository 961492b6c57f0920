"""What it costs to start: importing gemsmode, and the first call of a pointwise op, each in a process of its own.

The first process finds Triton's cache empty, the second finds what the first one compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

_PROGRAM = """
import json, sys, time
start = time.perf_counter()
import torch
device = sys.argv[1]
x = torch.randn(64, 64, device=device)
torch.add(x, x)
wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
wait()
found = {"torch_s": time.perf_counter() - start}
def step(name, do):
    start = time.perf_counter()
    result = do()
    wait()
    found[name] = time.perf_counter() - start
    return result
gemsmode = step("import_s", lambda: __import__("gemsmode"))
mode = step("load_s", gemsmode.GemsMode)
with mode:
    step("first_call_s", lambda: torch.add(x, x))
    step("next_call_s", lambda: torch.add(x, x))
print(json.dumps(found))
"""


def _run(device: torch.device, cache: Path) -> dict[str, float]:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", _PROGRAM, str(device)], capture_output=True, text=True, timeout=300, env=environment)
    if done.returncode:
        raise RuntimeError(f"a fresh process failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(device: torch.device) -> dict[str, Any]:
    """Seconds: ``import_s`` (gemsmode, with triton, on top of torch), ``load_s`` (the first mode, which loads the kernels),
    ``first_call_s`` with an empty cache, ``again_*`` in a second process, and ``compiled_again``: files that it added to the cache."""
    with tempfile.TemporaryDirectory(prefix="gemsmode-start-") as folder:
        cache = Path(folder)
        found: dict[str, Any] = dict(_run(device, cache))
        before = {p for p in cache.rglob("*") if p.is_file()}
        again = _run(device, cache)
        found["compiled"] = len(before)
        found["compiled_again"] = len({p for p in cache.rglob("*") if p.is_file()} - before)
    found.update({f"again_{name}": value for name, value in again.items()})
    return found
