"""Reports of several ranks: gathered over ``torch.distributed``, merged, and side by side."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gemsmode.tracing.report import Check, Record, Report

_SUMMED = frozenset({"calls", "host_s", "device_s", "device_calls", "captured"})
_MEASURED = frozenset({"rule_us", "native_us", "timed"})  # each rank measures for itself: the first one's are shown
_SAME = tuple(f.name for f in dataclasses.fields(Record) if f.name not in _SUMMED | _MEASURED)
_FORMATS = {".json": "to_json", ".csv": "to_csv", ".html": "to_html", ".md": "to_markdown"}


@dataclass(frozen=True)
class Gathered:
    """What :func:`gather` gives each rank.

    Attributes:
        ranks: the report of each rank.
        merged: all of them in one.
        rank: this process's.
    """

    ranks: tuple[Report, ...]
    merged: Report
    rank: int

    def print(self) -> None:
        """Print the merged report, on rank 0 alone."""
        if self.rank == 0:
            print(self.merged)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> list[Path]:
        """Write this rank's report, with the rank in its name, and on rank 0 the merged one too; what was written.

        Args:
            path: where the merged report goes, ``report.html``; this rank's is ``report.rank1.html``. The suffix says in
                which format: ``.json``, ``.csv``, ``.html`` or ``.md``.
            overwrite: also over files that are not reports.

        Raises:
            ValueError: another suffix.
            NotAReportError: a file that is not a report is there.
        """
        plain = Path(path)
        writer = _FORMATS.get(plain.suffix)
        if writer is None:
            raise ValueError(f"the suffix of {plain.name!r} says in which format to write: {', '.join(_FORMATS)}")
        reports = {with_rank(plain, self.rank): self.ranks[self.rank]}
        if self.rank == 0:
            reports[plain] = self.merged
        for place, report in reports.items():
            getattr(report, writer)(place, overwrite=overwrite)
        return list(reports)

    def __str__(self) -> str:
        lines = [str(self.merged), "", "Ranks"]
        for rank, report in enumerate(self.ranks):
            coverage = report.coverage
            lines.append(f"rank {rank}: {report.calls:,} calls, coverage {coverage.calls:.1%} of calls, {coverage.time:.1%} of time")
        return "\n".join(lines)


def merge(reports: Sequence[Report]) -> Report:
    """One report of several: calls and times are added up, and a note that not all share says whose it is.

    Args:
        reports: at least one; the environment is the first one's.

    Raises:
        ValueError: there is none.
    """
    if not reports:
        raise ValueError("nothing to merge: give at least one report")
    found: dict[Any, list[Record]] = {}
    for report in reports:
        for record in report.records:
            found.setdefault(tuple(getattr(record, name) for name in _SAME), []).append(record)
    records = []
    for same in found.values():
        timed = [r.device_s for r in same if r.device_s is not None]
        records.append(dataclasses.replace(
            same[0], calls=sum(r.calls for r in same), host_s=sum(r.host_s for r in same), device_s=sum(timed) if timed else None,
            device_calls=sum(r.device_calls for r in same), captured=sum(r.captured for r in same)))
    notes: dict[str, list[int]] = {}
    for rank, report in enumerate(reports):
        for note in report.notes:
            notes.setdefault(note, []).append(rank)
    texts = tuple(note if len(ranks) == len(reports) else f"rank {', '.join(map(str, ranks))}: {note}" for note, ranks in notes.items())
    environment = {**reports[0].environment, "ranks": len(reports)}
    checks: dict[tuple[str, str], list[Check]] = {}
    for report in reports:
        for check in report.checks:
            checks.setdefault((check.overload, check.rule), []).append(check)
    return Report(tuple(records), environment, texts, max(report.wall_s for report in reports),
                  checks=tuple(sorted(map(_worst, checks.values()), key=lambda c: (-c.allowed, c.overload, c.rule))))


def _worst(checks: Sequence[Check]) -> Check:
    """What several ranks found of one rule: the worst of it, and all its calls."""
    worst = max(checks, key=lambda c: c.allowed)
    return dataclasses.replace(
        worst, compared=sum(c.compared for c in checks), failed=sum(c.failed for c in checks), skipped=sum(c.skipped for c in checks),
        error_eps=max(c.error_eps for c in checks), error=max(c.error for c in checks), why=next((c.why for c in checks if c.why), ""),
        first=next((c.first for c in checks if c.first), ""))


def gather(report: Report, group: Any = None) -> Gathered:
    """Exchange reports between the ranks of ``group``; every rank must call it, and every rank gets all of them.

    Where ``torch.distributed`` is not in use there is one rank, this one.

    Args:
        report: this rank's.
        group: a process group; the default one if None.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Gathered((report,), merge([report]), 0)
    dictionaries: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(dictionaries, report.to_dict(), group)
    rank = dist.get_rank(group)
    # One's own keeps its timeline, which does not travel.
    reports = tuple(report if i == rank else Report.from_dict(d) for i, d in enumerate(dictionaries))
    return Gathered(reports, merge(reports), rank)


def launched_rank() -> int | None:
    """This process's rank where a launcher such as ``torchrun`` started several; else None."""
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        return None
    return rank if world > 1 else None


def ranked_path(path: str | os.PathLike[str]) -> Path:
    """``report.json`` as ``report.rank1.json`` where several ranks would write it."""
    rank, plain = launched_rank(), Path(path)
    return plain if rank is None else with_rank(plain, rank)


def with_rank(path: Path, rank: int) -> Path:
    """``report.rank1.json`` for ``report.json``."""
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
