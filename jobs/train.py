"""`most-ray train` as a job on a cluster:

    ray job submit --runtime-env jobs/runtime_env.yaml --working-dir . -- python jobs/train.py --config jobs/configs/digits.yaml

Flags are those of `most-ray train`; the same name resumes. A relative output_dir is below MOST_RAY_HOME of the cluster's machines
(default: the home folder there). With several machines it must be on storage that all of them mount. `most-ray submit train` does all this.
"""

from __future__ import annotations

import sys

from most_ray.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
