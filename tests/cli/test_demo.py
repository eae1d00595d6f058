import os
import signal

import pytest

from aigc_tf import read_run
from aigc_tf.cli import demo
from aigc_tf.cli.commands import main
from aigc_tf.cli.demo import is_quatrain, run_demo
from aigc_tf.runtime.files import shipped_file
from aigc_tf.training.session import Session


def test_the_form_of_a_quatrain():
    assert is_quatrain("白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。")
    assert is_quatrain("两个黄鹂鸣翠柳，一行白鹭上青天。\n窗含西岭千秋雪，门泊东吴万里船？")
    for wrong in (
        "白日依山尽，黄河入海流。",
        "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼",
        "白日依山尽，黄河入海流。\n欲穷千里目，更上一层。",
        "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。",
        "白日依山尽，黄河入海流。\n窗含西岭千秋雪，门泊东吴万里船。",
    ):
        assert not is_quatrain(wrong)


def test_the_demo_shows_its_figures_and_saves_its_runs(tmp_path, monkeypatch):
    poems = shipped_file("tang_quatrains.txt").read_text("utf-8").split("\n\n")[:500]
    (tmp_path / "poems.txt").write_text("\n\n".join(poems), "utf-8")
    monkeypatch.setattr("aigc_tf.cli.demo.shipped_file", lambda name: tmp_path / "poems.txt")
    lines = []
    figures = run_demo(tmp_path, steps_fraction=0.01, show=lines.append)
    text = "\n".join(lines)
    for name in ("transformer", "lstm"):
        assert read_run(tmp_path / name)["figures"] == figures[name]
        assert f"{figures[name]['bits_per_char']:.2f}" in text
        assert figures[name]["bits_per_char"] < figures["baselines"]["uniform"]
    assert f"{figures['baselines']['frequency']:.2f}" in text
    assert str(tmp_path) in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps-fraction", "inf"], "steps_fraction must be finite and above 0, got inf"),
        (["--seed", str(2**63)], "seed must be a whole number from 0 to 2**63 - 1"),
    ],
)
def test_a_demo_with_invalid_settings_is_refused(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_demo_that_is_stopped_resumes_in_the_same_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("aigc_tf.cli.demo.shipped_file", lambda name: tmp_path / "poems.txt")
    (tmp_path / "poems.txt").write_text(
        "\n\n".join(f"白日依山尽，黄河入海流。\n欲穷千里{chr(0x4E00 + i)}，更上一层楼。" for i in range(100)), "utf-8"
    )
    for name in demo.MODELS:
        monkeypatch.setitem(demo.MODELS[name], "steps", 4)
    end = Session.on_train_batch_end
    steps = []

    def stop_in_the_second_model(session, batch, logs=None):
        steps.append(session.step)
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        end(session, batch, logs)

    monkeypatch.setattr(Session, "on_train_batch_end", stop_in_the_second_model)
    assert main(["demo"]) == 130
    assert "stopped after 2 of 4 steps" in capsys.readouterr().out
    assert (tmp_path / "runs/demo/transformer/run.json").exists()
    assert not (tmp_path / "runs/demo/lstm/run.json").exists()
    assert main(["demo", "--seed", "1"]) == 2
    assert "belongs to a demo with other steps" in capsys.readouterr().err
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "transformer: trained before" in out
    assert "resumes after step 2" in out
    assert os.listdir("runs") == ["demo"]
    assert len(steps) == 8
    assert read_run("runs/demo/lstm")["settings"]["steps"] == 4
    assert not demo.is_unfinished_demo(tmp_path / "runs/demo")  # the next one is another
