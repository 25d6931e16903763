"""Test the schedules, AdamW and Muon against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_trees_close
from reference import numpy_gpt as ref

from jaxgpt import model, muon
from jaxgpt.config import Config
from jaxgpt.interop import huggingface
from jaxgpt.kernels.newton_schulz import POLYNOMIALS
from jaxgpt.optimizer import make_optimizer, schedule

PARAMS = {
    "embed": {"kernel": np.ones((5, 3))},
    "blocks": {0: {"attn": {"qkv": {"kernel": np.ones((3, 3, 2, 2)), "bias": np.ones((3, 2, 2))}}}},
    "ln_f": {"scale": np.ones(3), "bias": np.ones(3)},
}


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_cosine_schedule_matches_nanogpt(warmup):
    keys = {"learning_rate": 1e-2, "min_lr": 1e-3, "warmup_iters": warmup, "lr_decay_iters": 30}
    ours = jax.vmap(schedule(Config(**keys)))(jnp.arange(40))
    theirs = [ref.cosine_lr(it, **keys) for it in range(40)]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_decay_without_lr_decay_iters_ends_at_max_iters():
    config = Config(learning_rate=1.0, min_lr=0.1, warmup_iters=0, max_iters=50)
    rates = jax.vmap(schedule(config))(jnp.arange(51))
    assert float(rates[50]) == pytest.approx(0.1)
    assert np.all(np.diff(rates) < 0)


def test_learning_rate_is_constant_without_decay():
    config = Config(learning_rate=0.25, decay_lr=False, max_iters=10)
    assert {float(schedule(config)(step)) for step in range(20)} == {0.25}


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_wsd_schedule_is_piecewise_linear(warmup, fraction):
    config = Config(
        learning_rate=2.0, min_lr=0.5, warmup_iters=warmup, max_iters=50,
        lr_schedule="wsd", decay_fraction=fraction,
    )  # fmt: skip
    ours = jax.vmap(schedule(config))(jnp.arange(60))
    begin = max(50 * (1 - fraction), warmup)
    corners = [(-1, 0.0), (warmup, 2.0)] if warmup else [(0, 2.0)]
    corners += [(begin, 2.0), (50, 0.5)] if fraction else [(49, 2.0), (50, 0.5)]
    theirs = np.interp(np.arange(60), *zip(*corners, strict=True))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    held = schedule(config.replace(decay_lr=False))
    assert {float(held(step)) for step in range(60)} == {2.0}


class DecayAll(Config):
    """A config whose biases and norms decay too."""

    def weight_decay_mask(self, params):
        return jax.tree.map(lambda _: True, params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("clip", "kind"), [(0.0, Config), (0.5, Config), (100.0, Config), (0.0, DecayAll)]
)
def test_ten_adamw_steps_match_numpy(clip, kind):
    keys = {"learning_rate": 1e-2, "min_lr": 1e-3, "warmup_iters": 3, "lr_decay_iters": 10}
    config = kind(**keys, beta1=0.8, beta2=0.9, weight_decay=0.2, grad_clip=clip)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        optimizer = make_optimizer(config)
        ours, theirs = PARAMS, PARAMS
        opt_state, state = optimizer.init(ours), ref.adamw_init(theirs)
        for it in range(10):
            grads = jax.tree.map(lambda p: rng.standard_normal(p.shape), PARAMS)
            updates, opt_state = optimizer.update(grads, opt_state, ours)
            ours = optax.apply_updates(ours, updates)
            theirs, state, _ = ref.adamw_step(
                theirs,
                grads,
                state,
                lr=ref.cosine_lr(it, **keys),
                betas=(0.8, 0.9),
                weight_decay=0.2,
                grad_clip=clip,
                clip_eps=0,
                decay_all=kind is DecayAll,
            )
    assert_trees_close(ours, theirs, atol=1e-6)


def orthogonal(matrix: np.ndarray, polynomial: str = "jordan", iterations=5) -> np.ndarray:
    """Return Newton-Schulz iterations of a matrix [inputs, outputs] (Jordan et al. 2024)."""
    if polynomial == "jordan":
        coefficients, x = [(3.4445, -4.7750, 2.0315)] * 5, matrix / np.linalg.norm(matrix)
    else:
        coefficients = [  # of Amsel et al. (2025)
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ]
        x = matrix / (1.02 * np.linalg.norm(matrix))
    for a, b, c in coefficients[:iterations]:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def by_matrix(function, path: str, kernel: np.ndarray, width: int, per_head=False) -> np.ndarray:
    """Apply `function` to each input-by-output matrix of a block's kernel."""
    if per_head and path.endswith("attn.out.kernel"):
        return np.stack([function(head) for head in kernel])
    if per_head and path.endswith("qkv.kernel"):
        heads = [[function(kernel[:, i, n]) for n in range(kernel.shape[2])] for i in range(3)]
        return np.stack([np.stack(part, 1) for part in heads], 1)
    if path.endswith("attn.out.kernel"):
        return function(kernel.reshape(-1, width)).reshape(kernel.shape)
    if path.endswith(("qkv.kernel", "kv.kernel")) or (kernel.ndim == 3 and ".up." in path):
        parts = [by_matrix(function, "", kernel[:, i], width) for i in range(kernel.shape[1])]
        return np.stack(parts, 1)
    return function(kernel.reshape(len(kernel), -1)).reshape(kernel.shape)


