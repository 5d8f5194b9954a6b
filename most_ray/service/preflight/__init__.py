"""Checks of a cluster before a worker starts, also as `most-ray doctor`."""
