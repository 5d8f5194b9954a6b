"""From recordings to units and back, without the language model."""
