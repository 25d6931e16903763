"""The sampler against NumPy: what is drawn from, what is drawn, and what a stream shows of it."""

import dataclasses
import io
import json
import os
import pty
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import numpy_gpt as ref
from reference.options import DEFAULTS, MODEL_CASES, MODERN

from jaxgpt import layers, sample
from jaxgpt.cli import commands as cli
from jaxgpt.config import Config, UserError
from jaxgpt.data.text_stream import TextStream
from jaxgpt.data.tokenizer import ByteTokenizer, CharTokenizer
from jaxgpt.kernels import decode
from jaxgpt.runtime.checkpoint import Checkpoints
from jaxgpt.sample import NO_TOKEN, Sampler, SamplingParams, generate_text, sample_token
from jaxgpt.sharding import local_mesh, make_mesh
from jaxgpt.train_step import abstract_params

GREEDY = SamplingParams(temperature=0)
each_overflow = pytest.mark.parametrize("overflow", ["truncate", "slide"])


def make_case(**options) -> tuple[Config, dict]:
    """A config, and random parameters with blocks by number."""
    config = Config(**DEFAULTS | {"dtype": "float32", "attention": "reference"} | options)
    params = ref.init_params(config, np.random.default_rng(1), np.dtype(config.dtype))
    params["blocks"] = dict(enumerate(params["blocks"]))
    return config, params if params["blocks"] else {k: params[k] for k in params if k != "blocks"}


def lively_case(**options) -> tuple[Config, dict]:
    """Likewise; louder blocks and an untied output map keep greedy texts from standing still."""
    sizes = {"vocab_size": 65, "n_embd": 32, "block_size": 8, "tie_embeddings": False}
    config, params = make_case(**sizes | options)
    loud = {
        path: 2 * p if path.endswith("kernel") and path.startswith(("blocks", "pos")) else p
        for path, p in ref.flatten(params).items()
    }
    return config, ref.unflatten(loud, params)


def random_prompts(*lengths: int, vocab_size: int = 65) -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def generate(sampler: Sampler, prompts: list[list[int]], **options) -> list[list[int]]:
    chunks = list(sampler.generate([np.array(p) for p in prompts], **options))
    return [[int(t) for t in row if t >= 0] for row in np.concatenate(chunks, axis=1)]


def next_logits(config: Config, params: dict, text: list[int]) -> np.ndarray:
    """The reference's logits [V] of what follows a text."""
    return ref.forward({"blocks": {}} | params, np.array([text]), config)[0][0, -1]


