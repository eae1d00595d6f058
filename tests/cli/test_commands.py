import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from aigc_tf import Tokenizer, generate, load_stopwords, load_writer, read_run, split
from aigc_tf.cli.commands import main
from aigc_tf.runs import estimate as estimate_module
from aigc_tf.runs.pipeline import default_steps
from aigc_tf.runs.search_space import DEFAULT_SPACE
from aigc_tf.runtime.locks import locked

SMALL = "--context 16 --steps 4 --validations 2 --num-layers 1 --hidden-dim 16 --valid-fraction 0.2".split()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, documents):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "couplets.txt").write_text("\n\n".join(documents), "utf-8")
    return folder


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("runs") / "couplets"
    assert main(["train", str(corpus), "--out", str(folder), *SMALL]) == 0
    return folder


def only_error(capsys, arguments):
    """Run a command that must fail, and return its one line."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("aigc-tf: error: ")
    return captured.err


def test_train_saves_a_run_with_its_settings_and_figures(run_folder, documents):
    run = read_run(run_folder)
    assert run["settings"]["steps"] == 4
    assert run["settings"]["model"] == "transformer"
    assert run["data"]["documents"] == len(documents)
    assert 0 < run["figures"]["bits_per_char"] < 20
    assert {p.name for p in run_folder.iterdir()} == {
        "log.csv", "model.keras", "run.json", "tensorboard", "tokenizer.json"
    }  # fmt: skip


def test_train_shows_progress_and_figures(corpus, tmp_path, capsys):
    assert main(["train", str(corpus), "--out", str(tmp_path / "run"), "--model", "lstm", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "lstm: " in out
    assert "step 4/4" in out
    assert re.search(r"^bits per character +\d", out, re.MULTILINE)
    assert re.search(r"^  token frequencies +\d+\.\d{4}$", out, re.MULTILINE)
    assert str(tmp_path / "run") in out


def test_the_same_command_resumes_a_stopped_training(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", str(corpus), *SMALL, "--steps", "1000000", "--checkpoint-steps", "3"]
    steps = []

    def stop_in_training():
        def checkpoints():
            return set(tmp_path.rglob("step-*.npz"))

        before = checkpoints()
        while not checkpoints() - before:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    for _ in range(2):  # without --out: it finds its folder again
        threading.Thread(target=stop_in_training).start()
        assert main(arguments) == 0
        out = capsys.readouterr().out
        steps.append(int(re.search(r"stopped after (\d+) of 1000000 steps; what was learned is kept", out)[1]))
    assert f"resumes after step {steps[0]:,} from runs" in out
    assert 0 < steps[0] < steps[1]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [f"{corpus.stem}-transformer"]
    message = only_error(capsys, [*arguments, "--learning-rate", "0.5"])
    assert "learning_rate was 0.001, is 0.5" in message
    assert "name another folder" in message


TRAIN = """
import os, sys, time
from aigc_tf.training import session
from aigc_tf.cli.commands import main
# Both have begun before either may end.
def meet(self, logs=None):
    open(sys.argv[1] + str(os.getpid()), "w").close()
    while len([name for name in os.listdir(".") if name.startswith(sys.argv[1])]) < 2:
        time.sleep(0.01)
