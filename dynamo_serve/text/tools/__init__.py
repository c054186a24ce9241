"""Calls of tools in what a model writes: one incremental parser, and a form for each family."""
