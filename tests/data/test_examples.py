"""Test prompts and completions: only completions are targets and count in the loss."""

import json
import math
import re
import shutil
from functools import partial

import jax
import numpy as np
import pytest
import tokenizers as library
from helpers import read_files, refusal, tiny_run
from hypothesis import given
from hypothesis import strategies as st
from reference import numpy_gpt as ref

from jaxgpt.config import Config
from jaxgpt.data import examples
from jaxgpt.data.prepare import prepare
from jaxgpt.data.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer
from jaxgpt.data.tokens import TokenSplit, open_dataset
from jaxgpt.runtime import run_dir
from jaxgpt.runtime.mesh import local_mesh
from jaxgpt.tools.evaluation import evaluate
from jaxgpt.train import train

SUMS = [(f"{a}+{b}=", str(a + b)) for a in range(8) for b in range(8)]
BYTES = ByteTokenizer()


def lines(pairs) -> str:
    return "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs)


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """Return a data folder with the dataset `sums` and the file it was prepared from."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "sums.jsonl").write_text(lines(SUMS))
    prepare(str(folder / "sums.jsonl"), str(folder))
    return folder


TEXTS = st.text(max_size=9)


@given(st.lists(st.tuples(TEXTS, TEXTS), max_size=5), st.integers(1, 30))
def test_examples_read_in_pieces_equal_the_json_lines(pairs, size):
    text = "\n" + lines(pairs).replace("\n", " \n\n")
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert list(examples.read_examples(pieces)) == pairs
    chars, count = examples.scan_examples(pieces)
    assert (chars, count) == ({"\n"}.union(*"".join(map("".join, pairs))), len(pairs))


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5), st.integers(0, 5))
def test_prompts_are_masked_and_completions_with_line_end_are_targets(pairs, train_examples):
    found = list(examples.encode_examples([lines(pairs)], BYTES, train_examples))
    splits = train_examples * ["train"] + len(pairs) * ["val"]
    assert [split for split, _ in found] == splits[: len(pairs)]
    for (prompt, completion), (_, ids) in zip(pairs, found, strict=True):
        assert ids.dtype == np.int32
        assert bytes((~ids[ids < 0]).tolist()).decode() == prompt
        assert bytes(ids[ids >= 0].tolist()).decode() == completion + "\n"
        assert (np.diff(ids >= 0) >= 0).all()  # the prompt comes first


def test_bpe_completion_ends_with_end_of_text():
    words = library.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
    bpe = library.Tokenizer(words)
    bpe.add_special_tokens(["<|endoftext|>"])
    ((_, ids),) = examples.encode_examples([lines([("a", "b")])], BpeTokenizer(bpe), 1)
    assert ids.tolist() == [~0, 1, 3]


def test_bpe_without_end_of_text_is_rejected_for_examples():
    words = library.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
    encoder = BpeTokenizer(library.Tokenizer(words))
    pieces = examples.encode_examples([lines([("a", "b")])], encoder, 1)
    assert refusal(next, pieces).startswith("tokenizer: has no <|endoftext|>, with which")


def test_dataset_stays_as_it_is_if_the_new_tokenizer_has_no_end_of_text(tmp_path):
    file = tmp_path / "words.jsonl"
    file.write_text(lines([("a", "b")] * 20))
    prepare(str(file), str(tmp_path))
    before = read_files(tmp_path / "words")
    words = library.models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?")
    (tmp_path / "new.json").write_text(library.Tokenizer(words).to_str())
    arguments = str(file), str(tmp_path), str(tmp_path / "new.json")
    message = refusal(partial(prepare, overwrite=True), *arguments)
    assert message.startswith("tokenizer: has no <|endoftext|>, with which")
    assert read_files(tmp_path / "words") == before


BAD = ["{", "[]", "3", '{"prompt": "a"}', '{"prompt": 1, "completion": "a"}']
BAD += ['{"prompt": "a", "completion": "\\ud800"}']  # half a character


@pytest.mark.parametrize("line", BAD)
def test_malformed_or_too_few_examples_are_rejected(tmp_path, line):
    file = tmp_path / "some.jsonl"
    file.write_text(lines(SUMS) + line + "\n")
    message = refusal(prepare, str(file), str(tmp_path))
    assert re.search(r"line 65: .+; expected an object with two texts", message)
    file.write_text(lines(SUMS[:1]))
    assert "too few examples for train and val (1)" in refusal(prepare, str(file), str(tmp_path))
    assert not (tmp_path / "some").exists()


def test_token_files_hold_the_encoded_examples(sums):
    data = open_dataset(sums / "sums", sums, 8)
    assert isinstance(data.tokenizer, CharTokenizer)
    assert data.tokenizer.chars == "\n+0123456789="
    all_ids = [ids for _, ids in examples.encode_examples([lines(SUMS)], data.tokenizer, 0)]
    train, val = (t.read(0, len(t)) for t in (data.train, data.val))
    np.testing.assert_array_equal(train, np.concatenate(all_ids[:57]))
    np.testing.assert_array_equal(val, np.concatenate(all_ids[57:]))


@pytest.mark.parametrize("bad", [5, ~5, 2**31 - 1, -(2**31)])
def test_out_of_range_id_is_rejected_with_position_masked_or_not(tmp_path, bad):
    file = tmp_path / "some.bin"
    np.array([4, ~4, 0, ~0, bad], "<i4").tofile(file)
    tokens = TokenSplit([file], "int32", 5)
    np.testing.assert_array_equal(tokens.read(0, 4), [4, ~4, 0, ~0])
    assert f"id {bad} at token 4 is out of range; expected" in refusal(tokens.read, 1, 4)


def make_config(sums, tmp_path, **keys) -> Config:
    tiny = {"dataset": "sums", "dropout": 0.0, "warmup_iters": 0, "max_iters": 6, "mesh": "data:1"}
    tiny |= {"eval_interval": 3, "eval_iters": 0}
    return tiny_run(tmp_path / "run", sums, **tiny | keys)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["always", "never"])
def test_evaluated_loss_equals_numpy_loss_over_completions(sums, tmp_path, where):
    """The loss of the whole split is also reported in bits per byte of completions."""
    config = make_config(sums, tmp_path, data_on_device=where)
    assert train(config) == 0
    found = evaluate(config.out_dir, "latest")
    config = run_dir.load_config(config.out_dir)
    params = jax.device_get(run_dir.load_params(config, "latest", local_mesh())[0])
    data = open_dataset(sums / "sums", sums, 8)
    ids = data.val.read(0, len(data.val))
    total = targets = 0
    for start in range(0, len(ids) - 1, 8):
        window = ids[start : start + 9]
        tokens = np.where(window < 0, ~window, window)
        logits, _, _ = ref.forward(params, tokens[None, :-1], config)
        for t, target in enumerate(window[1:]):
            if target >= 0:
                p_V = np.exp(logits[0, t]) / np.exp(logits[0, t]).sum()
                total, targets = total - np.log(p_V[target]), targets + 1
    assert targets == sum(len(c) + 1 for _, c in SUMS[57:])  # the first token is of a prompt
    assert found["val_loss"] == pytest.approx(total / targets, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(total / targets / math.log(2), rel=1e-5)


@pytest.mark.slow
def test_loss_depends_on_completion_targets_and_not_on_prompt_targets(sums, tmp_path):
    """The last token of the split is never an input, so a change there changes only a target."""
    config = make_config(sums, tmp_path)
    train(config.replace(max_iters=2))

    def loss(last: int) -> float:
        folder = shutil.copytree(sums / "sums", tmp_path / "sums", dirs_exist_ok=True)
        ids = np.fromfile(folder / "val.bin", "<i4")
        ids[-1] = last
        ids.tofile(folder / "val.bin")
        return evaluate(config.out_dir, "latest", str(tmp_path))["val_loss"]

    assert loss(~3) == loss(~7)
    assert loss(3) != loss(7)
