"""Eviction policies simulated with masks in PyTorch: is the demo's task evidence?

Run as ``python -m py_reasonalloc.demo.simulate CHECKPOINT [--level 2] [--budgets 100,150]``.
Nothing is freed here: evicted tokens are masked. The engine's figures come from the engine; this
is the fast loop that tells, before any of it runs, whether eviction costs anything on this task and
where the arms spread.

Every arm protects the prompt and the last 8 tokens; both count towards the budget. A budget is the
mean number of tokens per (layer, KV head) after a compression; the peak is that plus the buffer.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .model import DemoModel, ModelConfig, rope_tables
from .problems import extract_answer, generate_problem
from .train import tokenize
from .vocab import END_ID, decode

WINDOW = 8  # observation window, tokens, always kept
POOL = 7  # max-pool kernel along the kept sequence, tokens
SIMILAR = 0.5  # cosine above which keys are look-alikes
RHO = 0.93  # share of attention mass that a demand covers
SIM_SEED = 30_000
POLICIES = (
    "full",
    "random",
    "streaming",
    "snapkv",
    "rkv",
    "pyramid-rkv",
    "heads",
    "layers",
    "reasonalloc",
)


@dataclass
class Arm:
    """One policy at one budget (tokens), with its parameters and what was counted on the way."""

    policy: str
    budget: int
    buffer: int = 16
    lam: float = 0.1
    layer_share: Tensor | None = None
    n_evicted: int = field(default=0)


def robustify(demand: Tensor, total: int, floor: float = 0.0) -> Tensor:
    """Turn demands [..., n] into whole budgets [..., n] that sum to `total` exactly.

    Power 0.5, clip to 0.25..2 times the mean, rescale (floor first), largest remainder.
    """
    d = demand.clamp_min(1e-9) ** 0.5
    d = d / d.mean(-1, keepdim=True)
    d = d.clamp(0.25, 2.0)
    share = d / d.sum(-1, keepdim=True)
    base = floor * total / demand.shape[-1]
    raw = base + share * (total - base * demand.shape[-1])
    whole = raw.floor()
    missing = total - whole.sum(-1, keepdim=True)
    rank = (raw - whole).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (whole + (rank < missing)).long()


def utility(queries: Tensor, keys: Tensor, valid: Tensor, lam: float, snap: bool) -> Tensor:
    """Score kept tokens, higher = keep.

    Parameters
    ----------
    queries : Tensor
        Last `WINDOW` queries, [B, n_head, WINDOW, d], rotated.
    keys : Tensor
        Candidate keys in order of position, [B, n_head_kv, N, d], rotated, without the window.
    valid : Tensor
        bool [B, n_head_kv, N]: False where a row is padding.
    lam : float
        Weight of importance against redundancy.
    snap : bool
        Importance only (SnapKV).

    Returns
    -------
    Tensor
        [B, n_head_kv, N].
    """
    b, h, n, d = keys.shape
    q = queries.view(b, h, -1, WINDOW, d)
    logits = torch.einsum("bhgwd,bhnd->bhgwn", q, keys) / math.sqrt(d)
    logits = logits.amax(2).masked_fill(~valid[:, :, None], -1e9)
    importance = logits.softmax(-1).mean(2)
    importance = F.max_pool1d(importance, POOL, stride=1, padding=POOL // 2)
    if snap:
        return importance
    unit = F.normalize(keys, dim=-1) * valid[..., None]
    cosine = unit @ unit.transpose(2, 3)
    cosine.diagonal(dim1=2, dim2=3).zero_()
    newest = torch.where(cosine > SIMILAR, torch.arange(n), torch.tensor(-1)).amax(-1)
    hit = F.one_hot(newest.clamp_min(0), n).bool() & (newest >= 0)[..., None]
    mean_similarity = cosine.masked_fill(hit, 0.0).sum(2) / valid.sum(-1, keepdim=True).clamp_min(1)
    redundancy = mean_similarity.masked_fill(~valid, -1e9).softmax(-1)
    return lam * importance - (1 - lam) * redundancy


class Simulator:
    """Decodes problems in lockstep, with a mask over the cache per layer, row and KV head."""

    def __init__(self, model: DemoModel) -> None:
        self.model = model
        self.config = model.config

    @torch.no_grad()
    def run(
        self, prompts: Sequence[list[int]], max_len: int, arm: Arm, seed: int = 0
    ) -> list[list[int]]:
        """Return what each row generated (ids, without the end token; unfinished rows in full).

        Parameters
        ----------
        prompts : sequence of list of int
            Prompt ids, start token first. Rows may differ in length: each is fed until its own end.
        max_len : int
            Longest sequence, prompt included (tokens).
        arm : Arm
            Policy and budget; its `n_evicted` is counted up.
        seed : int
            For random eviction.
        """
        c, n = self.config, len(prompts)
        group = c.n_head // c.n_head_kv
        self.gen = torch.Generator().manual_seed(seed)
        self.n_prompt = torch.tensor([len(p) for p in prompts])
        self.k = torch.zeros(c.n_layer, n, c.n_head_kv, max_len, c.head_dim)
        self.v = torch.zeros_like(self.k)
        self.q = torch.zeros(c.n_layer, n, c.n_head, max_len, c.head_dim)
        self.keep = torch.zeros(c.n_layer, n, c.n_head_kv, max_len, dtype=torch.bool)
        cos, sin = rope_tables(torch.arange(max_len), c.head_dim, c.rope_base)
        out: list[list[int]] = [[] for _ in prompts]
        done = torch.zeros(n, dtype=torch.bool)
        token = torch.tensor([p[0] for p in prompts])
        for t in range(max_len):
            if t and t % arm.buffer == 0 and arm.policy != "full":
                self.compress(t, arm, ~done)
            x = self.model.embed(token)[:, None]
            for il, block in enumerate(self.model.layers):
                q, k, v = block.attn.project(block.attn_norm(x), cos[t : t + 1], sin[t : t + 1])
                self.q[il, :, :, t], self.k[il, :, :, t], self.v[il, :, :, t] = (
                    q[:, :, 0],
                    k[:, :, 0],
                    v[:, :, 0],
                )
                self.keep[il, :, :, t] = True
                keys, values = self.k[il, :, :, : t + 1], self.v[il, :, :, : t + 1]
                scores = (
                    q.view(n, c.n_head_kv, group, c.head_dim)
                    @ keys.transpose(2, 3)
                    / math.sqrt(c.head_dim)
                )
                scores = scores.masked_fill(~self.keep[il, :, :, None, : t + 1], -1e9)
                x = x + block.attn.o((scores.softmax(-1) @ values).reshape(n, 1, -1))
                x = block.feed_forward(x)
            chosen = (self.model.norm(x[:, 0]) @ self.model.embed.weight.T).argmax(-1).tolist()
            for i, prompt in enumerate(prompts):
                if t + 1 < len(prompt):
                    token[i] = prompt[t + 1]
                elif not done[i]:
                    done[i] = chosen[i] == END_ID
                    token[i] = chosen[i]
                    if not done[i]:
                        out[i].append(chosen[i])
            if done.all():
                break
        return out

    def compress(self, t: int, arm: Arm, active: Tensor) -> None:
        """Evict down to the budget in every layer; `t` tokens are in the cache's time line."""
        active = active & (t >= self.n_prompt + WINDOW)
        if not active.any():
            return
        rows = active.nonzero()[:, 0]
        c = self.config
        position = torch.arange(t)
        fixed = (position[None] < self.n_prompt[rows, None]) | (position >= t - WINDOW)  # [R, t]
        n_free = (arm.budget - fixed.sum(1)).clamp_min(0)  # [R] free tokens per head, on average
        share = torch.ones(c.n_layer) / c.n_layer if arm.layer_share is None else arm.layer_share
        for il in range(c.n_layer):
            keep = self.keep[il, rows, :, :t]
            candidate = keep & ~fixed[:, None]
            count = candidate.sum(-1)
            size = int(count.max())
            if size == 0:
                continue
            order = torch.where(candidate, position, t + position).argsort(-1)[..., :size]
            valid = torch.arange(size) < count[..., None]
            score = self._score(il, rows, order, valid, t, arm).masked_fill(~valid, -1e9)
            budget = (
                (n_free * share[il] * c.n_layer).round().long()[:, None].expand(-1, c.n_head_kv)
            )
            if arm.policy in ("heads", "reasonalloc"):
                budget = self._head_budgets(score, budget[:, 0])
            rank = score.argsort(dim=-1, descending=True, stable=True).argsort(-1)
            chosen = (rank < budget[..., None]) & valid
            new = fixed[:, None].expand_as(keep) & keep
            new = new.scatter(2, order, chosen | new.gather(2, order))
            arm.n_evicted += int(keep.sum() - new.sum())
            self.keep[il, rows, :, :t] = new

    def _score(
        self, il: int, rows: Tensor, order: Tensor, valid: Tensor, t: int, arm: Arm
    ) -> Tensor:
        """Score candidates [R, n_head_kv, N] given by their positions `order`."""
        if arm.policy == "random":
            return torch.rand(order.shape, generator=self.gen)
        if arm.policy == "streaming":
            return order.float()
        index = order[..., None].expand(-1, -1, -1, self.config.head_dim)
        keys = self.k[il, rows].gather(2, index)
        queries = self.q[il, rows, :, t - WINDOW : t]
        return utility(queries, keys, valid, arm.lam, arm.policy == "snapkv")

    def _head_budgets(self, score: Tensor, layer_budget: Tensor) -> Tensor:
        """Split a layer's free tokens over its heads by pooled scores: [R, n_head_kv]."""
        out = torch.zeros(score.shape[:2], dtype=torch.long)
        for r in range(score.shape[0]):
            total = int(layer_budget[r]) * score.shape[1]
            flat = score[r].flatten().sort(descending=True).values
            tau = flat[min(total, flat.numel()) - 1] if total else math.inf
            out[r] = robustify((score[r] >= tau).sum(-1).float(), total, floor=0.25)
        return out


