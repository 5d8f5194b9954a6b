"""MoST: DeepSeek-V2 with a modality-aware router, its kernels, expert parallelism, and models read from and written to folders."""

# First, whichever module of this package is imported: an import of transformers' DeepSeek-V2 from another one would trigger the
# registration (see most_ray/registration.py) while that module is half imported.
import most_ray.model.modeling  # noqa: F401
