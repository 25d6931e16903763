"""How good a model is: estimates from random batches, the loss of a whole split, HellaSwag.

K batches of a dispatch, M micro-batches (here one), B sequences, T length.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgpt import model, sharding
from jaxgpt.config import Config, UserError
from jaxgpt.data.batches import Batches
from jaxgpt.data.prepare import find_dataset
from jaxgpt.data.tasks import Arithmetic, Problems, ValProblems
from jaxgpt.data.text import Download
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.data.tokens import TokenSplit
from jaxgpt.interop import huggingface
from jaxgpt.loss import cross_entropy
from jaxgpt.runtime import device
from jaxgpt.sample import NO_TOKEN, Sampler, SamplingParams
from jaxgpt.sharding import BATCH
from jaxgpt.train_step import cast_params, inputs_and_targets, make_eval_step

DISPATCH = 20  # batches handed to the device in one call
PIECE = 1 << 20  # tokens decoded in one piece
PROBLEMS, ERRORS_SHOWN = 2000, 10  # answered in one batch; in full
WEIGHTS_BATCH = 8  # sequences a device, for weights that have no run to say it
ROW_WIDTH, BATCH_TOKENS = 32, 4096  # of HellaSwag: rows are padded to a multiple; rows x width

HELLASWAG = Download(
    "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl",
    "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
)


def mean_loss(
    eval_step: Callable, params: dict[str, Any], batches: Iterable[tuple[jax.Array, int]]
) -> float:
    """Mean cross-entropy in nats a token; of each K batches only the number beside them count."""
    sums = [eval_step(params, batch, count) for batch, count in batches]
    total, targets = np.array(jax.device_get(sums), np.float64).sum(axis=0)
    return float(total / targets)


def random_batches(batches: Batches, step: int, count: int) -> Iterator[tuple[jax.Array, int]]:
    """`count` batches that are a pure function of the training step they are drawn at."""
    first = step * count
    for done in range(0, count, DISPATCH):
        yield batches.get(first + done), min(DISPATCH, count - done)


def full_split(
    tokens: TokenSplit, mesh: Mesh, sequences: int, block_size: int
) -> Iterator[tuple[jax.Array, int]]:
    """Batches in which every token of a split but the first is a target exactly once.

    Windows follow each other without overlap. The last window, and the last batch, are filled up
    with ids of -1, which count for nothing.
    """
    place = NamedSharding(mesh, PartitionSpec(None, None, BATCH))
    rows, targets = DISPATCH * sequences, len(tokens) - 1
    for first in range(0, targets, rows * block_size):
        starts = range(first, targets, block_size)[:rows]
        windows = np.full((rows, block_size + 1), -1, np.int32)
        for window, start in zip(windows, starts, strict=False):
            ids = tokens.read(start, min(block_size, targets - start) + 1)
            window[: len(ids)] = ids
        windows = windows.reshape(DISPATCH, 1, sequences, block_size + 1)
        batch = jax.make_array_from_callback(windows.shape, place, windows.__getitem__)
        yield batch, -(-len(starts) // sequences)


def evaluate(
    out_dir: str,
    checkpoint: str,
    data_dir: str = "",
    mesh: str = "",
    *,
    init_from: str = "resume",
    dataset: str = "",
) -> dict[str, Any]:
    """The loss of a model on a whole validation split, also as perplexity and bits a byte.

    The model is that of a run, or for another `init_from` those weights; the split is the run's
    own, or that of `dataset`. For a task it is the problems that were held out, and there is the
    share of exact answers. Raises `UserError` if one of them is not there.
    """
    if init_from != "resume" and not dataset:
        raise UserError("dataset='': name the one to evaluate on, as in --dataset=shakespeare")
    config, load, _ = _find(out_dir, checkpoint, data_dir, init_from)
    config = config.replace(dataset=dataset or config.dataset)
    data = find_dataset(config, config.block_size)
    if config.vocab_size < data.vocab_size:
        raise UserError(
            f"dataset={config.dataset!r}: has {data.vocab_size} ids, but the model has "
            f"vocab_size={config.vocab_size}"
        )
    devices = sharding.make_mesh(config.replace(mesh=mesh))
    params, step = load(devices)
    resolved, _ = device.resolve_auto(config.replace(dropout=0.0))
    sequences = sharding.global_batch_size(config) // sharding.num_microbatches(config, devices)
    batches = full_split(data.val, devices, sequences, config.block_size)
    loss = mean_loss(make_eval_step(resolved, devices), params, batches)
    found = _whose(init_from, step) | {"val_tokens": len(data.val), "val_loss": loss}
    found["perplexity"] = math.exp(loss)
    if isinstance(data.val, ValProblems):
        return found | accuracy(Sampler(resolved).load(params), data.val.task)
    if data.tokenizer:
        targets, size = count_bytes(data.val, data.tokenizer)
        found["bits_per_byte"] = loss / math.log(2) * targets / size
    return found


def _find(out_dir: str, checkpoint: str, data_dir: str, init_from: str) -> huggingface.Trained:
    trained = huggingface.load_trained(init_from, out_dir, checkpoint, data_dir)
    if init_from == "resume":
        return trained
    sizes = {"batch_size": WEIGHTS_BATCH, "gradient_accumulation_steps": jax.device_count()}
    return trained._replace(config=trained.config.replace(**sizes))


def _whose(init_from: str, step: int | None) -> dict[str, Any]:
    return {"weights": init_from} if step is None else {"step": step}


def count_bytes(tokens: TokenSplit, tokenizer: Tokenizer) -> tuple[int, int]:
    """Targets of a split, and the bytes of UTF-8 that they stand for.

    Every token but the first is one, unless it is masked.
    """
    targets = size = 0
    for at in range(1, len(tokens), PIECE):
        ids = tokens.read(at, min(PIECE, len(tokens) - at))
        ids = ids[ids >= 0]
        targets, size = targets + len(ids), size + len(tokenizer.decode(ids).encode())
    return targets, size


# ---- Arithmetic ------------------------------------------------------------------------------


def accuracy(sampler: Sampler, task: Arithmetic) -> dict[str, Any]:
    """The share of the held-out problems whose greedy answer is right to the last digit, in all,
    and by operation and length of the longer number; and some of the wrong answers.
    """
    p, read = task.held_out, task.tokenizer.decode
    some = (Problems(*(x[i : i + PROBLEMS] for x in p)) for i in range(0, len(p.a), PROBLEMS))
    said = [ids for problems in some for ids in answer(sampler, task, problems)]
    wanted = [row[row >= 0] for row in task.windows(p, task.longest)]
    right = np.array([(s[: len(w)] == w).all() for s, w in zip(said, wanted, strict=True)])
    found: dict[str, Any] = {"problems": len(right), "exact": float(right.mean())}
    lengths = np.char.str_len(np.maximum(p.a, p.b).astype(str))
    for kind, name in enumerate(task.operations):
        for length in range(1, task.digits + 1):
            these = right[(p.kind == kind) & (lengths == length)]
            found[f"exact {name} of {length} digits"] = f"{these.mean():.2%} of {len(these):,}"
    answers = p.answers()
    for n in np.flatnonzero(~right)[:ERRORS_SHOWN]:
        problem = f"{p.a[n]}{task.operations[p.kind[n]]}{p.b[n]}"
        found[problem] = read(said[n]).partition("\n")[0] + f", but it is {answers[n]}"
    return found


def answer(sampler: Sampler, task: Arithmetic, problems: Problems) -> np.ndarray:
    """The likeliest tokens after each problem, one after the other, [n, `longest_answer`]."""
    rows = task.windows(problems, task.longest)
    prompts = [~row[: (row >= 0).argmax()] for row in rows]
    chunks = sampler.generate(
        prompts, max_new_tokens=task.longest_answer, knobs=SamplingParams(temperature=0)
    )
    said = np.concatenate(list(chunks), axis=1)[:, : task.longest_answer]
    return np.where(said == NO_TOKEN, 0, said)


# ---- HellaSwag (Zellers et al. 2019) ---------------------------------------------------------


class Question(NamedTuple):
    """A text and its possible endings, of which number `label` is the right one."""

    ctx: str
    label: int
    endings: list[str]


def hellaswag(
    out_dir: str,
    checkpoint: str,
    file: str = "",
    data_dir: str = "",
    mesh: str = "",
    *,
    init_from: str = "resume",
) -> dict[str, Any]:
    """The share of questions whose right ending the model finds the likeliest.

    Scored as completions, as build-nanogpt does: `acc` takes the ending with the lowest summed
    loss, `acc_norm` that with the lowest mean loss a token. Raises `UserError`.
    """
    config, load, tokenizer = _find(out_dir, checkpoint, data_dir, init_from)
    default = Path(config.data_dir, "hellaswag", "hellaswag_val.jsonl")
    questions = read_questions(Path(file) if file else default)
    windows, encoder = [], tokenizer()
    for question in questions:
        context = ~encoder.encode(question.ctx).astype(np.int32)
        for ending in question.endings:
            ids = encoder.encode(f" {ending}").astype(np.int32)
            windows.append(np.concatenate([context, ids])[-config.block_size - 1 :])
    devices = sharding.make_mesh(config.replace(mesh=mesh))
    params, step = load(devices)
    resolved, _ = device.resolve_auto(config.replace(dropout=0.0, attention="xla"))  # any length
    sums, counts = sequence_losses(resolved, devices, params, windows)
    means, first = sums / np.maximum(counts, 1), 0
    right = {"acc": 0, "acc_norm": 0}
    for question in questions:
        mine = slice(first, first := first + len(question.endings))
        right["acc"] += int(sums[mine].argmin()) == question.label
        right["acc_norm"] += int(means[mine].argmin()) == question.label
    shares = {name: count / len(questions) for name, count in right.items()}
    return _whose(init_from, step) | {"questions": len(questions)} | shares


def read_questions(file: Path) -> list[Question]:
    """The questions of a file with an object a line: ctx, label, endings."""
    if not file.is_file():
        raise UserError(f"{file}: no such file; get {HELLASWAG.url} (sha256 {HELLASWAG.sha256})")
    questions = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            fields = json.loads(line)
            question = Question(fields["ctx"], int(fields["label"]), list(fields["endings"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}, line {number}: not a question ({error!r})") from error
        if not all(isinstance(text, str) for text in (question.ctx, *question.endings)):
            raise UserError(f"{file}, line {number}: ctx and endings must be text")
        if not 0 <= question.label < len(question.endings):
            raise UserError(f"{file}, line {number}: label={question.label}: names no ending")
        questions.append(question)
    if not questions:
        raise UserError(f"{file}: holds no questions")
    return questions


def sequence_losses(
    config: Config, mesh: Mesh, params: dict[str, Any], windows: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Of every window, in nats: the summed loss of its targets, and how many targets it has.

    In a window `~id` is a token that is not a target. Windows of about one length share a batch,
    so that little is padded and few widths are compiled.
    """
    graphdef, _, _ = model.split(config)
    place = NamedSharding(mesh, PartitionSpec(BATCH))

    def losses(params: dict, windows_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        network = nnx.merge(graphdef, cast_params(params, config.dtype))
        inputs_BT, targets_BT = inputs_and_targets(windows_BT)
        return jax.vmap(cross_entropy)(network(inputs_BT), targets_BT)

    step, shares = (
        jax.jit(sharding.with_mesh(mesh, losses)),
        mesh.shape["data"] * mesh.shape["fsdp"],
    )
    order = sorted(range(len(windows)), key=lambda row: len(windows[row]))
    launched = []
    while order:
        longest = max(2, len(windows[order[-1]]))
        width = min(-(-(longest - 1) // ROW_WIDTH) * ROW_WIDTH, config.block_size)
        rows = max(1, BATCH_TOKENS // width // shares) * shares
        taken, order = order[-rows:], order[:-rows]
        batch = np.full((rows, width + 1), -1, np.int32)
        for row, window in zip(batch, (windows[n] for n in taken), strict=False):
            row[: len(window)] = window
        array = jax.make_array_from_callback(batch.shape, place, batch.__getitem__)
        launched.append((taken, step(params, array)))
    sums, counts = np.zeros(len(windows)), np.zeros(len(windows), int)
    for taken, numbers in launched:
        sums[taken], counts[taken] = (a[: len(taken)] for a in jax.device_get(numbers))
    return sums, counts
