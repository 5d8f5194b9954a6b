"""What a run shows on the terminal: its first and last screen and the progress line."""
