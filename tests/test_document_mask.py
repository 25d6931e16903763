"""document_mask: a window of several documents is each of them by itself, at its positions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from reference import numpy_gpt as ref
from reference.options import DEFAULTS

from jaxgpt import attention, model
from jaxgpt.attention import attend
from jaxgpt.config import Config, UserError
from jaxgpt.data.prepare import prepare
from jaxgpt.loss import cross_entropy
from jaxgpt.runtime import device
from jaxgpt.runtime.run_dir import load_config
from jaxgpt.sharding import BATCH, make_mesh, with_mesh
from jaxgpt.train import train

EOT = 0
TOKENS = np.array(  # in the middle, at both ends, twice in a row, nowhere
    [
        [3, 1, 4, EOT, 1, 5, 9, 2, 6, EOT, 5, 3],
        [EOT, 5, 8, 9, 7, EOT, EOT, 9, 3, 2, 3, EOT],
        [8, 4, 6, 2, 6, 4, 3, 3, 8, 3, 2, 7],
    ]
)
TARGETS = np.roll(TOKENS, -1, axis=1)
TARGETS[0, 2:5] = -1


def make_config(**options) -> Config:
    keys = DEFAULTS | {"dtype": "float32", "attention": "reference", "block_size": 12}
    return Config(**keys | {"document_mask": True, "eot_id": EOT} | options)


def random_params(config: Config) -> dict:
    params = ref.init_params(config, np.random.default_rng(1), np.float32)
    return params | {"blocks": dict(enumerate(params["blocks"]))}


def loss_and_grads(config: Config, params: dict) -> tuple[float, dict]:
    graphdef, _, _ = model.split(config)
    params = model.stack(params) if config.scan_layers else params

    def loss(params):
        total, count = cross_entropy(nnx.merge(graphdef, params)(TOKENS), TARGETS)
        return total / count

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return float(value), model.unstack(grads) if config.scan_layers else grads


# ---- back ends -------------------------------------------------------------------------------


def attention_case(length: int, width: int, kv_heads: int):
    """q, k, v, weights of the output, and each place's document."""
    rng = np.random.default_rng(0)
    shapes = [(2, length, heads, width) for heads in (4, kv_heads, kv_heads, 4)]
    arrays = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    return *arrays, np.cumsum(rng.random((2, length)) < 3 / length, axis=1)


def assert_is_masked_attention(run, q, k, v, weights, documents, *, causal, window, atol):
    mask = documents[:, :, None] == documents[:, None, :]
    options = {"scale": q.shape[-1] ** -0.5, "causal": causal, "window": window, "mask_BTS": mask}
    want = ref.attention(q, k, v, **options), *ref.attention_backward(weights, q, k, v, **options)
    loss = lambda q, k, v: (run(q, k, v) * weights).sum()
    got = run(q, k, v), *jax.grad(loss, argnums=(0, 1, 2))(q, k, v)
    for name, ours, theirs in zip("oqkv", got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=name)


@pytest.mark.parametrize("backend", ["reference", "xla"])
@pytest.mark.parametrize(
    ("causal", "window", "kv_heads"), [(True, 0, 4), (True, 3, 2), (False, 0, 1)]
)
def test_back_ends_look_at_ones_own_document_alone(backend, causal, window, kv_heads):
    *arrays, documents = attention_case(20, 8, kv_heads)
    assert documents.max() > 1
    options = {"causal": causal, "window": window}
    run = lambda *x: attend(*x, documents_BT=jnp.array(documents), backend=backend, **options)
    assert_is_masked_attention(run, *arrays, documents, **options, atol=1e-5)


@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 100), (False, 0)])
def test_the_tpu_kernel_interpreted_does_so_too(causal, window):
    *arrays, documents = attention_case(256, 64, 2)
    assert documents.max() > 1
    options = {"causal": causal, "window": window}
    how = options | {"scale": 64**-0.5, "interpret": True}
    run = lambda *x: attention._splash(*x, jnp.array(documents), **how)
    assert_is_masked_attention(run, *arrays, documents, **options, atol=1e-4)


def test_the_kernel_maps_over_a_mesh_with_documents_and_without():
    """On two devices, of which each sees its own sequences' documents."""
    *arrays, documents = attention_case(128, 64, 4)
    q, k, v, _ = arrays
    mesh = make_mesh(make_config(), jax.devices()[:2])
    how = {"causal": True, "window": 0, "scale": 64**-0.5, "interpret": True}
    run = lambda *x: attention._splash(*x, **how)
    for extra in ((), (jnp.array(documents),)):
        placed = jax.device_put((q, k, v, *extra), NamedSharding(mesh, PartitionSpec(BATCH)))
        shared = jax.jit(with_mesh(mesh, run))(*placed)
        np.testing.assert_allclose(shared, run(q, k, v, *extra), atol=1e-6)


