# make demo    builds .venv and runs the main job on real input
# make test    builds .venv and runs the tests, in some minutes
# make test-all  runs those that make test leaves out: more cases of the same subjects
# Everything that is installed lies in .venv*, and is kept for the next call.

PYTHON ?= python3
PIP_FLAGS = --quiet --disable-pip-version-check
PYTEST_FLAGS ?=

# Three at a time, on two cores: a job waits for something most of the time.
SUITE = tests/unit tests/integration tests/faults tests/simulation
QUICK = not faults_full and not hosts and not benchmarks and not slow
REST = slow and not faults_full and not hosts and not benchmarks

ifeq ($(PYTEST_FLAGS),)
tests = $1/bin/python -m pytest -n 3 --dist worksteal --durations=15 -m '$2' $3 $(or $4,$(SUITE))
else
tests = $1/bin/python -m pytest $(PYTEST_FLAGS)
endif

.PHONY: demo docs test test-all simulate simulate-nodes simulate-losses simulate-buckets test-buckets test-power-cuts test-faults test-benchmarks test-hosts test-systemd test-slurm test-storage bench-storage bench-hosts market test-look test-latest test-latest-all test-frameworks test-wheel test-kubernetes plugins screens reference chaos chaos-hosts lint types layers bench dist test-dist clean

demo: .venv/.ready
	.venv/bin/python scripts/demo.py

test: .venv/.ready
	$(call tests,.venv,$(QUICK))

test-all: .venv/.ready
	$(call tests,.venv,$(REST))

# Whole jobs under a virtual clock, each drawn from a seed; prints the rate.
SEEDS ?= 1 10000

simulate: .venv-latest/.ready
	.venv-latest/bin/python -m tests.simulation $(SEEDS)

# A real head with so many members in virtual time: losses, notices, joins; CPU per member-second.
MEMBERS ?= 10000

simulate-nodes: .venv-latest/.ready
	.venv-latest/bin/python -m tests.simulation.many_nodes $(MEMBERS)

# Nodes are lost, one or two at once, a thousand times: what was sealed in their memory is loaded.
LOSS_SEEDS ?= 1 900

simulate-losses: .venv-latest/.ready
	.venv-latest/bin/python -m tests.simulation.losses $(LOSS_SEEDS)

# Claims, uploads and listings on a store that refuses, loses answers, is late; owners vanish.
BUCKET_SEEDS ?= 1 1000

simulate-buckets: .venv-latest/.ready
	.venv-latest/bin/python -m tests.simulation.bucket $(BUCKET_SEEDS)

# Every system call of a save, and every state that a power cut can leave.
test-faults: .venv/.ready
	.venv/bin/python -m pytest -m faults_full tests/faults $(PYTEST_FLAGS)

# The benchmarks themselves, run small: their shape, not their figures. BENCHMARKS=benchmarks adds
# those that start several jobs.
BENCHMARKS = benchmarks and not slow

test-benchmarks: .venv/.ready .venv-latest/.storage
	.venv/bin/python -m pytest -n 2 -m '$(BENCHMARKS)' tests/integration
	.venv-latest/bin/python -m pytest tests/integration/test_benchmarks.py -k bucket

# Several nodes as processes of this host; then hosts of network namespaces, which join, leave and
# are cut off: prints how long each takes. Needs root. HOSTS=hosts adds the slow ones.
HOSTS = hosts and not slow

test-hosts: .venv-latest/.ready
	.venv-latest/bin/python -m pytest -n 3 --durations=15 -m '$(HOSTS)' tests/integration
	.venv-latest/bin/python -m pytest -s --durations=15 \
		$(if $(findstring not slow,$(HOSTS)),-m 'not slow') tests/system/test_hosts.py \
		tests/system/test_several_hosts.py tests/system/test_chaos_on_hosts.py \
		tests/system/test_the_head.py tests/system/test_memory_of_nodes.py

# The unit under a systemd of its own, in namespaces; prints how long things take. Needs root.
test-systemd: .venv-latest/.ready
	.venv-latest/bin/python -m pytest -s tests/system/test_systemd.py

# A small job under N disturbances drawn by SEED, in rounds of 50; bits and samples must be an
# undisturbed one's. A call that was ended goes on where it was. Its disk and memory fill up or go
# away, its lock, name and output are lost, its user goes back: those on mounts need root.
N ?= 100
SEED ?= $(shell date +%s)

