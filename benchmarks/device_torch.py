"""What `device_speed.py` compares with on a device: PyTorch's models of `torch_models.py`, trained and written with.

Training is forward, loss and backward compiled by `torch.compile`, autocast, clipping by the functions for lists of
tensors, AdamW fused; the loss is read as seldom as ours. Writing has a KV cache of fixed size, one compiled step for
reading a token and drawing the next from the likeliest, and CUDA graphs (`mode="reduce-overhead"`).
"""

import contextlib
import time

import torch
from torch import nn
from torch.nn import functional
from torch_models import HEAD_DIM

DTYPES = {"mixed_bfloat16": torch.bfloat16, "mixed_float16": torch.float16}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def trainer(model, batches, precision: str, steps_in_block: int, *, learning_rate, weight_decay, clip_norm):
    """Return a function that trains for some seconds, and gives the seconds of a step in each block of steps.

    Args:
        model: from ids to logits.
        batches: pairs of ids `int32 (B, T)`, in NumPy, which are moved to the device beforehand and repeated.
        precision: a dtype policy of Keras, for autocast.
        steps_in_block: after how many steps the loss is read.
        learning_rate: of AdamW.
        weight_decay: of AdamW, for matrices.
        clip_norm: the largest norm of the gradients.
    """
    torch.set_float32_matmul_precision("high")
    place = device()
    model = model.to(place)
    data = [[torch.from_numpy(ids.copy()).long().to(place) for ids in batch] for batch in batches]
    matrices, others = ([p for p in model.parameters() if (p.dim() > 1) is is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(place, enabled=precision == "mixed_float16")

    @torch.compile
    def loss_of(inputs, targets):
        logits = model(inputs).float()
        return functional.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))

    def step(inputs, targets):
        is_mixed = precision in DTYPES
        with torch.autocast(place, DTYPES[precision]) if is_mixed else contextlib.nullcontext():
            loss = loss_of(inputs, targets)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        return loss

    def train(seconds):
        taken, began = [], time.perf_counter()
        while not taken or time.perf_counter() - began < seconds:
            block_began = time.perf_counter()
            for i in range(steps_in_block):
                loss = step(*data[i % len(data)])
            loss = loss.item()  # waits for the device
            taken.append((time.perf_counter() - block_began) / steps_in_block)
            if not 0 < loss < 20:
                raise RuntimeError(f"The loss is {loss}.")
        return taken

    return train


class CachedTransformer(nn.Module):
    """A Transformer of `torch_models.py` that reads token after token, with keys and values in buffers."""

    def __init__(self, model, num_rows: int, context: int):
        super().__init__()
        self.model, weight = model, model.tokens.weight
        shape = (num_rows, weight.shape[1] // HEAD_DIM, context, HEAD_DIM)
        self.cache = [
            [torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in "kv"] for _ in model.blocks
        ]
        for keys_and_values in self.cache:
            for buffer in keys_and_values:
                torch._dynamo.mark_static_address(buffer)  # which a CUDA graph may change in place

    def forward(self, ids, positions):
        """Read ids (B, L) at positions (L,) and give the logits after the last, (B, V)."""
        rows, length = ids.shape
        model, dim = self.model, self.model.tokens.weight.shape[1]
        x = model.tokens(ids) + model.positions(positions)
        slots = torch.arange(self.cache[0][0].shape[2], device=ids.device)
        visible = slots[None, :] <= positions[:, None]
        for block, (keys, values) in zip(model.blocks, self.cache, strict=True):
            qkv = block.qkv(block.norms[0](x)).view(rows, length, 3, dim // HEAD_DIM, HEAD_DIM).permute(2, 0, 3, 1, 4)
            keys.index_copy_(2, positions, qkv[1])
            values.index_copy_(2, positions, qkv[2])
            y = functional.scaled_dot_product_attention(qkv[0], keys, values, attn_mask=visible)
            x = x + block.out(y.transpose(1, 2).reshape(rows, length, dim))
            x = x + block.project(functional.gelu(block.expand(block.norms[1](x)), approximate="tanh"))
        return functional.linear(model.norm(x[:, -1]), model.tokens.weight).float()


def writer(model, prompts, context: int, new_tokens: int, top_k: int):
    """Return a function that writes after prompts `int (B, L)` and gives the ids, `int64 (B, new_tokens)`."""
    place = device()
    cached = CachedTransformer(model, len(prompts), context)
    prompts = torch.from_numpy(prompts).long().to(place)
    length = prompts.shape[1]

    def draw(ids, positions):
        logits, likeliest = torch.topk(cached(ids, positions), top_k)
        # The largest of these is drawn as by the softmax of the logits, without waiting for the device.
        noise = torch.empty_like(logits).exponential_(1)
        return likeliest.gather(1, (functional.softmax(logits, -1) / noise).argmax(-1, keepdim=True))

    compiled = torch.compile(draw, mode="reduce-overhead", dynamic=False)

    @torch.no_grad()
    def write():
        written = torch.empty(len(prompts), new_tokens, dtype=torch.long, device=place)
        position = torch.full((1,), length, device=place)
        newest = draw(prompts, torch.arange(length, device=place))
        for i in range(new_tokens):
            written[:, i : i + 1] = newest
            if i < new_tokens - 1:
                torch.compiler.cudagraph_mark_step_begin()
                newest = compiled(newest.clone(), position).clone()
                position += 1
        return written.cpu().numpy()

    return write
