"""The policies as formulas: an independent NumPy definition of what native/policy computes.

Matrices over whole heads, float64, no loops over tokens. Symbols as in the papers:

====== ==================== ==================================================
k      [n_kv, head_dim]     keys of one KV head, in position order
q      [n_obs, n_group, d]  queries of the observation window, oldest first
pos    [n_kv]               positions, strictly ascending
v      [n_kv, head_dim_v]   values
bias   [n_kv]               what merging adds to the logits of each key
C      [n_group, 3d/2]      mean queries before RoPE, then mean moduli per rotated pair
state  [n_kv] or [n_kv, 2]  what the last compression left with each token, NaN: nothing
A      [n_obs, n_cand]      attention logits, n_cand = n_kv - n_window
I      [n_cand]             importance
R      [n_kv]               redundancy
====== ==================== ==================================================

A new policy needs an entry in `POLICIES`; test_policy_reference.py walks the registry of the
library and fails without it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

#: Lower bound of a key's norm, so that a key of zeros has cosine 0 with every other.
MIN_NORM = 1e-8

#: The same for the mean of the unit keys of a head, which may cancel.
MIN_MEAN_NORM = 1e-6


@dataclass
class Rope:
    """`n_rot` values of a row from `offset` on are rotated, `freq` [n_rot / 2] radians a step."""

    n_rot: int
    offset: int
    is_neox: bool
    freq: Array

    @property
    def pairs(self) -> tuple[Array, Array]:
        """Real and imaginary parts of each pair: two times [n_rot / 2] places in a row."""
        if self.is_neox:
            real = self.offset + np.arange(self.n_rot // 2)
            return real, real + self.n_rot // 2
        real = self.offset + np.arange(0, self.n_rot, 2)
        return real, real + 1


@dataclass
class Head:
    """What a policy may read about one head, and its parameters."""

    k: Array
    q: Array
    kq_scale: float
    pos: Array
    n_window: int
    il: int = 0
    ih: int = 0
    lambda_: float = 0.1
    sim_threshold: float = 0.5
    pool_kernel: int = 7
    ema: float = 0.5
    decay: float = 0.5
    n_sink: int = 4
    seed: int = 0
    v: Array | None = None
    bias: Array | None = None
    n_state: int = 1
    state: Array | None = None
    obs_pos: Array | None = None
    rope: Rope | None = None
    centres: Array | None = None
    sinks: Array | None = None  # [n_group] logits of attention sinks
    soft_cap: float = 0.0  # 0: none
    slopes: Array | None = None  # [n_group] of ALiBi

    def __post_init__(self) -> None:
        if self.state is None:
            shape = (len(self.pos),) if self.n_state == 1 else (len(self.pos), self.n_state)
            self.state = np.full(shape, np.nan)
        if self.bias is None:
            self.bias = np.zeros(len(self.pos))
        if self.obs_pos is None:  # the queries are those of the newest tokens
            self.obs_pos = np.asarray(self.pos)[len(self.pos) - len(self.q) :]

    @property
    def n_kv(self) -> int:
        return len(self.pos)

    @property
    def logits(self) -> Array:
        """Attention logits of all queries and keys: [n_obs, n_group, n_kv]."""
        logits = np.einsum("ogd,jd->ogj", self.q, self.k) * self.kq_scale
        if self.soft_cap > 0:
            logits = self.soft_cap * np.tanh(logits / self.soft_cap)
        if self.slopes is not None:
            distance = np.asarray(self.obs_pos)[:, None] - np.asarray(self.pos)
            logits = logits - np.asarray(self.slopes)[:, None] * distance[:, None, :]
        return logits + self.bias

    @property
    def n_cand(self) -> int:
        """Tokens outside the observation window."""
        return max(self.n_kv - self.n_window, 0)


def softmax(x: Array, sink: Array | float = -np.inf) -> Array:
    """Softmax along the last axis, beside a sink [...] that takes its part and is left out."""
    sink = np.broadcast_to(sink, x.shape[:-1])[..., None]
    if x.shape[-1] == 0:
        return x
    top = np.maximum(x.max(axis=-1, keepdims=True, initial=-np.inf), sink)
    e = np.exp(x - top)
    return e / (e.sum(axis=-1, keepdims=True) + np.exp(sink - top))


def unit_keys(k: Array) -> Array:
    """Keys divided by their norms."""
    return k / np.maximum(np.linalg.norm(k, axis=-1, keepdims=True), MIN_NORM)


def max_pool(x: Array, kernel: int) -> Array:
    """Maximum over `kernel` neighbours, stride 1, same length; beyond the ends there is nothing."""
    if x.size == 0:
        return x
    padded = np.pad(x, kernel // 2, constant_values=-np.inf)
    return np.lib.stride_tricks.sliding_window_view(padded, kernel).max(axis=-1)


def importance(head: Head) -> Array:
    """Attention of the observation window to the tokens before it: [n_cand].

    R-KV (arXiv:2505.24133), section 3, importance scoring, after SnapKV (arXiv:2404.14469)::

        A_oj = max_g  q_og . k_j * kq_scale          the maximum over the group comes first
        I    = maxpool( mean_o softmax_j(A_oj) )     over j outside the window
    """
    if len(head.q) == 0:
        return np.zeros(head.n_cand)
    logits = head.logits[..., : head.n_cand]
    sink = -np.inf if head.sinks is None else np.max(head.sinks)
    return max_pool(softmax(logits.max(axis=1), sink).mean(axis=0), head.pool_kernel)


def thinned_cosines(k: Array, threshold: float) -> Array:
    """Cosines of all pairs of keys: [n_kv, n_kv], without the diagonal and the newest look-alike.

    R-KV (arXiv:2505.24133), section 3, redundancy estimation: in every row the most recent other
    token above the threshold is set to 0, so that the newest of a group of look-alikes is not
    charged by the rest. Where no token is above it, nothing is (the authors' code takes column 0).
    """
    unit = unit_keys(k)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, 0.0)
    alike = cosines > threshold
    np.fill_diagonal(alike, False)
    newest = alike & (np.cumsum(alike[:, ::-1], axis=1)[:, ::-1] == 1)
    return np.where(newest, 0.0, cosines)


def redundancy(head: Head) -> Array:
    """How much every token repeats others: [n_kv], sums to 1.

    R-KV (arXiv:2505.24133), section 3: ``R = softmax_j( mean_i S_ij )`` with the thinned cosines S.
    """
    return softmax(thinned_cosines(head.k, head.sim_threshold).mean(axis=0))


def _with_window(candidates: Array, head: Head) -> Array:
    """Append zeros for the window, whose scores are never looked at."""
    return np.concatenate([candidates, np.zeros(head.n_kv - head.n_cand)])


def rkv(head: Head) -> Array:
    """R-KV (arXiv:2505.24133), section 3, joint score: ``Z = lambda I - (1 - lambda) R``."""
    repeated = redundancy(head)[: head.n_cand]
    return _with_window(head.lambda_ * importance(head) - (1 - head.lambda_) * repeated, head)


def rkv_ema(head: Head) -> Array:
    """R-KV smoothed over compressions: ``ema Z_before + (1 - ema) Z``; ``Z`` for a new token."""
    z = rkv(head)
    smoothed = np.where(np.isnan(head.state), z, head.ema * head.state + (1 - head.ema) * z)
    return _with_window(smoothed[: head.n_cand], head)


def h2o(head: Head) -> Array:
    """H2O (arXiv:2306.14048): attention summed over all queries so far.

    ``Z_j = Z_j(before) + sum_o mean_g softmax_j(q_og . k_j * kq_scale)``, the softmax over the
    tokens that query o could see. A group of query heads counts by its mean.
    """
    return np.nan_to_num(head.state, nan=0.0) + attention(head).sum(axis=0)


def attention(head: Head) -> Array:
    """Attention of every query to what it could see, mean over the group: [<= n_obs, n_kv]."""
    seen = np.asarray(head.pos)[None, :] <= np.asarray(head.obs_pos)[:, None]
    logits = np.where(seen[:, None, :], head.logits, -np.inf)[seen.any(axis=1)]
    return softmax(logits, -np.inf if head.sinks is None else head.sinks).mean(axis=1)


def attention_mass(head: Head) -> Array:
    """Attention that a token receives, mean over the queries that can see it: [n_kv]."""
    seen = np.asarray(head.pos)[None, :] <= np.asarray(head.obs_pos)[:, None]
    return attention(head).sum(axis=0) / np.maximum(seen.sum(axis=0), 1)


def mass_state(head: Head) -> Array:
    """Sums of decayed attention, and of the decayed weights: [n_kv, 2]."""
    now = np.stack([attention_mass(head), np.full(head.n_kv, float(len(head.q) > 0))], axis=1)
    return now + head.decay * np.nan_to_num(head.state, nan=0.0)


def mass_of(policy: str, head: Head) -> Array:
    """The attention by which merging weighs tokens: [n_kv]."""
    if policy not in N_STATE:
        return attention_mass(head)
    acc, weight = mass_state(head).T
    return np.divide(acc, weight, out=np.zeros_like(acc), where=weight > 0)


def mass(head: Head) -> Array:
    """Attention remembered with decay, times the distance of the value from the mean value.

    ``A_j = sum_c decay^c a_j(c compressions ago) / sum_c decay^c``, ``Z_j = A_j |v_j - mean v|``;
    the sums are H2O's (arXiv:2306.14048), the factor after VATP (arXiv:2406.12335).
    """
    distance = np.linalg.norm(head.v - head.v.mean(axis=0), axis=1) if head.v is not None else 0.0
    return mass_of("mass", head) * distance


def twin_cosines(head: Head, masses: Array) -> Array:
    """Largest cosine of each key with one that receives more attention, sinks excepted: [n_kv]."""
    unit = unit_keys(head.k)
    may = (masses[None, :] > masses[:, None]) & (np.asarray(head.pos) >= head.n_sink)[None, :]
    return np.clip(np.where(may, unit @ unit.T, -1.0).max(axis=1), -1.0, 1.0)


def loss(head: Head) -> Array:
    """What is lost when a token goes and its twin stands in: ``A |v - mean v| (1 - c)``."""
    return mass(head) * (1.0 - twin_cosines(head, mass_of("loss", head)))


def merge(
    head: Head, keep: Array, can_take: Array, masses: Array, bias_max: float = 8.0
) -> tuple[Array, Array, Array, Array]:
    """Merge what goes into what stays: targets, shares, biases and values afterwards.

    Evicted j goes to the token that may take it whose key has the highest cosine; values become
    means weighted by mass, and ``b_i += log((A_i + sum_j A_j) / A_i)``. ToMe (arXiv:2210.09461),
    section 3.2, with attention in the place of counts.
    """
    unit = unit_keys(head.k)
    cosines = np.where(can_take, unit @ unit.T, -np.inf)
    goes = ~keep & can_take.any()
    target = np.where(goes, cosines.argmax(axis=1), -1)
    own = np.where(goes, 0.0, masses)
    into = np.zeros((head.n_kv, head.n_kv))
    into[target[goes], np.flatnonzero(goes)] = masses[goes]
    taken = into.sum(axis=1)
    whole = own + taken
    share = np.ones(head.n_kv)
    share[taken > 0] = (own / np.where(whole > 0, whole, 1.0))[taken > 0]
    of_target = whole[target]
    share[goes] = np.divide(masses, of_target, out=np.zeros(head.n_kv), where=of_target > 0)[goes]
    with np.errstate(divide="ignore", invalid="ignore"):
        grown = np.where(taken > 0, head.bias + np.log(whole / own), head.bias)
    bias = np.minimum(grown, bias_max)
    weights = np.zeros((head.n_kv, head.n_kv))
    weights[target[goes], np.flatnonzero(goes)] = share[goes]
    values = head.v * np.where(goes, 1.0, share)[:, None] + weights @ head.v
    return target, share, bias, values


def keydiff(head: Head) -> Array:
    """KeyDiff (arXiv:2504.15364): ``Z_j = -cos(k_j, m)``, m the mean of the unit keys."""
    unit = unit_keys(head.k)
    mean = unit.mean(axis=0)
    return -(unit @ mean) / max(np.linalg.norm(mean), MIN_MEAN_NORM)


def trig_scores(head: Head) -> tuple[Array, Array]:
    """TriAttention's S of every query head and token, and the largest terms: [n_group, n_kv] each.

    TriAttention (arXiv:2604.04921): for a key k without its rotation, at distance D::

        S = sum_f |E q_f| |k_f| cos(w_f D + arg E q_f - arg k_f) + (E|q_f| - |E q_f|) |k_f|

    mean over the distances D from the newest token plus 1, 2, 4, ... 2^16.
    """
    real, imag = head.rope.pairs
    freq = head.rope.freq
    rotated = head.k[:, real] + 1j * head.k[:, imag]
    k = rotated * np.exp(-1j * np.asarray(head.pos)[:, None] * freq)
    mean = head.centres[:, real] + 1j * head.centres[:, imag]
    moduli = head.centres[:, head.k.shape[1] :][:, : len(freq)]
    distance = head.pos[-1] - np.asarray(head.pos)
    phase = np.angle(mean)[:, None] - np.angle(k)
    products = np.abs(mean)[:, None] * np.abs(k)
    trig = np.zeros(phase.shape[:2])
    for i in range(17):
        ahead = (distance + 2**i)[:, None] * freq
        trig += (products * np.cos(ahead + phase)).sum(axis=-1) / 17
    norm = ((moduli - np.abs(mean))[:, None] * np.abs(k)).sum(axis=-1)
    still = np.setdiff1d(np.arange(head.k.shape[1]), [*real, *imag])
    terms = products.sum(axis=-1) + np.abs(norm)
    terms = terms + np.abs(head.centres[:, still]) @ np.abs(head.k[:, still]).T
    return trig + norm + head.centres[:, still] @ head.k[:, still].T, terms


def triattention(head: Head) -> Array:
    """Maximum over the query heads of S in standard deviations from the mean over the tokens."""
    scores = trig_scores(head)[0]
    mean = scores.mean(axis=1, keepdims=True)
    deviation = scores.std(axis=1, keepdims=True)
    differ = deviation > 1e-5 * np.abs(mean)
    return np.where(differ, (scores - mean) / np.where(differ, deviation, 1.0), 0.0).max(axis=0)


def snapkv(head: Head) -> Array:
    """SnapKV (arXiv:2404.14469) at decode time, as R-KV's authors run it: ``Z = I``."""
    return _with_window(importance(head), head)


def streaming(head: Head) -> Array:
    """StreamingLLM (arXiv:2309.17453): the most recent tokens, ``Z_j = j``; sinks are forced."""
    return np.arange(head.n_kv, dtype=np.float64)


def splitmix64(x: Array) -> Array:
    """Return the output of splitmix64 (Vigna, 2015) whose state was `x`; uint64, modulo 2**64."""
    x = np.atleast_1d(x).astype(np.uint64)  # arrays wrap around in silence, scalars warn
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random(head: Head) -> Array:
    """Uniform in [0, 1): the top 24 bits of a draw by seed, layer, head, newest position, position.

    The baseline of every table; no paper. The newest position makes every compression draw afresh.
    """
    state = splitmix64(np.array([head.seed], dtype=np.uint64))
    for part in (head.il, head.ih, int(head.pos[-1])):
        state = splitmix64(state ^ np.uint64(part))
    draws = splitmix64(state ^ np.asarray(head.pos).astype(np.uint64))
    return (draws >> np.uint64(40)).astype(np.float64) / 2.0**24


#: Every policy of the library's registry, by its name there.
POLICIES = {
    "rkv": rkv,
    "rkv-ema": rkv_ema,
    "snapkv": snapkv,
    "h2o": h2o,
    "mass": mass,
    "loss": loss,
    "keydiff": keydiff,
    "triattention": triattention,
    "streaming": streaming,
    "random": random,
}

#: Numbers that a policy keeps with a token, where it is not one.
N_STATE = {"mass": 2, "loss": 2}

#: Policies that want the queries of all tokens since the last compression, not only the window's.
ALL_QUERIES = {"h2o", "loss"}


def policy_state(policy: str, head: Head, scores: Array) -> Array:
    """What a policy leaves with each token, given its own scores (not the forced ones): [n_kv]."""
    if policy == "h2o":
        return scores
    if policy in N_STATE:
        return mass_state(head)
    if policy == "rkv-ema":  # the history of a token begins when it leaves the window
        return np.concatenate([scores[: head.n_cand], head.state[head.n_cand :]])
    return head.state


def policy_score(policy: str, **head: object) -> Array:
    """Score the tokens of ``Head(**head)`` by a policy: [n_kv], higher = keep."""
    return POLICIES[policy](Head(**head))  # type: ignore[arg-type]


def must_stay(pos: Array, n_sink: int, n_window: int, n_protect: int) -> Array:
    """Tokens that no policy may evict: bool [n_kv].

    The first positions of the sequence (attention sinks, arXiv:2309.17453; or the protected prompt,
    if that is longer) and the observation window (arXiv:2505.24133), the head's newest tokens.
    """
    pos = np.asarray(pos)
    newest = np.arange(len(pos)) >= len(pos) - n_window
    return (pos < max(n_sink, n_protect)) | newest


def forced_scores(scores: Array, pos: Array, n_sink: int, n_window: int, n_protect: int) -> Array:
    """Scores, +inf for the tokens that must stay, the lowest float for other non-numbers."""
    lowest = -float(np.finfo(np.float32).max)
    finite = np.where(np.isfinite(scores), scores, lowest)
    return np.where(must_stay(pos, n_sink, n_window, n_protect), np.inf, finite)


def select_keep(scores: Array, budget: int) -> Array:
    """Keep the `budget` highest scores, the newer token among equals; NaN is lowest: bool [n_kv].

    Raises
    ------
    ValueError
        More tokens are scored +inf than the budget holds.
    """
    ranked = np.where(np.isnan(scores), -np.inf, scores)
    if np.isposinf(ranked).sum() > budget:
        raise ValueError(f"budget {budget} cannot hold the tokens that must stay")
    newer_first = np.arange(len(ranked))[::-1]
    order = np.lexsort((newer_first, -ranked))
    keep = np.zeros(len(ranked), bool)
    keep[order[:budget]] = True
    return keep
