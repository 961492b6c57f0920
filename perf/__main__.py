"""``python -m perf``: time eager and gemsmode on the declared cases, in one run, on the same inputs.

    python -m perf                                   every case
    python -m perf --group pointwise --dtype bf16    some
    python -m perf --ops 'softmax*' --json new.json --base old.json
    python -m perf list                              what there is
    python -m perf show new.json --markdown          a kept result as Markdown
    python -m perf compare old.json new.json         two kept results
    python -m perf merge old.json new.json --json all.json       one of several: of each case the later row
    python -m perf --ops softmax --prefer fastest --json all.json --merge     run some again, in place of their rows
    python -m perf host                              where the host time of tiny calls goes
    python -m perf once --ops 'softmax 16384*'       one call of each case, for a profiler (below)
    python -m perf --table perf/results/h200.json    write the README's tables

Whole models are cases, too: --group model. A long run is split by --budget, --ops and --merge. Counters of one kernel:

    ncu --set full --profile-from-start off python -m perf once --ops 'softmax 16384x4096 bf16'

On a machine without a GPU sizes are scaled down and kernels run in Triton's interpreter: for checking, not for speed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from perf import host, plot, readme, results
from perf.cases import DTYPES, Case, all_cases
from perf.measure import Stopwatch
from perf.runner import PROVIDERS, DeviceLost, Results, Runner, Settings, default_device, environment, merged, run_all

README = Path(__file__).parent.parent / "README.md"
GROUPS = tuple(dict.fromkeys(c.group for c in all_cases()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m perf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", nargs="?", default="run", choices=("run", "list", "show", "compare", "merge", "host", "once"))
    parser.add_argument("files", nargs="*", type=Path, help="results, for show, compare and merge")
    parser.add_argument("--ops", "--cases", action="append", default=[], metavar="GLOB", help="labels, names or aten ops; may be repeated")
    parser.add_argument("--group", action="append", default=[], choices=GROUPS, help="may be repeated")
    parser.add_argument("--dtype", action="append", default=[], choices=tuple(DTYPES), help="may be repeated")
    parser.add_argument("--providers", default="eager,gemsmode", help=f"of {', '.join(PROVIDERS)}; eager and gemsmode by default")
    parser.add_argument("--prefer", choices=("fastest",), help="also gemsmode with prefer=\"fastest\": one more provider")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the result here, written after each case")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write a CSV")
    parser.add_argument("--markdown", nargs="?", const="-", metavar="FILE", help="also write Markdown, to the terminal without FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw a roofline and the speed-ups, as SVG")
    parser.add_argument("--table", type=Path, metavar="RESULT", help="run nothing: write the README's tables from this result")
    parser.add_argument("--readme", type=Path, default=README, metavar="FILE", help="the README that --table writes to")
    parser.add_argument("--base", type=Path, metavar="RESULT", help="compare with this result at the end")
    parser.add_argument("--quick", action="store_true", help="fewer runs, no errors computed; without a GPU a sample of the cases")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no further case after this long")
    parser.add_argument("--case-limit", type=float, default=90.0, metavar="SECONDS", help="give a case up after this long")
    parser.add_argument("--clean", action="store_true", help="leave nothing in the L2 cache that is still to be written when a run begins")
    parser.add_argument("--scale", choices=("auto", "full", "tiny"), default="auto", help="tiny shrinks every size (auto: without a GPU)")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --json FILE has and run the other cases")
    parser.add_argument("--merge", action="store_true", help="keep the rows that --json FILE has of cases that are not run")
    parser.add_argument("--commit", help="what to write as the commit, where there is no git")
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    return parser


def select(cases: Sequence[Case], ops: Sequence[str] = (), groups: Sequence[str] = (), dtypes: Sequence[str] = ()) -> list[Case]:
    """The cases that one of each given kind of selection admits."""
    return [c for c in cases if (not ops or any(c.matches(p) for p in ops)) and (not groups or c.group in groups)
            and (not dtypes or c.dtype in dtypes)]


def _deliver(result: dict, options: argparse.Namespace) -> None:
    """Write and print what the options ask for, of a finished or kept result."""
    if options.csv:
        options.csv.write_text(results.to_csv(result))
    if options.plot:
        options.plot.write_text(plot.svg(result), encoding="utf-8")
    if options.markdown == "-":
        print(results.markdown(result))
    elif options.markdown:
        Path(options.markdown).write_text(results.markdown(result))
    if options.base:
        print("\n" + results.compare(json.loads(options.base.read_text()), result))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code is 0, 1 if a case failed, 2 for wrong use, 3 if the budget ended the run."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(arguments)
    wanted = {"show": 1, "compare": 2}.get(options.action, 0)
    if options.action == "merge":
        if len(options.files) < 2 or options.json is None:
            parser.error("merge takes two or more result files, and --json FILE to write to")
    elif len(options.files) != wanted:
        parser.error(f"{options.action} takes {wanted} result file{'s' if wanted != 1 else ''}, {len(options.files)} given")
    if options.merge and options.json is None:
        parser.error("--merge keeps rows of the file that --json names; there is none")
    missing = [str(f) for f in (*options.files, options.base, options.table) if f is not None and not f.exists()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    if options.table is not None:
        changed = readme.update(options.readme, json.loads(options.table.read_text()))
        print(f"{options.readme}: {'written' if changed else 'nothing has changed'}")
        return 0
    if options.action == "merge":
        result = merged([json.loads(f.read_text()) for f in options.files])
        options.json.write_text(json.dumps(result, indent=1))
        print(f"{len(result['rows'])} rows in {options.json}")
        _deliver(result, options)
        return 0
    if options.action == "compare":
        print(results.compare(*(json.loads(f.read_text()) for f in options.files)))
        return 0
    if options.action == "show":
        result = json.loads(options.files[0].read_text())
        rows = result["rows"]
        print(results.heading(result["environment"], result["peaks"]), results.table(rows), results.closing(rows), sep="\n\n")
        _deliver(result, options)
        return 0
    chosen = select(all_cases(), options.ops, options.group, options.dtype)
    if options.action == "host":
        chosen = select(all_cases(), options.ops, ("tiny",))
    if not chosen:
        parser.error("no case matches; `python -m perf list` shows all")
    if options.action == "list":
        for c in chosen:
            print(f"{c.group:<10} {c.name:<44} {c.op:<44} {c.call}  [{c.origin}]")
        return 0
    providers = tuple(p.strip() for p in options.providers.split(",") if p.strip())
    if options.prefer and options.prefer not in providers:
        providers += (options.prefer,)
    unknown = [p for p in providers if p not in PROVIDERS]
    if unknown or not providers:
        parser.error(f"no provider {', '.join(unknown)}; there are {', '.join(PROVIDERS)}")
    environment(options.commit)
    if options.action == "once":
        return _once(chosen, [p for p in providers if p != "eager"] or ["eager"], options)
    if options.action == "host":
        return _host(chosen, options)
    if options.quick and default_device().type == "cpu" and not (options.ops or options.group or options.dtype):
        chosen = sample(chosen)
        print(f"a sample of {len(chosen)} of {len(all_cases())} cases; name some, or leave --quick out, for others\n")
    return _run(chosen, providers, options, arguments)


def sample(cases: Sequence[Case], each: int = 3) -> list[Case]:
    """A few cases of each group, spread over it."""
    found = []
    for group in dict.fromkeys(c.group for c in cases):
        mine = [c for c in cases if c.group == group]
        found += [mine[i] for i in sorted({round(k * (len(mine) - 1) / max(each - 1, 1)) for k in range(each)})]
    return found


def _once(chosen: Sequence[Case], providers: Sequence[str], options: argparse.Namespace) -> int:
    """One call of each case, after one that compiles: what a profiler of kernels wants to see."""
    on_gpu = default_device().type != "cpu"
    tiny = options.scale == "tiny" or (options.scale == "auto" and not on_gpu)
    runner = Runner(Settings(tuple(providers), seconds=0.0, tiny=tiny, check=False))
    failed = 0
    for case in chosen:
        for provider in providers:
            try:
                decided = runner.once(case, provider)
                print(f"{case.name} by {provider}: {', '.join(decided) or 'done'}", flush=True)
            except Exception as error:
                failed += 1
                print(f"{case.name} by {provider}: {type(error).__name__}: {error}", file=sys.stderr)
    return int(failed > 0)


def _host(chosen: Sequence[Case], options: argparse.Namespace) -> int:
    device = default_device()
    text, rows = host.table(chosen, Stopwatch(device), options.scale == "tiny" or (options.scale == "auto" and device.type == "cpu"))
    print(text)
    if options.json:
        options.json.write_text(json.dumps({"environment": environment(options.commit), "host": rows}, indent=1))
    return int(any("error" in row for row in rows))


def _run(chosen: Sequence[Case], providers: tuple[str, ...], options: argparse.Namespace, arguments: list[str]) -> int:
    on_gpu = default_device().type != "cpu"
    settings = Settings(providers, seconds=0.02 if options.quick or not on_gpu else 0.1, case_limit=options.case_limit,
                        budget=options.budget,
                        tiny=options.scale == "tiny" or (options.scale == "auto" and not on_gpu), check=not options.quick,
                        growing=200 if options.quick else 1000, clean=options.clean)
    started = options.started or time.time()
    kept = Results(options.json, options.resume, options.commit, options.merge, started)
    runner = Runner(settings)
    for name, reason in runner.unavailable.items():
        print(f"provider {name} is not available: {reason}", file=sys.stderr)
    print(f"{results.heading(kept.environment, kept.peaks)}\n{len(chosen)} cases\n", flush=True)
    try:
        complete = run_all(chosen, runner, kept, lambda row: print(results.progress_line(row), flush=True), started)
    except DeviceLost:
        if options.json is None:
            with tempfile.NamedTemporaryFile(suffix=".json", delete=False) as file:
                kept.path = Path(file.name)
            kept.write()
            arguments += ["--json", str(kept.path)]
        print("the device takes no more calls: going on in a fresh process", file=sys.stderr, flush=True)
        again = [a for a in arguments if a != "--resume"]
        if options.started is None:
            again += ["--started", str(started)]
        os.execv(sys.executable, [sys.executable, "-m", "perf", *again, *([] if options.merge else ["--resume"])])
    result = kept.to_dict()
    ran = {c.name for c in chosen}
    rows = [r for r in kept.rows if r["case"] in ran]
    print("\n" + results.table(rows) + "\n\n" + results.heading(kept.environment, kept.peaks) + "\n" + results.closing(rows))
    _deliver(result, options)
    if not complete:
        print(f"\nthe budget of {options.budget:.0f} s ended the run after {len(rows)} of {len(chosen)} cases", file=sys.stderr)
        return 3
    return int(any(r["error"] or r["providers"].get("gemsmode", {}).get("error") for r in rows))


if __name__ == "__main__":
    sys.exit(main())
