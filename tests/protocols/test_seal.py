"""What goes out under our seal comes back as it was, or not at all."""

from hypothesis import given
from hypothesis import strategies as st

from mlx_manager.protocols.seal import Seal

SEAL = Seal(lambda: bytes(32))
OTHER = Seal(lambda: bytes([1]) * 32)
text = st.text(st.characters(exclude_categories=["Cs"]))


@given(text)
def test_what_was_sealed_opens_with_the_same_key_only(said: str) -> None:
    sealed = SEAL.seal(said)
    assert SEAL.open(sealed) == said
    assert OTHER.open(sealed) is None
    assert SEAL.is_ours(sealed)


@given(text, text)
def test_a_signature_belongs_to_its_text_and_its_key(said: str, other: str) -> None:
    signature = SEAL.sign(said)
    assert SEAL.verifies(signature, said)
    assert SEAL.verifies(signature, other) == (said == other)
    assert not OTHER.verifies(signature, said)


@given(st.text(), st.text())
def test_anything_else_is_not_ours(anything: str, said: str) -> None:
    assert SEAL.open(anything) is None
    assert SEAL.open(f"mlxm1.{anything}") is None
    assert not SEAL.verifies(anything, said.encode("utf-8", "replace").decode())
