cd MAIN; git -C CHECKOUT reset -q --hard ${1:-main} && git -C CHECKOUT clean -fdq
bash layout/run.sh CHECKOUT >/dev/null; cd CHECKOUT; git add -A; git commit -qm "moves"
python3 layout/renames.py . ; ruff check . --fix -q --no-cache >/dev/null; ruff format -q . ; ruff check . --no-cache --output-format concise | tail -20;  mypy --no-incremental 2>&1 | cut -c1-200 | tail -40
