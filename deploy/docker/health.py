"""Whether a server or a site is at work; exit code 0 or 1. It asks the loopback, and sends nothing.

    python health.py http://127.0.0.1:9096/health    # a server: its status page asks SuperLink
    python health.py 127.0.0.1:9195                  # a site: gRPC health of its node

Without an argument: the addresses in CONFIDE_HEALTH.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request

_SECONDS = 5.0


def page_is_well(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=_SECONDS) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def node_is_well(address: str) -> bool:
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        ask = health_pb2_grpc.HealthStub(channel).Check
        try:
            answer = ask(health_pb2.HealthCheckRequest(), timeout=_SECONDS)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def main() -> None:
    addresses = sys.argv[1:] or os.environ.get("CONFIDE_HEALTH", "").split()
    if not addresses:
        sys.exit("give an address, or set CONFIDE_HEALTH")
    for address in addresses:
        well = page_is_well(address) if address.startswith("http://") else node_is_well(address)
        if not well:
            sys.exit(f"{address} does not serve")


if __name__ == "__main__":
    main()
