"""Engines map jobs over workers."""