chaos: .venv/.ready
	.venv/bin/python scripts/chaos.py $(N) $(SEED)

# The same with a job on hosts of network namespaces, in rounds of 25: they vanish, singly or two at
# once, their links lose, reorder, and delay, or carry one way only, their clocks step. Needs root.
chaos-hosts: .venv-latest/.ready
	.venv-latest/bin/python scripts/chaos.py --hosts $(N) $(SEED)

# Jobs on a SLURM of its own, with two nodes; prints how long things take. Needs root, SLURM, munge.
test-slurm: .venv-latest/.ready
	.venv-latest/bin/python -m pytest -s tests/system/test_slurm.py tests/system/test_slurm_scripts.py

# Jobs in a bucket of a real server of S3, behind a proxy that fails on purpose; a server that
# ignores conditions is refused.
BUCKETS = not slow

test-buckets: .venv-latest/.storage
	.venv-latest/bin/python -m pytest -s --durations=6 -m '$(BUCKETS)' \
		tests/system/test_buckets.py tests/system/test_empty_machines.py

# That, jobs on real file systems, and many power cuts and schedules, which takes over an hour as
# root; what cannot be mounted is skipped with the reason. On Debian, for all of them: apt install
# xfsprogs btrfs-progs bindfs sshfs openssh-sftp-server s3fs glusterfs-server user-mode-linux
# dmsetup busybox nfs-kernel-server rpcbind iproute2 gcc libc6-dev
OWN_MOUNTS = $(if $(filter 0,$(shell id -u)),unshare --mount --propagation private)

test-storage:
	$(MAKE) test-buckets BUCKETS="slow or not slow"
	$(OWN_MOUNTS) .venv-latest/bin/python -m pytest -s --durations=6 tests/system/test_filesystems.py
	$(OWN_MOUNTS) .venv-latest/bin/python -m pytest -s --durations=6 \
		tests/system/test_filesystem_faults.py
	$(MAKE) test-power-cuts STATES=300
	$(MAKE) simulate-buckets BUCKET_SEEDS="1 10000"

# Saves on ext4, xfs and btrfs in a guest whose kernel records every write; disks that a power cut
# can leave, STATES of each, are mounted here. Needs root and user-mode Linux; else it is skipped.
STATES ?= 20

test-power-cuts: .venv-latest/.ready
	POWER_CUT_STATES=$(STATES) .venv-latest/bin/python -m pytest -s -rs tests/system/test_power_cuts.py

# A push and a pull beside obstore alone; beside other libraries; what a mirror takes from training.
bench-storage: .venv-latest/.storage bench-results/peers/.ready
	.venv-latest/bin/python benchmarks/bucket.py
	.venv-latest/bin/python benchmarks/bucket_nodes.py
	.venv-latest/bin/python benchmarks/bucket_load.py
	PYTHONPATH=bench-results/peers .venv-latest/bin/python benchmarks/bucket_peers.py
	.venv-latest/bin/python benchmarks/mirror_cost.py

# What nodes cost their head, ranks their store and their leader, for docs/scale.md; some minutes.
bench-hosts: .venv-latest/.ready
	.venv-latest/bin/python benchmarks/hub.py
	.venv-latest/bin/python benchmarks/agreement_latency.py
	.venv-latest/bin/python benchmarks/save_scale.py
	.venv-latest/bin/python benchmarks/exchanges.py
	.venv-latest/bin/python benchmarks/nodes.py
	.venv-latest/bin/python benchmarks/nodes_peers.py
	.venv-latest/bin/python benchmarks/replica_cost.py

# A recorded spot market, on hosts of this machine: docs/market.md and its picture.
market: .venv-peers/.ready
	mkdir -p bench-results
	.venv-peers/bin/python benchmarks/market/run.py --json bench-results/market.json
	.venv-peers/bin/python benchmarks/market/page.py bench-results/market.json docs/market.md

bench-results/peers/.ready: .venv-latest/.ready requirements/storage-peers.txt
	.venv-latest/bin/python -m pip install $(PIP_FLAGS) --target bench-results/peers --upgrade \
		-r requirements/storage-peers.txt
	.venv-latest/bin/python -m pip install $(PIP_FLAGS) --target bench-results/peers --upgrade \
		--no-deps s3torchconnector s3torchconnectorclient # whose torch would be another one
	@touch $@

