"""Write report.html: one page with a run's curves, config and samples, and views of its model.

The page loads nothing. Altair writes its charts, and Vega-Lite draws them in the browser.
Axes: L layers, N heads, T tokens, V vocabulary, D embedding.
"""

import base64
import json
import os
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from statistics import median
from string import Template
from typing import Any

import jax
import numpy as np

from jaxgpt.api import NoAttention, Run
from jaxgpt.config import Config, UserError
from jaxgpt.data.prepare import find_dataset
from jaxgpt.data.tasks import TASKS
from jaxgpt.data.text_stream import default_prompt
from jaxgpt.data.tokenizer import check_same
from jaxgpt.resolve import count_params
from jaxgpt.runtime import storage
from jaxgpt.runtime.bucket import local_data_dir
from jaxgpt.runtime.files import atomic_write, check_file_to_write, import_extra, is_url
from jaxgpt.runtime.metrics import Row

REPORT = "report.html"
CURVES = {  # the charts: names of their curves, by the field of metrics.jsonl
    "loss": {"loss": "batch", "train_loss": "train split", "val_loss": "validation split"},
    "learning rate": {"lr": "learning rate"},
    "gradient norm": {"grad_norm": "gradient norm"},
    "tokens per second": {"tokens_per_s": "tokens per second"},
}
POINTS = 1_000  # per curve
TEMPERATURES = (0.5, 0.8, 1.0, 1.3)
SAMPLE_TOKENS = 200
PASSAGE_TOKENS = 600
PROMPT_TOKENS = 48  # of the passage, if there is no prompt
ALTERNATIVES = 5  # per token of the passage
NEIGHBOURS = 5  # per token
NEIGHBOUR_ROWS = 96
MOST_NATS = 6.0  # tokens with this loss, or a larger one, have the strongest colour


def write_report(runs: Sequence[Run], prompt: str, file: str | os.PathLike) -> Path:
    """Write the page of these runs, and return its path; its model is that of the first run.

    Attention is shown for `prompt`, or for the start of the passage if `prompt` is empty. If `file`
    is empty, it is report.html in the run directory. Raises `UserError` if the prompt is no text of
    the model, if Altair is missing, or if the file cannot be written.
    """
    run = runs[0]
    folder = storage.local(run.source)
    path = Path(file or (folder if folder.is_dir() else Path()) / REPORT)
    check_file_to_write(path)
    ids_T, source = passage_tokens(run)
    prompt_T = ids_T[: min(PROMPT_TOKENS, run.config.block_size)]
    if prompt:
        prompt_T = run.tokenizer.encode(prompt)
    # first, because it fails for a prompt that is too long
    shown = attention(run, prompt_T)
    sections = {
        "Summary": summary(runs),
        "Curves": '<div class="charts">' + '<div class="chart"></div>' * len(CURVES) + "</div>",
        "Config": config_table(runs),
        "Samples": samples(run),
        "What surprises the model": passage(run, ids_T, source),
        "What the heads attend to": '<div id="attention"></div>',
        "Nearest embeddings": neighbours(run, ids_T),
    }
    data = {"charts": charts(runs), "attention": shown}
    try:
        atomic_write(path, page(runs, sections, data))
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
        raise UserError(f"{path}: {problem}; expected a file in a folder that exists") from error
    if not file and is_url(run.source):
        storage.upload(run.source, REPORT)
    return path


def page(runs: Sequence[Run], sections: dict[str, str], data: dict[str, Any]) -> str:
    """Return the page: the template with the sections, the data and Vega's scripts."""
    vega = import_extra("vl_convert", "report", "report").javascript_bundle()
    template = resources.files("jaxgpt.tools").joinpath("report.html").read_text(encoding="utf-8")
    body = [f"<section><h2>{head}</h2>\n{html}</section>" for head, html in sections.items()]
    title = escape(", ".join(run.source for run in runs))
    script_safe = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return Template(template).substitute(
        title=title, vega=vega, sections="\n".join(body), data=script_safe
    )


# ---- the runs ----------------------------------------------------------------------------------


def summary(runs: Sequence[Run]) -> str:
    """Return a table with the figures of each run."""
    return columns_table({run.source: figures(run) for run in runs}, len(runs))


