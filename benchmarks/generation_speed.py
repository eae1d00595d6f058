"""Time text generation side by side: ours, Hugging Face transformers, keras-hub and llama.cpp.

    pip install -e ".[fast]" torch transformers keras-hub llama-cpp-python gguf
    python benchmarks/generation_speed.py                                   # all that are installed
    python benchmarks/generation_speed.py --sizes S --systems ours llama.cpp-f16

Each writes 200 new tokens after a prompt of 16, one row or 16 rows at once, with top-k 50 at temperature 1. The models
have the shape of GPT-2 (learned positions, biases, GELU by tanh, the token embedding as head), a vocabulary of 8,192,
and random weights, wide enough that two thirds of a text's tokens are different ones. All compute in float32; but with
numba ours keeps and multiplies matrices in 16 bits, as llama.cpp keeps them from its f16 file, and keys and values in
either case.
keras-hub is compiled by XLA, and llama.cpp reads the newest tokens of all rows in one call: both are fastest that way.

No text ends early: the peers know no end of text here, ours bans it, and a child that counts other than the tokens
it was asked for stops. Ours bans parts of characters too, so that each new token is one character of the text.

Each system has a process of its own for each size and batch, with the same number of threads. It waits for orders and
does nothing meanwhile; in each round all take their turns, so that slow changes of the machine hit all alike. But be
alone on it: threads that wait for each other lose far more than their share of the time, ours, PyTorch's and
llama.cpp's, and `--threads 1` then tells more. The first call holds what is compiled, by numba too, which else keeps it
on disk. Other figures are medians over the rounds.
"""

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIZES = {
    "S": {"num_layers": 4, "num_heads": 4, "hidden_dim": 256},
    "M": {"num_layers": 6, "num_heads": 6, "hidden_dim": 384},
}
VOCAB_SIZE, CONTEXT = 8_192, 256
FIRST_PIECE = 259  # of our tokenizer; before it come three special ids and 256 bytes
PROMPT_TOKENS, NEW_TOKENS, TOP_K = 16, 200, 50
STDDEV = 0.08  # of the weights
THREAD_SETTINGS = "NUMBA_NUM_THREADS OMP_NUM_THREADS OPENBLAS_NUM_THREADS TF_NUM_INTRAOP_THREADS".split()


def main() -> None:
    """Print the tables, or as a child process make a system and let it write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each system")
    parser.add_argument("--passes", type=int, default=5, metavar="N", help="rounds after the one to warm up")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], metavar="B", help="rows at once")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measured time here")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        system, size, batch = options.child
        serve(SYSTEMS[system][0], SIZES[size], int(batch), options.threads)
        return
    systems = [system for system in options.systems if is_installed(system)]
    results = [
        result
        for size in options.sizes
        for batch in options.batches
        for result in measure(systems, size, batch, options.threads, options.passes)
    ]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    print_tables(results)


def is_installed(system: str) -> bool:
    """Tell whether the packages that a system needs are there, and print their versions or that it is skipped."""
    try:
        versions = [f"{package} {importlib.metadata.version(package)}" for package in SYSTEMS[system][1]]
    except importlib.metadata.PackageNotFoundError as error:
        print(f"{system}: skipped, {error.name} is not installed")
        return False
    print(f"{system}: {', '.join(versions)}")
    return True


# --- the parent: asks, measures, prints -------------------------------------------------------------------------


def measure(systems: list[str], size: str, batch: int, threads: int, passes: int) -> list[dict]:
    """Start the systems with one size and batch, and let them write in turns; return the seconds of every call."""
    results, processes = [], {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "NUMBA_CACHE_DIR": folder}
        environment |= dict.fromkeys(THREAD_SETTINGS, str(threads))
        for system in systems:
            command = [sys.executable, __file__, "--threads", str(threads), "--child", system, size, str(batch)]
            log = stack.enter_context(open(Path(folder) / f"{system}.log", "w+", encoding="utf-8"))
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment, text=True
            )
            processes[system] = stack.enter_context(process)
            try:
                first_call = ask(process, NEW_TOKENS)
                ask(process, 1)  # keras-hub compiles for every length
            except BrokenPipeError:
                log.seek(0)
                print(f"{system}: failed at {size}, batch {batch}\n{log.read()[-1500:]}")
                continue
            results.append({"system": system, "size": size, "batch": batch, "threads": threads})
            results[-1] |= {"first_call_seconds": first_call, "first_token_seconds": [], "seconds": []}
        for _ in range(passes):
            for result in results:
                result["first_token_seconds"].append(ask(processes[result["system"]], 1))
                result["seconds"].append(ask(processes[result["system"]], NEW_TOKENS))
    return results


def ask(process: subprocess.Popen, new_tokens: int) -> float:
    """Let a child write, and return the seconds it took."""
    process.stdin.write(f"{new_tokens}\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise BrokenPipeError
    return float(answer)


def print_tables(results: list[dict]) -> None:
    """Print speeds, ours as a multiple of the peers', and the times to the first token and of the first call."""
    columns = list(dict.fromkeys((result["size"], result["batch"]) for result in results))
    speeds, first_tokens, first_calls = {}, {}, {}
    for result in results:
        key = result["system"], (result["size"], result["batch"])
        speeds[key] = result["batch"] * NEW_TOKENS / statistics.median(result["seconds"])
        first_tokens[key] = 1000 * statistics.median(result["first_token_seconds"])
        first_calls[key] = result["first_call_seconds"]

    ratios = {}
    for (system, column), speed in speeds.items():
        if system != "ours" and ("ours", column) in speeds:
            peer = "llama.cpp" if system.startswith("llama.cpp") else system  # the better of its two
            key = f"ours / {peer}", column
            ratios[key] = min(ratios.get(key, float("inf")), speeds["ours", column] / speed)

    for title, figures, digits in (
        ("tokens a second", speeds, 0),
        ("ratio of tokens a second", ratios, 2),
        ("milliseconds to the first token", first_tokens, 1),
        ("seconds of the first call", first_calls, 2),
    ):
        if figures:
            print(f"\n{title:34}" + "".join(f"{f'{size} b{batch}':>10}" for size, batch in columns))
        for name in dict.fromkeys(name for name, _ in figures):
            row = [f"{figures[name, c]:10,.{digits}f}" if (name, c) in figures else f"{'-':>10}" for c in columns]
            print(f"{name:34}" + "".join(row))


