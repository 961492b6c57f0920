"""The command line: ``gemsmode`` or ``python -m gemsmode``.

Exit codes: 0 all is well; 1 what was asked for ran and found a problem (``demo``: results too far apart, ``doctor``: a
check failed, ``ops``: nothing matches, ``verify``: a call differs, ``tune``: nothing was timed); 2 the command could not
be understood or carried out. ``report`` and ``tune``, and ``verify`` where all agrees, end with the exit code of the script
that they ran.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import json
import logging
import os
import re
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import torch

    from gemsmode.tracing import Report


class UsageError(Exception):
    """Something the user can put right; the message says what and how. Exit code 2."""


# -- arguments of ops, as text -----------------------------------------------------------------------------------------

_TENSOR = re.compile(r"(?P<dtype>[a-z][a-z0-9_]*)\[(?P<shape>[\d,\s]*)\](?::(?P<stride>[\d,]+))?(?:@(?P<device>[a-z]+(?::\d+)?))?$")
_ALIASES = {"half": "float16", "float": "float32", "double": "float64", "long": "int64", "int": "int32", "short": "int16", "b8": "bool"}

ARGUMENT_HELP = """\
arguments, as in the report's tables:
  f32[64,128]         a tensor: dtype (f32, float32, bf16, i64, bool...) and shape; f32[] has no dimension
  f32[64,128]:1,64    the same with strides;  f32[8]@cpu on another device
  [f32[2],f32[3]]     a list of tensors;  [0,1] a list of integers
  2  2.5  true  none  bf16  other text
  name=value          an argument by its name in the op's schema
