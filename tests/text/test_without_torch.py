"""transformers without torch, in processes of their own: what is imported stays."""

from __future__ import annotations

import subprocess
import sys

import pytest

TOKENIZE = """
import os
from dynamo_serve.text.without_torch import leave_torch_out
leave_torch_out()
from dynamo_serve import bundled
from dynamo_serve.text.tokenizer import Tokenizer
tokenizer = Tokenizer.load(str(bundled.path()))
assert tokenizer.decode(tokenizer.encode("some text")) == "some text"
"""


@pytest.mark.parametrize(
    "then",
    [
        "import sys; assert 'torch' not in sys.modules",
        "import torch; assert torch.ones(2).sum() == 2",
        "assert 'TRANSFORMERS_NO_ADVISORY_WARNINGS' not in os.environ",
    ],
)
def test_a_text_is_tokenized_without_torch_which_can_still_be_had(then: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TOKENIZE + then], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_transformers_that_are_there_keep_their_torch() -> None:
    before = "import transformers, transformers.utils as utils; assert utils.is_torch_available()\n"
    after = "import sys; assert 'torch' not in sys.modules or sys.modules['torch'] is not None"
    subprocess.run([sys.executable, "-c", before + TOKENIZE + after], check=True)
