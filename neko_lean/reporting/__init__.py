"""The report: one HTML file that shows what unlearning runs forgot, preserved and leaked."""

from neko_lean.reporting.page import TITLE, report

__all__ = ["TITLE", "report"]
