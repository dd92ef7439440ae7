# `make test` does everything, set-up included; `make help` lists the parts.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

# rustup puts cargo where a non-login shell does not look.
export PATH := $(HOME)/.cargo/bin:$(PATH)
TARGET := $(abspath $(or $(CARGO_TARGET_DIR),target))
export FIRTH_BIN ?= $(TARGET)/release/firth

SDK_DIR := tests/sdk
NODE_MODULES := $(SDK_DIR)/node_modules/.installed
VENV := target/venv/.installed
# The Go SDK is tested where there is a Go toolchain.
GO_DRIVER := $(if $(shell command -v go),target/go/recorder)
KAFKA_JARS := target/kafka/.installed
DENY_VERSION := 0.20.2
DENY := $(or $(shell command -v cargo-deny),target/tools/bin/cargo-deny)

# One profile for everything: the bundled librdkafka takes minutes to build, and each profile builds its own.
CARGO_FLAGS := --release --locked

# Test files, by the target that runs them; `make sdk SDK_TESTS=failover` runs one.
SDK_TESTS ?= vectors sdk order bad-input failover restart crash wiped damage disk-full cli presence channels connections tokens rest verdict faults
KAFKA_TESTS ?= kafka-in kafka-out
PAGE_TESTS ?= page

# How long `make soak` publishes, and `make faults` torments (1 where nothing is said).
soak: MINUTES ?= 60

# `make seeds SEEDS=100000` runs more of what `make unit` runs 2,000 of; FROM is the first one.
SEEDS ?= 100000
FROM ?= 0

# How long `make fuzz` runs each of what `make unit` runs for a second.
SECONDS ?= 60

.PHONY: help test setup tools build lint fmt clippy doc deny unit seeds fuzz bench sdk faults kafka page soak catchup kafka-jars fix audit clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

test: setup lint unit sdk kafka page ## everything: set-up, lints, unit tests, SDKs, Kafka, the page in a browser
	@echo "== all tests passed"

setup: tools $(NODE_MODULES) $(VENV) $(GO_DRIVER) $(KAFKA_JARS) $(DENY) ## install what the tests need, into target/ and node_modules/

tools: ## check for system tools; install missing Debian packages when root
	@command -v cargo >/dev/null || { echo "Rust is missing; see https://rustup.rs (the version is in rust-toolchain.toml)" >&2; exit 1; }
	@node -e 'process.exit(process.versions.node.split(".")[0] >= 20 ? 0 : 1)' 2>/dev/null && command -v npm >/dev/null || \
		{ echo "Node.js 20 or newer with npm is missing; see https://nodejs.org" >&2; exit 1; }
	@tests/need 'A C compiler with make' 'command -v gcc && command -v g++ && command -v make' build-essential
	@tests/need 'Java 17 or newer' 'java --version 2>/dev/null | grep -qE "^(openjdk|java) (1[7-9]|[2-9][0-9])"' default-jre-headless
	@tests/need 'Maven' 'command -v mvn' maven
	@tests/need 'Python 3 with venv' 'python3 -c "import venv, ensurepip"' python3 python3-venv
	@tests/need 'Chromium' 'command -v chromium || command -v chromium-browser || command -v google-chrome' chromium

# Tests bring features of their own to some dependencies: a binary built apart from them would be a second build of everything.
build: ## the release binary, as the tests build it, and the tests
	@echo "== build"
	cargo test $(CARGO_FLAGS) --no-run

lint: fmt clippy doc deny ## formatting, clippy, documentation, licences and sources; warnings are errors

fmt:
	@echo "== format"
	cargo fmt --check

clippy:
	@echo "== clippy"
	cargo clippy $(CARGO_FLAGS) --all-targets -- -D warnings

doc:
	@echo "== documentation"
	RUSTDOCFLAGS='-D warnings' cargo doc $(CARGO_FLAGS) --no-deps --document-private-items

deny: $(DENY)
	@echo "== licences, bans, sources"
	@! grep -n '"resolved"' $(SDK_DIR)/package-lock.json || { echo "package-lock.json names a registry" >&2; exit 1; }
	$(DENY) --log-level error check licenses bans sources

