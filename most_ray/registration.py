"""Registers MoST with transformers' auto classes at the moment when they are first imported.

`import most_ray` must be cheap, since data workers never load torch, and `AutoModelForCausalLM.from_pretrained("runs/digits/export")` must
work after it. transformers has no lazy registration for both: `AutoConfig.register` and `AutoModelForCausalLM.register` take classes, the
import of the auto classes alone loads torch, names in their lazy mappings are looked up below `transformers.models` only, and packages
cannot announce models by entry points. So the registration waits, by a post-import hook, until somebody else imports the auto classes.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import wrapt

_AUTO = "transformers.models.auto.modeling_auto"
# Modules that import the auto classes halfway through their own import, with the last name that each defines. MoST's classes derive from
# theirs, so they can be imported only when these modules, where something has imported them first, are complete.
_IMPORT_AUTO_HALFWAY = {
    "transformers.models.deepseek_v2.modeling_deepseek_v2": "DeepseekV2ForCausalLM",
    "transformers.modeling_layers": "GenericForTokenClassification",
}


def register_on_import() -> None:
    """Install the hooks; where the auto classes are imported already, register MoST now."""
    for name in (_AUTO, *_IMPORT_AUTO_HALFWAY):
        wrapt.register_post_import_hook(_register, name)


def _register(_module: Any) -> None:
    complete = all(hasattr(sys.modules.get(name), last) for name, last in _IMPORT_AUTO_HALFWAY.items() if name in sys.modules)
    if complete and _AUTO in sys.modules:
        importlib.import_module("most_ray.model.modeling")  # which registers its classes
