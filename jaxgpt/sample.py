"""Sampling: prefill a KV cache, decode tokens in jitted chunks, stream them to the host.

B sequences, T tokens, S positions of a state's text, V vocabulary (padded), D embedding,
k likeliest tokens, n tokens of a chunk.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt import kernels, model
from jaxgpt.config import Config, UserError
from jaxgpt.kernels import decode
from jaxgpt.kernels.kv_cache import DecodePosition, KVCache, flush_chunk
from jaxgpt.runtime.mesh import local_mesh
from jaxgpt.train_step import cast_params

CHUNK = 16  # tokens per host round trip; a power of two, as most block sizes are
NO_TOKEN = -1  # stands in a chunk where a sequence drew nothing


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn from the logits; the defaults change nothing."""

    temperature: float = 1.0  # divides the logits; 0 takes the likeliest token
    top_k: int = 0  # keep so many of the likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the likeliest tokens up to this probability; Holtzman et al. 2020
    min_p: float = 0.0  # keep this share of the likeliest one's probability; Nguyen et al. 2024
    repetition_penalty: float = 1.0  # divides the odds of tokens seen before; Keskar et al. 2019


def sample_token(logits_BV, uniform_B, params: SamplingParams, seen_BV=None) -> jax.Array:
    """Draws one token id per sequence, int32 [B], by inverse CDF from uniform draws in (0, 1].

    Padded ids have logits of -inf and are never drawn.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if seen_BV is not None:
        penalty = min(params.repetition_penalty, 1e30)  # within float32
        penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV[:, : logits_BV.shape[1]], penalized_BV, logits_BV)
    if params.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV -= logits_BV.max(-1, keepdims=True)
    logits_BV /= min(max(params.temperature, 1e-30), 1e30)
    if params.min_p:
        logits_BV = jnp.where(logits_BV >= math.log(params.min_p), logits_BV, -jnp.inf)
    V = logits_BV.shape[-1]
    k = min(params.top_k or V, V)
    if k == V and params.top_p == 1:  # needs no sort
        return decode.inverse_cdf(jnp.exp(logits_BV), uniform_B)
    values_Bk, ids_Bk = jax.lax.top_k(logits_BV, k)
    probs_Bk = jax.nn.softmax(values_Bk)
    likelier_Bk = probs_Bk.cumsum(-1) - probs_Bk  # the probability of all likelier tokens
    is_kept_Bk = (likelier_Bk < params.top_p).at[:, 0].set(True)
    choice_B = decode.inverse_cdf(jnp.where(is_kept_Bk, probs_Bk, 0), uniform_B)
    return jnp.take_along_axis(ids_Bk, choice_B[:, None], axis=1)[:, 0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What the device holds of each sequence between two chunks, beside the KV cache.

    A text of block_size + 1 tokens is full: `prefill` must truncate it before its next token, or
    `decode_uncached` slide it.
    """

    keys_B: jax.Array  # key data, uint32 [B, 2], from the seed and the sequence's index
    num_drawn_B: jax.Array  # int32; the n-th draw folds n into the key
    seen_BV: jax.Array | None  # bool: in the prompt, or drawn; None without a penalty
    tokens_BS: jax.Array  # int32, the end of each text; S = block_size + CHUNK
    lengths_B: jax.Array  # int32, of each text

    @property
    def block_size(self) -> int:
        return self.tokens_BS.shape[1] - CHUNK


def initial_state(prompts, params: SamplingParams, seed: int, config: Config, longest: int):
    """The state before the first draw; a prompt past the block keeps its last `longest` tokens."""
    B = len(prompts)
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    lengths_B[lengths_B > config.block_size] = longest
    tokens_BS = np.zeros((B, config.block_size + CHUNK), np.int32)
    seen_BV = np.zeros((B, config.padded_vocab_size), bool)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : lengths_B[row]] = prompt[-lengths_B[row] :]
        seen_BV[row, prompt] = True
    keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(B))
    keys_B = jax.random.key_data(keys_B)  # a typed key array would compile everything twice
    seen = seen_BV if params.repetition_penalty != 1 else None
    arrays: Any = keys_B, np.zeros(B, np.int32), seen, tokens_BS, lengths_B
    return DecodeState(*arrays)


