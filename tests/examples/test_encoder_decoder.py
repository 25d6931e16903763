"""Test the encoder-decoder: what each attention sees, and that it learns.

B batch, T target length, S source length, D embedding, L layers, N heads.
"""

from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples.encoder_decoder import dates
from examples.encoder_decoder.model import (
    PAD_ID,
    START_ID,
    EncoderDecoder,
    EncoderDecoderConfig,
    SourceAttention,
    translate,
)
from jaxgpt.config import UserError
from jaxgpt.kernels.dropout import Dropout
from jaxgpt.model import Context, init_params
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.train_step import init_state, inputs_and_targets, make_train_step

S, T = 7, 5
SMALL = EncoderDecoderConfig(
    vocab_size=12, source_length=S, block_size=S + T, n_layer=2, n_head=2, n_embd=16,
    dtype="float32", attention="reference",
)  # fmt: skip
SOURCE_1S = jnp.array([[4, 5, 6, 7, 8, PAD_ID, PAD_ID]])
TARGET_1T = jnp.array([[START_ID, 9, 8, 7, 6]])


def make_model(seed: int = 0) -> EncoderDecoder:
    """Return a model with weights so large that every input matters."""
    model = EncoderDecoder(SMALL, rngs=nnx.Rngs(seed))
    graphdef, state = nnx.split(model)
    keys = iter(jax.random.split(jax.random.key(seed), 1000))
    large = lambda p: p + 0.3 * jax.random.normal(next(keys), p.shape)
    return nnx.merge(graphdef, jax.tree.map(large, state))


def decode(model: EncoderDecoder, source_BS: jax.Array, target_BT: jax.Array) -> tuple:
    return model.decode(target_BT, model.encode(source_BS), source_BS != PAD_ID)


@pytest.mark.slow
@pytest.mark.parametrize("changed", range(5))
def test_encoder_sees_the_whole_source_in_both_directions(changed):
    model = make_model()
    other_1S = SOURCE_1S.at[0, changed].set(11)
    difference_1SD = model.encode(SOURCE_1S) - model.encode(other_1S)
    assert np.all(np.abs(difference_1SD[0, :5]).max(axis=-1) > 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("changed", range(T))
def test_decoder_sees_the_whole_source_but_no_future_target(changed):
    model = make_model()
    logits_1TV, _ = decode(model, SOURCE_1S, TARGET_1T)
    others_1TV, _ = decode(model, SOURCE_1S, TARGET_1T.at[0, changed].set(11))
    is_equal_T = np.isclose(logits_1TV, others_1TV, atol=1e-5)[0, :, :12].all(axis=-1)
    assert is_equal_T.tolist() == [t < changed for t in range(T)]
    others_1TV, _ = decode(model, SOURCE_1S.at[0, changed].set(11), TARGET_1T)
    assert not np.isclose(logits_1TV, others_1TV, atol=1e-5)[0, :, :12].all(axis=-1).any()


def test_padding_is_never_attended():
    """Logits do not depend on the vectors of padded positions, in the encoder or the decoder."""
    model = make_model()
    logits_1TV, weights_L1NTS = decode(model, SOURCE_1S, TARGET_1T)
    assert weights_L1NTS.shape == (2, 1, 2, T, S)
    np.testing.assert_array_equal(weights_L1NTS[..., 5:], 0)
    assert np.all(np.asarray(weights_L1NTS[..., :5]) > 0)
    np.testing.assert_allclose(weights_L1NTS.sum(axis=-1), 1, rtol=1e-5)
    start_SD = model.source_pos.kernel[...]
    other_D = jax.random.normal(jax.random.key(1), (16,))
    for row, matters in (5, False), (6, False), (4, True):
        model.source_pos.kernel[...] = start_SD.at[row].add(other_D)
        others_1TV, _ = decode(model, SOURCE_1S, TARGET_1T)
        assert np.allclose(logits_1TV[..., :12], others_1TV[..., :12], atol=1e-5) != matters


def test_a_source_of_padding_alone_gives_finite_logits_and_gradients():
    model = make_model()
    sources_BS = jnp.concatenate([SOURCE_1S, jnp.full_like(SOURCE_1S, PAD_ID)])
    targets_BT = jnp.concatenate([TARGET_1T, TARGET_1T])
    mean = lambda model: decode(model, sources_BS, targets_BT)[0][..., :12].mean()
    value, gradients = nnx.value_and_grad(mean)(model)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, gradients)))


def test_without_padding_attention_to_the_source_is_the_lectures_cross_attention():
    module = SourceAttention(SMALL, rngs=nnx.Rngs(0))
    x_BTD = jax.random.normal(jax.random.key(0), (2, T, 16))
    source_BSD = jax.random.normal(jax.random.key(1), (2, S, 16))
    is_char_BS = jnp.ones((2, S), bool)
    ours_BTD, _ = module.attend(x_BTD, source_BSD, is_char_BS, Context(Dropout()))
    np.testing.assert_allclose(ours_BTD, module(x_BTD, source_BSD), atol=1e-6)
    dropout = Dropout(0.4, jax.random.split(jax.random.key(2), 2))
    ours_BTD, _ = module.attend(x_BTD, source_BSD, is_char_BS, Context(dropout, layer=3))
    want_BTD = module(x_BTD, source_BSD, 3, dropout)
    assert 0.2 < np.mean(np.asarray(want_BTD) == 0) < 0.6
    np.testing.assert_allclose(ours_BTD, want_BTD, atol=1e-6)


