"""Test fetching shards from a local stand-in for the hub: kills, wrong files, adding shards."""

import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pytest
import tokenizers as library
from helpers import CHILD_ENV, log_of, read_files, refusal, tiny_run
from test_tokens import write_shard

from jaxgpt.data import tokenizer as tokenizers
from jaxgpt.data.prepare import find_dataset, prepare
from jaxgpt.data.shards import DOWNLOADS, SHARD_SETS
from jaxgpt.data.tokenizer import END_OF_TEXT, BpeTokenizer
from jaxgpt.data.tokens import open_dataset
from jaxgpt.runtime.run_dir import load_config
from jaxgpt.train import train

HERE = "127.0.0.1"
SET = SHARD_SETS["fineweb10B"]
REPO = f"datasets/{SET.repo}"
VAL, TRAIN_1, TRAIN_2 = SET.val, SET.train.format(1), SET.train.format(2)
EOT = 50_256


class Hub(ThreadingHTTPServer):
    """A hub with one dataset.

    `sent` are its files, and `listed` the files whose checksums it names. `downloads` records each
    download as (name, first byte). The first download of the file `breaks` stops after half of the
    file; the connection ends when `may_end` is set.
    """

    def __init__(self, files: dict[str, bytes]):
        super().__init__((HERE, 0), Handler)
        self.url = f"http://{HERE}:{self.server_port}"
        self.sent, self.listed = dict(files), dict(files)
        self.downloads: list[tuple[str, int]] = []
        self.breaks, self.may_end = "", threading.Event()
        self.may_end.set()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self):
        """List the size and the SHA-256 of files."""
        assert self.path == f"/api/{REPO}/paths-info/{SET.revision}"
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        answer = [
            {"type": "file", "path": name, "size": len(content), "oid": "0" * 40, "lfs": {
                "oid": sha256(content), "size": len(content), "pointerSize": 134,
            }}
            for name, content in self.server.listed.items() if name in form["paths"]
        ]  # fmt: skip
        self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        *folder, name = self.path.split("/")
        content = self.server.sent.get(name)
        if "/".join(folder) != f"/{REPO}/resolve/{SET.revision}" or content is None:
            self.answer(404)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(wanted[1]) if wanted else 0
        headers = {"X-Repo-Commit": SET.revision, "ETag": f'"{sha256(self.server.listed[name])}"'}
        if self.command == "GET":
            self.server.downloads.append((name, first))
        if self.command == "HEAD" or name != self.server.breaks:
            self.answer(206 if wanted else 200, content[first:], headers)
            return
        self.server.breaks = ""
        headers["Content-Length"] = str(len(content))
        self.answer(200, content[: len(content) // 2], headers)
        self.server.may_end.wait(60)

    def answer(self, code: int, content: bytes = b"", headers: dict[str, str] | None = None):
        self.send_response(code)
        for key, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
            self.wfile.flush()

    def log_message(self, *args):
        pass


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, np.ndarray]:
    """Return the ids of the hub's files: documents of 1 to 40 ids, each after an end-of-text."""
    rng, ids = np.random.default_rng(0), {}
    for name in VAL, TRAIN_1, TRAIN_2:
        ids[name] = rng.integers(0, EOT, 3000)
        ids[name][np.cumsum(rng.integers(1, 40, 70))] = EOT
    return ids


@pytest.fixture
def hub(shards, tmp_path, monkeypatch):
    from huggingface_hub import constants

    file = tmp_path / "shard"
    files = {name: write_shard(file, ids).read_bytes() for name, ids in shards.items()}
    with Hub(files) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        threading.Thread(target=hub.serve_forever, args=(0.02,)).start()
        yield hub
        hub.shutdown()


@pytest.fixture(autouse=True)
def tiny_gpt2(monkeypatch):
    """Replace GPT-2's tokenizer, whose files a machine may not have, by one of two tokens."""
    bpe = library.Tokenizer(library.models.BPE({"a": 0}, []))
    bpe.add_special_tokens([END_OF_TEXT])
    monkeypatch.setattr(tokenizers, "gpt2", lambda data_dir: BpeTokenizer(bpe, "gpt2"))


def assert_holds(folder: Path, shards: dict[str, np.ndarray], *train: str) -> None:
    """Assert that the dataset has these training shards, with checksums, and no other files."""
    dataset = open_dataset(folder, folder, 8)
    expected = {"train": np.concatenate([shards[name] for name in train]), "val": shards[VAL]}
    for split, ids in expected.items():
        tokens = getattr(dataset, split)
        np.testing.assert_array_equal(tokens.read(0, len(tokens)), ids)
    assert (dataset.vocab_size, dataset.tokenizer.kind) == (50_257, "gpt2")
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["source"] == f"{SET.repo}, revision {SET.revision}"
    names = {"train": list(train), "val": [VAL]}
    assert meta["sha256"] == {
        split: {name: sha256((folder / name).read_bytes()) for name in names[split]}
        for split in names
    }
    assert {path.name for path in folder.iterdir()} == {*train, VAL, "meta.json", "tokenizer.json"}


def test_further_shards_are_added_and_fewer_delete_none(hub, shards, tmp_path):
    folder = prepare("fineweb10B", str(tmp_path), shards=1)
    assert folder == tmp_path / "fineweb10B"
    assert_holds(folder, shards, TRAIN_1)
    assert sorted(hub.downloads) == [(TRAIN_1, 0), (VAL, 0)]
    prepare("fineweb10B", str(tmp_path), "gpt2", shards=2)
    assert_holds(folder, shards, TRAIN_1, TRAIN_2)
    assert hub.downloads[2:] == [(TRAIN_2, 0)]
    files = read_files(folder)
    hub.listed, hub.sent = {}, {}  # not needed if all files are there
    prepare("fineweb10B", str(tmp_path), shards=1)
    assert read_files(folder) == files


def test_all_shards_are_fetched_by_default(hub, shards, tmp_path, monkeypatch):
    monkeypatch.setitem(SHARD_SETS, "fineweb10B", SET._replace(shards=2))
    assert_holds(prepare("fineweb10B", str(tmp_path)), shards, TRAIN_1, TRAIN_2)


def test_broken_connection_continues_after_the_chunks_that_arrived(
    hub, shards, tmp_path, monkeypatch
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    hub.breaks = TRAIN_1
    assert_holds(prepare("fineweb10B", str(tmp_path), shards=1), shards, TRAIN_1)
    half = len(hub.sent[TRAIN_1]) // 2
    assert hub.downloads == [(TRAIN_1, 0), (TRAIN_1, half // 500 * 500), (VAL, 0)]


COMMAND = """
import sys
from jaxgpt.data import tokenizer
file = sys.argv.pop(1)
tokenizer.gpt2 = lambda data_dir: tokenizer.load(file, "gpt2")
from jaxgpt.cli.commands import main
main()
"""


def command(hub: Hub, data_dir: Path, *flags: str) -> subprocess.Popen:
    """Start `jaxgpt prepare fineweb10B` in another process, with HF_ENDPOINT."""
    file = data_dir / "tokenizer.json"
    file.write_text(tokenizers.gpt2(data_dir).to_json())
    argv = ["prepare", "fineweb10B", f"--data_dir={data_dir}", *flags]
    env = CHILD_ENV | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", COMMAND, file, *argv], env=env, **pipes)


def test_killed_download_is_repeated_and_complete_files_are_kept(hub, shards, tmp_path):
    """The process is killed while the validation shard, the second file, arrives."""
    folder = tmp_path / "fineweb10B"
    hub.breaks = VAL
    hub.may_end.clear()
    with command(hub, tmp_path, "--shards=1") as process:
        deadline = time.monotonic() + 120
        while (VAL, 0) not in hub.downloads:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    hub.may_end.set()
    assert {path.name for path in folder.iterdir()} == {TRAIN_1, DOWNLOADS}
    assert "preparation was interrupted" in refusal(open_dataset, folder, tmp_path, 8)
    with command(hub, tmp_path, "--shards=1") as process:
        out, _ = process.communicate()
    assert process.returncode == 0
    assert out.endswith(f"{folder}\n")
    assert_holds(folder, shards, TRAIN_1)
    assert [name for name, _ in hub.downloads] == [TRAIN_1, VAL, VAL]


def test_file_with_another_checksum_is_rejected_and_not_kept(hub, shards, tmp_path):
    good = hub.sent[TRAIN_1]
    hub.sent[TRAIN_1] = bad = good[:-2] + b"\0\0"
    with command(hub, tmp_path, "--shards=1") as process:
        _, error = process.communicate()
    folder = tmp_path / "fineweb10B"
    said = f"downloaded SHA-256 {sha256(bad)}; expected {sha256(good)}; try the same command again"
    assert error.startswith(f"error: {folder / TRAIN_1}: {said}")
    assert (error.count("\n"), process.returncode) == (1, 2)
    assert not (folder / TRAIN_1).exists()
    hub.sent[TRAIN_1] = good
    assert_holds(prepare("fineweb10B", str(tmp_path), shards=1), shards, TRAIN_1)


@pytest.mark.parametrize("prepared", [True, False])
def test_files_that_are_there_are_verified_and_only_damaged_ones_fetched(
    hub, shards, tmp_path, prepared
):
    """Without meta.json, the files may come from modded-nanogpt's script, whose names they have."""
    folder = tmp_path / "fineweb10B"
    if prepared:
        prepare("fineweb10B", str(tmp_path), shards=2)
        hub.downloads.clear()
    else:
        folder.mkdir()
        for name, content in hub.sent.items():
            (folder / name).write_bytes(content)
    (folder / TRAIN_1).write_bytes(hub.sent[TRAIN_1][:-2] + b"\0\0")
    (folder / VAL).write_bytes(hub.sent[VAL][:-2])
    prepare("fineweb10B", str(tmp_path), shards=2)
    assert_holds(folder, shards, TRAIN_1, TRAIN_2)
    assert sorted(name for name, _ in hub.downloads) == [TRAIN_1, VAL]


def test_unavailable_hub_or_file_is_named_and_the_dataset_stays_usable(hub, shards, tmp_path):
    folder = prepare("fineweb10B", str(tmp_path), shards=1)
    message = refusal(prepare, "fineweb10B", str(tmp_path), shards=3)
    assert message.startswith(f"fineweb10B: the hub has no checksum of {SET.train.format(3)};")
    del hub.sent[TRAIN_2]
    assert_holds(folder, shards, TRAIN_1)
    message = refusal(prepare, "fineweb10B", str(tmp_path), shards=2)
    assert re.search(rf"{TRAIN_2}: could not be downloaded \(\w+\); expected {SET.repo}", message)
    prepare("fineweb10B", str(tmp_path), shards=1)  # without the shard that cannot be had
    assert_holds(folder, shards, TRAIN_1)


@pytest.mark.parametrize(
    ("argv", "options", "said"),
    [
        (("fineweb10B",), {"shards": 104}, "shards=104: fineweb10B has 103; expected at most 103"),
        (("fineweb10B",), {"shard": "0/2"}, "shard='0/2': applies to documents, and fineweb10B is"),
        (("fineweb10B",), {"val_share": 0.1}, "val_share=0.1: applies to documents, and fineweb"),
        (("fineweb10B", "data", "char"), {}, "tokenizer='char': fineweb10B is already tokenized"),
        (("openwebtext",), {"shards": 2}, "shards=2: applies to fineweb10B, which is downloaded in "
         "shards; try without --shards, or --shard=i/n to divide documents among machines"),
        (("poems.txt",), {"shards": 2}, "shards=2: applies to fineweb10B"),
    ],
)  # fmt: skip
def test_options_of_another_kind_of_dataset_are_rejected(argv, options, said):
    assert refusal(prepare, *argv, **options).startswith(said)


def test_folder_of_another_dataset_is_rejected_and_unchanged(hub, tmp_path):
    (tmp_path / "fineweb10B.txt").write_text("not FineWeb\n" * 30)
    folder = prepare(str(tmp_path / "fineweb10B.txt"), str(tmp_path))
    files = read_files(folder)
    assert "holds another dataset" in refusal(prepare, "fineweb10B", str(tmp_path), shards=1)
    (folder / "meta.json").write_text("[")
    assert "holds another dataset" in refusal(prepare, "fineweb10B", str(tmp_path), shards=1)
    assert read_files(folder).keys() == files.keys()


def test_training_on_a_missing_shard_set_says_how_to_prepare_it(tmp_path):
    config = tiny_run(tmp_path, tmp_path, dataset="fineweb10B")
    assert refusal(find_dataset, config, 8).endswith("; try jaxgpt prepare fineweb10B")


@pytest.mark.slow
def test_training_reads_the_shards_with_gpt2_vocabulary(hub, tmp_path):
    data_dir = prepare("fineweb10B", str(tmp_path), shards=2).parent
    keys = {"dataset": "fineweb10B", "align_documents": True, "eot_id": EOT, "max_iters": 2}
    config = tiny_run(tmp_path / "run", data_dir, **keys)
    assert train(config) == 0
    assert load_config(config.out_dir).vocab_size == 50_257
    assert "6,000 train and 3,000 val tokens, vocabulary 50257" in log_of(config)
