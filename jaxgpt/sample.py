"""Sampling: prefill, then decode in a jitted scan with a KV cache, streamed in chunks.

B sequences, T prompt length, V vocabulary (padded), S positions a cache has room for,
n new tokens of a chunk.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt import model
from jaxgpt.attention import Cache, Place
from jaxgpt.config import Config, UserError
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.runtime import device
from jaxgpt.sharding import local_mesh
from jaxgpt.train_step import cast_params

CHUNK = 16  # tokens between two looks of the host; a power of two, as block sizes mostly are
NO_TOKEN = -1  # in place of a token, where a sequence drew none
CPU_BYTES = 1 << 27  # of weights; larger ones the cores of a CPU had better read together
WHOLE, ROWS = PartitionSpec(), PartitionSpec("data")


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn from the logits; each knob at its default does nothing."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Keep so many of the likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that make up this probability (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Keep tokens at least this probable beside the likeliest one (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divide the odds of tokens that were there before (Keskar et al. 2019)."""


def sample_token(
    logits_BV: jax.Array, chance_B: jax.Array, knobs: SamplingParams, seen_BV: jax.Array | None
):
    """One token id a sequence, int32 [B], by a number in (0, 1]: where the sum of probabilities
    reaches it. Padded ids have logits of -inf and are never drawn.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if seen_BV is not None:
        penalty = min(knobs.repetition_penalty, 1e30)  # more is beyond float32
        penalized = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
        logits_BV = jnp.where(seen_BV, penalized, logits_BV)
    if knobs.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV -= logits_BV.max(-1, keepdims=True)
    logits_BV /= min(max(knobs.temperature, 1e-30), 1e30)  # the rest is beyond float32
    if knobs.min_p:
        logits_BV = jnp.where(logits_BV >= math.log(knobs.min_p), logits_BV, -jnp.inf)
    V = logits_BV.shape[-1]
    k = min(knobs.top_k or V, V)
    if k == V and knobs.top_p == 1:  # nothing to sort for
        return _reached(jnp.exp(logits_BV), chance_B)
    values_Bk, ids_Bk = jax.lax.top_k(logits_BV, k)
    probs_Bk = jax.nn.softmax(values_Bk)
    likelier_Bk = probs_Bk.cumsum(-1) - probs_Bk  # the probability of those before it
    is_kept_Bk = (likelier_Bk < knobs.top_p).at[:, 0].set(True)
    choice_B = _reached(jnp.where(is_kept_Bk, probs_Bk, 0), chance_B)
    return jnp.take_along_axis(ids_Bk, choice_B[:, None], axis=1)[:, 0]


def _reached(weights_Bk: jax.Array, chance_B: jax.Array) -> jax.Array:
    """The first place where the sum of weights is a share `chance` of all, and its weight not 0.

    Sums that are taken in parallel need not grow: where nothing is added, they do not count.
    """
    sums_Bk = jnp.where(weights_Bk > 0, weights_Bk.cumsum(-1), 0)
    return (sums_Bk >= chance_B[:, None] * sums_Bk.max(-1, keepdims=True)).argmax(-1)


class Sampler:
    """A model ready to be sampled: several sequences on as many devices as share them evenly.

    It compiles once for a number of sequences and a setting of the knobs, and for a bucket of
    lengths: of prompts a power of two, of texts one of at most four. On a CPU
    `dtype=bfloat16` is the type of kernels alone: what is read of them for every token of a single
    sequence is half as much. Raises `UserError` for an encoder.
    """

    def __init__(self, config: Config):
        if not config.causal:
            raise UserError("causal=False: an encoder cannot be sampled")
        self._is_narrow = config.dtype == "bfloat16" and device.is_cpu()
        dtype = "float32" if self._is_narrow else config.dtype
        self.config = config.replace(remat="none", scan_layers=False, dropout=0.0, dtype=dtype)
        self._graphdef, _, _ = model.split(self.config)
        self._is_stacked = config.scan_layers
        self.num_generated = 0  # tokens, by the last call of `generate`
        self._cast = jax.jit(partial(cast_params, dtype=config.dtype))
        self._widen = jax.jit(partial(cast_params, dtype=dtype))
        self._pack = jax.jit(partial(model.pack_kernels, self.config))
        size = config.block_size
        self._kept = min(size, size // 2 + 1)  # of a text that has outgrown the block
        self._fill, self._decode, self._slide = map(
            _by_rows, (self._fill_fn, self._decode_fn, self._slide_fn)
        )

    def load(self, params: dict[str, Any]) -> "Sampler":
        """Takes these parameters, in the compute type, from now on.

        `row_params` are those that a single sequence is decoded with.
        """
        params = self._cast(model.unstack(params) if self._is_stacked else params)
        self.params = self.row_params = jax.device_put(params, jax.local_devices()[0])
        if self._is_narrow:
            self.params = self._widen(self.params)
            self.row_params = self._pack(self.params)
        self._copies: dict[Mesh, Any] = {}  # of the parameters, on several devices
        return self

    def _split(self, rows: int) -> tuple[Mesh, Any]:
        """The devices that share so many sequences, and the parameters on each of them."""
        most = jax.local_device_count()
        if device.is_cpu() and sum(p.nbytes for p in jax.tree.leaves(self.params)) > CPU_BYTES:
            most = 1
        mesh = local_mesh(next(n for n in range(most, 0, -1) if rows % n == 0))
        if mesh not in self._copies:
            self._copies[mesh] = jax.device_put(self.params, NamedSharding(mesh, WHOLE))
        return mesh, self._copies[mesh]

    def generate(
        self,
        prompts: list[np.ndarray],
        *,
        max_new_tokens: int,
        knobs: SamplingParams = SamplingParams(),
        seed: int = 1337,
        context: str = "halve",
        is_done: Callable[[int, list[int]], bool] = lambda row, new: False,
    ) -> Iterator[np.ndarray]:
        """New token ids in chunks [B, n], -1 where a sequence drew none.

        What a sequence draws depends on its prompt, the seed and its place among the prompts
        alone. `context` says what one goes on from that has outgrown `block_size`: `halve` cuts
        it to its last half block and a token and fills the cache anew, so that the cost of a token
        stays bounded and whole chunks fill the rest; `exact` shows every token the whole last
        block, as nanoGPT does, and has to run all of it each time. `is_done(row, new tokens)` ends
        a sequence early.
        """
        self.num_generated, new = 0, [[] for _ in prompts]
        alive = np.full(len(prompts), max_new_tokens > 0)
        chunks = self._chunks(prompts, alive, max_new_tokens, knobs, seed, context)
        for drawn, _ in pairwise(chain(chunks, [None])):  # the device is a chunk ahead
            chunk = np.array(drawn)
            chunk[~alive] = NO_TOKEN
            for row in np.flatnonzero(alive):
                chunk[row, max_new_tokens - len(new[row]) :] = NO_TOKEN
                kept = [int(token) for token in chunk[row] if token != NO_TOKEN]
                self.num_generated += len(kept)
                new[row] += kept
                stops = is_done(int(row), new[row])
                alive[row] = len(new[row]) < max_new_tokens and not stops
            yield chunk
            if not alive.any():
                return

    def _chunks(
        self,
        prompts: list[np.ndarray],
        alive: np.ndarray,
        max_new_tokens: int,
        knobs: SamplingParams,
        seed: int,
        context: str,
    ) -> Iterator[jax.Array]:
        """Chunks for as long as a sequence is alive and wants tokens, none of them waited for.

        How many tokens a chunk draws follows from the lengths alone, so nobody has to look.
        """
        size = self.config.block_size
        longest = self._kept if context == "halve" else size
        texts = [text if len(text) <= size else text[-longest:] for text in prompts]
        lengths, left = np.array([len(text) for text in texts]), np.full(len(texts), max_new_tokens)
        is_ready = np.ones(len(texts), bool)
        mesh, params = self._split(len(texts))
        decode_params = self.row_params if len(texts) == 1 else params
        carry = self._begin(prompts, texts, knobs, seed)
        carry = jax.device_put(carry, NamedSharding(mesh, ROWS))
        carry = self._fill((mesh, self._bucket(lengths)), params, carry)
        while (wanted := alive & (left > 0)).any():
            if (wanted & ~is_ready).any():  # some have outgrown their block
                carry |= {"caches": None}
                if context == "halve":
                    lengths = np.where(is_ready, lengths, self._kept)
                    carry = self._fill((mesh, self._bucket(lengths[wanted])), params, carry)
            if carry["caches"] is None:  # there were some until `exact` outgrew the block
                carry, drawn = self._slide((mesh, knobs), params, carry, wanted)
                left, is_ready = left - CHUNK, wanted
            else:  # the last draw of a sequence need not fit into its block any more
                how = mesh, knobs, self._width(lengths[wanted])
                carry, drawn = self._decode(how, decode_params, carry, wanted)
                left = left - np.minimum(CHUNK, size + 1 - lengths)
                is_ready = wanted & (lengths + CHUNK <= size)
                lengths = np.minimum(lengths + CHUNK, size)
            yield drawn

    def _begin(self, prompts: list, texts: list, knobs: SamplingParams, seed: int) -> dict:
        """What the device holds: of each sequence the key, how often it drew, which tokens it has
        (if that matters), the end of its text, its length, and if it is drawing.

        Of that text all but the last token is cached.
        """
        key, rows, seen = jax.random.key(seed), len(prompts), None
        keys_B = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(rows))
        if knobs.repetition_penalty != 1:
            seen = np.zeros((rows, self.config.padded_vocab_size), bool)
            for row, prompt in enumerate(prompts):
                seen[row, prompt] = True
        text_BS = np.zeros((rows, self.config.block_size + CHUNK), np.int32)
        for row, text in enumerate(texts):
            text_BS[row, : len(text)] = text
        return {
            "keys_B": jax.random.key_data(keys_B),  # arrays of keys would be compiled for twice
            "drawn_B": np.zeros(rows, np.int32),
            "seen_BV": seen,
            "text_BS": text_BS,
            "lengths_B": np.array([len(text) for text in texts], np.int32),
            "ready_B": np.ones(rows, bool),
            "caches": None,
        }

    def _bucket(self, lengths: np.ndarray) -> int:
        """The width to fill caches at: a power of two, or nothing for texts of one token."""
        cached = int(lengths.max()) - 1
        return min(self.config.block_size, 1 << (cached - 1).bit_length()) if cached else 0

    def _width(self, lengths: np.ndarray) -> int:
        """How many positions of the past to look at, of the few that decoding compiles for.

        Of 1,024 not a half, which XLA:CPU reads with one core, and takes longer for than for 640.
        """
        size, least = self.config.block_size, max(128, int(lengths.max()) - 1)
        return next((n for n in (size // 8, size // 4, size * 5 // 8) if n >= least), size)

    def _fill_fn(self, params: dict, carry: dict, width: int) -> dict:
        """Fills caches anew, and cuts the texts that have outgrown the block.

        No query sees the padding after it; decoding overwrites it before any could.
        """
        network, is_over_B = nnx.merge(self._graphdef, params), ~carry["ready_B"]
        cut_BS = jnp.roll(carry["text_BS"], self._kept - self.config.block_size - 1, axis=1)
        text_BS = jnp.where(is_over_B[:, None], cut_BS, carry["text_BS"])
        caches = model.init_caches(self.config, len(text_BS), CHUNK)
        if width:
            _, caches = network.features(text_BS[:, :width], caches=caches)
        return carry | {
            "text_BS": text_BS,
            "lengths_B": jnp.where(is_over_B, self._kept, carry["lengths_B"]),
            "ready_B": jnp.ones_like(is_over_B),
            "caches": [cache.past for cache in caches],
        }

    def _decode_fn(
        self, params: dict, carry: dict, wanted_B: jax.Array, knobs: SamplingParams, width: int
    ) -> tuple[dict, jax.Array]:
        network, size = nnx.merge(self._graphdef, params), self.config.block_size
        start_B = carry["lengths_B"] - 1
        pasts = jax.tree.map(lambda x: x[:, :width], carry["caches"])
        empty = model.init_caches(self.config, len(start_B), CHUNK)
        state = carry | {
            "ready_B": carry["ready_B"] & wanted_B,
            "caches": [cache.chunk for cache in empty],
        }
        last_B = jnp.take_along_axis(carry["text_BS"], start_B[:, None], axis=1)[:, 0]

        def step(so_far: tuple[dict, jax.Array], now: tuple) -> tuple[tuple, jax.Array]:
            (state, last_B), (chance_B, number) = so_far, now
            features_BTD, caches = network.features(
                jnp.maximum(last_B, 0)[:, None],
                caches=list(map(Cache, pasts, state["caches"])),
                place=Place(start_B, number),
            )
            logits_BV = network.logits(features_BTD)[:, 0]
            state, token_B = _draw_next(state, logits_BV, chance_B, knobs)
            fits_B = state["ready_B"] & (state["lengths_B"] < size)
            state |= {
                "lengths_B": state["lengths_B"] + fits_B,
                "ready_B": fits_B,
                "caches": [cache.chunk for cache in caches],
            }
            return (state, token_B), token_B

        nows = _chances(carry), jnp.arange(CHUNK)
        (state, _), tokens_nB = jax.lax.scan(step, (state, last_B), nows)
        caches = map(Cache, carry["caches"], state["caches"])
        put = jax.vmap(jax.lax.dynamic_update_slice_in_dim, (0, 0, 0, None))
        state |= {
            "text_BS": put(carry["text_BS"], jnp.maximum(tokens_nB.T, 0), start_B + 1, 0),
            "caches": [cache.append(start_B) for cache in caches],
        }
        return state, tokens_nB.T

    def _slide_fn(self, params: dict, carry: dict, wanted_B: jax.Array, knobs: SamplingParams):
        network, size = nnx.merge(self._graphdef, params), self.config.block_size
        is_over_B1 = ~carry["ready_B"][:, None]
        text_BS = jnp.where(is_over_B1, jnp.roll(carry["text_BS"], -1, axis=1), carry["text_BS"])

        def step(state: dict, chance_B: jax.Array) -> tuple[dict, jax.Array]:
            text_BS, length_B = state["text_BS"], state["lengths_B"]
            features_BTD, _ = network.features(text_BS[:, :size])
            last_BT = (length_B - 1)[:, None]
            features_BTD = jnp.take_along_axis(features_BTD, last_BT[..., None], axis=1)
            logits_BV = network.logits(features_BTD)[:, 0]
            state, token_B = _draw_next(state, logits_BV, chance_B, knobs)
            is_full_B1 = (length_B == size)[:, None]
            text_BS = jnp.where(is_full_B1, jnp.roll(text_BS, -1, axis=1), text_BS)
            place_B = jnp.minimum(length_B, size - 1)
            text_BS = text_BS.at[jnp.arange(len(place_B)), place_B].set(jnp.maximum(token_B, 0))
            lengths_B = jnp.minimum(length_B + 1, size)
            return state | {"text_BS": text_BS, "lengths_B": lengths_B}, token_B

        state = carry | {"text_BS": text_BS, "ready_B": wanted_B}
        state, tokens_nB = jax.lax.scan(step, state, _chances(carry))
        return state, tokens_nB.T


def _by_rows(function: Callable) -> Callable:
    """Jitted: `((mesh, *options), params, carry, ...)` -> `function(params, carry, ..., *options)`.

    Each device has its own sequences, which are the first axis of all but the parameters.
    """

    def run(how: tuple, params: dict, *rows: Any):
        mesh, *options = how
        local = lambda params, *rows: function(params, *rows, *options)
        specs = {"in_specs": (WHOLE, *(ROWS for _ in rows)), "out_specs": ROWS}
        return jax.shard_map(local, mesh=mesh, check_vma=False, **specs)(params, *rows)

    return jax.jit(run, static_argnums=0, donate_argnums=2)


def _chances(carry: dict) -> jax.Array:
    """A chunk's random numbers in (0, 1], [n, B]; the n-th draw of a sequence has its n-th key.

    All at once: on a CPU, keys are made in a loop, and one in each token's step took a third of it.
    """
    draws_nB = carry["drawn_B"] + jnp.arange(CHUNK)[:, None]
    keys_B = jax.random.wrap_key_data(carry["keys_B"])
    keys_nB = jax.vmap(jax.vmap(jax.random.fold_in), (None, 0))(keys_B, draws_nB)
    return 1 - jax.vmap(jax.vmap(jax.random.uniform))(keys_nB)


def _draw_next(
    carry: dict, logits_BV: jax.Array, chance_B: jax.Array, knobs: SamplingParams
) -> tuple[dict, jax.Array]:
    """Draws for the sequences that are ready; one that is not stays so until the chunk's end."""
    drawn_B = sample_token(logits_BV, chance_B, knobs, carry["seen_BV"])
    token_B = jnp.where(carry["ready_B"], drawn_B, NO_TOKEN)
    carry = carry | {"drawn_B": carry["drawn_B"] + carry["ready_B"]}
    if carry["seen_BV"] is not None:
        rows = jnp.arange(len(token_B))
        seen_BV = carry["seen_BV"].at[rows, token_B].max(carry["ready_B"])
        carry |= {"seen_BV": seen_BV}
    return carry, token_B.astype(jnp.int32)