def figures(run: Run) -> dict[str, str]:
    """Return what the summary says about a run; what has not been measured is empty."""
    rows = run.metrics  # reads the file
    steps = [row for row in rows if row.get("loss") is not None]
    evals = [row for row in rows if row.get("val_loss") is not None]
    wholes = [row for row in rows if row.get("full_val_loss") is not None]
    found = {
        "dataset": run.config.dataset,
        "parameters": f"{count_params(run.config) / 1e6:,.2f}M",
        "step of the weights": f"{run.step:,}" if run.step is not None else "",
    }
    last = steps[-1] if steps else {"step": 0, "tokens": 0}
    found["steps"] = f"{last['step']:,}"
    found["tokens"] = f"{last['tokens']:,}"
    rates = [row["tokens_per_s"] for row in steps]
    found["tokens per second, median"] = f"{median(rates):,.0f}" if rates else ""
    best = min(evals, key=lambda row: row["val_loss"], default=None)
    found["lowest validation loss"] = (
        f"{best['val_loss']:.4f}, step {best['step']:,}" if best else ""
    )
    found["loss of the whole validation split"] = (
        f"{wholes[-1]['full_val_loss']:.4f}, step {wholes[-1]['step']:,}" if wholes else ""
    )
    return found


def config_table(runs: Sequence[Run]) -> str:
    """Return a table of the keys of which a run's value is not the default."""
    defaults = type(runs[0].config)().to_dict()
    columns = {run.source: run.config.to_dict() for run in runs}
    columns["default value"] = defaults
    is_changed = lambda key: any(columns[run.source].get(key) != defaults[key] for run in runs)
    keys = [key for key in defaults if is_changed(key)]
    texts = {
        name: {key: str(values.get(key, "")) for key in keys} for name, values in columns.items()
    }
    return "<p>The keys that differ from their defaults.</p>" + columns_table(texts, len(runs))


