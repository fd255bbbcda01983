"""The modules of export.py. Its docstring lists them in reading order."""
