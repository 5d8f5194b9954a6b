"""A sweep apart from Ray: its space and proposals, its ledger, what its trials are, and what each setting did."""