def columns_table(columns: dict[str, dict[str, str]], runs: int) -> str:
    """Return a table; rows in which the first columns, one per run, differ are bold."""
    heads = "".join(f"<th>{escape(name)}</th>" for name in columns)
    lines = [f"<tr><th></th>{heads}</tr>"]
    for label in next(iter(columns.values())):
        values = [column[label] for column in columns.values()]
        style = ' class="differs"' if len(set(values[:runs])) > 1 else ""
        cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        lines.append(f"<tr{style}><th>{escape(label)}</th>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the Vega-Lite specification of each chart."""
    rows = {run.source: run.metrics for run in runs}
    specifications = []
    for title, fields in CURVES.items():
        points = []
        for name, of_run in rows.items():
            for field, label in fields.items():
                curve = label if len(runs) == 1 else f"{name}: {label}"
                points += [
                    {"step": row["step"], "value": row[field], "name": curve}
                    for row in thin(of_run, field)
                ]
        specifications.append(line_chart(title, points))
    return specifications


def thin(rows: Sequence[Row], field: str) -> list[Row]:
    """Return at most POINTS rows that have the field, evenly spaced."""
    found = [row for row in rows if row.get(field) is not None]
    if len(found) <= POINTS:
        return found
    return [found[i] for i in np.linspace(0, len(found) - 1, POINTS).astype(int)]


def line_chart(title: str, points: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a chart of curves over steps; pointing at a curve shows its values there."""
    alt = import_extra("altair", "report", "report")
    names = {point["name"] for point in points}
    legend = alt.Legend(orient="top", title=None, columns=1, labelLimit=600)
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("step:Q"),
        y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=False)),
        color=alt.Color("name:N", legend=legend if len(names) > 1 else None),
    )
    pointed = alt.selection_point(on="pointerover", clear="pointerout", empty=False)
    opacity = alt.condition(pointed, alt.value(0.7), alt.value(0))
    tooltip = ["name:N", "step:Q", alt.Tooltip("value:Q", format=".5~g")]
    dots = base.mark_point(filled=True, size=150).encode(opacity=opacity, tooltip=tooltip)
    layers = base.mark_line() + dots.add_params(pointed)
    return layers.properties(width="container", height=220).to_dict()


# ---- the model -----------------------------------------------------------------------------------


def samples(run: Run) -> str:
    """Return a sample at each temperature."""
    blocks, start = [], first_prompt(run)
    for temperature in TEMPERATURES:
        text = run.generate(start, max_new_tokens=SAMPLE_TOKENS, temperature=temperature)
        blocks.append(f"<h3>temperature {temperature}</h3><pre>{escape(text.strip())}</pre>")
    return f'<div class="samples">{"".join(f"<div>{block}</div>" for block in blocks)}</div>'


def first_prompt(run: Run) -> str:
    """Return a problem for a model of problems, and else the prompt of the samples in the log."""
    if run.config.dataset in TASKS and run.step is not None:
        return find_dataset(run.config, run.config.block_size).example
    return default_prompt(run.tokenizer)


def passage_tokens(run: Run) -> tuple[np.ndarray, str]:
    """Return a text as ids [T], int32, and its source: the validation split, or else a sample."""
    config = run.config
    if run.step is not None and has_data(config):
        data = find_dataset(config, config.block_size, config.vocab_size)
        check_same(config.dataset, data.tokenizer, run._trained.tokenizer_file)
        val = data.val
        ids_T = val.read(0, min(PASSAGE_TOKENS, len(val))).astype(np.int32)
        return np.where(ids_T < 0, ~ids_T, ids_T), f"the validation split of {config.dataset}"
    text = run.generate(first_prompt(run), max_new_tokens=PASSAGE_TOKENS)
    source = "a sample of the model, because its dataset is not on this machine"
    return run.tokenizer.encode(text).astype(np.int32), source


def has_data(config: Config) -> bool:
    """Tell whether the dataset of a run is on this machine or in a bucket."""
    if config.dataset in TASKS:
        return True
    return (local_data_dir(config.data_dir, config.dataset) / config.dataset).is_dir()


def passage(run: Run, ids_T: np.ndarray, source: str) -> str:
    """Return the text, each token coloured by its loss, with the most likely tokens to show."""
    decode = run.tokenizer.decode
    log_probs_TV = jax.nn.log_softmax(next_logits(run, ids_T))
    tokens = [escape(decode(ids_T[:1]))]
    for token, log_probs_V in zip(ids_T[1:], np.asarray(log_probs_TV), strict=False):
        loss = -float(log_probs_V[token])
        best = np.argsort(-log_probs_V)[:ALTERNATIVES]
        lines = [f"{show(decode([token]))}: {np.exp(-loss):.1%}, loss {loss:.2f}", "most likely:"]
        lines += [f"{show(decode([id]))}  {np.exp(log_probs_V[id]):.1%}" for id in best]
        strength = min(1.0, loss / MOST_NATS)
        tip = escape("\n".join(lines))
        tokens.append(
            f'<span tabindex="0" style="--loss:{strength:.2f}" data-tip="{tip}">'
            f"{escape(decode([token]))}</span>"
        )
    note = (
        f"<p>The text is {escape(source)}. The darker a token, the larger its loss. Point at a "
        f"token, or touch it, to see the {ALTERNATIVES} most likely tokens there.</p>"
    )
    return f'{note}<pre class="passage">{"".join(tokens)}</pre>'


def next_logits(run: Run, ids_T: np.ndarray) -> np.ndarray:
    """Return the logits of the token after each id, [at most T - 1, V], in windows of one length.

    Each window begins half a window after the last one, so that its second half has context.
    """
    length = min(run.config.block_size, len(ids_T) - 1)
    half = max(1, length // 2)
    logits_TV = [run.logits(ids_T[:length])]
    for start in range(half, len(ids_T) - length, half):
        logits_TV.append(run.logits(ids_T[start : start + length])[-half:])
    return np.concatenate(logits_TV)


def attention(run: Run, ids_T: np.ndarray) -> dict[str, Any]:
    """Return the attention weights as the page draws them: bytes of 255 x weight, [L, N, T, T]."""
    try:
        weights_LNTT = run.attention(ids_T)
    except NoAttention as error:
        return {"missing": str(error)}
    L, N = weights_LNTT.shape[:2]
    levels = np.round(255 * weights_LNTT).astype(np.uint8)
    tokens = [show(run.tokenizer.decode([id])) for id in ids_T]
    text = base64.b64encode(levels.tobytes()).decode()
    return {"tokens": tokens, "layers": L, "heads": N, "levels": text}


def neighbours(run: Run, ids_T: np.ndarray) -> str:
    """Return, for tokens of the passage, the tokens with the most similar embeddings."""
    padded = run.config.padded_vocab_size
    tables = [x for x in jax.tree.leaves(run.params.get("embed", {})) if x.shape[0] == padded]
    if not tables:
        return "<p>The model has no table of token embeddings.</p>"
    with_text = min(run.config.vocab_size, run.tokenizer.vocab_size)
    table_VD = np.asarray(tables[0], np.float32)[:with_text]
    table_VD = table_VD / (np.linalg.norm(table_VD, axis=1, keepdims=True) + 1e-9)
    ids, counts = np.unique(ids_T, return_counts=True)
    ids = ids[np.argsort(-counts, kind="stable")][:NEIGHBOUR_ROWS]
    decode = run.tokenizer.decode
    lines = []
    for id, similarity_V in zip(ids, table_VD[ids] @ table_VD.T, strict=True):
        nearest = [n for n in np.argsort(-similarity_V)[: NEIGHBOURS + 1] if n != id][:NEIGHBOURS]
        cells = "".join(
            f"<td>{escape(show(decode([n])))} <small>{similarity_V[n]:.2f}</small></td>"
            for n in nearest
        )
        lines.append(f"<tr><th>{escape(show(decode([id])))}</th>{cells}</tr>")
    note = (
        "<p>The tokens of the passage, the most frequent first, and the tokens whose embeddings "
        "have the largest cosine similarity.</p>"
    )
    return f'{note}<div class="wide"><table>{"".join(lines)}</table></div>'


def show(token: str) -> str:
    """Return a token's text with spaces and line breaks made visible."""
    return token.replace(" ", "␣").replace("\n", "↵") or "(empty)"
