"""One self-contained page about one run, several side by side, or a sweep."""

from most_ray.report.page import write_report

__all__ = ["write_report"]