unit: build ## Rust's own tests
	@echo "== unit tests"
	cargo test $(CARGO_FLAGS)

seeds: ## the log on a faulty disk, SEEDS=100000 times
	FIRTH_SEEDS=$(SEEDS) FIRTH_SEEDS_FROM=$(FROM) cargo test $(CARGO_FLAGS) --lib storage::tests::seeds -- --nocapture

fuzz: ## decoders and conversations under damaged input, each for SECONDS=60
	FIRTH_FUZZ_SECONDS=$(SECONDS) cargo test $(CARGO_FLAGS) --test fuzz -- --nocapture

bench: ## the log beside the raw limit of this disk
	cargo bench --locked --bench log

sdk: build $(NODE_MODULES) $(VENV) $(GO_DRIVER) ## official SDKs and the command line against three processes
	@echo "== SDKs against a cluster: $(SDK_TESTS)"
	cd $(SDK_DIR) && $(call run_node,$(SDK_TESTS))

faults: build $(NODE_MODULES) $(VENV) $(GO_DRIVER) ## random kills, pauses and cuts under every SDK: MINUTES=10 SDK=js2,python SEED=1; a failed run's history in target/faults
	@echo "== faults"
	cd $(SDK_DIR) && MINUTES=$(MINUTES) SDK=$(SDK) CLIENTS=$(CLIENTS) SEED=$(SEED) $(call run_node,faults)

kafka: build $(NODE_MODULES) $(KAFKA_JARS) ## a real Kafka beside the cluster
	@echo "== a real Kafka: $(KAFKA_TESTS)"
	cd $(SDK_DIR) && $(call run_node,$(KAFKA_TESTS))

page: build $(NODE_MODULES) ## the chat page in headless Chromium; screenshots in target/screenshots
	@echo "== the page in Chromium"
	cd $(SDK_DIR) && $(call run_node,$(PAGE_TESTS))

soak: build $(NODE_MODULES) ## an hour of publishing with retention: memory and disk must stay flat; MINUTES=60, results in target/soak
	@echo "== $(MINUTES) minutes of publishing"
	MINUTES=$(MINUTES) node tests/soak/retention.mjs

catchup: build $(NODE_MODULES) ## how fast an emptied node gets GB=2 back, beside plain sequential writes to the same disk
	node tests/soak/catchup.mjs

# Each file has a cluster of its own; two at once would measure each other on a small machine.
run_node = node --test --test-concurrency=1 --test-reporter=spec $(addsuffix .test.mjs,$(1))

kafka-jars: $(KAFKA_JARS) ## only Kafka's jars

$(KAFKA_JARS): tests/kafka/pom.xml | tools
	@echo "== Kafka from Maven Central"
	rm -rf target/kafka
	mvn -q -B -f $< dependency:copy-dependencies -Djars=$(abspath target/kafka)
	@touch $@

$(NODE_MODULES): $(SDK_DIR)/package-lock.json $(SDK_DIR)/package.json | tools
	@echo "== SDK from npm"
	cd $(SDK_DIR) && npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $@

$(VENV): $(SDK_DIR)/requirements.txt | tools
	@echo "== SDK from PyPI"
	python3 -m venv --clear target/venv
	target/venv/bin/pip install -q --disable-pip-version-check -r $<
	@touch $@

target/go/recorder: $(wildcard $(SDK_DIR)/go/*)
	@echo "== SDK from the Go proxy"
	cd $(SDK_DIR)/go && go build -o $(abspath $@) .

target/tools/bin/cargo-deny:
	@echo "== cargo-deny $(DENY_VERSION): built once, two to three minutes"
	CARGO_TARGET_DIR=$(abspath target/tools/build) CARGO_PROFILE_DEV_DEBUG=0 cargo install cargo-deny --version $(DENY_VERSION) --locked --debug --quiet --root target/tools
	@rm -rf target/tools/build

fix: ## format and apply clippy's suggestions
	cargo clippy $(CARGO_FLAGS) --all-targets --fix --allow-dirty --allow-staged
	cargo fmt

audit: $(DENY) ## known vulnerabilities (fetches the RustSec database)
	$(DENY) check advisories

clean: ## remove everything that was built or brought
	cargo clean
	rm -rf target $(SDK_DIR)/node_modules
