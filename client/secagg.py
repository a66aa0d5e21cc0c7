"""A site's side of secure aggregation: five exchanges, each a check list, a new state and a reply.

No clock, no disk, no network: randomness and the store are passed in, messages are dataclasses. The
checks carry the numbers of docs/protocol.md. Every method

    loads the state → checks → computes → saves the next state → returns the reply

in this order, so what has been sent is always remembered. If anything fails, the session is closed,
its secrets are erased, and the error is for this site's log only: the server gets a fixed code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from client.secagg_state import (
    Advertised,
    Closed,
    Ending,
    Journal,
    Masked,
    SessionState,
    Shared,
    Signed,
    Site,
    Store,
    Update,
)
from common.secagg import derivation, errors, keys, masks, shamir, transcript
from common.secagg.errors import Blame, Exchange, Fault
from common.secagg.keys import EphemeralKey, RandomBytes, Secret
from common.secagg.messages import (
    SHARES_BYTES,
    Advertisement,
    AdvertiseReply,
    AdvertiseRequest,
    ConsistReply,
    ConsistRequest,
    MaskReply,
    MaskRequest,
    ShareReply,
    ShareRequest,
    UnmaskReply,
    UnmaskRequest,
)

State = TypeVar("State", Advertised, Shared, Masked, Signed)


class SecAggClient:
    """One site in one run.

    Args:
        site: identity, roster, policy, run.
        store: see `Store`.
        random_bytes: `os.urandom`.
        witness: the highest `serial` that is on record anywhere but in the store. A store behind it
            was restored from a backup, and is refused.
        threads: for masking.
        blame: told of what other sites did wrong.
    """

    def __init__(
        self,
        site: Site,
        store: Store,
        random_bytes: RandomBytes,
        *,
        witness: int = 0,
        threads: int = 1,
        blame: Callable[[Blame], None] = lambda _: None,
    ) -> None:
        self.site = site
        self._store = store
        self._random_bytes = random_bytes
        self._seen = witness
        self._threads = threads
        self._blame = blame

    # What a site can ask about itself

    @property
    def serial(self) -> int:
        """How often state was saved. Record it elsewhere too, as the next start's `witness`."""
        return self._load().serial

    @property
    def mark(self) -> tuple[int, int] | None:
        """The highest (round, attempt) that was answered."""
        return self._load().mark

    @property
    def consumed(self) -> int:
        """The number of the last update that was uploaded; only higher ones can be."""
        return self._load().consumed

    @property
    def state(self) -> SessionState:
        return self._load().session

    def abort(self) -> None:
        """Close the open session, if there is one, and erase its secrets."""
        journal = self._load()
        if not isinstance(journal.session, Closed):
            self._save(journal, Closed(Ending.ABORTED))

    # Exchange 0

    def advertise(self, request: AdvertiseRequest, context: bytes) -> AdvertiseReply:
        """ADVERTISE: make keys for a new session.

        Args:
            request: the server's.
            context: `transcript.context_hash` of the adapter and configuration that this site has
                trained on.
        """
        site, policy = self.site, self.site.policy
        with self._closing_on_failure():
            journal = self._load()
            mark = (request.round, request.attempt)
            # 0.1 the run that this site has joined
            if request.run != site.run:
                raise errors.WrongRunError("0.1", f"run {request.run.hex()}, joined {site.run.hex()}")
            # 0.2 (round, attempt) above the high-water mark
            if journal.mark is not None and mark <= journal.mark:
                raise errors.NotAboveMarkError("0.2", f"{mark}, mark {journal.mark}")
            # 0.3 U0 ascending
            _check_ascending("0.3", request.cohort)
            # 0.4 U0 within the roster
            if strangers := [site_id for site_id in request.cohort if site_id not in site.roster]:
                raise errors.NotInRosterError("0.4", f"{strangers[:5]} in U0")
            # 0.5 U0 contains me
            _check_contains("0.5", request.cohort, site.id)
            # 0.6 min_cohort <= |U0| <= n_max
            if not policy.min_cohort <= len(request.cohort) <= policy.n_max:
                raise errors.CohortOutOfRangeError(
                    "0.6", f"{len(request.cohort)}, limits {policy.min_cohort} and {policy.n_max}"
                )
            # 0.7 the pinned roster, 0.8 the pinned policy, 0.9 the model this site trained on
            if request.roster_hash != site.roster_hash:
                raise errors.RosterMismatchError("0.7", request.roster_hash.hex())
            if request.policy_hash != policy.hash:
                raise errors.PolicyMismatchError("0.8", request.policy_hash.hex())
            if request.context_hash != context:
                raise errors.ContextMismatchError("0.9", request.context_hash.hex())

            sid = transcript.session_id(
                run=site.run,
                round_number=request.round,
                attempt=request.attempt,
                roster=site.roster_hash,
                policy=policy.hash,
                cohort=request.cohort,
                context=context,
            )
            c = Secret(self._random_bytes(keys.KEY_BYTES))
            s, b = (Secret(shamir.element_bytes(self._random_element())) for _ in range(2))
            c_public, s_public = EphemeralKey(c).public, derivation.mask_key(s, sid).public
            commitment = transcript.commitment(sid, site.id, b)
            digest = transcript.advertisement_digest(sid, site.id, c_public, s_public, commitment)
            own = Advertisement(site.id, c_public, s_public, commitment, site.identity.sign(digest))
            state = Advertised(sid, request.cohort, own, c, s, b)
            self._save(dataclasses.replace(journal, mark=mark), state)
            return AdvertiseReply(sid, own)

    # Exchange 1

    def share(self, request: ShareRequest) -> ShareReply:
        """SHARE: agree on keys with every neighbour and seal for each its shares of s and b."""
        site, policy = self.site, self.site.policy
        with self._closing_on_failure():
            journal, state = self._open("1.0", Advertised, request.session)
            sid, members = state.session, tuple(entry.site for entry in request.advertisements)
            # 1.1 U1 ascending
            _check_ascending("1.1", members)
            # 1.2 U1 within U0
            _check_subset("1.2", members, state.cohort)
            # 1.3 my own advertisement unchanged
            _check_contains("1.3", members, site.id)
            if request.advertisements[members.index(site.id)] != state.own:
                raise errors.OwnAdvertisementChangedError("1.3", "another")
            # 1.4 |U1| >= min_cohort
            if len(members) < policy.min_cohort:
                raise errors.TooFewMembersError("1.4", f"|U1| = {len(members)} < {policy.min_cohort}")
            # 1.5 canonical points, none of low order
            for entry in request.advertisements:
                for public in (entry.c, entry.s):
                    if not keys.is_canonical_point(public):
                        raise errors.MalformedPointError("1.5", f"a key of site {entry.site}")
                    if keys.is_low_order_point(public):
                        raise errors.LowOrderPointError("1.5", f"a key of site {entry.site}")
            # 1.6 all keys distinct
            if len({key for e in request.advertisements for key in (e.c, e.s)}) != 2 * len(members):
                raise errors.DuplicateKeyError("1.6", "a key that appears twice")
            # 1.7 signatures by roster keys
            for entry in request.advertisements:
                if not derivation.is_signed(entry, sid, site.roster):
                    raise errors.BadAdvertisementSignatureError("1.7", f"site {entry.site}'s is not")

            h1 = transcript.u1_hash(sid, (entry.to_bytes() for entry in request.advertisements))
            graph = policy.graph_of(members, h1)
            neighbours = graph.neighbours(site.id)
            holders = (*neighbours, site.id)  # my own share of b counts too; s is never rebuilt from me
            s_shares, b_shares = (
                shamir.split(shamir.element(x.reveal()), graph.share_threshold, holders, self._random_bytes)
                for x in (state.s, state.b)
            )
            c_key, s_key = EphemeralKey(state.c), derivation.mask_key(state.s, sid)
            peers = {entry.site: entry for entry in request.advertisements}
            pair_seeds, open_keys, rows = {}, {}, []
            for peer, s_share, b_share in zip(neighbours, s_shares, b_shares, strict=False):
                pair_seeds[peer] = derivation.pair_seed(s_key, peers[peer].s, sid, h1, site.id, peer)
                agreed = c_key.agree(peers[peer].c)
                send_key = derivation.share_key(agreed, sid, h1, site.id, peer)
                open_keys[peer] = derivation.share_key(agreed, sid, h1, peer, site.id)
                both = Secret(shamir.element_bytes(s_share) + shamir.element_bytes(b_share))
                aad = transcript.share_aad(sid, h1, site.id, peer)
                rows.append((peer, keys.seal_once(send_key, both, aad)))
            own_share = Secret(shamir.element_bytes(b_shares[-1]))
            self._save(journal, Shared(sid, h1, members, pair_seeds, open_keys, state.b, own_share))
            return ShareReply(sid, site.id, tuple(rows))

    # Exchange 2

    def mask(self, request: MaskRequest, update: Update) -> MaskReply:
        """MASK: y = enc(x, w) + PRG(b) + Σ_j sign(me − j)·PRG(s_me,j) over neighbours j in U2.

        Consumes `update`, even if the round aborts later: a second sum with it could be subtracted
        from the first. Peak memory: one more vector.
        """
        site, policy = self.site, self.site.policy
        with self._closing_on_failure():
            journal, state = self._open("2.0", Shared, request.session)
            sid, sharers = state.session, request.sharers
            # 2.1 U2 ascending, 2.2 within U1, 2.3 contains me
            _check_ascending("2.1", sharers)
            _check_subset("2.2", sharers, state.members)
            _check_contains("2.3", sharers, site.id)
            # 2.4 |U2| >= max(t, min_cohort)
            _check_size("2.4", sharers, policy.smallest(len(state.members)))
            # 2.5 exactly the ciphertexts of my neighbours in U2
            present = set(sharers)
            peers = [peer for peer in state.pair_seeds if peer in present]
            if [sender for sender, _ in request.sealed] != peers:
                raise errors.WrongCiphertextSetError("2.5", f"{len(request.sealed)} for {len(peers)}")
            # 2.6 enough valid shares, my own counted, to be of help in unmasking
            holdings = {}
            for sender, sealed in request.sealed:
                aad = transcript.share_aad(sid, state.h1, sender, site.id)
                shares = keys.open_once(state.open_keys[sender], sealed, aad)
                if shares is not None and _are_elements(shares):
                    holdings[sender] = shares
                else:
                    self._blame(Blame(sender, Exchange.SHARE, Fault.UNOPENED_SHARE, about=sender))
            needed = policy.graph_of(state.members, state.h1).share_threshold
            if len(holdings) + 1 < needed:
                raise errors.TooFewSharesError("2.6", f"{len(holdings) + 1} of {needed}")
            # 2.7 an update that was never uploaded, 2.8 encoded for this policy
            if update.number <= journal.consumed:
                raise errors.UpdateConsumedError("2.7", f"number {update.number}, last {journal.consumed}")
            vector = update.vector
            if vector.shape != (policy.words,) or vector.dtype != masks.ring_dtype(policy.ring_bits):
                raise errors.WrongVectorError("2.8", f"{vector.dtype} of shape {vector.shape}")

            masked = vector.copy()
            seeds = [(derivation.self_seed(state.b, sid), masks.ADD)]
            seeds += [(state.pair_seeds[peer], derivation.pair_sign(site.id, peer)) for peer in peers]
            masks.apply_masks(masked, seeds, self._threads)
            self._save(
                dataclasses.replace(journal, consumed=update.number),
                Masked(sid, state.h1, state.members, sharers, holdings, state.own_share),
            )
            return MaskReply(sid, site.id, masked)

    # Exchange 3

    def consist(self, request: ConsistRequest) -> ConsistReply:
        """CONSIST: sign the survivor set, once in a session."""
        site, policy = self.site, self.site.policy
        with self._closing_on_failure():
            # 3.0 the first time: a second request finds `Signed`, and ends the session
            journal, state = self._open("3.0", Masked, request.session)
            survivors = request.survivors
            # 3.1 U3 ascending, 3.2 within U2, 3.3 contains me
            _check_ascending("3.1", survivors)
            _check_subset("3.2", survivors, state.sharers)
            _check_contains("3.3", survivors, site.id)
            # 3.4 |U3| >= max(t, min_cohort)
            _check_size("3.4", survivors, policy.smallest(len(state.members)))
            # 3.5 enough of my neighbourhood survives to rebuild my self-mask
            graph = policy.graph_of(state.members, state.h1)
            around = [site.id, *set(graph.neighbours(site.id)).intersection(survivors)]
            _check_size("3.5", around, graph.share_threshold)

            digest = transcript.consist_digest(state.session, state.h1, state.sharers, survivors, site.id)
            self._save(journal, Signed(state, survivors))
            return ConsistReply(state.session, site.id, site.identity.sign(digest))

    # Exchange 4

    def unmask(self, request: UnmaskRequest) -> UnmaskReply:
        """UNMASK: give a share of b for each survivor and of s for each site that dropped in between.

        Never both for one id: U3 and U2∖U3 are disjoint, both come from this site's own state, and
        t signatures say that no other honest site works with another U2 or U3.
        """
        site, policy = self.site, self.site.policy
        with self._closing_on_failure():
            journal, state = self._open("4.0", Signed, request.session)
            masked, survivors = state.masked, set(state.survivors)
            signers = [signer for signer, _ in request.signatures]
            # 4.1 distinct members of U3
            if not transcript.is_ascending(signers) or not survivors.issuperset(signers):
                raise errors.BadSignerSetError("4.1", f"{len(signers)} signers that are not")
            # 4.2 at least t
            needed = policy.threshold(len(masked.members))
            if len(signers) < needed:
                raise errors.TooFewSignaturesError("4.2", f"{len(signers)} of {needed}")
            # 4.3 every signature over what I have signed
            for signer, signature in request.signatures:
                digest = transcript.consist_digest(
                    masked.session, masked.h1, masked.sharers, state.survivors, signer
                )
                if not keys.verify(site.roster[signer], digest, signature):
                    raise errors.BadConsistSignatureError("4.3", f"site {signer}'s does not")

            b_shares = {site.id: masked.own_share.reveal()}
            s_shares = {}
            for owner, shares in masked.holdings.items():
                s_share, b_share = _halves(shares)
                if owner in survivors:
                    b_shares[owner] = b_share
                else:
                    s_shares[owner] = s_share
            self._save(journal, Closed(Ending.DONE))
            rows = (tuple(sorted(shares.items())) for shares in (b_shares, s_shares))
            return UnmaskReply(masked.session, site.id, *rows)

    # Plumbing

    def _load(self) -> Journal:
        data = self._store.load()
        journal = Journal(self.site.run, self.site.id) if data is None else Journal.decode(data)
        if journal.serial < self._seen:
            raise errors.RollbackError(
                f"this site's state was saved {self._seen} times, but the store has save "
                f"{journal.serial}: it was restored from a backup, or lost. This site could now upload "
                "an update twice, so it takes no part until a new run id is agreed on."
            )
        if (journal.run, journal.site) != (self.site.run, self.site.id):
            raise errors.RollbackError(f"the store belongs to site {journal.site} or to another run")
        self._seen = journal.serial
        return journal

    def _save(self, journal: Journal, session: SessionState) -> None:
        following = dataclasses.replace(journal, serial=journal.serial + 1, session=session)
        self._store.save(following.encode())
        self._seen = following.serial

    def _open(self, check: str, expected: type[State], session: bytes) -> tuple[Journal, State]:
        """The journal and the open session's state, which must be in the exchange before."""
        journal = self._load()
        state = journal.session
        if not isinstance(state, expected):
            raise errors.OutOfOrderError(check, f"state {type(state).__name__}, not {expected.__name__}")
        if not keys.equal(state.session, session):
            raise errors.WrongSessionError(check, session.hex())
        return journal, state

    @contextmanager
    def _closing_on_failure(self) -> Iterator[None]:
        try:
            yield
        except errors.RollbackError:
            raise  # the store is not ours to write to
        except BaseException:
            self.abort()
            raise

    def _random_element(self) -> int:
        return shamir.random_element(self._random_bytes)


# Checks


def _check_ascending(check: str, sites: Sequence[int]) -> None:
    if not transcript.is_ascending(sites):
        raise errors.UnsortedIdsError(check, f"a list of {len(sites)} ids that is not")


def _check_contains(check: str, sites: Sequence[int], site: int) -> None:
    if site not in sites:
        raise errors.NotListedError(check, f"no {site} in it")


def _check_subset(check: str, sites: Sequence[int], earlier: Sequence[int]) -> None:
    if extra := set(sites).difference(earlier):
        raise errors.NotSubsetError(check, f"{sorted(extra)[:5]} beyond it")


def _check_size(check: str, sites: Sequence[int], needed: int) -> None:
    if len(sites) < needed:
        raise errors.TooFewMembersError(check, f"{len(sites)}, needed {needed}")


def _halves(shares: Secret) -> tuple[bytes, bytes]:
    """(share of s, share of b)."""
    return shares.reveal()[: SHARES_BYTES // 2], shares.reveal()[SHARES_BYTES // 2 :]


def _are_elements(shares: Secret) -> bool:
    try:
        for half in _halves(shares):
            shamir.element(half)
    except ValueError:
        return False
    return True
