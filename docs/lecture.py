"""Draws the pictures of lecture.md, and prints its table and samples, from the stages' runs.

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

from jaxgpt import model
from jaxgpt.attention import attention_mask
from jaxgpt.interop.huggingface import Trained, load_trained
from jaxgpt.runtime.metrics import read_metrics
from jaxgpt.sample import Sampler, generate_text
from jaxgpt.sharding import local_mesh

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
TEXT = "ROMEO:\nWhat light is this?"


def save(figure: Figure, file: Path) -> None:
    figure.savefig(file, dpi=72, metadata={"Software": None})
    print(f"drew {file}")


# ---- losses and samples ----------------------------------------------------------------------


def draw_losses(runs: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """The validation loss of every stage by step."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    for i, (stage, rows) in enumerate(runs.items()):
        some = [row for row in rows if "val_loss" in row]
        steps, losses = ([row[key] for row in some] for key in ("step", "val_loss"))
        label = f"{stage.replace('_', ' ')}: {losses[-1]:.3f}"
        axes.plot(steps, losses, ".-", color=f"C{i}", label=label)
    axes.set(xlabel="step", ylabel="validation loss (nats a character)", ylim=(1.5, 3.3))
    axes.grid(alpha=0.3)
    axes.legend(title="last value", loc="upper left", bbox_to_anchor=(1.01, 1))
    save(figure, file)


def print_table(runs: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    for stage, rows in runs.items():
        seconds = rows[-1]["time"] - rows[0]["time"]
        count = model.count_params(load_trained("resume", str(folder / stage), "best").config)
        print(
            f"| {STAGES[stage]} | {count:,} | {rows[-1]['full_val_loss']:.3f} | {seconds:.0f} s |"
        )


def print_sample(stage: str, found: Trained) -> None:
    params, step = found.load(local_mesh())
    config = found.config.replace(dtype="float32", attention="reference")
    sampler, tokenizer = Sampler(config).load(params), found.tokenizer()
    text = "".join(new for (new,) in generate_text(sampler, tokenizer, ["\n"], 160, seed=1))
    print(f"\n{stage}, step {step}:\n{text}")


# ---- attention -------------------------------------------------------------------------------


def draw_masks(file: Path) -> None:
    """What each mask allows: a row is a query, a column a key, and what is dark may be seen."""
    masks = {
        "causal": attention_mask(8, 8, causal=True, window=0),
        "causal, window of 3": attention_mask(8, 8, causal=True, window=3),
        "none (encoder)": attention_mask(8, 8, causal=False, window=0),
        "cross: keys of another sequence": attention_mask(8, 12, causal=False, window=0),
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


def attention_weights(found: Trained, layer: int, text: str) -> np.ndarray:
    """How a block's heads divide their attention over a text, [N, T, S]: rows sum to one."""
    c = found.config.replace(dropout=0.0, dtype="float32", attention="reference", scan_layers=False)
    params, _ = found.load(local_mesh())
    network = nnx.merge(model.split(c)[0], params)
    x = network._embed(jnp.asarray(found.tokenizer().encode(text)[None]), None)
    for block in network.blocks[:layer]:
        x, _, _ = block(x)
    block = network.blocks[layer]
    q, k, _ = block.attn.project(block.ln_1(x) if block.is_pre else x)
    width = c.n_embd if c.score_scale == "embedding" else c.head_dim
    scores_NTS = jnp.einsum("TNH,SNH->NTS", q[0], k[0]) * width**-0.5
    may_look = attention_mask(len(text), len(text), causal=True, window=0)
    return np.asarray(jax.nn.softmax(jnp.where(may_look, scores_NTS, -jnp.inf)))


def draw_attention(found: dict[str, Trained], file: Path) -> None:
    """The lecture's one head on eight characters, and heads of the last model."""
    deep = found["8_dropout_and_scale"]
    panels = [("the head of stage 3", attention_weights(found["3_one_head"], 0, TEXT[:8])[0], 8)]
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


def draw_positions(found: Trained, file: Path) -> None:
    """Position vectors, learned and sinusoidal, and how alike two places are by each (cosine)."""
    learned_TD = np.asarray(found.load(local_mesh())[0]["pos_embed"]["kernel"])
    key = jax.random.fold_in(jax.random.key(found.config.seed), 0)
    start_TD = np.asarray(model.init(found.config, key)["pos_embed"]["kernel"])
    T, D = learned_TD.shape
    sines_TD = np.asarray(model.sinusoids(jnp.arange(T)[None], D))[0]
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
    there, to = Path(folder), Path(pictures)
    to.mkdir(parents=True, exist_ok=True)
    runs = {stage: read_metrics(there / stage / "metrics.jsonl") for stage in STAGES}
    found = {stage: load_trained("resume", str(there / stage), "best") for stage in STAGES}
    draw_losses(runs, to / "losses.png")
    draw_masks(to / "masks.png")
    draw_attention(found, to / "attention.png")
    draw_positions(found["8_dropout_and_scale"], to / "positions.png")
    print_table(runs, there)
    for stage, trained in found.items():
        print_sample(stage, trained)


if __name__ == "__main__":
    main(*sys.argv[1:])
