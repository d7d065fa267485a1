# make run      everything a user needs, then the server on http://127.0.0.1:10242
# make test     everything a developer needs, then the tests
# make clients  Node SDKs and agents of others against the server; npm installs them into a cache folder
# make check    format, lint, types, import contracts, docs
# make fix      format and what lint can mend by itself
# make build    the wheel

PYTHON ?= python3
UV ?= $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)
export UV_PYTHON_DOWNLOADS ?= never
export UV_PROJECT_ENVIRONMENT = .venv

.PHONY: run test clients check fix build clean

run: .venv/.stamp-run
	@exec .venv/bin/mlx-manager serve $(ARGS)

test: .venv/.stamp-dev
	.venv/bin/python -m pytest $(ARGS)

clients: .venv/.stamp-dev
	CLIENTS=1 .venv/bin/python -m pytest tests/clients $(ARGS)

check: .venv/.stamp-dev
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/lint-imports
	.venv/bin/pyright
	$(UV) lock --check
	.venv/bin/python -m pytest tests/docs

fix: .venv/.stamp-dev
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

build: .venv/.stamp-dev
	$(UV) build

clean:
	rm -rf .venv .tools dist

# A stamp says what the environment was made from; it goes with the environment.
.venv/.stamp-run: pyproject.toml uv.lock | $(UV)
	$(UV) sync --frozen --inexact --no-default-groups
	@touch $@

.venv/.stamp-dev: pyproject.toml uv.lock | $(UV)
	$(UV) sync --frozen
	@touch $@ .venv/.stamp-run

.tools/bin/uv:
	$(PYTHON) -m venv .tools
	.tools/bin/python -m pip install --quiet --disable-pip-version-check uv
