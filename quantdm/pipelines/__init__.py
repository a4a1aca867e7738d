"""What a pipeline is: load and check it, look at it once, generate, record."""
