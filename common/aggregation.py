"""From a resolved configuration to what secure aggregation pins: one policy a round, and its context.

Server and sites compute these for themselves; they meet only as hashes, which agree or do not.
"""

from __future__ import annotations

import hashlib
import json
import math
from fractions import Fraction
from functools import lru_cache

from common.adapter import Layout, Vector
from common.config import LocalOptimizer, RingBits, RunConfig
from common.errors import ConfigError
from common.metrics import counts_of
from common.models import AdaptedModel
from common.plan import RoundPlan
from common.secagg import transcript
from common.secagg.encoding import Codec, Tensor
from common.secagg.policy import Policy

# Noise is clipped beyond this many standard deviations: less than one number in 10^14.
_DEVIATIONS = 8.0
# Nothing bounds a step that is not clipped; this is far above what one changes that does not diverge.
_UNBOUNDED_STEP = 64.0


def policy_of(config: RunConfig, model: AdaptedModel, plan: RoundPlan) -> Policy:
    """The policy of a round. It differs between rounds that train different parts of the adapter."""
    return _policy(config, plan, Layout.of(model.active(plan.part)))


@lru_cache(maxsize=64)
def _policy(config: RunConfig, plan: RoundPlan, layout: Layout) -> Policy:
    section = config.aggregation
    if section.min_cohort is None or section.c_max is None:
        raise ConfigError("aggregation.min_cohort and c_max must be set in a resolved configuration")
    clip = section.clip or largest_change(plan, section.ring_bits)
    codec = Codec(
        ring_bits=section.ring_bits.value,
        n_max=cohort_size(config, config.sites.count),
        w_max=1,  # sites weigh alike, so that a weight tells nothing
        tensors=tuple(Tensor(size, clip) for size in layout.sizes),
        counts=counts_of(config, plan),
    )
    noise = [event.to_json() for event in plan.events]
    return Policy(
        codec,
        bytes.fromhex(layout.digest),
        section.min_cohort,
        section.c_max,
        # As little as c_max allows, so that as many sites as possible may drop out: floor(gamma·n) >= c_max.
        gamma=Fraction(section.c_max, section.min_cohort),
        noise=json.dumps(noise, sort_keys=True, separators=(",", ":")),
    )


def cohort_size(config: RunConfig, live: int) -> int:
    """How many of `live` sites are asked in a round."""
    least = config.aggregation.min_cohort or 1
    return min(live, max(least, round(config.server.fraction * live)))


def largest_change(plan: RoundPlan, ring_bits: RingBits) -> float:
    """A public bound on how far one number of the adapter moves in a round; beyond it updates are clipped.

    SGD: a step is learning_rate · (clipped gradients + noise) / batch_size, carried on by momentum. Each
    record moves a number by at most max_grad_norm, a batch has at most six standard deviations more records
    than expected, and noise is taken to `_DEVIATIONS`. Adam: a step is at most
    learning_rate · (1 − β1)/√(1 − β2) (Kingma & Ba 2015, section 2.1).

    Raises:
        ConfigError: without clipping there is no bound, and 16 bits cannot do without one.
    """
    # How often a step's gradient is applied: once, then by momentum in each step after it.
    carried = [sum(plan.momentum**j for j in range(plan.steps - t)) for t in range(plan.steps)]
    match plan.optimizer, plan.event:
        case LocalOptimizer.ADAM, _:
            return plan.learning_rate * plan.steps * (1 - 0.9) / math.sqrt(1 - 0.999)
        case LocalOptimizer.SGD, None:
            if ring_bits is RingBits.B16:
                raise ConfigError(
                    "aggregation.ring_bits = 16 without clipping of gradients needs aggregation.clip: the "
                    "largest change of a number in a round"
                )
            return plan.learning_rate * sum(carried) * _UNBOUNDED_STEP
        case LocalOptimizer.SGD, event:
            batch = event.batch_size
            signal = event.max_grad_norm * (1 + 6 / math.sqrt(batch)) * sum(carried)
            std = event.noise_multiplier * event.max_grad_norm / batch
            noise = _DEVIATIONS * std * math.sqrt(sum(c * c for c in carried))
            return plan.learning_rate * (signal + noise)


def context_of(
    run_id: str, adapter: Vector, plan_digest: str, layout_digest: str, round_number: int
) -> bytes:
    """ctx_hash: sites that were sent other adapters, plans or rounds are in other sessions.

    The run is in it for what waits at a site: two runs may begin with the same adapter, and an update that
    was uploaded in one must not be the answer to a question of the other.
    """
    setting = json.dumps([run_id, plan_digest, layout_digest, round_number], separators=(",", ":"))
    return transcript.context_hash(adapter.astype("<f4").tobytes(), setting.encode())


def setting_of(config: RunConfig, model: AdaptedModel) -> bytes:
    """SHA-256 of the configuration and of every weight of the base model."""
    h = hashlib.sha256(b"confide/setting/v1" + config.digest())
    for name, p in sorted(model.module.state_dict().items()):
        h.update(f"{name}:{tuple(p.shape)};".encode() + p.detach().cpu().contiguous().numpy().tobytes())
    return h.digest()