# --- the children: a system is made by a function that returns one, which writes tokens and counts them ---------


def serve(make, shape: dict[str, int], batch: int, threads: int) -> None:
    """Make a system; then read from stdin how many tokens to write in each row, and answer with the seconds."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    write = make(shape, batch, threads)
    for line in sys.stdin:
        began = time.perf_counter()
        written = write(int(line))
        seconds = time.perf_counter() - began
        if written != batch * int(line):
            raise RuntimeError(f"{batch * int(line)} new tokens were asked for, {written} came.")
        print(seconds, file=answers, flush=True)


def random_prompts(batch: int) -> np.ndarray:
    return np.random.default_rng(1).integers(FIRST_PIECE, VOCAB_SIZE, (batch, PROMPT_TOKENS))


def randomize(model) -> None:
    """Draw the matrices of a Keras model anew."""
    generator = np.random.default_rng(0)
    model.set_weights([generator.normal(0, STDDEV, w.shape) if w.ndim > 1 else w for w in model.get_weights()])


def ours(shape, batch, threads):
    import aigc_tf

    tokenizer = aigc_tf.Tokenizer([chr(0x4E00 + i) for i in range(VOCAB_SIZE - FIRST_PIECE)])
    model = aigc_tf.transformer(VOCAB_SIZE, CONTEXT, **shape)
    randomize(model)
    prompts = [tokenizer.decode(ids[1:]) for ids in random_prompts(batch)]  # begin of document is the first token
    banned = dict.fromkeys(range(FIRST_PIECE), -float("inf"))
    settings = {"temperature": 1.0, "top_k": TOP_K, "top_p": None, "logit_bias": banned}

    def write(new_tokens):
        texts = aigc_tf.generate_batch(model, tokenizer, prompts, max_new_tokens=new_tokens, **settings)
        return sum(map(len, texts)) - sum(map(len, prompts))

    return write


def hugging_face(shape, batch, threads):
    import torch
    import transformers

    torch.set_num_threads(threads)
    config = transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=CONTEXT, n_embd=shape["hidden_dim"], n_layer=shape["num_layers"],
        n_head=shape["num_heads"], initializer_range=STDDEV, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    prompts = torch.from_numpy(random_prompts(batch))
    settings = {"do_sample": True, "temperature": 1.0, "top_k": TOP_K, "top_p": 1.0, "pad_token_id": 0}

    def write(new_tokens):
        mask = torch.ones_like(prompts)
        texts = model.generate(prompts, attention_mask=mask, max_new_tokens=new_tokens, **settings)
        return texts[:, PROMPT_TOKENS:].numel()

    return write


def keras_hub(shape, batch, threads):
    import keras_hub

    width = 4 * shape["hidden_dim"]
    backbone = keras_hub.models.GPT2Backbone(VOCAB_SIZE, **shape, intermediate_dim=width, max_sequence_length=CONTEXT)
    randomize(backbone)
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    model.compile(sampler=keras_hub.samplers.TopKSampler(TOP_K), jit_compile=True)

    def write(new_tokens):
        ids = np.pad(random_prompts(batch), [(0, 0), (0, new_tokens)]).astype(np.int32)
        mask = np.broadcast_to(np.arange(ids.shape[1]) < PROMPT_TOKENS, ids.shape)
        texts = model.generate({"token_ids": ids, "padding_mask": mask}, stop_token_ids=None)
        return int(texts["padding_mask"][:, PROMPT_TOKENS:].sum())

    return write


def llama_cpp(shape, batch, threads, dtype):
    import llama_cpp as ll

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, shape, dtype)
        settings = ll.llama_model_default_params()
        settings.use_mmap = False
        model = ll.llama_model_load_from_file(str(path).encode(), settings)
    settings = ll.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max, settings.n_batch = batch * CONTEXT, batch, batch * PROMPT_TOKENS
    settings.n_threads = settings.n_threads_batch = threads
    context = ll.llama_init_from_model(model, settings)
    sampler = ll.llama_sampler_chain_init(ll.llama_sampler_chain_default_params())
    ll.llama_sampler_chain_add(sampler, ll.llama_sampler_init_top_k(TOP_K))
    ll.llama_sampler_chain_add(sampler, ll.llama_sampler_init_dist(0))

    def as_tokens(ids):
        """Return ids (rows, tokens) as a llama_batch that asks for the logits of each row's last token."""
        tokens, length = ll.llama_batch_init(ids.size, 0, 1), ids.shape[1]
        tokens.n_tokens = ids.size
        for i, token in enumerate(ids.flat):
            tokens.token[i], tokens.pos[i], tokens.logits[i] = int(token), i % length, i % length == length - 1
            tokens.n_seq_id[i], tokens.seq_id[i][0] = 1, i // length
        return tokens

    def read_and_draw(tokens):
        if ll.llama_decode(context, tokens):
            raise RuntimeError("llama_decode failed.")
        length = tokens.n_tokens // batch
        return [ll.llama_sampler_sample(sampler, context, i) for i in range(length - 1, tokens.n_tokens, length)]

    prompts, newest = as_tokens(random_prompts(batch)), as_tokens(np.zeros((batch, 1), int))
    ids, positions = (np.ctypeslib.as_array(array, (batch,)) for array in (newest.token, newest.pos))

    def write(new_tokens):
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        texts = [read_and_draw(prompts)]
        while len(texts) < new_tokens:
            ids[:], positions[:] = texts[-1], PROMPT_TOKENS + len(texts) - 1
            texts.append(read_and_draw(newest))
        return sum(map(len, texts))

    return write