def greedy_loop(config: Config, params: dict, prompt: list[int], new: int, overflow: str, penalty=1):
    """What `generate` must draw, by one whole forward per token."""
    size, text, seen = config.block_size, list(prompt), set(prompt)
    for _ in range(new):
        if overflow == "truncate" and len(text) > size:
            text = text[-min(size, size // 2 + 1) :]
        logits = next_logits(config, params, text[-size:])
        for token in seen:
            logits[token] *= 1 / penalty if logits[token] > 0 else penalty
        text.append(int(logits.argmax()))
        seen.add(text[-1])
        yield text[-1]


# ---- what is drawn from ----------------------------------------------------------------------


@pytest.fixture
def logits(monkeypatch) -> list[np.ndarray]:
    """Collects the logits [B, V] that tokens are drawn from, one token per chunk."""
    kept, draw_token = [], sample.sample_token

    def spy(logits_BV: jax.Array, *rest):
        jax.debug.callback(lambda x: kept.append(np.array(x)), logits_BV, ordered=True)
        return sample_token(logits_BV, *rest)

    monkeypatch.setattr(sample, "sample_token", spy)
    monkeypatch.setattr(sample, "CHUNK", 1)
    monkeypatch.setattr(decode, "SHARED_READ_BYTES", 0)  # one device, so that draws have an order
    return kept


def check_logits(
    logits: list, params: dict, sampler: Sampler, sampling: SamplingParams, atol: float, lengths=(2, 4)
) -> None:
    """Every draw of a ragged batch, up to the last place in the cache, is from the right logits."""
    c = sampler.config
    new = c.block_size + 1 - max(lengths)
    prompts = random_prompts(*lengths, vocab_size=c.vocab_size)
    logits.clear()
    texts = generate(sampler, prompts, max_new_tokens=new, params=sampling)
    jax.effects_barrier()
    assert [of_all.shape for of_all in logits] == new * [(len(lengths), c.padded_vocab_size)]
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        for n in range(new):
            want = next_logits(c, params, prompt + text[:n])
            np.testing.assert_allclose(logits[n][row], want, rtol=0, atol=atol, err_msg=str(n))
            assert sampling.temperature or text[n] == want.argmax()


@pytest.mark.parametrize("options", [o for o in MODEL_CASES if o.get("causal", True)], ids=str)
def test_cached_decoding_is_the_whole_forward(options, logits):
    config, params = make_case(**options)
    sampler = Sampler(config).load(params)
    for sampling in (GREEDY, SamplingParams(temperature=3.0)):
        check_logits(logits, params, sampler, sampling, 1e-4)


@pytest.mark.parametrize("lengths", [(1,), (2,), (1, 1), (1, 7), (5, 6)], ids=str)
def test_prompts_of_one_token_and_of_a_whole_block_decode_from_the_right_logits(lengths, logits):
    config, params = make_case()
    check_logits(logits, params, Sampler(config).load(params), GREEDY, 1e-4, lengths)


@pytest.mark.parametrize("options", [{}, MODERN | {"n_layer": 3, "value_residual": True}], ids=str)
def test_scanned_layers_are_unstacked_to_be_sampled(options, logits):
    config, params = make_case(**options)
    blocks = jax.tree.map(lambda *layers: np.stack(layers), *params["blocks"].values())
    sampler = Sampler(config.replace(scan_layers=True)).load(params | {"blocks": blocks})
    check_logits(logits, params, sampler, GREEDY, 1e-4)


@pytest.mark.parametrize("lengths", [(4,), (2, 4)], ids=["packed", "wide"])
@pytest.mark.parametrize(
    "options", [{}, MODERN, {"tie_embeddings": False, "n_layer": 1}, {"n_layer": 0}], ids=str
)
def test_bfloat16_on_a_cpu_rounds_kernels_alone(options, lengths, logits, monkeypatch):
    monkeypatch.setattr(layers, "PACKED", 0)
    config, params = make_case(**{"n_embd": 32} | options)
    sampler = Sampler(config.replace(dtype="bfloat16")).load(params)
    types = {str(p.dtype) for p in jax.tree.leaves(sampler.row_params)}
    assert types == {"float32", "uint32"}
    narrow = {
        path: p.astype(jnp.bfloat16).astype(p.dtype) if path.endswith("kernel") else p
        for path, p in ref.flatten(params).items()
    }
    check_logits(logits, ref.unflatten(narrow, params), sampler, GREEDY, 1e-4, lengths)


def test_float64_is_sampled_in_float64(logits):
    config, params = make_case(dtype="float64")
    with jax.enable_x64(True):
        check_logits(logits, params, Sampler(config).load(params), GREEDY, 1e-10)


def test_new_parameters_count_from_then_on():
    config, params = lively_case()
    other = jax.tree.map(lambda p: -p, params)
    sampler, texts = Sampler(config), []
    for tree in (params, other, params):
        texts += generate(sampler.load(tree), [[1]], max_new_tokens=10, params=GREEDY)
    assert texts[0] == texts[2] != texts[1]


def test_parameters_spread_over_devices_are_gathered():
    """As training hands them over."""
    config, params = lively_case(n_layer=1, mesh="data:2,fsdp:2,tensor:2", batch_size=8)
    places = jax.tree.map(lambda p: p.sharding, abstract_params(config, make_mesh(config)))
    sampler = Sampler(config)
    here, there = (
        generate(sampler.load(tree), [[1], [2, 3]], max_new_tokens=20)
        for tree in (params, jax.device_put(params, places))
    )
    assert here == there


@pytest.mark.parametrize(("rows", "devices"), [(1, 1), (2, 2), (9, 3), (10, 5), (11, 1), (16, 8)])
def test_devices_share_sequences_and_change_no_token(rows, devices, monkeypatch):
    config, params = lively_case(n_layer=1)
    assert decode.num_replicas(rows, params) == devices
    sampler, prompts = Sampler(config).load(params), random_prompts(*range(1, rows + 1))
    run = partial(generate, sampler, prompts, max_new_tokens=20)
    texts = run()
    monkeypatch.setattr(decode, "SHARED_READ_BYTES", 0)  # now the weights count as large
    assert decode.num_replicas(rows, params) == 1
    assert run() == texts


def test_an_encoder_cannot_be_sampled():
    with pytest.raises(UserError, match="causal=False"):
        Sampler(make_case(causal=False)[0])


# ---- past block_size, and side by side -------------------------------------------------------

LIVELY = [
    {},
    {"block_size": 7, "n_layer": 1, "sliding_window": 3},
    MODERN | {"n_kv_head": 2, "value_residual": True},
    {"position": "sinusoidal", "norm_position": "post", "norm": "rmsnorm"},
    {"block_size": 1, "n_layer": 1},
    {"block_size": 3, "n_layer": 1, "position": "rope"},
]


@each_overflow
@pytest.mark.parametrize(
    ("options", "penalty"),
    [*((options, 1.0) for options in LIVELY), ({"n_layer": 1}, 2.5)],
    ids=str,
)
def test_past_block_size_it_goes_on_as_the_plain_loop_does(options, penalty, overflow, monkeypatch):
    """Rows get there at different times: in a chunk's middle, at once, or before they begin."""
    monkeypatch.setattr(sample, "CHUNK", 5)
    config, params = lively_case(**options)
    prompts, new = random_prompts(1, 2, 5, 7, 8, 9, 17), 23
    sampling = SamplingParams(temperature=0, repetition_penalty=penalty)
    sampler = Sampler(config).load(params)
    got = generate(sampler, prompts, max_new_tokens=new, params=sampling, overflow=overflow)
    for prompt, text in zip(prompts, got, strict=True):
        want = greedy_loop(config, params, prompt, new, overflow, penalty)
        assert text == list(want), len(prompt)
    assert config.block_size == 1 or len({token for text in got for token in text}) > 6


@each_overflow
def test_a_prompt_gets_beside_others_what_it_gets_alone(overflow):
    config, params = lively_case(n_layer=1, position="rope")
    sampler, prompts = Sampler(config).load(params), random_prompts(1, 6, 8, 12)
    run = partial(generate, sampler, max_new_tokens=25, params=GREEDY, overflow=overflow)
    assert run(prompts) == [text for prompt in prompts for text in run([prompt])]


@each_overflow
def test_what_a_prompt_gets_depends_on_its_place_but_not_on_the_others(overflow):
    """Also drawn at random: a place has a seed of its own, and here other neighbours."""
    config, params = lively_case(n_layer=1, position="rope")
    sampler, prompts = Sampler(config).load(params), random_prompts(1, 6, 8, 12)
    sampling = SamplingParams(repetition_penalty=1.3, top_p=0.9)
    run = partial(generate, sampler, max_new_tokens=25, params=sampling, overflow=overflow)
    texts = run(prompts)
    for place, prompt in enumerate(prompts):
        others = random_prompts(5, 3, 1, 2)
        others[place] = prompt
        assert run(others)[place] == texts[place], place
    assert len({tuple(text) for text in run(4 * [[0, 1]])}) == 4


@each_overflow
def test_padding_is_never_seen(overflow, monkeypatch):
    """Garbage after the end of each prompt changes no token."""
    config, params = lively_case(n_layer=1)
    run = partial(generate, Sampler(config).load(params), random_prompts(1, 5, 2))
    clean, initial_state = run(max_new_tokens=20, overflow=overflow), sample.initial_state
    filled = []

    def with_garbage(*args):
        state = initial_state(*args)
        is_padding = np.arange(state.tokens_BS.shape[1]) >= state.lengths_B[:, None]
        filled.append(is_padding.sum())
        return dataclasses.replace(state, tokens_BS=np.where(is_padding, 42, state.tokens_BS))

    monkeypatch.setattr(sample, "initial_state", with_garbage)
    assert run(max_new_tokens=20, overflow=overflow) == clean
    assert filled[0] > 0


# ---- a user's own model ----------------------------------------------------------------------


class Bigram(nnx.Module):
    """A model without a cache: the embedding of each token, and a linear output map."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embed = nnx.Embed(config.vocab_size, config.n_embd, rngs=rngs)
        self.head = nnx.Linear(2 * config.n_embd, config.vocab_size, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = self.embed(tokens_BT)
        mean_BTD = x_BTD.cumsum(1) / jnp.arange(1, x_BTD.shape[1] + 1)[:, None]
        return self.head(jnp.concatenate([x_BTD, mean_BTD], axis=-1))


class BigramConfig(Config):
    def make_model(self, rngs: nnx.Rngs) -> nnx.Module:
        return Bigram(self, rngs)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
@each_overflow
def test_a_model_without_a_cache_is_sampled_as_numpy_samples_it(overflow, penalty):
    config = BigramConfig(vocab_size=65, block_size=8, n_embd=16, n_head=2, dtype="float32")
    params = nnx.to_pure_dict(nnx.split(Bigram(config, nnx.Rngs(0)))[1])
    prompts = random_prompts(1, 5, 8, 12)
    got = generate(
        Sampler(config).load(params),
        prompts,
        max_new_tokens=25,
        params=SamplingParams(temperature=0, repetition_penalty=penalty),
        overflow=overflow,
    )
    embed, head = np.array(params["embed"]["embedding"]), jax.tree.map(np.array, params["head"])
    for prompt, text in zip(prompts, got, strict=True):
        said = list(prompt)
        for _ in range(25):
            x_TD = embed[said[-8:]]
            logits = np.concatenate([x_TD[-1], x_TD.mean(0)]) @ head["kernel"] + head["bias"]
            for token in set(said):
                logits[token] *= 1 / penalty if logits[token] > 0 else penalty
            said.append(int(logits.argmax()))
        assert text == said[len(prompt) :]


# ---- what is drawn ---------------------------------------------------------------------------

DRAWS = 10_000
LOGITS = np.random.default_rng(3).permutation(np.linspace(-1.1, 0.9, 12))
SEEN = np.arange(12) % 3 == 0


def draw_often(logits, sampling: SamplingParams, seen=None, draws: int = DRAWS) -> np.ndarray:
    """How often each id is drawn from logits that are padded to 128."""
    pad = partial(np.pad, pad_width=(0, 128 - len(logits)))
    logits_BV = jnp.tile(pad(logits, constant_values=-np.inf), (draws, 1))
    seen_BV = None if seen is None else jnp.tile(pad(seen), (draws, 1))
    chance_B = 1 - jax.random.uniform(jax.random.key(0), (draws,))
    return np.bincount(sample_token(logits_BV, chance_B, sampling, seen_BV), minlength=128)


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()


def probabilities(logits: np.ndarray, sampling: SamplingParams, seen: np.ndarray | None) -> np.ndarray:
    """What each token's probability is to be: one filter after the other, one token at a time."""
    logits = logits.copy()
    for token in np.flatnonzero(seen) if seen is not None else ():
        if logits[token] > 0:
            logits[token] /= sampling.repetition_penalty
        else:
            logits[token] *= sampling.repetition_penalty
    probs = softmax(logits / sampling.temperature)
    ranked = [int(token) for token in np.argsort(-probs)]
    ranked = [token for token in ranked if probs[token] >= sampling.min_p * probs[ranked[0]]]
    ranked = ranked[: sampling.top_k or None]
    nucleus, total = [], sum(probs[ranked])
    for token in ranked:
        nucleus.append(token)
        if sum(probs[nucleus]) >= sampling.top_p * total:
            break
    kept = np.zeros(len(probs))
    kept[nucleus] = probs[nucleus] / sum(probs[nucleus])
    return kept


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, 12),
        ({"temperature": 0.6}, 12),
        ({"temperature": 1.7}, 12),
        ({"top_k": 1}, 1),
        ({"top_k": 5}, 5),
        ({"top_k": 11, "temperature": 1.3}, 11),
        ({"top_k": 200}, 12),
        ({"top_p": 0.0}, 1),
        ({"top_p": 0.1}, 1),
        ({"top_p": 0.5}, 4),
        ({"top_p": 0.97}, 11),
        ({"min_p": 0.3}, 7),
        ({"min_p": 0.99}, 1),
        ({"repetition_penalty": 1.8}, 12),
        ({"repetition_penalty": 3.0, "top_k": 6}, 6),
        ({"top_k": 6, "top_p": 0.7}, 4),
        ({"temperature": 0.7, "min_p": 0.2, "top_k": 6, "top_p": 0.9}, 5),
        ({"temperature": 1.5, "min_p": 0.3, "top_p": 0.8, "repetition_penalty": 1.5}, 9),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_plain_filters_say(options, left):
    sampling = SamplingParams(**options)
    seen = SEEN if sampling.repetition_penalty != 1 else None
    want = DRAWS * np.pad(probabilities(LOGITS, sampling, seen), (0, 116))
    got = draw_often(LOGITS, sampling, seen)
    assert np.count_nonzero(want) == left  # the case is about what it seems to be about
    np.testing.assert_array_equal(got > 0, want > 0)
    chi_square = ((got - want) ** 2 / np.maximum(want, 1)).sum()
    assert chi_square < left + 5 * np.sqrt(2 * left)


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.7}], ids=str)
def test_the_least_and_the_greatest_chance_draw_what_may_be_drawn(filters):
    logits_V = jnp.pad(LOGITS, (60, 56), constant_values=-jnp.inf)
    chance_B = jnp.array([2.0**-24, 1 - 2.0**-24, 1])
    drawn = sample_token(jnp.tile(logits_V, (3, 1)), chance_B, SamplingParams(**filters), None)
    assert np.isfinite(logits_V[drawn]).all()


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1e-38, 1e-300])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5, "top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_without_temperature_the_likeliest_token_is_drawn(temperature, filters):
    for shift in (-100, 0, 100):
        sampling = SamplingParams(temperature=temperature, **filters)
        assert draw_often(LOGITS + shift, sampling, draws=99)[LOGITS.argmax()] == 99


