"""`jaxgpt eval`: the loss on a whole validation split, and the fraction of exact answers."""

import math
from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxgpt.config import UserError
from jaxgpt.data import batch_size
from jaxgpt.data.prepare import find_dataset
from jaxgpt.data.tasks import Arithmetic, ValProblems
from jaxgpt.data.tokenizer import Tokenizer, check_same
from jaxgpt.data.tokens import TokenSplit
from jaxgpt.evaluate import full_split, mean_loss
from jaxgpt.interop.trained import Trained, open_trained
from jaxgpt.runtime import device
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.sample import NO_TOKEN, Sampler, SamplingParams
from jaxgpt.train_step import make_eval_step

DECODE_TOKENS = 1 << 20  # tokens decoded at a time
PROBLEMS_PER_BATCH = 128
ERRORS_SHOWN = 10
WEIGHTS_BATCH = 8  # sequences per device for weights, which have no run's batch_size


def open_model(
    *where: Any, init_from: str = "resume", mesh: str = "", **keys: Any
) -> tuple[Trained, Mesh]:
    """Open the model of a run, or the weights `init_from`, with a config for this device.

    `where` is out_dir, checkpoint, data_dir and config file; `keys` override the config's. Raises
    `UserError`.
    """
    trained = open_trained(init_from, *where)
    device.enable_float64(trained.config)
    if init_from != "resume":
        keys |= {"batch_size": WEIGHTS_BATCH, "gradient_accumulation_steps": jax.device_count()}
    config = device.inference_config(trained.config, mesh=mesh, **keys)
    return trained._replace(config=config), make_mesh(config)


def name_source(step: int | None, init_from: str = "resume", **_: Any) -> dict[str, Any]:
    """Return the first line of a result: the checkpoint's step, or the name of the weights."""
    return {"weights": init_from} if step is None else {"step": step}


def evaluate(*where: str, dataset: str = "", **options: Any) -> dict[str, Any]:
    """Compute the loss in nats per token on a validation split, perplexity and bits per byte.

    The split is that of `dataset`, by default the run's. A task's split is its held-out problems,
    for which the fraction of exact answers is computed instead. For `where` and `options` see
    `open_model`. Raises `UserError`.
    """
    if options.get("init_from", "resume") != "resume" and not dataset:
        problem = "weights have no dataset of their own; expected the name of a dataset"
        raise UserError(f"dataset='': {problem}; try --dataset=shakespeare")
    keys = {"dataset": dataset} if dataset else {}
    trained, mesh = open_model(*where, **options, **keys)
    config = trained.config
    data = find_dataset(config, config.block_size, config.vocab_size)
    check_same(config.dataset, data.tokenizer, trained.tokenizer_file)
    if config.vocab_size < data.vocab_size:
        problem = f"has {data.vocab_size} ids, but the model has vocab_size={config.vocab_size}"
        expected = "expected a dataset prepared with the model's tokenizer"
        raise UserError(f"dataset={config.dataset!r}: {problem}; {expected}")
    params, step = trained.load(mesh)
    if isinstance(data.val, ValProblems):
        return name_source(step, **options) | accuracy(Sampler(config).load(params), data.val.task)
    sequences = batch_size.global_batch_size(config) // batch_size.num_microbatches(config, mesh)
    batches = full_split(data.val, mesh, sequences, config.block_size)
    loss = mean_loss(make_eval_step(config, mesh), params, batches)
    result = name_source(step, **options) | {"val_tokens": len(data.val), "val_loss": loss}
    result["perplexity"] = math.inf if loss >= 700 else math.exp(loss)  # exp would overflow
    if data.tokenizer:
        targets, size = count_bytes(data.val, data.tokenizer)
        if size:
            result["bits_per_byte"] = loss / math.log(2) * targets / size
    return result


def count_bytes(tokens: TokenSplit, tokenizer: Tokenizer) -> tuple[int, int]:
    """Return the number of targets (not the first and masked tokens) and of their UTF-8 bytes.

    An end-of-text is a target without bytes.
    """
    targets = size = 0
    for start in range(1, len(tokens), DECODE_TOKENS):
        ids = tokens.read(start, min(DECODE_TOKENS, len(tokens) - start))
        ids = ids[ids >= 0]
        targets += len(ids)
        if tokenizer.eot is not None:
            ids = ids[ids != tokenizer.eot]
        size += len(tokenizer.decode(ids).encode())
    return targets, size


