"""Recording what a mode did, and reporting it.

:class:`Recorder` is told of each call and keeps totals; :class:`Report` is what it has seen, as a table, text, JSON,
CSV, HTML, Markdown or a Chrome trace. Neither decides anything.
"""

from gemsmode.tracing.files import NotAReportError
from gemsmode.tracing.ranks import Gathered, gather, merge
from gemsmode.tracing.recorder import Recorder
from gemsmode.tracing.report import Change, Check, Coverage, Difference, Record, Report, Row

__all__ = ["Change", "Check", "Coverage", "Difference", "Gathered", "NotAReportError", "Record", "Recorder", "Report", "Row", "gather",
           "merge"]