def test_the_penalty_counts_without_temperature_too():
    second, best = np.argsort(LOGITS)[-2:]
    for penalty in (9.0, 1e300):
        sampling = SamplingParams(temperature=0, repetition_penalty=penalty)
        assert draw_often(LOGITS, sampling, np.arange(12) == best, draws=9)[second] == 9
        assert draw_often(LOGITS, sampling, np.arange(12) == second, draws=9)[best] == 9


@pytest.mark.parametrize("temperature", [1e6, 1e38, 1e300])
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 200}, {"top_k": 65}, {"top_p": 1 - 1e-6}, {"min_p": 1e-9}], ids=str
)
def test_padded_ids_are_never_drawn(temperature, filters):
    logits = np.random.default_rng(0).standard_normal(65) - 50
    got = draw_often(logits, SamplingParams(temperature=temperature, **filters), draws=2000)
    assert got[65:].sum() == 0
    assert np.all(got[:65] > 0)


# ---- seeds -----------------------------------------------------------------------------------


@cache
def small_sampler() -> Sampler:
    config, params = lively_case(n_layer=1)
    return Sampler(config).load(params)


@pytest.fixture
def sampler() -> Sampler:
    return small_sampler()


def test_the_seed_decides(sampler):
    run = partial(generate, sampler, [[1, 2], [1, 2]], max_new_tokens=15)
    first, again, other = run(seed=5), run(seed=5), run(seed=6)
    assert first == again
    assert first[0] != first[1]
    assert not {tuple(t) for t in first} & {tuple(t) for t in other}


