"""The echo model in another dialect: only what its config declares is different."""

import importlib.util
from pathlib import Path

ECHO = Path(__file__).parents[2] / "echo" / "1" / "model.py"

spec = importlib.util.spec_from_file_location("echo_model", ECHO)
echo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(echo)
TritonPythonModel = echo.TritonPythonModel
