"""Test `jaxgpt eval`: HellaSwag against a NumPy scorer, and the losses of weights."""

import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers as library
from helpers import ROOT, make_data
from reference import numpy_gpt as ref
from reference.options import DEFAULTS
from safetensors.numpy import save_file

import jaxgpt
from jaxgpt.cli import commands as cli
from jaxgpt.config import Config, UserError
from jaxgpt.data.tokenizer import BpeTokenizer, ByteTokenizer
from jaxgpt.data.tokens import TokenSplit
from jaxgpt.interop.export import to_fields, to_tensors
from jaxgpt.runtime.mesh import local_mesh, make_mesh
from jaxgpt.tools import evaluation, hellaswag
from jaxgpt.tools.evaluation import count_bytes, evaluate
from jaxgpt.train_step import abstract_params

QUESTIONS = ROOT / "tests" / "golden" / "questions.jsonl"
SIZES = {"vocab_size": 256, "n_embd": 16, "n_layer": 1, "n_head": 2, "mlp_dim": 40}


@pytest.fixture(scope="module")
def case() -> tuple[Config, dict]:
    """Return a config and random weights with large logits."""
    keys = DEFAULTS | SIZES | {"block_size": 192, "mlp": "gelu_tanh"}
    config = Config(**keys, dtype="float32")
    params = ref.init_params(config, np.random.default_rng(5), np.dtype("float32"))
    params["blocks"] = dict(enumerate(params["blocks"]))
    params["embed"]["kernel"] *= 3
    return config, params


def write_weights(folder: Path, config: Config, params: dict) -> Path:
    """Write the case as a folder of weights, with the byte tokenizer."""
    save_file(to_tensors(config, params), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(to_fields(config)))
    (folder / "jaxgpt_tokenizer.json").write_text(ByteTokenizer().to_json())
    return folder


