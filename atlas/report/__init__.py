"""A study as pictures, tables and one self-contained HTML page."""

from atlas.report.fit import draw_fit
from atlas.report.html import write_report
from atlas.report.summary import StudySummary

__all__ = ["StudySummary", "draw_fit", "write_report"]
