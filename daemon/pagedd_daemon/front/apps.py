"""Who an app is to the scheduler, and what its settings allow it.

An app is (user; program; name): the user and the program are the kernel's word, the name is a
claim. Settings are found by the name, and where they name an executable only for that program.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedd_daemon.front.accounts import Account
from pagedd_daemon.front.config_file import change_app
from pagedd_daemon.front.config_model import AppSettings, ConfigFile, UnknownApps
from pagedd_daemon.front.eras import Eras
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.messages import App
from pagedd_daemon.owners import join

CLASSES = {"interactive": 0, "normal": 1, "background": 2}
"""`kvpager.types.PriorityClass` by name; importing that module would bring numpy."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What a request is submitted with."""

    klass: int
    app: App
    held: int
    """Samples it holds of what its program's unknown apps may have in the interactive class."""


class Apps:
    """Settings of all apps, and what they mean for a request."""

    def __init__(
        self,
        config: ConfigFile | None = None,
        path: Path | None = None,
        secret: bytes | None = None,
        eras: Eras | None = None,
    ) -> None:
        """Settings, and where changes to them are written; without ``path`` there can be none.

        ``secret``: 32 bytes that namespaces come from, where they are to be the same after a
        restart; None: random ones. ``eras``: what users have cleared of what outlives it.
        """
        self.eras = eras or Eras()
        self.config = config or ConfigFile()
        self._path = path
        self._secret = secret or secrets.token_bytes(32)
        self._interactive: dict[tuple[int, str], int] = {}
        """Samples of unknown apps in the interactive class, by user and program."""

    def known(self, account: Account) -> AppSettings | None:
        """The app's own settings, if it has some and is the program they are for."""
        settings = self.config.apps.get(account.app)
        if settings is None or settings.executable in (None, account.program.executable):
            return settings
        return None

    def settings(self, account: Account) -> AppSettings | UnknownApps:
        """What holds for the app."""
        return self.known(account) or self.config.unknown

    def klass(self, account: Account) -> str:
        """The class the app gets: what it claims, or its ceiling if that is less."""
        return max(account.klass, self.settings(account).ceiling, key=CLASSES.__getitem__)

    def admit(self, account: Account) -> None:
        """Check that one more request of the app may wait.

        Raises:
            WireError: ``E_BUSY``.
        """
        at_most = self.settings(account).max_queued
        queued = account.live - account.running
        if at_most and queued >= at_most:
            raise WireError(
                "E_BUSY",
                f"{queued} requests of {account.app} wait, its limit is {at_most}",
                details={"limit": "max_queued", "value": queued, "max": at_most},
            )

    def stand(self, account: Account, claimed: str, samples: int) -> Standing:
        """What a request is submitted with; `leave` must follow when it is over."""
        settings = self.settings(account)
        klass = max(CLASSES[claimed], CLASSES[settings.ceiling])
        held = 0
        if isinstance(settings, UnknownApps) and klass == CLASSES["interactive"]:
            group = (account.uid, account.program.label)
            already = self._interactive.get(group, 0)
            if already + samples <= settings.interactive_samples:
                held = samples
                self._interactive[group] = already + samples
            else:
                klass = CLASSES["normal"]
        return Standing(klass, self.message(account), held)

    def leave(self, account: Account, standing: Standing) -> None:
        """A request that stood is over."""
        if standing.held:
            group = (account.uid, account.program.label)
            self._interactive[group] -= standing.held
            if not self._interactive[group]:
                del self._interactive[group]

    def message(self, account: Account) -> App:
        """What the engine is told of the app."""
        settings = self.settings(account)
        return App(
            key=account.key,
            uid=account.uid,
            scope=account.program.label,
            name=account.app,
            weight=settings.weight,
            max_running=settings.max_running,
            kv_floor_tokens=settings.kv_floor if isinstance(settings, AppSettings) else 0,
            kv_ceiling_tokens=settings.kv_ceiling,
            root=self._salt(account),
            owner=join(account.uid, self.eras.of(account.uid)),
        )

    def _salt(self, account: Account) -> bytes:
        """The namespace of the app's prefixes: not to be guessed, and another after a restart
        unless a store of prefixes outlives it.

        By the executable rather than the scope, whose name is another at each start of the app.
        """
        known = self.known(account)
        if known is not None and known.share is not None:
            whose = ["group", known.share]
        else:
            program = account.program
            whose = ["app", program.executable or program.scope, account.app]
        era = self.eras.of(account.uid)
        text = "\0".join([str(account.uid), *whose, *([str(era)] if era else [])])
        return hmac.digest(self._secret, text.encode("utf-8", "surrogateescape"), hashlib.sha256)

    def change(self, app: str, settings: Mapping[str, Any]) -> ConfigFile:
        """Write an app's settings to the file. Not for the event loop.

        Raises:
            pagedd_daemon.front.config.ConfigError: The file is wrong, or would be.
            OSError: It cannot be written, or the daemon has none.
        """
        if self._path is None:
            raise FileNotFoundError("the daemon runs without a configuration file")
        return change_app(self._path, app, settings)

    def described(self, name: str, account: Account | None = None) -> dict[str, Any]:
        """Settings as ``apps.show`` of docs/protocol.md has them; of a connected app, those that
        hold for it."""
        own = self.config.apps.get(name)
        if account is not None:
            own = self.known(account)
        settings = (own or self.config.unknown).model_dump(by_alias=True)
        return {"app": name, "known": own is not None, "settings": settings}
