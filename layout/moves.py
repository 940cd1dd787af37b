import sys, pathlib, subprocess
sys.path.insert(0, "layout")
from tool import *
root = pathlib.Path(sys.argv[1]).resolve()
R = "robustmail/"
MOD = {
 "perturb.py": "perturbations.py", "scores.py": "functional.py", "values.py": "fields.py", "weights.py": "weighters.py",
 "attacks/noise.py": "attacks/per_image_noise.py",
 "checkpoints/container.py": "checkpoints/file_formats.py", "checkpoints/doctor.py": "checkpoints/inspection.py", "checkpoints/pickles.py": "checkpoints/pickle_scan.py",
 "checkpoints/architecture.py": "checkpoints/infer/candidates.py", "checkpoints/chain.py": "checkpoints/infer/sequential.py", "checkpoints/known.py": "checkpoints/infer/registered.py",
 "checkpoints/layers.py": "checkpoints/infer/layers.py", "checkpoints/residual.py": "checkpoints/infer/residual.py", "checkpoints/timm_index.py": "checkpoints/infer/timm_index.py", "checkpoints/timm_index.json": "checkpoints/infer/timm_index.json",
 "cli.py": "cli/main.py", "cli_evaluate.py": "cli/evaluate.py", "cli_lab.py": "cli/margins.py", "cli_trials.py": "cli/trials.py",
 "catalogue.py": "config/catalog.py", "overrides.py": "config/overrides.py", "plugins.py": "config/loader.py",
 "data/images.py": "data/dataset.py",
 "evaluation/believable.py": "evaluation/sanity_checks.py", "evaluation/conventions.py": "evaluation/normalization.py", "evaluation/exact.py": "evaluation/exact_inference.py",
 "evaluation/folder.py": "evaluation/runner.py", "evaluation/plans.py": "evaluation/attack_specs.py", "evaluation/subject.py": "evaluation/model_loading.py",
 "evaluation/suite.py": "evaluation/evaluator.py", "report/results.py": "evaluation/results.py",
 "lab/__init__.py": "margin_lab/__init__.py", "lab/figures.py": "margin_lab/paper_figures.py", "lab/laboratory.py": "margin_lab/measure.py", "lab/paths.py": "margin_lab/attack_paths.py",
 "lab/records.py": "margin_lab/results.py", "lab/statistics.py": "margin_lab/statistics.py", "lab/values.py": "margin_lab/margin_values.py",
 "models/recorded.py": "models/cuda_graphs.py", "models/registry.py": "models/timm_interface.py", "models/twin.py": "models/folded.py", "precision.py": "models/precision.py",
 "dashboard.py": "report/dashboard.py", "report/grids.py": "report/tables.py", "report/ink.py": "report/style.py", "report/lab.py": "report/margin_tables.py",
 "report/lab_pictures.py": "report/margin_figures.py", "report/lines.py": "report/log_lines.py", "report/markup.py": "report/html.py", "report/pictures.py": "report/example_images.py",
 "report/plots.py": "report/svg.py", "report/trials.py": "report/trial_tables.py",
 "devices.py": "runtime/devices.py", "distributed.py": "runtime/distributed.py", "files.py": "runtime/files.py", "later.py": "runtime/deferred.py",
 "provenance.py": "runtime/provenance.py", "randomness.py": "runtime/rng.py",
 "rehearsal.py": "train/dry_run.py", "train/gauges.py": "train/metrics.py",
}
EXTRA = {}
NEWPK = {"runtime/__init__.py": '"""Where a run executes: devices, processes, random numbers, files, signals."""\n',
         "config/__init__.py": '"""From a name or a text to a value: the catalog of plugins, the loader, overrides."""\n',
         "cli/__init__.py": '"""The command line: one module for each group of verbs."""\n',
         "checkpoints/infer/__init__.py": '"""Which network has these tensors: candidates read off names and shapes."""\n'}
