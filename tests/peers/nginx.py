"""nginx's mail proxy, the program that the gateway replaces.

`NginxFile` runs a configuration file of the test's own. `Nginx` has two SMTP listeners and its own auth_http server:
`port` takes mail without a login (`smtp_auth none`), `auth_port` wants one. The built-in answer to auth_http sends
everybody to `upstream_port`; with `auth_http_port` another server is asked.
"""

from __future__ import annotations

import signal
from pathlib import Path

from tests.peers.process import Process, free_port, group_members, port_open, wait_for
from tests.peers.require import missing, require

MODULE = Path("/usr/lib/nginx/modules/ngx_mail_module.so")

CONFIGURATION = """\
load_module {module};
daemon off;
user root;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
events {{ worker_connections 4096; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
    uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
    server {{
        listen 127.0.0.1:{http_port};
        location = /auth {{
            add_header Auth-Status OK;
            add_header Auth-Server 127.0.0.1;
            add_header Auth-Port {upstream_port};
            return 204;
        }}
    }}
}}
mail {{
    server_name proxy.test;
    auth_http http://127.0.0.1:{auth_http_port}/auth;
    auth_http_timeout 5s;
    proxy_pass_error_message on;
    xclient {xclient};
    {tls}
    server {{ listen 127.0.0.1:{port}; protocol smtp; smtp_auth none; }}
    server {{ listen 127.0.0.1:{auth_port}; protocol smtp; smtp_auth login plain; }}
    {servers}
}}
"""


class Nginx(Process):
    """One instance. `certificate` (chain and key) turns STARTTLS on; `servers` is text for more `server` blocks."""

    def __init__(
        self,
        folder: Path,
        upstream_port: int,
        *,
        auth_http_port: int | None = None,
        xclient: bool = True,
        certificate: tuple[Path, Path] | None = None,
        servers: str = "",
    ) -> None:
        super().__init__(folder)
        self._program = require("nginx")
        if not MODULE.exists():
            missing("nginx has no mail module")
        self.port, self.auth_port, self.http_port = free_port(), free_port(), free_port()
        tls = ""
        if certificate is not None:
            tls = "ssl_certificate {}; ssl_certificate_key {}; starttls on;".format(*certificate)
        self.configuration = folder / "nginx.conf"
        self.configuration.write_text(
            CONFIGURATION.format(
                module=MODULE, folder=folder, http_port=self.http_port, upstream_port=upstream_port, tls=tls,
                auth_http_port=auth_http_port or self.http_port, xclient="on" if xclient else "off",
                port=self.port, auth_port=self.auth_port, servers=servers,
            )
        )  # fmt: skip

    def start(self) -> Nginx:
        """Start it; after this it accepts connections."""
        command = [self._program, "-e", str(self.folder / "error.log"), "-c", str(self.configuration)]
        self.launch(command, port_open(self.port))
        wait_for(self.worker_pids, "nginx's worker")  # the master listens before it forks
        return self

    def worker_pids(self) -> list[int]:
        """Its worker processes, whose CPU time a benchmark counts."""
        return [pid for pid in group_members(self.pid) if pid != self.pid]

    def wait_log(self, text: str) -> None:
        """Wait until `text` is in its error log, which at level info has each session."""
        wait_for(lambda: text in (self.folder / "error.log").read_text(errors="replace"), f"{text!r} in nginx's log")

    def stop(self, number: int = signal.SIGTERM, limit: float = 15.0) -> int | None:
        """End it at once; SIGQUIT waits for its sessions first."""
        return super().stop(number, limit)


class NginxFile(Process):
    """nginx with this configuration file, which says `daemon off` and `pid` itself; `port` is one it listens on."""

    def __init__(self, folder: Path, configuration: Path, port: int) -> None:
        super().__init__(folder)
        self._program = require("nginx")
        if not MODULE.exists():
            missing("nginx has no mail module")
        self._configuration = configuration
        self._port = port

    def start(self) -> NginxFile:
        """Start it; after this its worker accepts connections."""
        command = [self._program, "-e", str(self.folder / "error.log"), "-c", str(self._configuration)]
        self.launch(command, port_open(self._port))
        wait_for(lambda: len(group_members(self.pid)) > 1, "nginx's worker")
        return self
