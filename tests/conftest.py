"""Options, the fixtures that every test shares, and the tables at the end of a run.

    pytest                    kernels run in Triton's interpreter, on the CPU; one or two samples of each op, in two dtypes
    pytest --generated        a few samples of each op and dtype
    pytest --full             every sample, every dtype, every launch choice
    pytest --device cuda      kernels run on the GPU; a few samples of each op and dtype
    pytest --ref cpu          float64 references are computed on the CPU
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gemsmode")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where kernels run; cpu is Triton's interpreter (default)")
    group.addoption("--ref", choices=("cpu", "device"), default="device", help="where float64 references are computed")
    group.addoption("--full", action="store_true", help="every sample of every dtype, and every launch choice compiled")
    group.addoption("--generated", action="store_true", help="more samples and dtypes in the tests generated from OpInfo and declarations")


def pytest_configure(config: pytest.Config) -> None:
    os.environ["COLUMNS"] = "160"  # texts are compared, and a terminal's width would wrap them elsewhere
    kept = tempfile.TemporaryDirectory(prefix="gemsmode-cache-")
    config.add_cleanup(kept.cleanup)
    os.environ["GEMSMODE_CACHE"] = kept.name  # what was measured on this machine is not for tests
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # also where a GPU is present
    import torch

    if config.getoption("--device") == "cuda":
        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: PyTorch sees no GPU")
        os.environ["GEMSMODE_SLOWER"] = "serve"  # what PyTorch does faster is to be right, too
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)
    import harness

    from gemsmode import plan

    harness.OPTIONS.device = config.getoption("--device")
    harness.OPTIONS.ref = config.getoption("--ref")
    harness.OPTIONS.full = config.getoption("--full")
    harness.OPTIONS.brief = not (config.getoption("--generated") or config.getoption("--full") or config.getoption("--device") == "cuda")
    plan.poison(True)  # what a kernel leaves unwritten is NaN, not a lucky zero


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """The device type that kernels run on in this run."""
    return request.config.getoption("--device")


# Modules whose tests make their tensors where tensors are made by default.
_ON_DEFAULT_DEVICE = {"test_fuse", "test_reduction", "test_scan", "test_matmul", "test_loss", "test_norm", "test_softmax", "test_verify"}


@pytest.fixture(autouse=True)
def exact_convolutions(request: pytest.FixtureRequest) -> Iterator[None]:
    """Rules follow PyTorch's setting for float32 convolutions, which allows TF32; PyTorch's own kernels take it or do not."""
    import torch

    if request.config.getoption("--device") != "cuda":
        yield
        return
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """With ``--device cuda`` the tests of these modules make their tensors on the GPU."""
    import torch

    if request.config.getoption("--device") != "cuda" or request.module.__name__.rpartition(".")[2] not in _ON_DEFAULT_DEVICE:
        yield
        return
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


# -- a GPU that answers no more ----------------------------------------------------------------------------------------
#
# After an assertion in a kernel or an access outside of memory every further call of the process fails. The test that
# was running is blamed, and the process ends, so that its later tests are run by another (pytest-xdist starts one).


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    """A test has failed if kernels that it left running do."""
    import harness

    result = yield
    if (lost := harness.gpu_error()) is not None:
        raise harness.GpuLost(f"after the end of the test: {lost}")
    return result


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """End the process if the GPU is lost: all reports of the test have been sent, but not yet that the worker is done with
    it, so that pytest-xdist reports the same test once more as the one that ended a worker, and no other."""
    import harness

    if (lost := harness.gpu_error()) is None:
        return
    if os.environ.get("PYTEST_XDIST_WORKER"):
        os._exit(70)
    pytest.exit(f"{nodeid}: the GPU no longer answers this process ({lost}); with pytest-xdist (-n) another would take over", 70)


@pytest.fixture
def unpoisoned() -> Iterator[None]:
    """For tests of what a plan does by itself: allocations are not filled."""
    from gemsmode import plan

    plan.poison(False)
    yield
    plan.poison(True)


# -- tables at the end, gathered from xdist's workers ------------------------------------------------------------------


def _state() -> dict[str, Any]:
    import harness

    return {"tallies": {name: (t.compared, dict(t.passed)) for name, t in harness.TALLIES.items()}, "kernels": list(harness.KERNELS)}


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["gemsmode"] = _state()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    import harness

    state = getattr(node, "workeroutput", {}).get("gemsmode")
    if state:
        for name, (compared, passed) in state["tallies"].items():
            harness.TALLIES[name].compared += compared
            harness.TALLIES[name].passed.update(passed)
        harness.KERNELS.extend(state["kernels"])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    import harness

    lines = [*harness.tally_table(), *harness.kernel_table()]
    for line in lines:
        terminalreporter.write_line(line)
