"""dynamo_serve: an LLM inference server for one box."""

__version__ = "0.1.0"
