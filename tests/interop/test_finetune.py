"""Test finetuning: weights of another run, frozen parameters and early stopping."""

import json
import re
import runpy
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import (
    ROOT,
    all_rows,
    call_step,
    log_of,
    make_config,
    make_data,
    make_windows,
    params_of,
    refusal,
    rows_of,
    set_val_losses,
    stop_at,
    take_steps,
    tiny_run,
)  # fmt: skip
from reference import numpy_gpt as ref

from jaxgpt.config import Config
from jaxgpt.interop.export import export
from jaxgpt.optimizer import frozen_mask
from jaxgpt.resolve import check_freeze
from jaxgpt.runtime import run_dir
from jaxgpt.runtime.mesh import local_mesh, make_mesh
from jaxgpt.runtime.metrics import Log
from jaxgpt.train import train
from jaxgpt.train_step import init_state, make_train_step

SONG = "full of fury, it is nothing.\n" * 40


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = make_data(tmp_path_factory.mktemp("data"))
    return make_data(folder, SONG, "song", tokenizer=str(folder / "tale" / "tokenizer.json"))


@pytest.fixture
def make_run(data_dir, tmp_path):
    keys = {"n_layer": 2, "dropout": 0.0, "warmup_iters": 0, "lr_decay_iters": 0}
    keys |= {"max_iters": 8, "eval_interval": 4, "dtype": "auto", "attention": "auto"}
    return lambda name, **others: tiny_run(tmp_path / name, data_dir, **keys | others)


SCANNED = {"scan_layers": True, "mesh": "fsdp:2,tensor:2"}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, SCANNED], ids=str)
def test_finetuning_takes_model_keys_and_best_weights_of_another_run(make_run, options):
    """Model keys and weights come from the first run; moments, steps and rates start fresh."""
    first = make_run("first", max_iters=12, **options)
    train(first)
    link = Path(first.out_dir, "checkpoints", "best")
    link.unlink()
    link.symlink_to("8")  # not the newest one
    model_keys = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 6}  # defaults, but one
    second = make_run("second", init_from=first.out_dir, dataset="song", learning_rate=0.0,
                      min_lr=0.0, weight_decay=0.0, dropout=0.1, **model_keys)  # fmt: skip
    assert train(second.replace(max_iters=1)) == 0
    config = run_dir.load_config(second.out_dir)
    assert (config.n_layer, config.n_embd, config.block_size) == (2, 16, 6)
    assert config.scan_layers == first.scan_layers
    theirs, ours = params_of(first, "8"), params_of(second)
    theirs["pos_embed.kernel"] = theirs["pos_embed.kernel"][:6]
    assert ours.keys() == theirs.keys()
    for path, value in ours.items():
        np.testing.assert_array_equal(value, theirs[path], err_msg=path)
    newest = params_of(first)
    assert any((newest[p] != value).any() for p, value in theirs.items() if "pos" not in p)
    assert [row["step"] for row in rows_of(second) if "loss" in row] == [1]
    assert f"weights of {first.out_dir}: " in log_of(second)


@pytest.mark.slow
def test_stopped_finetuning_run_resumes_bit_exact(make_run, monkeypatch):
    first = make_run("first")
    train(first)
    keys = {"init_from": first.out_dir, "dataset": "song", "freeze": "embed|blocks/0/"}
    quiet, stopped = make_run("quiet", **keys), make_run("stopped", **keys)
    train(quiet)
    stop_at(monkeypatch, 3)
    assert train(stopped) == 128 + signal.SIGTERM
    assert train(stopped.replace(init_from="resume")) == 0
    assert rows_of(stopped) == rows_of(quiet)
    for path, value in params_of(stopped).items():
        np.testing.assert_array_equal(value, params_of(quiet)[path], err_msg=path)
    message = refusal(train, stopped.replace(init_from="resume", freeze="embed", max_iters=9))
    assert message.startswith("freeze='embed': differs from the run in ")
    assert message.endswith("; try --freeze='embed|blocks/0/'")


@pytest.mark.slow
def test_finetuning_run_stopped_before_its_first_step_starts_again_from_the_weights(
    make_run, monkeypatch
):
    """A checkpoint of step 0 would be taken for a run that has not begun."""
    first = make_run("first", value_residual=True)  # has a parameter without axes
    train(first)
    keys = {"init_from": first.out_dir, "dataset": "song"}
    quiet, stopped = make_run("quiet", **keys), make_run("stopped", **keys)
    train(quiet)
    with monkeypatch.context() as patched:
        evaluate = Log.eval

        def stop(self, row):
            signal.raise_signal(signal.SIGTERM)
            evaluate(self, row)

        patched.setattr(Log, "eval", stop)
        assert train(stopped) == 128 + signal.SIGTERM
    assert run_dir.open_checkpoints(stopped).latest() is None
    assert train(stopped) == 0
    assert rows_of(stopped) == rows_of(quiet)


