# Bare `make` lists the verbs. Everything that they need is installed into .venv, from hashed requirement files.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
PATRONI := .venv/patroni
LOCKS := requirements/bootstrap.txt requirements/dev.txt
PACKAGES := packages/gatelodge packages/gatelodge-server examples/plans_api

.PHONY: help setup serve test check bench experiments lock

help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv with the `gatelodge` command in it

$(STAMP): $(LOCKS) $(PACKAGES:=/pyproject.toml)
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; name it with PYTHON=" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
	@$(BIN)/uv pip install --quiet --require-hashes -r requirements/dev.txt
	@$(BIN)/uv pip install --quiet --no-build-isolation --no-deps $(PACKAGES:%=-e %)
	@touch $@

serve: $(STAMP)  ## run the service over HTTPS, with everything that it needs made on the first start
	@$(BIN)/gatelodge serve $(ARGS)

# Programs that are no Python packages: PROGRAM, or PROGRAM=PACKAGE where Debian's package has another name.
# Some packages would start a service of their own: policy-rc.d says no to that meanwhile.
define need
	@missing=; PATH="$$PATH:/usr/sbin"; for item in $(1); do \
		command -v "$${item%%=*}" >/dev/null || missing="$$missing $${item#*=}"; done; \
	if [ -z "$$missing" ]; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing Debian packages:$$missing"; \
		policy=/usr/sbin/policy-rc.d; \
		if ! [ -e $$policy ]; then \
			trap 'rm -f $$policy' EXIT INT TERM; printf '#!/bin/sh\nexit 101\n' >$$policy; chmod 755 $$policy; fi; \
		(apt-get install -y -qq $$missing || (apt-get update -qq && apt-get install -y -qq $$missing)) >/dev/null; \
	else echo "needed and not here:$$missing (Debian packages of these names; root would install them)" >&2; exit 1; fi
endef

test: $(STAMP)  ## run every test, against real processes and sockets
	$(call need,curl faketime haproxy nginx sqlite3 strace systemd-analyze=systemd)
	@$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal $(ARGS)

check: $(STAMP)  ## lint, types, import contracts: under a minute
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet --output-format concise .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

bench: $(STAMP)  ## measure, and print figures and ratios side by side
	$(call need,wrk)
	@$(BIN)/python -m bench $(ARGS)

# For Debian's Python, which may be run by whoever Patroni runs as. Debian 12's own Patroni loses writes (docs/deployment.md).
$(PATRONI)/.installed: requirements/patroni.txt $(STAMP)
	$(call need,/usr/bin/python3=python3)
	@$(BIN)/uv pip install --quiet --require-hashes --python /usr/bin/python3 --target $(PATRONI) -r requirements/patroni.txt
	@touch $@

experiments: $(STAMP) $(PATRONI)/.installed  ## prove the promises: crashes, races, broken disks; each with its negative control
	$(call need,strace haproxy faketime etcd=etcd-server /usr/lib/postgresql/15/bin/postgres=postgresql-15)
	@$(BIN)/python -m experiments $(ARGS)

lock:  ## bring the hashed requirement files up to date
	@for name in bootstrap server dev patroni; do $(BIN)/uv pip compile --quiet --upgrade --generate-hashes --no-header --no-annotate \
		--universal --python-version 3.11 requirements/$$name.in -o requirements/$$name.txt; done
