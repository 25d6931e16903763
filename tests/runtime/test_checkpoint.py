"""Test that checkpoints restore what was saved or fail, and the rules of run directories."""

import json
import os
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import call_step, make_config, refusal

from jaxgpt.config import Config, ModelConfig, UserError
from jaxgpt.data.tokenizer import ByteTokenizer, CharTokenizer, load
from jaxgpt.runtime import checkpoint, run_dir
from jaxgpt.runtime.checkpoint import Checkpoints
from jaxgpt.runtime.mesh import local_mesh, make_mesh
from jaxgpt.train_step import TrainState, abstract_state, init_state, make_train_step

ITEMS = ("params", "opt_state")


def train_some(config: Config, state: TrainState, steps: int) -> TrainState:
    """Take `steps` training steps on random tokens; `state` is donated."""
    step = make_train_step(config, make_mesh(config))
    shape = (1, 1, config.batch_size, config.block_size + 1)
    windows = np.random.default_rng(0).integers(0, config.vocab_size, shape, np.int32)
    for _ in range(steps):
        state, _ = call_step(step, state, jnp.asarray(windows))
    return state


def items_of(state: TrainState) -> dict:
    return {name: getattr(state, name) for name in ITEMS}


def wanted(config: Config) -> dict:
    """Return the shapes, dtypes and shardings to restore for a config on its mesh."""
    return items_of(abstract_state(config, make_mesh(config)))


@pytest.fixture(scope="module")
def config() -> Config:
    keys = {"n_layer": 1, "batch_size": 8, "gradient_accumulation_steps": 1, "warmup_iters": 0}
    return make_config(**keys, mesh="data:2")


@pytest.fixture(scope="module")
def trained(config) -> TrainState:
    """Return a training state on the host, after two steps so that moments are not zero."""
    return jax.device_get(train_some(config, init_state(config, make_mesh(config)), 2))


@pytest.fixture
def state(config, trained) -> TrainState:
    """Return the trained state on the mesh."""
    mesh = make_mesh(config)
    return jax.device_put(trained, jax.tree.map(lambda a: a.sharding, abstract_state(config, mesh)))


@pytest.fixture(scope="module")
def written(config, trained, tmp_path_factory) -> Path:
    """Return a folder with the trained state as step 3, for the tests to copy."""
    folder = tmp_path_factory.mktemp("written")
    save(Checkpoints(folder), 3, items_of(trained), best=True, config=config.to_dict())
    return folder


@pytest.fixture
def saved(written, tmp_path) -> Checkpoints:
    """Return a private copy of the checkpoints with the trained state as step 3."""
    shutil.copytree(written, tmp_path / "checkpoints", symlinks=True)
    return Checkpoints(tmp_path / "checkpoints")


def save(checkpoints: Checkpoints, step: int, items: dict, *, best: bool = False, **meta) -> None:
    """Save a step and wait until the step is on disk."""
    checkpoints.save(items, {"step": step} | meta, best=best)
    checkpoints.wait()


