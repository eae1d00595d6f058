import inspect

from aigc_tf import estimate
from aigc_tf.cli.inputs import default_run_name, pipeline_settings, read_documents
from aigc_tf.cli.parser import make_parser
from aigc_tf.runs.pipeline import SETTINGS


def test_the_command_has_the_function_s_settings_and_defaults():
    options = make_parser().parse_args(["train", "texts"])
    assert set(SETTINGS) <= set(vars(options))
    for name, value in pipeline_settings(options).items():
        assert value == SETTINGS[name], name


def test_an_estimate_has_the_function_s_defaults():
    options = vars(make_parser().parse_args(["estimate", "texts"]))
    parameters = inspect.signature(estimate).parameters
    shared = {name: value for name, value in options.items() if name in parameters}
    assert {"seconds", "watts", "size", "dropout", "precision", "num_candidates"} <= set(shared)
    for name, value in shared.items():
        assert parameters[name].default in (value, inspect.Parameter.empty), name


def test_documents_come_once_and_from_the_field_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("aigc_tf.corpus.corpora.load_corpus", lambda name: ["明月", name])
    (tmp_path / "a.txt").write_text("白日\n\n明月\n\n白日", "utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "春风", "title": "明月"}\n{"title": "秋霜"}\n', "utf-8")
    paths = ["corpus:tang", str(tmp_path / "a.txt"), str(tmp_path), "corpus:tang"]
    options = make_parser().parse_args(["train", *paths, "--field", "title"])
    assert read_documents(options) == ["白日", "明月", "秋霜", "tang"]


def test_what_is_left_out_of_a_folder_is_one_line(documents, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n\n".join(documents), "utf-8")
    (tmp_path / "b.docx").write_bytes(b"PK")
    (tmp_path / "c.txt").write_bytes("春眠不觉晓".encode("gbk"))
    assert read_documents(make_parser().parse_args(["train", str(tmp_path)])) == documents
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("aigc-tf: left out: 1 .docx, 1 unreadable file (the first: ")


def test_the_default_run_name_is_that_of_the_first_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (".", "./", str(tmp_path), f"../{tmp_path.name}"):
        assert default_run_name(make_parser().parse_args(["train", path])) == tmp_path.stem
    assert default_run_name(make_parser().parse_args(["train", "corpus:tang"])) == "tang"
