"""Where models come from: the registry names them, a helper reads them, an engine runs them."""

from __future__ import annotations

import asyncio
import importlib.util
import os
from array import array
from collections.abc import Sequence

from pagedd_daemon.front.config import Settings, disk_place, gpu_usable
from pagedd_daemon.front.detokenizer import PieceTable, unpack_ids
from pagedd_daemon.front.engine_link import Engine, EngineListener, EngineProcess
from pagedd_daemon.front.eras import Eras
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.helper_pool import ChatPrompt, HelperError, HelperPool, ModelText
from pagedd_daemon.front.model_ports import Conversation, Entry, Rendered, Text, wire_error
from pagedd_daemon.helper.protocol import SIMULATED
from pagedd_daemon.memory_file import create_memory
from pagedd_daemon.messages import Configure
from pagedd_daemon.models.errors import ModelError
from pagedd_daemon.models.registry import ModelEntry, Registry


def _refused(error: HelperError | ModelError) -> WireError:
    return wire_error(error.code, error.message, error.details)


class HelperText:
    """Implements `models.Text` with the helper processes."""

    def __init__(self, pool: HelperPool, text: ModelText) -> None:
        self._pool = pool
        self.model = text

    @property
    def pieces(self) -> PieceTable | None:
        """See `models.Text`."""
        return self.model.table

    async def tokenize(self, text: str, special: bool, bos: bool) -> array[int]:
        """See `models.Text`."""
        try:
            ids = await self._pool.tokenize(self.model, text, special=special, bos=bos)
        except HelperError as error:
            raise _refused(error) from error
        return unpack_ids(ids)

    async def try_grammar(self, kind: str, text: str) -> None:
        """See `models.Text`."""
        try:
            await self._pool.try_grammar(self.model, kind, text)
        except HelperError as error:
            raise _refused(error) from error

    async def chat(self, conversation: Conversation, known: str | None = None) -> Rendered:
        """See `models.Text`."""
        try:
            prompt = await self._chat(conversation, known)
        except HelperError as error:
            raise _refused(error) from error
        return Rendered(unpack_ids(prompt.tokens), prompt.text, prompt.rewritten)

    async def _chat(self, conversation: Conversation, known: str | None) -> ChatPrompt:
        messages, tools = conversation.messages, conversation.tools
        args = dict(conversation.args)
        if known is None:
            return await self._pool.chat(self.model, messages, tools=tools, template_args=args)
        return await self._pool.continue_chat(
            self.model, messages, known, tools=tools, template_args=args
        )


class ModelSource:
    """Implements `models.Source`."""

    def __init__(
        self, settings: Settings, registry: Registry, pool: HelperPool, eras: Eras | None = None
    ) -> None:
        """``eras``: what users have cleared of the store of prefixes."""
        self.settings = settings
        """What the next load of a model is made with."""
        self._registry = registry
        self._pool = pool
        self._eras = eras or Eras()
        self.fallen = False
        """Engines on the GPU died too often: the CPU computes for the rest of the daemon's life."""
        self._ram: tuple[int, int] | None = None
        """Descriptor and budget of the RAM tier's memory file."""

    async def default(self) -> ModelEntry | None:
        """The model for requests that name none; None where none was configured or can be had.

        Raises:
            WireError: ``E_MODEL``: one was configured and cannot be used.
        """
        settings = self.settings
        if settings.model is not None:
            return await self.resolve(settings.model)
        if settings.backend == "simulated":
            return await self.resolve(SIMULATED)
        try:
            return await self.resolve(self._registry.default)
        except WireError:
            return None

    async def resolve(self, name: str) -> ModelEntry:
        """See `models.Source`."""
        try:
            entry = await asyncio.to_thread(self._registry.resolve, name)
        except ModelError as error:
            raise _refused(error) from error
        backend = self.settings.backend
        if backend in ("llama.cpp", "torch") and entry.path is None:
            raise WireError(
                "E_MODEL", f"the backend {backend} cannot run {name}", details={"name": name}
            )
        return entry

    async def list(self) -> Sequence[ModelEntry]:
        """See `models.Source`."""
        return await asyncio.to_thread(self._registry.list)

    async def open_text(self, entry: Entry) -> HelperText:
        """See `models.Source`."""
        assert isinstance(entry, ModelEntry)
        try:
            return HelperText(self._pool, await self._pool.open(entry.source))
        except HelperError as error:
            raise _refused(error) from error

    def configure(self, entry: Entry, text: Text) -> Configure:
        """See `models.Source`."""
        assert isinstance(entry, ModelEntry)
        assert isinstance(text, HelperText)
        settings = self.settings
        pieces = text.model.table
        simulated = settings.backend == "simulated" or entry.path is None
        return Configure(
            backend="simulated" if simulated else self._backend(),
            model_path="" if simulated else str(entry.path),
            model_digest=text.model.digest,
            context_tokens=settings.context_tokens,
            kv_tokens=settings.kv_tokens,
            ram_bytes=settings.ram_bytes,
            vram_bytes=settings.vram_bytes,
            disk_persist=settings.disk_persist,
            disk_eras=self._eras.all(),
            disk_bytes=settings.disk_bytes,
            disk_folder=str(disk_place(settings.disk_folder, settings.disk_persist)),
            write_through=settings.write_through,
            ram_fd=-1 if self._ram is None else self._ram[0],
            threads=settings.threads,
            kv_dtype=settings.kv_dtype,
            flash_attention=settings.flash_attention,
            vocab_size=text.model.vocab_size,
            eog_tokens=text.model.eog,
            piece_lengths=b"" if pieces is None else pieces.lengths(),
            pieces=b"" if pieces is None else pieces.blob,
            simulated_step_us=settings.simulated_step_us,
            simulated_token_us=settings.simulated_token_us,
        )

    def _backend(self) -> str:
        """What the engine is asked for: to look for a GPU only where there may be one, since
        loading torch takes seconds."""
        settings = self.settings
        if settings.backend == "auto" and (self.fallen or not gpu_usable()):
            return "llama.cpp"
        return settings.backend

    def fall_back(self) -> bool:
        """See `models.Source`. ``auto`` lets the daemon choose; who names a backend wants no
        other."""
        able = self._backend() == "auto" and importlib.util.find_spec("llama_cpp") is not None
        if able:
            self.fallen = True
            self.forget()
        return able

    async def spawn(self, listener: EngineListener) -> Engine:
        """See `models.Source`."""
        budget = self.settings.ram_bytes
        if self._ram is not None and self._ram[1] != budget:
            self.forget()
        if self._ram is None:
            self._ram = create_memory(budget), budget
        command = ("-m", "pagedd_daemon.engine", "--log-level", self.settings.log_level)
        prepared = (*command, "--prepare", self._backend())
        return await EngineProcess.spawn(listener, prepared, (self._ram[0],))

    def forget(self) -> None:
        """See `models.Source`."""
        if self._ram is not None:
            os.close(self._ram[0])
            self._ram = None
