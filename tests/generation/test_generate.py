import itertools
import threading

import numpy as np
import pytest
from conftest import CLAUSES, breaking_tokens, message_of, only, spread, table_model

import aigc_tf
from aigc_tf import Tokenizer, generate, generate_batch, kneser_ney, stream
from aigc_tf.generation import processors, writer
from aigc_tf.generation.batch import RandomNumbers, TextBatch
from aigc_tf.generation.engines.engine import make_engine
from aigc_tf.generation.sampler import Sampler
from aigc_tf.generation.settings import check_sampling
from aigc_tf.runtime.backend import keras

T = 48


def build_model(build, tokenizer):
    model = build(tokenizer.vocab_size, T, dropout=0.0)
    # Untrained logits are all alike: spread them, so that seed and context make a difference.
    for weight in model.trainable_weights:
        weight.assign(weight * 8)
    return model


@pytest.fixture(scope="module")
def model_and_weights(build, tokenizer):
    model = build_model(build, tokenizer)
    return model, model.get_weights()


@pytest.fixture
def model(model_and_weights):
    """The same model in each test, as its graph is traced but once, with the same weights."""
    model, weights = model_and_weights
    model.set_weights(weights)
    return model


@pytest.fixture(params=["numpy", "numba"])
def engine(request):
    return request.param


def greedy_by_hand(model, tokenizer, prompt, max_new_tokens):
    ids = [tokenizer.BOS, *tokenizer.encode(prompt)]
    new = []
    for _ in range(max_new_tokens):
        newest = ids[-T:]
        logits = np.array(model.predict_on_batch(np.array([newest + [0] * (T - len(newest))], np.int32)))
        logits = logits[0, len(newest) - 1]
        logits[[tokenizer.PAD, tokenizer.BOS, *breaking_tokens(tokenizer, ids)]] = -np.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.EOS:
            break
        new.append(ids[-1])
    return prompt + tokenizer.decode(new)


@pytest.mark.parametrize("prompt", ["", "白日", "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"])
def test_temperature_0_is_the_argmax_loop(model, tokenizer, prompt):
    expected = greedy_by_hand(model, tokenizer, prompt, 20)
    assert generate(model, tokenizer, prompt, max_new_tokens=20, temperature=0) == expected
    assert len(expected) > len(prompt)


def test_a_batch_is_written_as_each_text_alone(model, tokenizer):
    # The same prompt at the left of a batch of longer ones, hence with other rows and more steps around it.
    prompts = ["白", "白日依山尽，黄河入海流。", ""]
    batch = generate_batch(model, tokenizer, prompts, max_new_tokens=15, seed=3)
    alone = [generate(model, tokenizer, p, max_new_tokens=15, seed=3 + i) for i, p in enumerate(prompts)]
    assert batch == alone