def test_draws_are_independent_of_each_other():
    """Where all five tokens are equally likely, so are all pairs of neighbours."""
    config, params = make_case(n_layer=0, vocab_size=5, block_size=1000, tie_embeddings=False)
    params["lm_head"] = {"kernel": np.zeros_like(params["lm_head"]["kernel"])}
    texts = generate(Sampler(config).load(params), [[0]] * 4, max_new_tokens=999)
    tokens = np.array(texts)
    for first, second in (tokens[:, :-1], tokens[:, 1:]), (tokens[:-1], tokens[1:]):
        pairs = np.bincount((5 * first + second).ravel(), minlength=25)
        expected = first.size / 25
        assert ((pairs - expected) ** 2 / expected).sum() < 24 + 5 * np.sqrt(2 * 24)


@each_overflow
def test_a_sample_does_not_depend_on_how_many_there_are(sampler, overflow):
    run = partial(generate, sampler, max_new_tokens=30, overflow=overflow)
    texts = run(5 * [[1, 2, 3]])
    for count in (1, 2):
        assert run(count * [[1, 2, 3]]) == texts[:count]


@each_overflow
def test_a_shorter_text_is_the_beginning_of_a_longer_one(sampler, overflow):
    run = partial(generate, sampler, [[1, 2, 3], [4]], overflow=overflow)
    texts = run(max_new_tokens=45)
    for length in (1, 5, 6, 19, 20, 21, 40):
        assert run(max_new_tokens=length) == [text[:length] for text in texts]


