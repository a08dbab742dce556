"""Trains the demo model and its two companions: `python -m examples.train_demo.train FOLDER`, from a clone.

Takes about a quarter of an hour on one H100. Interrupted, or stopped by --minutes, it goes on from its last
checkpoint when the same command is given again, with the batches that it would have had.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.train_demo.data import CONTEXT, batch, train_tokenizer
from examples.train_demo.model import DRAFT, MAIN, Eagle, Model, compile_layers, save_model

DRAFT_VOCAB = 2048  # the tokens that the draft head can propose
DRAFTS = 4  # how far ahead the draft head is trained to look
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Run:
    folder: Path
    seed: int
    rows: int
    workers: int
    deadline: float

    def batches(self, stage: str, steps: range) -> Iterable[Tensor]:
        """Tokens, targets and documents, [3, rows, length]; the seed, the stage and the step say which."""
        seeds = [f"{self.seed} {stage} {step}" for step in steps]
        write = partial(batch, self.folder, rows=self.rows)
        loader = DataLoader(seeds, None, collate_fn=write, num_workers=self.workers, prefetch_factor=4)
        return (torch.from_numpy(arrays).to(DEVICE).long() for arrays in loader)


def ready(module):
    """On the device, and compiled if that is a GPU."""
    if DEVICE == "cuda":
        compile_layers(module)
    return module.to(DEVICE)


def optimizers(module: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (github.com/KellerJordan/Muon) for the matrices of the layers, AdamW for the rest."""
    rest = ("embed_tokens", "lm_head", "norm")
    named = dict(module.named_parameters())
    hidden = [p for name, p in named.items() if not any(word in name for word in rest)]
    others = [p for name, p in named.items() if any(word in name for word in rest)]
    muon = torch.optim.Muon(hidden, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)]


def schedule(step: int, steps: int) -> float:
    """Up, flat, and down to nothing over the last half."""
    return min((step + 1) / min(100, steps / 10), 1.0, 2 * (steps - step) / steps)


def save(path: Path, step: int, module: nn.Module, every: list[torch.optim.Optimizer]) -> None:
    tensors = {f"module {name}": x for name, x in module.state_dict().items()} | {"step": torch.tensor(step)}
    for i, optimizer in enumerate(every):
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{i} {number} {name}": x for name, x in state.items()}
    save_file(tensors, path.with_suffix(".new"))
    path.with_suffix(".new").rename(path)


def restore(path: Path, module: nn.Module, every: list[torch.optim.Optimizer]) -> int:
    """The step to go on with."""
    tensors = load_file(path, DEVICE)
    module.load_state_dict({name[7:]: x for name, x in tensors.items() if name.startswith("module ")})
    for i, optimizer in enumerate(every):
        states: dict[int, dict[str, Tensor]] = {}
        for number, name, x in ((*key.split()[1:], x) for key, x in tensors.items() if key.startswith(f"{i} ")):
            states.setdefault(int(number), {})[name] = x
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(tensors["step"])


def fit(run: Run, stage: str, module: nn.Module, loss_of: Callable[..., Tensor], steps: int, rate: float) -> None:
    """Train `module`, from its last checkpoint on.

    Raises:
        SystemExit: time is up; a checkpoint has been written.
    """
    path, every, begin = run.folder / f"{stage}.safetensors", optimizers(module, rate), time.monotonic()
    start = restore(path, module, every) if path.exists() else 0
    for step, arrays in enumerate(run.batches(stage, range(start, steps)), start):
        for group in (group for optimizer in every for group in optimizer.param_groups):
            group["lr"] = rate * schedule(step, steps)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = loss_of(*arrays)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in every:
            optimizer.step()
            optimizer.zero_grad()
        late, last = time.monotonic() > run.deadline, step + 1 == steps
        if step % 50 == 0 or late or last:
            print(f"{stage} {step + 1}/{steps} loss {loss.item():.4f} {time.monotonic() - begin:.0f} s", flush=True)
        if late or last or (step + 1) % 1000 == 0:
            save(path, step + 1, module, every)
        if late and not last:
            sys.exit(f"{stage} stopped at step {step + 1}; the same command goes on")


def train_main(run: Run, steps: int, rate: float) -> Model:
    model = ready(Model(MAIN))

    def loss_of(tokens: Tensor, targets: Tensor, documents: Tensor) -> Tensor:
        hidden, _ = model(tokens, documents)
        learned = targets >= 0
        return F.cross_entropy(model.logits(hidden[learned]).float(), targets[learned])

    fit(run, "main", model, loss_of, steps, rate)
    return model


def common_tokens(run: Run) -> Tensor:
    """The tokens most often learned, ascending."""
    targets = torch.cat([targets[targets >= 0] for _, targets, _ in run.batches("count", range(8))])
    return targets.bincount(minlength=MAIN.vocab).argsort(descending=True, stable=True)[:DRAFT_VOCAB].sort()[0].cpu()


def distance(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy to the teacher's distribution."""
    return -(teacher.float().softmax(-1) * logits.float().log_softmax(-1)).sum(-1).mean()


def train_companions(run: Run, model: Model, steps: int, rate: float) -> tuple[Model, Eagle]:
    """Both learn what the main model says: the draft model from text, the head from its hidden states too."""
    draft, eagle = ready(Model(DRAFT)), ready(Eagle(MAIN, common_tokens(run)))
    model.requires_grad_(False)

    def loss_of(tokens: Tensor, targets: Tensor, documents: Tensor) -> Tensor:
        hidden, taps = model(tokens, documents)
        learned = targets >= 0
        teacher = model.logits(hidden[learned])
        loss = distance(draft.logits(draft(tokens, documents)[0][learned]), teacher)
        known = eagle.t2d[teacher.argmax(-1)]
        embeddings = model.model.embed_tokens(tokens.roll(-1, dims=1))
        for j, ahead in enumerate(eagle(embeddings, taps, documents, DRAFTS)):
            logits = eagle.logits(ahead.roll(1, dims=1)[learned][known])  # what t - 1 foresees, t predicts
            loss = loss + 0.8**j * distance(logits, teacher[known][:, eagle.t2d])
        return loss

    fit(run, "companions", nn.ModuleDict({"draft": draft, "eagle": eagle}), loss_of, steps, rate)
    return draft, eagle


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("folder", type=Path, help="where the checkpoints go")
    parser.add_argument("--minutes", type=float, default=1e6, help="stop after so long; the same command goes on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--companion-steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=64, help="rows of 2,048 tokens in a step")
    parser.add_argument("--rate", type=float, default=4e-3, help="the highest learning rate")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 4))
    args = parser.parse_args()
    deadline = time.monotonic() + args.minutes * 60
    run = Run(args.folder, args.seed, args.rows, args.workers, deadline)
    torch.manual_seed(args.seed)
    if not (args.folder / "tokenizer.json").exists():
        train_tokenizer(args.folder, args.seed)
    model = train_main(run, args.steps, args.rate)
    save_model(model, args.folder)
    draft, eagle = train_companions(run, model, args.companion_steps, args.rate)
    save_model(draft, args.folder / "draft")
    save_model(eagle, args.folder / "eagle3")


if __name__ == "__main__":
    main()
