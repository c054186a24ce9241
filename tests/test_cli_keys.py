"""hash-key: what it prints goes into the tenants file as it is, and a key is shown only if new."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from dynamo_serve import cli
from dynamo_serve.directory import digest
from dynamo_serve.tenants import read

KEY = "a-key-with-enough-characters"


def hash_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: str, *flags: str
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.stdin", io.StringIO(given))
    code = cli.main(["hash-key", *flags])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_key_becomes_its_line(
    end: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, out, err = hash_key(capsys, monkeypatch, KEY + end)
    assert (code, err) == (0, "")
    file = tmp_path / "tenants.yaml"
    file.write_text(f"tenants:\n  a:\n    keys:\n      {out}")
    assert list(read(file).callers) == [digest(KEY.encode())]


def test_a_new_key_is_shown_apart_from_its_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, err = hash_key(capsys, monkeypatch, "", "--new")
    (key,) = re.findall(r"dsk-\S{40,}", err)
    assert out == f'- "sha256:{digest(key.encode())}"\n'
    assert hash_key(capsys, monkeypatch, "", "--new")[1] != out


@pytest.mark.parametrize("given", ["", "short", "two words that are long enough", "a" * 30 + "\nb"])
def test_what_is_no_key_is_refused_and_not_repeated(
    given: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = hash_key(capsys, monkeypatch, given)
    assert (code, out) == (2, "")
    assert "--new makes a random one" in err
    assert not given or given not in err
