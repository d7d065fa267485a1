"""Reasoning that goes out to a client and has to come back unchanged: signed, so that we know our own; or sealed, so that only we can
read it. A signature proves nothing to anybody else."""

import base64
import hashlib
import hmac
from collections.abc import Callable
from functools import cached_property

from joserfc import jwe
from joserfc.errors import JoseError
from joserfc.jwk import OctKey

_PREFIX = "mlxm1."
_HEADER = {"alg": "dir", "enc": "A256GCM"}


class Seal:
    """`key` gives 32 bytes that are used for nothing else; it is asked once, at the first use or by `prepare`."""

    def __init__(self, key: Callable[[], bytes]) -> None:
        self._key = key

    def prepare(self) -> None:
        """Asks for the key. Raises what that raises."""
        _ = self._signing, self._sealing

    @cached_property
    def _signing(self) -> bytes:
        return hmac.digest(self._key(), b"reasoning signature", hashlib.sha256)

    @cached_property
    def _sealing(self) -> OctKey:
        return OctKey.import_key(hmac.digest(self._key(), b"reasoning sealed", hashlib.sha256))

    def sign(self, text: str) -> str:
        digest = hmac.digest(self._signing, text.encode(), hashlib.sha256)
        return _PREFIX + base64.urlsafe_b64encode(digest).decode().rstrip("=")

    def seal(self, text: str) -> str:
        """The text itself, for nobody else to read."""
        return _PREFIX + jwe.encrypt_compact(_HEADER, text.encode(), self._sealing)

    def is_ours(self, signature: str) -> bool:
        """Whether it looks like one of ours, valid or not."""
        return signature.startswith(_PREFIX)

    def verifies(self, signature: str, text: str) -> bool:
        return hmac.compare_digest(signature.encode(errors="replace"), self.sign(text).encode())

    def open(self, sealed: str) -> str | None:
        """The text that we sealed; None if it is not ours or was changed."""
        if not sealed.startswith(_PREFIX):
            return None
        try:
            plaintext = jwe.decrypt_compact(sealed.removeprefix(_PREFIX), self._sealing).plaintext
        except (JoseError, ValueError):
            return None
        return None if plaintext is None else plaintext.decode()
