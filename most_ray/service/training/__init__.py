"""A training run under Ray: attempts after failures, the trainer, and what runs in each worker."""