@pytest.mark.slow
def test_run_that_overwrites_another_saves_its_last_step_too(make_run, monkeypatch):
    """Both end at the same step, and save nothing before."""
    set_val_losses(monkeypatch, dict.fromkeys(range(20), 5.0))
    keys = {"always_save_checkpoint": False, "early_stopping_patience": 1}
    config = make_run("run", **keys)
    for options in {}, {"overwrite": True}:
        train(config.replace(**options))
        assert run_dir.open_checkpoints(config).latest() == 4


@pytest.mark.slow
def test_weights_that_do_not_fit_are_rejected_before_anything_is_written(make_run, data_dir):
    first = make_run("first", max_iters=1)
    train(first)
    second = make_run("second", init_from=first.out_dir)
    said = f"n_embd=32: differs from {first.out_dir}; expected 16; try --n_embd=16"
    assert refusal(train, second.replace(n_embd=32)) == said
    said = refusal(train, second.replace(out_dir=first.out_dir, overwrite=True))
    assert said.startswith(f"init_from={first.out_dir!r}: is out_dir too")
    make_data(data_dir, SONG, "other")  # with fewer characters
    said = refusal(train, second.replace(dataset="other"))
    file = Path(first.out_dir, "tokenizer.json")
    assert said.startswith(f"dataset='other': its tokenizer is not the one in {file} ")
    assert said.endswith(f"; try jaxgpt prepare FILE --tokenizer={file}")
    weights = str(data_dir / "weights")
    export(first.out_dir, "latest", weights)
    said = refusal(train, second.replace(init_from=weights, dataset="other"))
    assert said.startswith("dataset='other': its tokenizer is not the one in ")
    assert not Path(second.out_dir, "config.json").exists()
    Path(first.out_dir, "checkpoints").rename(first.out_dir + "-gone")
    assert "no checkpoint in it yet; expected" in refusal(train, second)


PATTERNS = {
    "embed|blocks/0/": lambda path: "embed" in path or ".0." in path,
    "^embed": lambda path: path.startswith("embed"),
    "bias$|scale$": lambda path: path.endswith(("bias", "scale")),
    "blocks/[01]/attn": lambda path: "attn" in path,
}


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tie", [True, False])
def test_frozen_parameters_are_unchanged_and_others_match_numpy_adamw(pattern, tie):
    """Two steps of the NumPy AdamW use only the gradients of trainable parameters.

    Clipping is active and weight decay is large, so an error in either would show.
    """
    keys = {"dtype": "float64", "weight_decay": 0.5, "grad_clip": 0.1, "freeze": pattern}
    with jax.enable_x64(True):
        config = make_config(**keys, tie_embeddings=tie)
        mesh = make_mesh(config)
        params = jax.device_get(init_state(config, mesh).params)
        batches = [make_windows(config, seed=i) for i in range(2)]
        state, rows = take_steps(config, batches)
    is_frozen = PATTERNS[pattern]
    initial, final = ref.flatten(params), ref.flatten(state.params)
    for path, value in final.items():
        assert (value == initial[path]).all() == is_frozen(path), path
    theirs = dict(initial)
    adamw = ref.adamw_init({p: initial[p] for p in initial if not is_frozen(p)})
    for batch, row in zip(batches, rows, strict=True):
        windows = np.asarray(batch).reshape(8, -1)
        tree = ref.unflatten(theirs, params)
        loss, grads = ref.loss_and_grads(tree, windows[:, :-1], windows[:, 1:], config)
        grads = {p: g for p, g in ref.flatten(grads).items() if not is_frozen(p)}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        assert row["loss"] == pytest.approx(loss, rel=1e-6)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-6)
        learned, adamw, _ = ref.adamw_step(
            {p: theirs[p] for p in grads}, grads, adamw, lr=float(row["lr"]), betas=(0.9, 0.95),
            weight_decay=0.5, grad_clip=0.1, clip_eps=0,
        )  # fmt: skip
        theirs |= learned
    for path, value in final.items():
        np.testing.assert_allclose(value, theirs[path], rtol=0, atol=1e-9, err_msg=path)


