"""From records to batches: token stores, the exact mixture of sources, packing, and the plan of what each step trains on."""
