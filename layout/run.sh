set -e
W=$1
python3 layout/moves.py $W
cd $W
find . -name __pycache__ -prune -exec rm -rf {} + ; find robustmail -type d -empty -delete
sed -i 's/robustmail.cli:main/robustmail.cli.main:main/' pyproject.toml
ruff check . --fix -q --no-cache || true
ruff format . -q --no-cache
ruff check . --no-cache --output-format concise | head -60
