"""Language models in plain PyTorch, written well: what ours are measured against."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional

HEAD_DIM = 64


class Block(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.expand, self.project = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        rows, length, dim = x.shape
        qkv = self.qkv(self.norms[0](x)).view(rows, length, 3, dim // HEAD_DIM, HEAD_DIM)
        y = functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(rows, length, dim))
        return x + self.project(functional.gelu(self.expand(self.norms[1](x)), approximate="tanh"))


class Transformer(nn.Module):
    """GPT-2's architecture, head tied, started as GPT-2."""

    def __init__(self, vocab_size: int, context: int, num_layers: int, dim: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(context, dim)
        self.blocks = nn.ModuleList([Block(dim) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(dim)
        for name, parameter in self.named_parameters():
            into_residual = name.endswith(("out.weight", "project.weight"))
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02 / ((2 * num_layers) ** 0.5 if into_residual else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.tokens.weight)


class Lstm(nn.Module):
    """Embedding, `nn.LSTM`, tied head behind a projection."""

    def __init__(self, vocab_size: int, num_layers: int, dim: int):
        super().__init__()
        self.tokens, self.head = nn.Embedding(vocab_size, dim // 2), nn.Linear(dim, dim // 2)
        self.lstm = nn.LSTM(dim // 2, dim, num_layers, batch_first=True)
        nn.init.normal_(self.tokens.weight, std=0.1)

    def forward(self, ids):
        return functional.linear(self.head(self.lstm(self.tokens(ids))[0]), self.tokens.weight)


def trainer(model, threads: int, *, precision: str, learning_rate: float, weight_decay: float, clip_norm: float,
            is_compiled: bool):  # fmt: skip
    """Return a function that takes a step of AdamW from ids (B, T), targets and a share of the learning rate."""
    torch.set_num_threads(threads)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.95), fused=True)

    def forward(inputs, targets):
        logits = model(inputs).float()
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    if is_compiled:
        forward = torch.compile(forward)

    def step(inputs: np.ndarray, targets: np.ndarray, share: float = 1.0) -> float:
        inputs, targets = (torch.from_numpy(np.ascontiguousarray(ids)).long() for ids in (inputs, targets))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = forward(inputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = share * learning_rate
        optimizer.step()
        return loss.item()

    return step


@torch.no_grad()
def nats(model, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Compute the nats of each target, float32 (B, T)."""
    logits = model(torch.from_numpy(inputs).long()).float()
    return functional.cross_entropy(logits.transpose(1, 2), torch.from_numpy(targets).long(), reduction="none").numpy()
