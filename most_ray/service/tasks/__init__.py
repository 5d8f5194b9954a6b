"""Work spread over Ray tasks and actors: batches, ingest, units and evaluations."""