@each_overflow
def test_the_chunk_size_changes_nothing(monkeypatch, overflow):
    config, params = lively_case(n_layer=1)
    sampling, texts = SamplingParams(top_k=9, repetition_penalty=1.2), []
    for chunk in (1, 3, 20, 64):
        monkeypatch.setattr(sample, "CHUNK", chunk)
        texts.append(
            generate(
                Sampler(config).load(params),
                random_prompts(2, 7),
                max_new_tokens=30,
                params=sampling,
                overflow=overflow,
            )
        )
    assert all(text == texts[0] for text in texts)


# ---- chunks, and how often it compiles -------------------------------------------------------


@settings(max_examples=25)
@given(
    ends=st.lists(st.integers(0, 4), min_size=3, max_size=3),
    new=st.integers(1, 50),
    overflow=st.sampled_from(["truncate", "slide"]),
)
def test_clearing_an_entry_of_active_ends_that_sequence_alone(ends, new, overflow):
    """Row r is cleared after its chunk number ends[r], or before the first one for 0."""
    sampler, prompts = small_sampler(), [np.array([1, 2])] * 3
    options = {"max_new_tokens": new, "overflow": overflow, "seed": 3}
    active, chunks = np.array(ends) > 0, []
    for number, chunk in enumerate(sampler.generate(prompts, active=active, **options), 1):
        assert chunk.shape == (3, sample.CHUNK)
        chunks.append(chunk)
        active &= np.array(ends) > number
    num_generated, whole = sampler.num_generated, list(sampler.generate(prompts, **options))
    chunks, drawn = np.array(chunks), 0
    for row, end in enumerate(ends):
        for number, want in enumerate(whole):
            if number >= end:
                want = np.full_like(want, NO_TOKEN)
            if number < len(chunks):
                np.testing.assert_array_equal(chunks[number, row], want[row])
                drawn += (want[row] != NO_TOKEN).sum()
    assert num_generated == drawn
    assert len(chunks) == min(len(whole), max(ends))  # no chunk once every sequence has ended


def test_the_device_is_one_chunk_ahead_and_no_more(monkeypatch):
    launched, sampler = [], small_sampler()
    decode_uncached = sampler.decode_uncached

    def spy(*args):
        launched.append(args)
        return decode_uncached(*args)

    monkeypatch.setattr(sampler, "decode_uncached", spy)
    texts = sampler.generate([np.arange(9)], max_new_tokens=100, overflow="slide")
    next(texts)
    first = len(launched)
    next(texts)
    assert len(launched) == first + 1


@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(repetition_penalty=1.5)], ids=str
)
@pytest.mark.parametrize("placed", [False, True])
def test_it_compiles_once_for_a_bucket_of_prompt_lengths(placed, sampling):
    """Also where the parameters are bound to a device, as those of a checkpoint are."""
    config, params = lively_case(block_size=64, n_layer=1)
    if placed:
        spec = jax.sharding.PartitionSpec()
        params = jax.device_put(params, jax.sharding.NamedSharding(local_mesh(), spec))
    sampler = Sampler(config).load(params)
    compiled = lambda: [f._cache_size() for f in (sampler.prefill, sampler.decode_chunk)]
    run = partial(generate, sampler, params=sampling)
    for lengths, new in [((5, 9), 1), ((6, 5), 20), ((7, 1), 50), ((8, 8), 21)]:
        run(random_prompts(*lengths), max_new_tokens=new, seed=new)
        assert compiled() == [1, 1], (lengths, new)
    run(random_prompts(4, 3), max_new_tokens=5)
    assert compiled() == [2, 1]
    for new in (100, 150):
        run(random_prompts(8, 5), max_new_tokens=new, overflow="slide")
        assert [sampler.decode_uncached._cache_size(), compiled()[1]] == [1, 1]


@pytest.mark.parametrize("options", [{}, MODERN | {"sliding_window": 150}], ids=str)
def test_buckets_of_the_past_change_no_token(options, monkeypatch):
    config, params = lively_case(**options | {"block_size": 520, "n_layer": 1})
    run = partial(generate, prompts=random_prompts(1, 117), max_new_tokens=250)
    bucketed = Sampler(config).load(params)
    texts = run(bucketed)
    assert bucketed.decode_chunk._cache_size() == 3
    monkeypatch.setattr(decode, "kv_len", lambda lengths, block_size: block_size)
    assert run(Sampler(config).load(params)) == texts


@given(st.integers(1, 2000), st.data())
def test_buckets_of_lengths_are_wide_enough_and_few(block_size, data):
    length = data.draw(st.integers(1, block_size))
    past, prompt = (
        {bucket(np.array([1, n]), block_size) for n in (length, *range(1, block_size + 1))}
        for bucket in (decode.kv_len, decode.prefill_len)
    )
    assert len(past) <= 4
    assert len(prompt) <= 2 + block_size.bit_length()
    for bucket in (decode.kv_len, decode.prefill_len):
        assert length - 1 <= bucket(np.array([1, length]), block_size) <= block_size


