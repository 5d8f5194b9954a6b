"""AdamW with its moments in float32 or 8 bits, and everything of a training run that must survive a restart."""
