"""Time text generation side by side: ours, Hugging Face transformers, keras-hub and llama.cpp.

    pip install -e ".[fast]" torch transformers keras-hub llama-cpp-python gguf
    python benchmarks/generation_speed.py                                   # all that are installed
    python benchmarks/generation_speed.py --sizes S --systems ours llama.cpp-q8_0 --threads 1

Each generates 200 tokens after a prompt of 16, one row or a batch of 16 rows, with top-k 50 at temperature 1. The
models have the shape of GPT-2 (learned positions, biases, GELU by tanh, tied head), a vocabulary of 8,192, and random
weights, wide enough that two thirds of the tokens of a text are distinct: S is 4 layers, 256 wide, M is 6 layers, 384
wide, base is GPT-2's own 12 layers, 768 wide.

Systems compute in different precisions, so the error of the logits after the prompts is shown next to the speed: the
root mean square of the difference from float32, in standard deviations of the logits. Ours stores and multiplies
matrices in 16 bits; llama.cpp stores them as its file does (f32, f16, or q8_0, its users' usual choice). Hugging Face's
`eager` is `generate` as it comes, in float32; `compiled` has its static cache and `torch.compile`, in float32 and in
bfloat16. keras-hub is compiled by XLA, on TensorFlow, in float32. llama-cpp-python compiles llama.cpp for this machine
during installation, unlike the wheels of other packages. It is driven from Python, one call for each token of all rows,
which costs it about 10 to 20 microseconds a token; its own `llama-batched-bench` has no such cost.

No text ends early: the peers have no end of text here, ours bans it, and a child stops if its number of tokens is not
the one asked for. Ours also bans parts of characters, so that each new token is one character.

The allocator is the same for all (see `turns.py`). Run it on an otherwise idle machine: threads that wait for each
other lose far more than their share of the time, in ours, PyTorch and llama.cpp alike; if that is impossible,
`--threads 1` says more. The first call includes compilation, also numba's, which is normally cached on disk. Other
figures are medians over the rounds.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import turns

SIZES = {
    "S": {"num_layers": 4, "num_heads": 4, "hidden_dim": 256},
    "M": {"num_layers": 6, "num_heads": 6, "hidden_dim": 384},
    "base": {"num_layers": 12, "num_heads": 12, "hidden_dim": 768},
}
VOCAB_SIZE, CONTEXT = 8_192, 256
FIRST_PIECE = 259  # of our tokenizer; before it come three special ids and 256 bytes
PROMPT_TOKENS, NEW_TOKENS, TOP_K = 16, 200, 50
STDDEV = 0.08  # of the weights


def main() -> None:
    """Print the tables, or, as a child process, make a system and let it generate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    turns.add_options(parser)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16], metavar="B", help="rows in a batch")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    options = parser.parse_args()
    if options.child:
        system, size, batch = options.child
        turns.serve(lambda: make(system, SIZES[size], int(batch), options.threads))
        return
    systems = turns.installed(SYSTEMS, options.systems)
    facts = turns.machine({package for system in systems for package in SYSTEMS[system][1]})
    settings = {name: getattr(options, name) for name in ("threads", "passes")}
    turns.show_machine(facts)
    results = [
        result
        for size in options.sizes
        for batch in options.batches
        for result in measure(systems, size, batch, options)
    ]
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "settings": settings, "results": results}, indent=1))
    print_tables(results)


def measure(systems: list[str], size: str, batch: int, options) -> list[dict]:
    """Let the systems generate with one size and batch, in turns, with each allocator."""
    children, keys = {}, {}
    environment = {**dict.fromkeys(turns.THREADS, str(options.threads)), "KERAS_BACKEND": "tensorflow"}
    for system in systems:
        for allocator in options.allocators:
            arguments = ["--threads", str(options.threads), "--child", system, size, str(batch)]
            name = f"{system}, {size}, {batch} rows, {allocator}"
            children[name] = (arguments, environment, allocator)
            keys[name] = {"system": system, "size": size, "batch": batch, "allocator": allocator}
    # keras-hub compiles for every length.
    results = turns.measure(children, [NEW_TOKENS, 1], [1, NEW_TOKENS], options.passes)
    return [{**keys[name], **result} for name, result in results.items()]


def print_tables(results: list[dict]) -> None:
    """Print speeds, ours as a multiple of the peers', the errors of the logits, and the time to the first token."""
    speeds, errors, first_tokens, first_calls, rounds = ({} for _ in range(5))
    several = len({result["allocator"] for result in results}) > 1
    for result in results:
        system, allocator, column = result["system"], result["allocator"], f"{result['size']}, {result['batch']} rows"
        key = f"{system}, {allocator}" if several else system, column
        seconds = [order["answer"] for _, order in result["rounds"]]
        speeds[key] = result["batch"] * NEW_TOKENS / statistics.median(seconds)
        errors[key] = result["hello"]["logit_error"]
        first_tokens[key] = 1000 * statistics.median(order["answer"] for order, _ in result["rounds"])
        first_calls[key] = result["warm_up"][0]["answer"]
        rounds[system, allocator, column] = seconds
    ratios = {}
    for (system, allocator, column), theirs in rounds.items():
        if system != "ours" and ("ours", allocator, column) in rounds:
            name = f"ours / {system}{f', {allocator}' if several else ''}"
            ratios[name, column] = turns.ratio(rounds["ours", allocator, column], theirs)
    turns.print_table("tokens a second", speeds, "{:,.0f}".format)
    turns.print_table("ratio of tokens a second (least-most)", ratios, turns.as_ratio)
    turns.print_table("error of the logits, in standard deviations", errors, "{:.5f}".format)
    turns.print_table("milliseconds to the first token", first_tokens, "{:,.1f}".format)
    turns.print_table("seconds of the first call", first_calls, "{:,.2f}".format)


