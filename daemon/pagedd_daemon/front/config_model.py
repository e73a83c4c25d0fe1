"""Every setting of ``config.toml``: its type, unit and default, what it means, and when it holds.

The one source: the file is checked against these models, `pagedd config` shows them, and
docs/configuration.md is written from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from pagedd_daemon.front.config import BACKENDS, quarter_of_memory
from pagedd_daemon.front.fields import seconds

Holds = Literal["at once", "next load", "restart"]


@dataclass(frozen=True, slots=True)
class About:
    """What a reader of a setting needs beside its type, default and description."""

    unit: str
    """``tokens``, ``GB``; empty for what is a word or a pure number."""
    holds: Holds = "at once"
    """When a change in the file holds: at once after a reload, from the next load of a model on, or
    after a restart of the daemon."""
    shown: str = ""
    """The type in words, where the annotation does not say it."""
    default: str = ""
    """The default in words, where the value does not say it."""


_MOST = 2**31 - 1
_Count = Annotated[int, Field(ge=0, le=_MOST)]
_Duration = Annotated[float, Field(allow_inf_nan=True), BeforeValidator(seconds)]
_Class = Literal["interactive", "normal", "background"]
_Level = Literal["debug", "info", "warning", "error"]
_WORD_CLASS = "`interactive`, `normal` or `background`"
_DURATION = "seconds, or a text like `5m` or `1h30m`; negative: for ever"


def _backend(value: str) -> str:
    if value not in BACKENDS:
        raise ValueError(f"one of {', '.join(BACKENDS)}")
    return value


class Table(BaseModel):
    """A table of the file: no key that is not known, no value of another type."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        populate_by_name=False,
    )


class AppSettings(Table):
    """``[apps.NAME]``: what holds for one app."""

    ceiling: Annotated[_Class, About("", shown=_WORD_CLASS)] = Field("interactive", alias="class")
    """The most important class it gets, whatever it claims."""
    weight: Annotated[float, Field(gt=0, le=1000), About("", shown="number above 0, to 1000")] = 1.0
    """Its share beside one with weight 1, of the same class and user."""
    max_running: Annotated[_Count, About("requests")] = 0
    """Requests that run at the same time; further ones wait. 0: any number."""
    max_queued: Annotated[_Count, About("requests")] = 0
    """Requests that wait; further ones are refused (`E_BUSY`). 0: any number."""
    kv_floor: Annotated[_Count, About("tokens")] = 0
    """Tokens of the pool that its running requests keep while others can be paged out instead."""
    kv_ceiling: Annotated[_Count, About("tokens")] = 0
    """Tokens of the pool that its running requests never exceed. 0: all."""
    deadline_ms: Annotated[_Count, About("milliseconds")] = 0
    """The deadline of its requests that name none. 0: none."""
    share: Annotated[
        Annotated[str, Field(min_length=1, max_length=64)] | None, About("", shown="text")
    ] = None
    """Apps of one user with the same word here share prefixes; others do not."""
    executable: Annotated[
        Annotated[str, Field(pattern="^/")] | None, About("", shown="absolute path")
    ] = None
    """These settings are for the app that is this program, and for none that only takes its
    name."""


class UnknownApps(Table):
    """``[unknown]``: what holds for each app without settings of its own."""

    ceiling: Annotated[_Class, About("", shown=_WORD_CLASS)] = Field("interactive", alias="class")
    """The most important class such an app gets, whatever it claims."""
    interactive_samples: Annotated[_Count, About("samples")] = 2
    """Samples that one program's unknown apps have in the interactive class at the same time; what
    goes beyond is normal. Anybody can say `interactive`."""
    weight: Annotated[float, Field(gt=0, le=1000), About("", shown="number above 0, to 1000")] = 1.0
    """The share of each beside an app with weight 1, of the same class and user."""
    max_running: Annotated[_Count, About("requests")] = 0
    """Requests of each that run at the same time; further ones wait. 0: any number."""
    max_queued: Annotated[_Count, About("requests")] = 0
    """Requests of each that wait; further ones are refused (`E_BUSY`). 0: any number."""
    kv_ceiling: Annotated[_Count, About("tokens")] = 0
    """Tokens of the pool that the running requests of each never exceed. 0: all."""
    deadline_ms: Annotated[_Count, About("milliseconds")] = 0
    """The deadline of requests that name none. 0: none."""