# ---- text, as it comes -----------------------------------------------------------------------


def until_stop(text: str, stops: tuple[str, ...]) -> str:
    """Reads on, one character at a time, until a stop string has been read."""
    for read in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:read].endswith(stop)]
        if ended:
            return text[: read - max(map(len, ended))]
    return text


def push_all(stream: TextStream, ids: list[int], cuts: list[int]):
    """-> ids so far and all that was shown, after each piece; ends where the stream stops."""
    shown = ""
    for end in [*sorted({cut % (len(ids) + 1) for cut in cuts}), len(ids)]:
        shown += stream.push(ids[:end], last=False)
        yield ids[:end], shown
        if stream.stopped:
            return
    yield ids, shown + stream.push(ids, last=True)


CUTS = st.lists(st.integers(0, 1000), max_size=12)


@given(
    st.text("ab.", max_size=20),
    st.lists(st.text("ab.", min_size=1, max_size=5), max_size=3).map(tuple),
    CUTS,
)
@example("xab", ("abc", "b"), [2])
@example("aabaab.", ("aab.",), [1, 2, 3, 4, 5, 6])
def test_text_ends_before_a_stop_string_however_it_comes_in(text, stops, cuts):
    """And what is held back on the way is the beginning of one."""
    tokenizer = CharTokenizer("ab.cx")
    stream = TextStream(tokenizer, stops)
    for ids, shown in push_all(stream, tokenizer.encode(text).tolist(), cuts):
        so_far = until_stop(tokenizer.decode(ids), stops)
        assert so_far.startswith(shown)
        held = so_far[len(shown) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)
    assert shown == until_stop(text, stops)
    assert stream.stopped == any(stop in text for stop in stops)


@given(st.text("aé€😀", max_size=8), CUTS)
def test_half_a_character_is_held_back_and_a_whole_one_is_not(text, cuts):
    tokenizer = ByteTokenizer()
    for ids, shown in push_all(TextStream(tokenizer), tokenizer.encode(text).tolist(), cuts):
        assert shown == bytes(ids).decode(errors="ignore")
    assert shown == text


@given(st.text("aé€\x80", max_size=10), st.lists(st.text("aé€", min_size=1), max_size=2), CUTS)
@example("aé", ["aé"], [2])
@example("a€aé", ["aé"], [3, 5, 6])
def test_stop_strings_end_the_text_of_bytes_too(text, stops, cuts):
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer, tuple(stops))
    for _, shown in push_all(stream, tokenizer.encode(text).tolist(), cuts):
        assert until_stop(text, tuple(stops)).startswith(shown)
    assert shown == until_stop(text, tuple(stops))


@given(st.binary(max_size=12), CUTS)
@example(b"\xe2\x82", [1])
@example(b"\xff\xe2\x82A", [1, 2, 3])
def test_pieces_make_up_the_text_whatever_the_bytes(ids, cuts):
    for _, shown in push_all(TextStream(ByteTokenizer()), list(ids), cuts):
        assert ids.decode(errors="replace").startswith(shown)
    assert shown == ids.decode(errors="replace")


# ---- models whose text is known --------------------------------------------------------------


def cyclic_case(ids: list[int], vocab_size: int, **options) -> tuple[Config, dict]:
    """A bigram model that says these tokens, each of them different, round and round."""
    config = Config(
        vocab_size=vocab_size,
        block_size=8,
        n_layer=0,
        n_head=1,
        n_embd=len(ids),
        position="none",
        norm="rmsnorm",
        bias=False,
        tie_embeddings=False,
        **{"dtype": "float32"} | options,
    )
    rows = np.zeros((config.padded_vocab_size, len(ids)), np.float32)
    rows[ids] = np.eye(len(ids))
    nexts = np.zeros_like(rows)
    nexts[np.roll(ids, -1)] = np.eye(len(ids))
    scale = {"scale": np.ones(len(ids), np.float32)}
    return config, {"embed": {"kernel": rows}, "lm_head": {"kernel": nexts}, "ln_f": scale}


LETTERS = CharTokenizer("\nabcdefgh")
SIXTY_FIVE = CharTokenizer("".join(map(chr, range(48, 48 + 65))))


@pytest.fixture(scope="module")
def alphabet() -> Sampler:
    """Says abcdefgh and a line break, over and over."""
    config, params = cyclic_case(LETTERS.encode("abcdefgh\n").tolist(), LETTERS.vocab_size)
    return Sampler(config).load(params)


def say(sampler: Sampler, tokenizer, prompts: list[str], new: int, **options) -> list[str]:
    pieces = list(generate_text(sampler, tokenizer, prompts, new, params=GREEDY, **options))
    assert all(len(piece) == len(prompts) for piece in pieces)
    return ["".join(of_prompt) for of_prompt in zip(*pieces, strict=True)]


def test_text_goes_on_from_each_prompt(alphabet):
    assert say(alphabet, LETTERS, ["a", "hgf", "\n"], 12) == [
        "bcdefgh\nabcd",
        "gh\nabcdefgh\n",
        "abcdefgh\nabc",
    ]