def muon_direction(update: np.ndarray) -> np.ndarray:
    """Scale an orthogonal matrix to an RMS of 0.2."""
    return 0.2 * np.sqrt(max(update.shape)) * update


def normuon_direction(update: np.ndarray, mean_square: np.ndarray) -> np.ndarray:
    """Divide the columns of an orthogonal matrix by their running RMS (Li et al. 2025).

    `mean_square`, one number per output, changes.
    """
    mean_square += (1 - 0.95) * (np.mean(update**2, axis=0) - mean_square)
    update = update / np.sqrt(mean_square)
    return 0.2 * update / np.sqrt(np.mean(update**2))


MUON_OPTIONS = [
    {},
    {"n_kv_head": 1, "mlp": "swiglu"},
    {"n_layer": 0},
    {"muon_polynomial": "polar_express"},
    {"momentum_warmup_iters": 4},
    {"cautious_weight_decay": True},
    {"optimizer": "normuon"},
    {"muon_iterations": 3, "muon_per_head": True},
    {"optimizer": "normuon", "muon_iterations": 3, "muon_polynomial": "polar_express"},
]


@pytest.mark.parametrize("options", MUON_OPTIONS, ids=str)
@pytest.mark.parametrize("scan", [False, True])
def test_muon_steps_match_numpy(options, scan):
    """Muon updates each matrix of the blocks and AdamW the rest; all decay alike."""
    config = Config(**{
        "vocab_size": 5, "block_size": 3, "n_layer": 2, "n_head": 2, "n_embd": 4, "mlp_dim": 6,
        "optimizer": "muon", "learning_rate": 0.1, "decay_lr": False, "grad_clip": 0.0,
        "weight_decay": 0.2, "scan_layers": scan and options.get("n_layer") != 0,
    } | options)  # fmt: skip
    plain = config.replace(scan_layers=False)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        shapes = model.abstract_model(plain)[1]
        draw = lambda: jax.tree.map(lambda p: rng.standard_normal(p.shape), shapes)
        start, grads = draw(), [draw(), draw()]
        optimizer = make_optimizer(config)
        lay = huggingface.stack_layers if config.scan_layers else lambda tree: tree
        ours = lay(start)
        state, update = optimizer.init(ours), jax.jit(optimizer.update)
        for grad in grads:
            updates, state = update(lay(grad), state, ours)
            ours = optax.apply_updates(ours, updates)
    ours = model.unstack_layers(ours) if config.scan_layers else ours
    ours = ref.flatten(jax.device_get(ours))
    wanted = muon_by_numpy(config, start, grads)
    assert_trees_close({path: ours[path] for path in wanted}, wanted, atol=1e-6)


