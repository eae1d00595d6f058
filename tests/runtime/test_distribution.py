"""Distribution: several devices and several hosts learn what one device learns, and what cannot go well is refused."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import cpu_only, message_of

from aigc_tf import use_devices
from aigc_tf.runtime.backend import keras
from aigc_tf.runtime.distribution import check_distribution, native_precision, num_replicas
from aigc_tf.training.checkpoints import list_checkpoints
from aigc_tf.training.optimizer import compile_model

IS_JAX = keras.backend.backend() == "jax"

# The first lines give this process two devices, before the backend looks for them.
SCRIPT = """
import json, os, sys
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={sys.argv[1]}"
documents, folder, jobs = open(sys.argv[2]).read().split("\\n\\n"), sys.argv[3], json.loads(sys.argv[4])
import aigc_tf
from aigc_tf.runtime.backend import keras, tf
if keras.backend.backend() == "tensorflow":
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * int(sys.argv[1]))
tokenizer = aigc_tf.Tokenizer.train(documents)
for name, devices, settings, *architectures in jobs:
    said = aigc_tf.use_devices(**devices) if devices else None
    results = {}
    for architecture in architectures or ("lstm", "transformer"):
        build = getattr(aigc_tf, architecture)
        model = build(tokenizer.vocab_size, 20, num_layers=2, hidden_dim=16, dropout=0.0)
        data = aigc_tf.make_dataset(documents, tokenizer, 20, 4, seed=0)
        try:
            settings = {"steps": 6, "validations": 3, "checkpoint_steps": 2, "num_candidates": 0, **settings}
            history = aigc_tf.train(model, data, tokenizer, documents[:9], learning_rate=1e-2, clip_norm=0.5,
                                    **settings, run_dir=f"{folder}/{name}-{architecture}", keep_checkpoints=9,
                                    progress=False)
        except ValueError as error:
            results[architecture] = str(error)
            continue
        text = aigc_tf.generate(model, tokenizer, "白日", max_new_tokens=8, temperature=0)
        bits = aigc_tf.evaluate(model, tokenizer, documents[:9])["bits_per_char"]
        surprisal = aigc_tf.surprisal(model, tokenizer, "白日")[0][1]
        results[architecture] = [*history["loss"], *history["bits_per_char"], bits, surprisal, text]
        aigc_tf.save(f"{folder}/{name}-{architecture}", model, tokenizer)
    print(json.dumps([name, said, results]), flush=True)
if keras.backend.backend() == "jax" and "model_parallel" in devices:
    aigc_tf.use_devices(1)
    try:
        aigc_tf.train(model, data, tokenizer, documents[:9], steps=2, progress=False)
    except ValueError as error:
        print(json.dumps(["fewer devices", str(error), {}]))
"""


def run(tmp_path, documents, *jobs, num_devices=2):
    """Start a process that does jobs: each a name, arguments of `use_devices`, settings of `train`, architectures."""
    (tmp_path / "texts").write_text("\n\n".join(documents))
    arguments = [str(num_devices), str(tmp_path / "texts"), str(tmp_path), json.dumps(jobs)]
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


def two_hosts(tmp_path, documents, settings=None):
    """Start the two processes of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = [{"coordinator": coordinator, "num_hosts": 2, "host": host} for host in range(2)]
    jobs = [("run", host, settings or {}, "transformer") for host in hosts]
    return [run(tmp_path, documents, job, num_devices=1) for job in jobs]


def run_of(process):
    return results_of(process)["run"]


def results_of(process):
    out, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    lines = [line for line in out.splitlines() if line.startswith('["')]  # what connects JAX's hosts prints too
    return {name: (said, results) for name, said, results in map(json.loads, lines)}


def require_close(results, expected):
    for architecture in results:
        assert results[architecture][:-1] == pytest.approx(expected[architecture][:-1], rel=1e-5), architecture
        assert results[architecture][-1] == expected[architecture][-1]