"""


def dtype_called(name: str) -> torch.dtype | None:
    """The dtype that ``f32``, ``float32`` or ``float`` means."""
    import torch
    from torch.utils._dtype_abbrs import dtype_abbrs

    by_name = {short: dtype for dtype, short in dtype_abbrs.items()}
    found = by_name.get(name) or getattr(torch, _ALIASES.get(name, name), None)
    return found if isinstance(found, torch.dtype) else None


def parse_argument(text: str) -> Any:
    """A value from its text on the command line, see :data:`ARGUMENT_HELP`.

    Raises:
        UsageError: it looks like a tensor or list and is none.
    """
    import torch

    from gemsmode.plan import contiguous_strides
    from gemsmode.signature import TensorMeta

    text = text.strip()
    if match := _TENSOR.fullmatch(text):
        dtype = dtype_called(match["dtype"])
        if dtype is None:
            raise UsageError(f"{match['dtype']!r} in {text!r} is no dtype; write f32, bf16, i64, bool or torch's own names")
        shape = tuple(int(n) for n in match["shape"].split(",") if n.strip())
        stride = contiguous_strides(shape) if match["stride"] is None else tuple(int(n) for n in match["stride"].split(",") if n)
        if len(stride) != len(shape):
            raise UsageError(f"{text!r} has {len(shape)} sizes and {len(stride)} strides; give one stride per size")
        return TensorMeta(dtype, shape, stride, torch.device(match["device"] or "meta"))
    if text.startswith("["):
        if not text.endswith("]"):
            raise UsageError(f"{text!r} is a list without its end; quote it for the shell and close it with ]")
        return [parse_argument(item) for item in _split_list(text[1:-1])]
    lowered = text.lower()
    if lowered in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[lowered]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    if (dtype := dtype_called(text)) is not None:
        return dtype
    if "[" in text or "]" in text:
        raise UsageError(f"{text!r} is not a tensor; one looks like f32[64,128], with quotes if the shell wants them")
    return text


def _split_list(text: str) -> Iterator[str]:
    depth, start = 0, 0
    for i, c in enumerate(text):
        depth += (c == "[") - (c == "]")
        if c == "," and not depth:
            yield text[start:i]
            start = i + 1
    if text[start:].strip():
        yield text[start:]


def _split_arguments(texts: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if equals and name.isidentifier():
            kwargs[name] = parse_argument(value)
        elif kwargs:
            raise UsageError(f"{text!r} stands after an argument given by name; put it before {next(iter(kwargs))}=")
        else:
            args.append(parse_argument(text))
    return args, kwargs


# -- commands ----------------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace, out: Console) -> int:
    from gemsmode import demo

    path = Path(options.text) if options.text else demo.TEXT
    dtype = dtype_called(options.dtype) if options.dtype else None
    if options.dtype and dtype not in demo.TOLERANCE:
        raise UsageError(f"--dtype takes {', '.join(str(d).removeprefix('torch.') for d in demo.TOLERANCE)}, not {options.dtype!r}")
    if not path.is_file():
        raise UsageError(f"there is no file {path} to read; leave --text out for the one that comes with gemsmode")
    if not path.stat().st_size:
        raise UsageError(f"{path} is empty; the demo needs a text to read")
    _check_outputs(options)
    with _progress("running two models natively and under the mode"):
        outcomes, report = demo.run(options.size, path, dtype, allow=options.allow, deny=options.deny)
    out.print(Text(f"A decoder and an encoder on {path.stat().st_size:,} bytes of {path.name}, forward and backward", style="bold"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("model", "parameters", "loss", "under the mode", "logits apart", "gradients apart", "native", "under the mode", "ratio"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for o in outcomes:
        table.add_row(o.name, f"{o.parameters:,}", f"{o.loss_native:.6f}", f"{o.loss_gems:.6f}", f"{o.logits:.1e}", f"{o.gradients:.1e}",
                      f"{1e3 * o.native_s:.2f} ms", f"{1e3 * o.gems_s:.2f} ms", f"{o.native_s / o.gems_s:.2g}x")
    _print(out, table)
    how = "traced, in the interpreter" if report.environment["interpreter"] else "not traced, median"
    out.print(f"Apart: largest difference, relative to the largest entry. Time of a forward and backward: {how}.\n", highlight=False)
    _show(report, options, out)
    limit = demo.TOLERANCE[dtype or next(iter(_dtypes_of(report)))]
    far = [o for o in outcomes if not max(o.logits, o.gradients) <= limit]
    for o in far:
        where = f"gradient of {o.worst}" if o.gradients >= o.logits else "logits"
        out.print(f"[bold red]too far apart[/]: {o.name}, {where}: {max(o.logits, o.gradients):.2g}, where {limit:.2g} is allowed")
    return 1 if far else 0


def _dtypes_of(report: Report) -> list[torch.dtype]:
    import torch

    return [torch.float32] if report.environment["interpreter"] else [torch.bfloat16]


def _report(options: argparse.Namespace, out: Console) -> int:
    if options.dry_run and options.prefer == "fastest":
        raise UsageError("a dry run runs nothing that --prefer fastest could time; leave one of the two out")
    for name in ("target", "dtype"):
        if getattr(options, name) is not None and not options.dry_run:
            raise UsageError(f"--{name} says what a dry run is for; add --dry-run")
    if not options.dry_run:
        code, report = _run_script(options, trace=True, prefer=options.prefer)
    else:
        from gemsmode.dryrun import target_of

        try:
            target = target_of(options.target or True)
        except ValueError as error:
            raise UsageError(str(error)) from None
        dtype = dtype_called(options.dtype) if options.dtype else None
        if options.dtype and (dtype is None or not dtype.is_floating_point):
            raise UsageError(f"--dtype takes a floating-point dtype such as bf16, f16 or f32, not {options.dtype!r}")
        with _on_meta(dtype):
            code, report = _run_script(options, dry_run=target)
    _show(report, options, out)
    return code


@contextlib.contextmanager
def _on_meta(dtype: torch.dtype | None) -> Iterator[None]:
    """For a script that knows of no dry run: its tensors are made on the meta device, of ``dtype`` where it names none."""
    import torch

    from gemsmode.dryrun import OnMeta

    before = torch.get_default_dtype()
    if dtype is not None:
        torch.set_default_dtype(dtype)
    try:
        with OnMeta():
            yield
    finally:
        torch.set_default_dtype(before)


def _verify(options: argparse.Namespace, out: Console) -> int:
    code, report = _run_script(options, verify=True, on_mismatch=options.on_mismatch, reproducers=options.reproducers)
    _show(report, options, out)
    failed = sum(check.failed for check in report.checks)
    if not report.checks:
        print("gemsmode: no call was compared: no rule served any", file=sys.stderr)
    return code or (1 if failed else 0)


def _tune(options: argparse.Namespace, out: Console) -> int:
    from gemsmode.choice import Chooser
    from gemsmode.target import current
    from gemsmode.tracing.sections import measured

    chooser = Chooser(again=options.again)
    if options.list:
        _print(out, _kept(chooser, options.limit))
        return 0
    if not current().present:
        raise UsageError(f"kernels are compiled for {current().backend}:{current().arch}, which is not present: nothing can be timed")
    with _counting(chooser):
        code, report = _run_script(options, trace=True, prefer=chooser)
    chooser.save()
    section = measured(report, options.limit)
    if section is None:
        print("gemsmode: nothing was timed: no rule served any call", file=sys.stderr)
        return code or 1
    if not options.quiet:
        from gemsmode.tracing.table import render_section

        _print(out, render_section(section))
        for store in chooser.stores():
            out.print(f"{len(store):,} choices are kept in {store.path}", highlight=False, markup=False, soft_wrap=True)
    return code


def _kept(chooser: Any, limit: int) -> Table:
    """The choices that are kept for this machine."""
    from gemsmode.target import current
    from gemsmode.tracing.sections import seconds

    store = chooser.store(current())
    table = Table(box=None, pad_edge=False, header_style="bold", caption=f"{len(store):,} choices in {store.path}", caption_justify="left")
    table.add_column("call", overflow="fold")
    for column in ("by rule", "by native"):
        table.add_column(column, justify="right")
    table.add_column("taken")
    for text, entry in store.items()[-limit:]:
        table.add_row(Text(text.removeprefix("aten.")), seconds(entry.choice.rule_us * 1e-6), seconds(entry.choice.native_us * 1e-6),
                      "rule" if entry.choice.rule_wins else "native")
    return table


@contextlib.contextmanager
def _counting(chooser: Any) -> Iterator[None]:
    """On a terminal a line that says what is timed; a script's own output goes above it."""
    console = Console(stderr=True)
    if not (console.is_terminal and sys.stdout.isatty()):
        yield
        return
    count = 0
    with console.status("running the script") as status:
        def show(text: str, choice: Any) -> None:
            nonlocal count
            count += 1
            status.update(Text(f"{count} signatures timed; {text[:80]}: {choice.reason}"))

        chooser.on_measured = show
        yield


