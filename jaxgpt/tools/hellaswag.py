"""HellaSwag (Zellers et al. 2019): how often a model prefers the right ending of a text.

B sequences in a batch, T length.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt import sharding
from jaxgpt.config import Config, UserError
from jaxgpt.data import batch_size
from jaxgpt.data.text import Download
from jaxgpt.loss import cross_entropy
from jaxgpt.model import abstract_model
from jaxgpt.runtime.bucket import local_data_dir
from jaxgpt.tools.evaluation import name_source, open_model
from jaxgpt.train_step import cast_params, inputs_and_targets

ROW_WIDTH = 32  # rows are padded to a multiple of this length, so that few widths are compiled
BATCH_TOKENS = 4096  # rows x width of a batch
FORMAT = 'expected {"ctx": TEXT, "label": NUMBER, "endings": [TEXT, ...]}'
QUESTIONS = Download(
    "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
)


class Question(NamedTuple):
    """A text and its possible endings; `endings[label]` is the right one."""

    ctx: str
    label: int
    endings: list[str]


def hellaswag(*where: str, file: str = "", **options: Any) -> dict[str, Any]:
    """Compute the fraction of questions whose right ending has the lowest loss.

    As in build-nanogpt, `acc` compares summed losses of the endings and `acc_norm` mean losses. For
    `where` and `options` see `open_model`. Raises `UserError`.
    """
    trained, mesh = open_model(*where, **options, attention="xla")  # xla supports every length
    config, encode = trained.config, trained.tokenizer().encode
    if not file:
        file = str(local_data_dir(config.data_dir, "hellaswag") / "hellaswag/hellaswag_val.jsonl")
    questions = read_questions(Path(file))
    windows = []
    for question in questions:
        context = ~encode(question.ctx).astype(np.int32)
        for ending in question.endings:
            ids = encode(f" {ending}").astype(np.int32)
            windows.append(np.concatenate([context, ids])[-config.block_size - 1 :])
    params, step = trained.load(mesh)
    sums, counts = sequence_losses(config, mesh, params, windows)
    ends = np.cumsum([len(question.endings) for question in questions])
    labels = [question.label for question in questions]
    result = name_source(step, **options) | {"questions": len(questions)}
    for name, losses in ("acc", sums), ("acc_norm", sums / np.maximum(counts, 1)):
        picks = [part.argmin() for part in np.split(losses, ends[:-1])]
        result[name] = float(np.equal(picks, labels).mean())
    return result


def read_questions(file: Path) -> list[Question]:
    """Read a file with one JSON object per line: ctx, label and endings. Raises `UserError`."""
    if not file.is_file():
        download = f"curl --create-dirs -o {file} {QUESTIONS.url}"
        expected = f"expected a file with sha256 {QUESTIONS.sha256}"
        raise UserError(f"{file}: no such file; {expected}; try {download}")
    questions = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        where = f"{file}, line {number}"
        try:
            fields = json.loads(line)
            question = Question(fields["ctx"], int(fields["label"]), fields["endings"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"{where}: is not a question ({error!r}); {FORMAT}") from error
        if not isinstance(question.endings, list) or not question.endings:
            raise UserError(f"{where}: endings is not a list of texts; {FORMAT}")
        if not all(isinstance(text, str) for text in (question.ctx, *question.endings)):
            raise UserError(f"{where}: ctx or an ending is not text; {FORMAT}")
        if not 0 <= question.label < len(question.endings):
            expected = f"expected a label from 0 to {len(question.endings) - 1}"
            raise UserError(f"{where}: label={question.label} names no ending; {expected}")
        questions.append(question)
    if not questions:
        raise UserError(f"{file}: holds no questions; {FORMAT} per line")
    return questions


def sequence_losses(
    config: Config, mesh: Mesh, params: dict[str, Any], windows: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the summed loss in nats of each window's targets, and the number of its targets.

    A window is int32 ids; a masked token is `~id`, which is negative, and is no target. Windows of
    similar length share a batch, so that little is padded.
    """
    graphdef = abstract_model(config).graphdef

    def losses(params: dict, windows_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        network = nnx.merge(graphdef, cast_params(params, config.dtype))
        inputs_BT, targets_BT = inputs_and_targets(windows_BT)
        return jax.vmap(cross_entropy)(network(inputs_BT), targets_BT)

    step = jax.jit(sharding.use_mesh(mesh)(losses))
    by_batch = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    num_shards = batch_size.batch_shards(mesh)
    order = sorted(range(len(windows)), key=lambda n: len(windows[n]))
    calls = []
    while order:
        longest = max(2, len(windows[order[-1]]))
        width = min(math.ceil((longest - 1) / ROW_WIDTH) * ROW_WIDTH, config.block_size)
        rows = max(1, BATCH_TOKENS // width // num_shards) * num_shards
        taken, order = order[-rows:], order[:-rows]
        batch = np.full((rows, width + 1), -1, np.int32)
        for row, n in zip(batch, taken, strict=False):
            row[: len(windows[n])] = windows[n]
        array = jax.make_array_from_callback(batch.shape, by_batch, batch.__getitem__)
        calls.append((taken, step(params, array)))
        if len(calls) > 1:
            jax.block_until_ready(calls[-2][1])  # many queued calls deadlock the devices of a CPU
    results = np.zeros((2, len(windows)))
    for taken, numbers in calls:
        results[:, taken] = np.stack(jax.device_get(numbers))[:, : len(taken)]
    return results[0], results[1].astype(int)
