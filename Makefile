# make run: try it. make test: everything CI runs. Both do all set-up themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TWO := -n 2 --dist loadfile
FOUR := -n 4 --dist loadfile
STAMP := $(VENV)/.installed
MILTER := $(VENV)/.milter
PEERS := postfix postfix-pcre dovecot-core swaks curl openssl nginx libnginx-mod-mail libauthen-sasl-perl \
         libnet-ssleay-perl libdigest-hmac-perl fail2ban haproxy redis-server redis-sentinel redis-tools groff-base \
         systemd iproute2 rspamd opendkim opendkim-tools miltertest dovecot-lmtpd dovecot-imapd dovecot-pop3d \
         fetchmail isync libmilter-dev python3-dev gcc libc6-dev

.PHONY: run test test-fast check peers bench soak docs lock clean

run: $(STAMP) var/tls/development.crt
	@$(PYTHON) scripts/welcome.py
	@exec $(BIN)/gateway run pipelines/submission.yaml

$(STAMP): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "make: $(PYTHON) cannot make a virtual environment; install python3-venv" >&2; exit 1; }
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: Python 3.11 or newer is needed; say make PYTHON=python3.12" >&2; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

var/tls/development.crt: $(STAMP) scripts/development_certificate.py
	@$(BIN)/python scripts/development_certificate.py var/tls && touch $@

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy gateway stages examples/auth_server.py examples/milter_filter.py
	$(BIN)/lint-imports

test-fast: check var/tls/development.crt
	$(BIN)/pytest $(TWO) -m "not slow" tests/unit tests/dialogue

# Many of the slow ones wait for time-outs and for other programs: four share two processors well.
test: peers check var/tls/development.crt
	$(BIN)/pytest $(FOUR) tests

peers: $(STAMP)
	@sh scripts/peers.sh $(PEERS)
	@$(MAKE) --no-print-directory $(MILTER)

# pymilter is compiled against libmilter, which only the tests of the stage of that name need.
$(MILTER): requirements-milter.lock $(STAMP)
	@test ! -e /usr/include/libmilter/mfapi.h && echo "make: no libmilter headers; the tests of pymilter are skipped" || \
	  { $(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-milter.lock && touch $@; }

bench: $(STAMP) peers
	$(BIN)/python -m bench

soak: $(STAMP) peers
	GATEWAY_SOAK=1 GATEWAY_REQUIRE_PEERS=1 $(BIN)/pytest -n 0 -rP tests/fault/test_service_load.py \
	  tests/fault/test_service_peers.py tests/fault/test_service_slow.py tests/interop/test_exactness.py
	$(BIN)/python -m bench --soak

docs: $(STAMP)
	$(BIN)/python scripts/reference.py
	$(BIN)/python -m scripts.metrics_reference

lock:
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m uv pip compile --quiet --universal --no-emit-index-url --extra dev --extra redis --extra otel --generate-hashes \
	  --custom-compile-command "make lock" -o requirements.lock pyproject.toml
	echo "pymilter>=1.0.5" | $(BIN)/python -m uv pip compile --quiet --universal --no-emit-index-url --generate-hashes \
	  --custom-compile-command "make lock" -o requirements-milter.lock -

clean:
	rm -rf $(VENV) var .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