def _run_script(options: argparse.Namespace, **how: Any) -> tuple[int, Report]:
    """Run the script or module under a mode made with ``how``: its exit code, and the report."""
    import gemsmode

    script, module = options.script, options.module
    if module is None and script is None:
        raise UsageError(f"give a script to run (gemsmode {options.command} SCRIPT.py) or a module (gemsmode {options.command} -m MODULE)")
    if module is None and not Path(script).is_file():
        hint = "" if script.endswith(".py") else f"; to run a module, write -m {script}"
        raise UsageError(f"there is no file {script} to run{hint}")
    _check_outputs(options)
    argv, path = sys.argv, list(sys.path)
    code = 0
    mode = gemsmode.enable(allow=options.allow, deny=options.deny, strict=options.strict, **how)
    try:
        if module is None:
            sys.argv = [script, *options.args]
            sys.path[0:1] = [str(Path(script).resolve().parent)]
            runpy.run_path(script, run_name="__main__")
        else:
            sys.argv = [module, *options.args]
            sys.path[0:1] = [os.getcwd()]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = _exit_code(end)
    except KeyboardInterrupt as error:
        code = 130
        mode.recorder.leave(error)  # type: ignore[union-attr]
    except Exception as error:
        if module is not None and isinstance(error, ImportError) and module in str(error) and error.__traceback__ is not None \
                and not _inside(error, module):
            raise UsageError(f"there is no module {module} to run: {error}") from None
        code = 1
        mode.recorder.leave(error)  # type: ignore[union-attr]
        _print_traceback(error)
    finally:
        gemsmode.disable()
        sys.argv, sys.path[:] = argv, path
        sys.stdout.flush()
    return code, mode.report


def _exit_code(end: SystemExit) -> int:
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code
    print(end.code, file=sys.stderr)
    return 1


def _frames(error: BaseException) -> list[Any]:
    """The traceback's frames below this file and ``runpy``: the script's own."""
    frames = list(traceback.walk_tb(error.__traceback__))
    ours = [i for i, (frame, _) in enumerate(frames) if frame.f_code.co_filename == __file__ or frame.f_globals.get("__name__") == "runpy"]
    return frames[ours[-1] + 1:] if ours else frames