def truncated_len(block_size: int) -> int:
    """Tokens that a full text keeps: whole chunks then fill the rest of the block."""
    return min(block_size, block_size // 2 + 1)


def prefill(network: Any, state: DecodeState, length: int) -> tuple[DecodeState, Any]:
    """Truncates full texts and caches the first `length` tokens of each -> state, cached past.

    No query sees the padding of a shorter text; decoding overwrites it before one could.
    """
    size, kept = state.block_size, truncated_len(state.block_size)
    is_full_B = state.lengths_B > size
    cut_BS = jnp.roll(state.tokens_BS, kept - size - 1, axis=1)
    tokens_BS = jnp.where(is_full_B[:, None], cut_BS, state.tokens_BS)
    lengths_B = jnp.where(is_full_B, kept, state.lengths_B)
    cache = network.init_cache(len(lengths_B), CHUNK)
    if length:
        _, cache = network(tokens_BS[:, :length], cache=cache)
    return replace(state, tokens_BS=tokens_BS, lengths_B=lengths_B), [kv.past for kv in cache]


def decode_chunk(network: Any, state: DecodeState, past, active_B, params: SamplingParams, kv_len):
    """Draws CHUNK tokens, or fewer where a text gets full -> state, cached past, tokens [B, n].

    Queries see `kv_len` positions of the past, and the chunk's own, which join it at the end.
    """
    start_B = state.lengths_B - 1
    visible = jax.tree.map(lambda x: x[:, :kv_len], past)
    chunk = [kv.chunk for kv in network.init_cache(len(start_B), CHUNK)]
    last_B = jnp.take_along_axis(state.tokens_BS, start_B[:, None], axis=1)[:, 0]

    def decode_one_token(carry: tuple, inputs: tuple):
        state, chunk, last_B = carry
        number, uniform_B = inputs
        cache, position = list(map(KVCache, visible, chunk)), DecodePosition(start_B, number)
        last_B1 = jnp.maximum(last_B, 0)[:, None]
        logits_B1V, cache = network(last_B1, cache=cache, position=position)
        is_drawing_B = active_B & (state.lengths_B <= state.block_size)
        state, token_B = draw(state, logits_B1V[:, 0], uniform_B, is_drawing_B, params)
        return (state, [kv.chunk for kv in cache], token_B), token_B

    inputs = jnp.arange(CHUNK), decode.uniform_draws(state.keys_B, state.num_drawn_B, CHUNK)
    carry = state, chunk, last_B
    (state, chunk, _), tokens_nB = jax.lax.scan(decode_one_token, carry, inputs)
    write = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))
    tokens_BS = write(state.tokens_BS, jnp.maximum(tokens_nB.T, 0), start_B + 1, 0)
    past = [flush_chunk(cache, start_B) for cache in map(KVCache, past, chunk)]
    return replace(state, tokens_BS=tokens_BS), past, tokens_nB.T


def decode_uncached(network: Any, state: DecodeState, active_B, params: SamplingParams):
    """Draws CHUNK tokens, each by a forward of the last whole block -> state, tokens [B, n]."""

    def decode_one_token(state: DecodeState, uniform_B: jax.Array):
        size = state.block_size
        is_full_B1 = (state.lengths_B > size)[:, None]
        slid_BS = jnp.roll(state.tokens_BS, -1, axis=1)
        tokens_BS = jnp.where(is_full_B1, slid_BS, state.tokens_BS)
        length_B = jnp.minimum(state.lengths_B, size)
        logits_BV = logits_at(network, tokens_BS[:, :size], length_B - 1)
        state = replace(state, lengths_B=length_B)
        state, token_B = draw(state, logits_BV, uniform_B, active_B, params)
        tokens_BS = tokens_BS.at[jnp.arange(len(token_B)), length_B].set(jnp.maximum(token_B, 0))
        return replace(state, tokens_BS=tokens_BS), token_B

    uniform_nB = decode.uniform_draws(state.keys_B, state.num_drawn_B, CHUNK)
    state, tokens_nB = jax.lax.scan(decode_one_token, state, uniform_nB)
    return state, tokens_nB.T


def logits_at(network: Any, tokens_BT: jax.Array, position_B: jax.Array) -> jax.Array:
    """Logits [B, V] of one position per sequence; GPT skips the output map of all others."""
    if hasattr(network, "init_cache"):
        return network(tokens_BT, at_B=position_B)[:, 0]
    return jnp.take_along_axis(network(tokens_BT), position_B[:, None, None], axis=1)[:, 0]


def draw(state: DecodeState, logits_BV, uniform_B, is_drawing_B, params: SamplingParams):
    """Draws where a sequence is drawing, elsewhere NO_TOKEN -> state, token ids int32 [B]."""
    token_B = sample_token(logits_BV, uniform_B, params, state.seen_BV)
    token_B = jnp.where(is_drawing_B, token_B, NO_TOKEN).astype(jnp.int32)
    num_drawn_B = state.num_drawn_B + is_drawing_B
    lengths_B = state.lengths_B + is_drawing_B
    seen_BV = state.seen_BV
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].max(is_drawing_B)
    state = replace(state, num_drawn_B=num_drawn_B, lengths_B=lengths_B, seen_BV=seen_BV)
    return state, token_B