def accuracy(sampler: Sampler, task: Arithmetic) -> dict[str, Any]:
    """Compute the fraction of held-out problems whose greedy answer is right in every digit.

    The result also has this fraction per operation and per length of the longer number, with its
    95% interval. It counts the errors of each kind, and has the first `ERRORS_SHOWN` errors.
    """
    problems = task.held_out
    kinds, a, b = problems
    solutions, expected = greedy_solutions(sampler, task), task.solutions(problems)
    errors = [kind_of_error(*pair) for pair in zip(solutions, expected, strict=True)]
    is_right = np.array([error is None for error in errors])
    result: dict[str, Any] = {"problems": len(a), "exact": float(is_right.mean())}
    lengths = np.char.str_len(np.maximum(a, b).astype(str))
    for kind, name in enumerate(task.operations):
        result[f"exact {name}"] = proportion(is_right[kinds == kind])
        for length in range(1, task.digits + 1):
            chosen = is_right[(kinds == kind) & (lengths == length)]
            result[f"exact {name} of {length} digits"] = proportion(chosen)
    for error, count in Counter(errors).items():
        if error:
            result[f"errors, {error}"] = count
    for n in np.flatnonzero(~is_right)[:ERRORS_SHOWN]:
        lines = (texts[n].rstrip("\n") + "\n" for texts in (solutions, expected))
        answer, right = (task.tokenizer.read(line).rstrip("\n") for line in lines)
        problem = f"{a[n]}{task.operations[kinds[n]]}{b[n]}"
        result[problem] = f"{answer}, but expected {right}"
    return result


def proportion(is_right: np.ndarray) -> str:
    """Describe the fraction of right answers, with its 95% interval (Wilson 1927)."""
    n, fraction, z = len(is_right), is_right.mean(), 1.96
    scale = 1 + z**2 / n
    center = (fraction + z**2 / (2 * n)) / scale
    radius = z / scale * math.sqrt(fraction * (1 - fraction) / n + (z / (2 * n)) ** 2)
    low, high = max(0.0, center - radius), min(1.0, center + radius)
    interval = f"95% interval {low:.2%} to {high:.2%}"
    return f"{fraction:.2%} of {n:,}, {n - is_right.sum():,} wrong ({interval})"


def kind_of_error(solution: str, expected: str) -> str | None:
    """Name what is wrong with the characters of a solution; None if its answer is right."""
    working, _, answer = solution.rpartition("=")
    expected_working, _, expected_answer = expected.rpartition("=")
    if not solution.endswith("\n"):
        return "no end"
    if answer == expected_answer:
        return None
    if not expected_working:
        return "wrong answer"
    return "wrong working" if working != expected_working else "right working and wrong answer"


def greedy_solutions(sampler: Sampler, task: Arithmetic) -> list[str]:
    """Return the most likely characters after each held-out problem, up to the line break."""
    rows = task.windows(task.held_out, task.longest)
    prompts = [~row[: (row >= 0).argmax()] for row in rows]
    solutions, chars = [""] * len(prompts), task.tokenizer.chars
    size = min(PROBLEMS_PER_BATCH, len(prompts))
    for kind in range(len(task.operations)):
        numbers = np.flatnonzero(task.held_out.kind == kind)
        longest = int((rows[numbers] >= 0).sum(1).max())
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            same_size = np.resize(batch, size)  # another size would be compiled
            tokens = greedy_tokens(sampler, [prompts[n] for n in same_size], task, longest)
            for n, row in zip(batch, tokens, strict=False):
                text = "".join(chars[id] if id < len(chars) else "\ufffd" for id in row)
                solutions[n] = text[: text.find("\n") + 1] or text
    return solutions


def greedy_tokens(
    sampler: Sampler, prompts: list[np.ndarray], task: Arithmetic, longest: int
) -> np.ndarray:
    """Return the most likely tokens after each prompt, int32 [n, at most `longest`]."""
    line_break = task.tokenizer.chars.index("\n")
    active, chunks = np.ones(len(prompts), bool), []
    greedy = SamplingParams(temperature=0)
    for chunk in sampler.generate(prompts, max_new_tokens=longest, sampling=greedy, active=active):
        chunks.append(chunk)
        active &= (chunk != line_break).all(1)
    tokens = np.concatenate(chunks, axis=1)[:, :longest]
    return np.where(tokens == NO_TOKEN, line_break, tokens)
