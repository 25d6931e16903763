"""Sampling: prefill a KV cache, decode tokens in jitted chunks, stream them to the host.

B sequences, T tokens, S = block_size + CHUNK positions of the text that a state holds,
V vocabulary (padded), k likeliest tokens, n tokens per chunk.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt import kernels, model
from jaxgpt.config import (
    Config,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Range,
    UserError,
    check,
    check_value,
)
from jaxgpt.kernels import decode
from jaxgpt.kernels.kv_cache import DecodePosition, KVCache, flush_chunk
from jaxgpt.runtime.mesh import local_mesh
from jaxgpt.train_step import cast_params

CHUNK = 16  # tokens per host round trip; a power of two, to divide most block sizes
NO_TOKEN = -1  # in a chunk, where a sequence drew no token
Overflow = Literal["truncate", "slide"]  # what happens to a text that exceeds `block_size`


@dataclass(frozen=True)
class SamplingParams:
    """How to draw a token from logits. The defaults draw from the model's own distribution.

    Raises `UserError` for a value out of range.
    """

    temperature: NonNegativeFloat = 1.0  # divides the logits; 0 takes the most likely token
    top_k: NonNegativeInt = 0  # keep this many most likely tokens; 0 keeps all
    # Keep the most likely tokens up to this probability (Holtzman et al. 2020).
    top_p: Annotated[float, Range(0, 1)] = 1.0
    min_p: Fraction = 0.0  # minimum ratio to the highest probability; Nguyen et al. 2024
    # Makes tokens seen before less likely (Keskar et al. 2019); 1 changes nothing.
    repetition_penalty: Annotated[float, Range(1)] = 1.0

    __post_init__ = check


def sample_token(logits_BV, uniform_B, sampling: SamplingParams, seen_BV=None) -> jax.Array:
    """Draw one token id per sequence, int32 [B], by inverse CDF from uniform draws in (0, 1].

    Padded ids are never drawn, because their logits are -inf. `seen_BV` marks the tokens that the
    repetition penalty applies to.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if seen_BV is not None:
        penalty = min(sampling.repetition_penalty, 1e30)  # within float32
        penalized_BV = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        V = logits_BV.shape[-1]  # a model of one's own may have no padded ids
        logits_BV = jnp.where(seen_BV[:, :V], penalized_BV, logits_BV)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV -= logits_BV.max(-1, keepdims=True)
    logits_BV /= min(max(sampling.temperature, 1e-30), 1e30)
    if sampling.min_p:
        logits_BV = jnp.where(logits_BV >= math.log(sampling.min_p), logits_BV, -jnp.inf)
    V = logits_BV.shape[-1]
    k = min(sampling.top_k or V, V)
    if k == V and sampling.top_p == 1:  # no sort needed
        return decode.inverse_cdf(jnp.exp(logits_BV), uniform_B)
    values_Bk, ids_Bk = jax.lax.top_k(logits_BV, k)
    probs_Bk = jax.nn.softmax(values_Bk)
    likelier_Bk = probs_Bk.cumsum(-1) - probs_Bk  # the probability of all likelier tokens
    is_kept_Bk = (likelier_Bk < sampling.top_p).at[:, 0].set(True)
    choice_B = decode.inverse_cdf(jnp.where(is_kept_Bk, probs_Bk, 0), uniform_B)
    return jnp.take_along_axis(ids_Bk, choice_B[:, None], axis=1)[:, 0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """The state of each sequence on the device between two chunks, besides the KV cache.

    A text of block_size + 1 tokens is full: before its next token, `prefill` truncates it, or
    `decode_uncached` slides it.
    """

    keys_B2: jax.Array  # random key data, uint32 [B, 2], from the seed and the sequence's index
    num_drawn_B: jax.Array  # int32; draw n uses the key with n folded in
    seen_BV: jax.Array | None  # bool: tokens in the prompt or drawn; None without a penalty
    tokens_BS: jax.Array  # int32, the last tokens of each text
    lengths_B: jax.Array  # int32, tokens of each text in tokens_BS

    @property
    def block_size(self) -> int:
        return self.tokens_BS.shape[1] - CHUNK


def initial_state(prompts, sampling: SamplingParams, seed: int, config: Config, longest: int):
    """Return the state before the first draw.

    A prompt of more than `block_size` tokens keeps its last `longest` tokens.
    """
    B = len(prompts)
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    lengths_B[lengths_B > config.block_size] = longest
    tokens_BS = np.zeros((B, config.block_size + CHUNK), np.int32)
    seen_BV = np.zeros((B, config.padded_vocab_size), bool)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : lengths_B[row]] = prompt[-lengths_B[row] :]
        seen_BV[row, prompt] = True
    keys_B2 = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(B))
    keys_B2 = jax.random.key_data(keys_B2)  # with typed keys, JAX would compile everything twice
    seen = seen_BV if sampling.repetition_penalty != 1 else None
    arrays: Any = keys_B2, np.zeros(B, np.int32), seen, tokens_BS, lengths_B
    return DecodeState(*arrays)


