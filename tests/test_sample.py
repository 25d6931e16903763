"""Test the sampler against NumPy: logits, draws and streamed text."""

import dataclasses
import io
import os
import pty
import subprocess
import sys
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import ROOT, exit_code, random_params, reference_config, refusal, stacked, write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import numpy_gpt as ref
from reference.options import MODEL_CASES, MODERN

from jaxgpt import model, sample
from jaxgpt.cli import commands as cli
from jaxgpt.config import Config
from jaxgpt.data.text_stream import generate_text
from jaxgpt.data.tokenizer import ByteTokenizer, CharTokenizer
from jaxgpt.kernels import decode, linear
from jaxgpt.runtime.mesh import local_mesh, make_mesh
from jaxgpt.sample import NO_TOKEN, Sampler, SamplingParams, sample_token
from jaxgpt.train_step import abstract_params

GREEDY = SamplingParams(temperature=0)
OVERFLOWS = ["truncate", "slide"]
each_overflow = pytest.mark.parametrize("overflow", OVERFLOWS)


def make_case(**options) -> tuple[Config, dict]:
    """Return a config and random parameters with blocks by number."""
    config = reference_config(**options)
    return config, random_params(config, config.dtype)


def lively_case(**options) -> tuple[Config, dict]:
    """Return a case with larger weights and an untied head, so that greedy text varies."""
    sizes = {"vocab_size": 65, "n_embd": 32, "block_size": 8, "tie_embeddings": False}
    config, params = make_case(**sizes | options)
    is_loud = lambda path: path.endswith("kernel") and path.startswith(("blocks", "pos"))
    flat = {path: p * (1 + is_loud(path)) for path, p in ref.flatten(params).items()}
    return config, ref.unflatten(flat, params)


@cache
def small_sampler() -> Sampler:
    config, params = lively_case(n_layer=1)
    return Sampler(config).load(params)


def random_prompts(*lengths: int, vocab_size: int = 65) -> list[list[int]]:
    rng = np.random.default_rng(2)
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def generate(sampler: Sampler, prompts: list[list[int]], **options) -> list[list[int]]:
    chunks = list(sampler.generate([np.array(p) for p in prompts], **options))
    return [[int(t) for t in row if t != NO_TOKEN] for row in np.concatenate(chunks, axis=1)]


def next_logits(config: Config, params: dict, text: list[int]) -> np.ndarray:
    """Return the reference's logits [V] after a text."""
    return ref.forward({"blocks": {}} | params, np.array([text]), config)[0][0, -1]


