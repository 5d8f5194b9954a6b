"""Reports: one self-contained HTML page about a run, about several runs side by side, or about a sweep."""

from most_ray.report.page import write_report

__all__ = ["write_report"]