# --- the children: a system is made by a function that returns how to compute the logits after the prompts as it
# does, and as float32 would, and how to write tokens and count them ------------------------------------------------


def make(system: str, shape: dict[str, int], batch: int, threads: int):
    """Make a system; return the error of its logits, and what writes a number of tokens and tells the seconds."""
    logits, exact, write = SYSTEMS[system][0](shape, batch, threads)
    error = float(np.sqrt(np.mean((logits - exact) ** 2)) / np.std(exact))

    def seconds(new_tokens):
        began = time.perf_counter()
        written = write(new_tokens)
        seconds = time.perf_counter() - began
        if written != batch * new_tokens:
            raise RuntimeError(f"{batch * new_tokens} new tokens were asked for, {written} came.")
        return seconds

    return {"logit_error": error}, seconds


def random_prompts(batch: int) -> np.ndarray:
    return np.random.default_rng(1).integers(FIRST_PIECE, VOCAB_SIZE, (batch, PROMPT_TOKENS))


def randomize(model) -> None:
    """Give the matrices of a Keras model new random values."""
    generator = np.random.default_rng(0)
    model.set_weights([generator.normal(0, STDDEV, w.shape) if w.ndim > 1 else w for w in model.get_weights()])


def ours(shape, batch, threads):
    import aigc_tf
    from aigc_tf.generation.engines.choose import choose_engine
    from aigc_tf.generation.engines.engine import make_engine
    from aigc_tf.generation.settings import Settings

    tokenizer = aigc_tf.Tokenizer([chr(0x4E00 + i) for i in range(VOCAB_SIZE - FIRST_PIECE)])
    model = aigc_tf.transformer(VOCAB_SIZE, CONTEXT, **shape)
    randomize(model)
    prompts = [tokenizer.decode(ids[1:]) for ids in random_prompts(batch)]  # begin of document is the first token
    banned = dict.fromkeys(range(FIRST_PIECE), -float("inf"))
    settings = {"temperature": 1.0, "top_k": TOP_K, "top_p": None, "logit_bias": banned}

    def logits(engine):
        rows, positions = np.divmod(np.arange(batch * PROMPT_TOKENS), PROMPT_TOKENS)
        return make_engine(model, batch, engine).read(rows, positions, random_prompts(batch).ravel())

    def write(new_tokens):
        texts = aigc_tf.generate_batch(model, tokenizer, prompts, max_new_tokens=new_tokens, **settings)
        return sum(map(len, texts)) - sum(map(len, prompts))

    engine, _ = choose_engine(model, "auto", Settings())
    return logits(engine), logits("numpy"), write


def hugging_face(shape, batch, threads, is_compiled=False, dtype="float32"):
    import torch
    import transformers

    torch.set_num_threads(threads)
    config = transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=CONTEXT, n_embd=shape["hidden_dim"], n_layer=shape["num_layers"],
        n_head=shape["num_heads"], initializer_range=STDDEV, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    prompts = torch.from_numpy(random_prompts(batch))
    mask = torch.ones_like(prompts)
    settings = {"do_sample": True, "temperature": 1.0, "top_k": TOP_K, "top_p": 1.0, "pad_token_id": 0}

    @torch.no_grad()
    def logits():
        return model(prompts).logits[:, -1].float().numpy()

    def write(new_tokens):
        texts = model.generate(prompts, attention_mask=mask, max_new_tokens=new_tokens, **settings)
        return texts[:, PROMPT_TOKENS:].numel()

    exact = logits()
    model.to(getattr(torch, dtype))
    own = logits()
    if is_compiled:
        # Always of the same length, so that nothing is compiled twice.
        settings |= {"cache_implementation": "static", "cache_config": {"max_cache_len": CONTEXT}}
        model.forward = torch.compile(model.forward)
    return own, exact, write


def keras_hub(shape, batch, threads):
    import keras_hub

    width = 4 * shape["hidden_dim"]
    backbone = keras_hub.models.GPT2Backbone(VOCAB_SIZE, **shape, intermediate_dim=width, max_sequence_length=CONTEXT)
    randomize(backbone)
    model = keras_hub.models.GPT2CausalLM(backbone, preprocessor=None)
    model.compile(sampler=keras_hub.samplers.TopKSampler(TOP_K), jit_compile=True)
    prompts = random_prompts(batch)
    logits = np.asarray(model({"token_ids": prompts, "padding_mask": np.ones_like(prompts)}))[:, -1]

    def write(new_tokens):
        ids = np.pad(random_prompts(batch), [(0, 0), (0, new_tokens)]).astype(np.int32)
        mask = np.broadcast_to(np.arange(ids.shape[1]) < PROMPT_TOKENS, ids.shape)
        texts = model.generate({"token_ids": ids, "padding_mask": mask}, stop_token_ids=None)
        return int(texts["padding_mask"][:, PROMPT_TOKENS:].sum())

    return logits, logits, write


