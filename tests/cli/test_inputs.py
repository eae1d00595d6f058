from aigc_tf.cli.inputs import default_run_name, pipeline_settings, read_documents
from aigc_tf.cli.parser import make_parser
from aigc_tf.runs.pipeline import SETTINGS


def test_the_command_has_the_function_s_settings_and_defaults():
    options = make_parser().parse_args(["train", "texts"])
    assert set(SETTINGS) <= set(vars(options))
    for name, value in pipeline_settings(options).items():
        assert value == SETTINGS[name], name


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
