# What can be done here besides tests; see CONTRIBUTING.md.

.PHONY: report oracles meshes sanitizers

report: ## lines per family, fields by number of users, lines that stand twice
	python scripts/report.py

EARLIEST = $(shell sed -n 's/^EARLIEST = "\(.*\)".*/\1/p' tests/models/case.py)

oracles: ## what is compared with Transformers, on the earliest version that is supported; the other tests have the latest
	folder=$$(mktemp -d) && trap "rm -rf $$folder" EXIT && \
	python -m pip install -qq --no-deps --target "$$folder" transformers==$(EARLIEST) "huggingface-hub<2" && \
	PYTHONPATH="$$folder:$(CURDIR)" python -m pytest -n 2 -m "not gpu" \
		tests/models tests/layers tests/engine/test_oracle.py tests/engine/test_model_impl.py \
		tests/engine/test_coordinates.py

meshes: ## every mesh of up to four processes, on a dense, an MoE and an MLA network; the slow tests have some of them
	EVERY_MESH=1 python -m pytest tests/engine/test_every_mesh.py

SANITIZE = -fsanitize=address,undefined -fno-sanitize=alignment
# Frames that outlive their functions, which GCC looks for from 13 on, are not aligned for its own vectors of 64 bytes.
STOP = ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=halt_on_error=1
KERNEL_TESTS ?= tests/kernels tests/attention

sanitizers: ## the C++ kernels' tests, of what git has staged, with a library that stops at wrong addresses and overflows
	folder=$$(mktemp -d) && trap "rm -rf $$folder" EXIT && git checkout-index -a --prefix="$$folder/" && cd "$$folder" && \
	CFLAGS="$(SANITIZE) -fno-omit-frame-pointer -w" LDFLAGS="$(SANITIZE)" python setup.py -q build_ext --inplace && \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" PYTHONPATH="$$folder" \
	$(STOP) python -m pytest -q -p no:cacheprovider $(KERNEL_TESTS)
