"""The parts of export.py, in the order of its docstring."""