@cpu_only
def test_two_devices_learn_what_one_learns(documents, tmp_path):
    jobs = [
        ("one", {"count": 1}, {}),
        ("two", {"precision": "auto"}, {}),
        ("microbatches", {"count": 1}, {"num_microbatches": 2}, "lstm"),
        ("shared microbatches", {"count": 2}, {"num_microbatches": 2}, "transformer"),
    ]
    if IS_JAX:
        jobs.append(("divided", {"model_parallel": 2}, {}))
    results = results_of(run(tmp_path, documents, *jobs))
    said, expected = results["one"]
    assert said == "CPU, float32"
    assert results["two"][0] == "2 x CPU, float32"
    for name in set(results) - {"one", "shared microbatches", "fewer devices"}:
        require_close(results[name][1], expected)
    said, shared = results["shared microbatches"]
    if IS_JAX:
        require_close(shared, expected)
        assert results["divided"][0] == "2 x CPU, a model divided among 2, float32"
        assert "was built for 2 devices, and use_devices has chosen 1 since" in results["fewer devices"][0]
    else:
        assert "cannot accumulate gradients on several devices" in shared["transformer"]


@cpu_only
@pytest.mark.skipif(not IS_JAX, reason="several hosts need JAX")
def test_two_hosts_learn_what_one_learns_and_go_on(documents, tmp_path):
    for name in ("alone", "together"):
        (tmp_path / name).mkdir()
    alone = run(tmp_path / "alone", documents, ("run", {"count": 1}, {}, "transformer"), num_devices=1)
    expected = results_of(alone)["run"][1]

    for said, results in map(run_of, two_hosts(tmp_path / "together", documents)):
        assert said == "2 x CPU, 2 hosts, float32"
        require_close(results, expected)
    checkpoints = sorted((tmp_path / "together" / "run-transformer" / "checkpoints").iterdir())
    assert len(checkpoints) == 3
    for path in checkpoints[1:]:
        path.unlink()
    for _, results in map(run_of, two_hosts(tmp_path / "together", documents)):
        require_close(results, expected)


@cpu_only
@pytest.mark.skipif(not IS_JAX or os.name == "nt", reason="several hosts need JAX, and signals POSIX")
def test_a_signal_to_one_host_stops_all_with_a_checkpoint(documents, tmp_path):
    settings = {"steps": 100_000, "validations": 10_000, "checkpoint_steps": None}
    hosts = two_hosts(tmp_path, documents, settings)
    try:
        ends = time.monotonic() + 240
        log = tmp_path / "run-transformer" / "log.csv"
        while not (log.exists() and len(log.read_text().splitlines()) > 2):
            assert all(host.poll() is None for host in hosts)
            assert time.monotonic() < ends
            time.sleep(0.05)
        hosts[1].send_signal(signal.SIGINT)  # of which `train` makes the other, SIGTERM
        assert [host.wait(60) for host in hosts] == [143, 143]
    finally:
        for host in hosts:
            host.kill()
            host.communicate()
    assert len(list_checkpoints(tmp_path / "run-transformer" / "checkpoints")) == 1


@cpu_only
@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"count": 0}, "count must be from 1 to the number of devices here, 1, got 0"),
        ({"count": 2}, "count must be from 1 to the number of devices here, 1, got 2"),
        ({"model_parallel": 0}, "must be at least 1"),
        ({"precision": "float8"}, "precision must be auto, float32, mixed_bfloat16 or mixed_float16, got 'float8'"),
        ({"num_hosts": 2, "host": 2}, "host from 0 to num_hosts - 1"),
        ({"model_parallel": 2}, "count must be a multiple of model_parallel" if IS_JAX else "need JAX"),
        ({"num_hosts": 2}, "need a coordinator" if IS_JAX else "need JAX"),
        ({"num_hosts": 2, "model_parallel": 2}, "supports one host only" if IS_JAX else "need JAX"),
    ],
)
def test_what_cannot_be_is_said(wrong, part):
    assert part in message_of(ValueError, use_devices, **wrong)
    assert num_replicas() == 1


