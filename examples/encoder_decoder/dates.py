"""Train the encoder-decoder to write dates in digits: "Monday, 7 March 1994" -> "1994-03-07".

Run `python -m examples.encoder_decoder.dates`. The optimizer and the training step are jaxgpt's.
B batch, T target length, S source length, n pairs.
"""

import time
from collections.abc import Iterator
from datetime import date
from itertools import islice

import numpy as np

from examples.encoder_decoder.model import START_ID, EncoderDecoderConfig, translate
from jaxgpt.runtime.mesh import make_mesh
from jaxgpt.train_step import init_state, make_train_step

WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
FIRST, LAST = date(1900, 1, 1).toordinal(), date(2099, 12, 31).toordinal()
ONE_IN = 10  # of the days, one in this many is held out, in every form
NUM_FORMS = 4
PAD, START = "_", ">"
CHARS = PAD + START + "".join(sorted({*"0123456789-, ", *"".join(WEEKDAYS + MONTHS)}))
ID_OF = {char: i for i, char in enumerate(CHARS)}

CONFIG = EncoderDecoderConfig(
    vocab_size=len(CHARS),
    source_length=len("Wednesday, 27 September 1994"),
    block_size=len("Wednesday, 27 September 1994" + "1994-09-27"),
    n_layer=1,
    n_head=4,
    n_embd=64,
    batch_size=64,
    gradient_accumulation_steps=1,
    learning_rate=3e-3,
    min_lr=0.0,
    warmup_iters=50,
    max_iters=800,
    dtype="float32",
    attention="reference",
)


def source_of(day: date, form: int) -> str:
    """Return a date in words, in one of the `NUM_FORMS` forms."""
    weekday, month = WEEKDAYS[day.weekday()], MONTHS[day.month - 1]
    return (
        f"{day.day} {month} {day.year}",
        f"{month} {day.day}, {day.year}",
        f"{weekday}, {day.day} {month} {day.year}",
        f"{month[:3]} {day.day}, {day.year}",
    )[form]


def encode(texts: list[str], length: int) -> np.ndarray:
    """Return token ids, int32 [n, length], with padding at the end of each text."""
    rows = [[ID_OF[char] for char in text.ljust(length, PAD)] for text in texts]
    return np.array(rows, np.int32)


def decode(ids_BT: np.ndarray) -> list[str]:
    """Return the texts of token ids [B, T], without padding."""
    return ["".join(CHARS[i] for i in row).rstrip(PAD) for row in ids_BT]


def pairs(days: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return sources, int32 [n, S], and targets, int32 [n, T], of days given by their ordinals.

    The forms take turns: the pair at place i of the list has form i % NUM_FORMS.
    """
    dates = [date.fromordinal(day) for day in days]
    sources = [source_of(day, i % NUM_FORMS) for i, day in enumerate(dates)]
    targets = [day.isoformat() for day in dates]
    return encode(sources, CONFIG.source_length), encode(targets, CONFIG.target_length)


def held_out_pairs() -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of the held-out days, every tenth day from 1900 to 2099."""
    return pairs([day for day in range(FIRST, LAST + 1) if day % ONE_IN == 0])


def training_windows(batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield batches of random pairs of the other days, int32 [batch_size, S + 1 + T].

    Tokens that are no targets are stored as `~id` (`jaxgpt.train_step.inputs_and_targets`).
    """
    days = np.array([day for day in range(FIRST, LAST + 1) if day % ONE_IN != 0])
    rng = np.random.default_rng(seed)
    start_B1 = np.full((batch_size, 1), START_ID, np.int32)
    while True:
        source_BS, target_BT = pairs(rng.choice(days, batch_size).tolist())
        yield np.concatenate([~source_BS, ~start_B1, target_BT], axis=1)


def train(config: EncoderDecoderConfig) -> dict:
    """Train on the days that are not held out, and print the loss; return the parameters."""
    mesh = make_mesh(config)
    state, step = init_state(config, mesh), make_train_step(config, mesh)
    batches = islice(training_windows(config.batch_size, config.seed), config.max_iters)
    for i, windows in enumerate(batches, 1):
        state, metrics = step(state, windows[None, None], 1)
        loss = float(metrics["loss"][0])  # wait: many queued steps deadlock a CPU's devices
        if i % 100 == 0:
            print(f"step {i}: loss {loss:.4f}", flush=True)
    return state.params


def accuracy(
    config: EncoderDecoderConfig, params: dict, source_BS: np.ndarray, target_BT: np.ndarray
) -> float:
    """Return the fraction of the sources for which all characters of the target are right."""
    written_BT, _ = translate(config, params, source_BS)
    return float((np.asarray(written_BT) == target_BT).all(axis=1).mean())


def main() -> None:
    """Train, and let the model write the held-out dates."""
    began = time.perf_counter()
    params = train(CONFIG)
    print(f"trained in {time.perf_counter() - began:.0f} s")
    source_BS, target_BT = held_out_pairs()
    correct = accuracy(CONFIG, params, source_BS, target_BT)
    print(f"{len(source_BS):,} held-out dates: {correct:.2%} correct")
    written_BT, _ = translate(CONFIG, params, source_BS[:NUM_FORMS])
    for source, target in zip(decode(source_BS[:NUM_FORMS]), decode(written_BT), strict=True):
        print(f"{source} -> {target}")


if __name__ == "__main__":
    main()
