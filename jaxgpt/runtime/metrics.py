"""Report a run: a live line or plain lines, metrics.jsonl, loss.png, and trackers."""

import json
import math
import mmap
import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from jaxgpt.config import Config, UserError
from jaxgpt.runtime import storage
from jaxgpt.runtime.files import FULL_DISK, atomic_path, import_extra, reason

Row = dict[str, Any]
EVALUATION = b'"val_loss"'  # in the rows of evaluations only
PICTURE_ROWS = 4_000  # that loss.png shows, which is several rows per pixel
NOTEBOOK_INTERVAL_S = 1.0  # between two texts of the live line, which are all sent to the browser


def escape_controls(text: str, on_terminal: bool) -> str:
    """Replace control characters in a text for a terminal, because they could control it."""
    if not on_terminal:
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


class Log:
    """The log of a run, for people and for programs.

    On a terminal and in a notebook the last row is a live line at the bottom; elsewhere every row
    is a plain line. The log deletes the rows of `metrics.jsonl` after `first_step`, because their
    steps are taken again. A log that is not `enabled` writes nothing.
    """

    def __init__(self, config: Config, first_step: int, *, enabled: bool = True):
        self.folder = storage.local(config.out_dir)
        self.enabled = enabled
        self._stack = ExitStack()
        self._live: TerminalLine | NotebookLine | None = None
        if not enabled:
            return
        with ExitStack() as stack:
            file = self.folder / "metrics.jsonl"
            delete_rows_after(file, first_step)
            append = partial(open, mode="a", buffering=1, encoding="utf-8")  # line by line
            self._metrics = stack.enter_context(append(file))
            self._text = stack.enter_context(append(self.folder / "log.txt"))
            self._trackers: list[Callable[[Row], None]] = []
            if config.tensorboard:
                self._trackers.append(_tensorboard(config, first_step, stack))
            if config.wandb_log:
                self._trackers.append(_wandb(config, stack))
            options: dict[str, Any] = {"highlight": False, "emoji": False, "soft_wrap": True}
            self._console = Terminal(force_jupyter=False, **options)
            if Console().is_jupyter:
                self._live = stack.enter_context(NotebookLine())
            elif self._console.is_interactive:
                line = TerminalLine(self._console, config.max_iters)
                self._live = stack.enter_context(line)
            self._stack = stack.pop_all()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def info(self, text: str) -> None:
        """Log a line for people."""
        if self.enabled:
            if self._live:
                self._live.erase()
            shown = escape_controls(text, self._console.is_terminal)
            # the disk of a redirected stdout may be full, or its encoding lack a character
            with suppress(OSError, UnicodeError):
                self._console.print(shown, markup=False)
            self._text.write(text + "\n")

    def train(self, row: Row, left_s: float) -> None:
        """Log a training step's numbers, and the seconds until the last step."""
        mfu = f"{100 * row['mfu']:.1f}%" if row["mfu"] is not None else "n/a"
        text = (
            f"step {row['step']}: loss {row['loss']:.4f}, lr {row['lr']:.2e}, "
            f"{row['tokens_per_s']:,.0f} tokens/s, {row['step_ms']:.1f} ms, mfu {mfu}"
        )
        self._record(row)
        if self._live:
            time_first = f"{_duration(left_s)}, {text}"  # a narrow terminal cuts the end
            self._live.show(row["step"], time_first)
            self._text.write(text + "\n")
        else:
            self.info(text)

    def eval(self, row: Row) -> None:
        """Log an evaluation's losses, and redraw loss.png unless no step has been taken."""
        losses = [f"{k.replace('_', ' ')} {row[k]:.4f}" for k in row if k.endswith("loss")]
        self._record(row)
        self.info(f"step {row['step']}: " + ", ".join(losses))
        if self.enabled and row["step"]:  # importing matplotlib takes a third of a second
            self._draw_losses()

    def target(self, row: Row) -> None:
        """Log how many steps, tokens and seconds a run took to reach its target."""
        self._record(row)
        self.info(
            f"target_val_loss={row['target_val_loss']}: reached at step {row['step']}, after "
            f"{row['tokens']:,} tokens, {row['train_s']:.1f} s of training steps and "
            f"{row['total_s']:.1f} s in total"
        )

    def sync(self) -> None:
        """Write the rows to the disk, so that no checkpoint outlives the rows before it."""
        if self.enabled:
            os.fsync(self._metrics.fileno())

    def _draw_losses(self) -> None:
        """Redraw loss.png, or log why it cannot be written. Raises `OSError` for a full disk."""
        try:
            draw_losses(self.folder)
        except OSError as error:
            if error.errno in FULL_DISK:
                raise
            self.info(f"loss.png: not drawn ({reason(error)})")

    def _record(self, row: Row) -> None:
        if not self.enabled:
            return
        bad = {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
        row = row | bad  # JSON has no nan and no infinity
        self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
        for track in self._trackers:
            track(row)


def read_metrics(file: Path) -> list[Row]:
    """Read the rows of a metrics.jsonl, except for a last line that is incomplete after a crash."""
    rows: list[Row] = []
    if not file.exists():
        return rows
    with open(file, "rb") as lines:
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return rows


def sample_metrics(file: Path, count: int) -> list[Row]:
    """Read the evaluation rows of a metrics.jsonl, and about `count` rows at equal distances.

    The file may have millions of rows, so it is searched in pieces, and other rows are not parsed.
    """
    rows: list[Row] = []
    piece_bytes = 1 + file.stat().st_size // count
    with open(file, "rb") as stream:
        while piece := stream.read(piece_bytes) + stream.readline():  # whole lines
            found = [0, *(match.start() for match in re.finditer(EVALUATION, piece))]
            lines = dict.fromkeys(_line_at(piece, at) for at in found)
            with suppress(ValueError):  # the last line may be incomplete
                rows += [json.loads(line) for line in lines]
    return rows


def _line_at(text: bytes, at: int) -> bytes:
    """Return the line of a text that holds a position."""
    return text[text.rfind(b"\n", 0, at) + 1 : text.find(b"\n", at)]


def delete_rows_after(file: Path, step: int) -> None:
    """Delete the rows of a metrics.jsonl after a step, and a last line that is incomplete.

    The rows are in the order of the steps, so only the end of the file is read.
    """
    if not file.exists() or not file.stat().st_size:
        return
    with open(file, "r+b") as stream:
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as lines:
            end = len(lines)
            last = b""
            while end:
                start = lines.rfind(b"\n", 0, end - 1) + 1
                last = lines[start:end]
                if _step_of(last) <= step:
                    break
                end = start
        stream.truncate(end)
        if end and not last.endswith(b"\n"):
            stream.seek(end)
            stream.write(b"\n")


def _step_of(line: bytes) -> float:
    """Return the step of a row, or infinity for a line that is no row."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class Terminal(Console):
    """A console that ignores a closed pipe (as after `head`), so that the run continues."""

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):
            super().on_broken_pipe()


class TerminalLine(Progress):
    """The last line of a terminal: a bar, and a text that the next one overwrites."""

    def __init__(self, console: Console, steps: int):
        columns = BarColumn(20), TextColumn("{task.fields[text]}")
        super().__init__(*columns, console=console, transient=True)
        self._task = self.add_task("", total=steps, text="compiling")

    def show(self, step: int, text: str) -> None:
        self.update(self._task, completed=step, text=text)

    def erase(self) -> None:
        """Do nothing, because Rich moves the line below what is printed."""


class NotebookLine:
    """The last line of a notebook's output, with a text that the next one overwrites.

    Rich's live display needs the cursor movements of a terminal, or ipywidgets.
    """

    def __init__(self):
        self._width = 0
        self._shown_at = -math.inf

    def __enter__(self) -> "NotebookLine":
        return self

    def __exit__(self, *error) -> None:
        self.erase()

    def show(self, step: int, text: str) -> None:
        """Show a text, unless another one was shown a moment ago."""
        if time.monotonic() - self._shown_at < NOTEBOOK_INTERVAL_S:
            return
        print("\r" + text.ljust(self._width), end="", flush=True)
        self._width, self._shown_at = len(text), time.monotonic()

    def erase(self) -> None:
        if self._width:
            print("\r" + " " * self._width, end="\r")
        self._width = 0


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    clock = f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
    return f"{clock} left"


@cache
def _picture() -> Any:
    """Return the axes of loss.png, with a line per loss whose label is the key of its rows.

    Python frees a figure late, because its parts refer to each other. So there is only one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # keeps its pixels for the next picture
    axes = figure.subplots()
    for key, line in ("loss", "0.75"), ("train_loss", "C0.-"), ("val_loss", "C1.-"):
        axes.plot([], [], line, label=key)
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(axes.lines, ["training steps", "train split", "val split"])
    return axes


def draw_losses(folder: Path) -> None:
    """Redraw loss.png from metrics.jsonl."""
    rows, axes = sample_metrics(folder / "metrics.jsonl", PICTURE_ROWS), _picture()
    for line in axes.lines:
        key = line.get_label()
        some = [row for row in rows if key in row]
        line.set_data([r["step"] for r in some], [r[key] for r in some])
    axes.relim()
    axes.autoscale()
    val = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    title = f"{folder.name}: best val loss {min(val):.4f}" if val else folder.name
    axes.set_title(title, parse_math=False)
    with atomic_path(folder / "loss.png") as file:
        axes.figure.savefig(file, dpi=120)


def _tensorboard(config: Config, first_step: int, stack: ExitStack) -> Callable[[Row], None]:
    tensorboard = import_extra("tensorboardX", "tensorboard=True", "log")
    writer = tensorboard.SummaryWriter(
        str(storage.local(config.out_dir) / "tensorboard"), purge_step=first_step + 1
    )
    stack.callback(writer.close)

    def track(row: Row) -> None:
        for key, value in row.items():
            if key not in ("step", "time") and value is not None:
                writer.add_scalar(key, value, row["step"])

    return track


def _wandb(config: Config, stack: ExitStack) -> Callable[[Row], None]:
    wandb = import_extra("wandb", "wandb_log=True", "log")
    try:
        run = wandb.init(
            project=config.wandb_project,
            name=config.wandb_run_name or Path(config.out_dir).name,
            dir=str(storage.local(config.out_dir)),
            config=config.to_dict(),
        )
    except wandb.Error as error:  # no login, or no connection
        advice = "expected a login; try wandb login, or WANDB_MODE=offline"
        raise UserError(f"wandb_log=True: {reason(error)}; {advice}") from error
    stack.callback(run.finish)
    return lambda row: run.log({k: v for k, v in row.items() if v is not None}, step=row["step"])