def truncated_len(block_size: int) -> int:
    """Return how many tokens a full text keeps; whole chunks then fill the rest of the block."""
    return min(block_size, block_size // 2 + 1)


def prefill(network: Any, state: DecodeState, length: int) -> tuple[DecodeState, Any]:
    """Truncate full texts and cache the first `length` tokens of each; return state and past.

    Padding after a shorter text is cached too, but decoding overwrites it before a query sees it.
    """
    size, kept = state.block_size, truncated_len(state.block_size)
    is_full_B = state.lengths_B > size
    # a full text has size + 1 tokens, of which the last `kept` move to the front
    cut_BS = jnp.roll(state.tokens_BS, kept - size - 1, axis=1)
    tokens_BS = jnp.where(is_full_B[:, None], cut_BS, state.tokens_BS)
    lengths_B = jnp.where(is_full_B, kept, state.lengths_B)
    cache = network.init_cache(len(lengths_B), CHUNK)
    if length:
        _, cache = network(tokens_BS[:, :length], cache=cache)
    return replace(state, tokens_BS=tokens_BS, lengths_B=lengths_B), [kv.past for kv in cache]


def decode_chunk(
    network: Any, state: DecodeState, past, active_B, sampling: SamplingParams, kv_len
):
    """Draw n = CHUNK tokens per sequence; return state, past and tokens [B, n].

    A sequence draws fewer if its text gets full. Queries attend to `kv_len` positions of the past
    and to the chunk, which is written into the past at the end.
    """
    start_B = state.lengths_B - 1
    visible = jax.tree.map(lambda x: x[:, :kv_len], past)
    chunk = [kv.chunk for kv in network.init_cache(len(start_B), CHUNK)]
    last_B = jnp.take_along_axis(state.tokens_BS, start_B[:, None], axis=1)[:, 0]

    def decode_one_token(carry: tuple, inputs: tuple):
        state, chunk, last_B = carry
        step, uniform_B = inputs
        cache, position = list(map(KVCache, visible, chunk)), DecodePosition(start_B, step)
        last_B1 = jnp.maximum(last_B, 0)[:, None]  # NO_TOKEN is no row of the embedding
        logits_B1V, cache = network(last_B1, cache=cache, position=position)
        is_drawing_B = active_B & (state.lengths_B <= state.block_size)
        state, token_B = draw(state, logits_B1V[:, 0], uniform_B, is_drawing_B, sampling)
        return (state, [kv.chunk for kv in cache], token_B), token_B

    inputs = jnp.arange(CHUNK), decode.uniform_draws(state.keys_B2, state.num_drawn_B, CHUNK)
    carry = state, chunk, last_B
    (state, chunk, _), tokens_nB = jax.lax.scan(decode_one_token, carry, inputs)
    write = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))
    tokens_BS = write(state.tokens_BS, jnp.maximum(tokens_nB.T, 0), start_B + 1, 0)
    past = [flush_chunk(cache, start_B) for cache in map(KVCache, past, chunk)]
    return replace(state, tokens_BS=tokens_BS), past, tokens_nB.T