def test_a_seed_repeats_the_text_and_another_changes_it(model, tokenizer):
    settings = {"max_new_tokens": 20, "temperature": 5.0, "top_p": None}
    texts = [generate(model, tokenizer, "白日", seed=seed, **settings) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    samples = generate_batch(model, tokenizer, ["白日"] * 5, seed=1, **settings)
    assert len(set(samples)) == 5
    assert generate(model, tokenizer, **settings) != generate(model, tokenizer, **settings)


def test_top_k_1_is_greedy_and_top_p_narrows(model, tokenizer):
    greedy = generate(model, tokenizer, "白", max_new_tokens=10, temperature=0)
    assert generate(model, tokenizer, "白", max_new_tokens=10, top_k=1, top_p=None, seed=5) == greedy
    assert generate(model, tokenizer, "白", max_new_tokens=10, top_p=1e-6, seed=5) == greedy
    assert generate(model, tokenizer, "白", max_new_tokens=10, temperature=1e-4, seed=5) == greedy


def test_it_stops_at_the_end_of_the_document(tokenizer):
    a, b, c = tokenizer.encode("白日依")
    # After the end this model would begin anew.
    model = table_model(tokenizer, {tokenizer.BOS: a, a: b, b: c, tokenizer.EOS: a})
    assert generate(model, tokenizer, max_new_tokens=50) == "白日依"
    assert generate(model, tokenizer, max_new_tokens=2) == "白日"
    assert generate(model, tokenizer, max_new_tokens=0) == ""
    assert generate_batch(model, tokenizer, ["", "日", "山"], max_new_tokens=9) == ["白日依", "日依", "山"]
    assert generate_batch(model, tokenizer, []) == []


def test_the_newest_tokens_are_kept(tokenizer):
    a, b = tokenizer.encode("白日")
    model = table_model(tokenizer, {a: b, b: a})
    prompt = "山" * 100 + "白"
    assert generate(model, tokenizer, prompt, max_new_tokens=30) == prompt + "日白" * 15


def test_padding_and_begin_are_never_written(tokenizer):
    a, b = tokenizer.encode("白日")
    model = table_model(tokenizer, {tokenizer.BOS: a, a: tokenizer.PAD, b: tokenizer.BOS})
    for settings in ({"temperature": 0}, {"seed": 1}):
        assert generate(model, tokenizer, max_new_tokens=5, top_p=None, **settings).startswith("白")
    flat = table_model(tokenizer, {i: i for i in range(tokenizer.vocab_size)})
    for layer in flat.layers[1:]:
        layer.embeddings.assign(np.zeros(layer.embeddings.shape, np.float32))
    sampler = Sampler(tokenizer, check_sampling(temperature=1.0, top_p=None))
    texts = TextBatch(make_engine(flat, 400, "numpy"), [[tokenizer.BOS]] * 400)
    for ids in writer.write_steps(texts, sampler, RandomNumbers(list(range(400))), 4, np.zeros(400, bool)):
        assert not {tokenizer.PAD, tokenizer.BOS} & set(ids.tolist())
        assert len(set(ids.tolist())) > 100


def test_a_stream_joins_to_the_text(model, tokenizer):
    settings = {"max_new_tokens": 20, "seed": 4}
    pieces = list(stream(model, tokenizer, "白日", **settings))
    assert "".join(pieces) == generate(model, tokenizer, "白日", **settings)
    assert pieces[0] == "白日"


def test_a_stream_never_shows_half_a_character():
    tokenizer = Tokenizer.train(["白"])
    ids = [tokenizer.BOS, *tokenizer.encode("龘🐉")]  # seven bytes
    model = table_model(tokenizer, dict(itertools.pairwise(ids)))
    assert list(stream(model, tokenizer, max_new_tokens=9)) == ["", "龘", "🐉"]


def test_a_prompt_of_unseen_characters_works(model, tokenizer):
    text = generate(model, tokenizer, "🐉龘", max_new_tokens=9, temperature=0, engine="numpy")
    # By hand half a character at the end is shown.
    assert text.rstrip("\ufffd") == greedy_by_hand(model, tokenizer, "🐉龘", 9).rstrip("\ufffd")


def write_by_hand(model, tokenizer, prompt, uniforms, temperature=0.8, top_p=0.9, eos_bias=0.0):
    """Write by the plain graph; return the text, and the mean of the log-probabilities that it gives to the tokens."""
    ids, scores = [tokenizer.BOS, *tokenizer.encode(prompt)], []
    first = len(ids)
    for uniform in uniforms:
        logits = np.array(model.predict_on_batch(np.array([ids + [0] * (T - len(ids))], np.int32)))[0, len(ids) - 1]
        changed = logits.copy()
        changed[[tokenizer.PAD, tokenizer.BOS, *breaking_tokens(tokenizer, ids)]] = -np.inf
        changed[tokenizer.EOS] += eos_bias
        changed = processors.keep_top_p(processors.apply_temperature(changed, temperature), top_p)
        ids.append(int(processors.draw(changed, uniform)))
        scores.append(processors.log_softmax(logits)[ids[-1]])
        if ids[-1] == tokenizer.EOS:
            break
    return prompt + "".join(tokenizer.decode_stream(ids[first:], cut=True)), np.mean(scores)


def test_texts_are_those_of_the_plain_graph_with_the_same_seed_and_settings(model, tokenizer):
    for seed in range(3):
        uniforms = np.random.default_rng(seed).random(25)
        for settings in ({}, {"temperature": 1.3, "top_p": 0.7}):
            expected, _ = write_by_hand(model, tokenizer, "白日", uniforms, **settings)
            settings = {"max_new_tokens": 25, "seed": seed, "engine": "numpy", **settings}
            assert generate(model, tokenizer, "白日", **settings) == expected


def test_best_of_is_the_likeliest_of_the_texts_of_its_seeds(model, tokenizer):
    # The end comes now and then, so that texts of several lengths compete.
    settings = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.95, "logit_bias": {tokenizer.EOS: 5.0}}
    settings["engine"] = "numpy"
    prompts, lengths = ["白", "依山尽", ""], set()
    for best_of, seed in ((2, 0), (5, 1)):
        expected = []
        for i, prompt in enumerate(prompts):
            seeds = [seed + i, *((seed + i, j) for j in range(1, best_of))]
            chances = [np.random.default_rng(seed).random(12) for seed in seeds]
            texts = [write_by_hand(model, tokenizer, prompt, u, 1.5, 0.95, eos_bias=5.0) for u in chances]
            assert texts[0][0] == generate(model, tokenizer, prompt, seed=seed + i, **settings)
            lengths.update(len(tokenizer.encode(text)) - len(tokenizer.encode(prompt)) for text, _ in texts)
            expected.append(max(texts, key=lambda pair: pair[1])[0])
        assert generate_batch(model, tokenizer, prompts, seed=seed, best_of=best_of, **settings) == expected
        alone = [
            generate(model, tokenizer, p, seed=seed + i, best_of=best_of, **settings) for i, p in enumerate(prompts)
        ]
        assert alone == expected
    assert len(lengths) > 2


