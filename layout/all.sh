# all.sh BASE : scripted part on worktree arch, three commits
bash layout/redo.sh $1; bash layout/fix.sh CHECKOUT
cd CHECKOUT; ruff check --fix -q . --no-cache >/dev/null; ruff format -q .; mypy 2>&1 | tail -3; git add -A; git commit -qm "renames"
