"""Checkpoints: written while training continues, read in any layout, kept or deleted, exported to Hugging Face layout."""