@pytest.fixture(scope="module")
def folder(case, tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights"), *case)


def token_losses(case, context: bytes, ending: bytes) -> list[float]:
    """Return the loss of every token of the ending, from the reference's logits."""
    config, params = case
    text = list(context + ending)
    logits_TV = ref.forward(params, np.array([text[:-1]]), config)[0][0].astype(np.float64)
    losses = []
    for place in range(max(1, len(context)), len(text)):
        logits_V = logits_TV[place - 1, : config.vocab_size]
        losses.append(np.log(np.exp(logits_V).sum()) - logits_V[text[place]])
    return losses


def score(case, questions: list[dict]) -> dict[str, list[int]]:
    """Return the endings that each scoring method picks."""
    picks: dict[str, list[int]] = {"acc": [], "acc_norm": []}
    for question in questions:
        losses = [
            token_losses(case, question["ctx"].encode(), b" " + ending.encode())
            for ending in question["endings"]
        ]
        sums = [sum(row) for row in losses]
        means = [sum(row) / len(row) for row in losses]
        picks["acc"].append(sums.index(min(sums)))
        picks["acc_norm"].append(means.index(min(means)))
    return picks


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def relabelled(picks: list[int], right: int, file: Path) -> Path:
    """Write questions whose labels make `right` of the `picks` correct; return the file."""
    questions = read(QUESTIONS)
    for n, (question, pick) in enumerate(zip(questions, picks, strict=True)):
        question["label"] = pick if n < right else (pick + 1) % 4
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return file


def test_acc_and_acc_norm_match_a_numpy_scorer(case, folder, tmp_path):
    picks = score(case, read(QUESTIONS))
    assert picks["acc"] != picks["acc_norm"]
    total = len(picks["acc"])
    for way in picks:  # labels that follow one way of scoring tell the two apart
        for right in 0, 3, total:
            file = relabelled(picks[way], right, tmp_path / f"{way}.jsonl")
            found = hellaswag.hellaswag("", "best", file=str(file), init_from=str(folder))
            labels = [question["label"] for question in read(file)]
            for name in picks:
                want = np.mean([a == b for a, b in zip(picks[name], labels, strict=True)])
                assert found[name] == pytest.approx(want), (way, right, name)
            assert found["questions"] == total


@pytest.mark.slow
@pytest.mark.parametrize("batch_tokens", [64, 4096])
@pytest.mark.parametrize("mesh", ["", "data:2"])
def test_ending_losses_match_numpy_for_any_batch_size_and_mesh(
    case, monkeypatch, mesh, batch_tokens
):
    config, params = case
    config = config.replace(mesh=mesh, attention="xla", gradient_accumulation_steps=1)
    devices = make_mesh(config) if mesh else local_mesh()
    monkeypatch.setattr(hellaswag, "BATCH_TOKENS", batch_tokens)
    texts = [
        (question["ctx"].encode(), b" " + ending.encode())
        for question in read(QUESTIONS)
        for ending in question["endings"]
    ]
    windows = [
        np.concatenate([~np.frombuffer(a, np.uint8).astype(np.int32), np.frombuffer(b, np.uint8)])
        for a, b in texts
    ]
    places = jax.tree.map(lambda p: p.sharding, abstract_params(config, devices))
    params = jax.device_put(params, places)
    sums, counts = hellaswag.sequence_losses(config, devices, params, windows)
    want = [token_losses(case, a, b) for a, b in texts]
    assert counts.tolist() == [len(losses) for losses in want]
    np.testing.assert_allclose(sums, [sum(losses) for losses in want], rtol=1e-4)


def test_long_contexts_are_truncated_at_the_start(case, tmp_path):
    config, params = case
    short = config.replace(block_size=12)
    cut = params | {"pos_embed": {"kernel": params["pos_embed"]["kernel"][:12]}}
    write_weights(tmp_path, short, cut)
    questions = []
    for text, endings in (
        ("He is on", ["abc", "zz", "q", "it"]),
        ("The sea", ["is", "of", "rose", "x"]),
        ("Now go and", ["see", "ox", "a", "why"]),
    ):
        context, losses = "x" * 90 + text, []
        for ending in endings:
            kept = context[len(ending) + 1 - 13 :]  # 12 inputs, and the last target
            losses.append(sum(token_losses((short, cut), kept.encode(), f" {ending}".encode())))
        label = int(np.argmin(losses))
        questions.append({"ctx": context, "label": label, "endings": endings})
    file = tmp_path / "long.jsonl"
    file.write_text("\n".join(map(json.dumps, questions)))
    found = hellaswag.hellaswag("", "best", file=str(file), init_from=str(tmp_path))
    assert found["acc"] == 1


FORMAT = '; expected {"ctx": TEXT, "label": NUMBER, "endings": [TEXT, ...]}'
BAD_LINES = {
    "json": ("{", ", line 1: is not a question (JSONDecodeError("),
    "nested": (100_000 * "[", ", line 1: is not a question (RecursionError("),
    "no label": (
        '{"ctx": "a", "endings": ["b"]}',
        f", line 1: is not a question (KeyError('label')){FORMAT}",
    ),
    "list": ("[]", ", line 1: is not a question (TypeError("),
    "label": (
        '{"ctx": "a", "label": 4, "endings": ["b", "c"]}',
        ", line 1: label=4 names no ending; expected a label from 0 to 1",
    ),
    "below": (
        '{"ctx": "a", "label": -1, "endings": ["b"]}',
        ", line 1: label=-1 names no ending; ",
    ),
    "endless": (
        '{"ctx": "a", "label": Infinity, "endings": ["b"]}',
        ", line 1: is not a question (OverflowError(",
    ),
    "word": ('{"ctx": "a", "label": 0, "endings": "bcd"}', "endings is not a list of texts; "),
    "none": ('{"ctx": "a", "label": 0, "endings": []}', "endings is not a list of texts; "),
    "text": ('{"ctx": 5, "label": 0, "endings": ["b"]}', f"ctx or an ending is not text{FORMAT}"),
    "ending": ('{"ctx": "a", "label": 0, "endings": [5]}', f"ctx or an ending is not text{FORMAT}"),
    "empty": ("", f": holds no questions{FORMAT} per line"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_invalid_question_file_is_rejected_with_the_reason(tmp_path, kind):
    text, message = BAD_LINES[kind]
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(UserError) as raised:
        hellaswag.read_questions(file)
    assert message in str(raised.value)
    assert str(raised.value).startswith(str(file))


def run_eval(*argv: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.run(cli.evaluate, [*argv, "--device=cpu"])
    return int(end.value.code or 0)


def test_eval_command_prints_hellaswag_accuracies(folder, capsys):
    argv = [f"--init_from={folder}", "--task=hellaswag", f"--hellaswag_file={QUESTIONS}"]
    assert run_eval(*argv) == 0
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    assert list(lines) == ["weights", "questions", "acc", "acc_norm"]
    assert lines["questions"] == "8"


def test_missing_hellaswag_file_error_names_url_and_checksum(folder, tmp_path, capsys):
    argv = [f"--init_from={folder}", "--task=hellaswag", f"--data_dir={tmp_path}"]
    assert run_eval(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"error: {tmp_path}/hellaswag/hellaswag_val.jsonl: no such file; expected "
    )
    assert f"; try curl --create-dirs -o {tmp_path}/hellaswag/hellaswag_val.jsonl https://" in line
    assert hellaswag.QUESTIONS.sha256 in line


def test_val_loss_of_weights_matches_numpy(case, folder, tmp_path, capsys):
    block_size = case[0].block_size
    text = "To be, or not to be: that is the question.\n" * 60
    make_data(tmp_path, text, "bytes", tokenizer="byte")
    argv = [f"--init_from={folder}", f"--data_dir={tmp_path}"]
    assert run_eval(*argv, "--dataset=bytes") == 0
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    tokens = np.fromfile(tmp_path / "bytes" / "val.bin", np.uint16).astype(int)
    losses = []
    for start in range(0, len(tokens) - 1, block_size):
        window = tokens[start : start + block_size + 1]
        losses += token_losses(case, bytes(window[:1].tolist()), bytes(window[1:].tolist()))
    assert len(losses) == len(tokens) - 1
    assert float(lines["val_loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(lines["perplexity"]) == pytest.approx(np.exp(np.mean(losses)), rel=1e-3)
    weights = jaxgpt.load(folder)
    assert (weights.step, weights.metrics) == (None, [])
    mine = weights.loss(tokens[:block_size])[1:]
    np.testing.assert_allclose(mine, losses[: block_size - 1], rtol=1e-4)

    assert run_eval(*argv) == 2
    assert "error: dataset=''" in capsys.readouterr().err


def test_perplexity_of_a_very_large_loss_is_infinite(case, folder, tmp_path, monkeypatch):
    make_data(tmp_path, "to be " * 400, "bytes", tokenizer="byte")
    monkeypatch.setattr(evaluation, "mean_loss", lambda *args: 800.0)
    found = evaluation.evaluate("", "best", str(tmp_path), init_from=str(folder), dataset="bytes")
    assert (found["val_loss"], found["perplexity"]) == (800.0, math.inf)


def test_an_end_of_text_is_a_target_without_bytes(tmp_path):
    library_bpe = library.Tokenizer(library.models.WordLevel({"a": 0, "é": 1}, unk_token="a"))
    library_bpe.add_special_tokens(["<|endoftext|>"])
    tokenizer = BpeTokenizer(library_bpe)
    ids = tokenizer.encode_documents(["a", "é", "é"])
    ids.tofile(tmp_path / "val.bin")
    tokens = TokenSplit([tmp_path / "val.bin"], "uint16", tokenizer.vocab_size)
    assert count_bytes(tokens, tokenizer) == (5, len("é é".encode()))  # of <> é <> é <>


def test_dataset_with_more_ids_than_the_model_is_rejected(folder, tmp_path):
    chars = "".join(map(chr, range(300, 600)))
    make_data(tmp_path, chars * 12, "many")
    with pytest.raises(UserError, match=r"many': its tokenizer is not the one in .*jaxgpt_tokeni"):
        evaluate("", "best", str(tmp_path), init_from=str(folder), dataset="many")
    unknown = tmp_path / "unknown"
    shutil.copytree(folder, unknown, ignore=shutil.ignore_patterns("jaxgpt_tokenizer.json"))
    with pytest.raises(UserError, match=r"dataset='many': has 300 ids.*vocab_size=256"):
        evaluate("", "best", str(tmp_path), init_from=str(unknown), dataset="many")
