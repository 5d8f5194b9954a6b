"""most_ray: post-trains MoST, a speech-text language model, on one machine or a Ray cluster.

Importing this package is cheap and makes `AutoModelForCausalLM.from_pretrained` know MoST: the model classes are registered
at the moment transformers' auto classes are first imported, not before (so that data workers never load torch).
"""

import importlib
import sys
from typing import Any

import wrapt

__version__ = "0.1.0"


_AUTO, _PARENT = "transformers.models.auto.modeling_auto", "transformers.models.deepseek_v2.modeling_deepseek_v2"


@wrapt.when_imported(_AUTO)
@wrapt.when_imported(_PARENT)
def _register_most(_module: Any) -> None:
    # A cheap `import most_ray` is the point: torch loads only beside transformers' models. The module registers itself.
    # DeepSeek-V2's own module, where somebody imports it first, loads the auto classes on its way: MoST then waits until it is complete.
    complete = _PARENT not in sys.modules or hasattr(sys.modules[_PARENT], "DeepseekV2ForCausalLM")
    if complete and _AUTO in sys.modules and "most_ray.model.modeling" not in sys.modules:
        importlib.import_module("most_ray.model.modeling")