@torch.no_grad()
def attention_demand(model: DemoModel, level: int, n_problems: int = 8) -> Tensor:
    """Mean number of tokens that cover `RHO` of the attention mass: [n_layer, n_head].

    Taken over the gold chains of a few problems, full cache.
    """
    c = model.config
    out = torch.zeros(c.n_layer, c.n_head)
    for index in range(n_problems):
        row, n_prompt = tokenize(generate_problem(SIM_SEED + 1, index, level))
        ids = torch.tensor([row])
        cos, sin = rope_tables(torch.arange(len(row)), c.head_dim, c.rope_base)
        x = model.embed(ids)
        future = torch.ones(len(row), len(row), dtype=torch.bool).triu(1)
        for il, block in enumerate(model.layers):
            q, k, _ = block.attn.project(block.attn_norm(x), cos, sin)
            k = k.repeat_interleave(c.n_head // c.n_head_kv, 1)
            p = (
                (q @ k.transpose(2, 3) / math.sqrt(c.head_dim))
                .masked_fill(future, -1e9)
                .softmax(-1)
            )
            mass = p[0, :, n_prompt:].sort(-1, descending=True).values.cumsum(-1)
            out[il] += ((mass < RHO).sum(-1) + 1).float().mean(-1) / n_problems
            x, _ = block(x, cos, sin, None)
    return out


def layer_shares(policy: str, demand: Tensor) -> Tensor | None:
    """Share of the free tokens that each layer gets, [n_layer], summing to 1; None for equal."""
    n = demand.shape[0]
    if policy == "pyramid-rkv":
        slope = torch.linspace(1.5, 0.5, n)
        return slope / slope.sum()
    if policy in ("layers", "reasonalloc"):
        return robustify(demand.mean(-1), 10_000) / 10_000
    return None


def load(checkpoint: Path) -> DemoModel:
    """Load a checkpoint written by `train`."""
    state = torch.load(checkpoint, weights_only=True)
    model = DemoModel(ModelConfig(**state["config"]))
    model.load_state_dict(state["model"])
    return model.eval()


def simulate(
    model: DemoModel,
    level: int,
    arms: Sequence[tuple[str, int]],
    n_problems: int,
    lam: float,
    buffer: int,
) -> list[dict[str, object]]:
    """Run arms (policy, budget) on fresh problems; prints and returns one row each."""
    problems = [generate_problem(SIM_SEED, i, level) for i in range(n_problems)]
    tokenized = [tokenize(p) for p in problems]
    prompts = [ids[:n] for ids, n in tokenized]
    max_len = int(1.25 * max(len(ids) for ids, _ in tokenized))
    demand = attention_demand(model, level)
    print(
        "demand per layer (tokens for 93% of the mass):",
        [round(x, 1) for x in demand.mean(-1).tolist()],
    )
    print("demand per head:", [[round(x) for x in layer] for layer in demand.tolist()])
    mean_len = sum(len(ids) for ids, _ in tokenized) / n_problems
    mean_prompt = sum(map(len, prompts)) / n_problems
    print(f"level {level}: mean length {mean_len:.0f} with prompt {mean_prompt:.0f}")
    rows: list[dict[str, object]] = []
    for policy, budget in arms:
        arm = Arm(policy, budget, buffer, lam, layer_shares(policy, demand))
        start = time.time()
        outputs = Simulator(model).run(prompts, max_len, arm)
        texts = [decode(ids) for ids in outputs]
        rows.append(
            {
                "policy": policy,
                "budget": budget,
                "right": sum(extract_answer(x) == p.answer for x, p in zip(texts, problems)),
                "exact": sum(x == p.chain for x, p in zip(texts, problems)),
                "of": n_problems,
                "tokens": round(sum(map(len, outputs)) / n_problems),
                "no_answer": sum(extract_answer(x) is None for x in texts),
                "evicted_per_head": round(
                    arm.n_evicted / n_problems / demand.shape[0] / model.config.n_head_kv, 1
                ),
                "seconds": round(time.time() - start),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Parse the command line and run a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--level", type=int, default=2)
    parser.add_argument("--budgets", default="90,110,130,160,200")
    parser.add_argument("--policies", default=",".join(POLICIES[1:]))
    parser.add_argument("--problems", type=int, default=24)
    parser.add_argument("--lam", type=float, default=0.1)
    parser.add_argument("--buffer", type=int, default=16)
    args = parser.parse_args()
    torch.set_num_threads(1)
    arms = [("full", 0)]
    arms += [(p, int(b)) for b in args.budgets.split(",") for p in args.policies.split(",")]
    simulate(load(args.checkpoint), args.level, arms, args.problems, args.lam, args.buffer)


if __name__ == "__main__":
    main()
