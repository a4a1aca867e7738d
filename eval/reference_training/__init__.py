"""How the embedded reference pipelines are trained; started by eval/train_reference.py."""
