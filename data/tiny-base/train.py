"""Train the demo model: a small Llama with a native window of 256 tokens, on public-domain text.

What it makes: a stock Hugging Face checkpoint (2.7M parameters, BF16, under 6 MB with its tokenizer) that
reads prose, copies, and retrieves a number inside its window, so that extending the window has something
to extend. It reads `pretrain.jsonl.gz` only, which keeps the demo's measurements clean.

How to run it (about 2.5 core-hours)::

    python data/public-domain/prepare.py
    python data/tiny-base/train.py --documents data/public-domain --out data/tiny-base

A row is 256 tokens: three in four are plain prose; the others hold a number to be remembered, or a passage
that comes again, because a model this small learns to look back only if the text rewards it.
"""

import argparse
import gzip
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WINDOW = 256
VOCABULARY = 2048
END = "<|endoftext|>"
THINGS = [
    "garden",
    "river",
    "tower",
    "castle",
    "market",
    "letter",
    "ship",
    "bridge",
    "church",
    "forest",
    "kitchen",
    "window",
    "horse",
    "table",
]


def read_documents(path: Path) -> list[str]:
    """The texts of a `.jsonl.gz`."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits stay single tokens, so that a five-digit number is always five tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text[:400_000] for text in texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, model_max_length=WINDOW)


def number_sentences(rng: random.Random) -> tuple[str, str]:
    """A sentence that states a number and a later one that asks for it and answers."""
    number = " ".join(["", *(str(rng.randrange(10)) for _ in range(5))]).replace(" ", "")
    if rng.random() < 0.5:
        return (
            f" The pass key is {number}. Remember it. {number} is the pass key. ",
            f" What is the pass key? The pass key is {number}.",
        )
    thing = rng.choice(THINGS)
    return (
        f" The number of the {thing} is {number}. ",
        f" What is the number of the {thing}? The number of the {thing} is {number}.",
    )


class Rows:
    """Random rows of `WINDOW + 1` tokens; each kind is drawn by its own method."""

    def __init__(self, stream: torch.Tensor, encode: Callable[[str], list[int]], seed: int) -> None:
        self.stream, self.encode, self.rng = stream, encode, random.Random(seed)

    def prose(self, length: int = WINDOW + 1) -> list[int]:
        """A span of the documents."""
        start = self.rng.randrange(len(self.stream) - length)
        return self.stream[start : start + length].tolist()

    def number(self) -> list[int]:
        """Prose with one or two numbers stated at random depths and asked for at the end."""
        pairs = [number_sentences(self.rng) for _ in range(self.rng.choice([1, 1, 2]))]
        question = self.encode(pairs[0][1])
        row = self.prose(WINDOW + 1 - len(question) - sum(len(self.encode(s)) for s, _ in pairs))
        for statement, _ in pairs:
            at = self.rng.randrange(len(row) + 1)
            row[at:at] = self.encode(statement)
        return row + question

    def repeat(self) -> list[int]:
        """A passage (or random tokens, one time in four), other prose, and the passage again."""
        length = self.rng.randint(16, 100)
        if self.rng.random() < 0.25:
            passage = [self.rng.randrange(1, VOCABULARY) for _ in range(length)]
        else:
            passage = self.prose(length)
        between = self.prose(self.rng.randint(1, WINDOW + 1 - 2 * length))
        row = passage + between + passage
        return row + self.prose(WINDOW + 1 - len(row)) if len(row) < WINDOW + 1 else row

    def batch(self, rows: int) -> torch.Tensor:
        """`rows` rows, `[rows, WINDOW + 1]`: 70% prose, 15% numbers, 15% repeats."""
        kinds = self.rng.choices([self.prose, self.number, self.repeat], weights=[70, 15, 15], k=rows)
        return torch.tensor([kind() for kind in kinds])


def make_model(seed: int) -> LlamaForCausalLM:
    """The architecture. Heads of 64, because every serving engine's CPU kernels take that size."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    return [
        torch.optim.Muon(inner, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_at(step: int, steps: int) -> float:
    """Share of the peak learning rate: 2% warm-up, flat, then linear to zero over the last 40%."""
    return min(1.0, (step + 1) / (0.02 * steps), (steps - step) / (0.4 * steps))


def learn(model: LlamaForCausalLM, rows: Rows, steps: int, batch_rows: int, rate: float) -> Iterator[str]:
    """Train in FP32 with BF16 products, yielding a line of progress now and then."""
    chain = optimizers(model, rate)
    body = torch.compile(model.model)
    model.train()
    begun, losses = time.monotonic(), []
    for step in range(steps):
        for optimizer in chain:
            for group in optimizer.param_groups:
                group["lr"] = rate * rate_at(step, steps)
        batch = rows.batch(batch_rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = body(input_ids=batch[:, :-1]).last_hidden_state
            logits = F.linear(hidden, model.model.embed_tokens.weight)
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chain:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 49:
            tokens = (step + 1) * batch_rows * WINDOW
            speed = tokens / (time.monotonic() - begun)
            yield f"step {step + 1}/{steps} loss {sum(losses[-50:]) / 50:.4f} {speed:.0f} tokens/s"


@torch.no_grad()
def measure(model: LlamaForCausalLM, rows: Rows) -> dict[str, object]:
    """Held-out prose by position, and the share of numbers retrieved inside the window."""
    model.eval()
    batch = torch.tensor([rows.prose() for _ in range(256)])
    nats = torch.cat(
        [
            F.cross_entropy(model(part[:, :-1]).logits.transpose(1, 2), part[:, 1:], reduction="none")
            for part in batch.split(32)
        ]
    )
    edges = [0, 16, 32, 64, 128, 192, 256]
    by_position = {
        f"{low}-{high}": round(nats[:, low:high].mean().item(), 4) for low, high in zip(edges, edges[1:], strict=False)
    }
    # The last six targets of a number row are the five digits and the full stop.
    numbers = torch.tensor([rows.number() for _ in range(256)])
    right = (model(numbers[:, :-1]).logits[:, -6:-1].argmax(-1) == numbers[:, -6:-1]).all(-1)
    return {
        "nll": round(nats.mean().item(), 4),
        "nll_by_position": by_position,
        "numbers_retrieved": round(right.float().mean().item(), 4),
    }


def main() -> None:
    """Tokenize, train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--documents", type=Path, required=True, help="folder with pretrain.jsonl.gz and heldout.jsonl.gz"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--tokens", type=float, default=36e6, help="training tokens")
    parser.add_argument("--batch-rows", type=int, default=32, help="rows of 256 tokens a step")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    texts = read_documents(arguments.documents / "pretrain.jsonl.gz")
    tokenizer = train_tokenizer(texts)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def rows_of(split: str, seed: int) -> Rows:
        ids = [[*encode(text), 0] for text in read_documents(arguments.documents / f"{split}.jsonl.gz")]
        return Rows(torch.tensor([i for document in ids for i in document]), encode, seed)

    rows = rows_of("pretrain", arguments.seed)
    model = make_model(arguments.seed)
    steps = math.ceil(arguments.tokens / (arguments.batch_rows * WINDOW))
    print(f"{model.num_parameters() / 1e6:.2f}M parameters, {len(rows.stream) / 1e6:.2f}M tokens of text")
    for line in learn(model, rows, steps, arguments.batch_rows, arguments.rate):
        print(line, flush=True)

    model.to(torch.bfloat16).config.use_cache = True
    model.generation_config.use_cache = True
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    reloaded = LlamaForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    measured = measure(reloaded, rows_of("heldout", 1))
    (arguments.out / "measured.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
