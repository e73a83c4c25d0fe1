"""``pagedd metrics``: figures for Prometheus, printed or served on the loopback interface.

The daemon has no network code; what listens here is this process, and it knows one page.
"""

from __future__ import annotations

import http.server
import ipaddress
import signal
import socket
from typing import Any

import click

import pagedd
from pagedd.cli import _output as out
from pagedd.cli._app import EX_NOPERM, EX_USAGE, CommandError, commands, reaches_daemon

_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@commands.command()
@click.option("--listen", metavar="127.0.0.1:PORT", help="Serve them at /metrics until Ctrl-C.")
@reaches_daemon
def metrics(listen: str | None, json_: bool, host: str | None, timeout: float) -> None:
    """Figures in Prometheus' text format: print them, or serve them on the loopback interface.

    Asking never loads or wakes a model.
    """
    if listen is None:
        with pagedd.control(host=host, timeout=timeout) as control:
            text = control.metrics()
        if json_:
            out.print_json({"text": text})
        else:
            click.echo(text, nl=False)
        return
    address, port = loopback(listen)
    # By its own handler: SIGINT itself is ignored by what a script starts in the background.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = _Server(address, port, host, timeout)
    bound = server.server_address[1]
    where = f"http://{address if ':' not in address else f'[{address}]'}:{bound}/metrics"
    if json_:
        out.print_json({"listening": where})
    else:
        click.echo(f"serving {where}", err=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()


def loopback(listen: str) -> tuple[str, int]:
    """Address and port to listen at.

    Raises:
        CommandError: It is no address of the loopback interface: figures name apps and programs,
            and nobody would ask who reads them.
    """
    address, colon, port = listen.rpartition(":")
    address = address.strip("[]") or "127.0.0.1"
    if address == "localhost":
        address = "127.0.0.1"
    try:
        fits = ipaddress.ip_address(address).is_loopback
        number = int(port) if port.isascii() else -1
    except ValueError:
        fits, number = False, -1
    if not colon or not fits or not 0 <= number <= 65535:
        raise CommandError(
            f"'{listen}' is no address of the loopback interface with a port",
            code="E_LISTEN",
            exit_code=EX_USAGE,
            advice="Use 127.0.0.1:9178, and a proxy that checks who asks for anything beyond.",
        )
    return address, number


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: str, port: int, host: str | None, timeout: float) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.daemon_host, self.daemon_timeout = host, timeout
        try:
            super().__init__((address, port), _Handler)
        except OSError as error:
            raise CommandError(
                f"cannot listen at {address}:{port}: {error.strerror}",
                code="E_LISTEN",
                exit_code=EX_NOPERM,
                advice="Choose another port, or see with 'ss -ltnp' who has it.",
            ) from None


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    timeout = 10
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """The one page there is."""
        host = (self.headers.get("Host") or "").rpartition(":")[0].strip("[]")
        if host not in ("localhost", "127.0.0.1", "::1"):
            # A page in a browser that made its own name point here would send that name.
            self._answer(403, "this is for the loopback interface\n")
        elif self.path != "/metrics":
            self._answer(404, "there is only /metrics\n")
        else:
            try:
                with pagedd.control(
                    host=self.server.daemon_host, timeout=self.server.daemon_timeout
                ) as control:
                    self._answer(200, control.metrics())
            except pagedd.PageddError as error:
                self._answer(503, f"{error}\n")

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", _TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: one line for each question is no news."""
