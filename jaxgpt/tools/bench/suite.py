"""`jaxgpt bench --suite=gpu`: measure rows one by one, each written to a file once it is measured.

The command starts one child process for each environment that rows need, because XLA's flags hold
for a whole process and a process gives no device memory back. It never starts JAX itself.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from jaxgpt.config import UserError
from jaxgpt.runtime import device
from jaxgpt.runtime.files import atomic_write
from jaxgpt.tools.bench.command import check_folders
from jaxgpt.tools.bench.options import BenchArgs
from jaxgpt.tools.bench.report import describe_machine
from jaxgpt.tools.bench.suite_rows import FULL, ROWS, SHARED, TOY, Row, Suite

FILE = "bench-gpu.json"
SPENT = "not started, because the budget is spent"
DID_NOT_END = "the process ended while it measured this row"


def select(names: str, with_nanogpt: bool) -> list[Row]:
    """Return the rows with these names, or whose names begin so. Raises `UserError`."""
    rows = [row for row in ROWS if with_nanogpt or row.env is not SHARED]
    known = [row.name for row in rows]
    wanted = set()
    for name in filter(None, names.split(",")):
        found = {name} & {*known} or {other for other in known if other.startswith(name)}
        if not found:
            more = "" if with_nanogpt else "; try --compare_to for rows with nanoGPT"
            expected = f"expected some of {', '.join(known)}, or beginnings of these"
            raise UserError(f"rows={name!r}: unknown row; {expected}{more}")
        wanted |= found
    return [row for row in rows if row.name in wanted or not wanted]


def run_suite(args: BenchArgs) -> None:
    """Measure the rows that the flags ask for, and print a table of them. Raises `UserError`.

    Rows that the file has from this commit, device and these versions are not measured again. A
    row that fails, or whose process ends, is recorded with its error, and the others follow.
    """
    check_folders(args)
    if args.preset or args.config:
        raise UserError("suite='gpu': has its own configs; try without --preset and --config")
    rows = select(args.rows, bool(args.compare_to))
    file, deadline = Path(args.json or FILE), time.time() + (args.budget_s or 1e9)
    read_rows(file)
    settings = {"file": str(file), "deadline": deadline, "compare_to": args.compare_to}
    settings |= {"torch_python": args.torch_python or sys.executable, "repeats": args.repeats}
    settings["modes"] = ["eager", "compiled"] if args.compile == "both" else [args.compile]
    for env in {json.dumps(row.env): row.env for row in rows}.values():
        names = [row.name for row in rows if row.env == env]
        while names and time.time() < deadline:
            names = run_child(file, names, settings, env)
    found = read_rows(file)
    print(format_table({row.name: found.get(row.name) for row in rows}))


def run_child(file: Path, names: list[str], settings: dict, env: dict[str, str]) -> list[str]:
    """Measure rows in a process with these variables; return the rows after one that ended it."""
    flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), env.get("XLA_FLAGS"))))
    variables = env | os.environ | ({"XLA_FLAGS": flags} if flags else {})
    command = [sys.executable, "-m", __spec__.name, json.dumps(settings | {"rows": names})]
    began = time.time()
    code = subprocess.run(command, env=variables).returncode
    if code == 0:
        return []
    tried = [name for name in names if read_rows(file).get(name, {}).get("time", 0) >= began]
    if not tried:
        problem = f"its process ended with code {code} before it measured {names[0]}"
        raise UserError(f"suite='gpu': {problem}; expected a device that JAX can use")
    return names[names.index(tried[-1]) + 1 :]


def main(settings: dict[str, Any]) -> None:
    """Measure the rows that `run_child` names, in this process."""
    device.start()
    jax.config.update("jax_enable_compilation_cache", False)  # compile times are of a first run
    sizes = TOY if device.is_cpu() else replace(FULL, repeats=settings["repeats"])
    if sizes is TOY:
        print("JAX computes on a CPU, so the rows have toy sizes", flush=True)
    file, rows = Path(settings["file"]), [row for row in ROWS if row.name in settings["rows"]]
    keys = {key: settings[key] for key in ("compare_to", "torch_python", "modes")}
    with TemporaryDirectory() as folder:
        measure_rows(Suite(sizes, Path(folder), file, **keys), rows, settings["deadline"])


def measure_rows(suite: Suite, rows: list[Row], deadline: float) -> None:
    """Measure rows, write each to the file and print its line; skip those that the file has."""
    machine = describe_machine()
    facts = {"device": machine["hardware"]["device"], "commit": machine["commit"]}
    facts |= {"versions": machine["versions"], "toy": suite.sizes.gpt2 != FULL.gpt2}
    for row in rows:
        found = read_rows(suite.file).get(row.name, {"error": "missing"})
        if "error" not in found and all(found[key] == facts[key] for key in facts):
            print(f"{row.name}: measured before", flush=True)
        elif time.time() > deadline:
            print(f"{row.name}: {SPENT}", flush=True)
        else:
            entry = facts | {"what": row.what, "time": time.time()}
            write_row(suite.file, row.name, entry | {"error": DID_NOT_END})  # if a crash ends it
            entry |= measure(suite, row)
            write_row(suite.file, row.name, entry)
            print(f"{row.name}: {describe(entry)}", flush=True)


def measure(suite: Suite, row: Row) -> dict[str, Any]:
    """Return a row's values and details, or its error in one line, and its seconds."""
    began = time.time()
    try:
        values, details = row.measure(suite)
        found = {"values": values, "details": details}
    except Exception as error:  # drivers, libraries and compilers raise many types
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        found = {"error": (kind + str(error)).strip().splitlines()[0][:300]}
    if "error" in found:
        suite.free()  # here, because no frame of the failed row holds arrays any more
    return found | {"seconds": time.time() - began}


def read_rows(file: Path) -> dict[str, Any]:
    """Return the file's rows by name. Raises `UserError` if it is another file."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = "expected a file that --suite wrote, or none; try another --json"
        raise UserError(f"{file}: cannot be read ({error}); {expected}") from error


def write_row(file: Path, name: str, entry: dict[str, Any]) -> None:
    rows = read_rows(file) | {name: entry}
    atomic_write(file, json.dumps({"rows": rows}, indent=1) + "\n")


def describe(entry: dict[str, Any]) -> str:
    if "error" in entry:
        return f"failed: {entry['error']}"
    return ", ".join(f"{format_value(value)} {unit}" for unit, value in entry["values"].items())


def format_value(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_table(rows: dict[str, dict[str, Any] | None]) -> str:
    """Return a Markdown table with a line for each value of each row."""
    lines = ["", "| Row | What | Value | Unit | Hardware | Commit |", "|---|---|---|---|---|---|"]
    for name, entry in rows.items():
        found = entry or {"what": "", "error": "not measured", "device": "", "commit": ""}
        hardware = found["device"] + (", toy size" if found.get("toy") else "")
        commit, dirty, _ = (found["commit"] or "").partition("-dirty")
        values = found.get("values") or {found["error"].replace("|", "/"): "failed"}
        for unit, value in values.items():
            shown = value if isinstance(value, str) else format_value(value)
            cells = (f"`{name}`", found["what"], shown, unit, hardware, commit[:7] + dirty)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
