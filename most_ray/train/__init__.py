"""The training engine: a step, the loop, metrics and checkpoints, in one process or under torchrun, without Ray."""