def test_a_batch_that_devices_cannot_share_is_refused(build_one, monkeypatch):
    model = build_one(9, 4)
    monkeypatch.setattr("aigc_tf.runtime.distribution.num_replicas", lambda: 4)
    check_distribution(model, 8)
    assert "multiple of 4" in message_of(ValueError, check_distribution, model, 6)


@pytest.mark.skipif(IS_JAX, reason="with JAX it works")
@pytest.mark.skipif(keras.__version__.startswith("3.13."), reason="Keras 3.13 itself refuses it on TensorFlow")
def test_keras_distribution_on_tensorflow_is_refused(build_one):
    model = build_one(9, 4)
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=["cpu:0"]))
    try:
        assert "does nothing on TensorFlow" in message_of(ValueError, check_distribution, model, 4)
    finally:
        keras.distribution.set_distribution(None)


@cpu_only
def test_precision_is_chosen_and_can_be_set():
    before = keras.config.dtype_policy()
    try:
        assert native_precision() == "float32"  # a CPU
        assert use_devices(1, precision="mixed_bfloat16") == "CPU, mixed_bfloat16"
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
        assert use_devices(1) == "CPU, float32"
        assert keras.config.dtype_policy().name == "float32"
    finally:
        keras.config.set_dtype_policy(before)


@pytest.mark.skipif(not IS_JAX, reason="TPUs are trained on with JAX")
@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_the_step_of_a_training_compiles_for_a_tpu_and_a_gpu(build, tokenizer, precision):
    """As far as this machine can tell: JAX lowers it for these platforms, which refuse what they cannot do."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    model = build(tokenizer.vocab_size, 32, dropout=0.1)
    keras.config.set_dtype_policy(before)
    compile_model(model, steps=100)
    kinds = (
        model.trainable_variables,
        model.non_trainable_variables,
        model.optimizer.variables,
        model.metrics_variables,
    )
    state = tuple([v.value for v in variables] for variables in kinds)
    ids = np.ones((8, 32), np.int32)
    jax = importlib.import_module("jax")
    exported = importlib.import_module("jax.export").export(jax.jit(model.train_step), platforms=["tpu", "cuda"])
    module = exported(state, (ids, ids)).mlir_module()
    for host_work in ("callback", "lapack", "infeed", "outfeed", "f64"):
        assert host_work not in module
    assert ("bf16" in module) == (precision == "mixed_bfloat16")


@pytest.mark.skipif(not IS_JAX, reason="TensorFlow has another way to ask")
@pytest.mark.parametrize(
    ("capability", "precision"), [("gfx90a", "float32"), ("8.0", "mixed_bfloat16"), ("7.5", "mixed_float16")]
)
def test_precision_on_gpus_of_several_makers(monkeypatch, capability, precision):
    class Device:
        platform = "gpu"
        compute_capability = capability

    monkeypatch.setattr("jax.local_devices", lambda: [Device()])
    assert native_precision() == precision


@pytest.mark.skipif(IS_JAX, reason="JAX has another way to ask")
@pytest.mark.parametrize(
    ("details", "precision"),
    [
        ({"compute_capability": (8, 0)}, "mixed_bfloat16"),
        ({"compute_capability": (7, 5)}, "mixed_float16"),
        ({"compute_capability": (6, 9)}, "float32"),
        ({}, "float32"),
    ],
)
def test_precision_on_gpus_that_tensorflow_describes(monkeypatch, details, precision):
    monkeypatch.setattr("tensorflow.config.list_physical_devices", lambda kind: ["the GPU"])
    monkeypatch.setattr("tensorflow.config.experimental.get_device_details", lambda gpu: details)
    assert native_precision() == precision


@pytest.mark.parametrize("backend", ["torch", "numpy", "JAX"])
def test_another_backend_is_refused_by_name(backend):
    code = "import aigc_tf; aigc_tf.transformer"
    environment = {**os.environ, "KERAS_BACKEND": backend}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert f"ValueError: aigc_tf runs on TensorFlow or JAX, got Keras' backend {backend!r}." in done.stderr
