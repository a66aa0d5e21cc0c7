"""`confide doctor`: is this installation fit to train privately?"""

from __future__ import annotations

import json
import platform
import time
from importlib import metadata, resources
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from common.errors import ConfideError

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "opacus",
    "dp-accounting",
    "flwr",
    "ray",
    "cryptography",
    "numpy",
)


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Print versions, the device, the self-test of privacy and secure aggregation, and what composes.

    Exit code 5 when the self-test fails: nothing may be trained on this machine then.
    """
    report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _show(report)
    if not report["self_test_passed"]:
        raise typer.Exit(5)


def examine() -> dict[str, Any]:
    from common.composition import matrix
    from common.models import pick_device

    checks = _checks()
    return {
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "device": str(pick_device("auto")),
        "self_test": checks,
        "self_test_passed": all(check["passed"] for check in checks),
        "composition": [
            dict(zip(("method", "combination", "aggregate", "secure_sum", "noise"), row, strict=True))
            for row in matrix()
        ],
    }


def _checks() -> list[dict[str, Any]]:
    from client.selftest import self_test
    from common.config import AdapterMethod, parse_config
    from common.models import Part, load_model
    from common.privacy import SampledGaussianEvent, calibrate_noise_multiplier, epsilon_pld, epsilon_rdp
    from common.secagg.vectors import check_document
    from common.tasks import make_task

    found: list[dict[str, Any]] = []

    def check(name: str, passed: bool, detail: str, began: float) -> None:
        seconds = round(time.monotonic() - began, 2)
        found.append({"check": name, "passed": passed, "detail": detail, "seconds": seconds})

    began = time.monotonic()
    event = SampledGaussianEvent(0.01, 1.0, 1000, 1.0, 10)
    rdp, pld = epsilon_rdp([event], 1e-5), epsilon_pld([event], 1e-5)
    passed = abs(rdp - 2.1014) < 1e-3 and abs(pld - 1.8282) < 1e-3
    check("accountants give known answers", passed, f"Rényi {rdp:.4f}, loss distributions {pld:.4f}", began)
    began = time.monotonic()
    sigma = calibrate_noise_multiplier(target_epsilon=8, delta=1e-5, sample_rate=0.02, steps=1000)
    check("calibration gives a known answer", abs(sigma - 0.7678) < 1e-3, f"noise multiplier {sigma}", began)
    began = time.monotonic()
    try:
        files = [f for f in resources.files("confide_vectors").iterdir() if f.name.endswith(".json")]
        cases = sum(check_document(json.loads(file.read_text("utf-8"))) for file in files)
        passed, detail = len(files) > 0, f"{cases:,} cases in {len(files)} files"
    except (ConfideError, ModuleNotFoundError) as error:
        passed, detail = False, str(error)
    check("secure aggregation gives known answers", passed, detail, began)
    for method in AdapterMethod:
        began = time.monotonic()
        config = parse_config(
            {
                "model": {"name": "sample:all-minilm-l6-v2", "head": "mean"},
                "data": {"sample": "rotten-tomatoes"},
                "adapter": {"method": method.value},
            },
            source="confide doctor",
        )
        try:
            model = load_model(config, make_task(config.task.kind, ("no", "yes")))
            for part in (Part.B_AND_HEAD, Part.A_AND_HEAD) if method is AdapterMethod.ROLORA else (Part.ALL,):
                self_test(model, part)
            check(f"training is private: {method.value}", True, f"{model.layout.size:,} numbers", began)
        except ConfideError as error:
            check(f"training is private: {method.value}", False, str(error), began)
    return found


def _show(report: dict[str, Any]) -> None:
    out = Console(highlight=False)
    versions = Table(title=f"Python {report['python']} on {report['device']}", title_justify="left")
    versions.add_column("package")
    versions.add_column("version")
    for name, version in report["versions"].items():
        versions.add_row(name, version)
    out.print(versions)
    checks = Table(title="Self-test", title_justify="left")
    for column in ("check", "result", "detail", "seconds"):
        checks.add_column(column, justify="right" if column == "seconds" else "left")
    for item in report["self_test"]:
        result = "[green]passed[/]" if item["passed"] else "[bold red]FAILED[/]"
        checks.add_row(item["check"], result, item["detail"], f"{item['seconds']:.2f}")
    out.print(checks)
    rows = Table(title="What composes with what", title_justify="left")
    for column in ("adapter", "combined by", "aggregate", "under a secure sum", "DP noise"):
        rows.add_column(column)
    for row in report["composition"]:
        rows.add_row(*row.values())
    out.print(rows)
