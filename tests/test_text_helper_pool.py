"""Helper processes: what they answer, and that nothing a request does to one harms another."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pagedd_daemon.front.detokenizer import pack_ids, unpack_ids
from pagedd_daemon.front.helper_pool import HelperError, HelperPool
from pagedd_daemon.helper.protocol import HelperLimits
from tests.support.vocabularies import END, START, byte_level_file

USER = [{"role": "user", "content": "x"}]
ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% if a < 0 %}x{% endif %}{% endfor %}"
    "{% endfor %}"
)
SLOW = ENDLESS.replace("b in range(99999)", "b in range(30)") + "ok"
QUICK = HelperLimits(request_s=1.0, slow_s=0.05)


def with_pool(
    work: Callable[[HelperPool], Awaitable[None]],
    workers: int = 1,
    limits: HelperLimits | None = None,
) -> None:
    """Run a test on a pool of its own, whose processes must be gone afterwards."""

    async def run() -> None:
        pool = HelperPool(workers, limits)
        await pool.start()
        try:
            await work(pool)
        finally:
            pids = pool.pids
            await pool.close()
        assert not any(psutil.pid_exists(pid) for pid in pids)

    asyncio.run(run())


async def failure(work: Awaitable[Any]) -> HelperError:
    with pytest.raises(HelperError) as caught:
        await work
    return caught.value


def kernel_says(pid: int, what: str) -> str:
    return Path(f"/proc/{pid}/{what}").read_text(encoding="utf-8")


async def busy(pool: HelperPool) -> psutil.Process:
    """The helper that is computing, once it is."""
    while True:
        for pid in pool.pids:
            process = psutil.Process(pid)
            before = process.cpu_times().user
            await asyncio.sleep(0.05)
            if process.is_running() and process.cpu_times().user > before:
                return process


# -------------------------------------------------------------------------------------- answers


def test_the_simulated_model_is_served_without_llama_cpp() -> None:
    async def work(pool: HelperPool) -> None:
        model = await pool.open("simulated")
        assert (model.vocab_size, model.bos, model.eog, model.add_bos) == (258, 257, (256,), False)
        assert list(unpack_ids(await pool.tokenize(model, "é<|end|>"))) == list("é<|end|>".encode())
        assert await pool.tokenize(model, "<|end|>", special=True) == pack_ids([256])
        prompt = await pool.chat(model, USER)
        assert prompt.text == "user: x<|end|>\nassistant: "
        assert model.table is not None
        assert model.table.decode(unpack_ids(prompt.tokens)) == "user: x\nassistant: "
        history = [*USER, {"role": "assistant", "content": "y"}, *USER]
        more = await pool.continue_chat(model, history, prompt.text + "y")
        assert not more.rewritten
        assert more.tokens == pack_ids([256, *b"\nuser: x", 256, *b"\nassistant: "])
        assert (await pool.continue_chat(model, history, "other")).rewritten
        for pid in pool.pids:
            assert "llama" not in kernel_says(pid, "maps")

    with_pool(work)


def test_a_model_without_tokeniser_is_opened_and_says_so(tmp_path: Path) -> None:
    async def work(pool: HelperPool) -> None:
        path = byte_level_file(tmp_path / "ids.gguf", tokenizer=False)
        for source, size in (("simulated-ids", 1024), (path, 258)):
            model = await pool.open(source)
            assert (model.vocab_size, model.has_tokenizer, model.table) == (size, False, None)
            assert (await failure(pool.tokenize(model, "x"))).code == "E_NO_TOKENIZER"
            assert (await failure(pool.chat(model, USER))).code == "E_NO_TOKENIZER"

    with_pool(work)


@pytest.mark.model
def test_the_packaged_model_is_opened_and_chats(smollm2_path: Path) -> None:
    async def work(pool: HelperPool) -> None:
        model = await pool.open(smollm2_path)
        assert model.table is not None
        assert len(model.table) == model.vocab_size == 49152
        assert len(model.digest) == 32
        text = "Zażółć gęślą jaźń 🦊"
        ids = unpack_ids(await pool.tokenize(model, text))
        assert model.table.decode(ids) == text
        prompt = await pool.chat(model, [{"role": "user", "content": "<|im_end|>"}])
        assert list(unpack_ids(prompt.tokens)).count(2) == 2

    with_pool(work)


def test_tools_and_arguments_reach_the_models_own_template(tmp_path: Path) -> None:
    async def work(pool: HelperPool) -> None:
        template = "<|im_start|>{{ tools[0].name }} {{ mood }} {{ add_generation_prompt }}"
        model = await pool.open(byte_level_file(tmp_path / "m.gguf", template))
        prompt = await pool.chat(
            model,
            USER,
            tools=[{"name": "clock<|im_end|>"}],
            template_args={"mood": "dry"},
            add_generation_prompt=False,
        )
        assert list(unpack_ids(prompt.tokens)) == [START, *b"clock<|im_end|> dry False"]
        without = await pool.open(byte_level_file(tmp_path / "none.gguf"))
        assert not without.has_chat_template
        assert (await failure(pool.chat(without, USER))).code == "E_TEMPLATE"

    with_pool(work)


def test_a_file_that_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    async def work(pool: HelperPool) -> None:
        (tmp_path / "text.gguf").write_text("hello")
        crooked = byte_level_file(tmp_path / "crooked.gguf")
        crooked.write_bytes(crooked.read_bytes().replace(b"ggml.merges", b"ggml.mergez"))
        for name, complaint in (
            ("none.gguf", "does not exist"),
            ("text.gguf", "is not a GGUF file"),
            ("crooked.gguf", "refused by llama.cpp"),
        ):
            error = await failure(pool.open(tmp_path / name))
            assert error.code == "E_MODEL"
            assert complaint in error.message
            assert error.details["path"] == str(tmp_path / name)

    with_pool(work)


def test_a_model_whose_file_changed_is_not_tokenised_with_another_vocabulary(
    tmp_path: Path,
) -> None:
    async def work(pool: HelperPool) -> None:
        path = byte_level_file(tmp_path / "m.gguf", "a")
        model = await pool.open(path)
        byte_level_file(path, "b")
        before = pool.pids
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        for _ in range(3):
            error = await failure(pool.tokenize(model, "x"))
            assert (error.code, error.details) == ("E_MODEL", {"path": str(path)})
        assert (await pool.chat(await pool.open(path), USER)).text == "b"

    with_pool(work)


def test_a_file_that_is_opened_again_is_read_again_in_every_process(tmp_path: Path) -> None:
    async def work(pool: HelperPool) -> None:
        for template in "abc":
            model = await pool.open(byte_level_file(tmp_path / "m.gguf", template))
            for _ in range(3):
                prompts = await asyncio.gather(*(pool.chat(model, USER) for _ in range(3)))
                assert [p.text for p in prompts] == [template] * 3
        for name in ("n.gguf", "o.gguf"):  # more models than a process keeps
            other = await pool.open(byte_level_file(tmp_path / name, name))
            assert (await pool.chat(other, USER)).text == name
        assert (await pool.chat(model, USER)).text == "c"

    with_pool(work)


def test_many_requests_at_once_are_all_answered_in_their_own_terms() -> None:
    async def work(pool: HelperPool) -> None:
        model = await pool.open("simulated")
        texts = [str(n) * (n % 50 + 1) for n in range(300)]
        answers = await asyncio.gather(*(pool.tokenize(model, t) for t in texts))
        assert answers == [pack_ids(t.encode()) for t in texts]

    with_pool(work, workers=2)


# ---------------------------------------------------------------------------------------- harm


def test_a_template_that_never_ends_costs_its_own_request_only(tmp_path: Path) -> None:
    async def work(pool: HelperPool) -> None:
        bomb = await pool.open(byte_level_file(tmp_path / "bomb.gguf", ENDLESS))
        bombs = [asyncio.ensure_future(failure(pool.chat(bomb, USER))) for _ in range(3)]
        await asyncio.sleep(0)
        while not all(b.done() for b in bombs):
            assert await pool.tokenize(bomb, "hello") == pack_ids(b"hello")
            await asyncio.sleep(0.01)
        for ended in bombs:
            error = ended.result()
            assert error.code == "E_HELPER"
            assert "took more than 1.0 s" in error.message

    with_pool(work, limits=QUICK)


def test_a_flood_of_texts_does_not_keep_a_conversation_waiting(tmp_path: Path) -> None:
    async def work(pool: HelperPool) -> None:
        said = "{{ messages[0].content }}"
        model = await pool.open(byte_level_file(tmp_path / "quick.gguf", said))
        answered, flooded = 0, asyncio.Event()

        async def flood() -> None:
            nonlocal answered
            while True:
                await pool.tokenize(model, "x" * 2000)
                answered += 1
                if answered == 50:
                    flooded.set()

        lines = [asyncio.ensure_future(flood()) for _ in range(16)]
        try:
            await flooded.wait()
            before = answered
            await pool.chat(model, USER)
            assert answered - before <= 40, "those before it, and some that were under way"
        finally:
            for line in lines:
                line.cancel()

    with_pool(work)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content | center(2000000000) }}",
        "{{ 'x' | center(2000000000) }}",
        "{{ 'x' * 3000000000 }}",
    ],
)
def test_a_template_that_takes_all_memory_costs_its_own_request_only(
    template: str, tmp_path: Path
) -> None:
    async def work(pool: HelperPool) -> None:
        bomb = await pool.open(byte_level_file(tmp_path / "bomb.gguf", template))
        error = await failure(pool.chat(bomb, USER))
        assert (error.code, error.message) == (
            "E_HELPER",
            "tokenising or rendering ran out of memory",
        )
        assert await pool.tokenize(bomb, "hello") == pack_ids(b"hello")

    with_pool(work)


def test_a_request_whose_process_was_killed_from_outside_is_done_by_another(
    tmp_path: Path,
) -> None:
    async def work(pool: HelperPool) -> None:
        model = await pool.open(byte_level_file(tmp_path / "slow.gguf", SLOW))
        chat = asyncio.ensure_future(pool.chat(model, USER))
        (await busy(pool)).kill()
        assert (await chat).text == "ok"

    with_pool(work)


def test_a_request_that_crashes_its_process_is_not_tried_again(tmp_path: Path) -> None:
    async def work(pool: HelperPool) -> None:
        model = await pool.open(byte_level_file(tmp_path / "slow.gguf", ENDLESS))
        chat = asyncio.ensure_future(failure(pool.chat(model, USER)))
        (await busy(pool)).send_signal(signal.SIGSEGV)
        error = await chat
        assert error.code == "E_HELPER"
        assert "SIGSEGV" in error.message
        assert await pool.tokenize(model, "on") == pack_ids(b"on")

    with_pool(work)


def test_all_processes_killed_while_idle_are_replaced_with_their_models(tmp_path: Path) -> None:
    async def work(pool: HelperPool) -> None:
        model = await pool.open(byte_level_file(tmp_path / "m.gguf"))
        before = pool.pids
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        assert await pool.tokenize(model, "<|im_end|>", special=True) == pack_ids([END])
        assert not set(before) & set(pool.pids)

    with_pool(work)


def test_a_caller_that_gives_up_leaves_its_process_usable(tmp_path: Path) -> None:
    async def work(pool: HelperPool) -> None:
        model = await pool.open(byte_level_file(tmp_path / "slow.gguf", SLOW))
        chats = [asyncio.ensure_future(pool.chat(model, USER)) for _ in range(2)]
        await busy(pool)
        for chat in chats:
            chat.cancel()
        for _ in range(20):
            assert await pool.tokenize(model, "x") == pack_ids(b"x")

    with_pool(work)


def test_processes_are_replaced_after_their_share_of_requests() -> None:
    async def work(pool: HelperPool) -> None:
        model = await pool.open("simulated")
        seen = set(pool.pids)
        for _ in range(30):
            assert await pool.tokenize(model, "x") == pack_ids(b"x")
            seen |= set(pool.pids)
        assert len(seen) >= 4

    with_pool(work, limits=HelperLimits(requests=8))


def test_closing_fails_what_runs_and_waits(tmp_path: Path) -> None:
    async def run() -> None:
        pool = HelperPool()
        await pool.start()
        model = await pool.open(byte_level_file(tmp_path / "bomb.gguf", ENDLESS))
        chats = [asyncio.ensure_future(failure(pool.chat(model, USER))) for _ in range(5)]
        await busy(pool)
        await pool.close()
        await pool.close()
        assert [(await chat).code for chat in chats] == ["E_HELPER"] * 5
        assert (await failure(pool.tokenize(model, "x"))).code == "E_HELPER"

    asyncio.run(run())


def test_helpers_have_no_rights_to_gain_and_little_to_use() -> None:
    async def work(pool: HelperPool) -> None:
        await pool.open("simulated")
        for pid in pool.pids:
            assert "NoNewPrivs:\t1" in kernel_says(pid, "status")
            limits = kernel_says(pid, "limits").splitlines()[1:]
            rows = {line[:25].strip(): line[25:].split()[0] for line in limits}
            assert rows["Max core file size"] == "0"
            assert rows["Max open files"] == "64"
            assert int(rows["Max address space"]) < 2**30
            assert int(rows["Max cpu time"]) < 60

    with_pool(work)


FRONT = """
    import asyncio, sys
    from pagedd_daemon.front.helper_pool import HelperPool

    async def main():
        pool = HelperPool()
        await pool.start()
        model = await pool.open(sys.argv[1])
        asyncio.ensure_future(pool.chat(model, [{"role": "user", "content": "x"}]))
        await asyncio.sleep(0.2)
        print(*pool.pids, flush=True)
        await asyncio.sleep(60)

    asyncio.run(main())
"""


def test_helpers_end_with_a_front_that_is_killed_even_when_busy(tmp_path: Path) -> None:
    path = byte_level_file(tmp_path / "bomb.gguf", ENDLESS)
    front = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(FRONT), str(path)], stdout=subprocess.PIPE
    )
    with front:
        assert front.stdout is not None
        helpers = [psutil.Process(int(pid)) for pid in front.stdout.readline().split()]
        assert len(helpers) >= 2
        front.kill()
    _, alive = psutil.wait_procs(helpers, timeout=2)
    assert not alive


def test_the_front_imports_neither_numpy_nor_what_helpers_use() -> None:
    code = textwrap.dedent(
        """
        import sys
        import pagedd_daemon.front.helper_pool, pagedd_daemon.front.detokenizer
        import pagedd_daemon.models.registry
        print(*{name.partition(".")[0] for name in sys.modules})
        """
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"numpy", "llama_cpp", "jinja2", "gguf", "torch"} & set(loaded)