def _inside(error: BaseException, module: str) -> bool:
    return any(not f.f_code.co_filename.startswith("<frozen") for f, _ in _frames(error))


def _print_traceback(error: BaseException) -> None:
    """The script's traceback, without the frames of this command."""
    summary = traceback.TracebackException.from_exception(error)
    kept = len(_frames(error))
    if kept:
        summary.stack = traceback.StackSummary.from_list(summary.stack[-kept:])
    print("".join(summary.format()), file=sys.stderr, end="", flush=True)


_WRITERS = {"json": "to_json", "csv": "to_csv", "html": "to_html", "markdown": "to_markdown", "chrome_trace": "to_chrome_trace"}


def _check_outputs(options: argparse.Namespace) -> None:
    """Refuse before a long run what could not be written after it."""
    from gemsmode.tracing.files import check
    from gemsmode.tracing.ranks import ranked_path

    for name in _WRITERS:
        if (path := getattr(options, name, None)) is not None:
            setattr(options, name, ranked_path(path))
            check(getattr(options, name), options.force)


def _show(report: Report, options: argparse.Namespace, out: Console) -> None:
    from gemsmode.tracing.ranks import launched_rank
    from gemsmode.tracing.table import render

    if not options.quiet and not launched_rank():  # of several ranks the first one prints
        _print(out, render(report, options.by, options.limit))
    for name, method in _WRITERS.items():
        if (path := getattr(options, name)) is not None:
            getattr(report, method)(path, overwrite=options.force)
            print(f"wrote {path}", file=sys.stderr)


def _diff(options: argparse.Namespace, out: Console) -> int:
    from gemsmode.tracing import Report
    from gemsmode.tracing.table import difference

    reports = []
    for name in (options.before, options.after):
        try:
            reports.append(Report.load(name))
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from None
    _print(out, difference(reports[0].diff(reports[1]), options.limit))
    return 0


def _ops(options: argparse.Namespace, out: Console) -> int:
    import gemsmode
    from gemsmode.registry import default, plain_name, short_name

    gemsmode.load_ops()
    pattern = plain_name(options.pattern) if options.pattern else None
    rows: list[dict[str, Any]] = []
    for op, candidates in default.overloads().items():
        name = short_name(op)
        packet = op._schema.name.partition("::")[2]
        families = {c.rule.family for c in candidates}
        names = (name, packet, f"{packet}.{op._overloadname or 'default'}", *families)
        if pattern is not None and not any(fnmatch.fnmatchcase(n, pattern) for n in names):
            continue
        own = [c for c in candidates if c.variant is None]
        derived = None if own or not candidates or candidates[0].variant is None else short_name(candidates[0].variant.base)
        rules = [{"name": c.rule.name, "when": c.rule.condition, "file": c.rule.file, "line": c.rule.line} for c in candidates]
        rows.append({"overload": name, "derived_from": derived, "family": sorted(families), "rules": rules})
    rows.sort(key=lambda row: str(row["overload"]))
    if options.json:
        print(json.dumps(rows, indent=1))
        return 0 if rows or pattern is None else 1
    if not rows:
        out.print(f"no registered overload matches {options.pattern!r}; patterns are globs over names (\"*_backward\"), overloads "
                  "(\"add.*\") and families (\"pointwise\")", highlight=False, markup=False)
        return 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("overload", "rule", "when", "kernel"):
        table.add_column(column, overflow="fold")
    for row in rows:
        for i, rule in enumerate(row["rules"]):
            first = str(row["overload"]) if i == 0 else ""
            origin = f" (from {row['derived_from']})" if i == 0 and row["derived_from"] else ""
            table.add_row(Text(first + origin), Text(rule["name"]), Text(rule["when"]), Text(f"{_short_path(rule['file'])}:{rule['line']}"))
    _print(out, table)
    out.print(f"{len(rows)} overloads, {sum(row['derived_from'] is None for row in rows)} with a rule of their own", highlight=False)
    return 0


def _short_path(file: str) -> str:
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file