def muon_by_numpy(config: Config, start: dict, grads: list[dict]) -> dict:
    """Return the parameters after AdamW and Muon steps; only Muon's if the decay is cautious."""
    theirs, adam = start, ref.adamw_init(start)
    for grad in grads:
        theirs, adam, _ = ref.adamw_step(
            theirs, grad, adam, lr=0.1, betas=(0.9, 0.95), weight_decay=0.2, grad_clip=0
        )
    wanted = {} if config.cautious_weight_decay else ref.flatten(theirs)
    flat_grads = list(map(ref.flatten, grads))
    for path, kernel in ref.flatten(start).items():
        if not (path.startswith("blocks") and path.endswith("kernel")):
            continue
        momentum, moments = np.zeros_like(kernel), {}
        for step, grad in enumerate(flat_grads, 1):
            warmup = config.momentum_warmup_iters
            beta = 0.85 + 0.1 * min(1, step / warmup) if warmup else 0.95
            momentum = beta * momentum + (1 - beta) * grad[path]
            ahead = beta * momentum + (1 - beta) * grad[path]  # Nesterov's
            numbers = iter(range(99))  # of the kernel's matrices

            def direction(matrix: np.ndarray, numbers=numbers, moments=moments) -> np.ndarray:
                update = orthogonal(matrix, config.muon_polynomial, config.muon_iterations)
                if config.optimizer == "muon":
                    return muon_direction(update)
                moment = moments.setdefault(next(numbers), np.zeros(matrix.shape[1]))
                return normuon_direction(update, moment)

            update = by_matrix(direction, path, ahead, 4, config.muon_per_head)
            decayed = kernel * (update * kernel > 0) if config.cautious_weight_decay else kernel
            kernel = kernel - 0.1 * (update + 0.2 * decayed)
        wanted[path] = kernel
    return wanted


@pytest.mark.slow
def test_learning_rate_scale_multiplies_the_updates():
    class Scaled(Config):
        def learning_rate_scale(self, params):
            return jax.tree.map_with_path(lambda path, _: 3.0 * (path[0].key == "ln_f"), params)

    sizes = {"vocab_size": 5, "block_size": 3, "n_layer": 1, "n_head": 2, "n_embd": 4}
    params = model.init_params(Config(**sizes), jax.random.key(0))
    updates = []
    for kind in Config, Scaled:
        optimizer = make_optimizer(kind(**sizes))
        updates.append(optimizer.update(params, optimizer.init(params), params)[0])
    plain, scaled = updates
    assert_trees_close(scaled["ln_f"], jax.tree.map(lambda u: 3 * u, plain["ln_f"]), atol=1e-9)
    assert not np.any(scaled["embed"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys", [{}, {"optimizer": "muon"}, {"optimizer": "normuon"}, {"freeze": "embed"}], ids=str
)
def test_moments_are_unchanged_by_nonfinite_gradients(keys):
    config = Config(vocab_size=5, block_size=3, n_layer=1, n_head=2, n_embd=4, **keys)
    params = model.init_params(config, jax.random.key(0))
    optimizer = make_optimizer(config)
    update = jax.jit(optimizer.update)
    _, before = update(params, optimizer.init(params), params, is_accepted=True)
    bad = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
    _, after = update(bad, before, params, is_accepted=False)
    of_direction = lambda state: jax.tree.leaves(state[1][0])  # not the count of the schedule
    assert any(np.any(a) for a in of_direction(before))
    for a, b in zip(of_direction(before), of_direction(after), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("letters", "shape"), [("DD", (6, 6)), ("LDD", (2, 6, 6))])
def test_muon_orthogonalises_a_matrix_from_the_width_to_the_width(letters, shape):
    axes = muon.matrix_axes({"w": letters}, {"w": "muon"}, per_head=False)
    update = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)}
    orthogonal = muon.orthogonalize_matrices(update, axes, POLYNOMIALS["polar_express"])["w"]
    singular_values = np.linalg.svd(orthogonal, compute_uv=False)
    assert np.abs(singular_values - 1).max() < 0.2