def test_dropout_acts_on_the_embeddings_and_on_all_three_kinds_of_sublayers():
    """With nearly everything dropped, no sublayer and no embedding gets through."""
    model = make_model()
    dropout = Dropout(1 - 1e-6, jax.random.split(jax.random.key(0), 1))
    x_1SD = model.encode(SOURCE_1S, dropout)
    bias_D = model.ln_source.bias[...]
    np.testing.assert_allclose(x_1SD, np.broadcast_to(bias_D, x_1SD.shape), atol=1e-4)
    logits_1TV, _ = model.decode(TARGET_1T, x_1SD, SOURCE_1S != PAD_ID, dropout)
    want_V = model.lm_head(model.ln_f.bias[...][None, None])[0, 0]
    np.testing.assert_allclose(
        logits_1TV[0, :, :12], np.broadcast_to(want_V[:12], (T, 12)), atol=1e-4
    )


def test_windows_give_the_logits_of_the_targets():
    model = make_model()
    logits_1TV = model(jnp.concatenate([SOURCE_1S, TARGET_1T], axis=1))
    assert logits_1TV.shape == (1, S + T, SMALL.padded_vocab_size)
    np.testing.assert_array_equal(logits_1TV[:, S:], decode(model, SOURCE_1S, TARGET_1T)[0])


@pytest.mark.slow
def test_translation_takes_the_most_likely_token_after_its_own_tokens():
    params = init_params(SMALL, jax.random.key(0))
    params = jax.tree.map(lambda p: 20 * p, params)
    source_BS = jax.random.randint(jax.random.key(1), (20, S), 2, 12)
    target_BT, weights_LBNTS = translate(SMALL, params, source_BS)
    model = nnx.merge(nnx.split(make_model())[0], params)
    start_B1 = jnp.full((20, 1), START_ID)
    before_BT = jnp.concatenate([start_B1, target_BT[:, :-1]], axis=1)
    logits_BTV, want_LBNTS = decode(model, source_BS, before_BT)
    np.testing.assert_array_equal(target_BT, logits_BTV.argmax(axis=-1))
    np.testing.assert_allclose(weights_LBNTS, want_LBNTS, atol=2e-3)
    assert len(np.unique(np.asarray(target_BT), axis=0)) > 10


def reversals(n: int, seed: int) -> np.ndarray:
    """Return windows of numbers with up to T digits, and their digits in reverse order."""
    rng = np.random.default_rng(seed)
    rows = np.full((n, S + 1 + T), PAD_ID, np.int32)
    rows[:, S] = START_ID
    for row in rows:
        digits = rng.integers(2, 12, size=rng.integers(2, T + 1))
        row[: len(digits)] = digits
        row[S + 1 :][: len(digits)] = digits[::-1]
    rows[:, : S + 1] = ~rows[:, : S + 1]
    return rows


@pytest.mark.slow
def test_it_learns_to_reverse_numbers_of_two_to_five_digits():
    keys = {"n_layer": 1, "n_embd": 32, "n_head": 2, "batch_size": 32, "learning_rate": 1e-2}
    more = {"gradient_accumulation_steps": 1, "max_iters": 300, "warmup_iters": 20, "min_lr": 0.0}
    config = SMALL.replace(**keys, **more)
    mesh = make_mesh(config.replace(mesh="data:1"))
    state, step = init_state(config, mesh), make_train_step(config, mesh)
    windows = reversals(300 * 32, seed=0).reshape(300, 1, 32, -1)
    state, _ = step(state, windows, 300)
    test = reversals(500, seed=1)
    written_BT, _ = translate(config, state.params, ~test[:, :S])
    assert (np.asarray(written_BT) == test[:, S + 1 :]).all(axis=1).mean() > 0.95


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"position": "rope"}, "^position='rope': the encoder-decoder does not have this key; exp"),
        ({"block_size": S}, f"^source_length={S}: leaves no room for a target; expected less than"),
    ],
    ids=str,
)
def test_keys_that_do_not_fit_are_rejected(keys, message):
    with pytest.raises(UserError, match=message):
        SMALL.replace(**keys)


# ---- the dates -------------------------------------------------------------------------------


def test_dates_are_written_in_four_forms():
    source_BS, target_BT = dates.pairs([728_001] * dates.NUM_FORMS)
    assert dates.decode(source_BS) == [
        "14 March 1994",
        "March 14, 1994",
        "Monday, 14 March 1994",
        "Mar 14, 1994",
    ]
    assert dates.decode(target_BT) == ["1994-03-14"] * dates.NUM_FORMS


def test_held_out_dates_are_never_trained_on():
    held_out = set(dates.decode(dates.held_out_pairs()[1]))
    assert len(held_out) == 7305
    windows = np.concatenate(list(islice(dates.training_windows(500, seed=0), 20)))
    trained = set(dates.decode(windows[:, -dates.CONFIG.target_length :]))
    assert len(trained) > 8000
    assert not trained & held_out


def test_only_the_characters_of_the_date_are_targets():
    windows = next(dates.training_windows(3, seed=0))
    inputs_BT, targets_BT = inputs_and_targets(windows)
    S = dates.CONFIG.source_length
    assert np.all(targets_BT[:, :S] < 0)
    assert np.all(targets_BT[:, S:] > 0)
    assert np.all(inputs_BT >= 0)
    assert np.all(inputs_BT[:, S] == START_ID)


@pytest.mark.slow
def test_it_learns_dates_that_it_has_never_seen():
    params = dates.train(dates.CONFIG)
    assert dates.accuracy(dates.CONFIG, params, *dates.held_out_pairs()) >= 0.99
