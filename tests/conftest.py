"""What the tests share: a small real corpus, its tokenizer, and one tiny model of each kind."""

import pytest

CLAUSES = "白日依山尽 黄河入海流 欲穷千里目 更上一层楼 床前明月光 疑是地上霜 举头望明月 低头思故乡".split()


@pytest.fixture(scope="session")
def documents():
    """Sixty different couplets of well-known clauses, of one to three lines."""
    lines = [f"{a}，{b}。" for a in CLAUSES for b in CLAUSES if a != b]
    return ["\n".join(lines[i : i + 1 + i % 3]) for i in range(len(lines))]


@pytest.fixture(scope="session")
def tokenizer(documents):
    from aigc_tf import Tokenizer

    return Tokenizer.train(documents)


@pytest.fixture(scope="session", params=["lstm", "transformer"])
def build(request):
    """A function (vocab_size, context, **settings) -> tiny model, of each architecture in turn."""
    import aigc_tf

    def build_tiny(vocab_size, context, **settings):
        if request.param == "transformer":
            settings = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, **settings}
            return aigc_tf.transformer(vocab_size, context, **settings)
        return aigc_tf.lstm(vocab_size, context, **{"num_layers": 2, "hidden_dim": 16, **settings})

    build_tiny.architecture = request.param
    return build_tiny


def message_of(error, function, *args, **kwargs):
    """Return the message of the error that a call raises, which must be one line."""
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message
