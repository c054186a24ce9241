"""Settings of the test process that must be in place before torch is imported."""

import os

# Torch's threads spin at barriers by default and starve whatever else runs on a small machine.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ["HF_HUB_OFFLINE"] = "1"
