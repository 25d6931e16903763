"""Make full_script.npz: results of a small copy of the lecture's full script in PyTorch.

For maintainers, in an environment with torch (the tests need none):

    python tests/golden/make_full_script.py

Contents of the file (B = 4, T = 8, V = 11; names are those of the modules below):
    tokens                      [20, B, T + 1], one batch a step
    param/<name>                initial parameters, numbers that float16 can hold
    grad/<name>                 their gradients on the first batch, float32
    loss, norm                  [20], float64: before each step of torch.optim.AdamW
    final/<name>                parameters after the last step, float32

All is computed in float64, and without dropout: its masks could not be the same anyway.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

PATH = Path(__file__).with_name("full_script.npz")
VOCAB, BLOCK, WIDTH, HEADS, LAYERS, DROPOUT = 11, 8, 16, 4, 4, 0.0
BATCH, STEPS, LEARNING_RATE = 4, 20, 3e-4


class Head(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.key = nn.Linear(WIDTH, width, bias=False)
        self.query = nn.Linear(WIDTH, width, bias=False)
        self.value = nn.Linear(WIDTH, width, bias=False)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, T, C = x.shape
        scores = self.query(x) @ self.key(x).transpose(-2, -1) * C**-0.5  # C is not the head's
        scores = scores.masked_fill(torch.tril(torch.ones(T, T)) == 0, -torch.inf)
        return self.dropout(F.softmax(scores, dim=-1)) @ self.value(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(Head(WIDTH // HEADS) for _ in range(HEADS))
        self.ffwd = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH),
            nn.ReLU(),
            nn.Linear(4 * WIDTH, WIDTH),
            nn.Dropout(DROPOUT),
        )
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.ln1(x)
        x = x + torch.cat([head(normed) for head in self.heads], dim=-1)
        return x + self.ffwd(self.ln2(x))


class Script(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(BLOCK, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        logits = self.lm_head(self.ln_f(self.blocks(x)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> None:
    torch.manual_seed(1337)
    torch.set_default_dtype(torch.float64)
    model = Script()
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(p.half())
            if name.startswith(("ln", "blocks")) and p.ndim == 1:
                p.add_((0.1 * torch.randn_like(p)).half())  # so that no mix-up can go unseen
                p.copy_(p.half())
    tokens = torch.randint(VOCAB, (STEPS, BATCH, BLOCK + 1))
    data = {"tokens": tokens.numpy().astype(np.int32)}
    data |= {f"param/{name}": p.detach().numpy().astype(np.float16) for name, p in named.items()}

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses, norms = [], []
    for it in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        loss = model(tokens[it, :, :-1], tokens[it, :, 1:])
        loss.backward()
        grads = {name: p.grad.numpy().copy() for name, p in named.items()}
        if it == 0:
            data |= {f"grad/{name}": grad.astype(np.float32) for name, grad in grads.items()}
        losses.append(loss.item())
        norms.append(sum((grad**2).sum() for grad in grads.values()) ** 0.5)
        optimizer.step()
    data |= {"loss": np.array(losses), "norm": np.array(norms)}
    data |= {f"final/{name}": p.detach().numpy().astype(np.float32) for name, p in named.items()}

    np.savez_compressed(PATH, **data)
    print(f"{PATH.name}: {PATH.stat().st_size} bytes, losses {losses[0]:.4f} to {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
