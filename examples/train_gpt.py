"""Train a small character-level GPT on the bundled text, with this library's attention or with torch's.

    python examples/train_gpt.py --attention ours
    python examples/train_gpt.py --attention torch --steps 100 --seqlen 1024

The same seed gives the same weights and the same batches, so the two loss curves differ by rounding only.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from flash_attn_c import attention
from torch import Tensor, nn
from tqdm import tqdm

TEXT = Path(__file__).parent / "data" / "king_james.txt"

# Sizes that fit the device: the CPU column trains in about a minute on two cores.
DEFAULTS = {
    "cpu": dict(steps=250, batch=4, seqlen=512, layers=4, heads=4, dim=128),
    "cuda": dict(steps=600, batch=16, seqlen=1024, layers=6, heads=6, dim=384),
}


def attend_with_ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, causal=True)


def attend_with_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


ATTENTION = {"ours": attend_with_ours, "torch": attend_with_torch}


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, attend) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.project = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)  # each (batch, seqlen, heads, head dim)
        x = x + self.project(self.attend(q, k, v).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, vocabulary: int, seqlen: int, layers: int, heads: int, dim: int, attend) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, dim), nn.Embedding(seqlen, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, attend) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary, bias=False)
        self.apply(self.initialise)

    @staticmethod
    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Text:
    """The text as numbers: the last twentieth is held out for validation."""

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        self.letters = sorted(set(text))
        number = {letter: n for n, letter in enumerate(self.letters)}
        tokens = torch.tensor([number[letter] for letter in text])
        cut = len(tokens) * 19 // 20
        self.train, self.held_out = tokens[:cut], tokens[cut:]

    def batch(self, generator: torch.Generator, batch: int, seqlen: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(self.train) - seqlen - 1, (batch,), generator=generator)
        rows = torch.stack([self.train[s : s + seqlen + 1] for s in starts.tolist()])
        return rows[:, :-1], rows[:, 1:]

    def validation(self, seqlen: int, rows: int = 16) -> tuple[Tensor, Tensor]:
        rows = min(rows, (len(self.held_out) - 1) // seqlen)
        inputs = self.held_out[: rows * seqlen].view(rows, seqlen)
        return inputs, self.held_out[1 : rows * seqlen + 1].view(rows, seqlen)


def loss_of(model: GPT, tokens: Tensor, targets: Tensor, device: str) -> Tensor:
    """Mean cross entropy a character, in nats. bfloat16 autocast on a GPU, float32 on a CPU."""
    with torch.autocast("cuda", torch.bfloat16, enabled=device == "cuda"):
        logits = model(tokens.to(device))
    return F.cross_entropy(logits.float().flatten(0, 1), targets.to(device).flatten())


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def train(options: argparse.Namespace) -> dict:
    device = options.device
    torch.manual_seed(options.seed)
    text = Text(TEXT)
    memory_before = resident_bytes() if device == "cpu" else 0
    model = GPT(len(text.letters), options.seqlen, options.layers, options.heads, options.dim, ATTENTION[options.attention]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(options.seed)

    losses, seconds = [], []
    bar = tqdm(range(options.steps), desc=f"attention = {options.attention:<5}", unit="step", mininterval=0.5)
    for _ in bar:
        begin = time.perf_counter()
        loss = loss_of(model, *text.batch(generator, options.batch, options.seqlen), device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - begin)
        bar.set_postfix_str(f"loss {losses[-1]:.3f}")
    peak = peak_bytes(device) - memory_before
    with torch.no_grad():
        held_out = loss_of(model, *text.validation(options.seqlen), device).item()

    tail = losses[-max(1, options.steps // 10) :]
    return {
        "attention": options.attention,
        "losses": losses,
        "training_loss": sum(tail) / len(tail),
        "validation_loss": held_out,
        "tokens_per_second": options.batch * options.seqlen / sorted(seconds)[len(seconds) // 2],
        "peak_bytes": peak,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_per_step": options.batch * options.seqlen,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--attention", choices=sorted(ATTENTION), default="ours")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    for name in DEFAULTS["cpu"]:
        parser.add_argument(f"--{name}", type=int, help=f"{DEFAULTS['cpu'][name]} on a CPU, {DEFAULTS['cuda'][name]} on a GPU")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the result, with every step's loss, to this file")
    options = parser.parse_args(arguments)
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("steps", "batch", "seqlen", "layers", "heads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: {getattr(options, name)} must be at least 1")
    if options.dim % options.heads:
        parser.error(f"--dim: {options.dim} must be a multiple of --heads, {options.heads}")
    return options


def main() -> None:
    options = parse()
    result = train(options)
    if options.json:
        options.json.write_text(json.dumps(result))
    print(
        f"attention = {result['attention']}: training loss {result['training_loss']:.3f}, validation loss {result['validation_loss']:.3f}, "
        f"{result['tokens_per_second']:,.0f} tokens/s, peak memory {result['peak_bytes'] / 2**20:,.0f} MiB"
    )


if __name__ == "__main__":
    main()