@pytest.mark.parametrize("chunk", [1, 3, 6, 20])
def test_a_stop_string_ends_the_text(chunk, monkeypatch):
    monkeypatch.setattr(sample, "CHUNK", chunk)
    config, params = cyclic_case(LETTERS.encode("abcdefgh\n").tolist(), LETTERS.vocab_size)
    run = partial(say, Sampler(config).load(params), LETTERS, ["a", "\na"], 12)
    for stop, want in {
        ("h",): "bcdefg",
        ("efgh", "d"): "bc",
        ("h\nab",): "bcdefg",  # over the end of a chunk of three, and of six
        ("ag", "h\na", "gh\nabc"): "bcdefg",
        ("bcdefgh\nabcd",): "",
        ("abcde", "ba"): "bcdefgh\nabcd",  # begun, and let go at the end
    }.items():
        assert run(stop=stop) == [want, want]


def test_a_sequence_that_stopped_draws_no_more(alphabet):
    texts = say(alphabet, LETTERS, ["a", "g"], 100, stop=("defgh", "fe"))
    assert texts == ["bc", "h\nabc"]
    assert alphabet.num_generated <= 2 * sample.CHUNK


def test_characters_of_several_tokens_come_whole():
    config, params = cyclic_case(list("aé😀".encode()), 256)
    sampler = Sampler(config).load(params)
    assert say(sampler, ByteTokenizer(), ["a"], 13) == ["é😀aé😀"]
    assert say(sampler, ByteTokenizer(), ["a"], 12) == ["é😀aé\ufffd"]
    assert say(sampler, ByteTokenizer(), ["a"], 13, stop=("é😀a",)) == [""]


@pytest.mark.parametrize(
    ("prompts", "stop", "message"),
    [
        (["a", "bZaY"], (), "'YZ'"),
        (["a", ""], (), "start=''"),
        (["a"], ("b", ""), "stop=''"),
    ],
)
def test_prompts_that_cannot_be_are_refused_before_anything_runs(alphabet, prompts, stop, message):
    with pytest.raises(UserError, match=message):
        generate_text(alphabet, LETTERS, prompts, 10, stop=stop)


# ---- the command -----------------------------------------------------------------------------

RULE = "-" * 15 + "\n"
ROOT = Path(__file__).parent.parent


def write_run(folder: Path, config: Config, steps: dict[int, dict], tokenizer, best=None) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    checkpoints = Checkpoints(folder / "checkpoints", keep=5)
    for step, params in steps.items():
        checkpoints.save({"params": params}, {"step": step}, best=step == best)
        checkpoints.wait()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """letters: forwards at step 10, its best, backwards at 20; bytes: with control characters."""
    folder = tmp_path_factory.mktemp("runs")
    ids = LETTERS.encode("abcdefgh\n").tolist()
    config, forwards = cyclic_case(ids, LETTERS.vocab_size)
    _, backwards = cyclic_case(ids[::-1], LETTERS.vocab_size)
    steps = {10: forwards, 20: backwards}
    write_run(folder / "letters", config, steps, LETTERS, best=10)
    write_run(folder / "no_best", config, steps, LETTERS)
    write_run(folder / "untrained", config, {}, LETTERS)
    write_run(folder / "encoder", config.replace(causal=False), steps, LETTERS)
    write_run(folder / "float64", config.replace(dtype="float64"), steps, LETTERS, best=10)
    config, params = lively_case(n_layer=0)
    write_run(folder / "random", config, {1: params}, SIXTY_FIVE)
    config, params = cyclic_case(list("a\x1b[é\x07\r\n\t".encode()), 256)
    write_run(folder / "bytes", config, {1: params}, ByteTokenizer())
    return folder


