"""What was altered, cut or swapped does not open."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
import copy
from dataclasses import replace
from itertools import product
import os
import pickle
from uuid import UUID, uuid4

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from serve_app.domain.errors import IntegrityError
from serve_app.keys.envelope import DataKey, ImageBinding, data_key_id_of, open_sealed, seal
from tests.serve_app.keys.key_files import BINDING


def fresh_key() -> DataKey:
    return DataKey(uuid4(), os.urandom(32), spent=False)


def test_the_frame_is_the_documented_one() -> None:
    """Open a frame by hand, from the documentation alone."""
    material, key_id = os.urandom(32), uuid4()
    key = DataKey(key_id, material, spent=False)
    sealed = seal(b"image", data_key=key, binding=BINDING)
    assert sealed[:21] == b"DERM\x01" + key_id.bytes
    nonce, ciphertext = sealed[21:33], sealed[33:]
    aad = b"DERM\x01\x00\x00\x00\x10" + BINDING.image_id.bytes + b"\x00\x00\x00\x09patient-1"
    aad += b"\x00\x00\x00\x0aimage/jpeg\x00\x00\x00\x10" + key_id.bytes
    assert AESGCM(material).decrypt(nonce, ciphertext, aad) == b"image"


def refused(sealed: bytes, key: DataKey, binding: ImageBinding = BINDING) -> bool:
    try:
        open_sealed(sealed, data_key=key, binding=binding)
    except IntegrityError:
        return True
    return False


def test_every_single_bit_flip_of_a_small_image_is_refused() -> None:
    key = fresh_key()
    sealed = bytearray(seal(os.urandom(256), data_key=key, binding=BINDING))
    opened = []
    for bit in range(len(sealed) * 8):
        sealed[bit // 8] ^= 1 << bit % 8
        if not refused(bytes(sealed), key):
            opened.append(bit)
        sealed[bit // 8] ^= 1 << bit % 8
    assert opened == []
    assert not refused(bytes(sealed), key)


def test_every_truncation_and_extension_is_refused() -> None:
    key = fresh_key()
    sealed = seal(os.urandom(64), data_key=key, binding=BINDING)
    assert all(refused(sealed[:length], key) for length in range(len(sealed)))
    with pytest.raises(IntegrityError, match="cut short"):
        data_key_id_of(sealed[:48])
    assert all(refused(sealed[start:], key) for start in range(1, len(sealed)))
    assert refused(sealed + b"\x00", key)
    for prefix in (b"MRED\x01", b"DERM\x00", b"DERM\x02"):  # another magic or version
        with pytest.raises(IntegrityError, match="version"):
            data_key_id_of(prefix + sealed[5:])


def test_every_swap_between_images_and_patients_is_refused() -> None:
    """Two patients with two images each: a sealed image opens with its own key and binding, and no other."""
    sealed, keys, bindings = [], [], []
    for patient, image in product(("patient-1", "patient-2"), (1, 2)):
        keys.append(fresh_key())
        bindings.append(ImageBinding(uuid4(), patient, "image/jpeg"))
        sealed.append(seal(b"image %d" % image, data_key=keys[-1], binding=bindings[-1]))
    opened = [
        (frame, key, binding)
        for frame, key, binding in product(range(4), repeat=3)
        if not refused(sealed[frame], keys[key], bindings[binding])
    ]
    assert opened == [(number, number, number) for number in range(4)]
    own = bindings[0]
    assert refused(sealed[0], keys[0], replace(own, patient_id="patient-2"))
    assert refused(sealed[0], keys[0], replace(own, content_type="image/png"))


def test_a_key_id_swapped_in_the_frame_is_refused() -> None:
    material = os.urandom(32)
    key, other = DataKey(uuid4(), material, spent=False), DataKey(uuid4(), material, spent=True)
    sealed = seal(b"image", data_key=key, binding=BINDING)
    assert refused(sealed[:5] + other.id.bytes + sealed[21:], other)
    with pytest.raises(IntegrityError, match="another data key"):
        open_sealed(sealed, data_key=other, binding=BINDING)


def test_a_data_key_and_its_copies_seal_once_and_a_spent_one_never() -> None:
    key = fresh_key()
    sealed = seal(b"image", data_key=key, binding=BINDING)
    for other in (key, copy.copy(key), DataKey(uuid4(), os.urandom(32), spent=True)):
        with pytest.raises(IntegrityError, match="seals no other"):
            seal(b"image", data_key=other, binding=BINDING)
    assert not refused(sealed, key)


def test_of_many_threads_one_seals() -> None:
    key, sealed = fresh_key(), []

    def try_to_seal(_: int) -> None:
        with suppress(IntegrityError):
            sealed.append(seal(b"image", data_key=key, binding=BINDING))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(try_to_seal, range(64)))
    assert len(sealed) == 1


def test_a_data_key_neither_shows_itself_nor_leaves_its_process() -> None:
    material = os.urandom(32)
    key = DataKey(UUID(int=7), material, spent=False)
    assert repr(key) == str(key) == f"DataKey({UUID(int=7)})"
    assert not any(getattr(key, name) == material for name in DataKey.__slots__)
    for duplicate in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError):
            duplicate(key)


@settings(deadline=None, max_examples=80)
@given(sealed=st.binary(max_size=200) | st.binary(max_size=200).map(b"DERM\x01".__add__))
def test_noise_only_ever_raises_our_error(sealed: bytes) -> None:
    key_id = UUID(bytes=sealed[5:21]) if len(sealed) >= 21 else uuid4()
    with pytest.raises(IntegrityError):
        open_sealed(sealed, data_key=DataKey(key_id, bytes(32), spent=True), binding=BINDING)


@settings(deadline=None, max_examples=30)
@given(
    image=st.binary(max_size=100),
    image_id=st.uuids(),
    patient=st.text(st.characters()),
    kind=st.text(max_size=20),
)
def test_any_binding_seals_and_opens(image: bytes, image_id: UUID, patient: str, kind: str) -> None:
    key, binding = fresh_key(), ImageBinding(image_id, patient, kind)
    sealed = seal(image, data_key=key, binding=binding)
    assert len(sealed) == len(image) + 49
    assert data_key_id_of(sealed) == key.id
    assert open_sealed(sealed, data_key=key, binding=binding) == image
    assert refused(sealed, key, ImageBinding(image_id, patient + " ", kind))
    # Neighbouring fields do not run into each other.
    assert refused(sealed, key, ImageBinding(image_id, patient + kind, "")) is bool(kind)
