"""What a run reports: a live line or plain lines, metrics.jsonl, loss.png, and trackers."""

import importlib
import json
import math
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from jaxgpt.config import Config, UserError
from jaxgpt.runtime.files import atomic_path, atomic_write

Row = dict[str, Any]


def escape_controls(text: str, on_terminal: bool) -> str:
    """Spell out control characters in a text for a terminal, which they could steer."""
    if not on_terminal:
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


class Log:
    """Everything a run reports, for people and for programs.

    On a terminal the last row is a live line at the bottom; elsewhere every row is a plain line.
    `metrics.jsonl` and `log.txt` get the rows too, and the trackers that the config asks for.
    Rows after `first_step`, where the run starts, are deleted: their steps are taken again.
    A log that is not `enabled` drops everything.
    """

    def __init__(self, config: Config, first_step: int, *, enabled: bool = True):
        self.folder, self.enabled = Path(config.out_dir), enabled
        self._stack, self._live = ExitStack(), None
        if not enabled:
            return
        with ExitStack() as stack:
            metrics = truncate_after(first_step, self.folder / "metrics.jsonl")
            self._metrics = stack.enter_context(open(metrics, "a", encoding="utf-8"))
            self._text = stack.enter_context(open(self.folder / "log.txt", "a", encoding="utf-8"))
            trackers = _trackers(config, first_step)
            self._trackers = [stack.enter_context(closing(tracker)) for tracker in trackers]
            self._console = Terminal(highlight=False, emoji=False, soft_wrap=True)
            if self._console.is_interactive:
                self._live = stack.enter_context(_live_line(config, self._console))
            self._stack = stack.pop_all()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def info(self, text: str) -> None:
        """Log a line for people."""
        if self.enabled:
            self._console.print(escape_controls(text, self._console.is_terminal), markup=False)
            self._write(text)

    def train(self, row: Row, left_s: float) -> None:
        """Log a training step's numbers, and the seconds until the last step."""
        if not self.enabled:
            return
        mfu = f"{100 * row['mfu']:.1f}%" if row["mfu"] is not None else "n/a"
        text = (
            f"step {row['step']}: loss {row['loss']:.4f}, lr {row['lr']:.2e}, "
            f"{row['tokens_per_s']:,.0f} tokens/s, {row['step_ms']:.1f} ms, mfu {mfu}"
        )
        self._record(row)
        if self._live:
            time_first = f"{_duration(left_s)}, {text}"  # a narrow terminal cuts the end
            self._live.update(self._live.task_ids[0], completed=row["step"], text=time_first)
            self._write(text)
        else:
            self.info(text)

    def eval(self, row: Row) -> None:
        """Log an evaluation's losses, and redraw loss.png."""
        if not self.enabled:
            return
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


def _finite(value: Any) -> Any:
    """Return the value, or None for a number that JSON cannot hold."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def truncate_after(step: int, file: Path) -> Path:
    """Delete the rows of a metrics file that are past a step, and a last one that is cut short."""
    rows = [row for row in read_metrics(file) if row["step"] <= step]
    atomic_write(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_metrics(file: Path) -> list[Row]:
    """Read the rows of a metrics.jsonl, without a last line that a crash cut short."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class Terminal(Console):
    """A console whose reader may leave, as `head` does: the run continues, and so do its files."""

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
    """Redraw loss.png from metrics.jsonl: the losses of steps, and of both splits."""
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
    with atomic_path(folder / "loss.png") as file:
        figure.savefig(file, dpi=120)


def _trackers(config: Config, first_step: int) -> list:
    trackers = []
    if config.tensorboard:
        trackers.append(_TensorBoard(Path(config.out_dir, "tensorboard"), first_step))
    if config.wandb_log:
        trackers.append(_Wandb(config))
    return trackers


class _TensorBoard:
    def __init__(self, folder: Path, first_step: int):
        writer = import_optional("tensorboardX", "tensorboard").SummaryWriter
        self._writer = writer(str(folder), purge_step=first_step + 1)

    def log(self, row: Row) -> None:
        for key, value in row.items():
            if key not in ("step", "time") and value is not None:
                self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: Config):
        self._run = import_optional("wandb", "wandb_log").init(
            project=config.wandb_project,
            name=config.wandb_run_name or Path(config.out_dir).name,
            dir=config.out_dir,
            config=config.to_dict(),
        )

    def log(self, row: Row) -> None:
        self._run.log({k: v for k, v in row.items() if v is not None}, step=row["step"])

    def close(self) -> None:
        self._run.finish()


def import_optional(package: str, key: str):
    """Import a package that only this key needs."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{key}=True: needs {package}; pip install 'jaxgpt[log]'") from error
