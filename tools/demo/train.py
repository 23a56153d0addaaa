"""Train the demo model: ``python -m tools.demo.train --work DIR``. Resumes from the last checkpoint in DIR."""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ktx import demo
from tools.demo import corpus, tokenizer
from tools.demo.model import Trainee, config, fake_quantize

MTP_INTERVAL, MTP_WEIGHT = 3, 0.3  # the MTP layer is trained every third step, with this weight of its loss
QUESTION_WEIGHT = (
    0.1  # of the loss on the tokens of questions: low, but above 0, so that the model also learns how users ask
)


@dataclass
class Data:
    """Training data: the token stream of the text and the questions, from which rows are sampled."""

    text: torch.Tensor
    items: list[demo.Question]
    encode: Any
    rng: random.Random
    thinking: float = 0.1  # fraction of conversations with reasoning

    def sample_text_row(self, length: int) -> tuple[list[int], list[float]]:
        """Samples a row of text: token ids and target weights."""
        start = self.rng.randrange(len(self.text) - length)
        return [tokenizer.BOS, *self.text[start : start + length - 1].tolist()], [1.0] * length

    def sample_questions(self, turns: int) -> list[demo.Question]:
        """Samples the questions of a conversation: mostly about ktx, some greetings, some that it cannot answer."""
        ktx = [item for item in self.items if item.kind == "ktx"]
        other = [item for item in self.items if item.kind != "ktx"]
        fallback = [item for item in other if item.kind == "fallback"]
        pools = self.rng.choices([ktx, other, fallback], [0.75, 0.12, 0.13], k=turns)
        return [self.rng.choice(pool) for pool in pools]

    def sample_chat(self, turns: int) -> tuple[list[int], list[float]]:
        """Samples a conversation: token ids and target weights.

        The weights make the model learn the answers and the end of an answer, and hardly the questions.
        """
        ids, weight = [tokenizer.BOS], [0.0]
        role_tokens = {"system": 3, "user": 4, "assistant": 5}
        think = self.rng.random() < self.thinking
        for message in corpus.sample_conversation(self.sample_questions(1 if think else turns), self.rng, think):
            text_ids, is_answer = self.encode(message["content"]), message["role"] == "assistant"
            ids += [role_tokens[message["role"]], *text_ids] + [tokenizer.EOS] * is_answer
            weight += [0.0] + [1.0 if is_answer else QUESTION_WEIGHT] * len(text_ids) + [1.0] * is_answer
        if tokenizer.OPEN_THINK in ids:
            weight[ids.index(tokenizer.OPEN_THINK)] = 0.0  # the user forces reasoning, the model never starts it
        return ids, weight

    def sample_chat_row(self, length: int) -> tuple[list[int], list[float]]:
        """Samples a row of conversations, as many as fill it: token ids and target weights.

        Short rows have conversations of up to four turns. Long rows have up to 40, so that the model also answers at
        the end of a long context.
        """
        ids: list[int] = []
        weight: list[float] = []
        while len(ids) < length:
            conversation = self.sample_chat(
                self.rng.randint(8, 40) if length >= 1024 else self.rng.choice([1, 1, 1, 2, 3, 4])
            )
            ids, weight = ids + conversation[0], weight + conversation[1]
        return ids[:length], weight[:length]

    def sample_batch(self, rows: int, length: int, chats: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples ids and target weights, both [rows, length]; on average a fraction ``chats`` are conversations."""
        num_chats = int(rows * chats + self.rng.random())
        samples = [
            self.sample_chat_row(length) if row < num_chats else self.sample_text_row(length) for row in range(rows)
        ]
        return torch.tensor([ids for ids, _ in samples]), torch.tensor([weight for _, weight in samples])


def prepare(work: Path, seed: int, thinking: float = 0.1) -> Data:
    """Prepares text, held-out file and tokenizer; a resumed run uses the tokenizer that it started with.

    The tokenizer sees questions and answers five times, so that their words weigh more in its merges.

    Args:
        work: the folder of text, tokenizer and checkpoint.
        seed: seed of the sampling of rows.
        thinking: fraction of conversations with reasoning.
    """
    train, heldout = corpus.split_heldout(corpus.parse_entries(corpus.fetch(work)))
    demo.heldout().write_text("\n\n".join(heldout) + "\n", encoding="utf-8")
    items = demo.questions()
    dialogues = [f"{wording}\n{item.answer}" for item in items for wording in (item.question, *item.also)]
    bpe = tokenizer.load(work) or tokenizer.train([*train, *dialogues * 5, *corpus.THOUGHTS.values(), *corpus.SYSTEMS])
    for folder in (work, demo.path()):
        tokenizer.save(bpe, folder, config().max_position_embeddings)

    def encode(text: str) -> list[int]:
        return bpe.encode(text, add_special_tokens=False).ids

    stream = torch.tensor([token for entry in train for token in encode(entry + "\n\n")])
    return Data(stream, items, encode, random.Random(seed), thinking)


def decayed_rate(progress: float, peak: float) -> float:
    """Returns ``peak`` decayed after a fraction ``progress`` of the run: a short warm-up, then a cosine down to 3 %."""
    return peak * min(1.0, progress / 0.02 + 1e-3) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))


def chat_fraction(progress: float) -> float:
    """Returns the fraction of conversations in a batch, which grows during the run."""
    return 0.25 if progress < 0.5 else 0.5 if progress < 0.75 else 0.75


def batch_shape(progress: float, step: int, tokens: int) -> tuple[int, int]:
    """Returns (rows, length) of a batch: short rows first, because attention is expensive, full contexts later."""
    length = 256 if progress < 0.6 else 512 if step % 8 else 2048
    return max(1, tokens // length), length


def uses_fake_quantization(progress: float, step: int) -> bool:
    """Returns whether a step uses fake-quantized matrices: every second step late in the run, all at its end."""
    return progress > 0.93 or (progress > 0.7 and step % 2 == 0)


class FakeQuantized:
    """Context in which every matrix is fake-quantized to 4 bits, so that the model learns to tolerate it.

    The gradients are applied to the exact weights (straight-through estimator).

    Args:
        net: the network.
        active: whether weights are changed at all.
    """

    def __init__(self, net: Trainee, active: bool) -> None:
        self.weights = [value for value in net.parameters() if value.dim() > 1] if active else []

    def __enter__(self) -> None:
        self.exact = [value.data for value in self.weights]
        for value in self.weights:
            value.data = fake_quantize(value.data)

    def __exit__(self, *_: object) -> None:
        for value, exact in zip(self.weights, self.exact, strict=True):
            value.data = exact


def make_optimizer(net: Trainee) -> torch.optim.Optimizer:
    """Returns AdamW, without weight decay for norms and biases."""
    matrices = [value for value in net.parameters() if value.dim() > 1]
    vectors = [value for value in net.parameters() if value.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)


def train_steps(
    args: argparse.Namespace, data: Data, net: Trainee, device: str, first: int, adam: Any
) -> Iterator[tuple[int, dict[str, float]]]:
    """Runs the training; yields each step and its measurements.

    The loss of the MTP layer is added in every MTP_INTERVAL-th step, with MTP_WEIGHT.

    Args:
        args: the command line.
        data: the training data.
        net: the network, on `device`.
        device: "cpu" or "cuda".
        first: the first step, above 0 for a resumed run.
        adam: the optimizer.
    """
    for step in range(first, args.steps):
        progress = step / args.steps
        for group in adam.param_groups:
            group["lr"] = decayed_rate(progress, args.lr)
        ids, weight = (
            part.to(device)
            for part in data.sample_batch(*batch_shape(progress, step, args.tokens), chat_fraction(progress))
        )
        with FakeQuantized(net, uses_fake_quantization(progress, step)), torch.autocast(device, torch.bfloat16):
            main, mtp = net.losses(ids, weight, with_mtp=step % MTP_INTERVAL == 0)
            (main + MTP_WEIGHT * mtp).backward()
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        overload = net.balance(decayed_rate(progress, args.balance))
        yield step, {"loss": main.item(), "mtp": mtp.item(), "norm": float(norm), "overload": overload}


def save(file: Path, step: int, net: Trainee, adam: Any) -> None:
    """Writes a checkpoint atomically."""
    torch.save({"step": step, "net": net.state_dict(), "adam": adam.state_dict()}, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def run(args: argparse.Namespace) -> Trainee:
    """Trains from the last checkpoint, or from random weights, and returns the network.

    It prints measurements every `--report` steps and writes a checkpoint every `--every` steps. A resumed run samples
    other rows, because its seed includes the step.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    net = Trainee(config()).to(device)
    adam, first, file = make_optimizer(net), 0, args.work / "checkpoint.pt"
    if file.exists():
        state = torch.load(file, map_location=device)
        net.load_state_dict(state["net"])
        adam.load_state_dict(state["adam"])
        first = state["step"]
    data = prepare(args.work, args.seed + first, args.thinking)
    num_params = sum(value.numel() for value in net.parameters())
    print(
        f"{num_params:,} parameters, {len(data.text):,} tokens of text, {len(data.items)} questions, from step {first}"
    )
    net.train()
    start_s = time.monotonic()
    latest: dict[str, float] = {}
    for step, values in train_steps(args, data, net, device, first, adam):
        latest |= {key: value for key, value in values.items() if value} | {"_": step}
        if step % args.report == 0:
            measurements = "  ".join(f"{key} {value:.3f}" for key, value in latest.items() if key != "_")
            speed = (step - first + 1) * args.tokens / (time.monotonic() - start_s)
            print(f"step {step}/{args.steps}  {measurements}  {speed:.0f} tokens/s", flush=True)
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            save(file, step + 1, net, adam)
    return net


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    arguments = argparse.ArgumentParser(prog="python -m tools.demo.train", description=__doc__)
    arguments.add_argument(
        "--work", type=Path, default=Path("build/demo"), help="folder of text and checkpoint (default: %(default)s)"
    )
    arguments.add_argument("--steps", type=int, default=3000, help="optimizer steps (default: %(default)s)")
    arguments.add_argument("--tokens", type=int, default=2048, help="tokens per step (default: %(default)s)")
    arguments.add_argument("--lr", type=float, default=2.5e-3, help="peak learning rate (default: %(default)s)")
    arguments.add_argument(
        "--balance", type=float, default=1e-2, help="initial step size of the router bias (default: %(default)s)"
    )
    arguments.add_argument(
        "--thinking", type=float, default=0.1, help="fraction of conversations with reasoning (default: %(default)s)"
    )
    arguments.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    arguments.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    arguments.add_argument("--report", type=int, default=20, help="print every N steps (default: %(default)s)")
    arguments.add_argument(
        "--every", type=int, default=200, help="write a checkpoint every N steps (default: %(default)s)"
    )
    return arguments


if __name__ == "__main__":
    run(make_parser().parse_args())
