"""A small federation for tests: real clients, a real server, and a network that can lose anything."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from client.secagg import SecAggClient
from client.secagg_state import Site, Update
from common.secagg.encoding import Codec, Tensor
from common.secagg.errors import Blame, Exchange
from common.secagg.graph import GraphRule
from common.secagg.keys import IdentityKey
from common.secagg.masks import Ring, ring_dtype
from common.secagg.messages import (
    AdvertiseReply,
    AdvertiseRequest,
    ConsistReply,
    ConsistRequest,
    MaskReply,
    MaskRequest,
    ShareReply,
    ShareRequest,
    Table,
    UnmaskReply,
    UnmaskRequest,
)
from common.secagg.policy import Policy
from server.secagg import SecAggServer, SecureSum

RUN = b"run-7"
CONTEXT = bytes(range(32))


class Stream:
    """A reproducible `random_bytes`: the keystream of AES-256-CTR."""

    def __init__(self, seed: int) -> None:
        key = seed.to_bytes(32, "little")
        self._encryptor = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def __call__(self, size: int) -> bytes:
        return self._encryptor.update(bytes(size))


@dataclass
class MemoryStore:
    """A store that remembers every save, so that a test can roll it back."""

    saves: list[bytes] = field(default_factory=list)

    def load(self) -> bytes | None:
        return self.saves[-1] if self.saves else None

    def save(self, data: bytes) -> None:
        self.saves.append(data)


def small_policy(
    *,
    words: int = 5,
    min_cohort: int = 4,
    c_max: int = 1,
    n_max: int = 64,
    ring_bits: int = 32,
    rule: GraphRule | None = None,
) -> Policy:
    """A policy whose vectors have `words` words, the weight included."""
    codec = Codec(ring_bits, n_max, 1, (Tensor(words - 1, 1.0),))
    return Policy(codec, bytes(32), min_cohort, c_max, graph=rule or GraphRule())


class World:
    """Sites 1 … n (or `ids`) with keys, roster, stores and one random vector each."""

    def __init__(
        self,
        n: int = 6,
        *,
        policy: Policy | None = None,
        seed: int = 0,
        ids: Collection[int] | None = None,
    ) -> None:
        self.random = Stream(seed)
        self.policy = policy or small_policy()
        self.ids = tuple(sorted(ids)) if ids is not None else tuple(range(1, n + 1))
        self.identities = {site: IdentityKey.generate(self.random) for site in self.ids}
        self.roster = {site: key.public for site, key in self.identities.items()}
        self.stores = {site: MemoryStore() for site in self.ids}
        self.blamed: dict[int, list[Blame]] = {site: [] for site in self.ids}
        self.clients = {site: self.client(site) for site in self.ids}
        self.vectors = {site: self.vector() for site in self.ids}
        self.number = 1
        self.sealed: dict[int, Table] = {}  # what each site sealed last

    def client(self, site: int, **changes: Any) -> SecAggClient:
        """A client over the site's store, as after a restart."""
        witness = changes.pop("witness", 0)
        me = Site(site, self.identities[site], self.roster, self.policy, RUN)
        return SecAggClient(
            replace(me, **changes),
            self.stores[site],
            self.random,
            witness=witness,
            blame=self.blamed[site].append,
        )

    def vector(self) -> Ring:
        dtype = ring_dtype(self.policy.ring_bits)
        size = self.policy.words * dtype.itemsize
        return np.frombuffer(self.random(size), dtype=dtype).copy()

    def update(self, site: int) -> Update:
        return Update(self.number, self.vectors[site])

    def server(
        self, round_number: int = 1, attempt: int = 0, cohort: Collection[int] | None = None, **changes: Any
    ) -> SecAggServer:
        settings: dict[str, Any] = {
            "policy": self.policy,
            "roster": self.roster,
            "run": RUN,
            "round_number": round_number,
            "attempt": attempt,
            "cohort": tuple(cohort or self.ids),
            "context": CONTEXT,
            "random_bytes": self.random,
        }
        return SecAggServer(**(settings | changes))

    def plain_sum(self, sites: Collection[int]) -> list[int]:
        """The oracle: Python integers, added one by one."""
        modulus = 2**self.policy.ring_bits
        return [sum(int(self.vectors[s][i]) for s in sites) % modulus for i in range(self.policy.words)]

    # The five exchanges, each over bytes

    def advertise(
        self, server: SecAggServer, lost: Collection[int] = (), silent: Collection[int] = ()
    ) -> None:
        """`lost`: the reply never arrives. `silent`: the request never does."""
        request = AdvertiseRequest.decode(server.advertise_request().encode())
        for site in server.asked:
            if site not in silent:
                reply = self.clients[site].advertise(request, CONTEXT).encode()
                if site not in lost:
                    assert server.take_advertisement(site, AdvertiseReply.decode(reply))

    def share(self, server: SecAggServer, lost: Collection[int] = (), silent: Collection[int] = ()) -> None:
        request = ShareRequest.decode(server.close_advertise().encode())
        for site in server.asked:
            if site not in silent:
                reply = self.clients[site].share(request)
                self.sealed[site] = reply.rows
                if site not in lost:
                    assert server.take_shares(site, ShareReply.decode(reply.encode()))

    def inbox(self, site: int, senders: Collection[int]) -> Table:
        """What `senders` sealed for `site`, as any server could hand it on."""
        rows = ((sender, data) for sender in senders for to, data in self.sealed[sender] if to == site)
        return tuple(rows)

    def share_all(self, request: ShareRequest, sites: Collection[int]) -> None:
        """SHARE without an honest server."""
        for site in sites:
            self.sealed[site] = self.clients[site].share(request).rows

    def mask(self, server: SecAggServer, lost: Collection[int] = (), silent: Collection[int] = ()) -> None:
        for site, request in server.close_share().items():
            if site not in silent:
                request = MaskRequest.decode(request.encode())
                reply = self.clients[site].mask(request, self.update(site)).encode()
                if site not in lost:
                    assert server.take_masked(site, MaskReply.decode(reply))

    def consist(self, server: SecAggServer, lost: Collection[int] = (), silent: Collection[int] = ()) -> None:
        request = ConsistRequest.decode(server.close_mask().encode())
        for site in server.asked:
            if site not in silent:
                reply = self.clients[site].consist(request).encode()
                if site not in lost:
                    assert server.take_signature(site, ConsistReply.decode(reply))

    def unmask(
        self,
        server: SecAggServer,
        lost: Collection[int] = (),
        silent: Collection[int] = (),
        tamper: Callable[[UnmaskReply], UnmaskReply] = lambda reply: reply,
    ) -> SecureSum:
        request = UnmaskRequest.decode(server.close_consist().encode())
        for site in server.asked:
            if site not in silent:
                reply = tamper(self.clients[site].unmask(request)).encode()
                if site not in lost:
                    server.take_unmask(site, UnmaskReply.decode(reply))
        return server.close_unmask()

    def run(
        self,
        server: SecAggServer | None = None,
        lost: Mapping[Exchange, Collection[int]] | None = None,
        silent: Mapping[Exchange, Collection[int]] | None = None,
    ) -> SecureSum:
        """One session with dropouts, its result compared with the plain sum."""
        server, lost, silent = server or self.server(), lost or {}, silent or {}
        steps = (self.advertise, self.share, self.mask, self.consist, self.unmask)
        result: SecureSum | None = None
        for exchange, step in zip(Exchange, steps, strict=True):
            result = step(server, lost.get(exchange, ()), silent.get(exchange, ()))
        assert result is not None
        assert result.total.tolist() == self.plain_sum(result.survivors)
        return result
