"""Text on both sides of the core: templates, tokens, detokenization, stop strings."""
