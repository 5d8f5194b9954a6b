"""Benchmarks of the data engine. One core is the fair case: set before anything loads a library that counts cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
