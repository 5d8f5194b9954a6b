"""most_ray: post-trains MoST, a speech-text language model, on one machine or a Ray cluster.

Importing this package is cheap and makes `AutoModelForCausalLM.from_pretrained` know MoST: the model classes are registered
at the moment transformers' auto classes are first imported, not before (so that data workers never load torch).
"""

import importlib
import sys
from typing import Any

import wrapt

__version__ = "0.1.0"


@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _register_most(_module: Any) -> None:
    # A cheap `import most_ray` is the point: torch loads only beside transformers' models. The module registers itself.
    if "most_ray.model.modeling" not in sys.modules:
        importlib.import_module("most_ray.model.modeling")
