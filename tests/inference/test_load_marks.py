"""That a load began is known after the process has ended in it."""

from pathlib import Path

import pytest

from mlx_manager.inference.load_marks import LoadMarks


def test_a_load_that_ends_leaves_nothing_however_it_ends(tmp_path: Path) -> None:
    marks = LoadMarks(tmp_path / "loading")
    with marks.marked("org/name:adapter"):
        assert LoadMarks(tmp_path / "loading").found == {"org/name:adapter"}, "what another would find if this ended now"
    with pytest.raises(ValueError, match="weights"), marks.marked("one"):
        raise ValueError("weights")
    assert LoadMarks(tmp_path / "loading").found == set()


def test_it_stays_known_until_a_load_of_the_same_model_has_ended(tmp_path: Path) -> None:
    (tmp_path / "left").write_text("one")
    (tmp_path / "empty").write_text("")
    assert LoadMarks(tmp_path).found == {"one"}
    assert LoadMarks(tmp_path).found == {"one"}, "a start alone changes nothing"


def test_a_mark_that_was_found_goes_with_the_next_load(tmp_path: Path) -> None:
    with LoadMarks(tmp_path).marked("one"):
        (mark,) = tmp_path.iterdir()
    mark.write_text("one")  # as if this had ended in between
    marks = LoadMarks(tmp_path)
    assert marks.found == {"one"}
    with marks.marked("one"):
        pass
    assert (marks.found, list(tmp_path.iterdir())) == (set(), [])


def test_without_a_folder_nothing_is_remembered() -> None:
    marks = LoadMarks(None)
    with marks.marked("one"):
        assert marks.found == set()


def test_a_folder_that_cannot_be_written_stops_no_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with LoadMarks(tmp_path / "file" / "loading").marked("one"):
        pass
    assert "could not be written down" in caplog.text