session.Session.on_train_begin = meet
sys.exit(main(sys.argv[2:]))
"""


def test_two_runs_started_together_take_two_folders(corpus, tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, "began-", "train", str(corpus), *SMALL, "--hidden-dim", str(width)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for width in (16, 32)
    ]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    folders = [re.search("^saved in (.*); generate", out, re.MULTILINE)[1] for out, _ in outputs]
    assert sorted(folders) == [f"runs/{corpus.stem}-transformer", f"runs/{corpus.stem}-transformer-2"]
    widths = [read_run(tmp_path / folder)["settings"]["hidden_dim"] for folder in folders]
    assert widths == [16, 32]


def test_a_folder_with_a_running_training_is_refused_by_name(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    errors = []

    def train():
        errors.append(only_error(capsys, ["train", str(corpus), "--out", str(out), *SMALL]))

    with locked(out):
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
    assert f"A training is running in this folder (process {os.getpid()} on " in errors[0]
    assert str(out) in errors[0]


def test_config_takes_the_settings_of_another_run_under_the_given_options(run_folder, corpus, tmp_path, capsys):
    config = str(run_folder / "run.json")
    out = tmp_path / "again"
    assert main(["train", str(corpus), "--out", str(out), "--config", config, "--seed", "5", "--steps", "3"]) == 0
    assert read_run(out)["settings"] == {**read_run(run_folder)["settings"], "seed": 5, "steps": 3}
    for content, part in [
        ('{"settings": {"width": 3}}', "There is no setting 'width'"),
        ('{"steps": "many"}', "steps must be of type int, got 'many'"),
        ("[1]", "must hold an object of settings, got list"),
        ("{", "must be JSON: "),
    ]:
        (tmp_path / "config.json").write_text(content)
        arguments = ["train", str(corpus), "--out", str(tmp_path / "x"), "--config", str(tmp_path / "config.json")]
        assert part in only_error(capsys, arguments)
    assert "No such file" in only_error(capsys, ["train", str(corpus), "--config", str(tmp_path / "none")])
    assert not (tmp_path / "x").exists()


def test_prose_trains_with_words(tmp_path, documents, capsys):
    prose = tmp_path / "散文.txt"
    prose.write_text("\n\n".join(f"我们今天学习第{i}课：{d}" for i, d in enumerate(documents)), "utf-8")
    (tmp_path / "words.txt").write_text("学习第 100 n\n", "utf-8")
    arguments = ["train", str(prose), "--unit", "word", "--out", str(tmp_path / "run"), *SMALL]
    assert main([*arguments, "--user-dict", str(tmp_path / "words.txt")]) == 0
    tokenizer = Tokenizer.load(tmp_path / "run" / "tokenizer.json")
    assert tokenizer.unit == "word"
    assert {"我们", "今天", "学习第"} <= set(tokenizer.pieces)


def test_stopwords_are_removed_and_their_share_is_shown(tmp_path, capsys):
    prose = tmp_path / "a.txt"
    prose.write_text("\n\n".join(f"我们的模型会写第{i}首诗。" for i in range(40)), "utf-8")
    out = tmp_path / "run"
    assert main(["train", str(prose), "--remove-stopwords", "cn", "--out", str(out), *SMALL]) == 0
    share = re.search(r"stopwords: ([\d.]+)% of the words", capsys.readouterr().out)
    assert 20 < float(share[1]) < 60
    assert "的" not in json.loads((out / "tokenizer.json").read_text("utf-8"))["pieces"]


def test_evaluate_repeats_the_figures_of_the_run(run_folder, corpus, capsys):
    assert main(["evaluate", str(run_folder), str(corpus), "--held-out"]) == 0
    out = capsys.readouterr().out
    bits = float(re.search(r"^bits per character +([\d.]+)$", out, re.MULTILINE)[1])
    assert bits == pytest.approx(read_run(run_folder)["figures"]["bits_per_char"], abs=1e-3)
    for words in ("nats per token", "perplexity per token", "tokens per character", "tokens predicted", "characters"):
        assert re.search(rf"^{words} +[\d.,]+$", out, re.MULTILINE), words
    assert main(["evaluate", str(run_folder), str(corpus), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["documents"] == 56
    assert set(figures) == set(read_run(run_folder)["figures"]) - {"steps_done"}


def test_estimate_prints_costs_and_a_memory_warning(corpus, capsys):
    small = "--num-layers 1 --hidden-dim 16 --context 16 --steps 60 --valid-fraction 0.2".split()
    assert main(["estimate", str(corpus), *small, "--seconds", "0.2", "--watts", "50"]) == 0
    out = capsys.readouterr().out
    for name in ("parameters", "peak memory", "total time", "energy"):
        assert re.search(rf"^{name} +\S", out, re.MULTILINE), name
    assert main(["estimate", str(corpus), "--size", "base", "--batch-size", "100000", "--seconds", "0"]) == 0
    assert "warning: This training needs about" in capsys.readouterr().out


def test_tune_finds_the_better_setting_and_saves_its_run(corpus, tmp_path, capsys):
    small = "steps=3 context=16 num_layers=1 hidden_dim=16 validations=1 valid_fraction=0.2".split()
    settings = [part for text in ["learning_rate=1e-9,1e-2", *small] for part in ("--set", text)]
    assert main(["tune", str(corpus), "--out", str(tmp_path / "search"), "--trials", "2", *settings]) == 0
    out = capsys.readouterr().out
    assert "trial 2/2" in out
    assert read_run(tmp_path / "search" / "best")["settings"]["learning_rate"] == 1e-2
    assert "holds no trials.json" in only_error(capsys, ["tune", str(corpus), "--out", str(corpus), "--trials", "1"])


def test_estimate_counts_both_sides_with_the_vocabulary_of_the_options(corpus, documents, monkeypatch):
    estimate, given = estimate_module.estimate, {}
    monkeypatch.setattr(estimate_module, "estimate", lambda *args, **of: given.update(of) or estimate(*args, **of))
    options = "--vocab-size 265 --valid-fraction 0.2 --context 8 --batch-size 1 --seconds 0".split()
    assert main(["estimate", str(corpus), *options]) == 0
    sides = split(documents, 0.2)
    tokenizer = Tokenizer.train(sides[0], vocab_size=265)
    train_tokens, valid_tokens = (sum(map(len, tokenizer.encode_documents(side))) for side in sides)
    assert (given["train_tokens"], given["valid_tokens"]) == (train_tokens, valid_tokens)
    assert given["vocab_size"] == 265
    assert given["steps"] == default_steps(train_tokens, 8) > 500


def test_tune_has_the_budget_the_seed_and_the_space_of_the_options(corpus, documents, tmp_path, monkeypatch):
    calls = []
    trial = {"trial": 1, "settings": {}, "bits_per_char": 7.0, "seconds": 1.0, "error": None}
    monkeypatch.setattr("aigc_tf.runs.tune.tune", lambda *args, **settings: calls.append((args, settings)) or [trial])
    for options, settings, space in (
        ("", {"trials": 20, "minutes": None, "seed": 0}, DEFAULT_SPACE),
        ("--minutes 3 --seed 4", {"trials": None, "minutes": 3, "seed": 4}, DEFAULT_SPACE),
        ("--trials 2 --minutes 3 --set seed=5", {"trials": 2, "minutes": 3, "seed": 5}, DEFAULT_SPACE),
        (
            "--set dropout=0.3 --set steps=5",
            {"trials": 20, "minutes": None, "seed": 0, "dropout": 0.3, "steps": 5},
            {name: values for name, values in DEFAULT_SPACE.items() if name != "dropout"},
        ),
        ("--trials 1 --set context=8,16", {"trials": 1, "minutes": None, "seed": 0}, {"context": [8, 16]}),
    ):
        assert main(["tune", str(corpus), "--out", str(tmp_path), *options.split()]) == 0
        assert calls.pop() == ((documents, tmp_path, space), settings), options


def test_train_takes_devices_and_checkpoints_as_the_options_say(corpus, tmp_path, monkeypatch):
    devices, given = [], []
    monkeypatch.setattr(
        "aigc_tf.runtime.distribution.use_devices", lambda *args, **settings: devices.append((args, settings))
    )
    monkeypatch.setattr("aigc_tf.runs.pipeline.run_pipeline", lambda *args, **settings: given.append(settings))
    for options, expected in (
        ("", []),
        ("--devices 0", [((None,), {"model_parallel": 1, "precision": "auto"})]),
        ("--devices 2 --precision float32", [((2,), {"model_parallel": 1, "precision": "float32"})]),
        ("--model-parallel 2", [((None,), {"model_parallel": 2, "precision": "auto"})]),
    ):
        devices.clear()
        assert main(["train", str(corpus), "--out", str(tmp_path / "run"), *options.split()]) == 0
        assert devices == expected, options
    checkpoints = {"checkpoint_minutes": 7.0, "checkpoint_steps": 9, "keep_checkpoints": 4}
    options = [part for name, value in checkpoints.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["train", str(corpus), "--out", str(tmp_path / "run"), *options]) == 0
    assert checkpoints.items() <= given[-1].items()


def test_a_corpus_can_be_named(run_folder, capsys):
    assert "A corpus must be one of" in only_error(capsys, ["evaluate", str(run_folder), "corpus:none"])


def test_generate_is_repeatable_with_a_seed(run_folder, capsys):
    texts = []
    for _ in range(2):
        assert main(["generate", str(run_folder), "白日", "--seed", "3", "--max-new-tokens", "9"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("白日")
    assert main(["generate", str(run_folder), "--num-samples", "2", "--max-new-tokens", "3"]) == 0


def written(capsys, run_folder, *arguments):
    assert main(["generate", str(run_folder), "白日", "--seed", "5", "--max-new-tokens", "30", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ("--temperature 0", {"temperature": 0}),
        ("--temperature 2.5", {"temperature": 2.5}),
        ("--top-k 4", {"top_k": 4}),
        ("--top-p 0.3", {"top_p": 0.3}),
        ("--min-p 0.97", {"min_p": 0.97}),
        ("--typical-p 0.3", {"typical_p": 0.3}),
        ("--repetition-penalty 1.5", {"repetition_penalty": 1.5}),
        ("--presence-penalty 5", {"presence_penalty": 5.0}),
        ("--frequency-penalty -5", {"frequency_penalty": -5.0}),
        ("--no-repeat-ngram 1 --top-k 20", {"no_repeat_ngram": 1, "top_k": 20}),
        ("--ban 白日 --ban 月 --frequency-penalty -9", {"banned": ["白日", "月"], "frequency_penalty": -9.0}),
        ("--force 明月 --force 龘", {"forced": ["明月", "龘"]}),
        ("--best-of 9", {"best_of": 9}),
        ("--num-beams 3", {"num_beams": 3}),
        ("--num-beams 3 --length-penalty -3", {"num_beams": 3, "length_penalty": -3.0}),
    ],
)
def test_each_option_of_generate_is_the_setting_of_that_name(run_folder, capsys, arguments, settings):
    model, tokenizer = load_writer(run_folder)
    expected, without = (
        generate(model, tokenizer, "白日", seed=5, max_new_tokens=30, **changed) for changed in (settings, {})
    )
    assert written(capsys, run_folder, *arguments.split()) == expected + "\n"
    assert expected != without


def test_several_words_can_be_banned(run_folder, capsys):
    _, tokenizer = load_writer(run_folder)
    free = written(capsys, run_folder, "--top-k", "50")
    words = [word for word in dict.fromkeys(free[2:]) if tokenizer.piece_id(word) is not None and word.strip()][:3]
    assert len(words) == 3
    arguments = [part for word in words for part in ("--ban", word)]
    assert not set(words) & set(written(capsys, run_folder, "--top-k", "50", *arguments)[2:])


def test_exempt_names_a_list_and_takes_punctuation_along(run_folder, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("白\n依\n", "utf-8")
    model, tokenizer = load_writer(run_folder)
    for name in ("cn", str(tmp_path / "words.txt")):
        exempt = [*load_stopwords(name), *"，。、；：？！“”‘’（）《》…—\n"]
        settings = {"seed": 5, "max_new_tokens": 60, "no_repeat_ngram": 1, "top_k": 30, "temperature": 0.5}
        expected = generate(model, tokenizer, "白日", exempt=exempt, **settings)
        arguments = "--max-new-tokens 60 --no-repeat-ngram 1 --top-k 30 --temperature 0.5 --exempt".split()
        assert written(capsys, run_folder, *arguments, name) == expected + "\n"
    assert expected != generate(model, tokenizer, "白日", **settings)


def test_samples_have_consecutive_seeds(run_folder, capsys):
    model, tokenizer = load_writer(run_folder)
    for arguments, settings in (([], {}), (["--best-of", "2"], {"best_of": 2})):
        texts = [generate(model, tokenizer, "白日", seed=5 + i, max_new_tokens=30, **settings) for i in range(3)]
        assert written(capsys, run_folder, "--num-samples", "3", *arguments) == "\n\n".join(texts) + "\n"
        assert len(set(texts)) == 3


def test_generate_prints_json_for_the_prompts_of_a_file(run_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text("白日\n\n明月  \n", "utf-8")
    common = ["--seed", "5", "--max-new-tokens", "30", "--num-samples", "2", "--json", "--stop", "，"]
    assert main(["generate", str(run_folder), "--prompt-file", str(tmp_path / "prompts.txt"), *common]) == 0
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == ["白日", "白日", "", "", "明月", "明月"]
    model, tokenizer = load_writer(run_folder)
    for i, line in enumerate(lines):
        text = generate(
            model, tokenizer, line["prompt"], seed=5 + i, max_new_tokens=30, stop="，", log_probability=True
        )
        assert line["seed"] == 5 + i
        assert (line["text"], line["new"], line["finish_reason"]) == (text, text.new, text.finish_reason)
        assert line["log_probability"] == pytest.approx(text.log_probability, abs=1e-3)
        assert "，" not in line["new"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\ufeff白日\r\n\r\n明月\r\n".encode())))
    assert main(["generate", str(run_folder), "--prompt-file", "-", *common]) == 0
    assert capsys.readouterr().out == out
    assert "not both" in only_error(capsys, ["generate", str(run_folder), "白", "--prompt-file", "-"])
    (tmp_path / "prompts.txt").write_bytes("白日".encode("gb18030"))
    error = only_error(capsys, ["generate", str(run_folder), "--prompt-file", str(tmp_path / "prompts.txt")])
    assert "prompts.txt must be UTF-8 text, but byte" in error
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("白日".encode("gb18030"))))
    assert "standard input must be" in only_error(capsys, ["generate", str(run_folder), "--prompt-file", "-"])


def test_json_and_tables_hold_no_control_characters(run_folder, tmp_path, capsys):
    told = {"a\x1b[31m\x9b31m\u202e": "\ud800 春"}
    (tmp_path / "run.json").write_text(json.dumps({**read_run(run_folder), "figures": told}))
    assert main(["info", str(tmp_path), "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["figures"] == told
    assert "春" in out
    assert not set(out) & set("\x1b\x9b\u202e\ud800")
    assert main(["info", str(tmp_path)]) == 0
    assert "\\ud800 春" in capsys.readouterr().out


def test_a_name_in_a_run_cannot_pass_for_a_line(run_folder, tmp_path, capsys):
    told = {"a\nfigures": 1, "data": {"b\n  sha256": "c\nsettings"}, "figures": {"d": 10**400}}
    (tmp_path / "run.json").write_text(json.dumps({**read_run(run_folder), **told}))
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("\nfigures") == out.count("\nsettings") == 1
    assert "\n  sha256" not in out
    assert f"{10**400:,}" in out


@pytest.mark.parametrize("option", [["--force"], ["--ban"], ["--stop"], []])
def test_words_of_another_encoding_are_refused(run_folder, option):
    arguments = [*option, os.fsdecode("春风".encode("gbk"))]
    done = run_command(["generate", run_folder, *arguments], subprocess.PIPE)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "must be UTF-8, got b'\\xb4\\xba\\xb7\\xe7'. Set the terminal to UTF-8" in done.stderr


def test_new_only_leaves_out_the_prompt(run_folder, capsys):
    model, tokenizer = load_writer(run_folder)
    texts = [generate(model, tokenizer, "白日", seed=5 + i, max_new_tokens=30) for i in range(2)]
    assert written(capsys, run_folder, "--new-only") == texts[0].new + "\n"
    several = written(capsys, run_folder, "--new-only", "--num-samples", "2")
    assert several == f"{texts[0].new}\n\n{texts[1].new}\n"
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patched:
        patched.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        numbered = written(capsys, run_folder, "--num-samples", "2")
    assert numbered.startswith("[1]\n白日")
    assert "\n\n[2]\n白日" in numbered


def test_prompts_are_cleaned_and_unseen_characters_named(run_folder, capsys):
    def generated(prompt, *arguments):
        return main(["generate", str(run_folder), prompt, "--seed", "1", "--max-new-tokens", "3", "--json", *arguments])

    assert generated("白\u200b日風  ") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["prompt"] == "白日風"
    assert captured.err == "aigc-tf: this model has never seen 風\n"
    assert generated("白日  ", "--raw") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "白日  "
    assert generated("白日\n") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "白日\n"


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 0
    assert "generate" in capsys.readouterr().out


@pytest.mark.parametrize("error", [MemoryError("too much"), ImportError("no numba"), OverflowError("x\ny")])
def test_every_failure_is_one_line(run_folder, capsys, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr("aigc_tf.runs.folder.load_writer", fail)
    assert main(["generate", str(run_folder)]) == 1
    expected = f"aigc-tf: error: {type(error).__name__}: {str(error).split()[0]}"
    err = capsys.readouterr().err
    assert err.startswith(expected)
    assert err.count("\n") == 1
    monkeypatch.setenv("AIGC_TF_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["generate", str(run_folder)])


def test_run_folders_in_a_folder_are_named(run_folder, capsys):
    assert f"Name one of the run folders in it: {run_folder}" in only_error(
        capsys, ["generate", str(run_folder.parent)]
    )


def test_generate_shows_a_text_before_it_has_loaded_keras(run_folder):
    code = f"""