def test_best_of_compares_the_mean_log_probability_of_all_tokens_and_the_end():
    tokenizer = Tokenizer.train(["白日依山"])
    white, sun, hill, eos = *tokenizer.encode("白日山"), tokenizer.EOS
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_p": None, "best_of": 30, "seed": 0}
    # 白 and what follows are less likely in all, 1/2 · 1/2 to 日's 1/2; but twelve tokens share it, and 日's two.
    model = table_model(tokenizer, {tokenizer.BOS: [white, sun], white: [hill, sun], hill: hill, sun: eos})
    assert generate(model, tokenizer, **settings) == "白" + "山" * 11
    # Where the others have 1/2 for each token 日 is best, as its end is a token too.
    model = table_model(tokenizer, {tokenizer.BOS: [white, sun], white: [hill, sun], hill: [hill, white], sun: eos})
    assert generate(model, tokenizer, **{**settings, "max_new_tokens": 4}) == "日"


def test_best_of_compares_probabilities_of_the_model_without_settings():
    tokenizer = Tokenizer.train(["白日依山"])
    white, sun, hill, eos = *tokenizer.encode("白日山"), tokenizer.EOS
    model = table_model(tokenizer, {tokenizer.BOS: [white, sun], white: eos, sun: [hill, eos], hill: eos})
    settings = {"max_new_tokens": 9, "temperature": 1.0, "top_p": None, "best_of": 40, "seed": 0}
    # What the settings prefer, 日 and after it 山, comes more often, but the model finds 白 likelier.
    for preferring in ({"logit_bias": {"日": 2.0, "山": 2.0}}, {"presence_penalty": -2.0, "logit_bias": {"日": 2.0}}):
        assert generate(model, tokenizer, **settings, **preferring) == "白"


def test_prompts_of_very_different_lengths_do_not_affect_each_other(model, tokenizer, engine):
    long = "，".join(CLAUSES)
    prompts = ["", "白", long * 2, "龘🐉", long[:T], long[: T - 1], long[: T - 2] + "龘", "\n"]
    settings = {"max_new_tokens": 10, "top_p": 0.95, "temperature": 1.0, "engine": engine}
    batch = generate_batch(model, tokenizer, prompts, seed=3, **settings)
    alone = [generate(model, tokenizer, prompt, seed=3 + i, **settings) for i, prompt in enumerate(prompts)]
    assert batch == alone
    assert all(text.startswith(prompt) and len(text) > len(prompt) for text, prompt in zip(batch, prompts, strict=True))


def test_a_text_may_be_many_times_as_long_as_the_context(tokenizer, engine):
    # Longer too than what is first made room for, in columns and in random numbers.
    context, length = 8, 600
    model = spread(aigc_tf.transformer(tokenizer.vocab_size, context, num_layers=2, num_heads=2, hidden_dim=16))
    bias = {**only(tokenizer, "".join(CLAUSES)), tokenizer.EOS: -float("inf")}
    settings = {"temperature": 3.0, "top_p": None, "seed": 0, "logit_bias": bias, "engine": engine}
    text = generate(model, tokenizer, "白", max_new_tokens=length, **settings)
    assert len(text) == length + 1
    # What is written last follows the newest tokens alone, by the plain graph, as what was written first.
    ids = [tokenizer.BOS, *tokenizer.encode(text)]
    uniforms = np.random.default_rng(0).random(length)
    windows, starts, start = [], [], 0
    for end in range(2, len(ids)):
        start = end - context // 2 if end - start > context else start
        starts.append(start)
        windows.append(ids[start:end] + [0] * (context - end + start))
    chosen = np.r_[:50, length - 100 : length]
    logits = np.array(model.predict_on_batch(np.array(windows, np.int32)[chosen]))
    logits = logits[np.arange(150), [i + 1 - starts[i] for i in chosen]]
    logits[:, list(bias)] = -np.inf
    drawn = processors.draw(logits / 3, uniforms[chosen])
    assert (drawn == np.array(ids)[chosen + 2]).mean() > 0.97  # but where a number falls on a border


