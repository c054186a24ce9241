import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import ByT5Tokenizer

from dynamo_serve.errors import InvalidRequest
from dynamo_serve.text.tokenizer import Tokenizer
from tests.text.tiny import byte_level, sentencepiece_like

TOKENIZER = Tokenizer(byte_level())
TEXT = "naïve 你好 😀 the end"


def saved(folder: Path, generation: dict[str, object] | None = None) -> Tokenizer:
    byte_level().save_pretrained(folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return Tokenizer.load(str(folder))


def test_text_survives_the_way_there_and_back() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(TEXT)) == TEXT


def test_special_tokens_around_a_text_are_added_on_request() -> None:
    plain = TOKENIZER.encode("hello")
    assert TOKENIZER.encode("hello", add_special_tokens=True) == [1, *plain]


@pytest.mark.parametrize(("eos", "expected"), [(0, {0, 2}), ([0, 1], {0, 1, 2}), (None, {2})])
def test_eos_ids_come_from_the_generation_config_and_the_tokenizer(
    tmp_path: Path, eos: object, expected: set[int]
) -> None:
    assert saved(tmp_path, {"eos_token_id": eos}).eos_ids == expected


def test_a_folder_without_generation_config_will_do(tmp_path: Path) -> None:
    tokenizer = saved(tmp_path)
    assert tokenizer.eos_ids == {2}
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.vocab_size == TOKENIZER.vocab_size


def test_a_folder_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        Tokenizer.load(str(tmp_path))


def test_a_truncating_tokenizer_file_does_not_truncate() -> None:
    wrapped = byte_level()
    wrapped.backend_tokenizer.enable_truncation(4)
    assert Tokenizer(wrapped).decode(Tokenizer(wrapped).encode(TEXT)) == TEXT


def test_threads_share_a_tokenizer() -> None:
    texts = [f"{TEXT} {i} " * (i % 7 + 1) for i in range(400)]
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(TOKENIZER.encode, texts))
        assert list(pool.map(TOKENIZER.decode, ids)) == texts


@pytest.mark.parametrize("text", [TEXT, "a\x00\x7f\xad", "  two spaces"])
def test_the_bytes_of_tokens_add_up_to_the_text(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert b"".join(map(TOKENIZER.token_bytes, ids)) == text.encode()


def test_the_bytes_of_pieces_keep_their_leading_space() -> None:
    tokenizer = Tokenizer(sentencepiece_like())
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("he é")] == [
        *(b" ", b"he", b" ", b"\xc3", b"\xa9"),
    ]


def test_a_token_that_is_no_whole_character_shows_its_bytes() -> None:
    first = TOKENIZER.encode("ü")[0]
    assert TOKENIZER.token_text(first) == "bytes:\\xc3"
    assert TOKENIZER.token_text(2) == "<|im_end|>"
    assert TOKENIZER.token_bytes(10**6) == b""


def test_the_chat_template_renders_messages_tools_and_arguments() -> None:
    text = TOKENIZER.render_chat(
        [{"role": "user", "content": "hi"}],
        tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        template_arguments={"opening": "Well, "},
    )
    head = "<|im_start|>user\nhi<|im_end|>\n"
    assert text.startswith(head + "[")
    assert '"name": "f"' in text
    assert text.endswith("<|im_start|>assistant\nWell, ")


def test_a_template_that_refuses_is_the_clients_fault() -> None:
    with pytest.raises(InvalidRequest, match="no such talk"):
        TOKENIZER.render_chat([{"role": "user", "content": "refuse me"}])


def test_a_model_without_template_says_so() -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        Tokenizer(byte_level(template=None)).render_chat([{"role": "user", "content": "hi"}])


def test_a_tokenizer_written_in_python_works_too() -> None:
    tokenizer = Tokenizer(ByT5Tokenizer())
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode([*ids, 10**6]) == TEXT
    assert tokenizer.encode("a", add_special_tokens=True)[-1] in tokenizer.eos_ids
    assert tokenizer.token_bytes(10**6) == b""
