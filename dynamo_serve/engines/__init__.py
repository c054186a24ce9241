"""Things that can run a model behind the step seam."""
