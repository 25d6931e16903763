"""Test the report: what the page says about a run and its model, and how a browser shows it."""

import base64
import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from helpers import make_data, refusal, tiny_run, write_config

import jaxgpt
from jaxgpt.cli import commands
from jaxgpt.config import Config
from jaxgpt.runtime.files import atomic_write
from jaxgpt.tools import report

# The text holds what could end a script or begin a tag.
TEXT = '</script><b>&amp; "tale\'s" end</b>\nonce more, and so on and on ' * 20


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), TEXT)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> jaxgpt.Run:
    """Return a trained run, which has written its report."""
    return jaxgpt.train(tiny_run(tmp_path_factory.mktemp("report") / "run", data, report=True))


@pytest.fixture(scope="module")
def page(run) -> str:
    return Path(run.source, "report.html").read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    (text,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)
    return json.loads(text)


def without_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.S)


@pytest.mark.slow
def test_page_is_small_and_loads_nothing(page):
    assert len(page.encode()) < 3_000_000
    assert not re.findall(r"<(?:link|img|iframe)|\bsrc=|@import|url\(", without_scripts(page))


def test_text_of_the_dataset_cannot_become_markup(run, page):
    """The passage is the text in spans; without them it has no further tag."""
    body = without_scripts(page)
    assert "<b>" not in body
    (passage,) = re.findall(r'<pre class="passage">(.*?)</pre>', body, re.S)
    span = r'<span tabindex="0" style="--loss:[\d.]+" data-tip="[^"<>]*">|</span>'
    text = re.sub(span, "", passage)
    assert "<" not in text
    ids_T, _ = report.passage_tokens(run)
    shown = unescape(text)  # one character per token
    assert "<b>" in shown
    assert shown == run.tokenizer.decode(ids_T[: len(shown)])


def test_charts_have_the_numbers_of_the_metrics(run, page):
    charts = data_of(page)["charts"]
    assert len(charts) == len(report.CURVES)
    for chart, fields in zip(charts, report.CURVES.values(), strict=True):
        for field, name in fields.items():
            points = [p for p in chart["data"]["values"] if p["name"] == name]
            rows = [row for row in run.metrics if field in row]
            assert [(p["step"], p["value"]) for p in points] == [
                (r["step"], r[field]) for r in rows
            ]


def test_long_curves_are_thinned_and_keep_their_ends():
    rows = [{"step": step, "loss": float(step)} for step in range(10 * report.POINTS + 1)]
    thinned = report.thin(rows, "loss")
    assert len(thinned) == report.POINTS
    assert (thinned[0], thinned[-1]) == (rows[0], rows[-1])


def test_page_shows_the_attention_weights_of_the_run(run, page):
    shown = data_of(page)["attention"]
    ids = report.passage_tokens(run)[0][: len(shown["tokens"])]
    weights = run.attention(ids)
    levels = np.frombuffer(base64.b64decode(shown["levels"]), np.uint8)
    assert (shown["layers"], shown["heads"]) == weights.shape[:2]
    np.testing.assert_allclose(levels.reshape(weights.shape) / 255, weights, atol=0.5 / 255 + 1e-6)


def test_losses_of_the_passage_are_those_of_windows_with_half_a_context(run):
    ids, _ = report.passage_tokens(run)
    logits = report.next_logits(run, ids)
    block = run.config.block_size
    for t in range(len(logits)):
        start = 0 if t < block else (t // (block // 2) - 1) * (block // 2)
        alone = run.logits(ids[start : start + block])[t - start]
        np.testing.assert_allclose(logits[t], alone, rtol=1e-5, atol=1e-5)


def test_passage_names_each_tokens_loss_and_the_most_likely_tokens(run, page):
    ids, _ = report.passage_tokens(run)
    tips = re.findall(r'data-tip="(.*?)">', page, re.S)
    losses = run.loss(ids[: run.config.block_size])[1:]
    shown = [float(re.search(r"loss ([\d.]+)", tip)[1]) for tip in tips]
    np.testing.assert_allclose(shown[: len(losses)], losses, atol=0.006)
    best = jax.nn.softmax(run.logits(ids[:1]))[0].max()
    assert f"  {best:.1%}" in tips[0].splitlines()[2]


def test_config_table_has_exactly_the_keys_that_differ_from_their_defaults():
    run: Any = SimpleNamespace(source="run", config=Config(n_layer=3, seed=7, dropout=0.1))
    table = report.config_table([run])
    assert re.findall(r"<tr[^>]*><th>(\w+)</th>", table) == ["n_layer", "dropout", "seed"]


@pytest.mark.slow
def test_several_runs_are_compared_and_rows_that_differ_are_bold(run, data, tmp_path, capsys):
    other = jaxgpt.train(tiny_run(tmp_path / "other", data, seed=7, max_iters=8))
    commands.report([run.source, other.source, f"--to={tmp_path / 'both.html'}"])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "both.html")
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    names = {point["name"] for point in data_of(page)["charts"][0]["data"]["values"]}
    assert names >= {f"{run.source}: batch", f"{other.source}: batch"}
    bold = re.findall(r'<tr class="differs"><th>(.*?)</th>', page)
    assert {"seed", "steps", "tokens"} <= set(bold)
    assert "dataset" not in bold