def write_gguf(path: Path, shape: dict[str, int], dtype) -> None:
    """Write a GPT-2 of random weights without a vocabulary; its matrices are of the dtype."""
    import gguf

    dim, num_layers = shape["hidden_dim"], shape["num_layers"]
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_tokenizer_model("no_vocab")
    numbers = {"vocab_size": VOCAB_SIZE, "context_length": CONTEXT, "block_count": num_layers, "embedding_length": dim}
    numbers |= {"feed_forward_length": 4 * dim, "attention.head_count": shape["num_heads"]}
    for name, number in numbers.items():
        writer.add_uint32(f"gpt2.{name}", number)
    writer.add_layer_norm_eps(1e-5)
    tensors = {"token_embd": (VOCAB_SIZE, dim), "position_embd": (CONTEXT, dim), "output_norm": (dim,)}
    block = {"attn_norm": (dim,), "attn_qkv": (3 * dim, dim), "attn_output": (dim, dim)}
    block |= {"ffn_norm": (dim,), "ffn_up": (4 * dim, dim), "ffn_down": (dim, 4 * dim)}
    for i in range(num_layers):
        tensors |= {f"blk.{i}.{name}": size for name, size in block.items()}
    generator = np.random.default_rng(0)
    for name, size in tensors.items():
        is_norm = len(size) == 1
        weight = np.ones(size, np.float32) if is_norm else generator.normal(0, STDDEV, size).astype(dtype)
        writer.add_tensor(f"{name}.weight", weight)
        if not name.endswith("embd"):
            writer.add_tensor(f"{name}.bias", np.zeros(size[0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# What makes each system, and the packages it needs.
SYSTEMS = {
    "ours": (ours, ["aigc-tf"]),
    "hugging-face": (hugging_face, ["transformers", "torch"]),
    "keras-hub": (keras_hub, ["keras-hub"]),
    "llama.cpp-f32": (functools.partial(llama_cpp, dtype=np.float32), ["llama-cpp-python", "gguf"]),
    "llama.cpp-f16": (functools.partial(llama_cpp, dtype=np.float16), ["llama-cpp-python", "gguf"]),
}


if __name__ == "__main__":
    main()
