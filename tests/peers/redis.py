"""Redis as a peer: one server on a socket and a port, with TLS and a password, three with sentinels, a cluster of three.

Every instance is private: its own folder, ports and socket; nothing is written to disk. `server` is the program, so
that a Valkey can stand in where there is one.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import ssl
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.peers.process import Process, free_port, wait_for
from tests.peers.require import require

COMMON = ("--save", "", "--appendonly", "no", "--daemonize", "no")


class Stoppable(Process):
    """A process that can be made to hang."""

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Hung: the kernel goes on taking connections and octets for it."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)


class RedisServer(Stoppable):
    """A server on `port` of 127.0.0.1 and on the socket `path`. `options` is more of its command line.

    With `tls` (certificate and key) the port speaks TLS. Start it again after a `kill` and it has the same places.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        password: str = "",
        tls: tuple[Path, Path] | None = None,
        port: int = 0,
        server: str = "redis-server",
    ) -> None:
        super().__init__(folder)
        self.program = require(server)
        self.port = port or free_port()
        self.path = folder / f"{self.port}.sock"
        self.output = folder / f"{self.port}.out"
        self.password, self.tls = password, tls
        self._options = options

    def start(self) -> RedisServer:
        port, plain_port = str(self.port), "0" if self.tls else str(self.port)
        command = [self.program, "--port", plain_port, "--bind", "127.0.0.1", *COMMON, "--dir", str(self.folder)]
        command += ["--unixsocket", str(self.path), "--unixsocketperm", "700"]
        if self.tls:
            chain, key = map(str, self.tls)
            command += ["--tls-port", port, "--tls-cert-file", chain, "--tls-key-file", key]
            command += ["--tls-ca-cert-file", chain, "--tls-auth-clients", "no"]
        if self.password:
            command += ["--requirepass", self.password, "--masterauth", self.password]
        self.launch([*command, *self._options], lambda: self.ask("PING") == "PONG")
        return self

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self.stop(signal.SIGKILL)
        self.path.unlink(missing_ok=True)

    def ask(self, *words: str) -> Reply:
        """A command over the socket, apart from the client under test."""
        return ask(self._connect(), *((("AUTH", self.password),) if self.password else ()), words)

    def _connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(5)
        try:
            client.connect(str(self.path))
        except OSError:
            client.close()
            raise
        return client

    def keys(self) -> list[str]:
        """Every key that it holds."""
        found = self.ask("KEYS", "*")
        assert isinstance(found, list)
        return sorted(str(key) for key in found)

    def seconds(self) -> float:
        """Its clock."""
        reply = self.ask("TIME")
        assert isinstance(reply, list)
        return int(str(reply[0])) + int(str(reply[1])) / 1e6


Reply = str | int | None | list["Reply"]


class RedisError(Exception):
    """An error that a server replied with."""


def ask(client: socket.socket, *commands: Sequence[str]) -> Reply:
    """The reply to the last of some commands, over a connection that is closed then."""
    reply: Reply = None
    with client, client.makefile("rwb") as stream:
        for words in commands:
            stream.write(b"*%d\r\n" % len(words))
            for word in words:
                data = word.encode()
                stream.write(b"$%d\r\n%b\r\n" % (len(data), data))
            stream.flush()
            reply = _read(stream)
    return reply


def _read(stream: io.BufferedRWPair) -> Reply:
    line = stream.readline()
    if not line.endswith(b"\r\n"):
        raise ConnectionError("the server closed the connection")
    kind, text = line[:1], line[1:-2].decode("utf-8", "replace")
    if kind == b"-":
        if text.startswith("LOADING"):
            raise ConnectionError(text)
        raise RedisError(text)
    if kind == b":":
        return int(text)
    if kind == b"$":
        if text == "-1":
            return None
        return stream.read(int(text) + 2)[:-2].decode("utf-8", "replace")
    if kind == b"*":
        return [_read(stream) for _ in range(int(text))]
    return text


def ask_port(port: int, *words: str, tls: ssl.SSLContext | None = None) -> Reply:
    """A command to the server at a port of 127.0.0.1."""
    client = socket.create_connection(("127.0.0.1", port), 5)
    return ask(tls.wrap_socket(client, server_hostname="127.0.0.1") if tls else client, words)


