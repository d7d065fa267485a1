import stat
from pathlib import Path

import pytest

from mlx_manager.storage.key_file import read_or_make_key


def test_a_key_is_made_once_and_only_its_user_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "key"
    key = read_or_make_key(path)
    assert len(key) == 32
    assert read_or_make_key(path) == key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_holds_no_key_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="does not hold a key"):
        read_or_make_key(path)
    assert path.read_bytes() == b"short"
