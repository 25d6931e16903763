"""Draw the pictures of lecture.md, and print its table and samples, from the runs of all stages.

    python docs/lecture.py [FOLDER-OF-THE-RUNS [FOLDER-FOR-THE-PICTURES]]

T queries, S keys, D embedding, N heads.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from jaxgpt import model, resolve
from jaxgpt.data.text_stream import generate_text
from jaxgpt.interop.trained import Trained, open_trained
from jaxgpt.kernels.attention import attention_mask
from jaxgpt.kernels.position import sinusoids
from jaxgpt.runtime.mesh import local_mesh
from jaxgpt.runtime.metrics import read_metrics
from jaxgpt.sample import Sampler

STAGES = {
    "1_bigram": "bigram",
    "2_positions": "positions",
    "3_one_head": "one head",
    "4_heads": "four heads",
    "5_feed_forward": "feed-forward",
    "6_residuals": "residuals, 3 blocks",
    "7_layer_norm": "layer norm, pre",
    "7_layer_norm_post": "layer norm, post",
    "8_dropout_and_scale": "scale",
}
CONFIGS = Path(__file__).parents[1] / "configs" / "lecture"
TEXT = "ROMEO:\nWhat light is this?"


def load_stage(folder: Path, stage: str) -> Trained:
    """Open the best checkpoint of a stage's run."""
    config_file = str(CONFIGS / f"{stage}.py")
    return open_trained("resume", str(folder / stage), "best", config=config_file)


def save(figure: Figure, file: Path) -> None:
    """Write a figure to a file, without the name of the software, so that the bytes repeat."""
    figure.savefig(file, dpi=72, metadata={"Software": None})
    print(f"drew {file}")


# ---- losses and samples ----------------------------------------------------------------------