def test_cudnn_is_refused_by_name_and_auto_says_what_it_takes_instead():
    config = make_config(attention="auto", dtype="bfloat16", block_size=128, n_embd=32)
    chosen, (line,) = device.choose_attention(config, target_platform="gpu")
    assert chosen == "xla"
    assert "not cudnn: cannot keep documents apart, and document_mask=True" in line
    with pytest.raises(UserError, match="attention='cudnn': cannot keep documents apart"):
        device.choose_attention(config.replace(attention="cudnn"), target_platform="gpu")
    assert device.choose_attention(config, target_platform="tpu") == ("splash", [])


# ---- the model -------------------------------------------------------------------------------


def one_by_one(config: Config, params: dict) -> tuple[float, dict]:
    """The reference's loss and gradients, from a forward and backward pass a document.

    It knows nothing of masks: a document has a batch of its own, and the positions it has here.
    """
    total, count, sums = 0.0, 0, {path: np.zeros_like(p) for path, p in ref.flatten(params).items()}
    for tokens, targets in zip(TOKENS, TARGETS, strict=True):
        begins = {0, *np.flatnonzero(tokens == EOT).tolist()}
        for a, b in itertools.pairwise([*sorted(begins), len(tokens)]):
            own = dict(params)
            if "pos_embed" in params:
                own["pos_embed"] = {"kernel": params["pos_embed"]["kernel"][a:]}
            loss, grads = ref.loss_and_grads(own, tokens[None, a:b], targets[None, a:b], config)
            n = int((targets[a:b] >= 0).sum())
            total, count = total + n * loss, count + n
            for path, grad in ref.flatten(grads).items():
                there = slice(a, None) if path.startswith("pos_embed") else ...
                sums[path][there] += n * grad
    return total / count, {path: grad / count for path, grad in sums.items()}


CASES = [
    {},
    {"position": "rope", "n_kv_head": 2, "qk_norm": True, "sliding_window": 3},
    {"scan_layers": True, "remat": "full", "value_residual": True},
    {"attention": "xla", "remat": "dots", "position": "none", "causal": False},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_loss_and_gradients_are_those_of_the_documents_one_by_one(options):
    config = make_config(**options)
    params = random_params(config)
    loss, grads = loss_and_grads(config, params)
    want_loss, want = one_by_one(config, params)
    assert loss == pytest.approx(want_loss, rel=1e-5)
    for path, grad in ref.flatten(grads).items():
        np.testing.assert_allclose(grad, want[path], rtol=0, atol=1e-5, err_msg=path)
    unmasked, _ = loss_and_grads(config.replace(document_mask=False), params)
    assert abs(unmasked - want_loss) > 1e-4


@pytest.mark.parametrize("scan_layers", [False, True])
def test_what_an_earlier_document_says_changes_nothing_later(scan_layers):
    """Not a bit of it; the end-of-text reads as the first token of what follows."""
    config = make_config(scan_layers=scan_layers)
    params = model.init(config, jax.random.key(0))
    network = nnx.merge(model.split(config)[0], params)
    logits = jax.jit(lambda tokens: network(tokens)[..., : config.vocab_size])
    base = np.asarray(logits(TOKENS[:1]))
    other = TOKENS[:1].copy()
    other[:, :3] = [7, 7, 7]
    changed = (np.asarray(logits(other)) != base).any((0, 2))
    np.testing.assert_array_equal(changed, np.arange(12) < 3)


def test_a_cache_holds_one_text_however_many_documents_it_has():
    config = make_config()
    network = nnx.merge(model.split(config)[0], model.init(config, jax.random.key(0)))
    caches = model.init_caches(config, len(TOKENS), 1)
    cached, _ = network.features(TOKENS, caches=caches)
    plain = nnx.merge(
        model.split(config.replace(document_mask=False))[0], model.init(config, jax.random.key(0))
    )
    np.testing.assert_allclose(cached, plain.features(TOKENS)[0], atol=1e-6)
    assert not np.allclose(cached, network.features(TOKENS)[0])


# ---- a run -----------------------------------------------------------------------------------

SMALL = {
    "n_layer": 0,
    "n_head": 2,
    "n_embd": 8,
    "block_size": 8,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_iters": 2,
    "eval_iters": 1,
    "document_mask": True,
}


def test_a_run_without_an_end_of_text_is_refused(tmp_path):
    (tmp_path / "verse.txt").write_text("to be or not to be\n" * 30)
    prepare(str(tmp_path / "verse.txt"), str(tmp_path), "char")
    paths = {"data_dir": str(tmp_path), "dataset": "verse", "out_dir": str(tmp_path / "out")}
    with pytest.raises(UserError, match="document_mask=True: the tokenizer of 'verse' has no end"):
        train(Config(**SMALL, **paths), {})
    assert not (tmp_path / "out" / "config.json").exists()
    assert train(Config(**SMALL, **paths, eot_id=3), {}) == 0
    assert load_config(str(tmp_path / "out")).eot_id == 3
    again = Config(**SMALL | {"max_iters": 3}, **paths, init_from="resume")
    assert train(again, {}) == 0
