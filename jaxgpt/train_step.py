"""The training step and the evaluation step: pure functions, jitted once.

U steps per call, M micro-batches per step, B sequences per micro-batch, T length. W remembered
steps, with 2 numbers each: the loss and the gradient norm.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import stages
from jax.sharding import Mesh, NamedSharding
from jax.tree_util import register_dataclass

from jaxgpt import kernels, spikes
from jaxgpt.config import Config
from jaxgpt.kernels.accumulate import accumulate, is_data_mesh
from jaxgpt.kernels.dropout import Dropout
from jaxgpt.kernels.norm import fold_gains
from jaxgpt.loss import cross_entropy
from jaxgpt.model import GPT, abstract_model, init_params
from jaxgpt.optimizer import frozen_mask, make_optimizer, schedule
from jaxgpt.runtime.device import compiler_options
from jaxgpt.sharding import param_sharding, replicated, update_sharding, use_mesh


@register_dataclass
@dataclass
class TrainState:
    """Everything that a training step changes."""

    opt_state: Any
    params: dict[str, Any]
    step: jax.Array  # steps so far, int32
    recent_2W: jax.Array | None = None  # losses and gradient norms, if `skip_loss_spikes`


def create_state(config: Config) -> TrainState:
    """Return the state before the first step, drawn from `config.seed`."""
    params = init_params(config, jax.random.fold_in(jax.random.key(config.seed), 0))
    opt_state = make_optimizer(config).init(params)
    recent_2W = spikes.no_steps(config.spike_window) if config.skip_loss_spikes else None
    return TrainState(opt_state, params, step=jnp.zeros((), jnp.int32), recent_2W=recent_2W)


def abstract_params(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Return the parameters' shapes, dtypes and shardings, without the arrays."""
    _, shapes, axes = abstract_model(config)
    place = lambda shape, letters: shape.update(sharding=param_sharding(mesh, letters))
    return jax.tree.map(place, shapes, axes)