# (from, to, names), paths after the moves
SYM = [
 ("attacks/view.py", "norms.py", "Norm NORMS MOST SLACK norm_of distances reach slack check_budget check_counts"),
 ("records.py", "text.py", "so_many"),
 ("train/dry_run.py", "plugin_calls.py", "ask broken T"),
 ("report/log_lines.py", "text.py", "percent duration fraction printable"),
 ("fields.py", "plugin_calls.py", "label where raised_at is_foreign _maker OURS"),
 ("cli/evaluate.py", "cli/options.py", "File Folder Folders Plain Weights opened _weights_of _facts_of name_of once attack_of _number positive _norm _shard"),
 ("evaluation/runner.py", "data/dataset.py", "fingerprint_of"),
 ("evaluation/ledger.py", "data/dataset.py", "digest"),
 ("evaluation/runner.py", "evaluation/storage.py", "Held sealed read_folder clear _write_examples _read_examples _by_index write_pngs eight_bit FILES FORMAT summed told_of _per_class _by_margin QUANTILES"),
 ("evaluation/runner.py", "evaluation/task.py", "Task context_of differences others _plain _same _shard MAY_DIFFER"),
 ("bench.py", "report/bench.py", "table draw save"),
 ("report/curves.py", "report/figures.py", "draw_curves"),
 ("report/table.py", "report/tables.py", "BELIEVING COLOURS results_table evaluation_table comparison_table light_lines _table _cells"),
 ("train/run.py", "runtime/signals.py", "Signals Stopped"),
 ("train/dry_run.py", "train/train_step.py", "attacked perturbed"),
 ("train/loop.py", "train/train_step.py", "work_through updater _culprit _Launched _launch _stopped"),
]
DOCS = {"norms.py": "Norms and eps: what a distance is, which budgets are valid, and what rounding may add.",
 "text.py": "Numbers as a person reads them.", "plugin_calls.py": "The one place where a plugin is called and its error is reported.",
 "cli/options.py": "Options that several verbs share, and how their texts are read.",
 "evaluation/storage.py": "The files of an evaluation: written, read back, sealed.", "evaluation/task.py": "What an evaluation is of: model, data, attacks, budget, seed, shard.",
 "report/bench.py": "The table and the chart of a benchmark.", "runtime/signals.py": "Ctrl-C and SIGTERM: finish the step, save, stop.", "train/train_step.py": "One training step: attack, loss, update."}
def git(*a): subprocess.run(["git", "-C", str(root), *a], check=True)
existing = {modname(root,p) for p in pyfiles(root)}
modmap = {}
for old, new in MOD.items():
    (root/R/new).parent.mkdir(parents=True, exist_ok=True)
    if not (root/R/old).exists(): print("!! missing", old); continue
    git("mv", R+old, R+new)
    if old.endswith(".py"):
        f = lambda p: modname(root, root/R/p)
        modmap[f(old)] = f(new)
for p, t in NEWPK.items():
    q = root/R/p
    if not q.exists(): q.write_text(t)
allmods = existing
modmap.pop("robustmail.lab.__init__", None)
def pass_(modmap, symmap, allmods):
    for p in pyfiles(root):
        src = p.read_text()
        new = rename_dotted_strings(rewrite_imports(src, modname(root,p), modmap, symmap, allmods), modmap, symmap)
        if new != src: p.write_text(new)
    for p in [*root.glob("*.md"), *(root/"docs").rglob("*.md"), root/"tox.ini"]:
        s = p.read_text(); n = rename_dotted_strings(s, modmap, symmap)
        if n != s: p.write_text(n)
pass_(modmap, {}, allmods | {"robustmail"})
symmap = {}
for old, new, names in SYM:
    if not (root/R/old).exists(): print("!! missing", old); continue
    move_symbols(root, [(R+old, R+new, names.split())], {R+k: v for k, v in DOCS.items()})
    for n in names.split(): symmap[(modname(root,root/R/old), n)] = modname(root, root/R/new)
pass_({}, symmap, {modname(root,p) for p in pyfiles(root)})

for q in (root/R/"__init__.py", root/R/"config/catalog.py"):
    t = q.read_text()
    for o, n in modmap.items(): t = t.replace(f'"{o.removeprefix("robustmail.")}"', f'"{n.removeprefix("robustmail.")}"')
    t = t.replace("HERE = Path(__file__).parent\n", "HERE = Path(__file__).parents[1]\n")
    q.write_text(t)
q = root/R/"runtime/provenance.py"; q.write_text(q.read_text().replace("resolve().parents[1]", "resolve().parents[2]"))
q = root/R/"__init__.py"
