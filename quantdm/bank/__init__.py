"""Layers quantized ahead of their use: every option of every layer in files, built side by side in processes."""
