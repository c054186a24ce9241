"""An engine that runs nothing itself: it forwards to NVIDIA Triton servers."""