def _explain(options: argparse.Namespace, out: Console) -> int:
    import gemsmode

    gemsmode.load_ops()
    args, kwargs = _split_arguments(options.args)
    mode = gemsmode.GemsMode(allow=options.allow, deny=options.deny) if options.allow or options.deny else None
    try:
        explanation = gemsmode.explain(options.op, *args, mode=mode, **kwargs)
    except TypeError as error:
        raise UsageError(str(error)) from None
    if options.json:
        d = explanation.decision
        print(json.dumps({
            "overload": str(explanation.op), "call": explanation.call,
            "decision": None if d is None else {"kind": d.kind, "rule": d.rule, "reason": d.reason, "bytes": d.bytes, "flops": d.flops},
            "choice": None if (c := explanation.choice) is None else {"rule_us": c.rule_us, "native_us": c.native_us,
                                                                      "taken": "rule" if c.rule_wins else "native", "reason": c.reason},
            "rules": [{"name": n, "when": w, "where": f, "derived_from": b} for n, w, f, b in explanation.rules]}, indent=1))
    else:
        out.print(str(explanation), highlight=False, markup=False, soft_wrap=True)
    return 0


def _doctor(options: argparse.Namespace, out: Console) -> int:
    from gemsmode import doctor

    with _progress("looking around"):
        checks = doctor.examine()
    if options.json:
        print(json.dumps(doctor.as_dict(checks), indent=1))
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        marks = {"ok": Text("ok", style="green"), "note": Text("note", style="yellow"), "fail": Text("FAIL", style="bold red")}
        for check in checks:
            table.add_row(marks[check.state], Text(check.name), Text(check.text, overflow="fold"))
        _print(out, table)
    return 1 if any(c.state == "fail" for c in checks) else 0


# -- the parser --------------------------------------------------------------------------------------------------------


def _print(out: Console, renderable: Any) -> None:
    """Print in colour on a terminal, and without padding into a pipe or a file."""
    from gemsmode.tracing.table import plain

    if out.is_terminal:
        out.print(renderable)
    else:
        print(plain(renderable, out.width))


