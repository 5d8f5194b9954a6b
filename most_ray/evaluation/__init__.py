"""Decoding and scoring: greedy and beam search, error rates with intervals, stored hypotheses; one process or many."""