class Sampler:
    """A model ready to sample: `Sampler(config).load(params).generate(prompts, ...)`.

    It compiles per number of prompts, `SamplingParams` and bucket of lengths. A model without
    `init_cache`, called as `model(tokens_BT) -> logits_BTV`, is sampled uncached and slides.
    Raises `UserError` for an encoder.
    """

    def __init__(self, config: Config):
        if not config.causal:
            raise UserError("causal=False: an encoder cannot be sampled; expected causal=True")
        dtype = kernels.compute_dtype(config.dtype)
        self.config = config.replace(remat="none", scan_layers=False, dropout=0.0, dtype=dtype)
        graphdef, shapes, _ = model.abstract_model(self.config)
        self.num_generated = 0  # tokens that the latest `generate` yielded
        self._has_cache = hasattr(nnx.merge(graphdef, shapes), "init_cache")
        self._is_stacked = config.scan_layers and self._has_cache
        cast = jax.jit(cast_params, static_argnums=1)
        pack = jax.jit(lambda params: decode.pack_weights(nnx.merge(graphdef, params)))
        self._weights_for = partial(decode.weights_for, config.dtype, dtype, cast=cast, pack=pack)
        jit = partial(decode.data_parallel_jit, partial(nnx.merge, graphdef))
        self.prefill, self.decode_chunk = jit(prefill), jit(decode_chunk)
        self.decode_uncached = jit(decode_uncached)

    def load(self, params: dict[str, Any]) -> "Sampler":
        """Samples with these parameters from now on; `row_params` decode a single sequence."""
        params = jax.device_put(params, jax.local_devices()[0])
        params = model.unstack_layers(params) if self._is_stacked else params
        self.params, self.row_params = self._weights_for(params)
        self._replicas: dict[Mesh, Any] = {}  # the parameters on several devices
        return self

    def generate(
        self, prompts: list[np.ndarray], *, max_new_tokens: int,
        params: SamplingParams = SamplingParams(), seed: int = 1337, overflow: str = "truncate",
        active: np.ndarray | None = None,
    ) -> Iterator[np.ndarray]:  # fmt: skip
        """Yields chunks of new token ids, int32 [B, n], NO_TOKEN where a sequence drew none.

        A sequence's tokens depend only on its prompt, the seed and its index. Past `block_size`,
        "truncate" goes on from the last half block, which bounds the cost of a token; "slide" runs
        the whole last block per token, as nanoGPT does. `active`, bool [B], is the caller's:
        clearing an entry after any chunk ends that sequence.
        """
        active = np.ones(len(prompts), bool) if active is None else active
        missing_B = np.full(len(prompts), max_new_tokens)
        self.num_generated = 0
        chunks = self._launch(prompts, max_new_tokens, params, seed, overflow, active)
        pending = next(chunks, None)
        while pending is not None:
            following = next(chunks, None)  # the device works on it while the host waits below
            tokens_Bn = np.array(pending)
            tokens_Bn[~active] = NO_TOKEN
            tokens_Bn[np.arange(CHUNK) >= missing_B[:, None]] = NO_TOKEN
            missing_B -= (tokens_Bn != NO_TOKEN).sum(1)
            self.num_generated += int((tokens_Bn != NO_TOKEN).sum())
            yield tokens_Bn
            pending = following if (active & (missing_B > 0)).any() else None

    def _launch(self, prompts, max_new_tokens, params, seed, overflow, active):
        """Launches chunks without a host sync: lengths alone say how many tokens each draws."""
        size = self.config.block_size
        uses_cache = self._has_cache
        truncates = uses_cache and overflow == "truncate"
        mesh, weights = self._replicate(len(prompts))
        row_weights = self.row_params if len(prompts) == 1 else weights
        longest = truncated_len(size) if truncates else size
        state = initial_state(prompts, params, seed, self.config, longest)
        past = None
        lengths_B = np.array(state.lengths_B)
        left_B = np.full(len(prompts), max_new_tokens)
        state = jax.device_put(state, NamedSharding(mesh, PartitionSpec("data")))
        while (active_B := active & (left_B > 0)).any():
            is_full = (lengths_B[active_B] > size).any()
            uses_cache = uses_cache and (truncates or not is_full)
            if uses_cache and (past is None or is_full):
                lengths_B = np.where(lengths_B > size, truncated_len(size), lengths_B)
                length = decode.prefill_len(lengths_B[active_B], size)
                state, past = self.prefill(mesh, (length,), weights, (state,))
            if uses_cache:
                kv_len = decode.kv_len(lengths_B[active_B], size)
                state, past, tokens_Bn = self.decode_chunk(
                    mesh, (params, kv_len), row_weights, (state, past), active_B
                )
                grown_B = np.minimum(lengths_B + CHUNK, size + 1)
            else:
                past = None  # frees its memory
                state, tokens_Bn = self.decode_uncached(
                    mesh, (params,), weights, (state,), active_B
                )
                grown_B = lengths_B + CHUNK
            left_B = left_B - (grown_B - lengths_B)
            lengths_B = grown_B
            yield tokens_Bn

    def _replicate(self, batch: int) -> tuple[Mesh, Any]:
        """The devices that share so many sequences, and the parameters on each of them."""
        most = kernels.max_replicas(self.params)
        mesh = local_mesh(next(n for n in range(most, 0, -1) if batch % n == 0))
        if mesh not in self._replicas:
            whole = NamedSharding(mesh, PartitionSpec())
            self._replicas[mesh] = jax.device_put(self.params, whole)
        return mesh, self._replicas[mesh]
