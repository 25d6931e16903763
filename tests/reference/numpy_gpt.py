"""The whole GPT in plain NumPy, with every gradient derived by hand.

Nothing here shares code, or a framework, with the package it checks. The aim is to read like the
equations: a forward function and, right below it, its `_backward`, which takes the gradient of a
scalar loss with respect to the output and returns the gradients with respect to the inputs.
Backward functions recompute what is cheap instead of storing it. Everything runs in the float
dtype of the parameters.

Shape letters, used as suffixes of array names and in einsum strings:
    B batch   T query length   S key length    D embedding    H head dim
    N heads   K KV heads       G = N/K query heads per KV head
    F MLP hidden width         V vocabulary, padded           L layers

Parameters are nested dicts (`blocks` is a list, or a dict keyed by the layer number) of arrays:
    embed.kernel [V, D]                   pos_embed.kernel [block_size, D]   (position = learned)
    blocks.<layer>.
        ln_1.scale [D], ln_1.bias [D]     ln_2 alike
        attn.qkv.kernel [D, 3, N, H]      or, if K < N: attn.q [D, N, H] and attn.kv [D, 2, K, H]
        attn.out.kernel [N, H, D]         attn.q_norm.scale [H], attn.k_norm.scale [H]  (qk_norm)
        attn.value_mix []                 (value_residual)
        mlp.up.kernel [D, F]              or, for swiglu, [D, 2, F]: gate, then value
        mlp.down.kernel [F, D]
    ln_f.scale [D], ln_f.bias [D]         (norm_position = pre)
    lm_head.kernel [V, D]                 (untied)
    head_bias [V]                         (lm_head_bias)
A projection's bias has its kernel's output axes. Biases exist only if `config.bias`, those of
query, key and value only if `config.qkv_bias` too, and never in an RMSNorm or the embeddings.
There are no norms with norm = none or without norm_gain, no MLP and ln_2 with mlp = none, no
attn.out without attention_output_proj.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

Array = np.ndarray
Tree = dict[str, Any]
Config = Any  # any object with the options as attributes

NORM_EPS = 1e-5
ROPE_BASE = 10_000.0
IGNORE = -1  # a target with this value takes no part in the loss
VOCAB_MULTIPLE = 128

OPTION_DEFAULTS = {  # options that a config may lack
    "norm_gain": True,
    "residual": True,
    "attention_output_proj": True,
    "attention_scale": "head",
    "qkv_bias": True,
    "lm_head_bias": False,
}

_erf = np.vectorize(math.erf, otypes=[float])


def option(config: Config, name: str) -> Any:
    """Return an option that a config may lack."""
    return getattr(config, name, OPTION_DEFAULTS[name])


# --- Parameter trees ----------------------------------------------------------------------------


def flatten(tree: Any, prefix: str = "") -> dict[str, Array]:
    """Nested dicts and lists -> {"blocks.0.attn.out.kernel": array, ...}."""
    if not isinstance(tree, dict | list):
        return {prefix: tree}
    children = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat: dict[str, Array] = {}
    for key, child in children:
        flat |= flatten(child, f"{prefix}.{key}" if prefix else str(key))
    return flat


def unflatten(flat: dict[str, Array], like: Any, prefix: str = "") -> Any:
    """The inverse of `flatten`; `like` is any tree of the wanted structure."""
    if isinstance(like, dict):
        keys = {key: f"{prefix}.{key}" if prefix else str(key) for key in like}
        return {key: unflatten(flat, like[key], path) for key, path in keys.items()}
    if isinstance(like, list):
        return [unflatten(flat, child, f"{prefix}.{i}") for i, child in enumerate(like)]
    return flat[prefix]


@dataclass(frozen=True)
class _Draw:
    """Draws parameters; what is drawn does not depend on `dtype`, but for rounding."""

    rng: np.random.Generator
    dtype: Any
    bias: bool

    def normal(self, *shape: int, std: float, mean: float = 0.0) -> Array:
        return np.asarray(mean + std * self.rng.standard_normal(shape), self.dtype)

    def linear(self, fan_in: tuple[int, ...], fan_out: tuple[int, ...], bias: bool = True) -> Tree:
        p = {"kernel": self.normal(*fan_in, *fan_out, std=math.prod(fan_in) ** -0.5)}
        return p | ({"bias": self.normal(*fan_out, std=0.1)} if self.bias and bias else {})

    def norm(self, width: int, kind: str) -> Tree:
        p = {"scale": self.normal(width, std=0.1, mean=1.0)}
        has_bias = self.bias and kind == "layernorm"
        return p | ({"bias": self.normal(width, std=0.1)} if has_bias else {})


def _draw_attention(draw: _Draw, config: Config) -> Tree:
    D, N = config.n_embd, config.n_head
    K, H = config.n_kv_head or N, D // N
    linear = partial(draw.linear, (D,), bias=option(config, "qkv_bias"))
    p = {"qkv": linear((3, N, H))} if K == N else {"q": linear((N, H)), "kv": linear((2, K, H))}
    if option(config, "attention_output_proj"):
        p["out"] = draw.linear((N, H), (D,))
    if config.qk_norm:
        p |= {name: draw.norm(H, "rmsnorm") for name in ("q_norm", "k_norm")}
    if config.value_residual:
        p["value_mix"] = draw.normal(std=0.1, mean=0.5)
    return p


def has_norm_parameters(config: Config) -> bool:
    """Return whether the norms of blocks and the last norm have gains, and biases if any."""
    return config.norm != "none" and option(config, "norm_gain")


def _draw_block(draw: _Draw, config: Config) -> Tree:
    D, F = config.n_embd, config.mlp_dim
    p = {"attn": _draw_attention(draw, config)}
    if config.mlp != "none":
        up = draw.linear((D,), (2, F) if config.mlp == "swiglu" else (F,))
        p["mlp"] = {"up": up, "down": draw.linear((F,), (D,))}
    if has_norm_parameters(config):
        p |= {{"attn": "ln_1", "mlp": "ln_2"}[layer]: draw.norm(D, config.norm) for layer in p}
    return p


def init_params(config: Config, rng: np.random.Generator, dtype: Any = np.float64) -> Tree:
    """Random parameters for tests: nothing is zero, and no signal or gradient is tiny.

    Kernels have variance 1/fan-in and embeddings 1/D, so activations are of order one at any
    width; biases, and the scales' distance from 1, are of order 0.1.
    """
    draw, D = _Draw(rng, dtype, config.bias), config.n_embd
    V = -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    params: Tree = {"embed": {"kernel": draw.normal(V, D, std=D**-0.5)}}
    if config.position == "learned":
        params["pos_embed"] = {"kernel": draw.normal(config.block_size, D, std=D**-0.5)}
    params["blocks"] = [_draw_block(draw, config) for _ in range(config.n_layer)]
    if config.norm_position == "pre" and has_norm_parameters(config):
        params["ln_f"] = draw.norm(D, config.norm)
    if not config.tie_embeddings:
        params["lm_head"] = {"kernel": draw.normal(V, D, std=D**-0.5)}
    if option(config, "lm_head_bias"):
        params["head_bias"] = draw.normal(V, std=0.1)
    return params


# --- Linear maps and norms ----------------------------------------------------------------------


def linear(x: Array, p: Tree, n_in: int = 1) -> Array:
    """Contract the last `n_in` axes of x [..., *in] with kernel [*in, *out], add bias [*out]."""
    return np.tensordot(x, p["kernel"], axes=n_in) + p.get("bias", 0)


def linear_backward(dy: Array, x: Array, p: Tree, n_in: int = 1) -> tuple[Array, Tree]:
    """dy [..., *out] -> (dx [..., *in], gradients of the kernel and, if there is one, the bias)."""
    kernel, batch = p["kernel"], tuple(range(x.ndim - n_in))
    dx = np.tensordot(
        dy, np.moveaxis(kernel, range(n_in), range(-n_in, 0)), axes=kernel.ndim - n_in
    )
    grads = {"kernel": np.tensordot(x, dy, axes=(batch, batch))}
    if "bias" in p:
        grads["bias"] = dy.sum(axis=batch)
    return dx, grads


def _normalise(x: Array, kind: str) -> tuple[Array, Array]:
    """x [..., D] -> (x over its root mean square, one over that root mean square [..., 1]).

    LayerNorm is RMSNorm of the centred x: the biased variance is the mean square about the mean.
    """
    if kind == "layernorm":
        x = x - x.mean(axis=-1, keepdims=True)
    inverse_rms = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + NORM_EPS)
    return x * inverse_rms, inverse_rms


def norm(x: Array, p: Tree, kind: str) -> Array:
    """LayerNorm (Ba et al. 2016), RMSNorm (Zhang and Sennrich 2019) of x [..., D], or x itself."""
    if kind == "none":
        return x
    return _normalise(x, kind)[0] * p.get("scale", 1) + p.get("bias", 0)


def norm_backward(dy: Array, x: Array, p: Tree, kind: str) -> tuple[Array, Tree]:
    """dy [..., D] -> (dx [..., D], gradients of scale and bias [D], if there are any)."""
    if kind == "none":
        return dy, {}
    x_hat, inverse_rms = _normalise(x, kind)
    batch = tuple(range(x.ndim - 1))
    grads = {}
    if "scale" in p:
        grads["scale"] = (dy * x_hat).sum(axis=batch)
    if "bias" in p:
        grads["bias"] = dy.sum(axis=batch)
    dx_hat = dy * p.get("scale", 1)
    # Scaling x leaves x_hat as it is (but for eps), so dx has no component along x_hat.
    dx = inverse_rms * (dx_hat - x_hat * np.mean(dx_hat * x_hat, axis=-1, keepdims=True))
    if kind == "layernorm":  # centring is a symmetric projection: its transpose is itself
        dx = dx - dx.mean(axis=-1, keepdims=True)
    return dx, grads


# --- Positions ----------------------------------------------------------------------------------


def sinusoidal_table(T: int, D: int, dtype: Any) -> Array:
    """[T, D]: sines on even columns, cosines on odd ones (Vaswani et al. 2017, section 3.5)."""
    angle = np.arange(T)[:, None] * ROPE_BASE ** (-np.arange(0, D, 2) / D)
    table = np.empty((T, D))
    table[:, 0::2] = np.sin(angle)
    table[:, 1::2] = np.cos(angle)[:, : D // 2]
    return table.astype(dtype)


def rope(x_BTNH: Array, *, inverse: bool = False) -> Array:
    """Rotate each pair (x[i], x[i + H/2]) by t * base^(-2i/H) (Su et al. 2021), half-split form.

    A rotation's transpose is its inverse, so the backward pass is `rope(dy, inverse=True)`.
    """
    T, H = x_BTNH.shape[1], x_BTNH.shape[-1]
    angle = np.arange(T)[:, None] * ROPE_BASE ** (-np.arange(0, H, 2) / H)
    angle = (-angle if inverse else angle)[:, None, :]  # broadcasts over the heads
    cos, sin = np.cos(angle).astype(x_BTNH.dtype), np.sin(angle).astype(x_BTNH.dtype)
    left, right = x_BTNH[..., : H // 2], x_BTNH[..., H // 2 :]
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


# --- Attention ----------------------------------------------------------------------------------


def visible_keys(T: int, S: int, causal: bool, window: int, mask_BTS: Array | None) -> Array:
    """Which key each query may look at: booleans that broadcast to [B, K, G, T, S]."""
    # With more keys than queries, the queries are the last T positions.
    query, key = np.arange(T)[:, None] + max(S - T, 0), np.arange(S)
    visible = np.ones((1, T, S), bool)
    if causal:
        visible &= key <= query
    if window:  # bounds the past only; the future is for `causal` to bound
        visible &= key > query - window
    if mask_BTS is not None:
        visible = visible & mask_BTS
    return visible[:, None, None]


def attention_weights(q_BTKGH: Array, k_BSKH: Array, visible: Array, scale: float) -> Array:
    """Softmax over the visible keys, [B, K, G, T, S]; a query that sees none gets zeros."""
    scores = scale * np.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, optimize=True)
    scores = np.where(visible, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
    # The largest score adds exp(0) = 1, so only the sum of a query that sees nothing is below 1.
    return weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1)


def attention(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    mask_BTS: Array | None = None,
) -> Array:
    """Scaled dot-product attention (Vaswani et al. 2017), grouped-query (Ainslie et al. 2023).

    Query head n reads KV head n // (N / K). A positive `window` shows a query only the last
    `window` keys up to its own position; `mask_BTS` is True where a query may look.
    Returns [B, T, N, H], zero for a query that sees no key.
    """
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    weights = attention_weights(
        q_BTKGH, k_BSKH, visible_keys(T, S, causal, window, mask_BTS), scale
    )
    out = np.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH, optimize=True)
    return out.reshape(B, T, N, H)


def attention_backward(
    dout_BTNH: Array,
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    mask_BTS: Array | None = None,
) -> tuple[Array, Array, Array]:
    """The gradients (dq [B, T, N, H], dk [B, S, K, H], dv [B, S, K, H]) of `attention`."""
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    q, dout = (a.reshape(B, T, K, N // K, H) for a in (q_BTNH, dout_BTNH))
    w_BKGTS = attention_weights(q, k_BSKH, visible_keys(T, S, causal, window, mask_BTS), scale)
    einsum = partial(np.einsum, optimize=True)
    dw_BKGTS = einsum("BTKGH,BSKH->BKGTS", dout, v_BSKH)
    # Softmax Jacobian: dscore_s = w_s (dw_s - sum_r w_r dw_r). Hidden keys have w = 0.
    dscores = w_BKGTS * (dw_BKGTS - (w_BKGTS * dw_BKGTS).sum(axis=-1, keepdims=True))
    dq = scale * einsum("BKGTS,BSKH->BTKGH", dscores, k_BSKH).reshape(B, T, N, H)
    # The G query heads of a KV head add up, as the einsum sums over G.
    dk = scale * einsum("BKGTS,BTKGH->BSKH", dscores, q)
    dv = einsum("BKGTS,BTKGH->BSKH", w_BKGTS, dout)
    return dq, dk, dv


def _project_qkv(x_BTD: Array, p: Tree) -> tuple[Array, Array, Array]:
    """q [B, T, N, H] and k, v [B, T, K, H], from the fused or the grouped-query projections."""
    if "qkv" in p:
        q, k, v = np.moveaxis(linear(x_BTD, p["qkv"]), 2, 0)
    else:
        q, (k, v) = linear(x_BTD, p["q"]), np.moveaxis(linear(x_BTD, p["kv"]), 2, 0)
    return q, k, v


def _project_qkv_backward(
    dq: Array, dk: Array, dv: Array, x_BTD: Array, p: Tree
) -> tuple[Array, Tree]:
    """dq [B, T, N, H], dk and dv [B, T, K, H] -> (dx [B, T, D], gradients of the projections)."""
    if "qkv" in p:
        dx, g = linear_backward(np.stack([dq, dk, dv], axis=2), x_BTD, p["qkv"])
        return dx, {"qkv": g}
    dx_q, g_q = linear_backward(dq, x_BTD, p["q"])
    dx_kv, g_kv = linear_backward(np.stack([dk, dv], axis=2), x_BTD, p["kv"])
    return dx_q + dx_kv, {"q": g_q, "kv": g_kv}


def _attention_options(config: Config, H: int) -> dict[str, Any]:
    width = config.n_embd if option(config, "attention_scale") == "embedding" else H
    return {"scale": width**-0.5, "causal": config.causal, "window": config.sliding_window}


def self_attention(
    x_BTD: Array, p: Tree, config: Config, v_first: Array | None
) -> tuple[Array, SimpleNamespace]:
    """A layer's attention: x [B, T, D] -> (out [B, T, D], cache).

    `v_first` is layer 0's v [B, T, K, H], or None in layer 0 itself; only the value residual
    (Zhou et al. 2024) uses it. The norm of q and k is that of Dehghani et al. 2023, as RMSNorm.
    """
    c = SimpleNamespace(x=x_BTD)
    c.q_raw, c.k_raw, c.v_raw = _project_qkv(x_BTD, p)
    c.q, c.k, c.v = c.q_raw, c.k_raw, c.v_raw
    c.v_first = c.v_raw if v_first is None else v_first
    if config.qk_norm:
        c.q, c.k = norm(c.q, p["q_norm"], "rmsnorm"), norm(c.k, p["k_norm"], "rmsnorm")
    if config.position == "rope":
        c.q, c.k = rope(c.q), rope(c.k)
    if config.value_residual:
        c.v = (1 - p["value_mix"]) * c.v_raw + p["value_mix"] * c.v_first
    c.out_BTNH = attention(c.q, c.k, c.v, **_attention_options(config, c.q.shape[-1]))
    if not option(config, "attention_output_proj"):
        return c.out_BTNH.reshape(x_BTD.shape), c
    return linear(c.out_BTNH, p["out"], n_in=2), c


def self_attention_backward(
    dy_BTD: Array, c: SimpleNamespace, p: Tree, config: Config, dv_first: Array
) -> tuple[Array, Tree]:
    """dy [B, T, D] -> (dx [B, T, D], gradients of p).

    `dv_first` [B, T, K, H] collects in place what the layers, last to first, ask of layer 0's v.
    """
    dout, grads = dy_BTD.reshape(c.out_BTNH.shape), {}
    if option(config, "attention_output_proj"):
        dout, grads["out"] = linear_backward(dy_BTD, c.out_BTNH, p["out"], n_in=2)
    options = _attention_options(config, c.q.shape[-1])
    dq, dk, dv = attention_backward(dout, c.q, c.k, c.v, **options)
    if config.value_residual:
        mix = p["value_mix"]
        grads["value_mix"] = np.asarray((dv * (c.v_first - c.v_raw)).sum())
        dv_first += mix * dv
        dv = (1 - mix) * dv
        if c.v_first is c.v_raw:  # layer 0: all has been collected, its own share included
            dv = dv + dv_first
    if config.position == "rope":
        dq, dk = rope(dq, inverse=True), rope(dk, inverse=True)
    if config.qk_norm:
        dq, grads["q_norm"] = norm_backward(dq, c.q_raw, p["q_norm"], "rmsnorm")
        dk, grads["k_norm"] = norm_backward(dk, c.k_raw, p["k_norm"], "rmsnorm")
    dx, g_project = _project_qkv_backward(dq, dk, dv, c.x, p)
    return dx, grads | g_project


# --- MLP: each activation returns its value and its derivative ----------------------------------


def _gelu(x: Array) -> tuple[Array, Array]:
    """x times the normal distribution function (Hendrycks and Gimpel 2016)."""
    cdf = 0.5 * (1 + _erf(x / math.sqrt(2)).astype(x.dtype))
    density = np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return x * cdf, cdf + x * density


def _gelu_tanh(x: Array) -> tuple[Array, Array]:
    """The same paper's tanh approximation, which GPT-2 uses."""
    slope, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = np.tanh(slope * (x + cubic * x**3))
    dtanh = (1 - tanh * tanh) * slope * (1 + 3 * cubic * x * x)
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh + x * dtanh)


