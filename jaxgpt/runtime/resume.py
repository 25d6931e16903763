"""Compare a run that resumes with its checkpoint: reject other data, name the keys that changed."""

from jaxgpt.config import Config, UserError
from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.batch_size import global_batch_size
from jaxgpt.data.tokens import Dataset
from jaxgpt.runtime import run_dir, storage
from jaxgpt.runtime.checkpoint import Checkpoints

# Keys that say where and how a run is started, and change nothing that it computes.
START_KEYS = (
    *("out_dir", "init_from", "overwrite", "steps_per_call"),
    *("coordinator", "num_processes", "process_id"),
)
# Each selects another order of the windows, or other problems of arithmetic.
ORDER_KEYS = ("seed", "dataset", "align_documents", "train_digits", "random_offset")


def check_data(config: Config, checkpoints: Checkpoints, dataset: Dataset) -> None:
    """Raise `UserError` if a run resumes with changed token files, or with another tokenizer."""
    step = run_dir.step_to_resume(config, checkpoints)
    if step is None:
        return
    meta, subject = checkpoints.meta(step), f"dataset={config.dataset!r}"
    if meta["dataset"] == config.dataset and meta["data"] != dataset.fingerprint:
        problem = "its token files have changed since the checkpoint; expected the same files"
        advice = "try to restore them, or --init_from=scratch in a new out_dir"
        raise UserError(f"{subject}: {problem}; {advice}")
    file = storage.local(config.out_dir) / tokenizers.FILE
    tokenizers.check_same(config.dataset, dataset.tokenizer, file)
    vocab_size = meta["data"].get("vocab_size", dataset.vocab_size)
    if not (dataset.tokenizer and file.is_file()) and vocab_size != dataset.vocab_size:
        problem = f"has a vocabulary of {dataset.vocab_size} ids"
        expected = f"expected the {vocab_size} ids with which the run was trained"
        raise UserError(f"{subject}: {problem}; {expected}; try another out_dir")


def describe_changes(config: Config, checkpoints: Checkpoints, step: int) -> list[str]:
    """Return a line for the log that names the keys that differ from the checkpoint's, if any."""
    if not step:
        return []
    saved = run_dir.saved_config(config, checkpoints, step)
    old, new = saved.to_dict(), config.to_dict()
    changed = [key for key in new if new[key] != old[key] and key not in START_KEYS]
    if not changed:
        return []
    keys = ", ".join(f"{key}={new[key]} (was {old[key]})" for key in changed)
    return [f"changed since step {step}: {keys}; {_effect_on_order(saved, config, step)}"]


def _effect_on_order(saved: Config, config: Config, step: int) -> str:
    """Say what the changed keys mean for the sequences that the run trains on next."""
    reordered = [key for key in ORDER_KEYS if getattr(saved, key) != getattr(config, key)]
    if reordered:
        keys = " and ".join(reordered)
        return f"{keys}: another order of the data from here on, which may repeat sequences"
    done, start = step * global_batch_size(saved), step * global_batch_size(config)
    if done == start:
        return "the order of the data is the same"
    lost = f"{start - done:,} are skipped" if start > done else f"{done - start:,} are repeated"
    return f"the data continues at sequence {start:,} of its order, not {done:,}: {lost}"