class RedisSentinel(Stoppable):
    """A sentinel that watches the master at `master_port` under the name `mail`, and needs `quorum` to agree."""

    def __init__(self, folder: Path, master_port: int, *, quorum: int = 2, password: str = "") -> None:
        super().__init__(folder)
        self.program = require("redis-sentinel")
        self.port = free_port()
        self.output = folder / f"sentinel-{self.port}.out"
        self._file = folder / f"sentinel-{self.port}.conf"
        (folder / str(self.port)).mkdir()
        lines = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"dir {folder / str(self.port)}",
            f"sentinel monitor mail 127.0.0.1 {master_port} {quorum}",
            "sentinel down-after-milliseconds mail 400",
            "sentinel failover-timeout mail 2000",
        ]
        if password:
            lines += [f"sentinel auth-pass mail {password}"]
        self._file.write_text("\n".join(lines) + "\n")

    def start(self) -> RedisSentinel:
        self.launch([self.program, str(self._file)], lambda: ask_port(self.port, "PING") == "PONG")
        return self

    def state(self) -> dict[str, str]:
        """What it knows of the master."""
        reply = ask_port(self.port, "SENTINEL", "MASTER", "mail")
        assert isinstance(reply, list)
        words = [str(word) for word in reply]
        return dict(zip(words[::2], words[1::2], strict=True))


class SentinelTrio:
    """A master, two replicas and three sentinels that see each other."""

    def __init__(self, folder: Path, password: str = "") -> None:
        self._folder, self._password = folder, password
        self.servers: list[RedisServer] = []
        self.sentinels: list[RedisSentinel] = []

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{hosts}/mail"

    def __enter__(self) -> SentinelTrio:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        at_once = ("--repl-diskless-sync-delay", "0")
        master = RedisServer(self._folder, *at_once, password=self._password).start()
        self.servers.append(master)
        for _ in range(2):
            of_master = ("--replicaof", f"127.0.0.1 {master.port}")
            self.servers.append(RedisServer(self._folder, *at_once, *of_master, password=self._password).start())
        for replica in self.servers[1:]:
            wait_for(lambda r=replica: "master_link_status:up" in str(r.ask("INFO", "replication")), "replication")  # type: ignore[misc]
        for _ in range(3):
            self.sentinels.append(RedisSentinel(self._folder, master.port, password=self._password).start())
        for sentinel in self.sentinels:
            wait_for(lambda s=sentinel: self._sees_all(s.state()), "sentinels to see each other")  # type: ignore[misc]

    def _sees_all(self, state: dict[str, str]) -> bool:
        return (state["num-other-sentinels"], state["num-slaves"], state["flags"]) == ("2", "2", "master")

    def __exit__(self, *_: object) -> None:
        for peer in [*self.sentinels, *self.servers]:
            peer.stop()


class RedisCluster:
    """Three masters that share the slots, without replicas; `more` options for each."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.nodes: list[RedisServer] = []
        for _ in range(3):
            port = free_port()
            (folder / str(port)).mkdir()
            options = ["--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf", "--cluster-port"]
            options += [str(free_port()), "--cluster-node-timeout", "1000", "--cluster-announce-ip", "127.0.0.1"]
            self.nodes.append(RedisServer(folder / str(port), *options, *more, port=port))

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def __enter__(self) -> RedisCluster:
        try:
            for node in self.nodes:
                node.start()
            self._join()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _join(self) -> None:
        """As `redis-cli --cluster create`, in a fraction of its time."""
        share = 16384 // 3 + 1
        for index, node in enumerate(self.nodes):
            first, last = index * share, min((index + 1) * share, 16384) - 1
            node.ask("CLUSTER", "ADDSLOTSRANGE", str(first), str(last))
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", str(index + 1))
        for node in self.nodes[1:]:
            bus = str(node.ask("CONFIG", "GET", "cluster-port")[1])  # type: ignore[index]
            self.nodes[0].ask("CLUSTER", "MEET", "127.0.0.1", str(node.port), bus)
        for node in self.nodes:
            wait_for(lambda n=node: self._joined(n), "the cluster to agree")  # type: ignore[misc]

    def _joined(self, node: RedisServer) -> bool:
        text = str(node.ask("CLUSTER", "INFO"))
        return "cluster_state:ok" in text and "cluster_known_nodes:3" in text

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.stop()