class ServeSettings(Table):
    """``[serve]``: the daemon. What the command line of ``pagedd serve`` says comes first."""

    model: Annotated[
        Annotated[str, Field(min_length=1)] | None,
        About("", "restart", "name or path", "what `pagedd pull` got"),
    ] = None
    """The model for requests that name none; it is loaded in the background at the start."""
    backend: Annotated[
        str,
        AfterValidator(_backend),
        About("", "next load", "`auto`, `torch`, `llama.cpp` or `simulated`"),
    ] = "auto"
    """What computes: the paged engine on the GPU (`torch`), `llama.cpp` on the CPU, or whichever
    is better on this machine (`auto`). `simulated` computes no model at all."""
    kv_tokens: Annotated[_Count, About("tokens", "next load", default="by memory")] = 0
    """Size of the pool that running requests share. 0: chosen from the memory there is."""
    ram_gb: Annotated[
        Annotated[float, Field(ge=0)] | None,
        About("GB", "next load", "number, 0 or more", "a quarter of the memory"),
    ] = None
    """RAM for KV that is paged out or cached; no more than the machine has. It is taken as it is
    needed, outlives an engine that dies, and is given back when the model is unloaded."""
    vram_gb: Annotated[
        Annotated[float, Field(ge=0)],
        About("GB", "next load", "number, 0 or more", "nine tenths of what is free"),
    ] = 0.0
    """GPU memory for the model, its KV and what steps take, at most. The pool is smaller while
    other programs want that memory, and grows back. 0: nine tenths of what is free when the model
    is loaded."""
    threads: Annotated[_Count, About("threads", "next load", default="the physical cores")] = 0
    """Threads that compute where no GPU does. 0: the physical cores."""
    context: Annotated[_Count, About("tokens", "next load", default="the model's")] = 0
    """The longest sequence to serve, prompt and reply together. 0: what the model was made for."""
    keep_alive: Annotated[_Duration, About("seconds", shown=_DURATION, default="5m")] = 300.0
    """How long a model stays loaded after its last request, unless the request says otherwise."""
    drain: Annotated[_Duration, About("seconds", shown=_DURATION, default="30s")] = 30.0
    """How long streams may go on after SIGTERM or `pagedd shutdown`."""
    shared: Annotated[bool, About("", "restart", "`true` or `false`")] = False
    """Serve the other users of the machine too, each apart from the others. Settings of apps are
    then for the app of that name of every user."""
    group: Annotated[
        Annotated[str, Field(min_length=1)] | None, About("", "restart", shown="name of a group")
    ] = None
    """Of a shared daemon: whom it serves. Without a group, everybody on the machine."""
    log_level: Annotated[_Level, About("", shown="`debug`, `info`, `warning` or `error`")] = "info"
    """What goes to the log. Prompts are written at no level."""

    def as_settings(self) -> dict[str, Any]:
        """Fields of `pagedd_daemon.front.config.Settings`."""
        return {
            "model": self.model,
            "backend": self.backend,
            "kv_tokens": self.kv_tokens,
            "ram_bytes": quarter_of_memory() if self.ram_gb is None else int(self.ram_gb * 10**9),
            "vram_bytes": int(self.vram_gb * 10**9),
            "threads": self.threads,
            "context_tokens": self.context,
            "keep_alive_s": self.keep_alive,
            "drain_s": self.drain,
            "shared": self.shared,
            "group": self.group,
            "log_level": self.log_level,
        }


class DiskSettings(Table):
    """``[disk]``: the tier behind RAM. What does not fit there goes to a file and not away."""

    budget_gb: Annotated[
        Annotated[float, Field(ge=0)], About("GB", "next load", "number, 0 or more")
    ] = 0.0
    """Size of the file, allocated when a model is loaded. 0: there is none. Where the disk has less
    room, the file is smaller, and `pagedd status` says so."""
    path: Annotated[
        Annotated[str, Field(pattern="^/")] | None,
        About("", "next load", "absolute path", "the folder for caches"),
    ] = None
    """The folder of the file. It has no name there, and is gone with the engine."""
    persist: Annotated[bool, About("", "restart", "`true` or `false`")] = False
    """Keep the file: after a restart of the daemon a resent history finds its KV. It holds what was
    read and written with the model, in a form that can be turned back into text; it is private to
    you (0600), in the folder for state unless `path` says otherwise, and kept until
    `pagedd cache clear`. Loading another model makes it anew."""

    def as_settings(self) -> dict[str, Any]:
        """Fields of `pagedd_daemon.front.config.Settings`."""
        folder = None if self.path is None else Path(self.path)
        return {
            "disk_bytes": int(self.budget_gb * 10**9),
            "disk_folder": folder,
            "disk_persist": self.persist,
        }


FIELDS: Mapping[str, str] = {
    "ram_gb": "ram_bytes",
    "vram_gb": "vram_bytes",
    "context": "context_tokens",
    "keep_alive": "keep_alive_s",
    "drain": "drain_s",
    "budget_gb": "disk_bytes",
    "path": "disk_folder",
    "persist": "disk_persist",
}
"""Keys of ``[serve]`` and ``[disk]`` that have another name as a field of `Settings`."""

AppName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class ConfigFile(Table):
    """The whole file."""

    serve: ServeSettings = Field(default_factory=ServeSettings)
    disk: DiskSettings = Field(default_factory=DiskSettings)
    unknown: UnknownApps = Field(default_factory=lambda: UnknownApps.model_validate({}))
    apps: dict[AppName, AppSettings] = Field(default_factory=dict)

    def as_settings(self) -> dict[str, Any]:
        """Fields of `pagedd_daemon.front.config.Settings`."""
        return self.serve.as_settings() | self.disk.as_settings()


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting, for those who show it."""

    table: str
    """``serve``, ``disk``, ``unknown`` or ``apps.NAME``."""
    key: str
    type: str
    unit: str
    default: str
    holds: Holds
    text: str


TABLES: Mapping[str, type[Table]] = {
    "serve": ServeSettings,
    "disk": DiskSettings,
    "unknown": UnknownApps,
    "apps.NAME": AppSettings,
}


def settings() -> Iterator[Setting]:
    """Every setting there is, in the order of the file."""
    for table, model in TABLES.items():
        for name, field in model.model_fields.items():
            yield _setting(table, field.alias or name, field)


def _setting(table: str, key: str, field: FieldInfo) -> Setting:
    (about,) = [m for m in field.metadata if isinstance(m, About)]
    default = "none" if field.default is None else f"`{_plain(field.default)}`"
    return Setting(
        table=table,
        key=key,
        type=about.shown or "whole number, 0 or more",
        unit=about.unit,
        default=about.default or default,
        holds=about.holds,
        text=" ".join((field.description or "").split()),
    )


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def known_keys(path: tuple[str, ...]) -> list[str]:
    """The keys that a table of the file may have; none for what is no table."""
    if not path:
        return list(ConfigFile.model_fields)
    name = "apps.NAME" if path[0] == "apps" and len(path) == 2 else ".".join(path)
    model = TABLES.get(name)
    return [] if model is None else [f.alias or n for n, f in model.model_fields.items()]