def update_shardings(config: Config, mesh: Mesh) -> dict[str, Any]:
    """Return how the moments and the update of each parameter are split (`shard_optimizer`)."""
    _, shapes, axes = abstract_model(config)

    def place(shape: jax.ShapeDtypeStruct, letters: str, is_frozen: bool) -> NamedSharding:
        if config.shard_optimizer and not is_frozen:
            return update_sharding(mesh, letters, shape.shape)
        return param_sharding(mesh, letters)

    return jax.tree.map(place, shapes, axes, frozen_mask(config, shapes))


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
    """Return the state's shapes, dtypes and shardings, without the arrays.

    The path of an optimizer's array, such as a moment, ends with the path of its parameter. If both
    have the same shape, the array is sharded as the parameter's update is. Otherwise every device
    holds all of it.
    """
    keystr = jax.tree_util.keystr
    shapes = abstract_model(config).shapes
    place = lambda shape, sharding: shape.update(sharding=sharding)
    updates = jax.tree.map(place, shapes, update_shardings(config, mesh))
    update_of = {keystr(path): update for path, update in jax.tree.leaves_with_path(updates)}

    def describe(path: tuple, array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        tails = (keystr(path[i:]) for i in range(len(path)))
        update = next((update_of[tail] for tail in tails if tail in update_of), None)
        if update is None or update.shape != array.shape:
            return array.update(sharding=replicated(mesh))
        return array.update(sharding=update.sharding)

    state = jax.tree.map_with_path(describe, jax.eval_shape(partial(create_state, config)))
    return replace(state, params=abstract_params(config, mesh))


def state_shardings(config: Config, mesh: Mesh) -> TrainState:
    return jax.tree.map(lambda array: array.sharding, abstract_state(config, mesh))


def init_state(config: Config, mesh: Mesh) -> TrainState:
    """Return the state before the first step, initialised shard by shard on the mesh."""
    create = use_mesh(mesh)(partial(create_state, config))
    return jax.jit(create, out_shardings=state_shardings(config, mesh))()


def make_train_step(config: Config, mesh: Mesh) -> stages.Wrapped:
    """Return the jitted `(state, windows_UMBT, count) -> (state, metrics)`.

    `windows_UMBT` are token ids [U, M, B, T + 1]; the call takes the first `count` of U steps, and
    reuses the old state's memory. Metrics [U]: `loss` (nats per target), `grad_norm` (unclipped),
    `lr`, and `spike` if `skip_loss_spikes`. A step whose loss or norm is not finite, a spike, or a
    step without targets counts, but changes no weights and moments. A loop should read the metrics
    of the last or the second last call, because dozens of queued calls deadlock the virtual devices
    of a CPU.
    """
    optimizer, learning_rate = make_optimizer(config), schedule(config)
    is_frozen = frozen_mask(config, abstract_model(config).shapes)
    sum_gradients = make_sum_gradients(config, mesh)
    shardings = state_shardings(config, mesh)
    # in the update each device has its share of the parameters, as it has of their moments
    shares = replace(shardings, params=update_shardings(config, mesh))
    if config.shard_optimizer:
        # ZeRO-1: gradients are reduce-scattered, each device updates its share of the parameters,
        # and the new parameters are all-gathered
        reshard = jax.lax.with_sharding_constraint
        grad_specs = jax.tree.map(lambda share: share.spec, shares.params)
    else:  # the update is split as the parameters are
        reshard, grad_specs = (lambda tree, _: tree), None

    def take_step(state: TrainState, windows_MBT: jax.Array) -> tuple[TrainState, dict]:
        """Take one step; return the new state and the metrics."""
        keys_MB = dropout_keys(config, state.step, windows_MBT.shape[:2])
        # looked up here, because the platform is known only while the step is traced
        sum_over_devices = kernels.sum_over_devices(mesh, grad_specs)
        # without this, XLA may keep the parameters split between the steps of a loop
        params = reshard(state.params, shardings.params)
        totals, grads = sum_over_devices(sum_gradients)(params, windows_MBT, keys_MB)
        if not is_data_mesh(mesh):  # on a mesh of `data` alone, sum_over_devices has summed
            # otherwise XLA sums over `data` in every micro-batch
            grads = reshard(grads, shardings.params)
        grads = reshard(grads, shares.params)
        loss_sum, num_targets = totals
        divisor = jnp.maximum(num_targets, 1)  # there is no target if all tokens are prompts
        grads = jax.tree.map(lambda g: g / divisor, grads)
        loss, norm = loss_sum / divisor, optax.tree.norm(grads)
        # every entry is logged: to metrics.jsonl and the trackers, at each log_interval
        metrics = {"loss": loss, "grad_norm": norm, "lr": jnp.asarray(learning_rate(state.step))}
        is_accepted, state, metrics = judge_and_record(config, state, metrics, num_targets > 0)
        state = apply_update(optimizer, is_frozen, reshard(state, shares), grads, is_accepted)
        # shares first: otherwise XLA gathers both old and new parameters, and then selects
        return reshard(reshard(state, shares), shardings), metrics

    @use_mesh(mesh)
    def train_step(state: TrainState, windows_UMBT: jax.Array, count: jax.Array):
        """Take the first `count` of U steps; return the new state and the metrics, [U]."""
        if len(windows_UMBT) > 1:
            return repeat_step(take_step, state, windows_UMBT, count)
        state, metrics = take_step(state, windows_UMBT[0])
        return state, jax.tree.map(lambda value: value[None], metrics)

    return jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
        compiler_options=compiler_options(config, mesh),
    )


