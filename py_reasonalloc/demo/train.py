"""Train the demo reasoner, export it, and measure it: ``python -m py_reasonalloc.demo.train``.

Needs ``torch``, ``numpy`` and ``gguf`` (see MODEL_CARD.md). Two one-thread data-parallel
processes; the schedule is a share of the wall-clock budget, so a slow machine sees fewer tokens and
takes no longer.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..task.problems import (
    MAX_STEPS,
    MAX_VALUE,
    NAMES,
    NUMBERS,
    TRAIN_SEED_BASE,
    Problem,
    generate_problem,
)
from ..task.vocab import BOS_ID, END_ID, N_VOCAB, encode, token_id
from .model import DemoModel, KeyDropout, ModelConfig

#: Loss weight of the token after these: sums, lookups, names, signs; 1 after all others.
_WEIGHT_AFTER = (
    (" makes", 6.0),
    (" is", 3.0),
    (",", 3.0),
    (" gives", 2.0),
    (" and", 2.0),
    (":", 2.0),
    ("So", 2.0),
    *((" " + name, 2.0) for name in NAMES),
)
#: Share of the batches that get a row of drill.
_DRILL_SHARE = 0.5
_MAKES = token_id(" makes")
_POOL_ROWS = 384
_N_PROBES = 24


def tokenize(problem: Problem) -> tuple[list[int], int]:
    """Return the full token sequence of a problem and the length of its prompt part (tokens)."""
    prompt = [BOS_ID, *encode(problem.chat_prompt)]
    return [*prompt, *encode(problem.chain), END_ID], len(prompt)


def drill(gen: torch.Generator, n_lines: int) -> tuple[list[int], int]:
    """Return a row of sums without a story, and 0 for its prompt length: practice in arithmetic.

    Only the results count in the loss: see `make_batch`.
    """
    text = ""
    for _ in range(n_lines):
        low, high = sorted(torch.randint(0, MAX_VALUE + 1, (2,), generator=gen).tolist())
        result, part, whole = NUMBERS[high - low], NUMBERS[low], NUMBERS[high]
        if torch.rand(1, generator=gen) < 0.5:
            text += f"So {whole} minus {part} makes {result}.\n"
        else:
            text += f"So {result} plus {part} makes {whole}.\n"
    return [BOS_ID, *encode(text)], 0


def step_range(progress: float) -> tuple[int, int]:
    """Curriculum: fewest and most lines of a problem at a share of the training time."""
    for until, low, high in ((0.08, 1, 3), (0.18, 1, 5), (0.32, 2, 8)):
        if progress < until:
            return low, high
    return 3, MAX_STEPS


def learning_rate(progress: float, step: int, peak: float) -> float:
    """Warm up over 20 steps, hold, then decay linearly to 2% over the last 55% of the time."""
    decay = 1.0 if progress < 0.45 else max(0.02, 1.0 - (progress - 0.45) / 0.55)
    return peak * min(1.0, (step + 1) / 20) * decay


def make_batch(rows: list[tuple[list[int], int]], weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pad rows; return inputs and targets, int64 [B, T], and target weights, float32 [B, T]."""
    length = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), length), END_ID, dtype=torch.int64)
    mask = torch.zeros(len(rows), length)
    for i, (row, n_prompt) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, n_prompt : len(row)] = 1.0
        if n_prompt == 0:
            mask[i, 1:] = (ids[i, :-1] == _MAKES).float()
    inputs, targets = ids[:, :-1], ids[:, 1:]
    return inputs, targets, mask[:, 1:] * weights[inputs]


def batches(
    seed: int, rank: int, batch_tokens: int, progress: list[float]
) -> Iterator[list[tuple[list[int], int]]]:
    """Yield batches of rows of like length, about `batch_tokens` tokens each, in random order.

    ``progress[0]`` is read anew for each pool, so that the curriculum follows the clock.
    """
    gen = torch.Generator().manual_seed(seed * 1000 + rank)
    index = 0
    while True:
        low, high = step_range(progress[0])
        counts = torch.randint(low, high + 1, (_POOL_ROWS // (high // 3 + 1),), generator=gen)
        rows = []
        for n_steps in counts.tolist():
            problem = generate_problem(TRAIN_SEED_BASE + seed * 1000 + rank, index, n_steps=n_steps)
            rows.append(tokenize(problem))
            index += 1
        rows.sort(key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], int]]] = [[]]
        for row in rows:
            if (len(groups[-1]) + 1) * len(row[0]) > batch_tokens and groups[-1]:
                groups.append([])
            groups[-1].append(row)
        for i in torch.randperm(len(groups), generator=gen).tolist():
            n_lines = len(groups[i][-1][0]) // 7
            has_drill = torch.rand(1, generator=gen).item() < _DRILL_SHARE
            yield [*groups[i], drill(gen, n_lines)] if has_drill else groups[i]


@torch.no_grad()
def exactness(model: DemoModel, n_problems: int = 24) -> dict[str, float]:
    """Share of fresh problems whose whole chain is the arg-max chain, and the share of tokens.

    The chain is deterministic, so one teacher-forced pass tells whether greedy decoding is exact.
    """
    out: dict[str, float] = {}
    for level in (1, 2, 3):
        rows = [tokenize(generate_problem(900, i, level)) for i in range(n_problems)]
        inputs, targets, mask = make_batch(rows, torch.ones(N_VOCAB))
        right = (model(inputs)[0].argmax(-1) == targets) | (mask == 0)
        out[f"exact{level}"] = right.all(1).float().mean().item()
        out[f"tok{level}"] = (right & (mask > 0)).sum().item() / mask.sum().item()
    return out


