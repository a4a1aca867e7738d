"""A run: its directory, bank, trials and stages, and the search."""
