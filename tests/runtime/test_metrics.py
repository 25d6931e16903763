"""Test the output of a run: metric rows, console lines, the loss plot and trackers."""

import builtins
import gc
import io
import json
import re
import struct
import subprocess
import sys
import tracemalloc
from functools import partial
from itertools import pairwise
from types import ModuleType
from unittest.mock import Mock

import pytest
from helpers import refusal
from matplotlib.figure import Figure
from matplotlib.image import imread
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxgpt.config import Config
from jaxgpt.runtime import metrics
from jaxgpt.runtime.metrics import (
    Log,
    draw_losses,
    escape_controls,
    read_metrics,
    sample_metrics,
)


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch):
    """Remove terminal variables, so that the tester's terminal does not affect the results."""
    for name in "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS":
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.fixture
def config(tmp_path) -> Config:
    return Config(out_dir=str(tmp_path), max_iters=100)


def train_row(step: int, **numbers) -> dict:
    row = {"step": step, "loss": 4.0 - step / 100, "grad_norm": 1.25, "lr": 3e-4}
    row |= {"tokens": 1000 * step, "tokens_per_s": 123456.7, "step_ms": 8.123, "time": 1e9 + step}
    return row | {"mfu": None} | numbers


def eval_row(step: int, **numbers) -> dict:
    row = {"step": step, "train_loss": 3.9 - step / 100, "val_loss": 4.1 - step / 100}
    return row | {"time": 1e9 + step} | numbers


def lines(folder, name: str) -> list[str]:
    return (folder / name).read_text(encoding="utf-8").splitlines()


LOUD = """
import sys
from jaxgpt.config import Config
from jaxgpt.runtime.metrics import Log
with Log(Config(out_dir=sys.argv[1]), 0) as log:
    for n in range(5000):
        log.info(f"line {n}")
"""


def test_run_continues_after_the_output_pipe_closes(tmp_path):
    command = [sys.executable, "-c", LOUD, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as talk:
        assert talk.stdout.readline() == b"line 0\n"
        talk.stdout.close()
        assert talk.stderr.read() == b""
    assert talk.returncode == 0
    assert lines(tmp_path, "log.txt") == [f"line {n}" for n in range(5000)]


def test_run_continues_while_the_disk_of_its_output_is_full(tmp_path):
    command = [sys.executable, "-c", LOUD, tmp_path]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert "Traceback" not in done.stderr
    assert lines(tmp_path, "log.txt") == [f"line {n}" for n in range(5000)]


TOLD = [eval_row(0), train_row(1), train_row(2, mfu=0.4), eval_row(2, full_val_loss=3.5)]


def tell(log: Log, row: dict) -> None:
    log.train(row, 60.0) if "loss" in row else log.eval(row)


def test_every_row_is_written_immediately_as_a_json_line(config, tmp_path):
    with Log(config, 0) as log:
        for i, row in enumerate(TOLD, 1):
            tell(log, row)
            assert [json.loads(line) for line in lines(tmp_path, "metrics.jsonl")] == TOLD[:i]
            assert len(lines(tmp_path, "log.txt")) == i


@pytest.mark.parametrize("first_step", [0, 3, 5, 9])
@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', '{"step": 6}', "\0\0\0"], ids=repr)
def test_rows_after_the_resumed_step_are_deleted(config, tmp_path, first_step, torn):
    rows = [eval_row(0), *map(train_row, range(1, 6)), eval_row(5)]
    text = "".join(json.dumps(row) + "\n" for row in rows) + torn  # as when a process is killed
    (tmp_path / "metrics.jsonl").write_text(text)
    with Log(config, first_step) as log:
        log.train(train_row(first_step + 1), 1.0)
    kept = [row for row in rows if row["step"] <= first_step]
    kept += [{"step": 6}] if torn == '{"step": 6}' and first_step >= 6 else []
    found = [json.loads(line) for line in lines(tmp_path, "metrics.jsonl")]
    assert found == read_metrics(tmp_path / "metrics.jsonl") == [*kept, train_row(first_step + 1)]


def long_metrics(folder, count: int) -> None:
    """Write `count` training rows, with an evaluation after every thousandth."""
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, count + 1):
            file.write(json.dumps(train_row(step)) + "\n")
            if step % 1000 == 0:
                file.write(json.dumps(eval_row(step)) + "\n")


