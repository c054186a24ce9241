"""The configurations to edit: they are what Triton takes, and what is asked of them is there."""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from typing import Any

import httpx
import pytest
import yaml
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from dynamo_serve.engines.triton_server.dialects import triton_dialect
from dynamo_serve.engines.triton_server.tensors import Declared
from scripts import tritonserver
from scripts.tritonserver import MODELS, Running
from tests.engines.triton_server.conftest import skip_without_server
from tests.engines.triton_server.test_forward import TEXT, complete, forwarding, settings

FOLDER = MODELS / "deployments"
ASKED = {"vllm": "vllm", "llmapi": "llmapi", "tensorrt_llm_bls": "tensors"}  # and their dialects
EVERY = (*ASKED, "tensorrt_llm")


def config_of(name: str) -> Any:
    text = (FOLDER / name / "config.pbtxt").read_text()
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def test_every_folder_has_one() -> None:
    assert sorted(path.name for path in FOLDER.iterdir()) == sorted(EVERY)


@pytest.mark.parametrize("name", EVERY)
def test_each_is_decoupled_batched_and_explained(name: str) -> None:
    config = config_of(name)
    assert config.model_transaction_policy.decoupled
    assert config.HasField("dynamic_batching")
    batching = config.dynamic_batching
    assert all(0 < size <= config.max_batch_size for size in batching.preferred_batch_size)
    assert batching.default_queue_policy.max_queue_size > 0
    text = (FOLDER / name / "config.pbtxt").read_text()
    assert "Not run with" in text and "no GPU" in text
    for line in text.splitlines():  # of what is to be edited; inputs and outputs speak by name
        if re.match(r"\s+(preferred|max_queue|priority_levels|default_priority|timeout)", line):
            before = text.partition(line)[0].rstrip("\n").rpartition("\n")[2].strip()
            assert "#" in line or before.startswith("#"), f"not explained: {line}"


@pytest.mark.parametrize(("name", "dialect"), ASKED.items())
def test_each_speaks_a_dialect_and_has_priorities(name: str, dialect: str) -> None:
    declared = Declared.of(config_of(name))
    spoken = triton_dialect(declared, "auto", name)
    assert spoken.name == dialect
    assert declared.priority_levels == 3
    assert not {"temperature", "top_p", "seed", "presence_penalty"} & spoken.refused.keys()


def test_instances_are_spread_over_gpus() -> None:
    groups = config_of("vllm").instance_group
    assert [list(group.gpus) for group in groups] == [[0], [1]]
    for name in ("llmapi", "tensorrt_llm"):
        config = config_of(name)
        ids = config.parameters["gpu_device_ids"].string_value
        assert len(ids.split(";")) == sum(group.count for group in config.instance_group)
    bls = sum(group.count for group in config_of("tensorrt_llm_bls").instance_group)
    assert bls >= config_of("tensorrt_llm").max_batch_size


def test_what_lies_beside_agrees() -> None:
    assert json.loads((FOLDER / "vllm" / "1" / "model.json").read_text())["model"]
    beside = yaml.safe_load((FOLDER / "llmapi" / "1" / "model.yaml").read_text())["triton_config"]
    config = config_of("llmapi")
    assert beside["decoupled"] is config.model_transaction_policy.decoupled is True
    assert beside["max_batch_size"] == config.max_batch_size == 0


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Generator[Running]:
    """All of them in a real server, with the echo model for a backend and no GPU."""
    skip_without_server()
    folder = tmp_path_factory.mktemp("deployments")
    for name in EVERY:
        config = config_of(name)
        config.backend = "python"
        del config.instance_group[:]
        config.instance_group.add(count=1, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
        (folder / "models" / name / "1").mkdir(parents=True)
        (folder / "models" / name / "config.pbtxt").write_text(text_format.MessageToString(config))
        echo = (MODELS / "echo" / "1" / "model.py").read_text()
        (folder / "models" / name / "1" / "model.py").write_text(echo)
    with tritonserver.running(EVERY, folder / "log", models=folder / "models") as server:
        yield server


@pytest.fixture(scope="module", params=ASKED)
def client(
    request: pytest.FixtureRequest, loaded: Running, tmp_path_factory: pytest.TempPathFactory
) -> Generator[httpx.Client]:
    config = settings(loaded, model=request.param)
    with forwarding(tmp_path_factory.mktemp("model"), config) as client:
        yield client


def test_triton_takes_them_and_requests_pass_their_queues(client: httpx.Client) -> None:
    for priority in (0, 1, 100):
        answer = complete(client, priority=priority)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == TEXT