def test_an_n_gram_model_writes_with_every_setting(documents, tokenizer):
    model = kneser_ney(documents, tokenizer, order=3)
    text = generate(
        model, tokenizer, "白日", max_new_tokens=60, seed=0, temperature=1.2, top_k=50, top_p=0.95, min_p=0.01,
        typical_p=0.95, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1, no_repeat_ngram=4,
        exempt=["，", "。"], banned=["黄河"], forced=["明月", "龘"], logit_bias={"山": -1.0}, best_of=2,
    )  # fmt: skip
    assert "明月" in text
    assert "龘" in text
    assert "黄河" not in text
    text = generate(model, tokenizer, "白日", max_new_tokens=20, num_beams=4)
    assert text.startswith("白日依山尽")


def test_a_model_that_has_changed_is_read_again(model, tokenizer, engine):
    settings = {"max_new_tokens": 15, "temperature": 0, "engine": engine}
    before = generate(model, tokenizer, "白日", **settings)
    for weight in model.trainable_weights:
        weight.assign(weight * -1)
    changed = generate(model, tokenizer, "白日", **settings)
    assert changed == greedy_by_hand(model, tokenizer, "白日", 15).rstrip("\ufffd")  # by hand half a character is shown
    assert changed != before


@pytest.mark.parametrize("jit_compile", [False, True])
def test_a_model_that_is_trained_further_is_read_again(build, tokenizer, jit_compile):
    # Training may change variables where they stand in memory.
    if jit_compile and build.architecture == "lstm":
        pytest.skip("it takes long to compile")
    model = build_model(build, tokenizer)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(3.0), loss, jit_compile=jit_compile)
    ids = np.array([tokenizer.encode("，".join(CLAUSES * 2))[: T + 1]], np.int32)
    texts = []
    for _ in range(4):
        texts.append(generate(model, tokenizer, "白日", max_new_tokens=4, temperature=0, engine="numpy"))
        # By hand half a character at the end is shown.
        assert texts[-1].rstrip("\ufffd") == greedy_by_hand(model, tokenizer, "白日", 4).rstrip("\ufffd")
        model.train_on_batch(ids[:, :-1], ids[:, 1:])
    assert len(set(texts)) > 2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("wrong", ["nan", "inf"])
def test_logits_that_are_not_finite_are_refused(build, tokenizer, engine, wrong):
    model = build(tokenizer.vocab_size, T)
    if build.architecture == "transformer":
        weight = model.get_layer("final_norm").weights[1]  # the offset, after which the sum of a row is of one sign
        model.get_layer("token_embedding").weights[0].assign(np.ones((tokenizer.vocab_size, 16)))
    else:
        weight = model.get_layer("head").weights[1]
        model.get_layer("token_embedding").weights[0].assign(np.ones((tokenizer.vocab_size, 8)))
    weight.assign(np.full(weight.shape, float(wrong)))
    for settings in ({}, {"temperature": 0}, {"repetition_penalty": 1.5}, {"num_beams": 2}):
        settings["engine"] = engine
        assert "not finite (NaN or infinite)" in message_of(ValueError, generate, model, tokenizer, "白", **settings)


def test_streams_read_in_turns_are_what_they_are_alone(model, tokenizer, engine):
    prompts, settings = ["白日", "", "依", "白日"], {"max_new_tokens": 15, "temperature": 1.0, "engine": engine}
    alone = [generate(model, tokenizer, prompt, seed=i, **settings) for i, prompt in enumerate(prompts)]
    streams = [stream(model, tokenizer, prompt, seed=i, **settings) for i, prompt in enumerate(prompts)]
    texts = [""] * len(prompts)
    # In turns, and some faster than others.
    for turn in itertools.count():
        pieces = [next(streams[i], None) for i in range(len(prompts)) if turn % (i + 1) == 0]
        for i, piece in zip([i for i in range(len(prompts)) if turn % (i + 1) == 0], pieces, strict=True):
            texts[i] += piece or ""
        if texts == alone and turn > 80:
            break
        assert turn < 150
    assert texts == alone


