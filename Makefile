# Two commands for a newcomer: `make demo` and `make test`. Both install what they need on a fresh Debian 12
# with Rust and Python; what is already there is used.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

DEV    = $(shell tests/setup/dev-env)
SITE   = target/site
BINARY = target/release/rayless

.PHONY: help demo test test-long lint test-rust test-python test-failure test-vllm test-docker test-wheel site wheel bench deny fmt clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

demo: site ## two nodes on this machine, a small real vLLM model in two stages, one question
	@tests/setup/vllm-env >/dev/null
	@PYTHONPATH=$(CURDIR)/$(SITE) PATH=$(CURDIR)/$(SITE)/bin:$$PATH $$(tests/setup/vllm-env) examples/demo/demo.py

test: ## every check that fits in half an hour on two cores
	@tests/run quick

test-long: ## what takes longer
	@tests/run long

lint: ## formatting, clippy, ruff, mypy
	@tests/run lint
test-rust: ## the Rust tests
	@tests/run rust
test-python: ## the Python package on real daemons
	@tests/run python
test-failure: ## what happens when processes die and wires are cut
	@tests/run failure
test-vllm: ## real vLLM across two network namespaces
	@tests/run vllm
test-docker: ## two containers on a Docker network
	@tests/run docker
test-wheel: ## the wheel in a root with an older glibc
	@tests/run wheel

site: ## the wheel of this tree, installed into target/site
	@tests/setup/site

wheel: ## the wheel to give away (manylinux_2_28), into dist/
	@tests/setup/wheel

bench: ## the figures in README.md, each beside its rival in the same sitting
	@benches/run

deny: ## licences, bans and sources of all dependencies
	@command -v cargo-deny >/dev/null || cargo install --locked cargo-deny@0.19.0
	cargo deny --offline check licenses bans sources

fmt: ## format everything
	cargo fmt --all
	$(DEV)/bin/ruff format python tests benches examples
	$(DEV)/bin/ruff check --fix python tests benches examples

clean: ## remove what was built here (the shared environments stay)
	cargo clean
	rm -rf dist data
