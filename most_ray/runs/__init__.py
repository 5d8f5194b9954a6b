"""A run before it starts: its configuration resolved to data, model and layout, with every check that needs no worker."""