def assert_same(ours: dict, theirs: dict) -> None:
    """Assert that two trees have the same structure and bit-identical arrays."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


# ---- saving and restoring --------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data:2", "fsdp:4,tensor:2", "data:8", "tensor:2", "data:1"])
def test_checkpoint_restores_bit_exact_on_every_mesh(config, state, trained, tmp_path, mesh):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 2, items_of(state))
    abstract = wanted(config.replace(mesh=mesh))
    restored = checkpoints.restore(abstract, 2)
    assert_same(restored, items_of(trained))
    for array, like in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
        assert array.sharding == like.sharding


def test_training_from_a_restored_state_is_bit_exact(config, state, saved):
    restored = TrainState(**saved.restore(wanted(config), 3), step=state.step + 0)
    ours, theirs = train_some(config, restored, 2), train_some(config, state, 2)
    assert_same(items_of(ours), items_of(theirs))


def test_training_during_a_save_does_not_change_the_checkpoint(config, state, tmp_path):
    """The training step donates the state, so the memory of the state is soon overwritten."""
    checkpoints = Checkpoints(tmp_path)
    for step in 10, 20:
        before = jax.tree.map(np.array, items_of(state))
        checkpoints.save(items_of(state), {"step": step}, best=False)
        donated, state = state, train_some(config, state, 3)
        assert donated.params["embed"]["kernel"].is_deleted()
        checkpoints.wait()
        assert_same(checkpoints.restore(wanted(config), step), before)


def test_checkpoint_meta_round_trips_with_package_versions(config, tmp_path):
    checkpoints = Checkpoints(tmp_path)
    meta = {"config": config.to_dict(), "best_val_loss": None, "note": "é"}
    save(checkpoints, 7, small(), **meta)
    found = checkpoints.meta(7)
    assert found["versions"].pop("jax") == jax.__version__
    assert {key: found[key] for key in meta} == meta
    assert set(found) - set(meta) == {"step", "format_version", "versions", "best"}


# ---- which steps are kept --------------------------------------------------------------------
def small(value: float = 0.0) -> dict:
    return {"params": {"w": np.full(3, value, np.float32)}}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_newest_and_best_steps_are_kept_and_the_best_link_is_current(tmp_path, keep):
    checkpoints, steps, best = Checkpoints(tmp_path, keep), [], None
    assert (checkpoints.steps(), checkpoints.latest(), checkpoints.best()) == ([], None, None)
    for step, is_best in (1, False), (5, True), (9, False), (12, False), (100, True), (101, False):
        checkpoints.save(small(step), {"step": step}, best=is_best)
        assert checkpoints.newest == step
        checkpoints.wait()
        steps, best = [*steps, step], step if is_best else best
        kept = sorted({*steps[-keep:], *([best] if best else [])})
        for seen in checkpoints, Checkpoints(tmp_path, keep):
            assert seen.steps() == kept
            assert (seen.latest(), seen.best(), seen.newest) == (step, best, step)
        folders = {path.name for path in tmp_path.iterdir() if not path.is_symlink()}
        assert folders == set(map(str, kept))
        if best:
            assert json.loads((tmp_path / "best" / "meta.json").read_text())["step"] == best
    for step in kept:
        assert_same(checkpoints.restore(small(), step), small(step))


def test_step_saved_again_is_replaced(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for value in 1.0, 2.0:
        save(checkpoints, 4, small(value), best=True, value=value)
    assert (checkpoints.steps(), checkpoints.best()) == ([4], 4)
    assert checkpoints.meta(4)["value"] == 2
    assert_same(checkpoints.restore(small(), 4), small(2.0))


def test_step_without_digest_is_ignored_and_deleted_at_the_next_save(saved):
    shutil.copytree(saved.folder / "3", saved.folder / "8")
    (saved.folder / "8" / "digest.json").unlink()
    (saved.folder / "9").mkdir()
    again = Checkpoints(saved.folder)
    assert (again.steps(), again.latest(), again.newest) == ([3], 3, 3)
    save(again, 10, small())
    assert {path.name for path in saved.folder.iterdir()} == {"3", "10", "best"}


def test_best_link_to_a_missing_step_is_ignored(saved):
    shutil.rmtree(saved.folder / "3")
    assert (saved.best(), saved.latest()) == (None, None)


def test_files_that_are_not_steps_are_kept(saved):
    shutil.copytree(saved.folder / "3", saved.folder / "3.backup")
    shutil.copytree(saved.folder / "3", saved.folder / "old")
    (saved.folder / "notes.txt").touch()
    again = Checkpoints(saved.folder, keep=1)
    assert again.steps() == [3]
    save(again, 10, small(), best=True)
    left = {path.name for path in saved.folder.iterdir()}
    assert left == {"3.backup", "old", "notes.txt", "10", "best"}


def test_copy_with_a_folder_instead_of_the_best_link_works(saved, tmp_path):
    """Some archives and object stores make such copies."""
    shutil.copytree(saved.folder, tmp_path / "copy", symlinks=False)
    copy = Checkpoints(tmp_path / "copy")
    assert not (copy.folder / "best").is_symlink()
    assert (copy.steps(), copy.best()) == ([3], 3)
    save(copy, 10, small(), best=True)
    assert copy.best() == 10


# ---- damage ----------------------------------------------------------------------------------
def files_of(checkpoints: Checkpoints, step: int = 3) -> list[Path]:
    return sorted(p for p in (checkpoints.folder / str(step)).rglob("*") if p.is_file())


def test_damage_to_any_checkpoint_file_is_rejected_with_the_file_name(config, saved):
    """The damages are a flipped bit, a missing last byte and a missing file."""
    abstract, files = wanted(config), files_of(saved)
    assert {"digest.json", "meta.json", "manifest.ocdbt"} <= {file.name for file in files}
    for file in files:
        data = file.read_bytes()
        for place in {0, len(data) // 2, len(data) - 1} if data else ():
            file.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
            message = refusal(saved.restore, abstract, 3)
            if file.name != "digest.json":  # a wrong number in the digest blames another file
                assert message.startswith(f"{file}: ")
        if data:
            file.write_bytes(data[:-1])
            assert refusal(saved.restore, abstract, 3).startswith(f"{file}: ")
        file.unlink()
        assert refusal(saved.restore, abstract, 3).startswith(f"{file}: ")
        file.write_bytes(data)
    saved.restore(abstract, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["meta.json", "digest.json"])
def test_flipped_bits_in_json_files_never_change_the_metadata(saved, name):
    """Each flip gives the original metadata or a `UserError`."""
    file = saved.folder / "3" / name
    data, meta = file.read_bytes(), saved.meta(3)
    for place in range(0, len(data), 5):
        for bit in range(8):
            file.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            try:
                found = saved.meta(3)
            except UserError:
                continue
            assert found == meta
            assert name == "digest.json"  # its entries for other files do not affect the metadata


def test_missing_step_is_rejected(config, saved):
    for message in refusal(saved.restore, wanted(config), 4), refusal(saved.meta, 4):
        assert str(saved.folder / "4") in message


def test_newer_checkpoint_format_is_rejected(config, run):
    saved = run_dir.open_checkpoints(run)
    file, digest = saved.folder / "3/meta.json", saved.folder / "3/digest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 2}))
    sums = json.loads(digest.read_text()) | {"meta.json": checkpoint.checksum(file)}
    digest.write_text(json.dumps(sums))
    messages = [refusal(saved.meta, 3), refusal(saved.restore, wanted(config), 3)]
    messages += [refusal(run_dir.load_params, run, "best", local_mesh())]
    said = f"{file}: has format 2; expected at most 1; try a newer version of jaxgpt"
    assert messages == 3 * [said]


def test_invalid_meta_json_is_rejected_with_the_file_name(saved):
    file, version = saved.folder / "3" / "meta.json", '{"format_version": '
    for text in "", "{", "[]", "null", "3", "{}", version + "null}", version + "[]}":
        file.write_text(text)
        assert refusal(saved.meta, 3).startswith(f"{file}: not the meta of a checkpoint"), text


OTHER_SHAPES = [
    {"n_embd": 32}, {"n_layer": 2}, {"n_layer": 0}, {"block_size": 16}, {"block_size": 4},
    {"vocab_size": 300}, {"position": "none"}, {"bias": False}, {"tie_embeddings": False},
    {"scan_layers": True},
]  # fmt: skip


@pytest.mark.parametrize("other", OTHER_SHAPES, ids=str)
def test_checkpoint_arrays_of_another_shape_are_rejected(config, saved, other):
    message = refusal(saved.restore, wanted(config.replace(**other)), 3)
    assert message.startswith(f"{saved.folder / '3'}: the shape of params.")


# ---- background writer -----------------------------------------------------------------------
class Broken(Exception):
    pass


@pytest.mark.parametrize("name", ["atomic_write", "make_digest"])
@pytest.mark.parametrize("asks", ["save", "wait"])
def test_background_save_error_is_raised_once_at_the_next_call(tmp_path, monkeypatch, name, asks):
    checkpoints = Checkpoints(tmp_path)
    launch = lambda step: checkpoints.save(small(step), {"step": step}, best=True)
    with monkeypatch.context() as broken_disk:
        broken_disk.setattr(checkpoint, name, Mock(side_effect=Broken("no space left")))
        launch(1)
        with pytest.raises(Broken, match="no space left"):
            checkpoints.wait() if asks == "wait" else launch(2)
    assert checkpoints.best() is None
    checkpoints.wait()  # the error is raised once
    save(checkpoints, 3, small(3), best=True)
    assert (checkpoints.latest(), checkpoints.best()) == (3, 3)
    assert_same(checkpoints.restore(small(), 3), small(3))


def test_old_step_that_cannot_be_deleted_does_not_harm_the_new_one(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 1, small(1), best=False)
    unlink = Path.unlink

    def protect_step_1(path: Path, **options) -> None:
        if path.parent.name == "1":
            raise PermissionError(13, "Permission denied")
        unlink(path, **options)

    with monkeypatch.context() as protected:
        protected.setattr(Path, "unlink", protect_step_1)
        save(checkpoints, 2, small(2), best=True)
    assert (checkpoints.steps(), checkpoints.best()) == ([1, 2], 2)
    assert_same(checkpoints.restore(small(), 2), small(2))
    save(checkpoints, 3, small(3), best=True)
    assert checkpoints.steps() == [3]


def test_best_step_is_known_on_a_file_system_without_links(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "symlink_to", Mock(side_effect=PermissionError(1, "no links")))
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step, best in (1, True), (2, False), (3, True), (4, False):
        save(checkpoints, step, small(step), best=best)
    assert (checkpoints.steps(), checkpoints.best()) == ([3, 4], 3)


def test_step_is_visible_to_readers_only_after_the_complete_write(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1, small(1.0), best=True)
    digest, arrived, go = checkpoint.make_digest, threading.Event(), threading.Event()

    def slow(step):
        arrived.set()
        assert go.wait(60)
        return digest(step)

    monkeypatch.setattr(checkpoint, "make_digest", slow)
    checkpoints.save(small(2.0), {"step": 2}, best=True)
    assert arrived.wait(60)
    other = Checkpoints(tmp_path)  # as after a crash at this moment
    assert (other.steps(), other.best(), other.newest) == ([1], 1, 1)
    assert checkpoints.newest == 2
    go.set()
    checkpoints.wait()
    assert (checkpoints.steps(), checkpoints.best()) == ([1, 2], 2)


# ---- the run directory -----------------------------------------------------------------------
@pytest.fixture
def run(config, written, tmp_path) -> Config:
    """Return the config of a run whose directory holds a checkpoint of step 3."""
    shutil.copytree(written, tmp_path / "run" / "checkpoints", symlinks=True)
    return config.replace(out_dir=str(tmp_path / "run"))


def create(config: Config, tokenizer=None, fresh: bool = True) -> None:
    run_dir.create(config, SimpleNamespace(tokenizer=tokenizer), fresh=fresh)


def first_step(config: Config) -> int:
    return run_dir.resume_step(config, run_dir.open_checkpoints(config))


def test_run_without_checkpoint_starts_at_step_0_and_resume_is_rejected(config, tmp_path):
    for folder in map(str, (tmp_path, tmp_path / "new" / "folder")):
        for init_from in "scratch", "auto":
            assert first_step(config.replace(init_from=init_from, out_dir=folder)) == 0
        message = refusal(first_step, config.replace(init_from="resume", out_dir=folder))
        said = f"init_from='resume': no checkpoint in {folder}; try --init_from=auto"
        assert message == said


def test_scratch_rejects_a_used_directory_and_names_resume_and_overwrite(run):
    message = refusal(first_step, run)
    for part in (
        f"out_dir={run.out_dir!r}",
        "3 steps",
        "--init_from=resume",
        "--overwrite to delete",
    ):
        assert part in message
    assert first_step(run.replace(overwrite=True)) == 0


def test_run_resumes_from_the_newest_checkpoint_with_changed_training_keys(run):
    other = {"dropout": 0.1, "learning_rate": 1e-4, "batch_size": 16, "max_iters": 9, "mesh": ""}
    for init_from in "resume", "auto":
        for keys in {}, {"overwrite": True}, other:
            assert first_step(run.replace(init_from=init_from, **keys)) == 3


OTHER = {
    "vocab_size": 32, "block_size": 16, "n_layer": 2, "n_head": 4, "n_kv_head": 1, "n_embd": 32,
    "mlp_dim": 8, "bias": False, "norm": "rmsnorm", "norm_position": "post", "norm_gain": False,
    "position": "rope",
    "mlp": "swiglu", "tie_embeddings": False, "qk_norm": True, "logit_softcap": 30.0,
    "sliding_window": 4, "causal": False, "value_residual": True, "attention_dropout": False,
    "zero_init_projections": True, "document_mask": True, "eot_id": 5, "scan_layers": True,
    "optimizer": "muon",
}  # fmt: skip


def test_other_values_cover_every_model_key():
    assert OTHER.keys() == (set(vars(ModelConfig())) | {"scan_layers", "optimizer"}) - {"dropout"}


@pytest.mark.parametrize("key", OTHER)
def test_resuming_with_a_changed_model_key_is_rejected(run, key):
    message = refusal(first_step, run.replace(init_from="resume", **{key: OTHER[key]}))
    before = getattr(run, key)
    assert message == (
        f"{key}={OTHER[key]!r}: differs from the run in {run.out_dir}; "
        f"expected {before!r}; try --{key}={before}"
    )


def test_out_dir_that_is_a_file_is_rejected(config, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for folder, problem in (file, "is a file"), (file / "run", "not a directory"):
        said = f"{problem}; expected a writable folder; try another out_dir"
        for write in run_dir._lock, lambda out_dir: create(config.replace(out_dir=out_dir)):
            assert refusal(write, str(folder)) == f"out_dir={str(folder)!r}: {said}"
    assert file.read_text() == "mine"


def fill(folder: Path) -> set[str]:
    """Write files of a run and files of a user into a folder; return the user's file names."""
    for name in "metrics.jsonl", "loss.png", "log.txt", "tokenizer.json", "tensorboard/events.1":
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("old")
    theirs = {"notes.md", "plots/loss.png", "config.yaml", "checkpoints.txt", "tensorboard.png"}
    for name in theirs:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    return theirs


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def test_fresh_run_deletes_old_run_files_and_keeps_user_files(run):
    folder = Path(run.out_dir)
    theirs = fill(folder)
    (folder / "config.json").write_text(json.dumps(run.to_dict()))
    create(run)
    assert tree(folder) == theirs | {"config.json"}
    assert all((folder / name).read_text() == "mine" for name in theirs)
    assert run_dir.open_checkpoints(run).latest() is None