def _relu(x: Array) -> tuple[Array, Array]:
    return np.maximum(x, 0), (x > 0).astype(x.dtype)


def _relu2(x: Array) -> tuple[Array, Array]:
    """Squared ReLU (So et al. 2021)."""
    positive = np.maximum(x, 0)
    return positive * positive, 2 * positive


def _silu(x: Array) -> tuple[Array, Array]:
    """x sigmoid(x); the sigmoid by way of tanh, which cannot overflow."""
    sigmoid = 0.5 * (1 + np.tanh(0.5 * x))
    return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))


ACTIVATIONS: dict[str, Callable[[Array], tuple[Array, Array]]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": _relu,
    "relu2": _relu2,
    "swiglu": _silu,  # of the gate (Shazeer 2020)
}


def mlp(x_BTD: Array, p: Tree, config: Config) -> tuple[Array, SimpleNamespace]:
    """x [B, T, D] -> (out [B, T, D], cache). SwiGLU multiplies the activated gate by the value."""
    up = linear(x_BTD, p["up"])  # [B, T, F], or [B, T, 2, F] for swiglu
    gated = config.mlp == "swiglu"
    hidden_BTF, _ = ACTIVATIONS[config.mlp](up[..., 0, :] if gated else up)
    if gated:
        hidden_BTF = hidden_BTF * up[..., 1, :]
    return linear(hidden_BTF, p["down"]), SimpleNamespace(x=x_BTD, up=up, hidden=hidden_BTF)


