"""`most-ray sweep` as a job on a cluster, where the trials share its GPUs or CPU cores:

    ray job submit --working-dir . -- python jobs/tune.py --config jobs/configs/sweep-digits.yaml --output_dir DIR

DIR must be on storage that all nodes mount. Flags are those of `most-ray sweep`; the same name resumes.
"""

from __future__ import annotations

import sys

from most_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
