"""Corpora as streams of utterances: published layouts, a user's own folder, and reading audio files."""
