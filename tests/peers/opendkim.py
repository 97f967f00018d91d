"""OpenDKIM as a milter: signing what comes, or verifying it with keys from a file instead of DNS; needs root.

    key = dkim_key(folder, "x.test")
    with OpenDkim(folder, key) as signer, OpenDkim(folder, key, verify=True) as verifier:
        ...                                             # signer.address, verifier.address
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.peers.milter_program import MilterProgram
from tests.peers.require import require, require_root

SELECTOR = "sel"
COMMON = """\
Socket {socket}
Background no
AutoRestart no
RequireSafeKeys no
UserID opendkim
UMask 000
Syslog yes
SoftwareHeader no
Canonicalization {canonicalization}
"""
SIGN = """\
Mode s
Domain {domain}
Selector {selector}
KeyFile {private}
InternalHosts 0.0.0.0/0
OversignHeaders From
"""
# It does not verify what comes from an internal host; the default for these is 127.0.0.1.
VERIFY = """\
Mode v
TestDNSData file:{records}
AuthservID verify.test
AlwaysAddARHeader yes
On-BadSignature reject
InternalHosts 192.0.2.200
"""


@dataclass(frozen=True, slots=True)
class DkimKey:
    """A key pair: the private half as a file, the public half as the TXT record `name` has."""

    domain: str
    private: Path
    name: str
    record: str


def dkim_key(folder: Path, domain: str) -> DkimKey:
    """Make a key with opendkim-genkey; unprivileged programs can read it."""
    require_root()
    command = [require("opendkim-genkey"), "-b", "2048", "-D", str(folder), "-d", domain, "-s", SELECTOR]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    private = folder / f"{SELECTOR}.private"
    shutil.chown(private, "opendkim")
    record = "".join(re.findall(r'"([^"]*)"', (folder / f"{SELECTOR}.txt").read_text()))
    return DkimKey(domain, private, f"{SELECTOR}._domainkey.{domain}", record)


class OpenDkim(MilterProgram):
    """Signs mail from the key's domain, or with `verify` adds Authentication-Results and refuses bad signatures.

    `options` are more lines for its configuration (opendkim.conf(5)).
    """

    def __init__(
        self,
        folder: Path,
        key: DkimKey,
        *,
        verify: bool = False,
        canonicalization: str = "relaxed/simple",
        inet: bool = False,
        options: str = "",
    ) -> None:
        require_root()
        self._name = "verifier" if verify else "signer"
        super().__init__(folder, inet=inet, name=self._name)
        self._program = require("opendkim")
        self._key, self._verify, self._canonicalization = key, verify, canonicalization
        self._options = options

    def start(self) -> OpenDkim:
        """Start it; after this it accepts connections."""
        shutil.chown(self.folder, "opendkim")  # it makes its socket as that user
        records = self.folder / "dkim-records"
        records.write_text(f"{self._key.name} {self._key.record}\n")
        configuration = self.folder / f"{self._name}.conf"
        place = self.place.replace("unix:", "local:")
        text = COMMON + (VERIFY if self._verify else SIGN)
        text = text.format(
            socket=place, canonicalization=self._canonicalization, domain=self._key.domain, selector=SELECTOR,
            private=self._key.private, records=records,
        )  # fmt: skip
        configuration.write_text(text + self._options)
        self.run([self._program, "-f", "-x", str(configuration)])
        return self
