"""Configurations and trials that others published."""
