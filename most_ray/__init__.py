"""most_ray: post-trains MoST, a speech-text language model, on one machine or a Ray cluster.

Importing this package is cheap and makes `AutoModelForCausalLM.from_pretrained` know MoST: the model classes are registered
at the moment transformers' auto classes are first imported, not before (so that data workers never load torch).
"""

import importlib
import logging
import sys
from typing import Any

import wrapt

__version__ = "0.1.0"

# transformers loads torchao where it is installed (most_ray[int8]), which tells every process of kernels that it cannot load on a CPU, and
# makes torch tell of enumerations.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "Enum subclass" not in record.msg)

_AUTO = "transformers.models.auto.modeling_auto"
# Modules that load the auto classes on their way, where somebody imports them first, and what they have once they are complete.
_COMPLETE = {
    "transformers.models.deepseek_v2.modeling_deepseek_v2": "DeepseekV2ForCausalLM",
    "transformers.modeling_layers": "GenericForTokenClassification",
}


def _register_most(_module: Any) -> None:
    # A cheap `import most_ray` is the point: torch loads only beside transformers' models. The module registers itself.
    complete = all(name not in sys.modules or hasattr(sys.modules[name], last) for name, last in _COMPLETE.items())
    if complete and _AUTO in sys.modules and "most_ray.model.modeling" not in sys.modules:
        importlib.import_module("most_ray.model.modeling")


for _name in (_AUTO, *_COMPLETE):
    wrapt.register_post_import_hook(_register_most, _name)