@pytest.mark.slow
def test_frozen_parameters_have_no_moments_and_reduce_flops():
    """If only the last block and the output map train, most of the backward pass is skipped."""

    def arrays_and_flops(freeze: str) -> tuple[int, float]:
        config = make_config(freeze=freeze, tie_embeddings=False, n_layer=4)
        mesh = make_mesh(config)
        state = init_state(config, mesh)
        step = make_train_step(config, mesh)
        compiled = call_step(step.lower, state, make_windows(config)).compile()
        return len(jax.tree.leaves(state.opt_state)), compiled.cost_analysis()["flops"]

    all_arrays, all_flops = arrays_and_flops("")
    arrays, flops = arrays_and_flops("embed|blocks/[0-2]/|ln_f")
    assert all_arrays - arrays == 2 * (2 + 3 * 12 + 2)  # embeddings, blocks, ln_f
    assert flops < 0.6 * all_flops


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "scan"), [("fsdp:2,tensor:2", False), ("data:2,fsdp:2", True), ("data:4", False)]
)
def test_exactly_the_matching_parameters_are_frozen_on_every_mesh(make_run, mesh, scan):
    config = make_run("run", mesh=mesh, scan_layers=scan, freeze="embed|attn", weight_decay=0.5)
    train(config)
    state = init_state(run_dir.load_config(config.out_dir), local_mesh())
    initial = ref.flatten(jax.device_get(state.params))
    final = params_of(config)
    same = {path for path, value in final.items() if (value == initial[path]).all()}
    assert same == {path for path in final if "embed" in path or "attn" in path}
    saved = run_dir.load_config(config.out_dir)
    padding = (saved.padded_vocab_size - saved.vocab_size) * saved.n_embd
    size = sum(final[path].size for path in same) - padding
    assert f"frozen: {size / 1e6:.2f}M parameters" in log_of(config)


@pytest.mark.parametrize(("pattern", "which"), [("wte", "none"), (".", "all")])
def test_freeze_pattern_matching_no_or_all_parameters_is_rejected(make_run, pattern, which):
    config = make_run("run", freeze=pattern)
    said = refusal(train, config)
    start = f"freeze={pattern!r}: matches {which} of the parameters; expected a pattern that "
    assert said.startswith(start)
    assert "embed/kernel" in said
    assert not Path(config.out_dir, "config.json").exists()


def test_freeze_pattern_of_single_layers_is_rejected_if_layers_are_scanned():
    config = Config(n_layer=4, scan_layers=True, freeze="embed|blocks/[01]/")
    assert refusal(check_freeze, config).startswith("freeze='embed|blocks/[01]/': selects single")
    check_freeze(config.replace(freeze="embed|blocks/"))


def test_empty_freeze_pattern_freezes_nothing_and_invalid_regex_is_rejected():
    params = {"embed": {"kernel": np.zeros(3)}}
    assert not any(jax.tree.leaves(frozen_mask(Config(), params)))
    said = refusal(check_freeze, Config(freeze="("))
    assert said.startswith("freeze='(': ")
    assert said.endswith("; expected a regular expression")


@pytest.mark.slow
def test_step_with_only_masked_targets_has_zero_loss_and_gradient():
    config = make_config(weight_decay=0.0)
    _, rows = take_steps(config, [~make_windows(config)])
    assert (rows[0]["loss"], rows[0]["grad_norm"]) == (0, 0)


# (losses by step, last step of the run, best step)
CURVES = [
    ({0: 5.0, 2: 3.0, 4: 2.0, 6: 2.5, 8: 2.0, 10: 2.1, 12: 1.0}, 10, 4),
    ({0: 5.0, 2: 6.0, 4: 5.0, 6: 7.0, 8: 1.0, 10: 1.0, 12: 1.0}, 6, None),
    ({0: 5.0, 2: 3.0, 4: 3.5, 6: 3.1, 8: 2.9, 10: 3.0, 12: 3.0}, 12, 8),
]


@pytest.mark.parametrize(("losses", "end", "best"), CURVES)
@pytest.mark.parametrize("every", [True, False])
@pytest.mark.slow
def test_early_stopping_counts_evaluations_without_improvement_across_resumes(
    make_run, monkeypatch, losses, end, best, every
):
    """A run that is stopped and resumed several times keeps the count."""
    set_val_losses(monkeypatch, losses)
    keys = {"eval_interval": 2, "max_iters": 12, "early_stopping_patience": 3}
    keys |= {"always_save_checkpoint": every}
    quiet, stopped = make_run("quiet", **keys), make_run("stopped", **keys, init_from="auto")
    assert train(quiet) == 0
    stop_at(monkeypatch, 1, 3, 5)
    codes = [train(stopped) for _ in range(4)]
    assert codes == [128 + signal.SIGTERM] * 3 + [0]
    for config in quiet, stopped:
        checkpoints = run_dir.open_checkpoints(config)
        assert (checkpoints.latest(), checkpoints.best()) == (end, best)
        said = f"the lowest validation loss, {losses[best or 0]:.4f} at step {best or 0}\n"
        assert (f"early stop: 3 evaluations since {said}" in log_of(config)) == (end < 12)
        last = all_rows(config)[-1]
        assert (last["step"], last["full_val_loss"]) == (end, 9.0)
    assert rows_of(stopped) == rows_of(quiet)
    rows = rows_of(quiet)
    train(quiet.replace(init_from="resume"))  # a run that stopped early takes no more steps
    assert rows_of(quiet) == rows


