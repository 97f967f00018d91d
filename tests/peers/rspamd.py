"""rspamd as a milter with rules of its own: no network, hardly a module, nothing shared with the system's; needs root.

Refuses GTUBE, marks what has `markme` in its subject as spam, answers 4xx where the subject has `tempfail`. With a
name server it marks what comes from an address listed in bl.test, too, and follows SPF:

    async with DnsServer({"5.0.0.127.bl.test": {"A": ["127.0.0.2"]}}) as names:
        with Rspamd(folder, name_server=names.address) as rspamd: ...
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.peers.process import Process, free_port, port_open
from tests.peers.require import require, require_root

GTUBE = b"XJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X"
"""Spam by agreement: a body with this line."""

# Unless a test has one, the name server is a port nobody listens on. A cache shared with the system's rspamd would be cleared by this one.
CONFIGURATION = """\
options {{
  pidfile = "{folder}/rspamd.pid";
  tempdir = "{folder}/db"; dbdir = "{folder}/db"; hs_cache_dir = "{folder}/db";
  url_tld = "{folder}/tld.dat";
  control_socket = "{folder}/control.sock";
  filters = "{filters}";
  gtube_patterns = "all"; history_file = ""; local_addrs = [];
  dns {{ nameserver = ["{name_server}"]; timeout = {dns_timeout}; retransmits = 1; enable_dnssec = false; }}
}}
logging {{ type = "file"; filename = "{folder}/rspamd.log"; level = "info"; }}
actions {{ reject = 15; add_header = 6; greylist = null; }}
modules {{ path = "/usr/share/rspamd/plugins/milter_headers.lua"; }}
{asks_names}
milter_headers {{ use = ["x-spamd-result", "x-rspamd-server", "x-spam-status"];
  skip_local = false; skip_authenticated = false; extended_spam_headers = true; }}
lua = "{folder}/rules.lua";
worker "rspamd_proxy" {{
  bind_socket = "127.0.0.1:{port}";
  bind_socket = "{folder}/rspamd.sock mode=0666";
  milter = yes; timeout = 5s; count = 1;
  upstream "local" {{ default = yes; self_scan = yes; }}
}}
"""
# Both plugins leave loopback addresses out unless told otherwise.
ASKS_NAMES = """\
modules { path = "/usr/share/rspamd/plugins/rbl.lua"; path = "/usr/share/rspamd/plugins/spf.lua"; }
rbl { rbls { listed { symbol = "LISTED"; rbl = "bl.test"; from = true; ipv4 = true; unknown = true;
  disable_monitoring = true; exclude_local = false; exclude_private_ips = false; } } }
spf { disable_ipv6 = true; check_local = true; }
group "names" { symbols { "LISTED" { weight = 7.0; } "R_SPF_ALLOW" { weight = 0.1; } "R_SPF_FAIL" { weight = 7.0; } } }
"""
RULES = """\
local function subject_has(word, action)
  return function(task)
    local subject = task:get_subject()
    if subject and subject:find(word) then return action(task) end
  end
end
rspamd_config:register_symbol{name = 'T_SUBJECT', score = 7.0,
  callback = subject_has('markme', function() return true end)}
rspamd_config:register_symbol{name = 'T_TEMPORARY', score = 0.1,
  callback = subject_has('tempfail', function(task) task:set_pre_result('soft reject', 'try later') end)}
"""


class Rspamd(Process):
    """It listens on `port` and on a Unix socket; `address` and `inet` are these as an MTA names them.

    `name_server` is an address and port on the loopback, which it asks about clients and senders.
    """

    def __init__(self, folder: Path, *, name_server: tuple[str, int] | None = None) -> None:
        require_root()
        super().__init__(folder)
        self._program = require("rspamd")
        self.port = free_port()
        self.inet = f"inet:127.0.0.1:{self.port}"
        self.address = f"unix:{folder}/rspamd.sock"
        self._name_server = name_server

    def start(self) -> Rspamd:
        """Start it; after this it accepts connections."""
        (self.folder / "db").mkdir(exist_ok=True)
        (self.folder / "tld.dat").write_text("test\ncom\norg\n")  # with the full list it takes nine seconds to start
        (self.folder / "rules.lua").write_text(RULES)
        configuration = self.folder / "rspamd.conf"
        configuration.write_text(self._configuration())
        for path in (self.folder, self.folder / "db"):
            shutil.chown(path, "_rspamd", "_rspamd")
        command = [self._program, "-f", "-u", "_rspamd", "-g", "_rspamd", "-c", str(configuration)]
        self.launch(command, port_open(self.port))
        return self

    def log(self) -> str:
        """All it logged; a line with `ip: ` and the client's address for each message."""
        path = self.folder / "rspamd.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def said(self) -> str:
        """The end of its log too."""
        return super().said() + self.log()[-3000:]

    def _configuration(self) -> str:
        address, port = self._name_server or ("127.0.0.1", 9)
        asks = self._name_server is not None
        return CONFIGURATION.format(
            folder=self.folder,
            port=self.port,
            name_server=f"{address}:{port}",
            dns_timeout="2s" if asks else "0.1s",
            filters="regexp,spf" if asks else "regexp",
            asks_names=ASKS_NAMES if asks else "",
        )
