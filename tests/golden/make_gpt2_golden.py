"""Make gpt2_tiny.npz: results of a tiny Hugging Face GPT-2, and its training by PyTorch.

For maintainers, in an environment with torch and transformers (the tests need neither):

    python tests/golden/make_gpt2_golden.py

Contents of the file (B = 4, T = 16, V = 61; names are those of the HF state dict, the tied
lm_head left out; kernels are [in, out], as HF's Conv1D keeps them):
    config/<option>, hyper/<option>     scalars: GPT2Config's, and those of the training run
    tokens, targets                     [20, B, T], one batch a step; a target of -1 is ignored
    param/<name>, grad/<name>           initial parameters, their gradients on the first batch
    logits [B, T, V], loss              on the first batch
    train/loss, train/norm, train/lr    [20]: before each step; the norm is that before clipping
    final/<name>                        parameters after 20 steps of AdamW

All is computed and stored in float64, from weights that float32 can hold, so that a float32 model
can start from the very same ones. The MLP is narrower than GPT-2's 4 * n_embd to keep the file
small; its width equals no other, so that no mix-up of axes can go unseen.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

PATH = Path(__file__).with_name("gpt2_tiny.npz")
CONFIG = {
    "vocab_size": 61,
    "n_positions": 16,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_inner": 32,
}
HYPER = {
    "learning_rate": 1e-2,
    "min_lr": 1e-3,
    "warmup_iters": 4,
    "lr_decay_iters": 20,
    "max_iters": 20,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "grad_clip": 1.0,
}
BATCH = 4


def make_model(rng: np.random.Generator) -> GPT2LMHeadModel:
    """Draw weights large enough for logits of order one, in float64 but exact in float16."""
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    special = {"bos_token_id": None, "eos_token_id": None}  # GPT-2's lie outside this vocabulary
    config = GPT2Config(**CONFIG, **dropouts, **special, attn_implementation="eager")
    model = GPT2LMHeadModel(config).double().train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 0.25 if p.ndim == 2 else 0.1
            mean = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            value = rng.normal(mean, std, p.shape).astype(np.float16).astype(np.float64)
            p.copy_(torch.from_numpy(value))
    return model


def make_batches(rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return tokens and next-token targets [steps, B, T]; about one target in ten is ignored."""
    shape = (HYPER["max_iters"], BATCH, CONFIG["n_positions"] + 1)
    text = rng.integers(0, CONFIG["vocab_size"], shape)
    targets = np.where(rng.random(shape) < 0.1, -1, text)
    return torch.from_numpy(text[..., :-1].copy()), torch.from_numpy(targets[..., 1:].copy())


def logits_and_loss(
    model: GPT2LMHeadModel, tokens: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [B, T, V] and the mean loss, without `labels`, which shifts targets again."""
    logits = model(tokens).logits
    return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


def lr_at(it: int) -> float:
    """Return the learning rate: linear warm-up, then a half cosine to min_lr."""
    h = HYPER
    if it < h["warmup_iters"]:
        return h["learning_rate"] * (it + 1) / (h["warmup_iters"] + 1)
    if it > h["lr_decay_iters"]:
        return h["min_lr"]
    done = (it - h["warmup_iters"]) / (h["lr_decay_iters"] - h["warmup_iters"])
    return h["min_lr"] + 0.5 * (1 + math.cos(math.pi * done)) * (h["learning_rate"] - h["min_lr"])


def train(model: GPT2LMHeadModel, tokens: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """Train in place; return [3, steps]: loss, norm before clipping, learning rate."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": HYPER["weight_decay"]},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (HYPER["beta1"], HYPER["beta2"])
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=HYPER["eps"])
    log = []
    for it in range(HYPER["max_iters"]):
        lr = lr_at(it)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        _, loss = logits_and_loss(model, tokens[it], targets[it])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, HYPER["grad_clip"])
        optimizer.step()
        log.append((loss.item(), norm.item(), lr))
    return np.array(log).T


def main() -> None:
    rng = np.random.default_rng(1337)
    model = make_model(rng)
    tokens, targets = make_batches(rng)
    named = dict(model.named_parameters())  # lists the tied embedding once

    data = {f"config/{key}": value for key, value in CONFIG.items()}
    data |= {f"hyper/{key}": value for key, value in HYPER.items()}
    data |= {"tokens": tokens.numpy(), "targets": targets.numpy()}
    data |= {f"param/{name}": p.detach().numpy().copy() for name, p in named.items()}

    logits, loss = logits_and_loss(model, tokens[0], targets[0])
    loss.backward()
    data |= {"logits": logits.detach().numpy(), "loss": loss.item()}
    data |= {f"grad/{name}": p.grad.numpy().copy() for name, p in named.items()}

    log = train(model, tokens, targets)
    data |= {f"train/{key}": row for key, row in zip(("loss", "norm", "lr"), log, strict=True)}
    data |= {f"final/{name}": p.detach().numpy() for name, p in named.items()}

    np.savez_compressed(PATH, **data)
    print(f"{PATH.name}: {PATH.stat().st_size} bytes, |logits| {logits.abs().mean():.2f}")
    print(np.array2string(log.T, precision=4, suppress_small=True))


if __name__ == "__main__":
    main()
