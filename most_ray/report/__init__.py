"""One self-contained page about one run or several side by side."""

from most_ray.report.page import write_report

__all__ = ["write_report"]
