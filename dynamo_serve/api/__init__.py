"""The HTTP edge: parse, call the service, render."""
