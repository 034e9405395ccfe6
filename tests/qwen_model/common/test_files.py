"""Files of users: whatever they are and hold, one line says it."""

import json
import os
import subprocess
import sys

import pytest

from qwen_model import QwenModelError
from qwen_model.common import files
from qwen_model.common.files import is_file, is_folder, read_json_object, read_text


def test_the_mark_of_utf8_is_no_part_of_a_text(tmp_path):
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa4"}')
    assert read_text(tmp_path / "a") == '{"a": "ä"}'
    assert read_json_object(tmp_path / "a") == {"a": "ä"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{\0}\0", "is not UTF-8: invalid start byte at byte 0"),
        (b"[1]", "must hold a JSON object, not list"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON: a number has 5000 digits"),
        (b'{"a": ' * 100_000, "is nested deeper than 100 levels"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "is nested deeper than 100 levels"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' has two values"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS, not the file itself"),
    ],
)
def test_what_is_no_json_object(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(QwenModelError, match=message) as error:
        read_json_object(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_unusual_and_right(tmp_path):
    """A key twice with one value, the infinity that Python writes, transformers' length without a limit."""
    text = '{"a": 1, "a": 1, "b": Infinity, "model_max_length": 1000000000000000019884624838656, "c": [[[{}]]]}'
    (tmp_path / "a.json").write_text(text)
    assert read_json_object(tmp_path / "a.json") == json.loads(text)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text('{"a": 1}')
    for path, message in (
        (tmp_path / "gone", "cannot be read: No such file"),
        (tmp_path, "cannot be read: Is a directory"),
        (tmp_path / ("x" * 300), "cannot be read: File name too long"),
        (tmp_path / "a.json" / "b", "cannot be read: Not a directory"),
        (tmp_path / "zero\0byte", "cannot be read: embedded null byte"),
    ):
        with pytest.raises(QwenModelError, match=message) as error:
            read_text(path)
        assert len(str(error.value)) < 300
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 7)
    with pytest.raises(QwenModelError, match="is larger than"):
        read_text(tmp_path / "a.json")


def test_what_is_there(tmp_path):
    (tmp_path / "a").write_text("")
    assert (is_file(tmp_path / "a"), is_folder(tmp_path / "a")) == (True, False)
    assert (is_file(tmp_path), is_folder(tmp_path)) == (False, True)
    for path in (tmp_path / "b", tmp_path / "a" / "b"):
        assert (is_file(path), is_folder(path)) == (False, False)
    for test in (is_file, is_folder):
        with pytest.raises(QwenModelError, match="File name too long"):
            test(tmp_path / ("x" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_and_folders_of_others(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("")
    (tmp_path / "folder" / "a").chmod(0)
    with pytest.raises(QwenModelError, match="Permission denied"):
        read_text(tmp_path / "folder" / "a")
    (tmp_path / "folder").chmod(0)
    with pytest.raises(QwenModelError, match="Permission denied"):
        is_file(tmp_path / "folder" / "a")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_a_full_device_is_one_line(engine_dir):
    command = [sys.executable, "-m", "qwen_model.run", "--engine-dir", str(engine_dir), "--device", "cpu", "a"]
    with open("/dev/full", "wb") as full:
        run = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (run.returncode, run.stderr) == (1, "error: [Errno 28] No space left on device\n")
