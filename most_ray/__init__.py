"""most_ray: post-trains MoST, a speech-text language model, on one machine or a Ray cluster.

Importing this package is cheap, and `AutoModelForCausalLM.from_pretrained` loads MoST after it (see `most_ray.registration`).
"""

import logging
import os
import sys

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