def make_sum_gradients(config: Config, mesh: Mesh) -> Callable:
    """Return `(params, windows_MBT, keys_MB) -> ((summed loss, number of targets), gradients)`.

    Everything is summed over the M micro-batches.
    """
    with use_mesh(mesh):  # whether gains are folded depends on the platform
        step_config = make_step_config(config)
    grad_fn = jax.value_and_grad(make_loss_fn(config, step_config), has_aux=True)

    def sum_gradients(params: dict, windows_MBT: jax.Array, keys_MB: jax.Array) -> tuple:
        # Parameters become the weights of `step_config`, and then gradients of weights become those
        # of parameters, once per step and not once per micro-batch.
        weights, to_params = jax.vjp(partial(to_step_weights, config, step_config), params)
        weights = cast_weights(weights, config.dtype)
        totals, weight_grads = accumulate(grad_fn, weights, windows_MBT, keys_MB)
        (param_grads,) = to_params(weight_grads)
        return totals, param_grads

    return sum_gradients


def judge_and_record(
    config: Config, state: TrainState, metrics: dict, has_targets: jax.Array
) -> tuple[jax.Array, TrainState, dict]:
    """Return whether a step is applied, the state that remembers the step, and its metrics.

    A step without targets is neither applied nor remembered. With `skip_loss_spikes`, the metrics
    have another entry, `spike`.
    """
    loss, norm = jnp.where(has_targets, metrics["loss"], jnp.nan), metrics["grad_norm"]
    is_accepted = jnp.isfinite(loss) & jnp.isfinite(norm)
    if state.recent_2W is None:
        return is_accepted, state, metrics
    is_spike = spikes.is_spike(state.recent_2W, loss, norm, config.skip_loss_spikes)
    is_spike &= is_accepted  # a step that is not finite is reported as such
    recent_2W = spikes.remember(state.recent_2W, loss, norm)
    state = replace(state, recent_2W=recent_2W)
    return is_accepted & ~is_spike, state, metrics | {"spike": is_spike}


@jax.named_scope("optimizer")
def apply_update(
    optimizer: optax.GradientTransformationExtraArgs,
    is_frozen: dict,
    state: TrainState,
    grads: dict,
    is_accepted: jax.Array,
) -> TrainState:
    """Update all parameters that are not frozen if `is_accepted`; count the step in any case."""
    params = state.params
    updates, opt_state = optimizer.update(grads, state.opt_state, params, is_accepted=is_accepted)

    # weight decay gives frozen parameters an update too
    def keep_or_take(frozen: bool, new: jax.Array, old: jax.Array) -> jax.Array:
        return old if frozen else jnp.where(is_accepted, new, old)

    params = jax.tree.map(keep_or_take, is_frozen, optax.apply_updates(params, updates), params)
    return replace(state, opt_state=opt_state, params=params, step=state.step + 1)


def repeat_step(step: Callable, state: TrainState, windows_UMBT: jax.Array, count: jax.Array):
    """Take `count` steps in a loop on the device; return the state and metrics [U]."""

    def body(i: jax.Array, carry: tuple) -> tuple:
        state, metrics_U = carry
        windows_MBT = jax.lax.dynamic_index_in_dim(windows_UMBT, i, keepdims=False)
        state, metrics = step(state, windows_MBT)
        return state, jax.tree.map(lambda all_U, one: all_U.at[i].set(one), metrics_U, metrics)

    _, shapes = jax.eval_shape(step, state, windows_UMBT[0])
    U = len(windows_UMBT)
    metrics_U = jax.tree.map(lambda one: jnp.zeros(U, one.dtype), shapes)
    return jax.lax.fori_loop(0, count, body, (state, metrics_U))


def make_step_config(config: Config) -> Config:
    """Return the config of an equivalent model, which the step differentiates.

    A tied embedding becomes a weight per use: the step adds their gradients after the last
    micro-batch, because XLA would otherwise sum them over all devices in every micro-batch. Gains
    of norms may become part of the maps after them.
    """
    graphdef, shapes, _ = abstract_model(config)
    network = nnx.merge(graphdef, shapes)
    if not isinstance(network, GPT):
        return config
    folds = type(network) is GPT and kernels.folds_gains(config)  # a subclass may have other parts
    return config.replace(tie_embeddings=False, norm_gain=config.norm_gain and not folds)