def greedy_loop(logits_after, prompt: list[int], new: int, size: int, overflow: str, penalty=1.0):
    """Yield the tokens that `generate` must draw, from one full forward pass per token."""
    text, seen = list(prompt), set(prompt)
    for _ in range(new):
        if overflow == "truncate" and len(text) > size:
            text = text[-min(size, size // 2 + 1) :]
        logits = logits_after(text[-size:])
        for token in seen:
            logits[token] *= 1 / penalty if logits[token] > 0 else penalty
        text.append(int(logits.argmax()))
        seen.add(text[-1])
        yield text[-1]


# ---- logits ----------------------------------------------------------------------------------
@pytest.fixture
def logits(monkeypatch) -> list[np.ndarray]:
    """Collect the logits [B, V] of every draw, with chunks of one token."""
    kept, plain = [], sample.sample_token

    def spy(logits_BV: jax.Array, *rest):
        jax.debug.callback(lambda x: kept.append(np.array(x)), logits_BV, ordered=True)
        return plain(logits_BV, *rest)

    monkeypatch.setattr(sample, "sample_token", spy)
    monkeypatch.setattr(sample, "CHUNK", 1)
    monkeypatch.setattr(decode, "SHARED_READ_BYTES", 0)  # one device, so that draws have an order
    return kept


@pytest.fixture
def x64():
    """Enable 64-bit types in every thread, including threads that run callbacks."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def check_logits(logits: list, params, sampler, sampling=GREEDY, atol=1e-4, lengths=(2, 4)):
    """Compare the logits of all draws of a ragged batch, up to the last cache position."""
    c = sampler.config
    new = c.block_size + 1 - max(lengths)
    prompts = random_prompts(*lengths, vocab_size=c.vocab_size)
    logits.clear()
    texts = generate(sampler, prompts, max_new_tokens=new, sampling=sampling)
    jax.effects_barrier()
    assert [of_all.shape for of_all in logits] == new * [(len(lengths), c.padded_vocab_size)]
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        for n in range(new):
            want = next_logits(c, params, prompt + text[:n])
            np.testing.assert_allclose(logits[n][row], want, rtol=0, atol=atol, err_msg=str(n))
            assert sampling.temperature or text[n] == want.argmax()


@pytest.mark.parametrize("options", [o for o in MODEL_CASES if o.get("causal", True)], ids=str)
def test_cached_decoding_logits_equal_full_forward(options, logits):
    config, params = make_case(**options)
    sampler = Sampler(config).load(params)
    for sampling in (GREEDY, SamplingParams(temperature=3.0)):
        check_logits(logits, params, sampler, sampling)
    for lengths in () if options else ((1,), (2,), (1, 1), (1, 7), (5, 6)):
        check_logits(logits, params, sampler, lengths=lengths)  # of one token, of a whole block


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, MODERN | {"n_layer": 3, "value_residual": True}], ids=str)
def test_sampling_scanned_layers_gives_the_reference_logits(options, logits):
    config, params = make_case(**options)
    sampler = Sampler(config.replace(scan_layers=True)).load(stacked(params))
    check_logits(logits, params, sampler)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [(4,), (2, 4)], ids=["packed", "float32"])
@pytest.mark.parametrize(
    "options", [{}, MODERN, {"tie_embeddings": False, "n_layer": 1}, {"n_layer": 0}], ids=str
)
def test_bfloat16_sampling_on_a_cpu_rounds_only_kernels(options, lengths, logits, monkeypatch):
    monkeypatch.setattr(linear, "PACKED_MIN_BYTES", 0)
    config, params = make_case(**{"n_embd": 32} | options)
    sampler = Sampler(config.replace(dtype="bfloat16")).load(params)
    types = {str(p.dtype) for p in jax.tree.leaves(sampler.single_params)}
    assert types == {"float32", "uint32"}
    flat = ref.flatten(params)
    flat |= {k: p.astype(jnp.bfloat16).astype("f4") for k, p in flat.items() if "kernel" in k}
    check_logits(logits, ref.unflatten(flat, params), sampler, lengths=lengths)


def test_float64_sampling_logits_match_numpy_within_1e_10(logits, x64):
    config, params = make_case(dtype="float64")
    check_logits(logits, params, Sampler(config).load(params), atol=1e-10)


def test_sampling_a_non_causal_model_is_rejected():
    assert "causal=False" in refusal(Sampler, make_case(causal=False)[0])


# ---- parameters and devices ------------------------------------------------------------------
def test_loading_parameters_replaces_earlier_parameters():
    config, params = lively_case()
    other = jax.tree.map(lambda p: -p, params)
    sampler, texts = Sampler(config), []
    for tree in (params, other, params):
        texts += generate(sampler.load(tree), [[1]], max_new_tokens=10, sampling=GREEDY)
    assert texts[0] == texts[2] != texts[1]


def test_sampling_sharded_parameters_gives_the_same_tokens():
    """Training leaves the parameters in such shards."""
    config, params = lively_case(n_layer=1, mesh="data:2,fsdp:2,tensor:2", batch_size=8)
    shardings = jax.tree.map(lambda p: p.sharding, abstract_params(config, make_mesh(config)))
    here, there = (
        generate(Sampler(config).load(tree), [[1], [2, 3]], max_new_tokens=20)
        for tree in (params, jax.device_put(params, shardings))
    )
    assert here == there


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "devices"), [(1, 1), (2, 2), (9, 3), (10, 5), (11, 1), (16, 8)])
def test_sampling_on_several_devices_gives_the_same_tokens(rows, devices, monkeypatch):
    config, params = lively_case(n_layer=1)
    sampler, prompts = Sampler(config).load(params), random_prompts(*range(1, rows + 1))
    run = partial(generate, sampler, prompts, max_new_tokens=20)
    used = []

    def mesh_of(count: int):
        used.append(count)
        return local_mesh(count)

    monkeypatch.setattr(sample, "local_mesh", mesh_of)
    texts = run()
    monkeypatch.setattr(decode, "SHARED_READ_BYTES", 0)  # now the weights count as large
    assert run() == texts
    assert used == [devices, 1]


# ---- texts beyond block_size, and batches ----------------------------------------------------
LIVELY = [
    ({}, 1.0),
    ({"n_layer": 1}, 2.5),
    ({"block_size": 7, "n_layer": 1, "sliding_window": 3}, 1.0),
    (MODERN | {"n_kv_head": 2, "value_residual": True}, 1.0),
    ({"position": "sinusoidal", "norm_position": "post", "norm": "rmsnorm"}, 1.0),
    ({"block_size": 1, "n_layer": 1}, 1.0),
    ({"block_size": 3, "n_layer": 1, "position": "rope"}, 1.0),
]


@pytest.mark.slow
@each_overflow
@pytest.mark.parametrize(("options", "penalty"), LIVELY, ids=str)
def test_generation_beyond_block_size_equals_a_plain_loop(options, penalty, overflow, monkeypatch):
    """Rows reach block_size within a chunk, at the start, or already in the prompt."""
    monkeypatch.setattr(sample, "CHUNK", 5)
    config, params = lively_case(**options)
    prompts, new = random_prompts(1, 2, 5, 7, 8, 9, 17), 23
    sampling = SamplingParams(temperature=0, repetition_penalty=penalty)
    sampler = Sampler(config).load(params)
    got = generate(sampler, prompts, max_new_tokens=new, sampling=sampling, overflow=overflow)
    logits_after = partial(next_logits, config, params)
    for prompt, text in zip(prompts, got, strict=True):
        want = greedy_loop(logits_after, prompt, new, config.block_size, overflow, penalty)
        assert text == list(want), len(prompt)
    assert config.block_size == 1 or len({token for text in got for token in text}) > 6


@pytest.mark.slow
@each_overflow
def test_sample_depends_on_prompt_and_index_but_not_on_other_prompts(overflow):
    config, params = lively_case(n_layer=1, position="rope")
    sampler, prompts = Sampler(config).load(params), random_prompts(1, 6, 8, 12)
    run = partial(generate, sampler, max_new_tokens=25, overflow=overflow)
    assert run(prompts, sampling=GREEDY) == [run([p], sampling=GREEDY)[0] for p in prompts]
    run = partial(run, sampling=SamplingParams(repetition_penalty=1.3, top_p=0.9))
    texts = run(prompts)
    for index, prompt in enumerate(prompts):
        others = random_prompts(5, 3, 1, 2)
        others[index] = prompt
        assert run(others)[index] == texts[index], index
    assert len({tuple(text) for text in run(4 * [[0, 1]])}) == 4


@each_overflow
def test_prompt_padding_does_not_affect_tokens(overflow, monkeypatch):
    """Garbage after the end of each prompt changes no token."""
    run = partial(generate, small_sampler(), random_prompts(1, 5, 2), max_new_tokens=20)
    clean, initial_state, filled = run(overflow=overflow), sample.initial_state, []

    def with_garbage(*args):
        state = initial_state(*args)
        is_padding = np.arange(state.tokens_BS.shape[1]) >= state.lengths_B[:, None]
        filled.append(is_padding.sum())
        return dataclasses.replace(state, tokens_BS=np.where(is_padding, 42, state.tokens_BS))

    monkeypatch.setattr(sample, "initial_state", with_garbage)
    assert run(overflow=overflow) == clean
    assert filled[0] > 0


# ---- user-defined models ---------------------------------------------------------------------
class MeanModel(nnx.Module):
    """A model without a cache: a linear map of the last token's row and of the mean row so far."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embed = nnx.Embed(config.vocab_size, config.n_embd, rngs=rngs)
        self.head = nnx.Linear(2 * config.n_embd, config.vocab_size, rngs=rngs)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = self.embed(tokens_BT)
        mean_BTD = x_BTD.cumsum(1) / jnp.arange(1, x_BTD.shape[1] + 1)[:, None]
        return self.head(jnp.concatenate([x_BTD, mean_BTD], axis=-1))


class MeanConfig(Config):
    def make_model(self, rngs: nnx.Rngs) -> nnx.Module:
        return MeanModel(self, rngs)


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [1.0, 1.5])
@each_overflow
def test_model_without_a_cache_is_sampled_like_numpy(overflow, penalty):
    config = MeanConfig(vocab_size=65, block_size=8, n_embd=16, n_head=2, dtype="float32")
    params = nnx.to_pure_dict(nnx.split(MeanModel(config, nnx.Rngs(0)))[1])
    prompts, sampler = random_prompts(1, 5, 8, 12), Sampler(config).load(params)
    sampling = SamplingParams(temperature=0, repetition_penalty=penalty)
    got = generate(sampler, prompts, max_new_tokens=25, sampling=sampling, overflow=overflow)
    embed, head = np.array(params["embed"]["embedding"]), jax.tree.map(np.array, params["head"])

    def logits_after(text: list[int]) -> np.ndarray:
        x_TD = embed[text]
        return np.concatenate([x_TD[-1], x_TD.mean(0)]) @ head["kernel"] + head["bias"]

    for prompt, text in zip(prompts, got, strict=True):
        assert text == list(greedy_loop(logits_after, prompt, 25, 8, "slide", penalty))
    assert generate(sampler, prompts, max_new_tokens=25) != got
    narrow = Sampler(config.replace(dtype="bfloat16")).load(params)
    assert len(generate(narrow, [[1]], max_new_tokens=20)[0]) == 20


class ScannedModel(MeanModel):
    """A model that adds one bias per layer to the logits; `scan_layers` stacks the biases."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        shape = (config.n_layer, config.vocab_size) if config.scan_layers else (config.vocab_size,)
        self.bias = nnx.Param(jnp.ones(shape))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        add_layer = lambda logits_BTV, bias_V: (logits_BTV + bias_V, None)
        return jax.lax.scan(add_layer, super().__call__(tokens_BT), self.bias[...])[0]


class ScannedConfig(MeanConfig):
    def make_model(self, rngs: nnx.Rngs) -> nnx.Module:
        return ScannedModel(self, rngs)


def test_model_that_scans_layers_of_its_own_is_sampled():
    keys = {"vocab_size": 65, "block_size": 8, "n_embd": 16, "n_head": 2, "dtype": "float32"}
    texts = []
    for config in MeanConfig(**keys), ScannedConfig(**keys, scan_layers=True):
        sampler = Sampler(config).load(model.init_params(config, jax.random.key(0)))
        texts.append(generate(sampler, [[1], [2, 3]], max_new_tokens=20))
    assert texts[0] == texts[1]


# ---- draws -----------------------------------------------------------------------------------
DRAWS = 10_000
LOGITS = np.random.default_rng(3).permutation(np.linspace(-1.1, 0.9, 12))
SEEN = np.arange(12) % 3 == 0


def draw_often(logits, sampling: SamplingParams, seen=None, draws: int = DRAWS) -> np.ndarray:
    """Count how often each id is drawn from logits that are padded to 128."""
    pad = partial(np.pad, pad_width=(0, 128 - len(logits)))
    logits_BV = jnp.tile(pad(logits, constant_values=-np.inf), (draws, 1))
    seen_BV = None if seen is None else jnp.tile(pad(seen), (draws, 1))
    uniform_B = 1 - jax.random.uniform(jax.random.key(0), (draws,))
    return np.bincount(sample_token(logits_BV, uniform_B, sampling, seen_BV), minlength=128)


def probabilities(logits: np.ndarray, sampling: SamplingParams, seen: np.ndarray | None):
    """Return the expected probability of each token, from one filter after the other."""
    logits = logits.copy()
    for token in np.flatnonzero(seen) if seen is not None else ():
        penalty = sampling.repetition_penalty
        logits[token] *= 1 / penalty if logits[token] > 0 else penalty
    probs = np.exp(logits / sampling.temperature)
    probs /= probs.sum()
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, 12), ({"temperature": 0.6}, 12), ({"temperature": 1.7}, 12),
        ({"top_k": 1}, 1), ({"top_k": 5}, 5), ({"top_k": 200}, 12),
        ({"top_k": 11, "temperature": 1.3}, 11),
        ({"top_p": 0.0}, 1), ({"top_p": 0.1}, 1), ({"top_p": 0.5}, 4), ({"top_p": 0.97}, 11),
        ({"min_p": 0.3}, 7), ({"min_p": 0.99}, 1),
        ({"repetition_penalty": 1.8}, 12), ({"repetition_penalty": 3.0, "top_k": 6}, 6),
        ({"top_k": 6, "top_p": 0.7}, 4),
        ({"temperature": 0.7, "min_p": 0.2, "top_k": 6, "top_p": 0.9}, 5),
        ({"temperature": 1.5, "min_p": 0.3, "top_p": 0.8, "repetition_penalty": 1.5}, 9),
    ],
    ids=str,
)  # fmt: skip
def test_token_frequencies_match_filtered_probabilities(options, left):
    sampling = SamplingParams(**options)
    seen = SEEN if sampling.repetition_penalty != 1 else None
    want = DRAWS * np.pad(probabilities(LOGITS, sampling, seen), (0, 116))
    got = draw_often(LOGITS, sampling, seen)
    assert np.count_nonzero(want) == left  # the case tests what it seems to test
    np.testing.assert_array_equal(got > 0, want > 0)
    chi_square = ((got - want) ** 2 / np.maximum(want, 1)).sum()
    assert chi_square < left + 5 * np.sqrt(2 * left)


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.7}], ids=str)
def test_extreme_uniform_draws_give_possible_tokens(filters):
    logits_V = jnp.pad(LOGITS, (60, 56), constant_values=-jnp.inf)
    uniform_B = jnp.array([2.0**-24, 1 - 2.0**-24, 1])
    drawn = sample_token(jnp.tile(logits_V, (3, 1)), uniform_B, SamplingParams(**filters), None)
    assert np.isfinite(logits_V[drawn]).all()


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1e-38, 1e-300])
@pytest.mark.parametrize("filters", [{}, {"top_k": 5, "top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_zero_or_tiny_temperature_draws_the_most_likely_token(temperature, filters):
    for shift in (-100, 0, 100):
        sampling = SamplingParams(temperature=temperature, **filters)
        assert draw_often(LOGITS + shift, sampling, draws=99)[LOGITS.argmax()] == 99


def test_repetition_penalty_applies_at_temperature_0():
    second, best = np.argsort(LOGITS)[-2:]
    for penalty in (9.0, 1e300):
        sampling = SamplingParams(temperature=0, repetition_penalty=penalty)
        assert draw_often(LOGITS, sampling, np.arange(12) == best, draws=9)[second] == 9
        assert draw_often(LOGITS, sampling, np.arange(12) == second, draws=9)[best] == 9


WEAK = [{}, {"top_k": 200}, {"top_k": 65}, {"top_p": 1 - 1e-6}, {"min_p": 1e-9}]


@pytest.mark.parametrize("temperature", [1e6, 1e38, 1e300])
@pytest.mark.parametrize("filters", WEAK, ids=str)
def test_padded_ids_are_never_drawn(temperature, filters):
    logits = np.random.default_rng(0).standard_normal(65) - 50
    got = draw_often(logits, SamplingParams(temperature=temperature, **filters), draws=2000)
    assert got[65:].sum() == 0
    assert np.all(got[:65] > 0)


def test_chunked_uniform_draws_equal_single_draws():
    keys_B, first_B = jax.random.key_data(jax.random.split(jax.random.key(3), 2)), jnp.array([0, 7])
    got_nB = decode.uniform_draws(keys_B, first_B, 3)
    for n, row in np.ndindex(3, 2):
        assert got_nB[n, row] == decode.uniform_draw(keys_B[row], first_B[row] + n)


def test_neighbouring_draws_are_independent():
    """If all five tokens are equally likely, all pairs of neighbours are equally likely."""
    config, params = make_case(n_layer=0, vocab_size=5, block_size=1000, tie_embeddings=False)
    params["lm_head"] = {"kernel": np.zeros_like(params["lm_head"]["kernel"])}
    tokens = np.array(generate(Sampler(config).load(params), [[0]] * 4, max_new_tokens=999))
    for first, second in (tokens[:, :-1], tokens[:, 1:]), (tokens[:-1], tokens[1:]):
        pairs = np.bincount((5 * first + second).ravel(), minlength=25)
        expected = first.size / 25
        assert ((pairs - expected) ** 2 / expected).sum() < 24 + 5 * np.sqrt(2 * 24)


def test_samples_repeat_for_the_same_seed_and_differ_between_seeds():
    run = partial(generate, small_sampler(), [[1, 2], [1, 2]], max_new_tokens=15)
    first, again, other = run(seed=5), run(seed=5), run(seed=6)
    assert first == again
    assert first[0] != first[1]
    assert not {tuple(t) for t in first} & {tuple(t) for t in other}


@pytest.mark.slow
@each_overflow
def test_tokens_do_not_depend_on_sample_count_length_or_chunk_size(overflow, monkeypatch):
    options = {"sampling": SamplingParams(top_k=9, repetition_penalty=1.2), "overflow": overflow}
    run = partial(generate, small_sampler(), **options)
    prompts = 5 * [[1, 2, 3]]
    texts = run(prompts, max_new_tokens=45)
    for count, new in [(1, 45), (2, 45), (5, 1), (5, 5), (5, 6), (5, 19), (5, 20), (5, 21)]:
        want = [text[:new] for text in texts[:count]]
        assert run(prompts[:count], max_new_tokens=new) == want
    for chunk in (1, 3, 20, 64):
        monkeypatch.setattr(sample, "CHUNK", chunk)
        sampler = Sampler(small_sampler().config).load(small_sampler().params)
        assert generate(sampler, prompts, max_new_tokens=45, **options) == texts


# ---- chunks, the active mask and compilations ------------------------------------------------
@settings(max_examples=25)
@given(st.tuples(*3 * [st.integers(0, 4)]), st.integers(1, 50), st.sampled_from(OVERFLOWS))
def test_clearing_an_active_entry_ends_only_that_sequence(ends, new, overflow):
    """Row r is cleared after chunk number ends[r], or before the first chunk if ends[r] is 0."""
    sampler, prompts = small_sampler(), [np.array([1, 2])] * 3
    run = partial(sampler.generate, prompts, max_new_tokens=new, overflow=overflow, seed=3)
    whole = np.array(list(run()))
    assert sampler.num_generated == (whole != NO_TOKEN).sum() == 3 * new
    active, chunks = np.array(ends) > 0, []
    for chunk in run(active=active):
        chunks.append(chunk)
        active &= np.array(ends) > len(chunks)
    is_ended = np.arange(len(whole))[:, None] >= ends
    want = np.where(is_ended[:, :, None], NO_TOKEN, whole)[: max(ends)]
    np.testing.assert_array_equal(np.array(chunks).reshape(want.shape), want)
    assert sampler.num_generated == (want != NO_TOKEN).sum()


@each_overflow
def test_generation_launches_one_chunk_ahead(overflow, monkeypatch):
    launched, sampler = [], small_sampler()
    for name in ("decode_chunk", "decode_uncached"):
        spy = lambda *args, run=getattr(sampler, name): launched.append(1) or run(*args)
        monkeypatch.setattr(sampler, name, spy)
    texts = sampler.generate([np.arange(9)], max_new_tokens=100, overflow=overflow)
    for number, _ in zip(range(1, 4), texts, strict=False):
        assert len(launched) == number + 1


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [1.0, 1.5])
@pytest.mark.parametrize("placed", [False, True])
def test_one_compiled_program_serves_each_bucket_of_prompt_lengths(placed, penalty):
    """If `placed`, the parameters are committed to a device, like those of a checkpoint."""
    config, params = lively_case(block_size=64, n_layer=1)
    if placed:
        spec = jax.sharding.PartitionSpec()
        params = jax.device_put(params, jax.sharding.NamedSharding(local_mesh(), spec))
    sampler = Sampler(config).load(params)
    programs = [sampler.prefill, sampler.decode_chunk, sampler.decode_uncached]
    compiled = lambda: [program._cache_size() for program in programs]
    run = partial(generate, sampler, sampling=SamplingParams(repetition_penalty=penalty))
    for lengths, new in [((5, 9), 1), ((6, 5), 20), ((7, 1), 50), ((8, 8), 21)]:
        run(random_prompts(*lengths), max_new_tokens=new, seed=new)
        assert compiled() == [1, 1, 0], (lengths, new)
    run(random_prompts(4, 3), max_new_tokens=5)
    assert compiled() == [2, 1, 0]
    for new in (100, 150):
        run(random_prompts(8, 5), max_new_tokens=new, overflow="slide")
        assert compiled() == [2, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, MODERN | {"sliding_window": 150}], ids=str)
def test_cache_length_buckets_do_not_change_tokens(options, monkeypatch):
    config, params = lively_case(**options | {"block_size": 520, "n_layer": 1})
    run = partial(generate, prompts=random_prompts(1, 117), max_new_tokens=250)
    bucketed = Sampler(config).load(params)
    texts = run(bucketed)
    assert bucketed.decode_chunk._cache_size() == 3
    monkeypatch.setattr(decode, "kv_len", lambda lengths, block_size: block_size)
    assert run(Sampler(config).load(params)) == texts


@given(st.integers(1, 2000))
def test_length_buckets_are_sufficient_and_few(block_size):
    for bucket, most in (decode.kv_len, 4), (decode.prefill_len, 2 + block_size.bit_length()):
        widths = [bucket(np.array([1, n]), block_size) for n in range(1, block_size + 1)]
        assert all(n <= width <= block_size for n, width in enumerate(widths))
        assert len(set(widths)) <= most


# ---- models with known text ------------------------------------------------------------------
def cyclic_case(ids: list[int], vocab_size: int, **options) -> tuple[Config, dict]:
    """Return a bigram model that repeats these distinct tokens in a cycle."""
    sizes = {"vocab_size": vocab_size, "block_size": 8, "n_layer": 0, "n_head": 1}
    kinds = {"position": "none", "norm": "rmsnorm", "bias": False, "tie_embeddings": False}
    config = Config(n_embd=len(ids), **sizes | kinds | {"dtype": "float32"} | options)
    rows = np.zeros((config.padded_vocab_size, len(ids)), np.float32)
    rows[ids] = np.eye(len(ids))
    nexts = np.zeros_like(rows)
    nexts[np.roll(ids, -1)] = np.eye(len(ids))
    scale = {"scale": np.ones(len(ids), np.float32)}
    return config, {"embed": {"kernel": rows}, "lm_head": {"kernel": nexts}, "ln_f": scale}


LETTERS = CharTokenizer("\nabcdefgh")
SIXTY_FIVE = CharTokenizer("".join(map(chr, range(48, 48 + 65))))


@pytest.fixture
def alphabet() -> Sampler:
    """Return a sampler that repeats abcdefgh and a line break."""
    config, params = cyclic_case(LETTERS.encode("abcdefgh\n").tolist(), LETTERS.vocab_size)
    return Sampler(config).load(params)


def say(sampler: Sampler, tokenizer, prompts: list[str], new: int, **options) -> list[str]:
    pieces = generate_text(sampler, tokenizer, prompts, new, sampling=GREEDY, **options)
    return [*map("".join, zip(*pieces, strict=True))]


def test_text_continues_each_prompt_until_a_stop_string(alphabet):
    want = ["bcdefgh\nabcd", "gh\nabcdefgh\n", "abcdefgh\nabc"]
    assert say(alphabet, LETTERS, ["a", "hgf", "\n"], 12) == want
    assert say(alphabet, LETTERS, ["a", "g"], 100, stop=("defgh", "fe")) == ["bc", "h\nabc"]
    assert alphabet.num_generated <= 2 * sample.CHUNK  # a sequence that stopped draws no more


@pytest.mark.parametrize("chunk", [1, 3, 6, 20])
def test_stop_string_ends_the_text_for_any_chunk_size(chunk, monkeypatch, alphabet):
    monkeypatch.setattr(sample, "CHUNK", chunk)
    run = partial(say, alphabet, LETTERS, ["a", "\na"], 12)
    assert run(stop=("h",)) == ["bcdefg"] * 2
    assert run(stop=("efgh", "d")) == ["bc"] * 2
    assert run(stop=("h\nab",)) == ["bcdefg"] * 2  # over the end of a chunk of three, and of six
    assert run(stop=("ag", "h\na", "gh\nabc")) == ["bcdefg"] * 2
    assert run(stop=("bcdefgh\nabcd",)) == [""] * 2
    assert run(stop=("abcde", "ba")) == ["bcdefgh\nabcd"] * 2  # incomplete at the end


def test_multi_token_characters_are_decoded_complete():
    config, params = cyclic_case(list("aé😀".encode()), 256)
    run = partial(say, Sampler(config).load(params), ByteTokenizer(), ["a"])
    assert run(13) == ["é😀aé😀"]
    assert run(12) == ["é😀aé\ufffd"]
    assert run(13, stop=("é😀a",)) == [""]


@pytest.mark.parametrize(
    ("prompts", "stop", "message"),
    [(["a", "bZaY"], (), "'YZ'"), (["a", ""], (), "prompt=''"), (["a"], ("b", ""), "stop=''")],
)
def test_invalid_prompt_or_stop_string_is_rejected_before_generation(
    alphabet, prompts, stop, message
):
    assert message in refusal(generate_text, alphabet, LETTERS, prompts, 10, stop=stop)


# ---- the command -----------------------------------------------------------------------------
SEPARATOR = "-" * 15 + "\n"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Write runs; `letters` says the alphabet at step 10 (the best) and reversed at step 20."""
    folder = tmp_path_factory.mktemp("runs")
    write = lambda name, config, *rest: write_run(config.replace(out_dir=f"{folder}/{name}"), *rest)
    ids = LETTERS.encode("abcdefgh\n").tolist()
    config, forwards = cyclic_case(ids, LETTERS.vocab_size)
    _, backwards = cyclic_case(ids[::-1], LETTERS.vocab_size)
    steps = {10: forwards, 20: backwards}
    write("letters", config, steps, LETTERS, 10)
    write("no_best", config, steps, LETTERS)
    write("untrained", config, {}, LETTERS)
    write("encoder", config.replace(causal=False), steps, LETTERS)
    write("float64", config.replace(dtype="float64"), steps, LETTERS, 10)
    config, params = lively_case(n_layer=0)
    write("random", config, {1: params}, SIXTY_FIVE)
    config, params = cyclic_case(list("a\x1b[é\x07\r\n\t".encode()), 256)
    write("bytes", config, {1: params}, ByteTokenizer())
    (folder / "prompt.txt").write_bytes(b"f\ng")
    return folder


@pytest.fixture
def command(runs, capsys, monkeypatch):
    """Yield a function that runs the command and returns exit code, stdout and stderr."""
    monkeypatch.chdir(runs)

    def run(*argv: str) -> tuple[int, str, str]:
        code = exit_code(cli.run, cli.sample, [*argv])
        return code or 0, *capsys.readouterr()

    yield run
    jax.config.update("jax_enable_x64", False)


SHORT = ("--temperature=0", "--max_new_tokens=5")
ONE = "--num_samples=1"
CONTROLS = "--start=a\x1b --num_samples=2"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "argv", "texts", "line"),
    [
        ("letters", "--start=a --start=hg --num_samples=2",
         ["abcdef", "abcdef", "hgh\nabc", "hgh\nabc"], "step 10, float32"),
        ("letters", "", ["\nabcde"], "step 10, float32"),
        ("letters", "--start=FILE:prompt.txt --start=b", ["f\ngh\nabc", "bcdefg"], "step 10"),
        ("letters", "--stop=d --stop=gh\n --start=a --start=e", ["abc", "ef"], "step 10"),
        *(("letters", f"--start=c --checkpoint={step}", ["cdefgh"], "step 10,")
          for step in ("best", 10)),
        *(("letters", f"--start=c --checkpoint={step}", ["cba\nhg"], "step 20,")
          for step in ("latest", 20)),
        ("no_best", "--start=c --checkpoint=best", ["cba\nhg"], "step 20,"),
        ("float64", "--start=c", ["cdefgh"], "step 10, float64"),
        ("bytes", CONTROLS, 2 * ["a\x1b[é\x07\r"], "step 1,"),
        *((run, f"--start=c --dtype={dtype}", ["cdefgh"], f"step 10, {dtype}")
          for run in ("letters", "float64") for dtype in ("float32", "bfloat16", "float64")),
    ],
    ids=str,
)  # fmt: skip
def test_sample_command_prints_prompts_and_continuations(command, run, argv, texts, line):
    few = () if "--num_samples" in argv else (ONE,)
    code, out, err = command(f"--out_dir={run}", *SHORT, *argv.split(" ") * bool(argv), *few)
    assert (code, out) == (0, "".join(f"{text}\n{SEPARATOR}" for text in texts))
    assert err.startswith(f"{run}, {line}")
    assert "tokens/s" in err


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 40},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.4, "repetition_penalty": 1.4,
         "seed": 5, "overflow": "slide", "max_new_tokens": 29},
    ],
    ids=str,
)  # fmt: skip
def test_sample_command_options_match_the_library_parameters(command, options):
    flags = [f"--{key}={value}" for key, value in options.items()]
    code, out, _ = command("--out_dir=random", "--start=abc", "--num_samples=2", *flags)
    config, params = lively_case(n_layer=0)
    names = vars(SamplingParams()).keys()
    sampling = {"temperature": 0.8, "top_k": 200} | {k: options[k] for k in names & options.keys()}
    rest = {k: options[k] for k in options.keys() - names}
    rest["sampling"] = SamplingParams(**sampling)
    pieces = generate_text(Sampler(config).load(params), SIXTY_FIVE, ["abc"] * 2, **rest)
    texts = map("".join, zip(*pieces, strict=True))
    assert (code, out) == (0, "".join(f"abc{text}\n{SEPARATOR}" for text in texts))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--out_dir=untrained", "no checkpoint"),
        ("--out_dir=encoder", "causal=False"),
        ("--out_dir=letters --checkpoint=newest", "best, latest, or a step"),
        ("--out_dir=letters --temperature=nan", "temperature=nan"),
        ("--out_dir=letters --start=a --start=aZ", "'Z'"),
        ("--out_dir=letters --start=", "prompt=''"),
        ("--out_dir=letters --stop=", "stop=''"),
    ],
)
def test_sample_command_errors_are_one_line_without_output(command, argv, message):
    code, out, err = command(*argv.split())
    lines = [line for line in err.splitlines() if line != "letters, step 10, float32"]
    assert (code, out, len(lines)) == (2, "", 1)
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.parametrize("end", ["", "\n", "\nb\n"], ids=["EOF", "empty line", "empty line first"])
def test_interactive_mode_reads_prompts_until_empty_line_or_end_of_input(command, monkeypatch, end):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nZ\nfgh\n" + end))
    code, out, err = command("--out_dir=letters", *SHORT, ONE, "--interactive")
    last = "" if end else "\n"
    assert (code, out) == (0, f"> abcdef\n{SEPARATOR}> > fgh\nabcd\n{SEPARATOR}> {last}")
    assert err.count("error: text: no token for 'Z'") == 1
    assert "Traceback" not in err


def start_script(*argv: str, stdout: int) -> subprocess.Popen:
    command = [sys.executable, ROOT / "sample.py", *argv]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=-1)


def test_sample_script_escapes_control_characters_on_a_terminal(runs):
    ours, terminals = pty.openpty()
    argv = [f"--out_dir={runs / 'bytes'}", *SHORT, *CONTROLS.split(" ")]
    process = start_script(*argv, stdout=terminals)
    os.close(terminals)
    shown = b""
    with suppress(OSError):  # Linux raises OSError at the end of a terminal's output
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert shown.decode().replace("\r\n", "\n") == 2 * ("a\\x1b[é\\x07\\r\n" + SEPARATOR)


def test_sample_script_error_exits_with_code_2_and_one_line():
    process = start_script("--out_dir=nowhere", stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count(b"\n")) == (2, b"", 1)
    assert err.startswith(b"error: out_dir='nowhere'")