def decode_uncached(network: Any, state: DecodeState, active_B, sampling: SamplingParams):
    """Draw n = CHUNK tokens, each by a forward pass of the last block; return state, tokens."""

    def decode_one_token(state: DecodeState, uniform_B: jax.Array):
        size = state.block_size
        is_full_B1 = (state.lengths_B > size)[:, None]
        slid_BS = jnp.roll(state.tokens_BS, -1, axis=1)
        tokens_BS = jnp.where(is_full_B1, slid_BS, state.tokens_BS)
        length_B = jnp.minimum(state.lengths_B, size)
        logits_BV = logits_at(network, tokens_BS[:, :size], length_B - 1)
        state = replace(state, lengths_B=length_B)
        state, token_B = draw(state, logits_BV, uniform_B, active_B, sampling)
        tokens_BS = tokens_BS.at[jnp.arange(len(token_B)), length_B].set(jnp.maximum(token_B, 0))
        return replace(state, tokens_BS=tokens_BS), token_B

    uniform_nB = decode.uniform_draws(state.keys_B2, state.num_drawn_B, CHUNK)
    state, tokens_nB = jax.lax.scan(decode_one_token, state, uniform_nB)
    return state, tokens_nB.T


def logits_at(network: Any, tokens_BT: jax.Array, position_B: jax.Array) -> jax.Array:
    """Return logits [B, V] of one position per sequence; a GPT computes no others."""
    if hasattr(network, "init_cache"):
        return network(tokens_BT, logits_at_B=position_B)[:, 0]
    return jnp.take_along_axis(network(tokens_BT), position_B[:, None, None], axis=1)[:, 0]


def draw(state: DecodeState, logits_BV, uniform_B, is_drawing_B, sampling: SamplingParams):
    """Draw a token where `is_drawing_B`, NO_TOKEN elsewhere; return state and ids, int32 [B]."""
    token_B = sample_token(logits_BV, uniform_B, sampling, state.seen_BV)
    token_B = jnp.where(is_drawing_B, token_B, NO_TOKEN).astype(jnp.int32)
    num_drawn_B = state.num_drawn_B + is_drawing_B
    lengths_B = state.lengths_B + is_drawing_B
    seen_BV = state.seen_BV
    if seen_BV is not None:
        # NO_TOKEN is the last column, where the maximum with False changes nothing
        seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].max(is_drawing_B)
    state = replace(state, num_drawn_B=num_drawn_B, lengths_B=lengths_B, seen_BV=seen_BV)
    return state, token_B


