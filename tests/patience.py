"""How long tests wait for what has to happen: it bounds a hang, and nothing is measured by it."""

from __future__ import annotations

PATIENCE_S = 180.0  # importing some clients takes long on a busy machine
