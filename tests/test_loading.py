"""loaded_model.py and source.py: what a name loads, how fast, and what errors say."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from bot_fixtures import EMOJI_PROMPT, EMOJI_REPLY, REPOSITORY
from huggingface_hub import constants
from scripted_model import byte_tokenizer, name_end_tokens
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    PreTrainedModel,
    T5Config,
    XLNetConfig,
)

from streaming_bots.models import loading_progress
from streaming_bots.models.loaded_model import check_model, context_length, load_model
from streaming_bots.models.prompt import UnknownToken, encode
from streaming_bots.models.source import BUNDLED, ModelError, Source, resolve

NAME = "somebody/some-model"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that refuses connections at once, and an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.fixture
def copy_of_model(emoji_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(emoji_model, tmp_path / "model"))


def reply(name: str, **options: str) -> str:
    """Return the greedy reply of a loaded model to the prompt of the emoji model."""
    loaded = load_model(name, **options)
    ids = loaded.tokenizer(EMOJI_PROMPT + loaded.tokenizer.eos_token, return_tensors="pt")
    output = loaded.model.generate(**ids, max_new_tokens=100)
    return loaded.tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_folder_is_a_model(emoji_model):
    loaded = load_model(str(emoji_model))
    assert loaded.name == emoji_model.name
    assert loaded.context == 512
    assert reply(str(emoji_model)) == EMOJI_REPLY


def test_a_token_that_only_the_tokenizer_knows_is_refused(copy_of_model):
    tokenizer = AutoTokenizer.from_pretrained(copy_of_model)
    tokenizer.add_tokens(["[PAD]"])
    tokenizer.save_pretrained(copy_of_model)
    for tokenizer in (check_model(str(copy_of_model))[1], load_model(str(copy_of_model)).tokenizer):
        with pytest.raises(UnknownToken):
            encode([{"role": "user", "content": "[PAD]"}], tokenizer, 64)


def test_the_bundled_model_is_loaded_in_full_precision():
    loaded = load_model(BUNDLED)
    assert loaded.model.dtype == torch.float32
    assert loaded.name == "tiny-dialog"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_is_the_one_asked_for(emoji_model, dtype):
    assert load_model(str(emoji_model), dtype).model.dtype == getattr(torch, dtype)


def test_replies_are_greedy_whatever_the_generation_config_says(copy_of_model, caplog):
    path = copy_of_model / "generation_config.json"
    config = json.loads(path.read_text())
    sampling = {"do_sample": True, "temperature": 9.0, "top_k": 5, "top_p": 0.5}
    others = {"max_length": 3, "repetition_penalty": 9.0, "stop_strings": ["!"], "num_beams": 2}
    path.write_text(json.dumps(config | sampling | others))
    caplog.clear()
    caplog.set_level(logging.WARNING)
    assert reply(str(copy_of_model)) == EMOJI_REPLY
    assert not caplog.records


def test_a_reply_ends_at_the_end_token_of_the_tokenizer_too(copy_of_model):
    for name in ("config.json", "generation_config.json"):
        config = json.loads((copy_of_model / name).read_text())
        (copy_of_model / name).write_text(json.dumps(config | {"eos_token_id": 7}))
    loaded = load_model(str(copy_of_model))
    assert loaded.model.generation_config.eos_token_id == [loaded.tokenizer.eos_token_id, 7]
    assert reply(str(copy_of_model)) == EMOJI_REPLY


@pytest.mark.parametrize("none", [None, -1])
def test_padding_is_always_a_token_that_the_model_knows(copy_of_model, none):
    tokenizer = AutoTokenizer.from_pretrained(copy_of_model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(copy_of_model)
    loaded = load_model(str(copy_of_model))
    assert loaded.model.generation_config.pad_token_id == tokenizer.eos_token_id
    name_end_tokens(copy_of_model, none)
    loaded = load_model(str(copy_of_model))
    assert loaded.model.generation_config.eos_token_id is None
    assert loaded.model.generation_config.pad_token_id == 0


@pytest.mark.parametrize("name", ["~nobody9/model", "x" * 300])
def test_an_impossible_folder_name_is_refused_in_one_line(name):
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        check_model(name)


def test_an_index_without_its_shards_is_not_taken_for_a_cached_model(tmp_path, monkeypatch, no_hub):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "model-1.safetensors").touch()
    with pytest.raises(ModelError, match="connect to the hub"):
        resolve(NAME)
    (snapshot / "model-2.safetensors").touch()
    assert resolve(NAME).options == {"local_files_only": True}


def test_a_hub_id_in_the_cache_needs_no_hub(emoji_model, tmp_path):
    """The model loads in a process of its own, which reads the cache's place when it starts."""
    cache = tmp_path / "hub"
    repository = cache / f"models--{NAME.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    shutil.copytree(emoji_model, repository / "snapshots" / "abc123")
    code = (
        "import time; from streaming_bots.models.loaded_model import load_model;"
        " t = time.monotonic();"
        f"loaded = load_model({NAME!r}); print(loaded.name, time.monotonic() - t < 5)"
    )
    environment = {"HF_HUB_CACHE": str(cache), "HF_ENDPOINT": "http://127.0.0.1:9"}
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert ran.stdout.split() == [NAME, "True"], ran.stderr


