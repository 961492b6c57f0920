"""Recording what a mode did, and reporting it."""

from gemsmode.tracing.recorder import Recorder
from gemsmode.tracing.report import Report

__all__ = ["Recorder", "Report"]