def mlp_backward(dy: Array, c: SimpleNamespace, p: Tree, config: Config) -> tuple[Array, Tree]:
    """dy [B, T, D] -> (dx [B, T, D], gradients of p)."""
    dhidden, g_down = linear_backward(dy, c.hidden, p["down"])
    if config.mlp == "swiglu":
        gate, value = c.up[..., 0, :], c.up[..., 1, :]
        silu, dsilu = _silu(gate)
        dup = np.stack([dhidden * value * dsilu, dhidden * silu], axis=-2)
    else:
        dup = dhidden * ACTIVATIONS[config.mlp](c.up)[1]
    dx, g_up = linear_backward(dup, c.x, p["up"])
    return dx, {"up": g_up, "down": g_down}


# --- Residual blocks ----------------------------------------------------------------------------


def residual(
    x_BTD: Array, layer: Callable[[Array], tuple[Array, Any]], p_norm: Tree, config: Config
) -> tuple[Array, tuple[Array, Any]]:
    """pre: x + layer(norm(x)); post: norm(x + layer(x)) (Xiong et al. 2020 compare the two).

    Without `config.residual` there is no `x +`. Returns (out [B, T, D], cache).
    """
    stream_BTD = x_BTD * option(config, "residual")
    if config.norm_position == "pre":
        y_BTD, cache = layer(norm(x_BTD, p_norm, config.norm))
        return stream_BTD + y_BTD, (x_BTD, cache)
    y_BTD, cache = layer(x_BTD)
    total_BTD = stream_BTD + y_BTD
    return norm(total_BTD, p_norm, config.norm), (total_BTD, cache)


