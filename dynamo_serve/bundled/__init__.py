"""The small model that ships with the package, so that the first chat needs no download."""

from pathlib import Path

NAME = "dserve-tiny"


def path() -> Path:
    """The folder with the model, as transformers' ``from_pretrained`` takes it."""
    return Path(__file__).resolve().parent
