"""Trains the demo model and its two companions: `python -m examples.train_demo.train FOLDER`, from a clone.

Takes thirteen minutes on one H100. Stopped by --minutes or killed, it goes on from its last checkpoint when the same
command is given again, with the batches that it would have had.
"""

import argparse
import os
import shutil
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
from torch.optim import AdamW, Muon, Optimizer
from torch.utils.data import DataLoader

from examples.networks import DRAFT, MAIN, Eagle, Model, compile_layers, save_model
from examples.train_demo.data import batch, train_tokenizer

DRAFTS, DRAFT_VOCAB = 4, 2048  # how far the draft head looks ahead, and how many tokens it can propose
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Run:
    folder: Path
    seed: int
    rows: int
    workers: int
    rate: float
    deadline: float

    def batches(self, stage: str, steps: range) -> Iterable[Tensor]:
        """Tokens, targets and documents, [3, rows, length]; the seed, the stage and the step say which."""
        write = partial(batch, self.folder, rows=self.rows)
        seeds = [f"{self.seed} {stage} {step}" for step in steps]
        loader = DataLoader(seeds, None, collate_fn=write, num_workers=self.workers, prefetch_factor=4)
        return (torch.from_numpy(arrays).to(DEVICE).long() for arrays in loader)


def optimizers(module: nn.Module) -> list[Optimizer]:
    """Muon (github.com/KellerJordan/Muon) for the matrices of the layers, AdamW for the rest."""
    rest = [
        name for name, _ in module.named_parameters() if "embed" in name or "head" in name or "norm" in name
    ]
    hidden = [x for name, x in module.named_parameters() if name not in rest]
    others = [module.get_parameter(name) for name in rest]
    muon = Muon(hidden, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)]


def tensors(module: nn.Module, every: list[Optimizer]) -> dict[str, Tensor]:
    """All that a checkpoint keeps."""
    states = [x for optimizer in every for state in optimizer.state.values() for x in state.values()]
    return module.state_dict() | {f"optimizer {i}": x for i, x in enumerate(states)}


def restore(path: Path, module: nn.Module, every: list[Optimizer]) -> int:
    """The step to go on with."""
    for x in module.parameters():
        x.grad = torch.zeros_like(x)
    for optimizer in every:
        optimizer.step()  # makes its state, which is then replaced
        optimizer.zero_grad()
    saved = load_file(path)
    for name, x in tensors(module, every).items():
        x.copy_(saved[name])
    return int(saved["step"])


def fit(run: Run, stage: str, module: nn.Module, loss_of: Callable[..., Tensor], steps: int) -> None:
    """Train from the last checkpoint on; exits after writing one when time is up."""
    path, every, begin = run.folder / f"{stage}.safetensors", optimizers(module), time.monotonic()
    start = restore(path, module, every) if path.exists() else 0
    for step, arrays in enumerate(run.batches(stage, range(start, steps)), start + 1):
        for group in (group for optimizer in every for group in optimizer.param_groups):  # up, flat, and down
            group["lr"] = run.rate * min(step / min(100, steps / 10), 1.0, 2 * (steps + 1 - step) / steps)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            loss = loss_of(*arrays)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in every:
            optimizer.step()
            optimizer.zero_grad()
        late = time.monotonic() > run.deadline
        if late or step == steps or step % 50 == 0:
            print(
                f"{stage} {step}/{steps} loss {loss.item():.4f} {time.monotonic() - begin:.0f} s", flush=True
            )
        if late or step == steps or step % 1000 == 0:
            save_file(tensors(module, every) | {"step": torch.tensor(step)}, path.with_suffix(".new"))
            path.with_suffix(".new").rename(path)
        if late and step < steps:
            sys.exit(f"{stage} stopped at step {step}; the same command goes on")


def train_main(run: Run, steps: int) -> nn.Module:
    model = compile_layers(Model(MAIN)).to(DEVICE)

    def loss_of(tokens: Tensor, targets: Tensor, documents: Tensor) -> Tensor:
        hidden, _ = model(tokens, documents)
        return F.cross_entropy(model.logits(hidden[targets >= 0]).float(), targets[targets >= 0])

    fit(run, "main", model, loss_of, steps)
    return model


def distance(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross entropy to the teacher's distribution."""
    return -(teacher.float().softmax(-1) * logits.float().log_softmax(-1)).sum(-1).mean()


def train_companions(run: Run, model: nn.Module, steps: int) -> nn.ModuleDict:
    """Both learn what the main model says: the draft model from text, the head from its hidden states too."""
    targets = torch.cat([targets[targets >= 0] for _, targets, _ in run.batches("count", range(8))])
    common = targets.bincount(minlength=MAIN.vocab).argsort(descending=True, stable=True)[:DRAFT_VOCAB]
    draft = compile_layers(Model(DRAFT)).to(DEVICE)
    eagle = compile_layers(Eagle(MAIN, common.sort()[0].cpu())).to(DEVICE)
    model.requires_grad_(False)

    def loss_of(tokens: Tensor, targets: Tensor, documents: Tensor) -> Tensor:
        hidden, taps = model(tokens, documents)
        teacher = model.logits(hidden[targets >= 0])
        loss = distance(draft.logits(draft(tokens, documents)[0][targets >= 0]), teacher)
        known, embeddings = eagle.t2d[teacher.argmax(-1)], model.model.embed_tokens(tokens.roll(-1, dims=1))
        for j, ahead in enumerate(eagle(embeddings, taps, documents, DRAFTS)):
            logits = eagle.logits(
                ahead.roll(1, dims=1)[targets >= 0][known]
            )  # what t - 1 foresees, t predicts
            loss = loss + 0.8**j * distance(logits, teacher[known][:, eagle.t2d])
        return loss

    both = nn.ModuleDict({"draft": draft, "eagle3": eagle})
    fit(run, "companions", both, loss_of, steps)
    return both


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("folder", type=Path, help="where checkpoints and models go")
    parser.add_argument(
        "--minutes", type=float, default=1e6, help="stop after so long; the same command goes on"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=4600)
    parser.add_argument("--companion-steps", type=int, default=900)
    parser.add_argument("--rows", type=int, default=64, help="rows of 2,048 tokens in a step")
    parser.add_argument("--rate", type=float, default=4e-3, help="the highest learning rate")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 4))
    args = parser.parse_args()
    deadline = time.monotonic() + args.minutes * 60
    run = Run(args.folder, args.seed, args.rows, args.workers, args.rate, deadline)
    torch.manual_seed(args.seed)
    if not (args.folder / "tokenizer.json").exists():
        train_tokenizer(args.folder, args.seed)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one worker for each core already
    model = train_main(run, args.steps)
    companions = train_companions(run, model, args.companion_steps)
    for name, module in {"": model, **companions}.items():
        save_model(module, args.folder / "demo" / name, bos_token_id=None, eos_token_id=2, pad_token_id=0)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        for folder in ("", "draft"):
            shutil.copy(args.folder / name, args.folder / "demo" / folder)


if __name__ == "__main__":
    main()