# What people look at, with the real thing: a Prometheus, a browser, a job that has a bad night, the
# tutorials as a reader types them.
test-look: .venv-latest/.ready
	.venv-latest/bin/python -m pytest tests/system/test_prometheus.py tests/system/test_report.py tests/system/test_live_page.py \
		tests/system/test_night.py tests/system/test_tutorials.py \
		tests/system/test_hanging_directory.py

# The newest torch, beside ColossalAI whose pins forbid it: what depends on torch, with fewer
# disturbances. test-latest-all adds the cases that test-all adds to make test; not in CI.
LATEST = $(QUICK) and not one_torch
LATEST_REST = $(REST) and not one_torch
ONE_TORCH = $(foreach part,checkpoint cli jobdir journal notices policy protocol util \
	supervisor/metrics supervisor/saves supervisor/watch,--ignore=tests/unit/$(part))
WITH_TORCH = $(filter-out tests/simulation,$(SUITE))

test-latest: .venv-latest/.ready
	export ELASTIC_CKPT_TEST_DISTURBANCES=14 && $(call tests,.venv-latest,$(LATEST),$(ONE_TORCH),$(WITH_TORCH))

test-latest-all: .venv-latest/.ready
	export ELASTIC_CKPT_TEST_DISTURBANCES=14 && \
		$(call tests,.venv-latest,$(LATEST_REST),$(ONE_TORCH),$(WITH_TORCH))

# elastic_ckpt.integrations with the real frameworks, on torch 2.13.0; some minutes. With
# FRAMEWORKS=frameworks each also at its other numbers of processes.
FRAMEWORKS ?= frameworks and not slow

test-frameworks: .venv-frameworks/.ready
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 \
		.venv-frameworks/bin/python -m pytest -n 3 --dist worksteal --durations=15 \
		-m '$(FRAMEWORKS)' tests/integrations $(PYTEST_FLAGS)

# The manifests by the schemas of Kubernetes, the command of the Job with the rights of its pod, and
# several nodes whose names come and go as those of pods. Needs root for all but the first.
test-kubernetes: .venv-latest/.kubernetes
	.venv-latest/bin/python -m pytest -rs tests/unit/test_kubernetes.py tests/system/test_pod_names.py

# Every plugin of ColossalAI's on both torch versions, into docs/colossalai.md; ten minutes.
plugins: .venv/.ready .venv-latest/.ready
	mkdir -p bench-results
	.venv/bin/python scripts/plugins.py try bench-results/plugins.json
	.venv-latest/bin/python scripts/plugins.py try bench-results/plugins-latest.json
	.venv-latest/bin/python scripts/plugins.py write docs/colossalai.md \
		bench-results/plugins.json bench-results/plugins-latest.json

# The pictures in the docs, from a job that is disturbed twelve times; some minutes, needs Chromium.
screens: .venv-latest/.ready
	.venv-latest/bin/python -m scripts.screens docs
	.venv-latest/bin/python -m scripts.moving_picture docs/killed.svg

# What is made from the code: the reference, and the schema of status --json.
reference: .venv-latest/.ready
	.venv-latest/bin/python scripts/schemas.py docs/schemas/status.json
	.venv-latest/bin/python scripts/schemas.py docs/schemas/report.json
	.venv-latest/bin/python scripts/reference.py

# The wheel in an environment that has torch and no ColossalAI.
test-wheel: .venv-wheel/.ready
	.venv-wheel/bin/python scripts/check_wheel.py

# What is released: wheel, sdist, Debian package, bill of materials, checksums; the image where a
# builder works. Twice from one commit gives the same wheel, sdist and package.
dist: .venv-dist/.ready
	.venv-dist/bin/python -m scripts.release

# The Debian package on a machine of its own, with a job as its service. Needs root and systemd.
test-dist: dist .venv-latest/.ready
	.venv-latest/bin/python -m pytest -s -rs tests/system/test_packages.py

lint: .venv/.ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/.ready
	.venv/bin/mypy

layers: .venv/.ready
	.venv/bin/lint-imports

# Figures for docs/performance.md, then those of the store; about half an hour.
SPEED = save_stall durable load drain_cost emergency recovery idle

