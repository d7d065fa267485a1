"""Sizes and times as people write them."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from mlx_manager.config import Config, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("32GB", 32_000_000_000),
        ("32gb", 32_000_000_000),
        ("1.5 GiB", 1_610_612_736),
        ("512M", 512_000_000),
        ("1000000", 1_000_000),
        ("80%", 0.8),
        ("100 %", 1.0),
    ],
)
def test_a_size_is_bytes_and_a_percentage_a_share(text: str, size: float) -> None:
    assert parse_size(text) == size
    assert isinstance(parse_size(text), float) == text.endswith("%")


@pytest.mark.parametrize("text", ["", "GB", "much", "0", "0GB", "0%", "101%", "-5", "1.2.3GB", "5 PB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size, as 32GB, 80% or a number of bytes"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5m", 300), ("90s", 90), ("1h30m", 5400), ("90", 90), ("0", 0), ("250ms", 0.25), ("1d", 86_400), ("-1", None), ("-1m", None)],
)
def test_a_time_is_seconds_and_a_negative_one_for_ever(text: str, seconds: float | None) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "5 minutes", "m", "-", "1m2"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time, as 5m, 90s, 0 or -1 for ever"):
        parse_duration(text)


def test_the_environment_is_read_like_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, text in {"MAX_MEMORY": "2GB", "KEEP_ALIVE": "-1", "PRELOAD": "one, two", "DATA_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"MLX_MANAGER_{name}", text)
    config = Config()
    assert (config.max_memory, config.keep_alive, config.preload) == (2_000_000_000, None, ("one", "two"))


@pytest.mark.parametrize(
    ("name", "text"),
    [("MAX_MEMORY", "much"), ("KEEP_ALIVE", "soon"), ("EVICTION", "fifo"), ("WHEN_FULL", "panic"), ("MEMORY_WAIT_S", "-1")],
)
def test_a_value_that_means_nothing_is_refused_by_its_name(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"MLX_MANAGER_{name}", text)
    with pytest.raises(ValidationError, match=name.lower()):
        Config()
