"""A sweep under Ray Tune: proposals, early stopping, and each trial as a run in a process of its own."""