def residual_backward(
    dout_BTD: Array,
    layer_backward: Callable[[Array, Any], tuple[Array, Tree]],
    cache: tuple[Array, Any],
    p_norm: Tree,
    config: Config,
) -> tuple[Array, Tree, Tree]:
    """dout [B, T, D] -> (dx [B, T, D], gradients of the norm, gradients of the layer)."""
    norm_input, layer_cache = cache
    if config.norm_position == "pre":
        dy, g_layer = layer_backward(dout_BTD, layer_cache)
        dy, g_norm = norm_backward(dy, norm_input, p_norm, config.norm)
        return dout_BTD * option(config, "residual") + dy, g_norm, g_layer
    dtotal, g_norm = norm_backward(dout_BTD, norm_input, p_norm, config.norm)
    dx, g_layer = layer_backward(dtotal, layer_cache)
    return dtotal * option(config, "residual") + dx, g_norm, g_layer


def block(
    x_BTD: Array, p: Tree, config: Config, v_first: Array | None
) -> tuple[Array, SimpleNamespace]:
    """Attention, then MLP: x [B, T, D] -> (out [B, T, D], cache)."""
    attend = partial(self_attention, p=p["attn"], config=config, v_first=v_first)
    x_BTD, attn_cache = residual(x_BTD, attend, p.get("ln_1", {}), config)
    c = SimpleNamespace(attn=attn_cache, v_first=attn_cache[1].v_first)
    if config.mlp != "none":
        think = partial(mlp, p=p["mlp"], config=config)
        x_BTD, c.mlp = residual(x_BTD, think, p.get("ln_2", {}), config)
    return x_BTD, c


