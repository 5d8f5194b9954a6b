"""`python -m most_ray.cli`."""

import sys

from most_ray.cli import main

sys.exit(main())