def draw_key_dropout(
    rows: list[tuple[list[int], int]], most: float, gen: torch.Generator
) -> KeyDropout:
    """Draw a dropout of keys for a batch: none in half of the rows, up to `most` in the others."""
    n = len(rows)
    rate = (2 * most * (torch.rand(n, generator=gen) - 0.5)).clamp_min(0.0)
    delay = torch.randint(12, 48, (n,), generator=gen)
    return KeyDropout(torch.tensor([n_prompt for _, n_prompt in rows]), rate, delay, gen)


def average_gradients(model: DemoModel, n_ranks: int) -> None:
    """Average the gradients over all processes, in place."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    offset = 0
    for g in grads:
        g.copy_(flat[offset : offset + g.numel()].view_as(g) / n_ranks)
        offset += g.numel()


def worker(rank: int, args: argparse.Namespace) -> None:
    """Run one training process; rank 0 logs, saves and decides when time is up."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{args.out}/rendezvous", rank=rank, world_size=args.ranks
    )
    config = ModelConfig(n_vocab=N_VOCAB)
    model = DemoModel(config)
    model.init_weights(args.seed)
    if args.resume:
        model.load_state_dict(torch.load(args.resume, weights_only=True)["model"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    weights = torch.ones(N_VOCAB)
    for text, weight in _WEIGHT_AFTER:
        weights[token_id(text)] = weight
    probe_gen = torch.Generator().manual_seed(args.seed + 7)
    hide_gen = torch.Generator().manual_seed(args.seed * 1000 + rank + 500_000)
    progress = [args.start_progress]
    feed = batches(args.seed, rank, args.batch_tokens, progress)
    start, tokens, last_log, last_save = time.time(), 0, 0.0, time.time()
    step, span = 0, 1.0 - args.start_progress
    while progress[0] < 1.0:
        rows = next(feed)
        inputs, targets, w = make_batch(rows, weights)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress[0], step, args.lr)
        # Late: a head made to choose before it knows its candidates goes to rest for good.
        focus = args.focus * min(1.0, max(0.0, (progress[0] - 0.6) / 0.1))
        probes = torch.randint(8, inputs.shape[1], (_N_PROBES,), generator=probe_gen)
        # Late: lookups must have formed before their keys may go missing.
        has_gaps = args.key_dropout > 0 and progress[0] >= 0.4
        hide = draw_key_dropout(rows, args.key_dropout, hide_gen) if has_gaps else None
        logits, entropy = model(inputs, probes, hide)
        ce = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (ce * w.flatten()).sum() / w.sum()
        assert entropy is not None
        (loss + focus * entropy).backward()
        average_gradients(model, args.ranks)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, tokens = step + 1, tokens + inputs.numel() * args.ranks
        clock = torch.tensor([time.time() - start])
        dist.broadcast(clock, 0)
        elapsed = clock.item()
        progress[0] = args.start_progress + span * elapsed / (60 * args.minutes)
        if rank == 0 and (elapsed - last_log > 60 or progress[0] >= 1.0):
            last_log = elapsed
            scores = " ".join(f"{k} {v:.3f}" for k, v in exactness(model).items())
            print(
                f"{elapsed / 60:5.1f} min step {step} tokens {tokens / 1e6:.2f}M "
                f"loss {loss.item():.4f} entropy {entropy.item():.2f} {scores}",
                flush=True,
            )
        if rank == 0 and (time.time() - last_save > 120 or progress[0] >= 1.0):
            last_save = time.time()
            state = {
                "model": model.state_dict(),
                "config": config.to_dict(),
                "tokens": tokens,
                "seconds": elapsed,
            }
            torch.save(state, args.out / "checkpoint.tmp")
            os.replace(args.out / "checkpoint.tmp", args.out / "checkpoint.pt")
    dist.barrier()  # a process that leaves while another still saves takes it down
    dist.destroy_process_group()


def main() -> None:
    """Parse the command line, train, export, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="folder for checkpoints and files"
    )
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="wall-clock budget of the training"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument(
        "--batch-tokens", type=int, default=1300, help="tokens per process and step"
    )
    parser.add_argument(
        "--focus", type=float, default=0.0, help="weight of the attention entropy (nats)"
    )
    parser.add_argument(
        "--key-dropout",
        type=float,
        default=0.4,
        help="largest share of a row's keys that go missing in a head",
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--resume", type=Path, help="checkpoint to start from")
    parser.add_argument(
        "--start-progress", type=float, default=0.0, help="where in the schedule to start, 0..1"
    )
    parser.add_argument("--train-only", action="store_true", help="skip export and evaluation")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "rendezvous").unlink(missing_ok=True)
    args.out = args.out.resolve()
    # Keep freed tensors in the heap: worth 15% on a CPU. Read by the processes spawned below.
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", "8589934592")
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "8589934592")
    torch.multiprocessing.spawn(worker, args=(args,), nprocs=args.ranks)
    if not args.train_only:
        from .evaluate import evaluate_all
        from .export import export_all

        export_all(args.out / "checkpoint.pt", args.out)
        evaluate_all(args.out)


if __name__ == "__main__":
    main()