def test_memory_of_resuming_and_drawing_does_not_grow_with_the_rows(config, tmp_path):
    draw(tmp_path, [])  # imports packages
    peaks = []
    for count in 8_000, 24_000:
        long_metrics(tmp_path, count)
        tracemalloc.start()
        with Log(config, first_step=count) as log:
            log.eval(eval_row(count))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_sample_of_the_rows_is_whole_for_a_short_run_and_keeps_every_evaluation(tmp_path):
    file = tmp_path / "metrics.jsonl"
    long_metrics(tmp_path, 5000)
    rows = read_metrics(file)
    assert sample_metrics(file, 1_000_000) == rows
    sample = sample_metrics(file, 100)
    evals = [row for row in rows if "val_loss" in row]
    assert [row for row in sample if "val_loss" in row] == evals
    steps = [row["step"] for row in sample if "loss" in row]
    assert 50 < len(steps) <= 101
    assert steps == sorted(set(steps))
    assert max(b - a for a, b in pairwise(steps)) < 110  # at equal distances


def test_disabled_log_writes_nothing(config, tmp_path, capsys):
    with Log(config.replace(tensorboard=True), 0, enabled=False) as log:
        log.info("text")
        log.train(train_row(1), 1.0)
        log.eval(eval_row(1))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("mfu", "told"), [(None, "mfu n/a"), (0.4125, "mfu 41.2%"), (0, "0.0%")])
def test_row_is_one_plain_line_without_a_terminal(config, tmp_path, capsys, mfu, told):
    with Log(config, 0) as log:
        log.train(train_row(40, mfu=mfu, grad_norm=1e9), 83.0)
        log.train(train_row(50), 73.0)
        log.eval(eval_row(10, full_val_loss=3.25))
    out, err = capsys.readouterr()
    line, other, losses = out.splitlines()
    for part in "step 40: ", "loss 3.6000", "123,457 tokens/s", "8.1 ms", "lr 3.00e-04", told:
        assert part in line
    assert other.startswith("step 50: loss 3.5000")
    assert losses == "step 10: train loss 3.8000, val loss 4.0000, full val loss 3.2500"
    assert "\x1b" not in out
    assert not err
    assert lines(tmp_path, "log.txt") == [line, other, losses]


def test_text_is_printed_unchanged_and_appended_to_the_log(config, tmp_path, capsys):
    """Samples can hold anything: brackets that look like markup, emoji codes, long lines."""
    told = ["first", "[bold]é:[/bold] :heart: http://x.y 'z' 123 " + "long " * 100, "two\nlines"]
    for text in told:
        with Log(config, 0) as log:
            log.info(text)
    assert capsys.readouterr().out == "".join(text + "\n" for text in told)
    assert lines(tmp_path, "log.txt") == [*told[:2], "two", "lines"]


def test_control_characters_are_escaped_only_on_a_terminal():
    text = "a\x1b[2J\\ é\r\n\t\x00\x9b"
    assert escape_controls(text, on_terminal=True) == "a\\x1b[2J\\ é\\r\n\t\\x00\\x9b"
    assert escape_controls(text, on_terminal=False) == text


def on_a_terminal(monkeypatch, width: int = 80) -> io.StringIO:
    screen = io.StringIO()
    forced = partial(metrics.Terminal, file=screen, force_terminal=True, width=width)
    monkeypatch.setattr(metrics, "Terminal", forced)
    return screen


def frames(screen: io.StringIO) -> list[str]:
    """Return the drawn lines without colours and cursor movements."""
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", screen.getvalue())
    return [line for line in re.split(r"[\r\n]+", text) if line]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(("left_s", "left"), [(5, "0:05"), (83.9, "1:23"), (7384, "2:03:04")])