class TextStream:
    """Turns one sequence's token ids into text as they come.

    Holds back what is not final yet: half a character, or what may become a stop string. Text
    ends before the stop string that is complete first.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...] = ()):
        self._tokenizer, self._stop, self._shown = tokenizer, stop, 0
        self.stopped = False

    def push(self, ids: list[int], *, last: bool = False) -> str:
        """The text that is new and final, given all ids so far; `last` lets go of everything."""
        text = self._tokenizer.decode(ids)
        if not last:
            text = text.rstrip("\ufffd")
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(found)
        if found:
            _, end = min(found)
            text = text[:end]
        elif not last:
            text = text[: len(text) - self._held(text)]
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new

    def _held(self, text: str) -> int:
        """The length of the longest beginning of a stop string that the text ends with."""
        begun = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(begun, default=0)


def sample_text(
    sampler: Sampler,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_new_tokens: int,
    *,
    stop: tuple[str, ...] = (),
    **options: Any,
) -> Iterator[list[str]]:
    """The text that each prompt goes on with, in pieces; `options` are those of `generate`.

    Raises `UserError`, before the first piece is asked for, for a prompt that has no tokens, a
    character that has none, or an empty stop string.
    """
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    if any(len(i) == 0 for i in ids):
        raise UserError("start='': a prompt needs at least one character; a line break will do")
    if "" in stop:
        raise UserError("stop='': needs at least one character")
    streams = [TextStream(tokenizer, stop or tokenizer.stop) for _ in prompts]
    pieces = [""] * len(prompts)

    def is_done(row: int, new: list[int]) -> bool:
        pieces[row] = streams[row].push(new, last=len(new) == max_new_tokens)
        return streams[row].stopped

    chunks = sampler.generate(ids, max_new_tokens=max_new_tokens, is_done=is_done, **options)

    def take(_: np.ndarray) -> list[str]:
        taken, pieces[:] = list(pieces), [""] * len(prompts)
        return taken

    return map(take, chunks)