bench: .venv-peers/.ready
	mkdir -p bench-results
	@for name in $(SPEED); do \
		timeout 1800 .venv-peers/bin/python benchmarks/$$name.py \
			--json bench-results/$$name.json || exit 1; \
	done
	.venv-peers/bin/python benchmarks/report.py bench-results docs/performance.md
	.venv-peers/bin/python benchmarks/step_overhead.py
	.venv-peers/bin/python benchmarks/sampler.py
	.venv-peers/bin/python benchmarks/store_speed.py
	.venv-peers/bin/python benchmarks/store_scale.py
	.venv-peers/bin/python benchmarks/metadata.py
	.venv-peers/bin/python benchmarks/corruption.py

clean:
	rm -rf demo-run dist build bench-results

.venv/.ready: pyproject.toml
	@echo "installing into .venv: torch 2.5.1 and ColossalAI 0.5.0, some minutes and 6 GB"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install $(PIP_FLAGS) -e '.[colossalai,test]'
	@touch $@

.venv-latest/.ready: pyproject.toml requirements/latest-torch.txt requirements/latest.txt
	@echo "installing into .venv-latest: torch 2.13.0 and ColossalAI 0.5.0"
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python -m pip install $(PIP_FLAGS) -r requirements/latest-torch.txt
	.venv-latest/bin/python -m pip install $(PIP_FLAGS) -r requirements/latest.txt
	.venv-latest/bin/python -m pip install $(PIP_FLAGS) --no-deps colossalai==0.5.0
	.venv-latest/bin/python -m pip install $(PIP_FLAGS) -e '.[test]'
	@touch $@

.venv-latest/.storage: .venv-latest/.ready requirements/storage.txt
	.venv-latest/bin/python -m pip install $(PIP_FLAGS) -r requirements/storage.txt
	@touch $@

.venv-latest/.kubernetes: .venv-latest/.ready requirements/kubernetes.txt
	.venv-latest/bin/python -m pip install $(PIP_FLAGS) -r requirements/kubernetes.txt
	@touch $@

.venv-frameworks/.ready: pyproject.toml requirements/latest-torch.txt requirements/frameworks.txt
	@echo "installing into .venv-frameworks: torch 2.13.0, transformers, accelerate, Lightning, TRL"
	$(PYTHON) -m venv .venv-frameworks
	.venv-frameworks/bin/python -m pip install $(PIP_FLAGS) -r requirements/latest-torch.txt
	.venv-frameworks/bin/python -m pip install $(PIP_FLAGS) -r requirements/frameworks.txt
	.venv-frameworks/bin/python -m pip install $(PIP_FLAGS) -e '.[test]'
	@touch $@

.venv-peers/.ready: pyproject.toml requirements/latest-torch.txt requirements/latest.txt requirements/peers.txt
	@echo "installing into .venv-peers: torch 2.13.0, ColossalAI 0.5.0, DLRover and NVRx"
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install $(PIP_FLAGS) -r requirements/latest-torch.txt
	.venv-peers/bin/python -m pip install $(PIP_FLAGS) -r requirements/latest.txt
	.venv-peers/bin/python -m pip install $(PIP_FLAGS) --no-deps colossalai==0.5.0
	.venv-peers/bin/python -m pip install $(PIP_FLAGS) -r requirements/peers.txt
	.venv-peers/bin/python -m pip install $(PIP_FLAGS) -e .
	@touch $@

# The documentation as a site with search, in build/site; a link that leads nowhere is an error.
docs: .venv-docs/.ready
	.venv-docs/bin/python scripts/docs_site.py build/docs
	.venv-docs/bin/zensical build --clean --strict

.venv-docs/.ready: requirements/docs.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install $(PIP_FLAGS) -r requirements/docs.txt
	@touch $@

.venv-dist/.ready: requirements/dist.txt
	@echo "installing into .venv-dist: build, setuptools, twine"
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install $(PIP_FLAGS) -r requirements/dist.txt
	@touch $@

.venv-wheel/.ready: pyproject.toml requirements/latest-torch.txt $(shell git ls-files elastic_ckpt 2>/dev/null)
	@echo "building the wheel and installing it into .venv-wheel"
	rm -rf .venv-wheel dist
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip wheel $(PIP_FLAGS) --no-deps --wheel-dir dist .
	.venv-wheel/bin/python -m pip install $(PIP_FLAGS) -r requirements/latest-torch.txt
	.venv-wheel/bin/python -m pip install $(PIP_FLAGS) dist/*.whl
	@touch $@
