"""What every benchmark shares: one row a comparison, `--json` for scripts."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Row:
    """`ratio` is ours over the peer's, both in `unit`; without a peer both are null."""

    work: str
    ours: float
    peer: float | None
    unit: str
    ratio: float | None


def row(work: str, ours: float, peer: float | None, unit: str) -> Row:
    return Row(work, round(ours, 5), None if peer is None else round(peer, 5), unit, _ratio(ours, peer))


def _ratio(ours: float, peer: float | None) -> float | None:
    return None if peer is None else round(ours / peer, 3)


def show(rows: list[Row], description: str) -> None:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="one JSON object a row")
    as_json = parser.parse_args().json
    for r in rows:
        if as_json:
            print(json.dumps(asdict(r)))
        else:
            peer = "" if r.peer is None else f"  peer {r.peer:g}  ratio {r.ratio}"
            print(f"{r.work}: {r.ours:g} {r.unit}{peer}")
