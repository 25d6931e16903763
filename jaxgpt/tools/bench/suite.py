"""`jaxgpt bench --suite=gpu`: measure rows one by one, each written to a file once it is measured.

The command starts one child process for each environment that rows need, because XLA's flags hold
for a whole process and a process gives no device memory back. It never starts JAX itself.
"""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from jaxgpt.config import UserError
from jaxgpt.runtime import device
from jaxgpt.runtime.files import atomic_write, reason
from jaxgpt.tools.bench.command import check_flags, check_folders
from jaxgpt.tools.bench.options import BenchArgs
from jaxgpt.tools.bench.report import describe_machine
from jaxgpt.tools.bench.suite_rows import FULL, ROWS, SHARED, TOY, Row, Suite
from jaxgpt.tools.bench.torch_server import exit_with_parent

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

    Rows that the file has from this commit, device, these versions and settings are not measured
    again. A row that fails, or whose process ends, is recorded with its error, and the others
    follow.
    """
    check_flags(args)
    check_folders(args)
    rows = select(args.rows, bool(args.compare_to))
    file, deadline = Path(args.json or FILE), time.time() + (args.budget_s or 1e9)
    read_results(file)
    settings = {"file": str(file), "deadline": deadline, "compare_to": args.compare_to}
    settings |= {"torch_python": args.torch_python or sys.executable, "repeats": args.repeats}
    settings["modes"] = ["eager", "compiled"] if args.compile == "both" else [args.compile]
    settings["xla_flags"] = os.environ.get("XLA_FLAGS", "")
    machine = None  # known once a child process has run
    environments = {json.dumps(row.env): row.env for row in rows}  # each one once
    for env in environments.values():
        names = [row.name for row in rows if row.env == env]
        names = [name for name in names if not (machine and is_measured(file, name, machine))]
        while names and time.time() < deadline:
            names = run_child(file, names, settings, env)
        machine = read_results(file)["machine"]
    found = read_results(file)["rows"]
    print(format_table({row.name: found.get(row.name) for row in rows}))


def run_child(file: Path, names: list[str], settings: dict, env: dict[str, str]) -> list[str]:
    """Measure rows in a process with these variables; return the rows after one that ended it."""
    flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), env.get("XLA_FLAGS"))))
    variables = os.environ | env | ({"XLA_FLAGS": flags} if flags else {})
    command = [sys.executable, "-m", __spec__.name, json.dumps(settings | {"rows": names})]
    began = time.time()
    code = subprocess.run(command, env=variables).returncode
    if code == 0:
        return []
    found = read_results(file)["rows"]
    tried = [name for name in names if found.get(name, {}).get("time", 0) >= began]
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
        print("JAX computes on a CPU, so the rows have toy sizes and two repeats", flush=True)
    file, rows = Path(settings["file"]), [row for row in ROWS if row.name in settings["rows"]]
    keys = {key: settings[key] for key in ("compare_to", "torch_python", "modes", "xla_flags")}
    with TemporaryDirectory() as folder:
        measure_rows(Suite(sizes, Path(folder), file, **keys), rows, settings["deadline"])


def measure_rows(suite: Suite, rows: list[Row], deadline: float) -> None:
    """Measure rows, write each to the file and print its line; skip those that the file has."""
    facts = describe_machine()
    hardware = {key: facts["hardware"][key] for key in ("device", "devices")}
    machine = hardware | {key: facts[key] for key in ("commit", "versions")}
    machine |= {"toy": suite.sizes.gpt2 != FULL.gpt2, "repeats": suite.sizes.repeats}
    machine |= {"modes": list(suite.modes), "xla_flags": suite.xla_flags}
    write_results(suite.file, {}, machine)
    for row in rows:
        if is_measured(suite.file, row.name, machine):
            print(f"{row.name}: measured before", flush=True)
        elif time.time() > deadline:
            print(f"{row.name}: {SPENT}", flush=True)
        else:
            entry = machine | {"what": row.what, "time": time.time()}
            crashed = entry | {"error": DID_NOT_END}  # unless this process lives on
            write_results(suite.file, {row.name: crashed}, machine)
            entry |= measure(suite, row)
            write_results(suite.file, {row.name: entry}, machine)
            print(f"{row.name}: {describe(entry)}", flush=True)


def is_measured(file: Path, name: str, machine: dict[str, Any]) -> bool:
    """Return whether the file has all of a row's values, measured at this commit and machine."""
    found = read_results(file)["rows"].get(name, {})
    is_whole = "values" in found and "error" not in found
    return is_whole and machine.items() <= found.items()


def measure(suite: Suite, row: Row) -> dict[str, Any]:
    """Return a row's values and details, or its error in one line, and its seconds."""
    began = time.time()
    try:
        values, details = row.measure(suite)
        found = {"values": values, "details": details}
        if "error" in details:  # of a part of the row
            found["error"] = details["error"]
    except Exception as error:  # drivers, libraries and compilers raise many types
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        found = {"error": (kind + str(error)).strip().splitlines()[0][:300]}
    if "error" in found:
        suite.free()  # here, because no frame of the failed row holds arrays any more
    return found | {"seconds": time.time() - began}


def read_results(file: Path) -> dict[str, Any]:
    """Return the file's latest machine, and its rows by name. Raises `UserError`."""
    if not file.exists():
        return {"machine": None, "rows": {}}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {key: found[key] for key in ("machine", "rows")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = "expected a file that --suite wrote, or none; try another --json"
        raise UserError(f"{file}: cannot be read ({reason(error)}); {expected}") from error


def write_results(file: Path, rows: dict[str, Any], machine: dict[str, Any]) -> None:
    results = {"machine": machine, "rows": read_results(file)["rows"] | rows}
    atomic_write(file, json.dumps(results, indent=1) + "\n")


def describe(entry: dict[str, Any]) -> str:
    values = entry.get("values", {})
    parts = [f"{format_value(value)} {unit}" for unit, value in values.items()]
    if "error" in entry:
        parts.append(f"failed: {entry['error']}")
    return ", ".join(parts)


def format_value(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def format_table(rows: dict[str, dict[str, Any] | None]) -> str:
    """Return a Markdown table with a line for each value of each row."""
    lines = ["", "| Row | What | Value | Unit | Hardware | Commit |", "|---|---|---|---|---|---|"]
    for name, entry in rows.items():
        found = entry or {"what": "", "error": "not measured", "device": "", "commit": ""}
        hardware = found["device"] + (", toy size" if found.get("toy") else "")
        commit, dirty, _ = (found["commit"] or "").partition("-dirty")
        values = dict(found.get("values", {}))
        if "error" in found:
            values[found["error"].replace("|", "/")] = "failed"
        for unit, value in values.items():
            shown = value if isinstance(value, str) else format_value(value)
            cells = (f"`{name}`", found["what"], shown, unit, hardware, commit[:7] + dirty)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    # else a stopped suite would leave this process on the device
    threading.Thread(target=exit_with_parent, daemon=True).start()
    try:
        main(json.loads(sys.argv[1]))
    except UserError as error:
        sys.exit(f"error: {error}")
