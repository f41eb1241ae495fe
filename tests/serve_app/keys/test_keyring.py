"""Key-encryption keys: who may read them, and what they wrap."""

from __future__ import annotations

from base64 import b64encode
import json
import os
from pathlib import Path
from uuid import uuid4

import pytest

from serve_app.domain.errors import IntegrityError, KeyProviderUnavailable
from serve_app.keys.keyring import FileKeyring, WrappedKey

KEY = os.urandom(32)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def write_keyring(path: Path, content: bytes) -> None:
    path.parent.mkdir(mode=0o700)
    path.touch(mode=0o600)
    path.write_bytes(content)


def two_versions(current: int) -> bytes:
    keys = {str(version): b64encode(bytes([version]) * 32).decode() for version in (1, 2)}
    return json.dumps({"current": current, "keys": keys}).encode()


def test_the_first_start_makes_a_private_keyring_and_the_second_keeps_it(keys: Path) -> None:
    """Whatever the umask is, and a start that crashed half way has left."""
    path, key_id = keys / "keyring.json", uuid4()
    write_keyring(keys / "keyring.json.partial", b'{"current": 1, "ke')
    umask = os.umask(0)
    try:
        wrapped = FileKeyring.make(path).wrap(KEY, key_id)
    finally:
        os.umask(umask)
    assert (mode(keys), mode(path)) == (0o700, 0o600)
    assert [file.name for file in keys.iterdir()] == ["keyring.json"]
    assert FileKeyring.make(path).unwrap(wrapped, key_id) == KEY
    assert FileKeyring(path).unwrap(wrapped, key_id) == KEY


@pytest.mark.parametrize(
    ("name", "wider"), [("keyring.json", 0o604), ("keyring.json", 0o620), (".", 0o701), (".", 0o710)]
)
def test_a_keyring_or_folder_open_to_others_is_refused(keys, keyring, name: str, wider: int) -> None:
    (keys / name).chmod(wider)
    with pytest.raises(IntegrityError, match="chmod go-rwx"):
        FileKeyring(keys / "keyring.json")


def test_a_keyring_of_another_user_is_refused(keys, keyring, monkeypatch) -> None:
    if os.geteuid() == 0:
        os.chown(keys / "keyring.json", 65534, 65534)
    else:  # only root can give a file away; anyone can be somebody else than its owner
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(IntegrityError, match="chown"):
        FileKeyring(keys / "keyring.json")


_SOUND = b"c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3I="


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"null", b"{}", b'{"keys": {"1": "%s"}}' % _SOUND),
        *(b'{"current": %s, "keys": {"1": "%s"}}' % (current, _SOUND) for current in (b"2", b"null")),
        *(
            b'{"current": 1, "keys": {%s}}' % keys
            for keys in (
                b"",
                b'"one": "%s"' % _SOUND,
                b'"1": "c2VjcmV0LXNlY3JldC1zZQ=="',
                b'"1": "!%s"' % _SOUND,
                b'"1": 7',
            )
        ),
    ],
)
def test_a_damaged_keyring_is_refused_kept_and_not_quoted(keys: Path, content: bytes) -> None:
    write_keyring(keys / "keyring.json", content)
    with pytest.raises(IntegrityError, match="is not a keyring") as raised:
        FileKeyring(keys / "keyring.json")
    assert raised.value.__suppress_context__
    assert "c2Vj" not in str(raised.value)
    assert (keys / "keyring.json").read_bytes() == content


def test_a_keyring_that_is_away_is_a_provider_that_does_not_answer(keys: Path, keyring: FileKeyring) -> None:
    path, away, key_id = keys / "keyring.json", keys / "elsewhere", uuid4()
    wrapped = keyring.wrap(KEY, key_id)
    path.rename(away)
    for ask in (
        lambda: keyring.wrap(KEY, uuid4()),
        lambda: keyring.current_version,
        lambda: keyring.versions,
        lambda: keyring.unwrap(WrappedKey(wrapped.wrapped, 2), key_id),
        keyring.rotate,
    ):
        with pytest.raises(KeyProviderUnavailable, match="cannot be read") as raised:
            ask()
        assert (raised.value.status, raised.value.retry_after_s) == (503, 5)
    # What this process knows already opens what was sealed.
    assert keyring.unwrap(wrapped, key_id) == KEY
    with pytest.raises(KeyProviderUnavailable, match="FileNotFoundError"):
        FileKeyring(path)  # and none is made
    path.mkdir()  # no file to read, for root either
    with pytest.raises(KeyProviderUnavailable, match="IsADirectoryError"):
        keyring.wrap(KEY, uuid4())
    path.rmdir()
    away.rename(path)
    assert keyring.wrap(KEY, key_id).key_version == 1


def test_a_keyring_with_another_key_of_a_known_version_is_not_taken(keys: Path, tmp_path: Path) -> None:
    path = keys / "keyring.json"
    write_keyring(path, two_versions(current=1))
    keyring, key_id = FileKeyring(path), uuid4()
    wrapped, right = keyring.wrap(KEY, key_id), path.read_bytes()
    FileKeyring.make(tmp_path / "other" / "keyring.json")
    (tmp_path / "other" / "keyring.json").replace(path)
    for ask in (lambda: keyring.wrap(KEY, uuid4()), keyring.now, keyring.rotate, lambda: keyring.retire(2)):
        with pytest.raises(KeyProviderUnavailable, match="other keys than before"):
            ask()
    assert keyring.unwrap(wrapped, key_id) == KEY
    path.write_bytes(right)
    assert keyring.unwrap(keyring.wrap(KEY, key_id), key_id) == KEY
    assert keyring.versions == (1, 2)


def test_a_wrapped_key_altered_or_cut_is_refused(keyring: FileKeyring) -> None:
    key_id, made = uuid4(), keyring.wrap(KEY, uuid4())
    with pytest.raises(IntegrityError):
        keyring.unwrap(made, key_id)  # another's
    assert "wrapped=" not in repr(made)
    wrapped = keyring.wrap(KEY, key_id).wrapped
    assert KEY not in wrapped
    flipped = [
        (int.from_bytes(wrapped) ^ (1 << bit)).to_bytes(len(wrapped)) for bit in range(len(wrapped) * 8)
    ]
    for altered in (*flipped, *(wrapped[:length] for length in range(len(wrapped))), wrapped + b"\x00"):
        with pytest.raises(IntegrityError):
            keyring.unwrap(WrappedKey(altered, 1), key_id)


def test_the_version_is_bound_even_where_the_keys_are_alike(keys: Path) -> None:
    document = json.loads(two_versions(current=1))
    document["keys"]["2"] = document["keys"]["1"]
    write_keyring(keys / "keyring.json", json.dumps(document).encode())
    keyring, key_id = FileKeyring(keys / "keyring.json"), uuid4()
    wrapped = keyring.wrap(KEY, key_id).wrapped
    assert keyring.unwrap(WrappedKey(wrapped, 1), key_id) == KEY
    for claimed in (0, 2, 2**40):
        with pytest.raises(IntegrityError):
            keyring.unwrap(WrappedKey(wrapped, claimed), key_id)