def block_backward(
    dx_BTD: Array, c: SimpleNamespace, p: Tree, config: Config, dv_first: Array
) -> tuple[Array, Tree]:
    """Gradient at the block's output [B, T, D] -> (that at its input, gradients of p)."""
    g: Tree = {}
    if config.mlp != "none":
        back, p_norm = partial(mlp_backward, p=p["mlp"], config=config), p.get("ln_2", {})
        dx_BTD, g["ln_2"], g["mlp"] = residual_backward(dx_BTD, back, c.mlp, p_norm, config)
    back = partial(self_attention_backward, p=p["attn"], config=config, dv_first=dv_first)
    p_norm = p.get("ln_1", {})
    dx_BTD, g["ln_1"], g["attn"] = residual_backward(dx_BTD, back, c.attn, p_norm, config)
    return dx_BTD, g


# --- The model ----------------------------------------------------------------------------------


def cross_entropy(logits_BTV: Array, targets_BT: Array) -> tuple[float, Array]:
    """(mean loss over the targets that are not ignored, dlogits [B, T, V]).

    A logit of -inf is a class that does not exist: probability 0, gradient 0. Without any target
    the loss is 0.
    """
    keep_BT = targets_BT != IGNORE
    count = max(int(keep_BT.sum()), 1)
    index = np.where(keep_BT, targets_BT, 0)[..., None]
    log_p = logits_BTV - logits_BTV.max(axis=-1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(axis=-1, keepdims=True))
    picked_BT = np.take_along_axis(log_p, index, axis=-1)[..., 0]
    loss = -float(np.where(keep_BT, picked_BT, 0).sum()) / count
    dlogits = np.exp(log_p)
    np.put_along_axis(dlogits, index, np.take_along_axis(dlogits, index, -1) - 1, -1)
    return loss, dlogits * keep_BT[..., None] / count