def llama_cpp(shape, batch, threads, kind):
    import llama_cpp as ll

    def open_model(kind):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(path, shape, kind)
            settings = ll.llama_model_default_params()
            settings.use_mmap = False
            model = ll.llama_model_load_from_file(str(path).encode(), settings)
        settings = ll.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max, settings.n_batch = batch * CONTEXT, batch, batch * PROMPT_TOKENS
        settings.n_threads = settings.n_threads_batch = threads
        return model, ll.llama_init_from_model(model, settings)

    def as_tokens(ids):
        """Return ids (rows, tokens) as a llama_batch that asks for the logits of each row's last token."""
        tokens, length = ll.llama_batch_init(ids.size, 0, 1), ids.shape[1]
        tokens.n_tokens = ids.size
        for i, token in enumerate(ids.flat):
            tokens.token[i], tokens.pos[i], tokens.logits[i] = int(token), i % length, i % length == length - 1
            tokens.n_seq_id[i], tokens.seq_id[i][0] = 1, i // length
        return tokens

    def last_tokens(tokens):
        length = tokens.n_tokens // batch
        return range(length - 1, tokens.n_tokens, length)

    def read(context, tokens):
        if ll.llama_decode(context, tokens):
            raise RuntimeError("llama_decode failed.")

    def logits(context):
        read(context, prompts)
        rows = (ll.llama_get_logits_ith(context, i) for i in last_tokens(prompts))
        return np.stack([np.ctypeslib.as_array(row, (VOCAB_SIZE,)).copy() for row in rows])

    prompts, newest = as_tokens(random_prompts(batch)), as_tokens(np.zeros((batch, 1), int))
    ids, positions = (np.ctypeslib.as_array(array, (batch,)) for array in (newest.token, newest.pos))
    exact_model, exact_context = open_model("F32")
    exact = logits(exact_context)
    ll.llama_free(exact_context)
    ll.llama_model_free(exact_model)
    _, context = open_model(kind)
    sampler = ll.llama_sampler_chain_init(ll.llama_sampler_chain_default_params())
    ll.llama_sampler_chain_add(sampler, ll.llama_sampler_init_top_k(TOP_K))
    ll.llama_sampler_chain_add(sampler, ll.llama_sampler_init_dist(0))

    def read_and_draw(tokens):
        read(context, tokens)
        return [ll.llama_sampler_sample(sampler, context, i) for i in last_tokens(tokens)]

    def write(new_tokens):
        ll.llama_memory_clear(ll.llama_get_memory(context), True)
        texts = [read_and_draw(prompts)]
        while len(texts) < new_tokens:
            ids[:], positions[:] = texts[-1], PROMPT_TOKENS + len(texts) - 1
            texts.append(read_and_draw(newest))
        return sum(map(len, texts))

    return logits(context), exact, write


def write_gguf(path: Path, shape: dict[str, int], kind: str) -> None:
    """Write a GPT-2 of random weights without a vocabulary; its matrices but the positions are of a kind of ggml's."""
    import gguf
    from gguf.quants import quantize

    matrices = gguf.GGMLQuantizationType[kind]

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
        weight = np.ones(size, np.float32) if len(size) == 1 else generator.normal(0, STDDEV, size).astype(np.float32)
        if len(size) == 1 or name == "position_embd":
            writer.add_tensor(f"{name}.weight", weight)
        else:
            writer.add_tensor(f"{name}.weight", quantize(weight, matrices), raw_dtype=matrices)
        if not name.endswith("embd"):
            writer.add_tensor(f"{name}.bias", np.zeros(size[0], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


HUGGING_FACE, LLAMA_CPP = ["transformers", "torch"], ["llama-cpp-python", "gguf"]

# What makes each system, and the packages it needs.
SYSTEMS = {
    "ours": (ours, ["aigc-tf"]),
    "hugging-face-eager": (hugging_face, HUGGING_FACE),
    "hugging-face-compiled": (functools.partial(hugging_face, is_compiled=True), HUGGING_FACE),
    "hugging-face-compiled-bfloat16": (
        functools.partial(hugging_face, is_compiled=True, dtype="bfloat16"),
        HUGGING_FACE,
    ),
    "keras-hub-tensorflow": (keras_hub, ["keras-hub"]),
    "llama.cpp-f32": (functools.partial(llama_cpp, kind="F32"), LLAMA_CPP),
    "llama.cpp-f16": (functools.partial(llama_cpp, kind="F16"), LLAMA_CPP),
    "llama.cpp-q8_0": (functools.partial(llama_cpp, kind="Q8_0"), LLAMA_CPP),
}


if __name__ == "__main__":
    main()
