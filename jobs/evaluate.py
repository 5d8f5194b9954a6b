"""`most-ray evaluate` as a job on a cluster:

    ray job submit --working-dir . -- python jobs/evaluate.py --model DIR --asr_dirs DIR --output FILE.json --num_workers 4

Flags are those of `most-ray evaluate`. DIR must be on storage that all nodes mount.
"""

from __future__ import annotations

import sys

from most_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