def embed(params: Tree, tokens_BT: Array, config: Config) -> Array:
    """tokens [B, T] -> the first block's input [B, T, D]."""
    x_BTD = params["embed"]["kernel"][tokens_BT]
    T, D = x_BTD.shape[1:]
    if config.position == "learned":
        return x_BTD + params["pos_embed"]["kernel"][:T]
    if config.position == "sinusoidal":
        return x_BTD * math.sqrt(D) + sinusoidal_table(T, D, x_BTD.dtype)
    return x_BTD  # rope acts inside attention; 'none' leaves order to the causal mask


def embed_backward(dx_BTD: Array, params: Tree, tokens_BT: Array, config: Config) -> Tree:
    """dx [B, T, D] -> the gradients of the embeddings (without a tied head's share)."""
    T, D = dx_BTD.shape[1:]
    grads = {"embed": {"kernel": np.zeros_like(params["embed"]["kernel"])}}
    if config.position == "learned":
        grads["pos_embed"] = {"kernel": np.zeros_like(params["pos_embed"]["kernel"])}
        grads["pos_embed"]["kernel"][:T] = dx_BTD.sum(axis=0)
    scale = math.sqrt(D) if config.position == "sinusoidal" else 1.0
    np.add.at(grads["embed"]["kernel"], tokens_BT, scale * dx_BTD)  # sums over repeated tokens
    return grads