def test_terminal_shows_the_last_row_live_with_time_left(
    config, tmp_path, monkeypatch, width, left_s, left
):
    screen = on_a_terminal(monkeypatch, width)
    with Log(config, 0) as log:
        assert "compiling" in frames(screen)[-1]
        log.train(train_row(40), 99.0)
        log.info("something else, 42 times")
        log.train(train_row(50), left_s)
        assert len(lines(tmp_path, "log.txt")) == 3  # at once
    live = frames(screen)[-1]
    for part in "step 50", "loss 3.5000", f"{left} left":
        assert part in live
    assert len(live) <= width
    assert "something else, 42 times" in screen.getvalue()  # without colours
    assert screen.getvalue().endswith("\x1b[2K")  # taken away at the end
    first, said, last = lines(tmp_path, "log.txt")
    assert first.startswith("step 40: loss 3.6000")
    assert said == "something else, 42 times"
    assert last.startswith("step 50: loss 3.5000")
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [40, 50]


def test_dumb_terminal_gets_plain_lines(config, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    screen = on_a_terminal(monkeypatch)
    with Log(config, 0) as log:
        log.train(train_row(40), 83.0)
    assert "step 40: loss 3.6000" in screen.getvalue()


class ZMQInteractiveShell:
    """The name of a notebook's shell, which IPython makes available as `get_ipython()`."""


def page(out: str) -> list[str]:
    """Return the lines that a notebook shows: after a carriage return, text overwrites a line."""
    shown = []
    for line in out.split("\n"):
        columns: list[str] = []
        for text in line.split("\r"):
            columns[: len(text)] = text
        shown.append("".join(columns).rstrip())
    return shown


def test_notebook_shows_the_last_row_live_and_stays_short(config, tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", None)  # not needed
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    out = ""
    with Log(config, 0) as log:
        for step in range(1, 5001):
            clock[0] += 0.01
            log.train(train_row(step), 83.0)
            if step % 1000 == 0:
                out += capsys.readouterr().out
                assert re.fullmatch(r"1:23 left, step \d+: loss .*", page(out)[-1])
                assert step - int(page(out)[-1].split()[3][:-1]) < 100
                log.eval(eval_row(step))
    out += capsys.readouterr().out
    losses = [f"step {step}: train loss" for step in range(1000, 5001, 1000)]
    assert [line[: len(said)] for line, said in zip(page(out), losses, strict=False)] == losses
    assert page(out)[5:] == [""]
    assert out.count("\r") < 120
    assert len(lines(tmp_path, "log.txt")) == 5005


def draw(folder, rows: list[dict]) -> bytes:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw_losses(folder)
    return (folder / "loss.png").read_bytes()


ROWS = {
    "none": [],
    "train": [train_row(step) for step in range(1, 9)],
    "eval": [eval_row(step) for step in range(0, 9, 4)],
    "one": [eval_row(0)],
    "full": [eval_row(0, full_val_loss=4.0)],
}


@pytest.mark.parametrize("kind", ROWS)
def test_loss_plot_is_a_valid_png_for_any_rows(tmp_path, monkeypatch, kind):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # which would look for a display
    folder = tmp_path / r"5$ \frac 5$"  # a name that looks like mathematics
    folder.mkdir()
    png = draw(folder, ROWS[kind])
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert png[12:16] == b"IHDR"
    width, height = struct.unpack(">II", png[16:24])
    assert imread(folder / "loss.png").shape[:2] == (height, width)
    assert {path.name for path in folder.iterdir()} == {"metrics.jsonl", "loss.png"}


@pytest.mark.parametrize("key", ["loss", "train_loss", "val_loss"])
def test_loss_plot_depends_on_every_kind_of_loss(tmp_path, key):
    rows = ROWS["train"] + ROWS["eval"]
    picture = draw(tmp_path, rows)
    assert draw(tmp_path, rows) == picture
    others = [row | {key: row[key] + 0.2} if key in row else row for row in rows[:-1]]
    assert draw(tmp_path, [*others, rows[-1]]) != picture  # whose title's best is the same


def test_redrawing_leaves_no_figure_for_the_garbage_collector(tmp_path):
    figures = lambda: [id(thing) for thing in gc.get_objects() if isinstance(thing, Figure)]
    draw(tmp_path, ROWS["train"])
    gc.collect()
    before = figures()
    gc.disable()
    draw(tmp_path, ROWS["train"])
    after = figures()
    gc.enable()
    assert after == before


def test_evaluation_redraws_the_loss_plot(config, tmp_path):
    with Log(config, 0) as log:
        log.train(train_row(1), 1.0)
        assert not (tmp_path / "loss.png").exists()
        log.eval(eval_row(1))
        first = (tmp_path / "loss.png").read_bytes()
        log.eval(eval_row(2))
    assert (tmp_path / "loss.png").read_bytes() != first


def test_run_continues_if_its_loss_plot_cannot_be_written(config, tmp_path):
    (tmp_path / "loss.png").mkdir()
    with Log(config, 0) as log:
        log.eval(eval_row(1))
    assert lines(tmp_path, "log.txt")[-1] == "loss.png: not drawn (is a folder)"
    assert len(lines(tmp_path, "metrics.jsonl")) == 1


def read_events(folder) -> list[Event]:
    """Return the events of all TensorBoard files in a folder (length, CRC, bytes, CRC each)."""
    events = []
    for file in sorted(folder.iterdir(), key=lambda path: path.name):
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return events


def test_tensorboard_holds_every_number_at_the_right_step(config, tmp_path):
    with Log(config.replace(tensorboard=True), 0) as log:
        for row in TOLD:
            tell(log, row)
    events = read_events(tmp_path / "tensorboard")
    found = {(e.step, v.tag): v.simple_value for e in events for v in e.summary.value}
    numbers = {(row["step"], key): value for row in TOLD for key, value in row.items()
               if key not in ("step", "time") and value is not None}  # fmt: skip
    assert found == pytest.approx(numbers)


@pytest.mark.parametrize("first_step", [0, 20])
def test_tensorboard_session_starts_after_the_resumed_step(config, tmp_path, first_step):
    with Log(config.replace(tensorboard=True), first_step):
        pass
    events = read_events(tmp_path / "tensorboard")
    starts = [event.step for event in events if event.session_log.status == SessionLog.START]
    assert starts == [first_step + 1]


class FakeWandb(ModuleType):
    """A stand-in for the wandb package that records all calls."""

    Error = RuntimeError

    def __init__(self):
        super().__init__("wandb")
        self.told, self.finished = [], False

    def init(self, **options):
        self.options = options
        return self

    def log(self, row, step):
        self.told.append((step, row))

    def finish(self):
        self.finished = True


@pytest.mark.parametrize("name", ["", "a name"])
def test_weights_and_biases_gets_the_config_and_every_row(config, tmp_path, monkeypatch, name):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = config.replace(wandb_log=True, wandb_project="plays", wandb_run_name=name)
    with Log(config, 0) as log:
        for row in TOLD:
            tell(log, row)
        assert not wandb.finished
    keys = {"project": "plays", "name": name or tmp_path.name, "dir": str(tmp_path)}
    keys["config"] = config.to_dict()
    assert {key: wandb.options[key] for key in keys} == keys
    known = [{key: value for key, value in row.items() if value is not None} for row in TOLD]
    assert wandb.told == [(row["step"], row) for row in known]
    assert wandb.finished


def test_weights_and_biases_without_a_login_is_one_line(config, monkeypatch):
    wandb = FakeWandb()
    wandb.init = Mock(side_effect=wandb.Error("api_key not configured"))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    message = refusal(Log, config.replace(wandb_log=True), 0)
    assert message.startswith("wandb_log=True: api_key not configured; expected a login; try wandb")


def test_character_that_stdout_lacks_does_not_end_a_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with Log(config, 0) as log:
        log.info("Où est-il?")
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "Où est-il?\n"


def test_missing_tracker_package_is_an_error_only_if_enabled(config, monkeypatch):
    for key, package in ("tensorboard", "tensorboardX"), ("wandb_log", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
        message = refusal(Log, config.replace(**{key: True}), 0)
        assert message == f"{key}=True: needs {package}; try pip install 'jaxgpt[log]'"
    with Log(config, 0) as log:
        log.eval(eval_row(0))