@pytest.fixture
def command(runs, capsys, monkeypatch):
    """Runs the command in this process -> its exit code, stdout and stderr."""
    monkeypatch.chdir(runs)

    def run(*argv: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.run(cli.sample, [*argv])
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    yield run
    jax.config.update("jax_enable_x64", False)


KNOBS = vars(SamplingParams()).keys()
SHORT = ("--temperature=0", "--max_new_tokens=5", "--num_samples=1")


def test_every_sample_of_every_prompt_is_printed_after_it(command):
    starts = ("--start=a", "--start=hg")
    code, out, err = command("--out_dir=letters", *SHORT, *starts, "--num_samples=2")
    want = ["abcdef\n", "abcdef\n", "hgh\nabc\n", "hgh\nabc\n"]
    assert (code, out) == (0, "".join(text + RULE for text in want))
    assert err.startswith("letters, step 10, float32\n")
    assert "tokens/s" in err


def test_a_prompt_is_a_line_break_or_what_a_file_says(command, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"f\ng")
    code, out, _ = command("--out_dir=letters", *SHORT)
    assert (code, out) == (0, "\nabcde\n" + RULE)
    code, out, _ = command("--out_dir=letters", *SHORT, f"--start=FILE:{file}", "--start=b")
    assert (code, out) == (0, "f\ngh\nabc\n" + RULE + "bcdefg\n" + RULE)


def test_stop_strings_end_a_sample(command):
    stops = ("--stop=d", "--stop=gh\n")
    code, out, _ = command("--out_dir=letters", *SHORT, *stops, "--start=a", "--start=e")
    assert (code, out) == (0, "abc\n" + RULE + "ef\n" + RULE)


@pytest.mark.parametrize(
    ("run", "checkpoint", "step", "text"),
    [
        ("letters", "best", 10, "cdefgh"),
        ("letters", "latest", 20, "cba\nhg"),
        ("letters", "10", 10, "cdefgh"),
        ("letters", "20", 20, "cba\nhg"),
        ("no_best", "best", 20, "cba\nhg"),
    ],
)
def test_a_checkpoint_is_named_or_numbered(command, run, checkpoint, step, text):
    argv = (f"--out_dir={run}", *SHORT, "--start=c", f"--checkpoint={checkpoint}")
    code, out, err = command(*argv)
    assert (code, out) == (0, text + "\n" + RULE)
    assert f"step {step}," in err


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 40},
        {
            "temperature": 1.3,
            "top_k": 9,
            "top_p": 0.8,
            "min_p": 0.4,
            "repetition_penalty": 1.4,
            "seed": 5,
            "overflow": "slide",
            "max_new_tokens": 29,
        },
    ],
    ids=str,
)
def test_options_mean_what_they_mean_in_the_library(command, options):
    flags = [f"--{key}={value}" for key, value in options.items()]
    code, out, _ = command("--out_dir=random", "--start=abc", "--num_samples=2", *flags)
    config, params = lively_case(n_layer=0)
    sampler = Sampler(config).load(params)
    sampling = {"temperature": 0.8, "top_k": 200} | {k: options[k] for k in KNOBS & options.keys()}
    rest = {k: options[k] for k in options.keys() - KNOBS}
    pieces = generate_text(sampler, SIXTY_FIVE, ["abc"] * 2, params=SamplingParams(**sampling), **rest)
    texts = ["".join(of_sample) for of_sample in zip(*pieces, strict=True)]
    assert (code, out) == (0, "".join(f"abc{text}\n{RULE}" for text in texts))


def test_a_float64_run_is_sampled_as_such(command):
    code, out, err = command("--out_dir=float64", *SHORT, "--start=c")
    assert (code, out) == (0, "cdefgh\n" + RULE)
    assert "step 10, float64" in err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("run", ["letters", "float64"])
def test_a_run_is_sampled_in_any_type(command, run, dtype):
    code, out, err = command(f"--out_dir={run}", *SHORT, "--start=c", f"--dtype={dtype}")
    assert (code, out) == (0, "cdefgh\n" + RULE)
    assert err.startswith(f"{run}, step 10, {dtype}\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out_dir=nowhere"], "nowhere"),
        (["--out_dir=untrained"], "no checkpoint"),
        (["--out_dir=letters", "--checkpoint=15"], "best, latest, 10, 20"),
        (["--out_dir=letters", "--checkpoint=newest"], "best, latest, or a step"),
        (["--out_dir=letters", "--start=FILE:nowhere"], "FILE:nowhere"),
        (["--out_dir=letters", "--start=FILE:letters"], "FILE:letters"),
        (["--out_dir=letters", "--temperature=nan"], "temperature=nan"),
        (["--out_dir=encoder"], "causal=False"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line(command, argv, message):
    code, out, err = command(*argv)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--start=a", "--start=aZ"], "'Z'"), (["--start="], "start=''"), (["--stop="], "stop=''")],
    ids=str,
)
def test_nothing_is_printed_before_a_prompt_is_refused(command, argv, message):
    code, out, err = command("--out_dir=letters", *argv)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize("end", ["", "\n", "\nb\n"], ids=["EOF", "empty line", "empty line first"])
def test_prompts_are_asked_for_until_there_are_no_more(command, monkeypatch, end):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nZ\nfgh\n" + end))
    code, out, err = command("--out_dir=letters", *SHORT, "--interactive")
    last = "" if end else "\n"
    want = f"> abcdef\n{RULE}> > fgh\nabcd\n{RULE}> {last}"
    assert (code, out) == (0, want)
    assert err.count("error: no token for 'Z'") == 1
    assert "Traceback" not in err


def start_script(*argv: str, stdout: int) -> subprocess.Popen:
    command = [sys.executable, ROOT / "sample.py", *argv]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=-1)


CONTROLS = (*SHORT, "--num_samples=2", "--start=a\x1b")


def test_a_terminal_gets_control_characters_spelled_out(runs):
    ours, terminals = pty.openpty()
    process = start_script(f"--out_dir={runs / 'bytes'}", *CONTROLS, stdout=terminals)
    os.close(terminals)
    shown = b""
    while piece := read_terminal(ours):
        shown += piece
    os.close(ours)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert shown.decode().replace("\r\n", "\n") == 2 * ("a\\x1b[é\\x07\\r\n" + RULE)


def test_what_is_not_a_terminal_gets_them_as_they_are(command):
    code, out, _ = command("--out_dir=bytes", *CONTROLS)
    assert (code, out) == (0, 2 * ("a\x1b[é\x07\r\n" + RULE))


def read_terminal(file: int) -> bytes:
    """What there is to read; nothing at the end, which Linux reports as an error."""
    try:
        return os.read(file, 4096)
    except OSError:
        return b""


def test_the_script_ends_with_code_2_and_one_line():
    process = start_script("--out_dir=nowhere", stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count(b"\n")) == (2, b"", 1)
    assert err.startswith(b"error: out_dir='nowhere'")
