"""The training step and the evaluation step: pure functions, jitted once.

K steps of a dispatch, M micro-batches of a step, B sequences of a micro-batch, T length.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import stages
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt import model
from jaxgpt.config import Config
from jaxgpt.loss import cross_entropy
from jaxgpt.optimizer import choose, frozen, kernels, make_optimizer, schedule
from jaxgpt.sharding import BATCH, is_virtual_cpu_mesh, param_sharding, with_mesh

State = dict[str, Any]
"""{"params": nested dicts, "opt_state": optax's, "step": int32, how many steps were taken}."""


def create_state(config: Config) -> State:
    """The state before the first step, from `config.seed`; run it under jit."""
    params = model.init(config, jax.random.fold_in(jax.random.key(config.seed), 0))
    return {
        "params": params,
        "opt_state": make_optimizer(config).init(params),
        "step": jnp.zeros((), jnp.int32),
    }


def abstract_params(config: Config, mesh: Mesh) -> dict[str, Any]:
    """The parameters' shapes, types and places on the mesh, without the arrays."""
    _, shapes, axes = model.split(config)
    return jax.tree.map(
        lambda p, letters: jax.ShapeDtypeStruct(
            p.shape, p.dtype, sharding=param_sharding(mesh, letters)
        ),
        shapes,
        axes,
    )


def abstract_state(config: Config, mesh: Mesh) -> State:
    """The state's shapes, types and places on the mesh, without the arrays.

    An optimizer's arrays lie where the parameters that they follow lie.
    """
    places = jax.tree.map(lambda p: p.sharding, abstract_params(config, mesh))
    places_by_path = {
        jax.tree_util.keystr(path): place for path, place in jax.tree.leaves_with_path(places)
    }
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(path: tuple, array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        tails = (jax.tree_util.keystr(path[i:]) for i in range(len(path)))
        where = next((places_by_path[t] for t in tails if t in places_by_path), everywhere)
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)

    return jax.tree.map_with_path(place, jax.eval_shape(partial(create_state, config)))


def state_shardings(config: Config, mesh: Mesh) -> State:
    """Where each array of the state lies on the mesh."""
    return jax.tree.map(lambda array: array.sharding, abstract_state(config, mesh))


def init_state(config: Config, mesh: Mesh) -> State:
    """The state before the first step, born where it belongs on the mesh."""
    return jax.jit(partial(create_state, config), out_shardings=state_shardings(config, mesh))()


def make_train_step(config: Config, mesh: Mesh) -> stages.Wrapped:
    """-> jitted `(state, windows_KMBT, count) -> (state, metrics)`, which donates the state.

    Takes the first `count` of the K steps. Metrics are arrays [K]: `loss` (the mean over
    the step's targets, in nats), `grad_norm` (before clipping) and `lr`. A step whose loss or
    norm is not finite leaves weights and moments as they are; its number and batch are used up.
    """
    graphdef, shapes, _ = model.split(config)
    optimizer, learning_rate = make_optimizer(config), schedule(config)
    still = frozen(config, shapes)

    def loss(weights: tuple[dict, dict], windows_BT: jax.Array, keys_B: jax.Array):
        params, tied = (_hold(tree, still) for tree in weights)
        inputs_BT, targets_BT = inputs_and_targets(windows_BT)
        drop = model.Dropout(config.dropout, keys_B)
        features, _ = nnx.merge(graphdef, params).features(inputs_BT, drop)
        return cross_entropy(nnx.merge(graphdef, params | tied).logits(features), targets_BT)

    def one_step(state: State, windows_MBT: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        seed = config.seed if config.dropout else 0  # so without it all seeds share a program
        keys_MB = _dropout_keys(seed, state["step"], windows_MBT.shape[:2])
        weights = _by_use(state["params"], config)
        gradient = jax.value_and_grad(loss, has_aux=True)
        accumulate = _accumulate_apart(mesh) if is_virtual_cpu_mesh(mesh) else _accumulate
        total, count, (grads, tied) = accumulate(gradient, weights, windows_MBT, keys_MB)
        count = jnp.maximum(count, 1)  # a step of nothing but prompts has a loss of 0
        grads |= jax.tree.map(jnp.add, {name: grads[name] for name in tied}, tied)
        grads = jax.tree.map(lambda g: g / count, grads)
        metrics = {
            "loss": total / count,
            "grad_norm": optax.tree.norm(grads),
            "lr": jnp.asarray(learning_rate(state["step"])),  # a constant one is a Python number
        }
        is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        old = state["params"]
        updates, opt_state = optimizer.update(grads, state["opt_state"], old, is_finite=is_finite)
        params = optax.apply_updates(old, updates)
        keep = lambda is_frozen, new, old: old if is_frozen else choose(is_finite, new, old)
        params = jax.tree.map(keep, still, params, old)
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

    def train_step(state: State, windows_KMBT: jax.Array, count: jax.Array):
        steps = len(windows_KMBT)
        first = lambda i: windows_KMBT[i].astype(jnp.int32)
        if steps == 1:
            state, metrics = one_step(state, first(0))
            return state, jax.tree.map(lambda value: value[None], metrics)

        def body(i: jax.Array, carry: tuple) -> tuple:
            state, metrics = carry
            state, new = one_step(state, first(i))
            return state, jax.tree.map(lambda all, one: all.at[i].set(one), metrics, new)

        shapes = jax.eval_shape(one_step, state, jax.eval_shape(first, 0))[1]
        metrics = jax.tree.map(lambda one: jnp.zeros((steps, *one.shape), one.dtype), shapes)
        return jax.lax.fori_loop(0, count, body, (state, metrics))

    places = state_shardings(config, mesh), NamedSharding(mesh, PartitionSpec())
    return jax.jit(with_mesh(mesh, train_step), donate_argnums=0, out_shardings=places)


def make_eval_step(config: Config, mesh: Mesh) -> stages.Wrapped:
    """-> jitted `(params, windows_KMBT, count) -> (summed loss, number of targets)` of `count` batches."""
    graphdef, _, _ = model.split(config)

    def eval_step(params: dict, windows_KMBT: jax.Array, count: jax.Array):
        network = nnx.merge(graphdef, cast_params(params, config.dtype))

        def body(i: jax.Array, totals: tuple) -> tuple:
            (windows_BT,) = windows_KMBT[i].astype(jnp.int32)
            inputs_BT, targets_BT = inputs_and_targets(windows_BT)
            new = cross_entropy(network(inputs_BT), targets_BT)
            return jax.tree.map(jnp.add, totals, new)

        zero = jax.eval_shape(body, 0, (jnp.zeros(()), jnp.zeros((), jnp.int32)))
        return jax.lax.fori_loop(0, count, body, jax.tree.map(jnp.zeros_like, zero))

    return jax.jit(with_mesh(mesh, eval_step))


def _accumulate(grad: Callable, params: Any, windows_MBT: jax.Array, keys_MB: jax.Array):
    """Loss, targets and gradients of a step, summed over its micro-batches in float32 at least."""
    if len(windows_MBT) == 1:
        (total, count), grads = grad(params, windows_MBT[0], keys_MB[0])
        return total, count, jax.tree.map(_wide, grads)

    def add(sums: tuple, micro: tuple) -> tuple[tuple, None]:
        (total, count), grads = grad(params, *micro)
        return jax.tree.map(jnp.add, sums, (total, count, jax.tree.map(_wide, grads))), None

    (total, count), grads = jax.eval_shape(grad, params, windows_MBT[0], keys_MB[0])
    shapes = total, count, jax.eval_shape(partial(jax.tree.map, _wide), grads)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return jax.lax.scan(add, zeros, (windows_MBT, keys_MB))[0]


def _accumulate_apart(mesh: Mesh) -> Callable:
    """`_accumulate` for devices that hold all of the parameters and a part of the batch each.

    Each one sums its own, and then all is summed over the devices as one array: XLA:CPU's
    all-reduce lets the devices meet once for every array that it is given.
    """

    def accumulate(grad: Callable, params: Any, windows_MBT: jax.Array, keys_MB: jax.Array):
        def local(params: Any, windows_MBT: jax.Array, keys_MB: jax.Array):
            sums = _accumulate(grad, params, windows_MBT, keys_MB)
            flat, unravel = ravel_pytree(sums)
            return unravel(jax.lax.psum(flat, BATCH))

        batch, whole = PartitionSpec(None, BATCH), PartitionSpec()
        specs = {"in_specs": (whole, batch, batch), "out_specs": whole}
        return jax.shard_map(local, mesh=mesh, check_vma=False, **specs)(
            params, windows_MBT, keys_MB
        )

    return accumulate


def _hold(params: dict, still: dict) -> dict:
    """The parameters, of which those that are frozen have no gradient; nor is it computed."""
    still = {name: still[name] for name in params}
    return jax.tree.map(lambda s, p: jax.lax.stop_gradient(p) if s else p, still, params)


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def cast_params(params: dict, dtype: str) -> dict:
    """The parameters in the compute type, once a step; norms and biases stay as they are."""
    return jax.tree.map(lambda p, cast: p.astype(dtype) if cast else p, params, kernels(params))


def _by_use(params: dict, config: Config) -> tuple[dict, dict]:
    """The parameters to compute with, and the embedding again where it is the output map too.

    Its two gradients stay apart until a step's end. Added in each micro-batch, they would also be
    summed over all devices in each: XLA scatters the one into the other. Rows are looked up in
    float32, so that the many additions to a frequent token's row are float32's.
    """
    weights = cast_params(params, config.dtype)
    tied = {"embed": weights["embed"]} if config.tie_embeddings else {}
    return weights | {"embed": params["embed"]}, tied


def inputs_and_targets(windows_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """TokenSplit, and the token after each. In a window `~id` is a token that is not a target."""
    tokens_BT = jnp.where(windows_BT < 0, ~windows_BT, windows_BT)
    return tokens_BT[:, :-1], windows_BT[:, 1:]


def _dropout_keys(seed: int, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A key for every sequence of a step, by its number in the step, [M, B]."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)
    numbers_MB = jnp.arange(shape[0] * shape[1]).reshape(shape)
    return jax.vmap(jax.vmap(partial(jax.random.fold_in, key)))(numbers_MB)
