"""The dry run: memory, time, traffic and checkpoint size of a run on any layout, estimated before anything starts."""
