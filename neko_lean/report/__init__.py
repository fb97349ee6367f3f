"""The report: one HTML page, sent around as one file, that shows what runs forgot, kept and gave away."""

from neko_lean.report.page import TITLE, report

__all__ = ["TITLE", "report"]