def test_without_a_hub_the_fallback_answers_and_one_warning_says_so(no_hub, caplog):
    caplog.set_level(logging.WARNING)
    loaded = load_model(NAME, fallback=BUNDLED)
    assert loaded.name == BUNDLED
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in (NAME, "ConnectError", "connect to the hub", BUNDLED):
        assert part in record.message
    assert "\n" not in record.message


def test_a_hub_that_never_answers_is_given_up_within_5_seconds(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        began = time.monotonic()
        with pytest.raises(ModelError):
            check_model(NAME)
        assert time.monotonic() - began < 5


def test_an_explicitly_named_model_is_never_replaced(no_hub):
    with pytest.raises(ModelError, match=f"'{NAME}'.*tried.*connect to the hub"):
        load_model(NAME)


def broken(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "there is no folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors or"),
        (lambda folder: broken(folder, "config.json"), "the configuration cannot be read"),
        (lambda folder: broken(folder, "tokenizer.json"), "the tokenizer cannot be read"),
        (lambda folder: T5Config().save_pretrained(folder), "t5 is not a causal language model"),
        # BERT loads as one, but attends to later tokens.
        (lambda folder: BertConfig().save_pretrained(folder), "bert is not a causal"),
        (lambda folder: BartConfig().save_pretrained(folder), "bart is not a causal"),
    ],
    ids=["no folder", "no weights", "bad configuration", "bad tokenizer", "t5", "bert", "bart"],
)
def test_problems_of_a_folder_are_found_before_its_weights_are_loaded(
    copy_of_model, damage, message
):
    damage(copy_of_model)
    with pytest.raises(ModelError, match=message) as error:
        check_model(str(copy_of_model))
    assert str(copy_of_model) in str(error.value)
    assert "give a hub id, a folder" in str(error.value)
    assert "\n" not in str(error.value)


def test_damaged_weights_are_a_one_line_error_too(copy_of_model):
    (copy_of_model / "model.safetensors").write_bytes(b"no weights at all")
    check_model(str(copy_of_model))
    with pytest.raises(ModelError, match="the weights cannot be loaded") as error:
        load_model(str(copy_of_model))
    assert "\n" not in str(error.value)


def save_gguf_model(path: Path) -> None:
    """Save a tiny Llama with random weights, the bytes as its tokens, and a chat template."""
    tokenizer, rng = byte_tokenizer(64), numpy.random.default_rng(0)
    vocabulary = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get), "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 257)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    shapes = {"token_embd": (len(vocabulary), 32), "output_norm": (32,)}
    shapes |= {f"blk.0.{name}_norm": (32,) for name in ("attn", "ffn")}
    shapes |= {f"blk.0.attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.ffn_{name}": (32, 32) for name in ("gate", "up", "down")}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_in_a_folder_is_a_model(tmp_path, monkeypatch):
    save_gguf_model(tmp_path / "tiny.gguf")
    monkeypatch.chdir(tmp_path)
    name, _, context = check_model("./:tiny.gguf")
    assert (name, context) == (f"{tmp_path}:tiny.gguf", 64)
    loaded = load_model("./:tiny.gguf", "bfloat16")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.tokenizer.chat_template
    assert len(encode([{"role": "user", "content": "Hello"}], loaded.tokenizer, 64)) == 5
    output = loaded.model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)
    assert output.shape == (1, 7)


@pytest.mark.parametrize("name", ["no such model", "a/b/c", "model.gguf", "./nowhere:model.gguf"])
def test_the_error_for_an_impossible_model_name_says_which_names_are_possible(name, no_hub):
    with pytest.raises(ModelError, match="<folder or hub id>:<file>"):
        check_model(name)


@pytest.mark.parametrize("where", ["hub", "cache"])
def test_a_long_load_reports_its_download_and_the_elapsed_time(
    where, tmp_path, monkeypatch, caplog
):
    blobs = tmp_path / "models--someone--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "0123.incomplete").write_bytes(bytes(3_000_000))
    monkeypatch.setattr(loading_progress, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(loading_progress, "EVERY_S", 0.01)
    caplog.set_level("INFO", "ray.serve")
    reported = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().endswith("0 s"):
                reported.set()

    listener = Listener()
    logging.getLogger("ray.serve").addHandler(listener)
    options = {"local_files_only": True} if where == "cache" else {}
    with loading_progress.report_progress(Source("someone/model", "someone/model", options)):
        assert reported.wait(60)
    logging.getLogger("ray.serve").removeHandler(listener)
    assert caplog.messages[0] == "loading someone/model"
    size = "3 MB downloaded, " if where == "hub" else ""
    assert caplog.messages[1] == f"loading someone/model: {size}0 s"
    assert not any(thread.name == "loading" for thread in threading.enumerate())


def test_a_model_is_loaded_in_a_thread_that_ends(monkeypatch):
    """Otherwise, the caller keeps OpenMP threads. With more than cores, all sleep at barriers."""
    from_pretrained = AutoModelForCausalLM.from_pretrained
    threads = []

    def load_and_note(*arguments: Any, **options: Any) -> PreTrainedModel:
        threads.append(threading.current_thread())
        return from_pretrained(*arguments, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_and_note)
    load_model(BUNDLED)
    (thread,) = threads
    assert thread is not threading.current_thread() and not thread.is_alive()


def test_a_model_without_a_limit_of_positions_has_that_of_its_tokenizer(loaded):
    assert context_length(XLNetConfig(), loaded.tokenizer) == loaded.tokenizer.model_max_length