class Sampler:
    """A model that generates tokens: `Sampler(config).load(params).generate(prompts, ...)`.

    It compiles once per number of prompts, `SamplingParams` and bucket of lengths. A model without
    `init_cache` is called as `model(tokens_BT) -> logits_BTV`, uncached, over a sliding window.
    Raises `UserError` for an encoder.
    """

    def __init__(self, config: Config, *, most_devices: int = sys.maxsize):
        if not config.causal:
            raise UserError("causal=False: an encoder cannot be sampled; expected causal=True")
        dtype = kernels.compute_dtype(config.dtype)
        graphdef, shapes, _ = model.abstract_model(config)
        self._has_cache = hasattr(nnx.merge(graphdef, shapes), "init_cache")
        self._is_stacked = config.scan_layers and self._has_cache  # a cache has single layers
        keys = {"remat": "none", "dropout": 0.0, "dtype": dtype}
        keys["scan_layers"] = config.scan_layers and not self._has_cache
        keys["document_mask"] = False  # only for training: a cache does not know documents
        self.config = config.replace(**keys)
        graphdef = model.abstract_model(self.config).graphdef
        self.num_generated = 0  # tokens that the latest `generate` yielded
        self.most_devices = most_devices
        cast = jax.jit(cast_params, static_argnums=1)
        pack = jax.jit(lambda params: decode.pack_weights(nnx.merge(graphdef, params)))
        self._weights_for = partial(decode.weights_for, config.dtype, dtype, cast=cast, pack=pack)
        jit = partial(decode.data_parallel_jit, partial(nnx.merge, graphdef))
        self.prefill, self.decode_chunk = jit(prefill), jit(decode_chunk)
        self.decode_uncached = jit(decode_uncached)

    def load(self, params: dict[str, Any]) -> "Sampler":
        """Use these parameters from now on, and return the sampler itself."""
        params = jax.device_put(params, jax.local_devices()[0])
        params = model.unstack_layers(params) if self._is_stacked else params
        self.params, self.single_params = self._weights_for(params)  # the second for one sequence
        self._replicas: dict[Mesh, Any] = {}  # the parameters on several devices
        return self

    def unload(self) -> None:
        """Free the parameters, and keep the compiled programs."""
        del self.params, self.single_params, self._replicas

    def generate(
        self, prompts: list[np.ndarray], *, max_new_tokens: int,
        sampling: SamplingParams = SamplingParams(), seed: int = 1337,
        overflow: Overflow = "truncate", active: np.ndarray | None = None,
    ) -> Iterator[np.ndarray]:  # fmt: skip
        """Yield chunks of new token ids, int32 [B, n], NO_TOKEN where a sequence drew none.

        A sequence's tokens depend only on its prompt, the seed and its index. When a text exceeds
        `block_size`, "truncate" continues from its last half block, so that a token's cost is
        bounded; "slide" runs the model on the last block for each token, as nanoGPT does. The
        caller may clear an entry of `active`, bool [B], to end that sequence after a chunk.
        """
        check_value("overflow", overflow, Overflow)
        active = np.ones(len(prompts), bool) if active is None else active
        left_B = np.full(len(prompts), max_new_tokens)
        self.num_generated = 0
        chunks = self._launch(prompts, max_new_tokens, sampling, seed, overflow, active)
        pending = next(chunks, None)
        while pending is not None:
            following = next(chunks, None)  # the device computes it while the host reads below
            tokens_Bn = np.array(pending)
            tokens_Bn[~active] = NO_TOKEN
            tokens_Bn[np.arange(CHUNK) >= left_B[:, None]] = NO_TOKEN
            left_B -= (tokens_Bn != NO_TOKEN).sum(1)
            self.num_generated += int((tokens_Bn != NO_TOKEN).sum())
            yield tokens_Bn
            pending = following if (active & (left_B > 0)).any() else None

    def _launch(self, prompts, max_new_tokens, sampling, seed, overflow, active):
        """Launch chunks without reading tokens: the host knows each text's length in advance."""
        size = self.config.block_size
        uses_cache = self._has_cache
        truncates = uses_cache and overflow == "truncate"
        mesh, weights = self._replicate(len(prompts))
        row_weights = self.single_params if len(prompts) == 1 else weights
        longest = truncated_len(size) if truncates else size
        state = initial_state(prompts, sampling, seed, self.config, longest)
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
                    mesh, (sampling, kv_len), row_weights, (state, past), active_B
                )
                grown_B = np.minimum(lengths_B + CHUNK, size + 1)
            else:
                past = None  # free its memory
                state, tokens_Bn = self.decode_uncached(
                    mesh, (sampling,), weights, (state,), active_B
                )
                grown_B = lengths_B + CHUNK
            left_B = left_B - (grown_B - lengths_B)
            lengths_B = grown_B
            yield tokens_Bn

    def _replicate(self, batch: int) -> tuple[Mesh, Any]:
        """Return a mesh that divides `batch` sequences, and the parameters on its devices."""
        most = min(self.most_devices, kernels.max_replicas(self.params))
        mesh = local_mesh(next(n for n in range(most, 0, -1) if batch % n == 0))
        if mesh not in self._replicas:
            whole = NamedSharding(mesh, PartitionSpec())
            self._replicas[mesh] = jax.device_put(self.params, whole)
        return mesh, self._replicas[mesh]
