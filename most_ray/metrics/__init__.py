"""What is measured: the schema of metrics.jsonl, its lines as rows of scalars, and the operations that a model needs."""
