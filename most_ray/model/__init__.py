"""The model. Its classes come first: whichever module is asked for, transformers is loaded from one place and in one order."""

import most_ray.model.modeling  # noqa: F401