def test_streams_read_by_threads_are_what_they_are_alone(model, tokenizer, engine):
    settings = {"max_new_tokens": 20, "temperature": 1.0, "engine": engine}
    texts = {}

    def write(seed):
        texts[seed] = "".join(stream(model, tokenizer, "白日", seed=seed, **settings))

    threads = [threading.Thread(target=write, args=[seed]) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {seed: generate(model, tokenizer, "白日", seed=seed, **settings) for seed in range(6)}


def test_a_stream_may_be_closed_early(model, tokenizer):
    expected = generate(model, tokenizer, "白日", max_new_tokens=20, seed=4)
    for num_pieces in (0, 1, 2, 5):
        pieces = stream(model, tokenizer, "白日", max_new_tokens=20, seed=4)
        assert expected.startswith("".join(itertools.islice(pieces, num_pieces)))
        pieces.close()
        assert list(pieces) == []
    assert "".join(stream(model, tokenizer, "白日", max_new_tokens=20, seed=4)) == expected


def test_a_stream_shows_each_character_before_the_next_is_chosen(tokenizer):
    a, b = tokenizer.encode("白日")
    # So a stream of more than would ever be written begins at once.
    pieces = stream(table_model(tokenizer, {a: b, b: a}), tokenizer, "白", max_new_tokens=10**11, seed=0)
    assert list(itertools.islice(pieces, 4)) == ["白", "日", "白", "日"]


@pytest.mark.parametrize("name", ["best_of", "num_beams", "length_penalty"])
def test_a_stream_refuses_what_is_known_only_at_the_end(tokenizer, name):
    message = message_of(ValueError, stream, table_model(tokenizer, {}), tokenizer, "白", **{name: 2})
    assert message == f"stream() does not support {name}, known only at the end. Call generate."


def test_a_text_never_ends_in_half_a_character():
    tokenizer = Tokenizer.train(["白"])
    ids = [tokenizer.BOS, *tokenizer.encode("龘白🐉é")]
    model = table_model(tokenizer, dict(itertools.pairwise(ids)))
    for max_new_tokens in range(12):
        num_bytes = [3, 1, 4, 2]
        whole = sum(sum(num_bytes[: i + 1]) <= max_new_tokens for i in range(4))
        settings = {"max_new_tokens": max_new_tokens, "temperature": 0}
        assert generate(model, tokenizer, **settings) == "龘白🐉é"[:whole]
        assert list(stream(model, tokenizer, **settings)) == ["", *"龘白🐉é"[:whole]]
        assert generate_batch(model, tokenizer, ["", "白"], **settings)[0] == "龘白🐉é"[:whole]
        assert generate(model, tokenizer, max_new_tokens=max_new_tokens, num_beams=2) == "龘白🐉é"[:whole]


@pytest.mark.parametrize("ends", [False, True])
def test_a_text_ends_in_the_same_way_by_each_function(ends):
    # Of a model that begins a character and has none of its other bytes to go on with.
    tokenizer = Tokenizer.train(["白"])
    white, first = *tokenizer.encode("白"), 3 + "白".encode()[0]
    model = table_model(tokenizer, {tokenizer.BOS: white, white: first, first: tokenizer.EOS if ends else white})
    settings = {"max_new_tokens": 7, "temperature": 0}
    text = generate(model, tokenizer, **settings)
    assert "".join(stream(model, tokenizer, **settings)) == text
    assert generate_batch(model, tokenizer, ["白", ""], **settings)[1] == text
    assert generate(model, tokenizer, max_new_tokens=7, num_beams=2) == text


def test_arguments_of_a_wrong_type_are_refused_in_one_line(tokenizer):
    model = table_model(tokenizer, {})
    for function, arguments, part in (
        (generate, (model, tokenizer, None), 'A prompt must be a text, got None. For no prompt give "".'),
        (
            generate,
            (model, tokenizer, ["白"]),
            "A prompt must be a text, got ['白']. For several prompts call generate_batch",
        ),
        (generate, (model, "春风"), "The second argument must be the model's Tokenizer, got '春风'."),
        (
            generate,
            ("runs/tang", tokenizer),
            "model must be a language model, got 'runs/tang'. Load that of a run folder with",
        ),
        (
            generate_batch,
            (model, tokenizer, "春风"),
            "prompts must be a list of texts, got '春风'. For one prompt call generate",
        ),
        (generate_batch, (model, tokenizer, None), "prompts must be a list of texts, got None"),
        (generate_batch, (model, tokenizer, ["白", 7]), "A prompt must be a text, got 7"),
        (stream, (model, tokenizer, 3), "A prompt must be a text, got 3"),
    ):
        assert part in message_of(TypeError, function, *arguments)
