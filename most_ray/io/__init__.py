"""Files on paths and URIs with retries, copies on each node, JSON read past any damage, a run's folder and its growing files."""
