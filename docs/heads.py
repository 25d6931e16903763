"""Compare heads computed one by one with heads computed all at once: outputs and speed.

    python docs/heads.py

B batch, T length, S key length, D embedding, N heads, H head dim, C query, key and value.
"""

import time

import jax
import jax.numpy as jnp

B, T, D, N = 16, 64, 128, 8
H = D // N


def one_head(x_BTD, wq_DH, wk_DH, wv_DH):
    """Compute one head separately: three matrices, a mask, a softmax. Return [B, T, H]."""
    q_BTH, k_BTH, v_BTH = x_BTD @ wq_DH, x_BTD @ wk_DH, x_BTD @ wv_DH
    scores_BTS = q_BTH @ k_BTH.swapaxes(1, 2) / H**0.5
    scores_BTS = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores_BTS, -jnp.inf)
    return jax.nn.softmax(scores_BTS) @ v_BTH


def separate(x_BTD, w_DCNH):
    """Compute the heads one by one and concatenate them. Return [B, T, D]."""
    heads = [one_head(x_BTD, *w_DCNH[:, :, n].swapaxes(0, 1)) for n in range(N)]
    return jnp.concatenate(heads, axis=-1)


def together(x_BTD, w_DCNH):
    """Compute all heads at once; the head is one more axis, like the batch. Return [B, T, D]."""
    q_BTNH, k_BTNH, v_BTNH = jnp.moveaxis(jnp.einsum("BTD,DCNH->BTCNH", x_BTD, w_DCNH), 2, 0)
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH) / H**0.5
    scores_BNTS = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores_BNTS, -jnp.inf)
    out_BTNH = jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores_BNTS), v_BTNH)
    return out_BTNH.reshape(B, T, D)


def main() -> None:
    """Print the difference of the outputs, then the compile and run time of both gradients."""
    keys = jax.random.split(jax.random.key(0), 3)
    x_BTD = jax.random.normal(keys[0], (B, T, D))
    w_DCNH = jax.random.normal(keys[1], (D, 3, N, H)) / D**0.5
    weights_BTD = jax.random.normal(keys[2], (B, T, D))
    both, seconds = {"separate": separate, "together": together}, {}
    difference = jnp.abs(separate(x_BTD, w_DCNH) - together(x_BTD, w_DCNH)).max()
    print(f"largest difference of the outputs: {difference:.1e}")
    loss = lambda w, heads: (heads(x_BTD, w) * weights_BTD).sum()
    grads = {name: jax.jit(jax.grad(lambda w, f=f: loss(w, f))) for name, f in both.items()}
    for name, grad in grads.items():
        began = time.perf_counter()
        jax.block_until_ready(grad(w_DCNH))
        print(f"{name}: compiled in {time.perf_counter() - began:.2f} s")
        seconds[name] = []
    for _ in range(200):  # alternating, so that other jobs disturb both equally
        for name, grad in grads.items():
            began = time.perf_counter()
            jax.block_until_ready(grad(w_DCNH))
            seconds[name].append(time.perf_counter() - began)
    for name, times in seconds.items():
        print(f"{name}: {1000 * sorted(times)[len(times) // 2]:.2f} ms, forward and backward")


if __name__ == "__main__":
    main()
