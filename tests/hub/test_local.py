import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_manager.config import Config
from mlx_manager.hub.local import find_models
from tests.hub.folders import BERT, LLAMA, write_model


def write_snapshot(cache: Path, repository: str, revision: str, *, mtime: int = 0) -> Path:
    """A download as the Hugging Face tools leave it: names that are links to blobs."""
    root = cache / f"models--{repository.replace('/', '--')}"
    real = write_model(root / "blobs" / revision)
    snapshot = root / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for file in real.iterdir():
        (snapshot / file.name).symlink_to(os.path.relpath(file, snapshot))
    os.utime(snapshot, (mtime, mtime))
    return snapshot


def point_main_at(snapshot: Path) -> None:
    refs = snapshot.parent.parent / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text(snapshot.name)


def test_each_subfolder_is_a_model_of_its_name(tmp_path: Path) -> None:
    write_model(tmp_path / "zebra")
    write_model(tmp_path / "ape", BERT)
    (tmp_path / "note.txt").touch()
    (tmp_path / ".git").mkdir()
    catalogue = find_models([tmp_path], None)
    assert [(model.id, model.kind, model.path) for model in catalogue.models] == [
        ("ape", "embedding", tmp_path / "ape"),
        ("zebra", "text", tmp_path / "zebra"),
    ]
    assert catalogue.unusable == ()


def test_a_bad_folder_is_listed_with_its_reason_and_hides_no_other(tmp_path: Path) -> None:
    write_model(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    write_model(tmp_path / "bad name")
    (write_model(tmp_path / "torn") / "model.safetensors").write_bytes(b"\x01")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    catalogue = find_models([tmp_path, tmp_path / "no such folder"], tmp_path / "no such cache")
    assert [model.id for model in catalogue.models] == ["good"]
    assert [(model.id, model.path, model.reason.split()[0]) for model in catalogue.unusable] == [
        ("bad name", tmp_path / "bad name", "its"),
        ("empty", tmp_path / "empty", "it"),
        ("torn", tmp_path / "torn", "model.safetensors:"),
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_listed(tmp_path: Path) -> None:
    write_model(tmp_path / "secret").chmod(0)
    try:
        (secret,) = find_models([tmp_path], None).unusable
    finally:
        (tmp_path / "secret").chmod(0o700)
    assert "Permission denied" in secret.reason


def test_the_first_folder_with_an_id_has_it(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_model(tmp_path / folder / "model")
    (tmp_path / "b" / "broken").mkdir()
    write_model(tmp_path / "a" / "broken")
    catalogue = find_models([tmp_path / "b", tmp_path / "a"], None)
    assert [model.path for model in catalogue.models] == [tmp_path / "b" / "model"]
    assert [model.path for model in catalogue.unusable] == [tmp_path / "b" / "broken"]


def test_a_link_of_the_operators_is_followed(tmp_path: Path) -> None:
    write_model(tmp_path / "elsewhere" / "weights")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "linked").symlink_to(tmp_path / "elsewhere" / "weights")
    (model,) = find_models([tmp_path / "models"], None).models
    assert model.id == "linked"


def test_the_cache_names_models_by_organisation(tmp_path: Path) -> None:
    snapshot = write_snapshot(tmp_path, "org/model-1.5", "aaa")
    write_snapshot(tmp_path, "gpt2", "bbb")
    (tmp_path / "datasets--org--data" / "snapshots" / "ccc").mkdir(parents=True)
    (tmp_path / "models--org--nothing" / "refs").mkdir(parents=True)
    catalogue = find_models([], tmp_path)
    assert [model.id for model in catalogue.models] == ["gpt2", "org/model-1.5"]
    assert catalogue.models[1].path == snapshot
    assert catalogue.unusable == ()


def test_the_cache_serves_what_main_points_at(tmp_path: Path) -> None:
    old, new = (write_snapshot(tmp_path, "org/model", revision, mtime=mtime) for revision, mtime in (("old", 1), ("new", 2)))
    assert [model.path for model in find_models([], tmp_path).models] == [new]
    point_main_at(old)
    assert [model.path for model in find_models([], tmp_path).models] == [old]


def test_an_unfinished_download_leaves_the_newest_complete_snapshot(tmp_path: Path) -> None:
    for revision, mtime in (("oldest", 1), ("older", 2)):
        write_snapshot(tmp_path, "org/model", revision, mtime=mtime)
    unfinished = write_snapshot(tmp_path, "org/model", "unfinished", mtime=3)
    point_main_at(unfinished)
    (unfinished / "model.safetensors").unlink()
    assert [model.path.name for model in find_models([], tmp_path).models] == ["older"]


def test_a_repository_without_a_complete_snapshot_is_unusable_for_mains_reason(tmp_path: Path) -> None:
    main = write_snapshot(tmp_path, "org/model", "main", mtime=1)
    (main / "model.safetensors").unlink()
    (write_snapshot(tmp_path, "org/model", "other", mtime=2) / "config.json").unlink()
    point_main_at(main)
    (model,) = find_models([], tmp_path).unusable
    assert (model.id, model.path, model.reason) == ("org/model", main, "it has no weights (model*.safetensors)")


@pytest.mark.parametrize(("variable", "below"), [("HF_HUB_CACHE", ""), ("HF_HOME", "hub")])
def test_the_cache_is_where_hugging_face_tools_have_it(tmp_path: Path, variable: str, below: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {variable: str(tmp_path)}
    code = "from mlx_manager.hub.local import hub_cache_folder; print(hub_cache_folder())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / below)


def test_looking_for_models_imports_no_mlx(tmp_path: Path) -> None:
    write_model(tmp_path / "model", LLAMA)
    code = (
        "import sys; from pathlib import Path; from mlx_manager.hub.local import find_models;"
        "assert find_models([Path(sys.argv[1])], None).models[0].kind == 'text';"
        "print([name for name in sys.modules if name.partition('.')[0] in ('mlx', 'mlx_lm')])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_models_of_lm_studio_lie_below_their_publishers(tmp_path: Path) -> None:
    write_model(tmp_path / "studio" / "someone" / "small")
    write_model(tmp_path / "models" / "mine")
    (tmp_path / "studio" / "gguf-people" / "big-GGUF").mkdir(parents=True)
    (tmp_path / "studio" / "gguf-people" / "big-GGUF" / "big.gguf").touch()
    (tmp_path / "studio" / "gguf-people" / "note.txt").touch()
    snapshot = write_snapshot(tmp_path / "cache", "someone/small", "abc")
    catalogue = find_models([tmp_path / "models"], tmp_path / "cache", publishers=tmp_path / "studio")
    assert [(model.id, model.path) for model in catalogue.models] == [
        ("mine", tmp_path / "models" / "mine"),
        ("someone/small", tmp_path / "studio" / "someone" / "small"),
    ]
    assert snapshot.is_dir()  # of the same name, and second to the other
    assert [(model.id, model.reason) for model in catalogue.unusable] == [
        ("gguf-people/big-GGUF", "its weights are GGUF files, which MLX does not run")
    ]
    assert catalogue.find("gguf-people/big-GGUF") is catalogue.unusable[0]


def test_lm_studios_folder_is_found_where_it_keeps_it_and_elsewhere_if_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MLX_MANAGER_LM_STUDIO_DIR", raising=False)
    assert Config().publishers is None
    for place in (tmp_path / ".cache" / "lm-studio" / "models", tmp_path / ".lmstudio" / "models"):
        place.mkdir(parents=True)
        assert Config().publishers == place
    assert Config(lm_studio_dir=tmp_path).publishers == tmp_path