def draw_losses(runs: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Draw the validation losses of all stages over the steps."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    for i, (stage, rows) in enumerate(runs.items()):
        some = [row for row in rows if "val_loss" in row]
        steps, losses = ([row[key] for row in some] for key in ("step", "val_loss"))
        label = f"{stage.replace('_', ' ')}: {losses[-1]:.3f}"
        axes.plot(steps, losses, ".-", color=f"C{i}", label=label)
    axes.set(xlabel="step", ylabel="validation loss (nats per character)", ylim=(1.5, 3.3))
    axes.grid(alpha=0.3)
    axes.legend(title="last value", loc="upper left", bbox_to_anchor=(1.01, 1))
    save(figure, file)


def print_table(runs: dict[str, list[dict[str, Any]]], trained: dict[str, Trained]) -> None:
    """Print a row per stage: name, parameters, loss on the whole validation split, seconds."""
    for stage, rows in runs.items():
        seconds = rows[-1]["time"] - rows[0]["time"]
        count = resolve.count_params(trained[stage].config)
        print(
            f"| {STAGES[stage]} | {count:,} | {rows[-1]['full_val_loss']:.3f} | {seconds:.0f} s |"
        )


def print_sample(stage: str, trained: Trained) -> None:
    """Print the first 160 characters that a stage generates after a line break."""
    params, step = trained.load(local_mesh())
    config = trained.config.replace(dtype="float32", attention="reference")
    sampler, tokenizer = Sampler(config).load(params), trained.tokenizer()
    text = "".join(new for (new,) in generate_text(sampler, tokenizer, ["\n"], 160, seed=1))
    print(f"\n{stage}, step {step}:\n{text}")


# ---- attention -------------------------------------------------------------------------------


def draw_masks(file: Path) -> None:
    """Draw which keys (columns) each query (row) attends to; those are dark."""
    masks = {
        "causal": mask_TS(8, 8, causal=True),
        "causal, window of 3": mask_TS(8, 8, causal=True, window=3),
        "none (encoder)": mask_TS(8, 8, causal=False),
        "cross: keys of another sequence": mask_TS(8, 12, causal=False),
    }
    figure = Figure(figsize=(11, 3), layout="constrained")
    sizes = [mask.shape[1] for mask in masks.values()]
    for axes, (name, mask) in zip(
        figure.subplots(1, 4, width_ratios=sizes), masks.items(), strict=True
    ):
        axes.pcolormesh(mask, cmap="Blues", vmin=0, vmax=1.4, edgecolor="white", linewidth=1.5)
        axes.set(title=name, xlabel="key", ylabel="query", aspect="equal")
        ticks = [np.arange(n) + 0.5 for n in mask.shape[::-1]], [range(n) for n in mask.shape[::-1]]
        axes.set_xticks(ticks[0][0], ticks[1][0])
        axes.set_yticks(ticks[0][1], ticks[1][1])
        axes.invert_yaxis()
    save(figure, file)


def mask_TS(queries: int, keys: int, *, causal: bool, window: int = 0) -> np.ndarray:
    """Return an attention mask, bool [T, S]."""
    query_T1, key_S = jnp.arange(queries)[:, None], jnp.arange(keys)
    return np.broadcast_to(attention_mask(query_T1, key_S, causal, window), (queries, keys))


def attention_weights(trained: Trained, layer: int, text: str) -> np.ndarray:
    """Return the attention weights of a layer's heads for a text, [N, T, S]; rows sum to one."""
    config = trained.config.replace(dtype="float32", attention="reference")
    params, _ = trained.load(local_mesh())
    network = nnx.merge(model.abstract_model(config)[0], params)
    x_BTD = network.embed_tokens(jnp.asarray(trained.tokenizer().encode(text)[None]))
    for i, block in enumerate(network.blocks[:layer]):
        x_BTD = block(x_BTD, i)
    block = network.blocks[layer]
    q_BTNH, k_BSNH, _ = block.attn.project(block.ln_1(x_BTD))
    scores_NTS = jnp.einsum("TNH,SNH->NTS", q_BTNH[0], k_BSNH[0]) * block.attn.scale
    is_seen_TS = mask_TS(len(text), len(text), causal=True)
    return np.asarray(jax.nn.softmax(jnp.where(is_seen_TS, scores_NTS, -jnp.inf)))


def draw_attention(trained: dict[str, Trained], file: Path) -> None:
    """Draw the head of stage 3 on eight characters, and seven heads of stage 8."""
    deep = trained["8_dropout_and_scale"]
    panels = [("the head of stage 3", attention_weights(trained["3_one_head"], 0, TEXT[:8])[0], 8)]
    for layer, heads in (0, 3), (deep.config.n_layer - 1, 4):
        for n, weights in enumerate(attention_weights(deep, layer, TEXT)[:heads]):
            panels.append((f"stage 8, block {layer + 1}, head {n + 1}", weights, len(TEXT)))
    figure = Figure(figsize=(15, 8), layout="constrained")
    for axes, (name, weights, length) in zip(figure.subplots(2, 4).flat, panels, strict=True):
        axes.imshow(np.sqrt(weights), cmap="magma_r", vmin=0, vmax=1)
        letters = [{"\n": "↵", " ": "·"}.get(letter, letter) for letter in TEXT[:length]]
        axes.set_xticks(range(length), letters, fontsize=8 if length > 8 else 12)
        axes.set_yticks(range(length), letters, fontsize=8 if length > 8 else 12)
        axes.set_title(name)
    save(figure, file)


# ---- positions -------------------------------------------------------------------------------


def draw_positions(trained: Trained, file: Path) -> None:
    """Draw position vectors, learned and sinusoidal, and the cosines between all pairs of them."""
    learned_TD = np.asarray(trained.load(local_mesh())[0]["pos_embed"]["kernel"])
    key = jax.random.fold_in(jax.random.key(trained.config.seed), 0)
    start_TD = np.asarray(model.init_params(trained.config, key)["pos_embed"]["kernel"])
    T, D = learned_TD.shape
    sines_TD = np.asarray(sinusoids(jnp.arange(T)[None], D))[0]
    tables = {
        "learned": learned_TD,
        "what training added": learned_TD - start_TD,
        "sinusoidal": sines_TD,
    }
    figure = Figure(figsize=(6.6, 7.6), layout="constrained")
    for row, (name, table_TD) in zip(figure.subplots(3, 2), tables.items(), strict=True):
        unit_TD = table_TD / np.linalg.norm(table_TD, axis=1, keepdims=True)
        limit = 2 * table_TD.std()
        some = {"cmap": "RdBu", "vmin": -limit, "vmax": limit, "aspect": "auto"}
        image = row[0].imshow(table_TD[:, :20], interpolation="nearest", **some)
        row[0].set(title=name, xlabel="component, the first 20", ylabel="position")
        figure.colorbar(image, ax=row[0])
        image = row[1].imshow(
            unit_TD @ unit_TD.T, cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest"
        )
        row[1].set(title=f"{name}: cosines", xlabel="position", ylabel="position")
        figure.colorbar(image, ax=row[1])
    save(figure, file)


def main(folder: str = "out/lecture", pictures: str = "docs/pictures") -> None:
    """Draw all pictures, then print the table and the samples."""
    runs_dir, pictures_dir = Path(folder), Path(pictures)
    pictures_dir.mkdir(parents=True, exist_ok=True)
    runs = {stage: read_metrics(runs_dir / stage / "metrics.jsonl") for stage in STAGES}
    trained = {stage: load_stage(runs_dir, stage) for stage in STAGES}
    draw_losses(runs, pictures_dir / "losses.png")
    draw_masks(pictures_dir / "masks.png")
    draw_attention(trained, pictures_dir / "attention.png")
    draw_positions(trained["8_dropout_and_scale"], pictures_dir / "positions.png")
    print_table(runs, trained)
    for stage in STAGES:
        print_sample(stage, trained[stage])


if __name__ == "__main__":
    main(*sys.argv[1:])
