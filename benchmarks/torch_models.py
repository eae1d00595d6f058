"""Language models in plain PyTorch, written with care, as baselines for ours."""

import contextlib

import numpy as np
import torch
from torch import nn
from torch.nn import functional

HEAD_DIM = 64


class Block(nn.Module):
    def __init__(self, dim: int, dropout: float):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(dim), nn.LayerNorm(dim)])
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.expand, self.project = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.drop, self.dropout = nn.Dropout(dropout), dropout

    def forward(self, x):
        rows, length, dim = x.shape
        qkv = self.qkv(self.norms[0](x)).view(rows, length, 3, dim // HEAD_DIM, HEAD_DIM).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(*qkv, dropout_p=dropout, is_causal=True)
        x = x + self.drop(self.out(y.transpose(1, 2).reshape(rows, length, dim)))
        return x + self.drop(self.project(functional.gelu(self.expand(self.norms[1](x)), approximate="tanh")))


class Transformer(nn.Module):
    """GPT-2's architecture and initialisation, with a tied head."""

    def __init__(self, vocab_size: int, context: int, num_layers: int, dim: int, dropout: float = 0.0):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(context, dim)
        self.drop, self.blocks = nn.Dropout(dropout), nn.ModuleList([Block(dim, dropout) for _ in range(num_layers)])
        self.norm = nn.LayerNorm(dim)
        for name, parameter in self.named_parameters():
            into_residual = name.endswith(("out.weight", "project.weight"))
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02 / ((2 * num_layers) ** 0.5 if into_residual else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden(self, ids):
        """Compute what the head multiplies with the token embedding, (B, T, D)."""
        x = self.drop(self.tokens(ids) + self.positions.weight)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, ids):
        return functional.linear(self.hidden(ids), self.tokens.weight)


class Lstm(nn.Module):
    """Embedding, `nn.LSTM`, tied head behind a projection to the width of the embedding."""

    def __init__(self, vocab_size: int, num_layers: int, hidden_dim: int, dropout: float = 0.0):
        super().__init__()
        embedding_dim = hidden_dim // 2
        self.tokens, self.head = nn.Embedding(vocab_size, embedding_dim), nn.Linear(hidden_dim, embedding_dim)
        self.drop = nn.Dropout(dropout)
        self.lstm = nn.LSTM(embedding_dim, hidden_dim, num_layers, batch_first=True, dropout=dropout)
        nn.init.normal_(self.tokens.weight, std=0.1)

    @torch.compiler.disable  # it would call `nn.LSTM` uncompiled anyway, in pieces
    def states(self, ids):
        return self.lstm(self.drop(self.tokens(ids)))[0]

    def hidden(self, ids):
        """Compute what the head multiplies with the token embedding, (B, T, E)."""
        return self.head(self.drop(self.states(ids)))

    def forward(self, ids):
        return functional.linear(self.hidden(ids), self.tokens.weight)


def trainer(model, threads: int, *, precision: str, learning_rate: float, weight_decay: float, clip_norm: float):
    """Return a function that takes a step of AdamW, given ids (B, T), targets and a share of the learning rate.

    Given candidates (C,) too, and the logarithm of the probability of each to be drawn, the softmax runs over them,
    and targets are positions among them. Clipping and AdamW are the fastest that PyTorch has: compiled by
    `torch.compile` they take longer.
    """
    torch.set_num_threads(threads)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.95), fused=True)

    @torch.compile
    def among_all(inputs, targets):
        logits = model(inputs).float()
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    @torch.compile
    def among_candidates(inputs, targets, candidates, log_expected):
        logits = functional.linear(model.hidden(inputs), model.tokens(candidates)).float() - log_expected
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    def step(inputs, targets, share: float = 1.0, candidates=None, log_expected=None) -> float:
        forward = among_all if candidates is None else among_candidates
        chosen = [] if candidates is None else [as_ids(candidates), torch.from_numpy(log_expected)]
        with mixed(precision):
            loss = forward(as_ids(inputs), as_ids(targets), *chosen)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm, foreach=True)
        for group in optimizer.param_groups:
            group["lr"] = share * learning_rate
        optimizer.step()
        return loss.item()

    return step


def as_ids(ids: np.ndarray):
    return torch.from_numpy(np.ascontiguousarray(ids)).long()


def mixed(precision: str):
    return torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else contextlib.nullcontext()


@torch.no_grad()
def nats(model, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Compute the nats of each target, float32 (B, T)."""
    logits = model(as_ids(inputs)).float()
    return functional.cross_entropy(logits.transpose(1, 2), as_ids(targets), reduction="none").numpy()