import sys
from aigc_tf.cli.commands import main
assert main(["generate", {str(run_folder)!r}, "白日", "--max-new-tokens", "9", "--force", "明月"]) == 0
assert main(["generate", {str(run_folder)!r}, "--max-new-tokens", "9", "--num-beams", "2"]) == 0
assert not {{"tensorflow", "keras", "jax", "numba"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-500:]
    assert "白日".encode() in done.stdout
    assert "明月".encode() in done.stdout


def test_info_is_a_table_or_json(run_folder, capsys):
    assert main(["info", str(run_folder)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^settings\n(  .*\n)*  steps +4\n", out, re.MULTILINE)
    assert re.search(r"^  bits per character +\d+\.\d{4}$", out, re.MULTILINE)
    assert "_" not in re.sub("aigc_tf", "", out)
    assert main(["info", str(run_folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["steps"] == 4
    assert main(["info", "--json"]) == 0
    assert "keras" in json.loads(capsys.readouterr().out)


def test_a_user_s_mistake_is_one_clear_line(run_folder, corpus, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n\n", "utf-8")
    (tmp_path / "one.txt").write_text("春眠不觉晓，处处闻啼鸟。", "utf-8")
    (tmp_path / "gbk.txt").write_bytes("春眠不觉晓".encode("gbk"))
    (tmp_path / "folder").mkdir()
    run, text = str(run_folder), str(corpus)
    for arguments, part in [
        (["train", str(tmp_path / "none.txt")], "There is no file or folder"),
        (["train", str(tmp_path / "folder")], "contains no .txt or .jsonl file"),
        (["train", str(tmp_path / "empty.txt")], "No text found"),
        (["train", str(tmp_path / "one.txt")], "A split needs at least two different documents"),
        (["train", str(tmp_path / "gbk.txt")], "must be UTF-8 text"),
        (["train", text, "--context", "100000"], "one window needs context + 1 = 100001"),
        (["train", text, "--vocab-size", "10"], "vocab_size must be more than 259"),
        (["train", text, "--valid-fraction", "2"], "valid_fraction must lie between 0 and 1"),
        (["train", text, "--dropout", "1"], "dropout must lie"),
        (["train", text, "--num-heads", "3"], "multiple of num_heads"),
        (["train", text, "--model", "lstm", "--num-heads", "2"], "num_heads is for a Transformer"),
        (["train", text, "--user-dict", "x"], 'user_dict is for unit="word"'),
        (["train", text, "--unit", "word", "--user-dict", "nofile"], "nofile"),
        (["train", text, "--remove-stopwords", "nolist"], "Stopwords must be one of the lists cn, classical"),
        (["train", text, "--out", run], "exists and is not empty"),
        (["train", text, "--steps", "0"], "steps must be at least 1"),
        (["train", text, "--batch-size", "0"], "batch_size must be at least 1"),
        (["train", text, "--num-microbatches", "0"], "num_microbatches must be at least 1"),
        (["evaluate", text, text], "is not a run folder"),
        (["evaluate", run, str(tmp_path / "none")], "There is no file or folder"),
        (["generate", str(tmp_path)], "is not a run folder"),
        (["generate", run, "--temperature", "-1"], "temperature must be at least 0"),
        (["generate", run, "--top-p", "0"], "top_p must be above 0"),
        (["generate", run, "--num-samples", "0"], "--num-samples must be at least 1"),
        (["generate", run, "--temperature", "nan"], "temperature must be at least 0"),
        (["generate", run, "--top-k", "0"], "top_k must be a whole number of at least 1"),
        (["generate", run, "--min-p", "2"], "min_p must be from 0 to 1"),
        (["generate", run, "--typical-p", "0"], "typical_p must be above 0"),
        (["generate", run, "--repetition-penalty", "0"], "repetition_penalty must be above 0"),
        (["generate", run, "--presence-penalty", "inf"], "presence_penalty must be a finite number"),
        (["generate", run, "--frequency-penalty", "nan"], "frequency_penalty must be a finite number"),
        (["generate", run, "--no-repeat-ngram", "0"], "no_repeat_ngram must be a whole number of at least 1"),
        (["generate", run, "--max-new-tokens", "-1"], "max_new_tokens must be a whole number of at least 0"),
        (["generate", run, "--ban", ""], "banned must be a list of words, none of them empty"),
        (["generate", run, "--force", ""], "forced must be a list of words, none of them empty"),
        (["generate", run, "--force", "白日", "--ban", "日"], "'白日' is forced and contains '日', which is banned"),
        (["generate", run, "--force", "明月", "--max-new-tokens", "1"], "The forced words need 2 tokens"),
        (["generate", run, "--exempt", "nolist"], "Stopwords must be one of the lists cn, classical"),
        (["generate", run, "--best-of", "0"], "best_of must be a whole number of at least 1"),
        (["generate", run, "--num-beams", "0"], "num_beams must be a whole number of at least 1"),
        (["generate", run, "--num-beams", "2", "--best-of", "2"], "num_beams > 1 does not support best_of"),
        (["generate", run, "--num-beams", "2", "--top-p", "0.5"], "num_beams > 1 does not support top_p"),
        (["generate", run, "--num-beams", "2", "--force", "白"], "num_beams > 1 does not support forced"),
        (["generate", run, "--num-beams", "2", "--length-penalty", "nan"], "length_penalty must be a finite number"),
        (["generate", run, "--seed", "-1"], "seed"),
        (["generate", str(tmp_path), "--top-p", "0"], "top_p must be above 0"),  # before anything is loaded
        (["info", str(tmp_path)], "is not a run folder"),
        (["demo", "--out", str(tmp_path / "x"), "--steps-fraction", "0"], "steps_fraction must be finite and above 0"),
    ]:
        if arguments[0] == "train" and "--out" not in arguments:
            arguments = [*arguments, "--out", str(tmp_path / "out")]
        assert part in only_error(capsys, arguments), arguments
    assert not (tmp_path / "out").exists()  # a mistake leaves no folder behind
    assert not (tmp_path / "x").exists()


def run_command(arguments, stdout, **options):
    """Run a command in a process whose output is kept until it ends, as Python does by itself."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "aigc_tf", *map(str, arguments)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=variables, **options)


@pytest.mark.parametrize("arguments", [["info"], ["--help"], ["train", "--help"], ["--version"]])
def test_a_closed_pipe_is_no_error(arguments):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        done = run_command(arguments, pipe)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_reported_in_one_line(run_folder):
    with open("/dev/full", "w") as full:
        done = run_command(["info", run_folder], full)
    assert (done.returncode, done.stderr) == (2, "aigc-tf: error: No space left on device\n")


@pytest.mark.skipif(os.name != "posix", reason="a shell that closes an output")
@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_output_is_no_error(run_folder, closed):
    stdout = None if closed == 1 else subprocess.DEVNULL
    done = run_command(["info", run_folder], stdout, preexec_fn=lambda: os.close(closed))
    assert (done.returncode, done.stderr) == (0, "")