def test_overwriting_that_is_killed_leaves_no_step_with_the_new_config(run, monkeypatch):
    before = json.dumps(run.to_dict())
    Path(run.out_dir, "config.json").write_text(before)
    with monkeypatch.context() as patched:
        patched.setattr(run_dir, "atomic_write", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            create(run.replace(learning_rate=0.5))
    assert Path(run.out_dir, "config.json").read_text() == before
    assert run_dir.open_checkpoints(run).latest() is None
    create(run)
    assert not list(Path(run.out_dir).glob("checkpoints*"))


@pytest.mark.parametrize("config_json", [None, "{}", "3", '{"compilerOptions": {}}', "not JSON"])
def test_fresh_run_in_a_foreign_folder_is_rejected_and_deletes_nothing(run, config_json):
    """A user may set out_dir to a project folder by mistake."""
    folder = Path(run.out_dir)
    folder.mkdir(exist_ok=True)
    (folder / "log.txt").write_text("mine")
    if config_json is not None:
        (folder / "config.json").write_text(config_json)
    before = tree(folder)
    said = refusal(create, run)
    assert re.search(
        r"out_dir=.*: holds (log\.txt|config\.json), but no run; expected an empty", said
    )
    assert tree(folder) == before


def test_resumed_run_keeps_existing_files(run):
    folder = Path(run.out_dir)
    fill(folder)
    before = tree(folder)
    create(run, ByteTokenizer(), fresh=False)
    assert tree(folder) == before | {"config.json"}
    assert (folder / "metrics.jsonl").read_text() == "old"
    assert run_dir.open_checkpoints(run).latest() == 3


def test_run_directory_restores_config_and_tokenizer_also_after_a_move(config, tmp_path):
    run = config.replace(out_dir=str(tmp_path / "a" / "b"), learning_rate=0.125)
    create(run, CharTokenizer("cab"))
    assert run_dir.load_config(run.out_dir) == run
    assert load(tmp_path / "a" / "b" / "tokenizer.json").chars == "abc"
    os.rename(run.out_dir, tmp_path / "after")  # and is found where it is
    after = str(tmp_path / "after")
    assert run_dir.load_config(after) == run.replace(out_dir=after)


DAMAGED = ["", "{", "[]", "[1]", "null", "3", '{"n_layers": 2}', '{"n_layer": -2}', "\xff"]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_config_json_is_rejected_with_the_file_name(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert refusal(run_dir.load_config, str(tmp_path)).startswith(f"{tmp_path / 'config.json'}: ")


def test_directory_without_a_run_is_rejected(tmp_path):
    for folder in tmp_path, tmp_path / "nowhere":
        message = refusal(run_dir.load_config, str(folder))
        assert message.startswith(f"out_dir={str(folder)!r}: no run in it; expected ")


def test_parameters_are_loaded_by_name_or_step(run, trained):
    mesh = local_mesh()
    for name in "best", "latest", "3":
        params, step = run_dir.load_params(run, name, mesh)
        assert step == 3
        assert_same(params, trained.params)
    checkpoints = run_dir.open_checkpoints(run)
    later = jax.tree.map(lambda a: a + 1, items_of(trained))
    save(checkpoints, 4, later)
    assert [run_dir.load_params(run, n, mesh)[1] for n in ("best", "latest", "3")] == [3, 4, 3]
    assert_same(run_dir.load_params(run, "latest", mesh)[0], later["params"])
    (checkpoints.folder / "best").unlink()
    assert run_dir.load_params(run, "best", mesh)[1] == 4


def test_missing_checkpoint_is_rejected_with_the_available_names(run, config, tmp_path):
    mesh = local_mesh()
    message = refusal(run_dir.load_params, run, "5", mesh)
    assert message == "checkpoint='5': no such step; expected one of best, latest, 3"
    empty = config.replace(out_dir=str(tmp_path))
    message = refusal(run_dir.load_params, empty, "best", mesh)
    assert message.startswith(f"out_dir={str(tmp_path)!r}: no checkpoint in it yet; expected ")
