"""Reports: one self-contained HTML page about a run, about several runs side by side, or about a sweep.

Functions here read folders and give plain data; templates/ turn it into HTML, static/ has style, scripts and plotly.js. A new figure is a
function in figures.py or sweep_figures.py, a new table one in run_tables.py or sweep_tables.py with its place in a template.
"""

from most_ray.report.page import REPORT, write_report

__all__ = ["REPORT", "write_report"]
