"""The command line: one sub-command per stage; parse, call, write."""