@pytest.mark.slow
def test_early_stopping_count_restarts_without_the_best_checkpoint(make_run, monkeypatch):
    set_val_losses(monkeypatch, {step: 1.0 if step == 2 else 5.0 for step in range(0, 20, 2)})
    keys = {"eval_interval": 2, "early_stopping_patience": 3, "keep_checkpoints": 1}
    config = make_run("run", max_iters=6, **keys)
    train(config)
    Path(config.out_dir, "checkpoints/2/digest.json").write_text("{}")  # damaged
    train(config.replace(init_from="resume", max_iters=18))
    assert run_dir.open_checkpoints(config).latest() == 14  # 8 is the best again


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "interval", "end"),
    [
        ({"max_iters": 4, "eval_interval": 2, "early_stopping_patience": 2}, 3, 9),
        ({"max_iters": 12, "eval_interval": 4, "early_stopping_patience": 4}, 1, 14),
    ],
)
def test_early_stopping_counts_evaluations_after_the_interval_has_changed(
    make_run, monkeypatch, first, interval, end
):
    """Evaluations of the first session count once each, and not by the new interval."""
    set_val_losses(monkeypatch, {step: 1.0 if step == 4 else 5.0 for step in range(20)})
    config = make_run("run", **first)
    train(config)
    train(config.replace(init_from="resume", eval_interval=interval, max_iters=18))
    last = all_rows(config)[-1]
    assert (last["step"], last["full_val_loss"]) == (end, 9.0)


@pytest.mark.slow
def test_loss_of_another_dataset_is_not_the_lowest_of_a_resumed_run(
    make_run, data_dir, monkeypatch
):
    shutil.copytree(data_dir / "tale", data_dir / "other", dirs_exist_ok=True)
    set_val_losses(monkeypatch, {step: 5.0 if step > 4 else 1.0 for step in range(20)})
    config = make_run("run", max_iters=4, eval_interval=2)
    train(config)
    config = config.replace(init_from="resume", dataset="other", max_iters=8)
    train(config.replace(target_val_loss=2.0))
    assert run_dir.open_checkpoints(config).best() == 6
    train(config.replace(max_iters=9))  # the best step is one of the other dataset from here on
    assert run_dir.open_checkpoints(config).meta(9)["best_val_loss"] == 5.0


@pytest.mark.slow
def test_run_without_patience_ignores_rising_val_loss(make_run, monkeypatch):
    set_val_losses(monkeypatch, {step: 1.0 + step for step in range(0, 10, 2)})
    config = make_run("run", eval_interval=2)
    train(config)
    assert run_dir.open_checkpoints(config).latest() == 8


@pytest.mark.slow
def test_comparison_trains_each_run_once_and_prints_mean_and_spread(
    data_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    script = runpy.run_path(str(ROOT / "configs" / "pretrain_then_finetune.py"))
    names = script["compare"].__globals__
    small = {"data_dir": str(data_dir), "max_iters": 4, "eval_interval": 2, "n_layer": 1}
    small |= {"n_head": 2, "n_embd": 16, "block_size": 8, "mesh": "data:2"}
    small |= {"early_stopping_patience": 0}
    for name, dataset in {"config": "tale", "alone": "song", "finetune": "song"}.items():
        monkeypatch.setitem(names, name, names[name].replace(dataset=dataset, **small))
    names["compare"]([])
    table = capsys.readouterr().out.split("\nvalidation loss")[1].splitlines()
    times = lambda: {p: p.stat().st_mtime_ns for p in tmp_path.rglob("checkpoints/*/digest.json")}
    kept = times()
    assert len({path.parts[-4] for path in kept}) == 9
    for row, name in zip(table[1:], ("pretrain", "finetune", "alone"), strict=True):
        *losses, mean, _, spread = re.split(r"\s\s+| (?=\+-)|(?<=\+-) ", row)[1:]
        assert len(losses) == 3
        for seed in 1, 2, 3:
            folder = "out/pretrain_then_finetune/"
            found = json.loads(Path(f"{folder}{name}-{seed}/config.json").read_text())
            pretrained = f"{folder}pretrain-{seed}" if name == "finetune" else "scratch"
            assert (found["seed"], found["init_from"]) == (seed, pretrained)
        values = np.array(losses, float)
        assert float(mean) == pytest.approx(values.mean(), abs=1e-4)
        assert float(spread) == pytest.approx(values.std(ddof=1), abs=1e-4)
    names["compare"]([])
    assert capsys.readouterr().out.split("\nvalidation loss")[1].splitlines() == table
    assert times() == kept
