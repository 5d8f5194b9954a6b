"""most_ray: post-trains MoST, a speech-text language model, on one machine or a Ray cluster.

Importing this package is cheap, and `AutoModelForCausalLM.from_pretrained` loads MoST after it (see `most_ray.registration`). Import it
before torch: what it sets in the environment for threads (`THREADS`) is read when torch is loaded.
"""

import logging
import os
import sys

# Read when torch is loaded, here and in the processes that this one starts; what the environment says already is kept. Threads that wait
# without spinning lose nothing on an idle machine, and on a busy one they make a step up to 30 times faster (tests/benchmarks/RESULTS.md).
THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
TORCH_CAME_FIRST = "torch" in sys.modules and "OMP_WAIT_POLICY" not in os.environ  # so that its threads spin
for _name, _value in THREADS.items():
    os.environ.setdefault(_name, _value)

try:
    from most_ray.registration import register_on_import  # a tenth of a second
except KeyboardInterrupt:
    if os.path.basename(sys.argv[0]) != "most-ray":
        raise
    sys.stderr.write("most-ray: interrupted\n")  # as `most_ray.cli.main` would, which is not loaded yet
    sys.exit(130)

__version__ = "0.1.0"

# transformers imports torchao where it is installed (most_ray[int8]): on a CPU it warns in every process that it cannot load its GPU
# kernels, and makes torch warn about enumerations.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "Enum subclass" not in record.msg)

register_on_import()