def _head(params: Tree, config: Config) -> Tree:
    """The output projection [D, V], from the embedding's own rows if tied (Press and Wolf 2017)."""
    p = {"kernel": params["embed" if config.tie_embeddings else "lm_head"]["kernel"].T}
    return p | ({"bias": params["head_bias"]} if option(config, "lm_head_bias") else {})


def forward(
    params: Tree, tokens_BT: Array, config: Config, targets_BT: Array | None = None
) -> tuple[Array, float | None, SimpleNamespace]:
    """GPT (Radford et al. 2019) -> (logits [B, T, V], loss or None, cache for `backward`).

    The columns of the logits that pad the vocabulary are -inf, so softmax never sees them. The
    soft cap, cap * tanh(logits / cap), is that of Gemma 2 (2024).
    """
    c = SimpleNamespace(tokens=tokens_BT, targets=targets_BT, blocks=[])
    x_BTD = embed(params, tokens_BT, config)
    for layer in range(config.n_layer):
        v_first = c.blocks[0].v_first if layer else None
        x_BTD, cache = block(x_BTD, params["blocks"][layer], config, v_first)
        c.blocks.append(cache)
    c.final = x_BTD
    pre = config.norm_position == "pre"
    c.head_input = norm(x_BTD, params.get("ln_f", {}), config.norm) if pre else x_BTD
    c.capped = linear(c.head_input, _head(params, config))
    if config.logit_softcap:
        c.capped = config.logit_softcap * np.tanh(c.capped / config.logit_softcap)
    exists_V = np.arange(c.capped.shape[-1]) < config.vocab_size
    c.logits = np.where(exists_V, c.capped, -np.inf)
    loss = None if targets_BT is None else cross_entropy(c.logits, targets_BT)[0]
    return c.logits, loss, c