@pytest.mark.slow
def test_train_command_writes_the_report_of_its_run(data, tmp_path, capsys):
    config = tiny_run(tmp_path / "run", data, max_iters=8)
    file = write_config(tmp_path / "tiny.py", config.to_dict())
    assert commands.train([f"--config={file}", "--report=True"]) == 0
    path = tmp_path / "run/report.html"
    assert capsys.readouterr().out.splitlines()[-1] == str(path)
    assert "step 8" in path.read_text(encoding="utf-8")


def test_run_that_takes_no_step_has_no_report(data, tmp_path):
    config = tiny_run(tmp_path / "run", data, max_iters=0, eval_iters=1, report=True)
    assert jaxgpt.train(config).source == config.out_dir
    assert commands.train([write_config(tmp_path / "none.py", config.to_dict())]) == 0
    assert not (tmp_path / "run/report.html").exists()


@pytest.mark.slow
def test_a_run_whose_dataset_is_missing_shows_a_sample(run, data, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run.source, moved)
    config = json.loads((moved / "config.json").read_text())
    atomic_write(moved / "config.json", json.dumps(config | {"data_dir": str(tmp_path / "no")}))
    page = jaxgpt.load(moved).report().read_text(encoding="utf-8")
    assert "a sample of the model, because its dataset is not on this machine" in page


@pytest.mark.parametrize(
    ("key", "module", "extra"),
    [
        ("report", "altair", "report"),
        ("report", "vl_convert", "report"),
        ("tensorboard", "tensorboardX", "log"),
        ("wandb_log", "wandb", "log"),
    ],
)
def test_a_run_without_a_package_that_it_needs_later_does_not_start(
    key, module, extra, data, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    message = refusal(jaxgpt.train, tiny_run(tmp_path / "run", data, **{key: True}))
    assert message == f"{key}=True: needs {module}; try pip install 'jaxgpt[{extra}]'"
    assert not list((tmp_path / "run").glob("*.json*"))


@pytest.mark.slow
def test_page_of_a_task_and_of_a_text_without_line_breaks(tmp_path):
    """Their tokenizers have no line break with which a sample could start."""
    make_data(tmp_path, TEXT.replace("\n", " "), "line")
    for dataset, length in ("adder", 9), ("line", 8):
        keys = {"dataset": dataset, "digits": 2, "block_size": length, "max_iters": 2}
        run = jaxgpt.train(tiny_run(tmp_path / f"run_{dataset}", tmp_path, **keys))
        assert "temperature 0.5" in run.report().read_text(encoding="utf-8")


def test_a_dataset_of_another_tokenizer_is_refused(run, data, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(run.source, moved)
    make_data(tmp_path, TEXT, tokenizer="byte")
    config = json.loads((moved / "config.json").read_text())
    atomic_write(moved / "config.json", json.dumps(config | {"data_dir": str(tmp_path)}))
    assert "its tokenizer is not the one in" in refusal(jaxgpt.load(moved).report)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        ([], "report: no run"),
        (["nowhere"], "nowhere: no such run or weights"),
        (["RUN", "--prompt=§"], "no token for '§'"),
        (["RUN", "--prompt=" + "a" * 9], "text: has 9 tokens"),
        (["RUN", "--to=no/folder.html"], "no/folder.html: there is no folder no; try mkdir -p no"),
        (["RUN", "--to=."], ".: is a folder; expected a file to write"),
    ],
)
def test_mistakes_are_refused_and_leave_the_report_alone(argv, problem, run, page):
    assert problem in refusal(commands.report, [run.source if a == "RUN" else a for a in argv])
    assert Path(run.source, "report.html").read_text(encoding="utf-8") == page


ACTIONS = """
<script>
setTimeout(() => {
  const token = document.querySelector(".passage span");
  token.dispatchEvent(new PointerEvent("pointerover", {bubbles: true}));
  document.body.dataset.shown = document.getElementById("tip").textContent;
  const canvas = document.querySelector("canvas");
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  document.body.dataset.first = pixels.slice(0, 3).join();
  document.body.dataset.wide = document.documentElement.scrollWidth;
}, 500);
</script>
"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_draws_the_page_and_shows_alternatives(width, page, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(page + ACTIONS, encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--virtual-time-budget=5000", f"--window-size={width},900"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path}", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in done.stderr
    body = without_scripts(done.stdout)
    assert body.count('class="marks"') == len(report.CURVES)
    assert re.search(r'data-shown=".*?loss [\d.]+\nmost likely:\n', body[body.index("<body") :])
    assert re.search(r'data-first="0,55,155"', body)  # the first token attends to itself only
    assert int(re.search(r'data-wide="(\d+)"', body)[1]) <= max(width, 500)