def to_step_weights(config: Config, step_config: Config, params: dict) -> dict:
    """Convert the parameters of `config` to those of `make_step_config`."""
    if config.tie_embeddings != step_config.tie_embeddings:
        params = params | {"lm_head": params["embed"]}
    return fold_gains(params) if config.norm_gain != step_config.norm_gain else params


def make_loss_fn(config: Config, step_config: Config) -> Callable:
    """Return `(weights, windows_BT, keys_B) -> (summed loss, number of targets)`.

    The weights are those of `step_config`, the model that the step differentiates.
    """
    graphdef, shapes, _ = abstract_model(step_config)
    is_frozen = frozen_mask(config, shapes)
    if config.tie_embeddings != step_config.tie_embeddings:
        is_frozen["lm_head"] = is_frozen["embed"]

    def stop_frozen(frozen: bool, weight: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(weight) if frozen else weight  # computes no gradient

    def loss_fn(weights: dict, windows_BT: jax.Array, keys_B: jax.Array) -> tuple:
        model = nnx.merge(graphdef, jax.tree.map(stop_frozen, is_frozen, weights))
        inputs_BT, targets_BT = inputs_and_targets(windows_BT)
        logits_BTV = model(inputs_BT, Dropout(config.dropout, keys_B))
        return cross_entropy(logits_BTV, targets_BT)

    return loss_fn


def make_eval_step(config: Config, mesh: Mesh) -> stages.Wrapped:
    """Return the jitted `(params, windows_UMBT, count) -> (summed loss, number of targets)`.

    `windows_UMBT` are token ids [U, 1, B, T + 1], of which it evaluates the first `count` batches.
    """
    graphdef = abstract_model(config).graphdef

    @use_mesh(mesh)
    def eval_step(params: dict, windows_UMBT: jax.Array, count: jax.Array):
        model = nnx.merge(graphdef, cast_params(params, config.dtype))

        def body(i: jax.Array, totals: tuple) -> tuple:
            inputs_BT, targets_BT = inputs_and_targets(windows_UMBT[i, 0])
            loss_and_count = cross_entropy(model(inputs_BT), targets_BT)
            return jax.tree.map(jnp.add, totals, loss_and_count)

        return jax.lax.fori_loop(0, count, body, (jnp.zeros(()), jnp.zeros((), int)))

    return jax.jit(eval_step)


def cast_params(params: dict, dtype: str) -> dict:
    """Cast every parameter named `kernel` to `dtype`; norms and biases keep their dtype."""

    def cast(path: tuple, param: jax.Array) -> jax.Array:
        return param.astype(dtype) if path[-1].key == "kernel" else param

    return jax.tree.map_with_path(cast, params)


def cast_weights(weights: dict, dtype: str) -> dict:
    """Cast kernels to the compute dtype, except that the lookup of tokens stays in float32.

    The lookup's gradient sums many small contributions to the row of a frequent token.
    """
    cast = cast_params(weights, dtype)
    if "embed" in weights:
        cast = cast | {"embed": weights["embed"]}
    return cast


def inputs_and_targets(windows_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return inputs and targets, both int32 [B, T], of windows [B, T + 1].

    A negative number `~id` in a window stands for the token `id`, which is an input but no target.
    As a target it stays negative, so `cross_entropy` skips it.
    """
    windows_BT = windows_BT.astype(jnp.int32)
    tokens_BT = jnp.where(windows_BT < 0, ~windows_BT, windows_BT)
    return tokens_BT[:, :-1], windows_BT[:, 1:]


def dropout_keys(config: Config, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return a key per sequence of a step, [M, B], from the sequence's index in the step."""
    # without dropout, all seeds share a compiled program
    seed = config.seed if config.dropout else 0
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), step)
    numbers_MB = jnp.arange(shape[0] * shape[1]).reshape(shape)
    return jax.vmap(jax.vmap(partial(jax.random.fold_in, key)))(numbers_MB)
