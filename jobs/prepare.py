"""`most-ray prepare` as a job on a cluster, where the work is spread over its GPUs or CPU cores:

    ray job submit --working-dir . -- python jobs/prepare.py units --corpus librispeech --input DIR --output DIR --fit_kmeans 500

DIR must be on storage that all nodes mount. Flags are those of `most-ray prepare`.
"""

from __future__ import annotations

import sys

from most_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
