"""The whole daemon with a model folder in Hugging Face's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pagedd
from pagedd_daemon.helper.vocabulary import open_vocabulary
from pagedd_daemon.models.decoder import Decoder
from pagedd_daemon.models.model import read_model_header
from tests.support.daemon import running_daemon
from tests.support.hf_tokenizers import write_small_weights, write_smollm2_tokenizer
from tests.support.paged import greedy

PROMPT = "def fibonacci(n):\n    return"


@pytest.mark.model
def test_a_folder_is_served_with_its_own_weights_tokeniser_and_template(
    smollm2_path: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "Tiny-Llama"
    folder.mkdir()
    write_small_weights(folder, 49_152, initializer_range=0.2)
    write_smollm2_tokenizer(smollm2_path, folder)
    vocabulary = open_vocabulary("", read_model_header(folder))
    prompt = vocabulary.encode(PROMPT.encode(), special=False).tolist()
    decoder = Decoder.load(folder, torch.device("cpu"), torch.float32)
    wanted = greedy(decoder, prompt, 24)
    assert len(set(wanted)) > 8
    with (
        running_daemon(str(folder), backend="torch", kv_tokens=512, threads=1) as daemon,
        daemon.connect() as client,
    ):
        stream = client.generate(PROMPT, max_tokens=24, temperature=0, ignore_eos=True)
        stream.text()
        assert list(stream.result.samples[0].tokens) == wanted
        chat = client.session(system="You are terse.")
        chat.say("Hello.", max_tokens=8, ignore_eos=True).text()
        again = chat.say("Name a river.", max_tokens=8, ignore_eos=True)
        again.text()
        assert again.result.usage.cached_tokens >= 16
        (listed,) = [m for m in client.models() if m["path"] == str(folder)]
        assert listed["architecture"] == "LlamaForCausalLM"
        assert listed["loaded"]


def test_a_folder_that_cannot_be_run_is_refused_with_the_reason(tmp_path: Path) -> None:
    write_small_weights(tmp_path, 160)
    with (
        running_daemon(str(tmp_path), backend="llama.cpp", load=False) as daemon,
        daemon.connect() as client,
        pytest.raises(pagedd.PageddError, match="runs GGUF files") as caught,
    ):
        client.load()
    assert caught.value.code == "E_MODEL"
