"""Scheduling and page bookkeeping, on the standard library alone."""