@contextlib.contextmanager
def _progress(text: str) -> Iterator[None]:
    """A spinner on standard error while something long runs; nothing where that is not a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}\nTry: {self.prog} --help")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--allow", type=_names, metavar="OPS", help="replace only these: names, globs or families, separated by commas")
    parser.add_argument("--deny", type=_names, metavar="OPS", help="never replace these")


def _add_report_options(parser: argparse.ArgumentParser) -> None:
    _add_selection(parser)
    parser.add_argument("--by", choices=("overload", "op", "shape", "module"), default="overload",
                        help="what a row stands for (default: overload)")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="rows of each table (default: 20)")
    for name, text in (("json", "JSON"), ("csv", "CSV"), ("html", "one self-contained page"), ("markdown", "Markdown"),
                       ("chrome-trace", "a timeline for ui.perfetto.dev")):
        parser.add_argument(f"--{name}", metavar="PATH", help=f"write the report as {text}")
    parser.add_argument("--force", action="store_true", help="write over files that are not reports")
    parser.add_argument("--quiet", action="store_true", help="print no table")


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    import gemsmode

    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="gemsmode", formatter_class=raw,
                     description="Run Triton kernels in unchanged PyTorch models, and see what ran, what did not, and why.",
                     epilog="examples:\n"
                            "  gemsmode doctor                            does it work here?\n"
                            "  gemsmode demo                              two small models, natively and under the mode\n"
                            "  gemsmode report train.py --epochs 1        what of a script was replaced, what was not, and why\n"
                            "  gemsmode report --dry-run --target cuda:90 --dtype bf16 train.py    the same without running it\n"
                            "  gemsmode verify train.py --steps 1         are the kernels right there?\n"
                            "  gemsmode tune train.py --steps 1           are they faster there? (for prefer=\"fastest\")\n"
                            "  gemsmode explain mm bf16[64,64] bf16[64,64]\n"
                            "  gemsmode ops '*_backward'\n")
    parser.add_argument("--version", action="version", version=f"gemsmode {gemsmode.__version__}")
    parser.add_argument("--verbose", "-v", action="store_true", help="log each decision")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, function: Callable[[argparse.Namespace, Console], int], text: str, epilog: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", epilog=epilog, formatter_class=raw)
        added.set_defaults(run=function)
        return added

    demo = command("demo", _demo, "run two small models on a real text, natively and under the mode",
                   "examples:\n  gemsmode demo\n  gemsmode demo --size large --dtype float16\n"
                   "  gemsmode demo --text README.md --html demo.html\n")
    demo.add_argument("--size", choices=("tiny", "small", "large"), help="default: tiny in the interpreter, small on a GPU")
    demo.add_argument("--text", metavar="FILE", help="the bytes to read (default: a speech that comes with gemsmode)")
    demo.add_argument("--dtype", metavar="DTYPE", help="of the weights (default: float32 in the interpreter, bfloat16 on a GPU)")
    _add_report_options(demo)

    report = command("report", _report, "run a script, unchanged, under a traced mode and print what happened to each op",
                     "examples:\n  gemsmode report train.py --epochs 1\n  gemsmode report --html report.html --by shape train.py\n"
                     "  gemsmode report --deny mm,addmm -m mypackage.train --steps 3\n\n"
                     "Options of gemsmode stand before the script; what follows it is the script's. Under torchrun each rank writes\n"
                     "its own files (report.rank1.json) and rank 0 prints: torchrun --nproc-per-node 2 -m gemsmode report train.py")
    report.add_argument("-m", dest="module_flag", metavar="MODULE", help="run a module, as python -m does")
    report.add_argument("--strict", action="store_true", help="stop at the first rule that fails, instead of falling back")
    report.add_argument("--prefer", choices=("rules", "fastest"),
                        help="fastest: time each rule and PyTorch's own, take the faster one, and report both times")
    report.add_argument("--dry-run", action="store_true", help="run nothing: tensors are on the meta device, and calls are only decided")
    report.add_argument("--target", metavar="TARGET",
                        help="what a dry run is for: cuda:90, hip:gfx942, cpu... (default: this GPU, or cuda:90)")
    report.add_argument("--dtype", metavar="DTYPE", help="of a dry run: floating-point tensors whose dtype the script does not name")
    _add_report_options(report)
    report.usage = "gemsmode report [options] SCRIPT.py [args...]\n       gemsmode report [options] -m MODULE [args...]"

    verify = command("verify", _verify, "run a script, unchanged, and compare each call that a rule serves with PyTorch's own",
                     "examples:\n  gemsmode verify train.py --steps 1\n"
                     "  gemsmode verify --reproducers wrong/ --on-mismatch raise train.py\n\n"
                     "Exit code 1 if any call differs. A kernel of your own is compared if the script registers it with @gemsmode.rule.")
    verify.add_argument("-m", dest="module_flag", metavar="MODULE", help="run a module, as python -m does")
    verify.add_argument("--strict", action="store_true", help="stop at the first rule that fails, instead of falling back")
    verify.add_argument("--on-mismatch", choices=("warn", "raise"), default="warn", help="go on, or stop at the first (default: warn)")
    verify.add_argument("--reproducers", metavar="DIR", help="write each rule's first mismatch there, with a script that shows it")
    _add_report_options(verify)
    verify.usage = "gemsmode verify [options] SCRIPT.py [args...]\n       gemsmode verify [options] -m MODULE [args...]"

    tune = command("tune", _tune, "run a script, unchanged, and time the kernels and PyTorch's own on each shape that it meets",
                   "examples:\n  gemsmode tune train.py --steps 1\n  gemsmode tune --again -m mypackage.train\n  gemsmode tune --list\n\n"
                   "GemsMode(prefer=\"fastest\") then knows from its first call on which of the two to run. What was measured is kept in\n"
                   "$GEMSMODE_CACHE, $XDG_CACHE_HOME/gemsmode or ~/.cache/gemsmode, for this GPU, driver, torch, triton and gemsmode.")
    tune.add_argument("-m", dest="module_flag", metavar="MODULE", help="run a module, as python -m does")
    tune.add_argument("--again", action="store_true", help="time also what is known from before")
    tune.add_argument("--list", action="store_true", help="run nothing: show what is kept for this machine")
    tune.add_argument("--strict", action="store_true", help="stop at the first rule that fails, instead of falling back")
    tune.add_argument("--limit", type=int, default=40, metavar="N", help="rows shown (default: 40)")
    tune.add_argument("--quiet", action="store_true", help="print no table")
    _add_selection(tune)
    tune.usage = "gemsmode tune [options] SCRIPT.py [args...]\n       gemsmode tune [options] -m MODULE [args...]"

    diff = command("diff", _diff, "compare two reports that were written as JSON",
                   "example:\n  gemsmode report --json before.json train.py\n  gemsmode report --json after.json --deny mm train.py\n"
                   "  gemsmode diff before.json after.json\n")
    diff.add_argument("before")
    diff.add_argument("after")
    diff.add_argument("--limit", type=int, default=20, metavar="N", help="rows shown (default: 20)")

    ops = command("ops", _ops, "list the overloads that rules serve, their conditions and where the kernels are",
                  "examples:\n  gemsmode ops\n  gemsmode ops 'add*'\n  gemsmode ops pointwise\n  gemsmode ops --json '*_backward'\n")
    ops.add_argument("pattern", nargs="?", metavar="PATTERN", help="a name, a glob or a family")
    ops.add_argument("--json", action="store_true", help="print JSON")

    explain = command("explain", _explain, "say which rule would run for a call, or why none",
                      "examples:\n  gemsmode explain mm\n  gemsmode explain add.Tensor f32[64,64] f32[64] alpha=2\n"
                      "  gemsmode explain sum.dim_IntList 'bf16[8,128]' '[1]' keepdim=true\n\n" + ARGUMENT_HELP)
    explain.add_argument("op", metavar="OP", help="mm, add.Tensor, aten.silu.default")
    explain.add_argument("args", nargs="*", metavar="ARG", help="the call's arguments; none: list the rules only")
    explain.add_argument("--json", action="store_true", help="print JSON")
    _add_selection(explain)

    doctor = command("doctor", _doctor, "say what is installed, what it sees, and whether it works", "example:\n  gemsmode doctor --json\n")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return parser


_REPORT_FLAGS = {"--force", "--quiet", "--strict", "--dry-run", "--again", "--list", "-h", "--help"}


def _split_script(argv: list[str]) -> tuple[list[str], str | None, str | None, list[str]]:
    """The command's own options, the script, the module, and the arguments that are theirs."""
    i = 0
    while i < len(argv):
        word = argv[i]
        if word == "-m":
            return argv[:i], None, argv[i + 1] if i + 1 < len(argv) else None, argv[i + 2:]
        if word.startswith("-m") and not word.startswith("--"):
            return argv[:i], None, word[2:], argv[i + 1:]
        if word == "--":
            return argv[:i], argv[i + 1] if i + 1 < len(argv) else None, None, argv[i + 2:]
        if not word.startswith("-"):
            return argv[:i], word, None, argv[i + 1:]
        i += 1 if word in _REPORT_FLAGS or "=" in word else 2
    return argv, None, None, []


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = build_parser()
    position = next((i for i, word in enumerate(argv) if not word.startswith("-")), None)
    if position is None or argv[position] not in ("report", "verify", "tune"):
        return parser.parse_args(argv)
    own, script, module, rest = _split_script(argv[position + 1:])
    options = parser.parse_args([*argv[:position + 1], *own])
    options.script, options.module, options.args = script, module, rest
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code.

    Args:
        argv: the arguments after the command's name; defaults to the process's.
    """
    from gemsmode.errors import GemsError

    # Triton's interpreter computes with numpy, which warns of infinities that are right.
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.runtime\.interpreter")
    out = Console(soft_wrap=False)
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = 150  # a pipe or a file has no width; do not cut the tables to 80 columns
    try:
        options = _parse(list(sys.argv[1:] if argv is None else argv))
        if options.command is None:
            build_parser().print_help()
            return 2
        if options.verbose:
            logging.basicConfig(format="%(name)s: %(message)s")
            logging.getLogger("gemsmode").setLevel(logging.DEBUG)
        else:
            # Warnings reach the user through `warnings`; the log's copy with its traceback is for --verbose.
            logging.getLogger("gemsmode").addHandler(logging.NullHandler())
        return options.run(options, out)
    except SystemExit as end:  # --help, --version
        return _exit_code(end)
    except (UsageError, GemsError, OSError) as error:
        print(f"gemsmode: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 0


if __name__ == "__main__":
    sys.exit(main())
