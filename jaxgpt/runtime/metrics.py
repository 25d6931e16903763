"""What a run says of itself: a live line or plain lines, metrics.jsonl, loss.png, and trackers."""

import importlib
import json
import math
import time
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from jaxgpt.config import Config, UserError

Row = dict[str, Any]


def escape_controls(text: str, on_terminal: bool) -> str:
    """Text for a terminal: control characters, which could steer it, are spelled out."""
    if not on_terminal:
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


class Log:
    """Everything a run tells, for people and for programs.

    On a terminal the last row is a live line at the bottom; elsewhere every row is a plain line
    to grep. `metrics.jsonl` and `log.txt` get them in any case, TensorBoard and Weights & Biases
    when asked. `first_step` is where the run starts: what an interrupted run had written of
    later steps is forgotten, since those steps are about to be taken again.
    """

    def __init__(self, config: Config, first_step: int):
        self.folder = Path(config.out_dir)
        self._console = Terminal(highlight=False, emoji=False, soft_wrap=True)
        with ExitStack() as stack:
            metrics = _forget_after(first_step, self.folder / "metrics.jsonl")
            self._metrics = stack.enter_context(open(metrics, "a", encoding="utf-8"))
            self._text = stack.enter_context(open(self.folder / "log.txt", "a", encoding="utf-8"))
            self._trackers = [
                stack.enter_context(closing(t)) for t in _trackers(config, first_step)
            ]
            self._live = None
            if self._console.is_interactive:
                self._live = stack.enter_context(_live_line(config, self._console))
            self._stack = stack.pop_all()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def info(self, text: str) -> None:
        """A line for people."""
        self._console.print(escape_controls(text, self._console.is_terminal), markup=False)
        self._write(text)

    def train(self, row: Row, left_s: float) -> None:
        """A training step's numbers, and the seconds until the last step."""
        mfu = f"{100 * row['mfu']:.1f}%" if row["mfu"] is not None else "n/a"
        text = (
            f"step {row['step']}: loss {row['loss']:.4f}, lr {row['lr']:.2e}, "
            f"{row['tokens_per_s']:,.0f} tokens/s, {row['step_ms']:.1f} ms, mfu {mfu}"
        )
        self._record(row)
        if self._live:
            text_left = f"{_duration(left_s)}, {text}"  # a narrow terminal cuts its end
            self._live.update(self._live.task_ids[0], completed=row["step"], text=text_left)
            self._write(text)
        else:
            self.info(text)

    def eval(self, row: Row) -> None:
        """An evaluation's losses; redraws the picture."""
        losses = [f"{k.replace('_', ' ')} {row[k]:.4f}" for k in row if k.endswith("loss")]
        self._record(row)
        self.info(f"step {row['step']}: " + ", ".join(losses))
        draw_losses(self.folder)

    def _write(self, text: str) -> None:
        self._text.write(text + "\n")
        self._text.flush()

    def _record(self, row: Row) -> None:
        row = {key: _finite(value) for key, value in row.items()}
        self._metrics.write(json.dumps(row, allow_nan=False) + "\n")
        self._metrics.flush()
        for tracker in self._trackers:
            tracker.log(row)


class NullLog:
    """The log of a process that leaves the telling to the first."""

    def __enter__(self) -> "NullLog":
        return self

    def __exit__(self, *error) -> None: ...

    def info(self, text: str) -> None: ...

    def train(self, row: Row, left_s: float) -> None: ...

    def eval(self, row: Row) -> None: ...


def _finite(value: Any) -> Any:
    """The value, or None for a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _forget_after(step: int, file: Path) -> Path:
    """Rewrites the metrics file without rows past a step, and without a half-written last one."""
    rows = [row for row in read_metrics(file) if row["step"] <= step]
    partial = file.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return partial.replace(file)


def read_metrics(file: Path) -> list[Row]:
    """The rows of a metrics.jsonl; a last line that a crash cut short is left out."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Terminal(Console):
    """Where whoever read along leaves, as `head` does, the run goes on; its files tell the rest."""

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):
            super().on_broken_pipe()


def _live_line(config: Config, console: Console) -> Progress:
    columns = BarColumn(20), TextColumn("{task.fields[text]}")
    progress = Progress(*columns, console=console, transient=True)
    progress.add_task("", total=config.max_iters, text="compiling")
    return progress


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    clock = f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"
    return f"{clock} left"


def draw_losses(folder: Path) -> None:
    """Redraws loss.png from metrics.jsonl: the loss of steps, and of both splits at evaluations."""
    from matplotlib.figure import Figure

    rows = read_metrics(folder / "metrics.jsonl")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, line, label in (
        ("loss", "0.75", "training steps"),
        ("train_loss", "C0.-", "train split"),
        ("val_loss", "C1.-", "val split"),
    ):
        some = [row for row in rows if key in row]
        axes.plot([r["step"] for r in some], [r[key] for r in some], line, label=label)
    val = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    title = f"{folder.name}: best val loss {min(val):.4f}" if val else folder.name
    axes.set_title(title, parse_math=False)
    axes.set(xlabel="step", ylabel="cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    partial = folder / "loss.partial.png"
    figure.savefig(partial, dpi=120)
    partial.replace(folder / "loss.png")


class Stopwatch:
    """Time a step takes, over the steps since the last reading and without pauses."""

    def __init__(self):
        self._steps, self._spent, self._seconds = 0, 0.0, 0.0
        self.resume()

    def resume(self) -> None:
        """The time since the last lap was a pause."""
        self._lap = time.perf_counter()

    def lap(self, steps: int) -> None:
        """So many steps have just ended."""
        before, self._lap = self._lap, time.perf_counter()
        self._spent += self._lap - before
        self._steps += steps

    def read(self) -> float:
        """Seconds a step; steps of one lap that are read one by one share its mean."""
        if self._steps:
            self._seconds = self._spent / self._steps
        self._steps, self._spent = 0, 0.0
        return self._seconds


def _trackers(config: Config, first_step: int) -> list:
    found = []
    if config.tensorboard:
        found.append(_TensorBoard(Path(config.out_dir, "tensorboard"), first_step))
    if config.wandb_log:
        found.append(_Wandb(config))
    return found


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int):
        writer = _need("tensorboardX", "tensorboard").SummaryWriter
        self._writer = writer(str(folder), purge_step=first_step + 1)

    def log(self, row: Row) -> None:
        for key, value in row.items():
            if key not in ("step", "time") and value is not None:
                self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: Config):
        self._run = _need("wandb", "wandb_log").init(
            project=config.wandb_project,
            name=config.wandb_run_name or Path(config.out_dir).name,
            dir=config.out_dir,
            config=config.to_dict(),
        )

    def log(self, row: Row) -> None:
        self._run.log({k: v for k, v in row.items() if v is not None}, step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _need(package: str, key: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{key}=True: needs {package}; pip install 'jaxgpt[log]'") from error