def backward(params: Tree, config: Config, cache: SimpleNamespace) -> Tree:
    """Gradients of the loss, in the structure of `params`; `cache` from `forward` with targets."""
    c = cache
    _, dlogits = cross_entropy(c.logits, c.targets)
    if config.logit_softcap:
        dlogits = dlogits * (1 - (c.capped / config.logit_softcap) ** 2)
    dx_BTD, g_head = linear_backward(dlogits, c.head_input, _head(params, config))
    grads: Tree = {}
    if config.norm_position == "pre":
        p_norm = params.get("ln_f", {})
        dx_BTD, grads["ln_f"] = norm_backward(dx_BTD, c.final, p_norm, config.norm)
    dv_first = np.zeros_like(c.blocks[0].v_first) if c.blocks else None
    blocks: dict[int, Tree] = {}
    for layer in reversed(range(config.n_layer)):
        p = params["blocks"][layer]
        dx_BTD, blocks[layer] = block_backward(dx_BTD, c.blocks[layer], p, config, dv_first)
    as_dict = isinstance(params["blocks"], dict)
    grads["blocks"] = blocks if as_dict else [blocks[layer] for layer in sorted(blocks)]
    grads |= embed_backward(dx_BTD, params, c.tokens, config)
    if config.tie_embeddings:
        grads["embed"]["kernel"] += g_head["kernel"].T
    else:
        grads["lm_head"] = {"kernel": g_head["kernel"].T}
    if option(config, "lm_head_bias"):
        grads["head_bias"] = g_head["bias"]
    return grads


def loss_and_grads(
    params: Tree, tokens_BT: Array, targets_BT: Array, config: Config
) -> tuple[float, Tree]:
    """The mean cross-entropy of targets [B, T] and its gradients, in the structure of `params`."""
    _, loss, cache = forward(params, tokens_BT, config, targets_BT)
    return loss, backward(params, config, cache)


# --- Training -----------------------------------------------------------------------------------


def cosine_lr(
    it: int, *, learning_rate: float, min_lr: float, warmup_iters: int, lr_decay_iters: int
) -> float:
    """The learning rate of step `it`, from 0: linear warm-up, then a half cosine to `min_lr`.

    The cosine is that of Loshchilov and Hutter 2017, without restarts.
    """
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it >= lr_decay_iters:
        return min_lr
    done = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * done)) * (learning_rate - min_lr)


def clip_by_global_norm(grads: Tree, max_norm: float, eps: float = 1e-6) -> tuple[Tree, float]:
    """(gradients scaled down to norm `max_norm` (Pascanu et al. 2013), norm before that).

    The default `eps` is PyTorch's, which leaves the clipped norm a millionth short; 0 is exact.
    A `max_norm` of 0 turns clipping off.
    """
    flat = flatten(grads)
    global_norm = math.sqrt(sum(float((g * g).sum()) for g in flat.values()))
    scale = min(1.0, max_norm / (global_norm + eps)) if max_norm and global_norm else 1.0
    return unflatten({path: g * scale for path, g in flat.items()}, grads), global_norm


def adamw_init(params: Tree) -> SimpleNamespace:
    """The state of `adamw_step`: the step count and both moments, as trees like `params`."""
    zeros = {path: np.zeros_like(p) for path, p in flatten(params).items()}
    return SimpleNamespace(step=0, m=unflatten(zeros, params), v=unflatten(zeros, params))


def adamw_step(
    params: Tree,
    grads: Tree,
    state: SimpleNamespace,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    grad_clip: float = 1.0,
    clip_eps: float = 1e-6,
    decay_all: bool = False,
) -> tuple[Tree, SimpleNamespace, float]:
    """Clip, then AdamW (Loshchilov and Hutter 2019) -> (params, state, norm before clipping).

    Nothing is changed in place. Kernels decay, embeddings' included; biases, norm scales and
    value_mix do not, unless `decay_all`.
    """
    grads, grad_norm = clip_by_global_norm(grads, grad_clip, clip_eps)
    (beta1, beta2), step = betas, state.step + 1
    flat_p, flat_g, flat_m, flat_v = map(flatten, (params, grads, state.m, state.v))
    for path, g in flat_g.items():
        m = flat_m[path] = beta1 * flat_m[path] + (1 - beta1) * g
        v = flat_v[path] = beta2 * flat_v[path] + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)  # both started at zero
        decay = weight_decay if decay_all or path.endswith(".kernel") else 0.0
        flat_p[path] = (1 - lr * decay) * flat_p[path] - lr * m_hat / (np.sqrt(v_hat) + eps)
    new_params, new_m, new_v = (unflatten(f, params) for f in (flat_p, flat_m, flat_v))
    return new_params, SimpleNamespace(step=step, m=new_m, v=new_v), grad_norm
